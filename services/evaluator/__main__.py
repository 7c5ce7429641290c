"""The evaluator's command line.

python -m services.evaluator worker
"""

from __future__ import annotations

import argparse
import sys

from services.evaluator import worker
from services.evaluator.settings import EvaluatorSettings
from stillhouse.chassis import logs, settings
from stillhouse.chassis.errors import StillhouseError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.evaluator")
    parser.add_subparsers(dest="command", required=True).add_parser("worker")
    chosen = parser.parse_args()
    try:
        told = settings.load(EvaluatorSettings)
        logs.setup("evaluator", chosen.command, told.log_level)
        worker.run(told)
    except StillhouseError as error:
        sys.stderr.write(f"evaluator: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
