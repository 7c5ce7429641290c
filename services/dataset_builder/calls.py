"""Whether the tokens that a teacher sampled spell the functions that its answer calls.

Servers parse calls out of the text and write their arguments anew, so the form of the tokens is
the teacher's own: what is looked for in them are the names and the texts of the arguments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stillhouse.contracts.chat import ToolCall


def spells_calls(text: str, said: str, calls: Sequence[ToolCall]) -> bool:
    """Whether a text holds the calls, and what was said beside them."""
    parts = [part for part in (said.strip(),) if part]
    for call in calls:
        parts += [call.function.name, *_texts_in(call.function.arguments)]
    return all(_stands_in(text, part) for part in parts)


def _texts_in(arguments: str) -> list[str]:
    """All keys and texts of JSON arguments; what is no JSON is one text."""
    try:
        waiting: list[Any] = [json.loads(arguments)]
    except (ValueError, RecursionError):
        return [arguments]
    found: list[str] = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            found += value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


def _stands_in(text: str, part: str) -> bool:
    """Whether a text stands in another as it is, or as JSON writes it."""
    forms = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
    return any(form in text for form in forms)
