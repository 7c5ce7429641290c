"""Settings: read once, from named variables, and wrong ones are refused by name."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import Field, SecretStr, ValidationError

from stillhouse.chassis.settings import ServiceSettings, SettingsError, load


class Settings(ServiceSettings):
    PREFIX: ClassVar[str] = "BAKER_"

    oven_seconds: float = Field(60, gt=0, description="how long")
    recipe: SecretStr | None = Field(None, description="not for everybody")


BROKER = {"BAKER_BROKER_URL": "amqp://user:hidden-word@broker//"}


def test_a_setting_is_read_from_its_variable() -> None:
    settings = load(Settings, {**BROKER, "BAKER_OVEN_SECONDS": "12.5", "OTHER": "x"})
    assert settings.broker_url.startswith("amqp://")
    assert settings.oven_seconds == 12.5
    assert settings.profile == "deployed"


def test_an_empty_variable_counts_as_unset() -> None:
    assert load(Settings, {**BROKER, "BAKER_OVEN_SECONDS": ""}).oven_seconds == 60


def test_an_unknown_variable_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="unknown setting BAKER_OVEN_SECOND:") as error:
        load(Settings, {**BROKER, "BAKER_OVEN_SECOND": "12"})
    assert "BAKER_OVEN_SECONDS" in str(error.value)
    assert error.value.reason == "settings"


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(SettingsError, match="BAKER_BROKER_URL: Field required"):
        load(Settings, {})


@pytest.mark.parametrize(
    ("variable", "value"),
    [("OVEN_SECONDS", "0"), ("OVEN_SECONDS", "soon"), ("METRICS_PORT", "70000"), ("PROFILE", "x")],
)
def test_a_malformed_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"setting BAKER_{variable}: "):
        load(Settings, {**BROKER, f"BAKER_{variable}": value})


def test_secrets_are_masked_wherever_settings_are_shown() -> None:
    secrets = {
        "BAKER_RECIPE": "hidden-word",
        "BAKER_STORE_ACCESS_KEY": "hidden-word",
        "BAKER_STORE_SECRET_KEY": "hidden-word",
    }
    settings = load(Settings, {**BROKER, **secrets})
    for shown in (repr(settings), str(settings)):
        assert "hidden-word" not in shown
    assert settings.store_secret_key is not None
    assert settings.store_secret_key.get_secret_value() == "hidden-word"


def test_a_wrong_secret_is_not_quoted() -> None:
    class Strict(Settings):
        recipe: SecretStr = Field(min_length=40, description="long")

    with pytest.raises(SettingsError, match="BAKER_RECIPE") as error:
        load(Strict, {**BROKER, "BAKER_RECIPE": "hidden-word"})
    assert "hidden-word" not in str(error.value)


def test_settings_cannot_be_changed() -> None:
    settings = load(Settings, BROKER)
    with pytest.raises(ValidationError):
        settings.oven_seconds = 1  # type: ignore[misc]


def test_overrides_win_over_the_environment() -> None:
    assert load(Settings, {**BROKER, "BAKER_OVEN_SECONDS": "1"}, oven_seconds=2).oven_seconds == 2
