"""Run the builder.

    python -m services.dataset_builder worker

Settings are read from DATASET_BUILDER_*; docs/operations.md lists them.
"""

from __future__ import annotations

import argparse
import sys

from services.dataset_builder.settings import DatasetBuilderSettings
from services.dataset_builder.worker import run
from stillhouse.chassis import logs
from stillhouse.chassis.errors import StillhouseError
from stillhouse.chassis.settings import load


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.dataset_builder")
    parser.add_argument("process", choices=["worker"], help="what to run")
    process: str = parser.parse_args().process
    try:
        settings = load(DatasetBuilderSettings)
        logs.setup("dataset_builder", process, settings.log_level)
        run(settings)
    except StillhouseError as error:
        print(f"dataset_builder: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
