"""Disks and buckets under a checkpoint: addresses, replacing a folder as a whole, errors, and what is trouble of the storage
itself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from input_pipeline.errors import UserError

if TYPE_CHECKING:
    from etils import epath

logger = logging.getLogger(__name__)

STAGED, REPLACED = ".tmp", ".old"
# Something else lies there than should: what is stored is at fault, not the way to it.
MISPLACED = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# TensorStore raises ValueError for whatever happens; it begins with the status and ends with the system's error number
# (https://abseil.io/docs/cpp/guides/status-codes). ABORTED: a bucket that did not answer however often it was asked.
TROUBLE = re.compile(r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): ")
SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is damaged, does not fit the run that asks for it, or could not be written."""


def resolve(path: str | os.PathLike) -> epath.Path:
    """Local paths made absolute, bucket addresses as they are."""
    from etils import epath

    return epath.Path(path if is_bucket(path) else os.path.abspath(path))


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether `path` is an address ("gs://...") and not on a disk."""
    return "://" in os.fspath(path)


def flush(path: str | os.PathLike) -> None:
    """Without this a machine that stops may keep a rename and lose the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """That a disk is full names `path` if it names nothing: writing to an open file tells no name. No other error changes."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            error.filename = str(path)
        raise


def is_trouble(error: BaseException) -> bool:
    """Whether `error`, of reading, tells of rights, network or device, so that the same file may be read another time."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno not in MISPLACED:
            return not isinstance(found, FileNotFoundError)  # A bucket's has no number.
        numbers = {int(number) for number in SYSTEM_ERROR.findall(str(found))}
        if TROUBLE.search(str(found)) or numbers - MISPLACED:
            return True
        found = found.__cause__ or found.__context__
    return False


def replace_folder(target: epath.Path, writers: Mapping[str, Callable[[epath.Path], Any]]) -> None:
    """Replaces `target`, which need not exist, as a whole, and removes what killed runs left of that beside it.

    A bucket cannot do that: there the last of the files, without which the others mean nothing, is removed first and
    written last.

    Args:
        target: local folder or bucket address; one process writes to it at a time.
        writers: by name of file, what writes it to a path, in order.
    """
    from etils import epath

    if is_bucket(target):
        with tempfile.TemporaryDirectory() as folder:
            for name, write in writers.items():
                write(epath.Path(folder) / name)
            (target / list(writers)[-1]).unlink(missing_ok=True)
            for name in writers:
                (epath.Path(folder) / name).copy(target / name, overwrite=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target, STAGED)
    staged = target.parent / f".{target.name}.{secrets.token_hex(4)}{STAGED}"
    staged.mkdir()
    try:
        for name, write in writers.items():
            write(staged / name)
        for path in (*staged.iterdir(), staged):
            flush(path)
        if target.exists():
            target.rename(staged.with_suffix(REPLACED))
        staged.rename(target)
    finally:
        if staged.exists():
            staged.rmtree()
    flush(target.parent)
    _remove_leftovers(
        target, REPLACED
    )  # Not earlier: a run that was killed between the renames has nothing else.


def _remove_leftovers(target: epath.Path, suffix: str) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(suffix)}")
    for path in list(target.parent.iterdir()):
        if pattern.fullmatch(path.name):
            logger.info("removing %s, which nobody needs any more", path)
            path.rmtree()
