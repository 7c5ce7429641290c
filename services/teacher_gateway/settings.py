"""What the gateway's processes are told by their environment; documented in docs/operations.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator

from stillhouse.chassis.settings import ReferenceSettings, split_words

# NAME@*, NAME@host or NAME@ an IPv6 address: the port is not asked for, and so not named.
_PAIR = re.compile(r"[A-Za-z_][A-Za-z0-9_]*@(\*|[^@\s*:/]+|[0-9a-f]*:[0-9a-f]*:[0-9a-f:.]*)")


def _names(value: object) -> object:
    return split_words(value.lower()) if isinstance(value, str) else value


def _pairs(value: object) -> object:
    """Read pairs NAME@host; of these the host has no upper case."""
    if not isinstance(value, str):
        return value
    parts = [word.partition("@") for word in value.split(",") if word.strip()]
    return ["".join((name.strip(), at, host.strip().lower())) for name, at, host in parts]


class TeacherGatewaySettings(ReferenceSettings):
    PREFIX: ClassVar[str] = "TEACHER_GATEWAY_"

    database_url: str = Field(
        description="sqlite:////abs/path or postgresql://user:password@host/database", repr=False
    )
    api_host: str = Field("127.0.0.1", description="address of the API")
    api_port: int = Field(8080, ge=0, le=65535, description="port of the API")
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="names in the Host header beside api_host and loopback, by commas"
    )
    key_pepper: SecretStr = Field(
        min_length=16, description="secret with which API keys are hashed before they are stored"
    )
    terms_file: Path | None = Field(
        None,
        description="catalogue of terms of your own, whose entries come before the shipped ones",
    )
    allow_private_teachers: bool | None = Field(
        None, description="whether teachers may have private addresses; unset: when embedded"
    )
    worker_processes: int = Field(3, ge=1, le=64, description="jobs at once in one worker")
    collect_jobs: int | None = Field(
        None, ge=1, description="batches asked at once in all; unset: a worker's processes less one"
    )
    collect_window: int = Field(8, ge=1, le=256, description="batches of a pipeline open at once")
    check_usd_per_day: float = Field(
        5, ge=0, description="what a tenant's checks may spend at teachers in one UTC day"
    )
    local_device: str = Field(
        "auto", description="torch device of local `weights`: cpu, cuda, cuda:1; auto: a GPU if any"
    )
    local_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="what the layers of local `weights` compute in, their output layer is float32; "
        "auto: float32 on a CPU, bfloat16 on a GPU",
    )
    local_threads: int = Field(1, ge=1, le=256, description="threads of torch for local `weights`")
    local_cache_mib: int = Field(
        2048, ge=1, description="memory for keys and values of the answers that local weights write"
    )
    max_body_bytes: int = Field(262_144, ge=1024, description="largest body of a request")
    max_upload_bytes: int = Field(268_435_456, ge=1024, description="largest upload")
    max_event_streams: int = Field(200, ge=1, description="event streams open at once in one API")
    max_tenant_event_streams: int = Field(20, ge=1, description="those of one tenant")
    max_prompts: int = Field(200_000, ge=1, description="most lines of a file of prompts")
    max_prompts_bytes: int = Field(4_294_967_296, ge=1, description="largest file of prompts")
    capture_dir: Path | None = Field(
        None,
        description="folder where recorded traffic waits for the store; it must outlive the "
        "process; unset: work_dir",
    )
    capture_spool_bytes: int = Field(
        1_073_741_824,
        ge=1_048_576,
        description="most recorded traffic that waits on one API's disk",
    )
    capture_memory_bytes: int = Field(
        268_435_456,
        ge=16_777_216,
        description="most memory for the bodies and answers of live calls in flight in one API",
    )
    capture_max_body_bytes: int = Field(
        4_194_304, ge=1024, description="largest body of a chat completion's request"
    )
    capture_max_tokens: int = Field(
        4096, ge=1, description="answer tokens that a call without a limit of its own may cost"
    )
    grace_seconds: float = Field(
        6, ge=0, le=600, description="how long a stopping API lets open requests finish"
    )
    secret_hosts: Annotated[tuple[str, ...], BeforeValidator(_pairs)] = Field(
        (),
        description="which variable may be sent as a key to which teacher's host: NAME@host, or "
        "NAME@* for any host, by commas; `stillhouse up --pass-env` sets it",
    )

    @field_validator("secret_hosts")
    @classmethod
    def _secrets_name_hosts(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        for pair in pairs:
            if not _PAIR.fullmatch(pair):
                raise ValueError(f"expected NAME@host, without a port, found {pair!r}")
        return pairs

    @property
    def private_teachers(self) -> bool:
        if self.allow_private_teachers is None:
            return self.profile == "embedded"
        return self.allow_private_teachers

    @property
    def captured_folder(self) -> Path:
        """Made by us below what the operator named, so that it is ours alone."""
        return (self.capture_dir or self.work_dir) / "captured"

    @property
    def hosts(self) -> frozenset[str]:
        """What a request's Host header may name."""
        own = {self.api_host.lower()} - {"0.0.0.0", "::", ""}  # noqa: S104
        return frozenset({"localhost", "127.0.0.1", "::1", *own, *self.allowed_hosts})
