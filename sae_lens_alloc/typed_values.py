"""
Checks a value read from a file against a type hint, and says in words what a hint accepts.

pydantic's TypeAdapter does not replace this: its strict mode refuses 1e9 as an integer and a list
as a tuple, its lax mode takes true for 1 and 1 for true, and both turn integers into floats.
OmegaConf converts strings to numbers, and the sentences would have to be written here with either.
"""

import difflib
import math
from collections.abc import Iterable
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

# No machine counts further in a training, and what is computed from such numbers still fits.
LARGEST_NUMBER = 10**15

_repr = Repr()
_repr.maxstring = _repr.maxother = 200
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 20


def convert(value: Any, hint: Any) -> Any:
    """
    Returns `value` if `hint` accepts it. A list becomes a tuple where a tuple is asked for,
    and a whole float such as 1e9 an integer; a bool is never taken for a number.

    Raises:
        TypeError: if `hint` does not accept the value.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        for option in args:
            try:
                return convert(value, option)
            except TypeError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif origin in (list, tuple):
        if isinstance(value, list | tuple):
            return origin(convert(item, args[0]) for item in value)
    elif hint is dict or origin is dict:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return value
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif type(value) is hint or (hint is float and type(value) is int):
        return value
    raise TypeError(f"expected {in_words(hint)}, got {shown(value)}")


def in_words(hint: Any) -> str:
    """What `hint` accepts, as the end of a sentence: "an integer or null"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(in_words(option) for option in args)
    if origin is Literal:
        return " or ".join(repr(option) for option in args)
    if origin in (list, tuple):
        return f"a list with each item {in_words(args[0])}"
    if hint is dict or origin is dict:
        return "a mapping whose keys are strings"
    return {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        NoneType: "null",
    }.get(hint, str(hint))


def shown(value: Any) -> str:
    """`repr(value)` for a sentence: what is long or deep is cut short."""
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER**2:
        # Python refuses to print the longest
        return f"{'-' if value < 0 else ''}10^{int(value.bit_length() * math.log10(2))}"
    return _repr.repr(value)


def check_number(key: str, value: Any) -> None:
    """Raises ValueError if `value`, or a number in it, is infinite, NaN or absurdly large."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, int | float) and not abs(number) <= LARGEST_NUMBER:
            raise ValueError(
                f"{key} must be between -{LARGEST_NUMBER:.0e} and {LARGEST_NUMBER:.0e}, "
                f"got {shown(number)}."
            )


def check_choice(key: str, value: Any, valid: Iterable[str]) -> None:
    """Raises ValueError, with the nearest valid name, if `value` is not among `valid`."""
    if value not in list(valid):
        near = nearest(value if isinstance(value, str) else shown(value), valid)
        raise ValueError(f"{key} {shown(value)} is unknown, did you mean {near!r}?")


def nearest(name: str, valid: Iterable[str]) -> str:
    """The one of `valid` that is spelt most like `name`."""
    # the time grows with the square of the length
    return difflib.get_close_matches(name[:100], list(valid), n=1, cutoff=0)[0]
