"""Spec files on the user's disk: read them, and put what they name where the gateway can see it.

References to files are relative to the spec's own folder, as a reader expects. Prompts that lie on
this machine are uploaded and named by digest, so that the gateway need not see this disk; weights
are too large for that and stay `file:` references of the gateway's machine.
"""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import yaml

from stillhouse.cli.client import Client, Json
from stillhouse.contracts.spec import file_path


class SpecFileError(Exception):
    """The spec's file cannot be read; the text says what to do."""


def template() -> str:
    """Return the commented spec that `stillhouse init` writes."""
    return importlib.resources.files("stillhouse.cli").joinpath("template.yaml").read_text("utf-8")


def load(path: Path) -> Json:
    """Read a spec in YAML or JSON, with its relative `file:` references made absolute."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise SpecFileError(f"{path} is not UTF-8 text: expected a spec in YAML or JSON") from None
    except OSError as error:
        raise SpecFileError(
            f"{path} cannot be read ({error.strerror}): write one with `stillhouse init`"
        ) from None
    try:
        spec = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
        json.dumps(spec, allow_nan=False)
    except yaml.YAMLError as error:
        raise SpecFileError(f"{path} is not YAML: {_at(error)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecFileError(f"{path} has a value that JSON cannot carry: {error}") from None
    if not isinstance(spec, dict):
        raise SpecFileError(f"{path}: expected a mapping that begins with `version: 1`")
    return dict(_absolute(spec, path.resolve().parent))


def upload_inputs(client: Client, spec: Json) -> Json:
    """Upload the prompts that lie on this machine; return the spec that names them by digest."""
    prompts = spec.get("prompts")
    source = prompts.get("from") if isinstance(prompts, dict) else None
    if not (isinstance(prompts, dict) and isinstance(source, str) and source.startswith("file:")):
        return spec
    path = Path(file_path(source))
    if not path.is_file():
        raise SpecFileError(
            f"`prompts.from`: no file {path} on this machine (relative paths start at the spec's "
            "folder)"
        )
    try:
        reference = client.upload(path)
    except OSError as error:
        raise SpecFileError(f"`prompts.from`: {path} cannot be read: {error.strerror}") from None
    return {**spec, "prompts": {**prompts, "from": reference}}


class _Loader(yaml.SafeLoader):
    """YAML as plain data; of two equal keys the first would be lost in silence, so refuse them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"`{key}` stands there twice", problem_mark=key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep=deep)


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(entry, folder) for key, entry in value.items()}
    if isinstance(value, list):
        return [_absolute(entry, folder) for entry in value]
    if isinstance(value, str) and value.startswith("file:"):
        path = Path(file_path(value)).expanduser()
        return f"file:{path if path.is_absolute() else (folder / path).resolve()}"
    return value


def _at(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)
