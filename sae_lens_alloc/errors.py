"""Errors in one sentence."""

# Some libraries list all that would have been right.
LONGEST_SENTENCE = 1000


def in_one_sentence(error: BaseException) -> str:
    """
    What went wrong, in one line: the message, with the error's name where it is none of a
    user's, and the reason that another error gave for it.
    """
    text = " ".join(str(error).split())
    if len(text) > LONGEST_SENTENCE:
        text = f"{text[:LONGEST_SENTENCE]} …"
    if not text or not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    # a plain ValueError is a sentence already
    if error.__cause__ is not None and type(error) is not ValueError:
        reason = as_reason(error.__cause__)
        if reason not in text:
            text = f"{text.removesuffix('.')} ({reason})"
    return text


def as_reason(error: BaseException) -> str:
    """`in_one_sentence` without the full stop, to be part of another sentence."""
    return in_one_sentence(error).removesuffix(".")
