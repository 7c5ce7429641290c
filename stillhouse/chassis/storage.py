"""The object store: immutable objects, decided by conditional writes.

Writers decide by one `put_object` with `If-None-Match: *`; the loser of a race reads what won.
Readers trust what a manifest names, by size and SHA-256. Nothing is ever overwritten except the
state objects of `leases`. Errors of the network and 5xx answers become StoreUnavailable.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import BaseModel

from stillhouse.chassis.errors import (
    DigestMismatch,
    MissingObject,
    PermanentError,
    StoreRefused,
    StoreUnavailable,
)
from stillhouse.chassis.settings import ServiceSettings
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import canonical_json, sha256_hex

M = TypeVar("M", bound=BaseModel)

_LOST = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
_ABSENT = {"404", "NoSuchKey", "NotFound"}
_BUSY = {"500", "502", "503", "504", "InternalError", "SlowDown", "ServiceUnavailable"}
_REFUSED = {"NoSuchBucket", "ExpiredToken", "RequestTimeTooSkewed", "InvalidToken"}
_CHUNK = 1 << 20


class AlreadyExists(Exception):
    """A conditional write lost: the key holds an object already."""


class Conflict(Exception):
    """A compare-and-swap lost: the object changed since it was read."""


@dataclass(frozen=True)
class Stored:
    """An object as read, with what a compare-and-swap and the age of a lease need."""

    data: bytes
    etag: str
    age_seconds: float


@dataclass(frozen=True)
class Listed:
    """An object as a listing names it."""

    key: str
    size: int
    etag: str


class ObjectStore:
    """One bucket. Safe to share between threads; make a new one after a fork."""

    def __init__(
        self,
        *,
        bucket: str,
        endpoint_url: str | None,
        access_key: str | None,
        secret_key: str | None,
        region: str = "us-east-1",
        connect_timeout: float = 5,
        read_timeout: float = 60,
        attempts: int = 5,
    ) -> None:
        self.bucket = bucket
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint_url,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name=region,
            config=Config(
                signature_version="s3v4",
                connect_timeout=connect_timeout,
                read_timeout=read_timeout,
                retries={"mode": "standard", "total_max_attempts": attempts},
                s3={"addressing_style": "path"},
                max_pool_connections=16,
            ),
        )

    # Reading

    def read(self, key: str) -> Stored | None:
        """Read an object whose digest is not known beforehand; None when absent."""
        with _translated(key):
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=key)
                data = answer["Body"].read()
            except ClientError as error:
                if _code(error) in _ABSENT:
                    return None
                raise
        return Stored(data=data, etag=answer["ETag"], age_seconds=_age(answer))

    def get(self, ref: ObjectRef) -> bytes:
        """Read what a manifest names. Raises MissingObject or DigestMismatch with the key."""
        stored = self.read(ref.key)
        if stored is None:
            raise MissingObject(f"{ref.key} is named by a manifest and not in the store")
        found = sha256_hex(stored.data)
        if len(stored.data) != ref.size or found != ref.sha256:
            raise DigestMismatch(
                f"{ref.key}: expected {ref.size} bytes with SHA-256 {ref.sha256}, found "
                f"{len(stored.data)} bytes with {found}"
            )
        return stored.data

    def get_file(self, ref: ObjectRef, path: Path) -> None:
        """Stream what a manifest names into a file, checking size and digest on the way."""
        digest, size = hashlib.sha256(), 0
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with _translated(ref.key):
                try:
                    body = self._client.get_object(Bucket=self.bucket, Key=ref.key)["Body"]
                except ClientError as error:
                    if _code(error) in _ABSENT:
                        raise MissingObject(
                            f"{ref.key} is named by a manifest and not in the store"
                        ) from error
                    raise
                with temporary.open("wb") as file:
                    for chunk in body.iter_chunks(_CHUNK):
                        digest.update(chunk)
                        size += len(chunk)
                        file.write(chunk)
            if size != ref.size or digest.hexdigest() != ref.sha256:
                raise DigestMismatch(
                    f"{ref.key}: expected {ref.size} bytes with SHA-256 {ref.sha256}, found {size} "
                    f"bytes with {digest.hexdigest()}"
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def chunks(
        self, key: str, start: int = 0, *, etag: str | None = None
    ) -> Iterator[bytes] | None:
        """Stream an object from a byte on, unchecked: the caller compares size and digest.

        None when absent; it is opened before this returns. Raises Conflict where it has another
        ETag than the one that is asked for.
        """
        wanted = {"Range": f"bytes={start}-"} if start else {}
        if etag is not None:
            wanted["IfMatch"] = etag
        with _translated(key):
            try:
                body = self._client.get_object(Bucket=self.bucket, Key=key, **wanted)["Body"]
            except ClientError as error:
                if _code(error) in _ABSENT:
                    return None
                if etag is not None and _code(error) in _LOST:
                    raise Conflict(key) from error
                raise

        def read() -> Iterator[bytes]:
            try:
                with _translated(key):
                    yield from body.iter_chunks(_CHUNK)
            finally:
                body.close()

        return read()

    def get_model(self, ref: ObjectRef, model: type[M]) -> M:
        return model.model_validate_json(self.get(ref))

    def find(self, key: str) -> ObjectRef | None:
        """Name an object by its present content (it is read); None when absent."""
        stored = self.read(key)
        return None if stored is None else _ref(key, stored.data)

    def find_model(self, key: str, model: type[M]) -> tuple[M, ObjectRef] | None:
        """Read a write-once JSON object together with its reference; None when absent."""
        stored = self.read(key)
        if stored is None:
            return None
        return model.model_validate_json(stored.data), _ref(key, stored.data)

    def exists(self, key: str) -> bool:
        return self.age(key) is not None

    def age(self, key: str) -> float | None:
        """Seconds since an object was written, by the store's clock; None when absent."""
        with _translated(key):
            try:
                answer = self._client.head_object(Bucket=self.bucket, Key=key)
            except ClientError as error:
                if _code(error) in _ABSENT:
                    return None
                raise
        return _age(answer)

    def keys(self, prefix: str) -> Iterator[str]:
        """List keys below a prefix. For deletion and metrics only: correctness never lists."""
        with _translated(prefix):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
                for entry in page.get("Contents", []):
                    yield entry["Key"]

    def listed(self, folder: str) -> Iterator[Listed]:
        """Name what lies directly in a folder (a prefix that ends in a slash). For what others
        put there; our own correctness never lists."""
        with _translated(folder):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=folder, Delimiter="/"):
                for entry in page.get("Contents", []):
                    yield Listed(entry["Key"], int(entry["Size"]), str(entry["ETag"]))

    def folders(self, prefix: str) -> Iterator[str]:
        """List what keys below a prefix begin with, up to the next slash and with it. For metrics
        and deletion only, like `keys`."""
        with _translated(prefix):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/"):
                for entry in page.get("CommonPrefixes", []):
                    yield entry["Prefix"]

    # Writing

    def put_new(self, key: str, data: bytes) -> ObjectRef:
        """Write a new object. An equal object there already counts as success; another one
        raises AlreadyExists."""
        ref = _ref(key, data)
        with _translated(key):
            try:
                self._client.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) not in _LOST:
                    raise
                # A retry whose first try had landed loses against itself.
                found = self.find(key)
                if found != ref:
                    raise AlreadyExists(key) from error
        return ref

    def put_new_model(self, key: str, value: BaseModel) -> ObjectRef:
        return self.put_new(key, canonical_json(value.model_dump(mode="json")))

    def put_new_file(self, key: str, path: Path) -> ObjectRef:
        """Write a file of at most 5 GB (one PUT) as a new object at a single-writer key."""
        size = path.stat().st_size
        if size > 5 * 2**30:
            raise PermanentError(
                f"{key}: {size} bytes are more than one PUT may carry (5 GiB)",
                reason="object_too_large",
            )
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        ref = ObjectRef(key=key, size=size, sha256=digest.hexdigest())
        with _translated(key), path.open("rb") as file:
            try:
                self._client.put_object(Bucket=self.bucket, Key=key, Body=file, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) not in _LOST:
                    raise
                found = self._digest(key)
                if found != (ref.size, ref.sha256):
                    raise AlreadyExists(key) from error
        return ref

    def _digest(self, key: str) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        body = self._client.get_object(Bucket=self.bucket, Key=key)["Body"]
        for chunk in body.iter_chunks(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
        return size, digest.hexdigest()

    def swap(self, key: str, data: bytes, etag: str | None) -> str:
        """Compare-and-swap: write only over the object with this ETag (None: over nothing).

        Returns the new ETag. Raises Conflict when the object is another one by now. A lost reply
        can make a success look like a Conflict: callers compare a `write_id` of their own.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        with _translated(key):
            try:
                answer = self._client.put_object(
                    Bucket=self.bucket, Key=key, Body=data, **condition
                )
            except ClientError as error:
                if _code(error) in _LOST | _ABSENT:
                    raise Conflict(key) from error
                raise
        return str(answer["ETag"])

    def delete(self, key: str) -> None:
        """Remove an object that nothing needs any more; absent is fine."""
        with _translated(key):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    # Start-up

    def self_test(self) -> None:
        """Race conditional writes, and look for the store's clock.

        Raises PermanentError when the store ignores conditions or sends no `Date`, by which the
        age of leases and attempts is told, and when it refuses our keys or bucket.
        """
        try:
            self._race()
        except StoreRefused as error:
            raise PermanentError(str(error), reason="store_refused") from error

    def _race(self) -> None:
        key = f"self-test/{secrets.token_hex(8)}"
        bodies = [f"{key}:{n}".encode() for n in range(4)]

        def won(condition: dict[str, str], body: bytes) -> bool:
            with _translated(key):
                try:
                    self._client.put_object(Bucket=self.bucket, Key=key, Body=body, **condition)
                except ClientError as error:
                    if _code(error) in _LOST:
                        return False
                    raise
            return True

        with ThreadPoolExecutor(len(bodies)) as pool:
            first = sum(pool.map(lambda body: won({"IfNoneMatch": "*"}, body), bodies))
            self._check_clock(key)
            stored = self.read(key)
            etag = stored.etag if stored else "absent"
            bodies = [body + b"!" for body in bodies]
            second = sum(pool.map(lambda body: won({"IfMatch": etag}, body), bodies))
        self.delete(key)
        if first != 1 or second != 1:
            raise PermanentError(
                "the object store does not honour conditional writes (expected one winner of a "
                f"race, found {first} with If-None-Match and {second} with If-Match): use a store "
                "that does, such as SeaweedFS from 4.48 on or AWS S3",
                reason="store_without_conditions",
            )

    def _check_clock(self, key: str) -> None:
        with _translated(key):
            answer = self._client.head_object(Bucket=self.bucket, Key=key)
        if "date" not in answer["ResponseMetadata"]["HTTPHeaders"]:
            raise PermanentError(
                "the object store sends no Date header (expected its clock in each answer): put "
                "it behind a server that does, or use another store",
                reason="store_without_clock",
            )


def open_store(settings: ServiceSettings, bucket: str | None = None, **options: Any) -> ObjectStore:
    """Build the store that the settings name, or another bucket at the same place."""
    access, secret = settings.store_access_key, settings.store_secret_key
    return ObjectStore(
        bucket=bucket or settings.store_bucket,
        endpoint_url=settings.store_endpoint_url,
        access_key=access.get_secret_value() if access else None,
        secret_key=secret.get_secret_value() if secret else None,
        region=settings.store_region,
        **options,
    )


def _ref(key: str, data: bytes) -> ObjectRef:
    return ObjectRef(key=key, size=len(data), sha256=sha256_hex(data))


def _age(answer: dict[str, Any]) -> float:
    """Seconds since an object was written, by the store's own clock (`self_test` asked for it)."""
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float(max((now - answer["LastModified"]).total_seconds(), 0.0))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Turn boto's errors into ours, with the key."""
    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if _code(error) in _BUSY or status >= 500:
            raise StoreUnavailable(f"{key}: {error}") from error
        if _code(error) in _REFUSED or status in (401, 403):
            raise StoreRefused(
                f"the object store refused {key}: {error}; check STORE_ENDPOINT_URL, "
                "STORE_BUCKET, STORE_ACCESS_KEY and STORE_SECRET_KEY, and this machine's clock"
            ) from error
        raise PermanentError(
            f"the object store refused {key}: {error}",
            reason="store_refused",
        ) from error
    except BotoCoreError as error:
        raise StoreUnavailable(f"{key}: {error}") from error
