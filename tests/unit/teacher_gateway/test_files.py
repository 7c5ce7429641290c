"""Files are opened only below the operator's folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.teacher_gateway.files import FileRefused, open_below


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "deep" / "a.txt").write_text("inside")
    (tmp_path / "secret.txt").write_text("outside")
    (tmp_path / "rootless").mkdir()
    (tmp_path / "rootless" / "a.txt").write_text("outside")
    return tmp_path / "root"


@pytest.mark.parametrize("form", ["file:{}", "file://{}"])
def test_a_file_below_a_root_is_opened(root: Path, form: str) -> None:
    with open_below([root], form.format(root / "deep" / "a.txt")) as file:
        assert file.read() == b"inside"


def test_a_link_that_stays_inside_is_followed(root: Path) -> None:
    (root / "link").symlink_to(root / "deep")
    with open_below([root], f"file:{root}/link/a.txt") as file:
        assert file.read() == b"inside"


@pytest.mark.parametrize(
    "path",
    ["{}/../secret.txt", "{}/out", "{}/outdir/a.txt", "{}less/a.txt", "/etc/passwd", "a.txt", ""],
)
def test_nothing_outside_is_opened_by_any_way_round(root: Path, path: str) -> None:
    (root / "out").symlink_to(root.parent / "secret.txt")
    (root / "outdir").symlink_to(root.parent / "rootless")
    with pytest.raises(FileRefused, match=r"outside the folders|absolute path"):
        open_below([root], f"file:{path.format(root)}")


@pytest.mark.parametrize("name", ["missing.txt", "deep", "pipe", "loop"])
def test_what_is_no_plain_file_is_refused_without_waiting(root: Path, name: str) -> None:
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(FileRefused, match=r"does not exist|not a file|cannot be"):
        open_below([root], f"file:{root / name}")


def test_without_roots_no_file_is_opened(root: Path) -> None:
    with pytest.raises(FileRefused, match="TEACHER_GATEWAY_FILE_ROOTS"):
        open_below([], f"file:{root / 'deep' / 'a.txt'}")
