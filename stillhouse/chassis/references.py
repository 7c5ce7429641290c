"""References to weights, tokenizers and prompts in a spec, opened by their scheme.

    file:/abs/path               a folder below one that the operator named
    s3://bucket/prefix           objects in a bucket that the operator named
    hf://owner/name@<commit>     a repository of the hub, where the operator allows it

    with opened(reference, sources) as folder:                  # everything, tensors included
    with opened(reference, sources, part="tokenizer") as folder:   # a few small files

Whatever the scheme, the folder has passed the checks of `model_folder`. What was fetched lies in a
cache (`model_cache`) and stays there at least until the block ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.chassis.buckets import BucketFolder, NamedBuckets
from stillhouse.chassis.download import Watching, nobody
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.hub import DEFAULT_ENDPOINT, HubAccess, HubRepository
from stillhouse.chassis.model_cache import Choose, ModelCache
from stillhouse.chassis.model_folder import (
    FOLDER_MISSING,
    FOLDER_REFUSED,
    MAX_JSON_BYTES,
    WEIGHTS_REFUSED,
    check_config,
    check_model_folder,
    checked_index,
    read_json,
    resolve_folder,
)
from stillhouse.chassis.origins import (
    CONFIG,
    INDEX,
    ORIGIN_MISSING,
    ORIGIN_REFUSED,
    SMALL_FILES,
    WHOLE_WEIGHTS,
    Origin,
    OriginRefused,
    RemoteFile,
)
from stillhouse.chassis.settings import ReferenceSettings
from stillhouse.chassis.storage import open_store

Part = Literal["weights", "tokenizer"]


@dataclass(frozen=True)
class Sources:
    """Where references may lead. `hub` is None where the operator does not allow it."""

    file_roots: Sequence[Path]
    buckets: NamedBuckets
    hub: HubAccess | None
    cache: ModelCache
    prefix: str


def sources_of(settings: ReferenceSettings, environ: Mapping[str, str] = os.environ) -> Sources:
    """Read what the operator allows from a service's settings; opens nothing.

    `HF_ENDPOINT` and `HF_TOKEN` are the hub's own variables.
    """
    hub = HubAccess(
        endpoint=(environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/"),
        token=environ.get("HF_TOKEN") or None,
        token_owners=settings.token_owners,
    )
    folder = settings.cache_dir or settings.work_dir / "models"
    return Sources(
        file_roots=settings.file_roots,
        buckets=NamedBuckets(
            settings.s3_buckets,
            lambda bucket: open_store(settings, bucket, read_timeout=20, attempts=3),
            f"{settings.PREFIX}S3_BUCKETS",
        ),
        hub=hub if settings.hub_allowed else None,
        cache=ModelCache(folder, settings.cache_gib << 30, prefix=settings.PREFIX),
        prefix=settings.PREFIX,
    )


@contextmanager
def opened(
    reference: str,
    sources: Sources,
    *,
    part: Part = "weights",
    pin: str | None = None,
    watching: Watching = nobody,
) -> Iterator[Path]:
    """Yield the folder of weights that a reference names, on the local disk and checked.

    With a `pin` (see `pin_of`) other content is refused, and content that was fetched before is
    taken without asking its place. `watching` is told the bytes so far and in all while it is
    fetched; what it raises ends that.

    Raises PermanentError where the reference may not be opened, names nothing or holds what is
    refused, and RetryableError where its place is away or there is no room.
    """
    if reference.startswith("file:"):
        folder = resolve_folder(reference, sources.file_roots)
        check_model_folder(folder)
        yield folder
        return
    origin = _origin(reference, sources)
    choose = _choosing(reference, part)
    with sources.cache.opened(origin, part, pin or origin.pin(), choose, watching) as folder:
        check_config(read_json(folder, CONFIG))
        yield folder


def pin_of(reference: str, sources: Sources) -> str | None:
    """Name what a reference leads to now, where that may change and can be noticed: the objects
    of an `s3:` folder. A commit of the hub names itself, and a `file:` folder is not pinned."""
    return _origin(reference, sources).pin() if reference.startswith("s3:") else None


def open_object(reference: str, sources: Sources) -> Iterator[bytes]:
    """Yield the bytes of one `s3://bucket/key`, such as a file of prompts. Raises like `opened`."""
    return sources.buckets.read(reference)


def check_object(reference: str, sources: Sources) -> None:
    """Refuse an `s3://bucket/key` that may not be read or does not exist, without reading it."""
    if not sources.buckets.exists(reference):
        raise OriginRefused(
            f"{reference} does not exist: check bucket and key", reason=ORIGIN_MISSING
        )


def _origin(reference: str, sources: Sources) -> Origin:
    if reference.startswith("s3:"):
        return BucketFolder(reference, sources.buckets)
    if not reference.startswith("hf:"):
        raise PermanentError(
            f"expected a reference that starts with file:, s3: or hf:, found {reference!r}",
            reason=FOLDER_REFUSED,
        )
    if sources.hub is None:
        raise OriginRefused(
            f"{reference}: this service does not fetch from the hub: have the operator set "
            f"{sources.prefix}ALLOW_HUB=true, or name a folder as file: or s3:",
            reason=ORIGIN_REFUSED,
        )
    return HubRepository(reference, sources.hub)


def _choosing(reference: str, part: Part) -> Choose:
    """Return what picks the files to fetch: the tensors that config or index name, or none."""

    def choose(listed: Mapping[str, RemoteFile], small: Callable[[str], Path]) -> list[RemoteFile]:
        if CONFIG not in listed:
            raise PermanentError(
                f"{reference} has no {CONFIG}: expected a folder as save_pretrained writes it",
                reason=FOLDER_MISSING,
            )
        if WHOLE_WEIGHTS not in listed and INDEX not in listed:
            raise PermanentError(
                f"{reference} has neither {WHOLE_WEIGHTS} nor {INDEX}: other formats can run "
                "code when they are opened; save the weights again with save_pretrained",
                reason=WEIGHTS_REFUSED,
            )
        names = SMALL_FILES & listed.keys()
        if part == "tokenizer" or WHOLE_WEIGHTS in listed:
            names -= {INDEX}
        for name in sorted(names):
            if listed[name].size > MAX_JSON_BYTES:
                raise PermanentError(
                    f"{reference}: {name} has over {MAX_JSON_BYTES} bytes: that is no {name}",
                    reason=FOLDER_REFUSED,
                )
        # Before gigabytes are fetched for nothing.
        check_config(read_json(small(CONFIG).parent, CONFIG))
        if part == "weights":
            tensors = {WHOLE_WEIGHTS}
            if WHOLE_WEIGHTS not in listed:
                tensors = set(checked_index(small(INDEX).parent)["weight_map"].values())
            if missing := sorted(tensors - listed.keys()):
                raise PermanentError(
                    f"{reference}: {INDEX} names {missing[0]}, which is not there: upload it",
                    reason=WEIGHTS_REFUSED,
                )
            names |= tensors
        return [listed[name] for name in sorted(names)]

    return choose
