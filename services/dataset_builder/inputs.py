"""What a batch is built from: spec, tokenizer, prompts, answers, and the frozen held-out rows.

What never changes is kept between jobs (spec, tokenizer, held-out digests): reading a tokenizer
takes longer than building a shard.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from services.dataset_builder.records import HeldoutIndex, Recipe
from services.dataset_builder.vocabulary import Vocabulary
from stillhouse.chassis.errors import MissingObject, PermanentError, RetryableError
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.responses import PROMPT_SCHEMA, Answer, Item, ResponsesManifest
from stillhouse.contracts.shards import Heldout
from stillhouse.contracts.spec import ResolvedSpec

KEPT_SPECS = 64
KEPT_TOKENIZERS = 2
KEPT_HELDOUTS = 4

V = TypeVar("V")


class Kept(Generic[V]):
    """The last few values of a function of a string, the least recently used dropped first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[str, V] = OrderedDict()

    def get(self, name: str, make: Callable[[], V]) -> V:
        if name not in self._values:
            self._values[name] = make()
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        self._values.move_to_end(name)
        return self._values[name]


@dataclass(frozen=True)
class Tokenization:
    """A teacher's tokenizer with what was found out about its tokens."""

    chat: ChatTokenizer
    vocabulary: Vocabulary


class Inputs:
    """Reads what batches are built from."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._specs: Kept[ResolvedSpec] = Kept(KEPT_SPECS)
        self._tokenizers: Kept[Tokenization] = Kept(KEPT_TOKENIZERS)
        self._heldouts: Kept[HeldoutIndex] = Kept(KEPT_HELDOUTS)

    def spec(self, tenant: str, pipeline: str) -> ResolvedSpec:
        """Read `spec.json`, which is written before anything else of a pipeline."""
        key = artifacts.spec_key(tenant, pipeline)

        def read() -> ResolvedSpec:
            found = self._store.find_model(key, ResolvedSpec)
            if found is None:
                raise MissingObject(f"{key} is not in the store: the pipeline was not accepted")
            return found[0]

        return self._specs.get(key, read)

    def tokenization(self, spec: ResolvedSpec) -> Tokenization:
        """Read the teacher's tokenizer. Raises PermanentError when it is not the spec's."""

        def read() -> Tokenization:
            chat = self._store.get_model(spec.tokenizer, ChatTokenizer)
            found = (chat.tokenizer_sha256, chat.template_sha256)
            if found != (spec.tokenizer_sha256, spec.template_sha256):
                raise PermanentError(
                    f"{spec.tokenizer.key} does not hold the tokenizer and template that spec.json "
                    f"names: expected {(spec.tokenizer_sha256, spec.template_sha256)}, "
                    f"found {found}",
                    reason="tokenizer_differs",
                )
            return Tokenization(chat, Vocabulary(chat))

        return self._tokenizers.get(spec.tokenizer.sha256, read)

    def recipe(self, spec: ResolvedSpec, batch: int) -> Recipe:
        """Settle what decides about the items of a batch.

        Raises RetryableError for a train batch whose held-out rows are not frozen yet: no train
        row may be made before it can be compared with them.
        """
        split = spec.batches.split_of(batch)
        tokens = self.tokenization(spec)
        return Recipe(
            split=split,
            options=spec.spec.dataset,
            signal=spec.signal_of(batch),
            chat=tokens.chat,
            vocabulary=tokens.vocabulary,
            heldout=self._heldout(spec) if split == "train" else None,
        )

    def _heldout(self, spec: ResolvedSpec) -> HeldoutIndex:
        key = artifacts.heldout_key(spec.tenant_id, spec.dataset_id)

        def read() -> HeldoutIndex:
            found = self._store.find_model(key, Heldout)
            if found is None:
                raise RetryableError(
                    f"{key} is not written yet: train batches wait for the held-out rows"
                )
            heldout = found[0]
            return HeldoutIndex(
                prompts=frozenset(heldout.prompt_sha256), answers=frozenset(heldout.answer_sha256)
            )

        return self._heldouts.get(key, read)

    def manifest(self, spec: ResolvedSpec, batch: int, ref: ObjectRef) -> ResponsesManifest:
        """Read the manifest of a batch's answers. Raises PermanentError for another batch's."""
        manifest = self._store.get_model(ref, ResponsesManifest)
        found = (manifest.tenant_id, manifest.pipeline_id, manifest.batch)
        if found != (spec.tenant_id, spec.pipeline_id, batch):
            raise PermanentError(
                f"{ref.key}: expected the answers of batch {batch} of {spec.pipeline_id}, "
                f"found those of {found}",
                reason="wrong_manifest",
            )
        return manifest

    def items(self, manifest: ResponsesManifest) -> list[Item]:
        return read_items(self._store.get(manifest.prompts), manifest.prompts.key)

    def answers(self, manifest: ResponsesManifest) -> dict[str, Answer]:
        """Read the parts of a batch in order; of two answers to one item the first counts."""
        found: dict[str, Answer] = {}
        for ref in manifest.parts:
            for answer in read_answers(self._store.get(ref), ref.key):
                found.setdefault(answer.item_id, answer)
        return found


def read_items(data: bytes, key: str) -> list[Item]:
    """Read `prompts/batch-N.parquet`. Raises PermanentError when it is not one."""
    try:
        table = pq.read_table(io.BytesIO(data), columns=PROMPT_SCHEMA.names)
        as_json = ("messages", "tools")
        return [
            Item(**{**row, **{name: row[name] and json.loads(row[name]) for name in as_json}})
            for row in table.to_pylist()
        ]
    except (pa.ArrowException, ValueError) as error:
        raise PermanentError(
            f"{key}: expected prompts with the columns {PROMPT_SCHEMA.names}, found: {error}",
            reason="prompts_unreadable",
        ) from error


def read_answers(data: bytes, key: str) -> list[Answer]:
    """Read a part. Raises PermanentError when it is not one; the message quotes no answer."""
    try:
        # By line feed alone: other line ends may stand inside an answer.
        lines = gzip.decompress(data).split(b"\n")
        return [Answer.model_validate_json(line) for line in lines if line]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise PermanentError(
            f"{key}: expected gzipped lines of answers, found {type(error).__name__}",
            reason="part_unreadable",
        ) from None
