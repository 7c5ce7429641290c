"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.teacher_gateway.admission import check_secret
from services.teacher_gateway.settings import TeacherGatewaySettings
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.settings import SettingsError
from stillhouse.contracts.spec import Teacher
from tests.support.gateway_api import PEPPER, make_settings


def test_lists_are_read_from_one_variable(tmp_path: Path) -> None:
    told = make_settings(tmp_path, FILE_ROOTS="/a:/b", ALLOWED_HOSTS="Gate.example, other")
    assert told.file_roots == (Path("/a"), Path("/b"))
    assert {"gate.example", "other", "localhost", "127.0.0.1", "::1"} == told.hosts


def test_an_address_for_all_is_no_name_of_the_server(tmp_path: Path) -> None:
    assert "0.0.0.0" not in make_settings(tmp_path, API_HOST="0.0.0.0").hosts
    assert "10.1.2.3" in make_settings(tmp_path, API_HOST="10.1.2.3").hosts


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FILE_ROOTS", "relative", "expected absolute folders"),
        ("SECRET_HOSTS", "KEY", "expected NAME@host"),
        ("KEY_PEPPER", "short", "at least 16"),
        ("API_PRT", "1", "unknown setting TEACHER_GATEWAY_API_PRT"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        make_settings(tmp_path, **{name: value})


def test_secrets_do_not_show_in_the_settings_text(tmp_path: Path) -> None:
    told = make_settings(tmp_path, DATABASE_URL="postgresql://u:hunter2@h/d")
    assert PEPPER not in repr(told)
    assert "hunter2" not in repr(told)


@pytest.mark.parametrize(("profile", "private"), [("embedded", True), ("deployed", False)])
def test_private_teachers_are_for_the_embedded_profile(
    tmp_path: Path, profile: str, private: bool
) -> None:
    assert make_settings(tmp_path, PROFILE=profile).private_teachers is private
    told = make_settings(tmp_path, PROFILE=profile, ALLOW_PRIVATE_TEACHERS=str(not private))
    assert told.private_teachers is not private


def teacher(name: str, url: str) -> Teacher:
    return Teacher.model_validate(
        {
            "name": "t",
            "url": url,
            "model": "m",
            "api_key": {"env": name},
            "terms": "x",
            "usd_per_million": {"input": 0, "output": 0},
        }
    )


@pytest.mark.parametrize(
    ("fields", "name", "host", "allowed"),
    [
        ({"PROFILE": "embedded"}, "QWEN_KEY", "a.example", True),
        ({"PROFILE": "embedded"}, "TEACHER_GATEWAY_KEY_PEPPER", "a.example", False),
        ({"PROFILE": "deployed"}, "QWEN_KEY", "a.example", False),
        (
            {"PROFILE": "deployed", "SECRET_HOSTS": "QWEN_KEY@A.example"},
            "QWEN_KEY",
            "a.example",
            True,
        ),
        (
            {"PROFILE": "deployed", "SECRET_HOSTS": "QWEN_KEY@a.example"},
            "QWEN_KEY",
            "b.example",
            False,
        ),
        ({"PROFILE": "embedded", "SECRET_HOSTS": "X@a.example"}, "QWEN_KEY", "a.example", False),
    ],
)
def test_a_secret_goes_only_where_the_operator_bound_it(
    tmp_path: Path, fields: dict[str, str], name: str, host: str, allowed: bool
) -> None:
    told: TeacherGatewaySettings = make_settings(tmp_path, **fields)
    asked = teacher(name, f"https://{host}/v1")
    if allowed:
        check_secret(asked, told)
    else:
        with pytest.raises(PermanentError, match=name):
            check_secret(asked, told)
