"""A venv for the packages that a benchmark compares with, apart from the project's own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path


def peer_venv(name: str, requirements: tuple[str, ...], folder: Path) -> Path:
    """Return the interpreter of a venv with the newest installable versions of the peers.

    It is made below `folder` once; other requirements make it anew.
    """
    root = folder / name
    python = root / "bin" / "python"
    wanted = hashlib.sha256("\n".join(requirements).encode()).hexdigest()
    marker = root / "requirements.sha256"
    if marker.is_file() and marker.read_text() == wanted:
        return python
    print(f"peers: {', '.join(requirements)} into {root}, a few minutes", file=sys.stderr)
    venv.EnvBuilder(with_pip=True, clear=True).create(root)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    subprocess.run([*pip, *requirements], check=True)
    marker.write_text(wanted)
    return python


def versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The versions that a venv holds."""
    code = (
        "import importlib.metadata, json, sys;"
        "print(json.dumps({n: importlib.metadata.version(n) for n in sys.argv[1:]}))"
    )
    found = subprocess.run(
        [str(python), "-c", code, *names], check=True, capture_output=True, text=True
    )
    loaded: dict[str, str] = json.loads(found.stdout)
    return loaded
