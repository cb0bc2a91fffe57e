"""Tools of a conversation and calls of them, from the forms that records have to the one that chat templates read."""

import json
from typing import Any, Literal

from lightning_itk.data.errors import DataError, kind_of

Tools = Literal["refuse", "learn"]
"""What becomes of records with tools: an error, or calls are learned and results are context."""


def tool_calls(turn: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls of an assistant's turn: `tool_calls`, `function_call`, or ShareGPT's role function_call.

    Raises:
        DataError: a call without a name, or whose arguments are no JSON object.
    """
    if turn.get("role", turn.get("from")) == "function_call":
        calls = _parsed(turn.get("content", turn.get("value")), f"{where}: content")
    else:
        calls = turn.get("tool_calls") or turn.get("function_call") or []
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is {kind_of(calls)}, expected a list")
    found = []
    for number, call in enumerate(calls, 1):
        place = f"{where}: tool call {number}"
        function = call.get("function") or call if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise DataError(f"{place} has no name, expected a function with name and arguments")
        arguments = _parsed(function.get("arguments") or {}, f"{place}: arguments")
        if not isinstance(arguments, dict):
            raise DataError(f"{place}: arguments is {kind_of(arguments)}, expected an object")
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**own, "type": "function", "function": {"name": name, "arguments": arguments}})
    return found


def tool_schemas(value: Any, where: str) -> list[dict[str, Any]]:
    """The tools that may be called: a list of functions with names, or JSON of one.

    Raises:
        DataError: anything else.
    """
    value = _parsed(value, where)
    if not isinstance(value, list):
        raise DataError(f"{where} is {kind_of(value)}, expected a list of tools")
    found = []
    for number, tool in enumerate(value, 1):
        tool = tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": tool}
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{where}: tool {number} has no name, expected a function with name and parameters")
        found.append(tool)
    return found


def _parsed(value: Any, where: str) -> Any:
    """A value, or what the JSON in a text says."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: broken JSON, expected an object") from None
