"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.chassis.settings import SettingsError
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
        ("SECRET_HOSTS", "KEY", "SECRET_HOSTS: .*expected NAME@host"),
        ("SECRET_HOSTS", "KEY@", "expected NAME@host, without a port, found 'KEY@'"),
        ("SECRET_HOSTS", "KEY@a.example:8000", "without a port"),
        ("SECRET_HOSTS", "*@a.example", "expected NAME@host"),
        ("SECRET_HOSTS", "KEY@*.example", "expected NAME@host"),
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
