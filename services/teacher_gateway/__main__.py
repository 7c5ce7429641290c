"""The gateway's command line: its three processes, its tables, its API keys.

python -m services.teacher_gateway migrate | api | worker | clock
python -m services.teacher_gateway keys create --tenant NAME [--days N] [--json]
python -m services.teacher_gateway keys list | keys revoke PREFIX
"""

from __future__ import annotations

import argparse
import importlib
import sys

from services.teacher_gateway.settings import TeacherGatewaySettings
from stillhouse.chassis import logs, settings
from stillhouse.chassis.errors import StillhouseError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.teacher_gateway")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("api", "worker", "clock", "migrate"):
        commands.add_parser(name)
    actions = commands.add_parser("keys").add_subparsers(dest="action", required=True)
    create = actions.add_parser("create")
    create.add_argument("--tenant", required=True)
    create.add_argument("--days", type=float, help="expiry; none by default")
    create.add_argument("--json", action="store_true")
    actions.add_parser("list")
    actions.add_parser("revoke").add_argument("prefix")
    chosen = parser.parse_args()
    try:
        told = settings.load(TeacherGatewaySettings)
        logs.setup("teacher_gateway", chosen.command, told.log_level)
        if chosen.command in ("api", "worker", "clock"):
            importlib.import_module(f"services.teacher_gateway.{chosen.command}").run(told)
            return 0
        administer = importlib.import_module("services.teacher_gateway.administer")
        return int(administer.run(told, chosen))
    except StillhouseError as error:
        sys.stderr.write(f"teacher_gateway: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
