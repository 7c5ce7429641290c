"""The teachers' tokenizer and chat template, found in the folders of weights that a spec names.

Tokens are the teacher's, so its tokenizer is stored once for all services. It is read from the
weights that a teacher has (`weights`, or `reference` beside its address), or else from the
student's own. A student cannot learn from ids of another tokenizer, nor can one conversation be
rendered in two ways: teachers whose log-probabilities or counts are learnt must agree in both.
The text of a teacher with another tokenizer can be learnt all the same, and nothing else of it.
What a comparison with the teacher's weights needs (`training.distribution`) is checked here as
well: the trainer would find out when answers have been paid for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.teacher_gateway.prompts.lines import PromptLine
from stillhouse.chassis.download import Watching, nobody
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.model_folder import read_json
from stillhouse.chassis.origins import CONFIG
from stillhouse.chassis.references import Sources, opened, pin_of
from stillhouse.contracts.canonical import canonical_json
from stillhouse.contracts.chat import (
    MAX_TEMPLATE_CHARACTERS,
    ChatTokenizer,
    Message,
    TemplateRefused,
)
from stillhouse.contracts.spec import Spec

TOKENIZER_REFUSED = "tokenizer_refused"
TOKENIZER_MISMATCH = "tokenizer_mismatch"
VOCABULARY_MISMATCH = "vocabulary_mismatch"
LAYERS_REFUSED = "student_layers_refused"


@dataclass(frozen=True)
class FoundTokenizer:
    """A tokenizer, and the reference of the folder that it came from.

    `text_only` are the teachers whose own tokenizer is another one; `reference` the weights that
    all teachers are, where they have this tokenizer: the student can be measured against them.
    `pins` name the content of references that may change, so that whoever opens them later opens
    the same.
    """

    chat: ChatTokenizer
    source: str
    text_only: frozenset[str] = frozenset()
    reference: str | None = None
    pins: Mapping[str, str] = field(default_factory=dict)


def find_tokenizer(spec: Spec, sources: Sources, watching: Watching = nobody) -> FoundTokenizer:
    """Read the teachers' tokenizer and check the student's weights against it.

    `watching` is told of everything that is fetched. Raises PermanentError that names the folders
    at fault.
    """
    student = spec.student.weights
    named = {student, *(t.known_weights for t in spec.teachers if t.known_weights)}
    pins: dict[str, str] = {}
    for name in sorted(named):
        watching(0, 0)
        if (pin := pin_of(name, sources)) is not None:
            pins[name] = pin

    def read(reference: str) -> tuple[dict[str, Any], ChatTokenizer]:
        pin = pins.get(reference)
        with opened(reference, sources, part="tokenizer", pin=pin, watching=watching) as folder:
            return read_json(folder, CONFIG), _read(folder, reference)

    config, learned = read(student)
    _check_layers(spec, config)
    compared = spec.training.distribution == "weights"
    same: dict[str, ChatTokenizer] = {}
    text_only = set()
    for teacher in spec.teachers:
        reference = teacher.known_weights
        if reference is None or reference in same:
            continue
        theirs, taught = (config, learned) if reference == student else read(reference)
        if taught.tokenizer_sha256 == learned.tokenizer_sha256:
            same[reference] = taught
        elif spec.signal.kind in ("text", "auto") and not compared:
            text_only.add(teacher.name)
        else:
            instead = "`training.loss: sft` with " if compared else ""
            raise PermanentError(
                f"the student's tokenizer ({student}, SHA-256 {learned.tokenizer_sha256[:12]}) is "
                f"not the teacher's ({reference}, SHA-256 {taught.tokenizer_sha256[:12]}): the "
                "teacher's token ids mean nothing to this student; take student weights with the "
                "teacher's tokenizer, such as its own layers (`layers` and `of`), or "
                f"{instead}`signal.kind: text`",
                reason=TOKENIZER_MISMATCH,
            )
        if compared:
            _check_compared(reference, theirs, student, config)
    source, chat = next(iter(same.items()), (student, learned))
    if spec.signal.kind != "text":
        _check_templates(source, same)
    if chat.vocabulary > config["vocab_size"]:
        raise PermanentError(
            f"the tokenizer of {source} has {chat.vocabulary} tokens and the student "
            f"{student} an embedding for {config['vocab_size']}: take weights that belong together",
            reason=TOKENIZER_MISMATCH,
        )
    everyones = {teacher.known_weights for teacher in spec.teachers}
    return FoundTokenizer(
        chat, source, frozenset(text_only), source if everyones == {source} else None, pins
    )


def _check_compared(
    teacher: str, theirs: Mapping[str, Any], student: str, own: Mapping[str, Any]
) -> None:
    """Refuse weights whose output layers are of different sizes, such as by padding."""
    if theirs["vocab_size"] != own["vocab_size"]:
        raise PermanentError(
            f"the teacher {teacher} has an output layer for {theirs['vocab_size']} ids and the "
            f"student {student} for {own['vocab_size']} (`vocab_size` of config.json, with its "
            "padding), and `training.distribution: weights` compares them id by id: take a student "
            "of the same size, such as the teacher's own layers (`layers` and `of`), or leave "
            "`distribution` out and learn from the stored signal (`loss: forward_kl`)",
            reason=VOCABULARY_MISMATCH,
        )


def _check_templates(source: str, same: Mapping[str, ChatTokenizer]) -> None:
    for reference, chat in same.items():
        if chat.template_sha256 != same[source].template_sha256:
            raise PermanentError(
                f"the chat templates of {source} and {reference} are not the same, and rows are "
                "rendered in one way: put the same chat template into both folders, leave one "
                "teacher out, or ask for `signal.kind: text`",
                reason=TOKENIZER_MISMATCH,
            )


def prompt_tokens(chat: ChatTokenizer, line: PromptLine) -> int:
    """Count the tokens of a prompt's rendering.

    Raises TemplateRefused, also where the template would leave out what the prompt holds: the
    teacher would see functions of which the student hears nothing.
    """
    ids = chat.encode_prompt(line.messages, line.tools)
    calls = [call.function.name for m in line.messages for call in m.tool_calls or ()]
    if line.tools or calls:
        rendered = chat.render(line.messages, line.tools)
        if line.tools and rendered == chat.render(line.messages):
            raise TemplateRefused("the chat template does not write the `tools` of a prompt")
        if any(name not in rendered for name in calls):
            raise TemplateRefused("the chat template does not write the `tool_calls` of a message")
    return len(ids)


def _check_layers(spec: Spec, config: dict[str, Any]) -> None:
    kept, there = spec.student.layers, config["num_hidden_layers"]
    if kept is not None and kept > there:
        raise PermanentError(
            f"`student.layers` asks for {kept} layers and {spec.student.of} has {there}: give at "
            f"most {there}",
            reason=LAYERS_REFUSED,
        )


def load_tokenizer(reference: str, sources: Sources, *, pin: str | None = None) -> ChatTokenizer:
    """Read the tokenizer of a folder of weights. Raises PermanentError that says what is wrong."""
    with opened(reference, sources, part="tokenizer", pin=pin) as folder:
        return _read(folder, reference)


def _read(folder: Path, reference: str) -> ChatTokenizer:
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
