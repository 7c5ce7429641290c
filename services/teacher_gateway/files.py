"""Files that a spec names: opened only below the folders that the operator named.

A path is resolved first, so a link may point anywhere inside the folders; then it is walked from
the root without following any link, so nothing swapped in between leads out of them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.spec import file_path


class FileRefused(PermanentError):
    """A file is absent, not a plain file, too large, or outside the operator's folders."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, reason="file_not_readable")


def open_below(roots: Sequence[Path], reference: str) -> BinaryIO:
    """Open the plain file that a `file:` reference names, for reading."""
    asked = Path(file_path(reference))
    path, root = _resolve(roots, asked)
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *folders, name = path.relative_to(root).parts or (".",)
        for folder in folders:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        opened = os.open(name, flags, dir_fd=descriptor)
    except OSError as error:
        raise FileRefused(f"{asked} cannot be opened: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise FileRefused(f"{asked} is not a file")
    return os.fdopen(opened, "rb")


def _resolve(roots: Sequence[Path], asked: Path) -> tuple[Path, Path]:
    if not asked.is_absolute() or "\0" in str(asked):
        raise FileRefused(f"expected an absolute path, found {str(asked)!r}")
    try:
        path = asked.resolve()
    except (OSError, RuntimeError) as error:
        raise FileRefused(f"{asked} cannot be resolved: {error}") from error
    for root in roots:
        real = root.resolve()
        if path == real or real in path.parents:
            if not path.exists():
                raise FileRefused(f"{asked} does not exist on the gateway's machine")
            return path, real
    named = ", ".join(str(root) for root in roots) or "none"
    raise FileRefused(
        f"{asked} is outside the folders that the gateway may open ({named}): move it there, "
        "upload it, or have the operator add its folder to TEACHER_GATEWAY_FILE_ROOTS"
    )
