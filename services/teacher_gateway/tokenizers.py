"""The teacher's tokenizer and chat template, found in a folder of weights that a spec names.

Tokens are the teacher's, so its tokenizer is stored once for all services. It is read from the
weights beside the teacher's address (`reference`), or else from the student's own weights; where
both are named they must be the same tokenizer, because a student cannot learn from ids of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.model_folder import check_model_folder, read_json, resolve_reference
from stillhouse.contracts.canonical import canonical_json
from stillhouse.contracts.chat import MAX_TEMPLATE_CHARACTERS, ChatTokenizer, Message
from stillhouse.contracts.spec import Spec

TOKENIZER_REFUSED = "tokenizer_refused"
TOKENIZER_MISMATCH = "tokenizer_mismatch"
LAYERS_REFUSED = "student_layers_refused"


@dataclass(frozen=True)
class FoundTokenizer:
    """A tokenizer, and the reference of the folder that it came from."""

    chat: ChatTokenizer
    source: str


def find_tokenizer(spec: Spec, roots: Sequence[Path]) -> FoundTokenizer:
    """Read the teacher's tokenizer and check the student's weights against it.

    Raises PermanentError that names the folders at fault.
    """
    student = spec.student.weights
    config = check_model_folder(resolve_reference(student, roots))
    _check_layers(spec, config)
    learned = _load(student, roots)
    reference = spec.teachers[0].reference
    if reference is None or reference == student:
        found = FoundTokenizer(learned, student)
    else:
        taught = _load(reference, roots)
        if taught.tokenizer_sha256 != learned.tokenizer_sha256:
            raise PermanentError(
                f"the student's tokenizer ({student}, SHA-256 {learned.tokenizer_sha256[:12]}) is "
                f"not the teacher's ({reference}, SHA-256 {taught.tokenizer_sha256[:12]}): the "
                "teacher's token ids mean nothing to this student; take student weights with the "
                "teacher's tokenizer, such as its own layers (`layers` and `of`)",
                reason=TOKENIZER_MISMATCH,
            )
        found = FoundTokenizer(taught, reference)
    if found.chat.vocabulary > config["vocab_size"]:
        raise PermanentError(
            f"the tokenizer of {found.source} has {found.chat.vocabulary} tokens and the student "
            f"{student} an embedding for {config['vocab_size']}: take weights that belong together",
            reason=TOKENIZER_MISMATCH,
        )
    return found


def _check_layers(spec: Spec, config: dict[str, Any]) -> None:
    kept, there = spec.student.layers, config["num_hidden_layers"]
    if kept is not None and kept > there:
        raise PermanentError(
            f"`student.layers` asks for {kept} layers and {spec.student.of} has {there}: give at "
            f"most {there}",
            reason=LAYERS_REFUSED,
        )


def _load(reference: str, roots: Sequence[Path]) -> ChatTokenizer:
    folder = resolve_reference(reference, roots)
    data = read_json(folder, "tokenizer.json")
    # Cutting and filling would change ids; the canonical form makes equal tokenizers equal bytes.
    data["truncation"] = data["padding"] = None
    config = read_json(folder, "tokenizer_config.json")
    eos = _token(config.get("eos_token"))
    if eos is None:
        raise PermanentError(
            f"{folder}/tokenizer_config.json names no `eos_token`, the token that ends an answer: "
            "add it",
            reason=TOKENIZER_REFUSED,
        )
    try:
        chat = ChatTokenizer(
            tokenizer_json=canonical_json(data).decode(),
            chat_template=_template(folder, config),
            bos_token=_token(config.get("bos_token")),
            eos_token=eos,
        )
        _ = chat.eos_id
        chat.encode_prompt([Message(role="user", content="Hello")])
    except PermanentError:
        raise
    except Exception as error:  # the tokenizers package raises bare exceptions
        raise PermanentError(
            f"the tokenizer of {reference} cannot be used: {error}", reason=TOKENIZER_REFUSED
        ) from error
    return chat


def _template(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    found = config.get("chat_template")
    if path.is_file():
        with path.open("rb") as file:
            data = file.read(4 * MAX_TEMPLATE_CHARACTERS + 1)
        try:
            found = data.decode()
        except UnicodeDecodeError as error:
            raise PermanentError(f"{path} is not UTF-8", reason=TOKENIZER_REFUSED) from error
    elif isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if not isinstance(found, str) or not found:
        raise PermanentError(
            f"{folder} has no chat template (chat_template.jinja, or `chat_template` in "
            "tokenizer_config.json): take the weights of an instruction model",
            reason=TOKENIZER_REFUSED,
        )
    if len(found) > MAX_TEMPLATE_CHARACTERS:
        raise PermanentError(
            f"the chat template of {folder} has over {MAX_TEMPLATE_CHARACTERS} characters",
            reason=TOKENIZER_REFUSED,
        )
    return found


def _token(value: Any) -> str | None:
    """A special token is written as text, or as an object with its text in `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
