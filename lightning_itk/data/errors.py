"""What is wrong with the user's data, in words."""

from typing import Any


class DataError(ValueError):
    """Something is wrong with the user's data; the message is one line: where, what, and what is expected."""


def kind_of(value: Any) -> str:
    """What a value of a record is, in words."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "missing" if value is None else kinds.get(type(value), type(value).__name__)
