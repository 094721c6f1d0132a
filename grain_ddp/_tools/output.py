"""Files that the tools write: checked before the work is done, and never over somebody else's."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

MARK = "grain_ddp"
"""In what we write: a picture's metadata, a page's head, the JSON's first key."""


def check(path: str | Path, force: bool = False, reads: tuple[str | Path, ...] = ()) -> Path:
    """The path, if it can be written to.

    Args:
        path: the file.
        force: replace what is there, whoever made it; of a symbolic link, the link itself.
        reads: files that the command reads.

    Raises:
        ValueError: it cannot be, in a sentence that says why.
    """
    path = Path(path)

    def refuse(why: str) -> None:
        raise ValueError(f"grain_ddp: {path} cannot be written: {why}.")

    try:
        if any(path.exists() and path.samefile(other) for other in reads):
            refuse("it is what the command reads. Name another file, with --out")
        if not path.parent.is_dir():
            refuse(f"{path.parent} is not a folder")
        there = path.lstat().st_mode if path.exists() or path.is_symlink() else None
        if there is None or (force and stat.S_ISLNK(there)):
            if not os.access(path.parent, os.W_OK):
                refuse(f"nobody but its owner may write to the folder {path.parent}")
        elif stat.S_ISDIR(there):
            refuse("it is a folder")
        elif stat.S_ISLNK(there):
            refuse("it is a symbolic link, which is not followed. Add --force to replace it")
        elif stat.S_ISREG(there) and not force and not _ours(path):
            refuse("it exists, and grain_ddp did not make it. Add --force, or name another file")
    except OSError as error:
        refuse(error.strerror or str(error))
    return path


def _ours(path: Path) -> bool:
    """Whether it is empty, or has our mark near its beginning or, as in a PDF, its end."""
    with path.open("rb") as file:
        start = file.read(1 << 14)
        file.seek(max(path.stat().st_size - (1 << 14), 0))
        return not start or MARK.encode() in start + file.read()


def write(path: Path, data: str | bytes) -> None:
    """All of it or nothing, so that who reads it meanwhile sees the one before.

    Raises:
        ValueError: it cannot be written, in a sentence that says why.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "backslashreplace")  # names of files need not be UTF-8
    beside = path.with_name(f".{path.name[:200]}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():  # /dev/null, a pipe
            path.write_bytes(data)
            return
        try:
            with beside.open("xb") as file:
                file.write(data)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"grain_ddp: {path} cannot be written: {error.strerror}.") from error


def canvas(path: str | Path, size: tuple[float, float]) -> Any:
    """An empty figure of that size in inches, for a picture of that name.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the name's ending is unknown.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no display, no global state
    except ImportError as error:
        raise ModuleNotFoundError(
            "grain_ddp: the picture needs matplotlib: pip install 'grain-ddp[plot]'."
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    if _ending(path) not in figure.canvas.get_supported_filetypes():
        raise ValueError(
            f"grain_ddp: {path}: expected a picture's name, ending in .png, .svg or .pdf."
        )
    return figure


def save(figure: Any, path: Path, note: str = "") -> None:
    """Write a figure, with our mark, and in a .png a note."""
    file, ending = io.BytesIO(), _ending(path)
    marked = {"png": "Software", "svg": "Creator", "pdf": "Creator"}.get(ending)
    metadata = {marked: MARK} if marked else {}
    if note and ending == "png":
        metadata["Description"] = note
    figure.savefig(file, format=ending, dpi=100, metadata=metadata or None)
    write(path, file.getvalue())


def _ending(path: str | Path) -> str:
    return Path(path).suffix[1:].lower()
