"""Copies of working trees."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path


def copy_tree(tree: Path, to: Path) -> None:
    """Copy a tree with its links as links, but without sockets, pipes and devices."""
    shutil.copytree(tree, to, symlinks=True, ignore=_special)


def _special(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not _is_ordinary(Path(folder, name))}


def _is_ordinary(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
