"""The key that a teacher is sent: a variable that the operator bound to the teacher's host.

A spec names it (`api_key: {env: NAME}`), and a spec is a user's text: without a binding it could
have any secret of the gateway's environment sent to a server of the user's own. So one rule holds,
when a teacher is admitted and again whenever its key is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from services.teacher_gateway.settings import TeacherGatewaySettings
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.spec import Teacher

# What the stack, its store, its database and the hub are told is nobody's key, whatever is bound.
_NEVER = (
    *("TEACHER_GATEWAY_", "DATASET_BUILDER_", "TRAINER_", "EVALUATOR_", "STILLHOUSE_"),
    *("AWS_", "PG", "POSTGRES", "HF_", "HUGGING"),
)
_PRINTABLE = re.compile(r"[!-~]+")


def check_api_key(teacher: Teacher, settings: TeacherGatewaySettings) -> None:
    """Refuse a variable that may not be sent to this teacher. Raises PermanentError."""
    if teacher.api_key is None:
        return
    name, host = teacher.api_key.env, (urlsplit(teacher.url or "").hostname or "").lower()
    if name.startswith(_NEVER):
        raise PermanentError(
            f"`api_key: {{env: {name}}}` names a variable of the stack's own, which is never sent "
            f"to a teacher (none is that begins with {', '.join(_NEVER)}): put the teacher's key "
            "into a variable of another name",
            reason="api_key_refused",
        )
    if not {f"{name}@{host}", f"{name}@*"} & set(settings.secret_hosts):
        raise PermanentError(
            f"the operator has not allowed {name} to be sent to {host}: have them add "
            f"{name}@{host} to TEACHER_GATEWAY_SECRET_HOSTS (embedded: `stillhouse up --pass-env "
            f"{name}@{host}`)",
            reason="api_key_refused",
        )


def read_api_key(
    teacher: Teacher, settings: TeacherGatewaySettings, environ: Mapping[str, str]
) -> str | None:
    """Read the key that a teacher names. Raises PermanentError that says what to set."""
    if teacher.api_key is None:
        return None
    check_api_key(teacher, settings)
    name = teacher.api_key.env
    key = environ.get(name)
    if not key:
        raise PermanentError(
            f"the gateway's environment has no {name}, which `api_key` names: set it where the "
            "gateway's processes start",
            reason="missing_api_key",
        )
    if not _PRINTABLE.fullmatch(key):
        raise PermanentError(
            f"{name} holds blanks, line ends or characters beyond ASCII, which no header may: set "
            "it to the key alone",
            reason="missing_api_key",
        )
    return key
