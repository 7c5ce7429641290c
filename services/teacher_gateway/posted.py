"""A posted spec: from bytes (JSON or YAML) to a `Spec`, or to errors that a person can act on.

Nothing but plain data is built: YAML by the safe loader without anchors, both without duplicate
keys and without deep nesting, so that a small body cannot become a large or ambiguous one.
"""

from __future__ import annotations

import difflib
import json
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from services.teacher_gateway.problems import FieldError, ProblemError
from stillhouse.contracts.artifacts import ID_PATTERN
from stillhouse.contracts.spec import Spec

MAX_DEPTH = 32
JSON_TYPES = ("application/json",)
_SHOWN = 4  # errors in the one sentence; all of them are in `errors`
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml")


class Unreadable(ValueError):
    """The body is not the JSON or YAML that it says it is."""


def read_document(body: bytes, content_type: str | None) -> Any:
    """Parse what was posted as JSON or YAML. Raises ProblemError (415 or 422)."""
    media = (content_type or "").partition(";")[0].strip().lower()
    if media not in JSON_TYPES + YAML_TYPES:
        raise ProblemError(
            415,
            "media-type",
            f"expected Content-Type application/json or application/yaml, found {media or 'none'}",
        )
    kind = "JSON" if media in JSON_TYPES else "YAML"
    try:
        return _read_json(body) if kind == "JSON" else _read_yaml(body)
    except Unreadable as error:
        raise ProblemError(422, "malformed", f"the body is not {kind}: {error}") from error


def read_spec(body: bytes, content_type: str | None) -> Spec:
    """Parse and check a posted spec. Raises ProblemError (415 or 422)."""
    data = read_document(body, content_type)
    if not isinstance(data, dict):
        raise ProblemError(
            422,
            "malformed",
            f"expected a mapping with `version: 1` at the top, found {_kind(data)}",
        )
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        errors = spec_errors(error)
        shown = [f"`{e.field}` {e.message}" if e.field else e.message for e in errors[:_SHOWN]]
        if len(errors) > _SHOWN:
            shown.append(f"and {len(errors) - _SHOWN} more")
        raise ProblemError(422, "invalid-spec", "; ".join(shown), errors=errors) from error


def _read_json(body: bytes) -> Any:
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"byte {error.start} is not UTF-8") from error
    _check_depth(text)
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise Unreadable(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from error


def _check_depth(text: str) -> None:
    depth, quoted, escaped = 0, False, False
    for character in text:
        if quoted:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                quoted = False
        elif character == '"':
            quoted = True
        elif character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise Unreadable(f"it is nested more than {MAX_DEPTH} levels deep")
        elif character in "]}":
            depth -= 1


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Unreadable(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise Unreadable(f"{name} is not a number of JSON")


class _Loader(yaml.SafeLoader):
    """The safe loader without anchors, duplicate keys, dates and deep nesting."""

    # Without dates: `2026-01-01` stays the text that it looks like.
    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class has it the same way)
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            line = event.start_mark.line + 1
            raise Unreadable(f"line {line}: anchors and aliases (&, *) are not accepted")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable(f"it is nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(getattr(key, "value", key))
            if name in seen:
                line = key.start_mark.line + 1
                raise Unreadable(f"line {line}: the key {name!r} stands there twice")
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(body: bytes) -> Any:
    try:
        # A SafeLoader by inheritance: it builds plain data only.
        return yaml.load(body.decode("utf-8-sig"), Loader=_Loader)  # noqa: S506
    except UnicodeDecodeError as error:
        raise Unreadable(f"byte {error.start} is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Unreadable(f"{where}{error.problem or error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(str(error)) from error


# Errors in a user's words


def spec_errors(error: ValidationError, model: type[BaseModel] = Spec) -> list[FieldError]:
    """Say of each error where it is, what was expected and what was found. `model` is what was
    posted."""
    found: list[FieldError] = []
    for entry in error.errors(include_url=False):
        location = entry["loc"]
        if entry["type"] == "missing":
            message = "is missing"
        elif entry["type"] == "extra_forbidden":
            message = f"is not a field here{_suggestion(location, model)}"
        elif entry["type"] == "literal_error":
            message = f"must be {entry['ctx']['expected']}, found {_shown(entry['input'])}"
        elif entry["type"] == "string_pattern_mismatch" and (
            words := _PATTERNS.get(entry["ctx"]["pattern"])
        ):
            message = words
        elif entry["type"] == "value_error":
            message = str(entry["ctx"]["error"])
        else:
            message = f"{_lower(entry['msg'])}, found {_shown(entry['input'])}"
        found.append(FieldError(field=_path(location), message=message))
    return found


# What a pattern asks for, in words. The value is not repeated: it may be a misplaced secret.
_PATTERNS = {
    ID_PATTERN: "must be of small letters, digits and hyphens, 63 at most, such as `support-0-6b`",
    r"^https?://[^\s@]+$": "must begin with http:// or https:// and hold no user or password, "
    "such as http://127.0.0.1:8080/v1",
    r"^[A-Z][A-Z0-9_]{0,99}$": "must be the name of a variable in capitals, such as QWEN_API_KEY",
}


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f"{'.' if path else ''}{part}"
    return path


def _lower(message: str) -> str:
    return message.replace("Input should", "should", 1).replace("String should", "should", 1)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return _kind(value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else f"{value!r:.80}"


def _suggestion(location: tuple[int | str, ...], posted: type[BaseModel]) -> str:
    """Name the known field that a misspelt one is most like."""
    model: Any = posted
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        model = _model_in(field.annotation) if field else None
        if model is None:
            return ""
    names = sorted(field.alias or name for name, field in model.model_fields.items())
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    if close:
        return f": did you mean `{close[0]}`?"
    return f"; expected one of {', '.join(names)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a))), None)
