"""Importing does nothing, and each service stands alone."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.contracts.flow import SERVICES

ROOT = Path(__file__).parents[2]
# What a service's main process imports. Their jobs import torch, in a process of their own.
SHELL_FILES = ("__main__", "settings", "handlers", "jobs", "worker", "metrics")
MIGRATIONS = ROOT / "services" / "teacher_gateway" / "migrations"  # Alembic runs these itself


def modules() -> Iterator[str]:
    for package in ("stillhouse", "services"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if MIGRATIONS in path.parents:
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__")


def run(code: str) -> None:
    """Run code in a fresh interpreter; what it prints to standard error is the failure."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_any_module_opens_nothing_starts_nothing_and_reads_no_environment() -> None:
    run(
        f"""
        import importlib, os, socket, sys, threading

        def refuse(*arguments, **_):
            raise AssertionError(f"opened or started on import: {{arguments}}")

        socket.socket.connect = refuse
        socket.create_connection = refuse
        threading.Thread.start = refuse
        root = {str(ROOT)!r}

        class Watched(type(os.environ)):
            def __getitem__(self, name):
                frame, depth = sys._getframe(1), 0
                while frame is not None and depth < 4:  # through get(), os.getenv() and the like
                    file = frame.f_code.co_filename
                    if file.startswith((root + "/stillhouse", root + "/services")):
                        raise AssertionError(f"{{file}} reads {{name}} on import")
                    frame, depth = frame.f_back, depth + 1
                return super().__getitem__(name)

        os.environ.__class__ = Watched
        for name in {list(modules())!r}:
            importlib.import_module(name)
        """
    )


@pytest.mark.parametrize("service", SERVICES)
def test_a_services_main_process_imports_no_torch_and_no_other_service(service: str) -> None:
    files = [name for name in SHELL_FILES if (ROOT / "services" / service / f"{name}.py").exists()]
    assert {"__main__", "settings", "worker", "metrics"} <= set(files)
    others = [f"services.{other}" for other in SERVICES if other != service]
    run(
        f"""
        import importlib, sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.startswith({tuple(others)!r}):
                    raise AssertionError(f"another service is imported: {{name}}")

        sys.meta_path.insert(0, Absent())
        for name in {files!r}:
            importlib.import_module(f"services.{service}.{{name}}")
        heavy = {{"torch", "transformers", "datasets", "pandas"}} & set(sys.modules)
        assert not heavy, f"imported by the main process: {{heavy}}"
        """
    )


def test_contracts_and_command_line_need_no_service_and_no_torch() -> None:
    run(
        """
        import sys
        import stillhouse.cli.main, stillhouse.embedded.stack
        from stillhouse.contracts import artifacts, envelope, events, flow, schema, spec
        loaded = [n for n in sys.modules if n.startswith("services.") or n == "torch"]
        assert not loaded, loaded
        """
    )


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_domain_files_know_neither_celery_nor_kombu() -> None:
    for path in (ROOT / "services").rglob("*.py"):
        if path.name != "worker.py":
            assert not imported(path) & {"celery", "kombu", "amqp", "redis"}, path


def test_torch_stays_with_those_that_compute_and_the_weights_of_the_demo() -> None:
    allowed = {
        ROOT / "services" / "trainer",
        ROOT / "services" / "evaluator",
        ROOT / "services" / "teacher_gateway" / "teachers" / "local",
        ROOT / "stillhouse" / "chassis" / "model_opening.py",
        ROOT / "stillhouse" / "embedded" / "weights.py",
    }
    for package in ("stillhouse", "services"):
        for path in (ROOT / package).rglob("*.py"):
            if not allowed & {path, *path.parents}:
                assert not imported(path) & {"torch", "transformers"}, path


def test_no_module_is_an_attic() -> None:
    attics = {"utils", "helpers", "common", "misc", "manager", "util", "helper"}
    for name in modules():
        assert not attics & set(name.split(".")), name


def test_every_module_says_why_it_exists() -> None:
    for package in ("stillhouse", "services", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            assert not tree.body or ast.get_docstring(tree), f"{path} has no docstring"


def test_code_is_ascii() -> None:
    for package in ("stillhouse", "services", "tests", "benchmarks", "demo"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.read_text().isascii(), path


def test_the_import_rules_hold() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:]
