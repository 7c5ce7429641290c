"""What the gateway's processes are told by their environment; documented in docs/operations.md."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from stillhouse.chassis.settings import ServiceSettings


def _paths(value: object) -> object:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _words(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _names(value: object) -> object:
    return _words(value.lower()) if isinstance(value, str) else value


class TeacherGatewaySettings(ServiceSettings):
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
    file_roots: Annotated[tuple[Path, ...], BeforeValidator(_paths)] = Field(
        (), description="folders below which `file:` references are opened, by the path separator"
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
    max_body_bytes: int = Field(262_144, ge=1024, description="largest body of a request")
    max_upload_bytes: int = Field(268_435_456, ge=1024, description="largest upload")
    max_prompts: int = Field(200_000, ge=1, description="most lines of a file of prompts")
    max_prompts_bytes: int = Field(4_294_967_296, ge=1, description="largest file of prompts")
    secret_hosts: Annotated[tuple[str, ...], BeforeValidator(_words)] | None = Field(
        None,
        description="which variable may be sent to which teacher's host, as NAME@host by commas; "
        "unset: any when embedded, none when deployed",
    )

    @model_validator(mode="after")
    def _roots_are_absolute(self) -> TeacherGatewaySettings:
        for root in self.file_roots:
            if not root.is_absolute():
                raise ValueError(f"file_roots: expected absolute folders, found {str(root)!r}")
        for pair in self.secret_hosts or ():
            if pair.count("@") != 1:
                raise ValueError(f"secret_hosts: expected NAME@host, found {pair!r}")
        return self

    @property
    def private_teachers(self) -> bool:
        if self.allow_private_teachers is None:
            return self.profile == "embedded"
        return self.allow_private_teachers

    @property
    def hosts(self) -> frozenset[str]:
        """What a request's Host header may name."""
        own = {self.api_host.lower()} - {"0.0.0.0", "::", ""}  # noqa: S104
        return frozenset({"localhost", "127.0.0.1", "::1", *own, *self.allowed_hosts})
