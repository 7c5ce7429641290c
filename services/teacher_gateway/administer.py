"""What an operator does at the command line: tables and API keys. Prints results to stdout."""

from __future__ import annotations

import argparse
import json
import sys

from services.teacher_gateway.database import open_engine
from services.teacher_gateway.keys import create_key, list_keys, revoke_key
from services.teacher_gateway.migrate import migrate
from services.teacher_gateway.settings import TeacherGatewaySettings


def run(settings: TeacherGatewaySettings, chosen: argparse.Namespace) -> int:
    """Do one command; return the exit status."""
    engine = open_engine(settings.database_url)
    try:
        if chosen.command == "migrate":
            _say(f"the database is at revision {migrate(engine)}")
        elif chosen.action == "create":
            key = create_key(engine, settings.key_pepper, chosen.tenant, days=chosen.days)
            if chosen.json:
                _say(json.dumps({"tenant": chosen.tenant, "key": key}))
            else:
                _say(f"{key}\nKeep it now: it is not shown again.")
        elif chosen.action == "list":
            for found in list_keys(engine):
                state = "revoked" if found.revoked_at is not None else "valid"
                _say(f"{found.prefix}  {found.tenant_id}  {state}")
        elif not revoke_key(engine, chosen.prefix.removeprefix("sth_").partition("_")[0]):
            sys.stderr.write(f"there is no key with the prefix {chosen.prefix}: see `keys list`\n")
            return 1
        return 0
    finally:
        engine.dispose()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
