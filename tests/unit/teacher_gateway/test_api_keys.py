"""Which variable of the gateway's environment is sent as a key, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.teacher_gateway.teachers.api_keys import check_api_key, read_api_key
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.spec import Teacher
from tests.support.gateway_api import make_settings


def teacher(name: str | None = None, url: str = "https://a.example/v1") -> Teacher:
    return Teacher.model_validate(
        {
            "name": "t",
            "url": url,
            "model": "m",
            "api_key": name and {"env": name},
            "terms": "x",
            "usd_per_million": {"input": 0, "output": 0},
        }
    )


@pytest.mark.parametrize("profile", ["embedded", "deployed"])
@pytest.mark.parametrize(
    ("bound", "url", "allowed"),
    [
        ("", "https://a.example/v1", False),
        ("QWEN_KEY@A.example", "https://a.example/v1", True),
        ("QWEN_KEY@a.example", "https://A.example:8443/v1", True),
        ("QWEN_KEY@*", "http://127.0.0.1:9/v1", True),
        ("QWEN_KEY@::1", "http://[::1]:9/v1", True),
        ("X@a.example, QWEN_KEY@b.example", "https://b.example/v1", True),
        ("QWEN_KEY@a.example", "https://b.example/v1", False),
        ("QWEN_KEY@a.example", "https://a.example.b.example/v1", False),
        ("QWEN_KEY@a.example", "https://b.example/v1?x=https://a.example/", False),
        ("X@a.example,X@*", "https://a.example/v1", False),
    ],
)
def test_a_key_goes_only_where_the_operator_bound_it(
    tmp_path: Path, profile: str, bound: str, url: str, allowed: bool
) -> None:
    told = make_settings(tmp_path, PROFILE=profile, SECRET_HOSTS=bound)
    asked, environ = teacher("QWEN_KEY", url), {"QWEN_KEY": "sk-1"}
    if allowed:
        check_api_key(asked, told)
        assert read_api_key(asked, told, environ) == "sk-1"
        return
    with pytest.raises(PermanentError, match="has not allowed QWEN_KEY to be sent to"):
        check_api_key(asked, told)
    # Also for a spec that was admitted while another setting held.
    with pytest.raises(PermanentError, match="has not allowed QWEN_KEY to be sent to"):
        read_api_key(asked, told, environ)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "TEACHER_GATEWAY_KEY_PEPPER",
        "TEACHER_GATEWAY_DATABASE_URL",
        "DATASET_BUILDER_STORE_SECRET_KEY",
        "TRAINER_STORE_SECRET_KEY",
        "EVALUATOR_STORE_SECRET_KEY",
        "STILLHOUSE_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "PGPASSWORD",
        "POSTGRES_PASSWORD",
    ],
)
def test_the_stacks_own_secrets_are_no_key_even_where_they_are_bound(
    tmp_path: Path, name: str
) -> None:
    told = make_settings(tmp_path, SECRET_HOSTS=f"{name}@*,{name}@a.example")
    for refused in (
        lambda: check_api_key(teacher(name), told),
        lambda: read_api_key(teacher(name), told, {name: "hush"}),
    ):
        with pytest.raises(PermanentError, match="never sent to a teacher") as error:
            refused()
        assert error.value.reason == "api_key_refused"
        assert "hush" not in str(error.value)


def test_a_key_is_read_where_it_is_set_and_can_be_sent(tmp_path: Path) -> None:
    told = make_settings(tmp_path, SECRET_HOSTS="QWEN_KEY@*")
    assert read_api_key(teacher(), told, {}) is None
    with pytest.raises(PermanentError, match="has no QWEN_KEY"):
        read_api_key(teacher("QWEN_KEY"), told, {})
    with pytest.raises(PermanentError, match="QWEN_KEY holds blanks") as error:
        read_api_key(teacher("QWEN_KEY"), told, {"QWEN_KEY": "sk-hush\n"})
    assert "hush" not in str(error.value)
