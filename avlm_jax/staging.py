"""A folder appears under its name once it is complete: built beside it, put in its place by one rename.

    check_out(out, sources=[...], overwrite=args.overwrite)     # before any work
    check_space(out, needed_bytes, "the export")
    with staged(out, last=("config.json",)) as partial:
        ...                                                     # write below `partial`

What an earlier folder held goes only when the new one stands. A run that is killed leaves `.NAME.partial` or `.NAME.old`
beside NAME; the next one clears them up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from input_pipeline.errors import UserError

SPARE_BYTES = (
    2**26
)  # Stay free on the disk: for small files, and because a full disk troubles everybody on it.
MOUNTS = Path("/proc/self/mountinfo")  # Linux, proc_pid_mountinfo(5): the fifth field is the mount point.


class StagingError(UserError):
    """A folder cannot be written to its place. The message names it and the remedy; nothing was written."""


def check_out(out: str | Path, sources: Iterable[str | Path] = (), *, overwrite: bool = False) -> None:
    """Raises StagingError if `staged(out)` could not put a folder there, or would destroy what is read meanwhile.

    Whether an existing folder may be replaced is the caller's to judge.

    Args:
        out: the folder to be.
        sources: files and folders that are read; "" stands for none. None of them, nor what a link in them points to, may
            be `out` or lie in it.
        overwrite: an existing folder is to be replaced, not only an empty one filled.
    """
    out = Path(out)
    restore(out)
    if out.is_symlink() and not out.exists():
        raise StagingError(
            f"{out} is a link to {os.readlink(out)}, where nothing is; remove it or choose another --out"
        )
    for folder in (out, *out.absolute().parents):
        if folder.exists() and not folder.is_dir():
            raise StagingError(f"{folder} is a file; --out names a folder")
    for source in filter(None, map(str, sources)):
        held = lies_in(source, out)
        if held is not None:
            raise StagingError(
                f"{out} is where --out wants to write, and {held} is read; choose another --out, or move it away first"
            )
    if overwrite and not is_vacant(out) and _stays(out):
        raise StagingError(
            f"{out} is the current folder or a mount point, or lies where nothing may be renamed, so what it holds cannot "
            "be replaced in one step; choose another --out, or empty it first"
        )


def restore(target: str | Path) -> None:
    """Brings the earlier folder back if a run was killed between the two renames of `staged`."""
    target = Path(target)
    old = _beside(target, "old")
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)


def lies_in(source: str | Path, folder: str | Path) -> Path | None:
    """What of `source` (itself, or a file in it, links followed) is `folder` or lies in it; None if nothing does."""
    source, folder = Path(source).expanduser(), Path(folder).resolve()
    inside = [entry for entry in source.iterdir() if entry.is_file()] if source.is_dir() else []
    for path in (source, *inside):
        if folder in (path.resolve(), *path.resolve().parents):
            return path
    return None


def is_vacant(folder: str | Path) -> bool:
    """Whether there is nothing, or an empty folder; what a killed run has left in it does not count."""
    folder = Path(folder)
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return not {entry.name for entry in folder.iterdir()} - {_inside(folder).name}


def check_space(folder: str | Path, needed_bytes: int, what: str) -> None:
    """Raises StagingError unless `needed_bytes` for `what` and `SPARE_BYTES` fit on the disk of `folder`.

    `folder` need not exist. A folder that is replaced stays until its successor is complete, so nothing is
    subtracted for it.
    """
    above = nearest_folder(folder)
    free = shutil.disk_usage(above).free
    lacking = needed_bytes + SPARE_BYTES - free
    if lacking > 0:
        raise StagingError(
            f"{above}: no room for {what}, which takes {describe_bytes(needed_bytes)}: {describe_bytes(free)} are free, of "
            f"which {describe_bytes(SPARE_BYTES)} have to stay so; {describe_bytes(lacking)} are missing. Make room or "
            "choose another --out"
        )


def describe_bytes(count: int) -> str:
    """`count` for people: whole bytes, or three digits of kB, MB, GB (powers of 1000)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            value = count / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count} bytes"


def nearest_folder(path: str | Path) -> Path:
    """`path`, absolute, or the nearest folder above it that exists."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


@contextlib.contextmanager
def staged(target: str | Path, *, last: Sequence[str] = ()) -> Iterator[Path]:
    """Gives an empty folder that takes the place of `target` when the block ends without an error, else it is removed.

    That is one rename, or two where `target` exists: it becomes `.NAME.old` and is removed when the new folder
    stands. A link to an empty folder is followed; another link is replaced, and what it points to is left alone. An empty
    folder that cannot be renamed over (the current one, a mount point, one in a folder that may not be written) is filled
    instead, entry by entry.

    Args:
        target: the folder to be; see `check_out`.
        last: entries without which the folder is not valid; where it is filled they come last, in this order.

    Raises:
        OSError: the disk. An earlier folder is in its place then.
    """
    target = _named(Path(target))
    if target.is_dir() and is_vacant(target):
        target = target.resolve()
    restore(target)
    filled = _stays(target) and is_vacant(target)
    partial = _inside(target) if filled else _beside(target, "partial")
    remove(partial)
    remove(_beside(target, "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if filled:
            _fill(partial, target, last)
        else:
            _replace(partial, target)
    finally:
        with contextlib.suppress(OSError):  # Of a broken disk; the error that matters is on its way.
            remove(partial)
    remove(_beside(target, "old"))


def remove(path: Path) -> None:
    """Removes a folder with what is in it, a file, or a link without what it points to; nothing if there is none."""
    if _is_folder(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        # Asked first, since on a read-only disk unlink complains of that even where there is no file.
        path.unlink()


def _replace(partial: Path, target: Path) -> None:
    old = _beside(target, "old")
    if os.path.lexists(target) and not (_is_folder(target) and not any(target.iterdir())):
        target.rename(old)
    try:
        partial.rename(target)  # Also over an empty folder, says rename(2).
    except OSError:
        restore(target)
        raise


def _fill(partial: Path, target: Path, last: Sequence[str]) -> None:
    entries = {entry.name: entry for entry in partial.iterdir()}
    for name in [*sorted(entries.keys() - set(last)), *(name for name in last if name in entries)]:
        entries[name].rename(target / name)


def _stays(folder: Path) -> bool:
    """Whether a folder is there that must not or cannot be renamed."""
    if not _is_folder(folder):
        return False
    resolved = folder.resolve()
    return (
        resolved in (Path.cwd(), *Path.cwd().parents)
        or _is_mount(resolved)
        or not os.access(resolved.parent, os.W_OK)
    )


def _is_mount(folder: Path) -> bool:
    """As os.path.ismount, and for a folder of the same file system that is bound there, as containers do."""
    if os.path.ismount(folder):
        return True
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # Not Linux.
        return False
    # The kernel writes blanks and backslashes in octal.
    escaped = "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in str(folder))
    return any(line.split(" ")[4] == escaped for line in lines)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _beside(target: Path, kind: str) -> Path:
    return _named(target).parent / f".{_named(target).name}.{kind}"


def _inside(target: Path) -> Path:
    return target / f".{_named(target).name}.partial"


def _named(path: Path) -> Path:
    """`path`, absolute and with its own name at the end: "." and ".." have none."""
    path = path.absolute()
    return path.resolve() if path.name == ".." else path
