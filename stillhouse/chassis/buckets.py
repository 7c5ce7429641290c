"""Weights and prompts of `s3://bucket/key`, in buckets that the operator named.

They are read with the service's own keys, which also open the platform's own bucket, so a name
that is not in the list is refused before anything is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from stillhouse.chassis.errors import PermanentError, StoreRefused, StoreUnavailable
from stillhouse.chassis.origins import (
    ORIGIN_CHANGED,
    ORIGIN_MISSING,
    ORIGIN_REFUSED,
    OriginRefused,
    OriginUnavailable,
    RemoteFile,
    may_be_fetched,
)
from stillhouse.chassis.storage import Conflict, ObjectStore
from stillhouse.contracts.canonical import digest_of

BUCKET_REFUSED = "bucket_not_allowed"
_MOST_OBJECTS = 10_000


@dataclass(frozen=True)
class NamedBuckets:
    """The buckets that references may name. `setting` is where the operator names them."""

    names: Sequence[str]
    open: Callable[[str], ObjectStore]
    setting: str

    def split(self, reference: str) -> tuple[str, str]:
        """Return bucket and key of a reference. Raises PermanentError where it may not be read."""
        bucket, _, key = reference.removeprefix("s3://").partition("/")
        key = key.removesuffix("/")
        # Some stores read `..` as a way out of the bucket.
        if not key or any(part in ("", ".", "..") for part in key.split("/")):
            raise OriginRefused(
                f"expected s3://bucket/key without empty parts and dots, found {reference!r}",
                reason=ORIGIN_REFUSED,
            )
        if bucket not in self.names:
            raise OriginRefused(
                f"{reference}: the operator of this service did not name the bucket {bucket!r} in "
                f"{self.setting} ({', '.join(self.names) or 'none'}): use one of those, or have "
                "it added",
                reason=BUCKET_REFUSED,
            )
        return bucket, key

    def exists(self, reference: str) -> bool:
        bucket, key = self.split(reference)
        with _translated(reference):
            return self.open(bucket).exists(key)

    def read(self, reference: str) -> Iterator[bytes]:
        """Open one object and yield its bytes."""
        bucket, key = self.split(reference)
        with _translated(reference):
            chunks = self.open(bucket).chunks(key)
        if chunks is None:
            raise OriginRefused(
                f"{reference} does not exist: check bucket and key", reason=ORIGIN_MISSING
            )
        return chunks


class BucketFolder:
    """The objects directly below a prefix. Objects may be replaced, so the pin is a digest of
    names, sizes and ETags, and each is read only while it still has its ETag."""

    def __init__(self, reference: str, buckets: NamedBuckets) -> None:
        self.reference = reference
        bucket, self._prefix = buckets.split(reference)
        self._store = buckets.open(bucket)
        self._files: dict[str, RemoteFile] | None = None

    def pin(self) -> str:
        return digest_of({name: [file.size, file.version] for name, file in self.files().items()})

    def files(self) -> Mapping[str, RemoteFile]:
        if self._files is None:
            self._files = self._list()
        return self._files

    def _list(self) -> dict[str, RemoteFile]:
        files: dict[str, RemoteFile] = {}
        with _translated(self.reference):
            for number, entry in enumerate(self._store.listed(f"{self._prefix}/")):
                if number == _MOST_OBJECTS:
                    raise OriginRefused(
                        f"{self.reference} holds over {_MOST_OBJECTS} objects: expected a folder "
                        "as save_pretrained writes it",
                        reason=ORIGIN_REFUSED,
                    )
                name = entry.key.removeprefix(f"{self._prefix}/")
                if may_be_fetched(name):
                    files[name] = RemoteFile(name, entry.size, entry.etag)
        return files

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        try:
            with _translated(self.reference):
                key = f"{self._prefix}/{file.name}"
                chunks = self._store.chunks(key, start, etag=file.version)
                if chunks is None:
                    raise Conflict(key)
                yield from chunks
        except Conflict as error:
            raise OriginRefused(
                f"{self.reference}: {file.name} was replaced while it was fetched: submit the "
                "pipeline again once the folder is at rest",
                reason=ORIGIN_CHANGED,
            ) from error


@contextmanager
def _translated(reference: str) -> Iterator[None]:
    """Say what a store's refusal means for a bucket that a spec names."""
    try:
        yield
    except StoreRefused as error:
        raise OriginRefused(
            f"the object store refuses {reference}: does the bucket exist, and may the service's "
            "STORE_ACCESS_KEY list and read it?",
            reason=ORIGIN_REFUSED,
        ) from error
    except StoreUnavailable as error:
        raise OriginUnavailable(str(error)) from error
    except PermanentError as error:
        if error.reason != "store_refused":
            raise
        raise OriginRefused(
            f"the object store refuses {reference}: {error}", reason=ORIGIN_REFUSED
        ) from error
