"""Settings come from the environment, once, at the composition root, and are passed down.

Each service has one frozen class; a field's name in capitals behind the service's prefix is its
variable (`TRAINER_BROKER_URL`). A variable with the prefix that no field knows is an error, so a
typing mistake cannot pass for a default. `docs/operations.md` lists all of them and is tested.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from stillhouse.chassis.errors import PermanentError


class ServiceSettings(BaseModel):
    """What every process needs: broker, store, metrics, logs. Subclasses set `PREFIX`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    PREFIX: ClassVar[str]

    # Not shown: it may hold a password.
    broker_url: str = Field(description="kombu URL of the broker (amqp://, redis://)", repr=False)
    store_endpoint_url: str | None = Field(None, description="S3 endpoint; none for AWS itself")
    store_bucket: str = Field("stillhouse", description="bucket of all objects")
    store_region: str = Field("us-east-1", description="region of the bucket")
    store_access_key: SecretStr | None = Field(None, description="S3 access key id")
    store_secret_key: SecretStr | None = Field(None, description="S3 secret access key")
    metrics_host: str = Field("127.0.0.1", description="address of /metrics and /healthz")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of /metrics; 0 for any free one")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="log level")
    profile: Literal["embedded", "deployed"] = Field(
        "deployed", description="which table of timeouts holds: short when embedded"
    )
    work_dir: Path = Field(
        Path(tempfile.gettempdir()), description="scratch folder; may be lost at any time"
    )


def split_paths(value: object) -> object:
    """Read folders parted by the path separator, as in PATH."""
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def split_words(value: object) -> object:
    """Read words parted by commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


class ReferenceSettings(ServiceSettings):
    """What a service needs that opens weights which a spec names (`chassis.references`)."""

    file_roots: Annotated[tuple[Path, ...], BeforeValidator(split_paths)] = Field(
        (), description="folders below which `file:` references are opened, by the path separator"
    )
    s3_buckets: Annotated[tuple[str, ...], BeforeValidator(split_words)] = Field(
        (), description="buckets that `s3:` references may name, by commas; read with our own keys"
    )
    allow_hub: bool | None = Field(
        None, description="whether `hf:` references are fetched; unset: when embedded"
    )
    hub_token_owners: Annotated[tuple[str, ...], BeforeValidator(split_words)] | None = Field(
        None,
        description="owners on the hub whose repositories are fetched with `HF_TOKEN`, by commas, "
        "`*` for all; unset: all when embedded, none when deployed",
    )
    cache_dir: Path | None = Field(
        None,
        description="where fetched weights are kept; unset: `models` in the scratch folder. "
        "Services of one user on one machine may share it",
    )
    cache_gib: int = Field(
        100, ge=1, description="most that it holds; what was not opened for longest goes first"
    )

    @model_validator(mode="after")
    def _check_references(self) -> ReferenceSettings:
        for root in self.file_roots:
            if not root.is_absolute():
                raise ValueError(f"file_roots: expected absolute folders, found {str(root)!r}")
        if self.store_bucket in self.s3_buckets:
            raise ValueError(
                f"s3_buckets: {self.store_bucket} is the bucket of all objects, in which every "
                "tenant's data lies: put weights and prompts into another one"
            )
        return self

    @property
    def hub_allowed(self) -> bool:
        return self.profile == "embedded" if self.allow_hub is None else self.allow_hub

    @property
    def token_owners(self) -> frozenset[str]:
        """Whose repositories a spec may open with the operator's own token; `*`: anyone's."""
        if self.hub_token_owners is None:
            return frozenset({"*"} if self.profile == "embedded" else ())
        return frozenset(owner.lower() for owner in self.hub_token_owners)


S = TypeVar("S", bound=ServiceSettings)


class SettingsError(PermanentError):
    """A setting is missing, unknown or malformed."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, reason="settings")


def load(cls: type[S], environ: dict[str, str] | None = None, **overrides: Any) -> S:
    """Build a service's settings from the environment. Raises SettingsError that names the
    variable at fault."""
    prefix = cls.PREFIX
    source = os.environ if environ is None else environ
    known = {f"{prefix}{name}".upper() for name in cls.model_fields}
    unknown = sorted(k for k in source if k.startswith(prefix) and k not in known)
    if unknown:
        raise SettingsError(
            f"unknown setting {', '.join(unknown)}: expected one of {', '.join(sorted(known))}"
        )
    values = {
        name: source[f"{prefix}{name}".upper()]
        for name in cls.model_fields
        if source.get(f"{prefix}{name}".upper())
    }
    try:
        return cls.model_validate({**values, **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        variable = f"{prefix}{'_'.join(map(str, first['loc']))}".upper()
        raise SettingsError(f"setting {variable}: {first['msg']}") from error
