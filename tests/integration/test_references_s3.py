"""`s3:` references in the session's real store: named buckets, pins, changes, prompts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.chassis import download, references
from stillhouse.chassis.buckets import BucketFolder
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.origins import RemoteFile
from stillhouse.chassis.settings import SettingsError
from stillhouse.embedded.parts import Store
from tests.support.references import WHOLE, Bucket, contents, model_files, weights_bucket


@pytest.fixture
def bucket(store_part: Store, tmp_path: Path) -> Iterator[Bucket]:
    with weights_bucket(store_part, tmp_path / "cache") as found:
        found.put(model_files() | {"deep/a.safetensors": b""})
        yield found


def fetched(bucket: Bucket, reference: str = "", **how: Any) -> dict[str, bytes]:
    with references.opened(reference or bucket.reference, bucket.sources(), **how) as folder:
        return contents(folder)


def refused(sources: references.Sources, reference: str, **how: Any) -> PermanentError:
    with (
        pytest.raises(PermanentError) as caught,
        references.opened(reference, sources, **how),
    ):
        pass
    return caught.value


def test_a_prefix_is_fetched_as_a_model_folder(bucket: Bucket) -> None:
    files = model_files()
    assert fetched(bucket) == {name: files[name] for name in WHOLE}
    assert fetched(bucket, f"{bucket.reference}/") == {name: files[name] for name in WHOLE}
    names = set(fetched(bucket, part="tokenizer"))
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_pin_holds_every_service_to_the_content_that_was_accepted(
    bucket: Bucket, tmp_path: Path
) -> None:
    pin = references.pin_of(bucket.reference, bucket.sources())
    assert pin is not None
    before = fetched(bucket, pin=pin)
    bucket.put({"README.md": b"no part of it"})
    assert references.pin_of(bucket.reference, bucket.sources()) == pin
    bucket.put({"model-00001-of-00002.safetensors": b"others"})
    assert references.pin_of(bucket.reference, bucket.sources()) != pin
    # What was fetched is still what was accepted; who comes later notices.
    assert fetched(bucket, pin=pin) == before
    late = bucket.sources(cache_dir=tmp_path / "another")
    error = refused(late, bucket.reference, pin=pin)
    assert (error.reason, "submit the pipeline again" in str(error)) == ("reference_changed", True)
    assert fetched(bucket)["model-00001-of-00002.safetensors"] == b"others"


def test_an_object_that_is_replaced_meanwhile_is_refused(bucket: Bucket) -> None:
    sources = bucket.sources()
    origin = references._origin(bucket.reference, sources)
    file = origin.files()["tokenizer.json"]
    assert b"".join(origin.read(file, 1)) == b"}"
    bucket.put({"tokenizer.json": b"[]"})
    with pytest.raises(PermanentError, match="was replaced while it was fetched"):
        list(origin.read(file, 0))


def test_only_buckets_that_the_operator_named_are_read(bucket: Bucket) -> None:
    closed = bucket.sources(s3_buckets="")
    assert "READER_S3_BUCKETS (none)" in str(refused(closed, bucket.reference))
    platform = f"s3://{bucket.part.bucket}/tenants/other/pipelines"
    error = refused(bucket.sources(), platform)
    assert error.reason == "bucket_not_allowed"
    for escape in (f"../{bucket.part.bucket}/tenants", "a/../../b", "./a", "a//b"):
        error = refused(bucket.sources(), f"s3://{bucket.store.bucket}/{escape}")
        assert error.reason == "reference_refused"
    with pytest.raises(PermanentError, match="did not name the bucket"):
        references.open_object(f"{platform}/prompts.jsonl", bucket.sources())
    with pytest.raises(SettingsError, match="in which every tenant's data lies"):
        bucket.sources(s3_buckets=bucket.part.bucket)


def test_what_is_not_there_is_said(bucket: Bucket) -> None:
    sources = bucket.sources(s3_buckets=f"absent-{bucket.store.bucket},{bucket.store.bucket}")
    empty = refused(sources, f"s3://{bucket.store.bucket}/models/none")
    assert "has no config.json" in str(empty)
    absent = refused(sources, f"s3://absent-{bucket.store.bucket}/models/tiny")
    assert "does the bucket exist" in str(absent)
    other = bucket.sources(store_secret_key="wrong")
    assert "may the service's STORE_ACCESS_KEY list and read it" in str(
        refused(other, bucket.reference)
    )


def test_prompts_are_read_from_a_named_bucket(bucket: Bucket) -> None:
    data = b'{"prompt": "Hello"}\n' * 200_000
    bucket.put({"prompts.jsonl": data})
    reference = f"{bucket.reference}/prompts.jsonl"
    references.check_object(reference, bucket.sources())
    assert b"".join(references.open_object(reference, bucket.sources())) == data
    for open_it in (references.check_object, references.open_object):
        with pytest.raises(PermanentError, match="does not exist"):
            open_it(f"{bucket.reference}/none.jsonl", bucket.sources())


def test_a_file_without_a_digest_goes_on_after_a_kill_and_begins_anew_after_a_power_cut(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model-00002-of-00002.safetensors"
    whole = model_files()[name]
    starts: list[int] = []
    read = BucketFolder.read

    def breaking(self: BucketFolder, file: RemoteFile, start: int) -> Iterator[bytes]:
        if file.name != name:
            yield from read(self, file, start)
            return
        starts.append(start)
        if len(starts) % 2:
            yield whole[start : start + 1000]
            raise KeyboardInterrupt  # as if the process had been killed here
        yield from read(self, file, start)

    monkeypatch.setattr(BucketFolder, "read", breaking)
    for boot, expected in (("one", [0, 1000]), ("two", [0, 1000])):
        monkeypatch.setattr(download, "_boot", lambda boot=boot: boot)
        starts.clear()
        with pytest.raises(KeyboardInterrupt):
            fetched(bucket)
        assert fetched(bucket)[name] == whole
        assert starts == expected
        for folder in bucket.cache.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)
    starts.clear()
    with pytest.raises(KeyboardInterrupt):
        fetched(bucket)
    monkeypatch.setattr(download, "_boot", lambda: "three")
    monkeypatch.setattr(BucketFolder, "read", read)
    assert fetched(bucket)[name] == whole
    assert not list(bucket.cache.glob("*/*.part")), "nothing of the broken try is left"
