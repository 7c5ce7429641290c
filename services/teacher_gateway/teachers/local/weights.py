"""Weights that answer, opened once and kept between the jobs of a process.

A pool's child keeps one model; another one that is asked for takes its place. Loading goes on in a
thread of its own, so a batch's lease is renewed meanwhile, and a job that could not wait so long
finds the model there the next time. torch is imported by that thread: never by the process that
forks, see `docs/architecture.md`.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.tokenizers import TOKENIZER_MISMATCH, load_tokenizer
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.logs import logger
from stillhouse.chassis.model_folder import check_model_folder, read_json, stage
from stillhouse.chassis.model_opening import open_model
from stillhouse.chassis.references import opened, sources_of
from stillhouse.contracts.chat import ChatTokenizer

log = logger(__name__)

NOT_INSTALLED = "local_weights_not_installed"


@dataclass
class Weights:
    """An open model. `head` is its output layer in float32, `ends` are the ids that end an answer,
    `token_bytes` is what keys and values of one token take."""

    model: Any
    head: Any
    chat: ChatTokenizer
    ends: frozenset[int]
    positions: int
    token_bytes: int
    _dated: dict[date | None, ChatTokenizer] = field(default_factory=dict)

    def logits(self, states: Any) -> Any:
        """float32 [N, V] of hidden states: in bfloat16 a logit of 20 has steps of an eighth."""
        return self.head(states.float())

    @property
    def vocabulary(self) -> int:
        return self.chat.vocabulary

    def chat_on(self, today: date | None) -> ChatTokenizer:
        """The tokenizer as templates see it that day; parsing one takes up to a second."""
        if today is None:
            return self.chat
        if today not in self._dated:
            self._dated = {today: self.chat.on(today)}
        return self._dated[today]


class Shelf:
    """The one model that a process keeps."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[str | None, ...] | None = None
        self._held: Future[Weights] = Future()
        self._loader: threading.Thread | None = None

    def weights(
        self, reference: str, settings: TeacherGatewaySettings, pin: str | None = None
    ) -> Future[Weights]:
        """The model of a reference, which loads unless it is there. An error is not kept."""
        key = (reference, pin, settings.local_device, settings.local_dtype)
        with self._lock:
            failed = self._held.done() and self._held.exception() is not None
            if key != self._key or failed:
                self._key, self._held = key, Future()
                self._held.set_running_or_notify_cancel()  # nobody who waits may cancel it
                self._loader = threading.Thread(
                    target=_load_into,
                    args=(self._held, self._loader, reference, settings, pin),
                    name="weights",
                    daemon=True,
                )
                self._loader.start()
            return self._held


shelf = Shelf()


def _load_into(
    held: Future[Weights],
    earlier: threading.Thread | None,
    reference: str,
    settings: TeacherGatewaySettings,
    pin: str | None,
) -> None:
    if earlier is not None:
        earlier.join()  # two models at once may not fit
    started = time.monotonic()
    try:
        weights = _load(reference, settings, pin)
    except BaseException as error:
        held.set_exception(error)
        return
    log.info(
        "weights loaded",
        reference=reference,
        device=str(weights.model.device),
        seconds=round(time.monotonic() - started, 1),
    )
    held.set_result(weights)


def _load(reference: str, settings: TeacherGatewaySettings, pin: str | None) -> Weights:
    sources = sources_of(settings)
    chat = load_tokenizer(reference, sources, pin=pin)
    with opened(reference, sources, pin=pin) as folder:
        return _open(reference, folder, chat, settings)


def _open(
    reference: str, folder: Path, chat: ChatTokenizer, settings: TeacherGatewaySettings
) -> Weights:
    config = check_model_folder(folder)
    if chat.vocabulary > config["vocab_size"]:
        raise PermanentError(
            f"the tokenizer of {reference} has {chat.vocabulary} tokens and its model "
            f"{config['vocab_size']}: take weights and tokenizer that belong together",
            reason=TOKENIZER_MISMATCH,
        )
    ends = _ends(folder, config, chat)
    try:
        import torch
    except ImportError as error:
        raise PermanentError(
            f"`weights` need torch where the gateway's workers run ({error}): install the extra "
            "`local` there",
            reason=NOT_INSTALLED,
        ) from error
    torch.set_num_threads(settings.local_threads)
    device = settings.local_device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    gc.collect()  # what the last model held
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    dtype = settings.local_dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.work_dir) as scratch:
        staged = Path(scratch) / "weights"
        stage(folder, staged)
        model = open_model(staged, name=reference, dtype=dtype)
    model = model.eval().requires_grad_(False).to(device)
    head = model.get_output_embeddings()
    if model.dtype != torch.float32:
        head = copy.deepcopy(head).float()  # a copy: it may be the embedding's own tensor
    return Weights(
        model=model,
        head=head,
        chat=chat,
        ends=ends,
        positions=int(model.config.max_position_embeddings),
        token_bytes=_token_bytes(model),
    )


def _ends(folder: Path, config: dict[str, Any], chat: ChatTokenizer) -> frozenset[int]:
    """The tokens at which the model stops: its generation config's, its config's, and the one
    that the template ends a turn with."""
    found = {chat.eos_id}
    named = [config.get("eos_token_id")]
    if (folder / "generation_config.json").exists():
        named.append(read_json(folder, "generation_config.json").get("eos_token_id"))
    for value in named:
        # An id that the tokenizer does not have is never sampled.
        listed = value if isinstance(value, list) else [value]
        found |= {i for i in listed if isinstance(i, int) and 0 <= i < chat.vocabulary}
    return frozenset(found)


def _token_bytes(model: Any) -> int:
    config = model.config
    heads = config.num_key_value_heads or config.num_attention_heads
    wide = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * wide * model.dtype.itemsize)
