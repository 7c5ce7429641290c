"""Sources of references for tests, and a process that opens one.

python -m tests.support.references REFERENCE     # with READER_... and HF_... in its environment
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from stillhouse.chassis import settings as chassis_settings
from stillhouse.chassis.references import Sources, opened, sources_of
from stillhouse.chassis.settings import ReferenceSettings
from stillhouse.chassis.storage import ObjectStore
from stillhouse.embedded.parts import Store
from tests.support.shards import store_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_SIZE = 300_000


class ReaderSettings(ReferenceSettings):
    PREFIX: ClassVar[str] = "READER_"


def make_sources(environ: dict[str, str] | None = None, **told: Any) -> Sources:
    """Sources as a service's settings make them; `environ` is the process's."""
    settings = chassis_settings.load(ReaderSettings, reader_variables(**told))
    return sources_of(settings, environ or {})


def reader_variables(**told: Any) -> dict[str, str]:
    told = {"broker_url": "memory://", **told}
    return {f"READER_{name.upper()}": str(value) for name, value in told.items()}


def file_sources(*roots: Path) -> Sources:
    """Sources of `file:` references alone."""
    return make_sources(file_roots=os.pathsep.join(map(str, roots)))


def model_files(**more: bytes) -> dict[str, bytes]:
    """A folder of weights in two shards, with what must never be fetched beside it."""
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {f"layer.{n}": name for n, name in enumerate(shards)}}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        shards[0]: bytes(range(250)) * (_SIZE // 250),
        shards[1]: bytes(range(240)) * (_SIZE // 240),
        "consolidated.safetensors": b"the same once more",
        "pytorch_model.bin": b"a pickle",
        "modeling_tiny.py": b"import os",
        "README.md": b"# tiny",
        **more,
    }


WHOLE = {
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}


def contents(folder: Path) -> dict[str, bytes]:
    """What a fetched folder holds, but for the cache's own notes."""
    notes = {"manifest.json", "plan.json"}
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in notes}


@dataclass
class Bucket:
    """A bucket beside the platform's, whose operator named it, with a folder in it."""

    part: Store
    store: ObjectStore
    cache: Path

    @property
    def name(self) -> str:
        return self.store.bucket

    @property
    def reference(self) -> str:
        return f"s3://{self.name}/models/tiny"

    def put(self, files: Mapping[str, bytes]) -> None:
        """Write or replace objects of the folder."""
        for name, data in files.items():
            self.store._client.put_object(Bucket=self.name, Key=f"models/tiny/{name}", Body=data)

    def put_folder(self, folder: Path) -> None:
        self.put({path.name: path.read_bytes() for path in folder.iterdir()})

    def settings(self, **told: Any) -> dict[str, Any]:
        """What a service is told that may read it, by the fields of its settings."""
        return {
            "store_endpoint_url": self.part.endpoint_url,
            "store_bucket": self.part.bucket,
            "store_access_key": self.part.access_key,
            "store_secret_key": self.part.secret_key,
            "s3_buckets": f"other, {self.name}",
            "cache_dir": self.cache,
            **told,
        }

    def sources(self, **told: Any) -> Sources:
        return make_sources(**self.settings(**told))


@contextmanager
def weights_bucket(part: Store, cache: Path) -> Iterator[Bucket]:
    """Make a bucket in the session's store; it goes with the block."""
    store = store_of(replace(part, bucket=f"weights-{secrets.token_hex(4)}"))
    store._client.create_bucket(Bucket=store.bucket)
    try:
        yield Bucket(part, store, cache)
    finally:
        for key in list(store.keys("")):
            store.delete(key)
        store._client.delete_bucket(Bucket=store.bucket)


def start_reader(reference: str, environ: dict[str, str], **told: Any) -> subprocess.Popen[str]:
    """Open a reference in a process of its own, which prints the folder's files."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "READER_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.references", reference],
        env=kept | reader_variables(**told) | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def main() -> None:
    settings = chassis_settings.load(ReaderSettings)
    with opened(sys.argv[1], sources_of(settings)) as folder:
        print(json.dumps(sorted(contents(folder))))


if __name__ == "__main__":
    main()
