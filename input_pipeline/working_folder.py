"""Where a folder of records is made: beside its place, under a lock, kept when killed, renamed when whole.

For `--out records/train` that is records/.train.partial. It belongs to one plan, the sha256 of everything
that is asked for; a run of the same plan takes up what it finds there, one of another plan discards it if no
shard in it is finished or the caller says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from input_pipeline.paths import (
    COPY_BYTES,
    REQUESTS_AT_ONCE,
    AnyPath,
    file_size,
    is_remote,
    join,
    map_files,
    to_path,
    write_text,
)
from input_pipeline.records import (
    MANIFEST,
    REJECTED,
    SAMPLES,
    SIDECAR,
    RecordError,
    is_record_file,
)

PLAN = "plan.sha256"


class WorkingFolder:
    """A context manager that holds the working folder of `out_dir`; leave it with or without `put_in_place`.

    Attributes:
        path: the working folder; it exists inside the context.
        finished: the manifest in `out_dir` if that was made by this very plan, else None; what to do then is
            the caller's choice.

    Args:
        out_dir: folder of records to create, local or gs://; what a link points to is made, not the link.
        plan: sha256 of what is asked for.
        overwrite: replace records of another plan that are in `out_dir`, and discard finished shards of one that
            are in the working folder.

    Raises:
        RecordError: on entering: `out_dir` or the working folder holds records of another plan and `overwrite`
            is False, or `out_dir` holds something else or damaged records, or is a mount point or a bucket, or
            another run is at work on it. On gs:// the last is not noticed.
    """

    def __init__(self, out_dir: str | os.PathLike[str], plan: str, *, overwrite: bool = False) -> None:
        named = join(".", os.fspath(out_dir))
        self._out = to_path(named if is_remote(named) else os.path.realpath(named))
        self._plan, self._overwrite = plan, overwrite
        self.path = self._beside("partial")
        self._replaced = self._beside("replaced")
        self._lock: int | None = None
        self.finished: dict[str, Any] | None = None

    def __enter__(self) -> WorkingFolder:
        self._check_it_can_be_replaced()
        if not is_remote(self._out):
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            self._roll_back()
            self._check_place()
            if self._plan not in (_text(self.path / PLAN), (self.complete or {}).get("plan")):
                self._discard_other_plan()
            if not is_remote(self.path):  # Cloud Storage has no folders, only names with slashes.
                self.path.mkdir(exist_ok=True)
                for path in self.path.glob(".*.tmp"):  # what a killed run was writing
                    path.unlink()
            write_text(self.path / PLAN, self._plan)
        except BaseException:
            self._release_lock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release_lock()

    def discard(self) -> None:
        """Removes the working folder: nothing in it is wanted."""
        _remove(self.path)

    def _discard_other_plan(self) -> None:
        there = self.path.iterdir() if self.path.exists() else ()
        finished = sum(path.name.endswith(SIDECAR) and path.name.startswith("shard-") for path in there)
        if finished and not self._overwrite:
            raise RecordError(
                f"{self.path} holds {finished} finished shards of a run with other arguments; give that run's "
                "arguments to go on with it, pass --overwrite to discard them, or choose another --out"
            )
        self.discard()

    @property
    def complete(self) -> dict[str, Any] | None:
        """The manifest in the working folder, written last: a run was killed before all was in place."""
        return _manifest(self.path)

    def put_in_place(self) -> None:
        """Gives the finished records their final name, and removes everything else in the working folder.

        A local folder is renamed; killed at any moment, `out_dir` holds the old records or the new ones or
        the next run puts it right. On gs:// the objects are moved one by one, the manifest last.
        """
        manifest = _manifest(self.path)
        if manifest is None:
            raise RecordError(f"{self.path} is not finished: {MANIFEST} is missing")
        wanted = [shard["file"] for shard in manifest["shards"]] + [SAMPLES, REJECTED]
        if is_remote(self._out):
            self._move_objects(wanted)
            return
        for path in self.path.iterdir():
            if path.name not in (*wanted, MANIFEST):
                path.unlink()
        shutil.rmtree(self._replaced, ignore_errors=True)
        if self._out.exists():
            os.rename(self._out, self._replaced)
        os.rename(self.path, self._out)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _beside(self, what: str) -> AnyPath:
        return self._out.parent / f".{self._out.name}.{what}"

    def _check_it_can_be_replaced(self) -> None:
        """What is no folder in another one can neither be renamed nor have a working folder beside it."""
        text = os.fspath(self._out)
        if is_remote(text) and "/" not in text.partition("://")[2].strip("/"):
            raise RecordError(f"{text} is a whole bucket; name a folder below it for the records")
        if not is_remote(text) and os.path.ismount(text):
            raise RecordError(f"{text} is a mount point; name a folder below it for the records")

    def _check_place(self) -> None:
        out = self._out
        if not out.exists():
            return
        if not out.is_dir():
            raise RecordError(f"{out} is a file; name a folder for the records")
        foreign = [path.name for path in out.iterdir() if not is_record_file(path.name)]
        if foreign:
            raise RecordError(f"{out} holds other files ({foreign[0]}, ...); name a new or an empty folder")
        manifest = _manifest(out)
        same = manifest is not None and manifest.get("plan") == self._plan
        damaged = _damaged(out, manifest) if same else []
        if damaged and not self._overwrite:
            raise RecordError(
                f"{out / damaged[0]} is missing or not as long as {MANIFEST} says; pass --overwrite to make the "
                "records again"
            )
        if same and not damaged:
            self.finished = manifest
        elif (out / MANIFEST).exists() and not self._overwrite:
            raise RecordError(
                f"{out} holds other records already (another listing, media spec or limits); pass --overwrite "
                "to replace them or choose another --out"
            )

    def _roll_back(self) -> None:
        """What a run killed between the two renames of `put_in_place` left."""
        if is_remote(self._out) or not self._replaced.exists():
            return
        if self._out.exists():
            shutil.rmtree(self._replaced)
        else:
            os.rename(self._replaced, self._out)

    def _move_objects(self, wanted: Sequence[str]) -> None:
        there = list(self._out.iterdir()) if self._out.exists() else []
        stale = [path for path in there if path.name not in (*wanted, MANIFEST)]
        # From here to the end there are no records: half of them would be neither the old nor the new ones.
        with contextlib.suppress(FileNotFoundError):
            (self._out / MANIFEST).unlink()
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as executor:
            list(executor.map(lambda path: path.unlink(), stale))
            # epath moves objects only into a folder that there is: one with an object in it.
            if (self.path / REJECTED).exists():
                (self.path / REJECTED).copy(self._out / REJECTED, overwrite=True)
            list(executor.map(self._move_object, wanted))
        self._move_object(MANIFEST)
        self.discard()

    def _move_object(self, name: str) -> None:
        if (self.path / name).exists():  # else a killed run has moved it
            (self.path / name).replace(self._out / name)

    def _take_lock(self) -> None:
        """The kernel ends a lock with its process, so one that is left over by a killed run never counts."""
        path = self._beside("lock")
        while self._lock is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 100).decode(errors="replace")
                os.close(descriptor)
                raise RecordError(
                    f"another run is at work on {self._out} ({holder or 'just started'}); wait for it or "
                    "choose another --out"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                print(
                    f"warning: {path.parent} has no file locks; make sure that no other run writes {self._out}",
                    file=sys.stderr,
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    self._lock = descriptor
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
                    return
            os.close(descriptor)  # another run has just removed it

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._beside("lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def _text(path: AnyPath) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _manifest(folder: AnyPath) -> dict[str, Any] | None:
    try:
        manifest = json.loads(_text(folder / MANIFEST))
        return manifest if manifest.keys() >= {"counts", "shards"} else None
    except (ValueError, AttributeError):
        return None


def _damaged(folder: AnyPath, manifest: dict[str, Any]) -> list[str]:
    """Files of finished records that are missing, or shorter or longer than their manifest says."""
    counts = manifest["counts"]
    lists = {SAMPLES: counts["samples"], REJECTED: counts["rejected"]}
    shards = manifest["shards"]
    sizes = map_files(_size, (folder / shard["file"] for shard in shards), folder)
    missing = [shard["file"] for shard, size in zip(shards, sizes, strict=True) if size != shard["bytes"]]
    return missing + [name for name, lines in lists.items() if _count_lines(folder / name) != lines]


def _size(path: AnyPath) -> int | None:
    try:
        return file_size(path)
    except FileNotFoundError:
        return None


def _count_lines(path: AnyPath) -> int | None:
    try:
        with path.open("rb") as file:
            return sum(part.count(b"\n") for part in iter(lambda: file.read(COPY_BYTES), b""))
    except FileNotFoundError:
        return None


def _remove(folder: AnyPath) -> None:
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rmtree()
