"""The trainer's process: `python -m services.trainer worker`."""

from __future__ import annotations

import argparse
import os
import sys

from services.trainer.settings import TrainerSettings
from stillhouse.chassis import logs
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.settings import load


def main() -> int:
    """Read settings, set up logs, run until a signal."""
    parser = argparse.ArgumentParser(prog="python -m services.trainer")
    parser.add_argument("process", choices=("worker",))
    parser.parse_args()
    try:
        settings = load(TrainerSettings)
        logs.setup("trainer", "worker", settings.log_level)
        # Read when torch and transformers start: no download, and cuBLAS with fixed work spaces.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
        from services.trainer.worker import run_worker

        run_worker(settings)
    except PermanentError as error:
        print(f"trainer: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
