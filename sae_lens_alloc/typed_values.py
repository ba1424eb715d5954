"""Checks a value read from a file against a type hint, and says in words what a hint accepts."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


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
        if isinstance(value, dict):
            return value
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif type(value) is hint or (hint is float and type(value) is int):
        return value
    raise TypeError(f"expected {in_words(hint)}, got {value!r}")


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
        return "a mapping"
    return {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        NoneType: "null",
    }.get(hint, str(hint))
