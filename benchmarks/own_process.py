"""Work in a process of its own, with a time limit."""

import io
import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

TRACEBACK_LINES = 12
# What a process that has sent its result takes to clean up, at most.
SECONDS_TO_END = 10
_starting = Lock()


class ProcessFailed(Exception):
    """
    Why a process gave no result.

    Args:
        kind: Name of the exception's class, or "" where the process was ended.
        message: What happened, in one line.
        last_lines: Last lines of the traceback, if there is one.
    """

    def __init__(self, kind: str, message: str, last_lines: list[str]) -> None:
        super().__init__("\n".join([message, *last_lines]))
        self.kind = kind
        self.message = message
        self.last_lines = last_lines


def in_own_process(
    function: Callable[..., Any], *arguments: Any, seconds: float | None = None
) -> Any:
    """
    What a function returns in a fresh process, which never had a higher peak of memory, prints
    nothing and leaves nothing behind.

    Args:
        function: Function of a module.
        arguments: Its arguments, which can be pickled.
        seconds: The process is killed after so many.

    Raises:
        ProcessFailed: if it raises, dies or takes longer.
    """
    # A server with the libraries loaded forks for each process: that saves loading them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_send_result, args=(sender, function, arguments), daemon=True
    )
    with _starting:
        process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise ProcessFailed("", f"it took longer than {seconds:.0f} s", [])
        succeeded, result = receiver.recv()
    except EOFError:
        message = "the process was killed, probably for its memory"
        raise ProcessFailed("", message, []) from None
    else:
        process.join(SECONDS_TO_END)
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not succeeded:
        raise ProcessFailed(*result)
    return result


def _send_result(
    sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            outcome = (True, function(*arguments))
    except BaseException as error:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        lines = traceback.format_exc().splitlines()[-TRACEBACK_LINES:]
        name = type(error).__name__
        outcome = (False, (name, f"{name}: {first_line}", lines))
    sender.send(outcome)
