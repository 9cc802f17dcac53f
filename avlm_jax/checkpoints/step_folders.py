"""Which folders of a checkpoint directory are steps: a step counts once it is complete, or not at all.

    <directory>/<step>/                   complete: its manifest.json was written last
    <directory>/<step>.<token>.partial    being written or removed, or what an interrupted run left of that
    <directory>/quarantine/<step>-<n>/    a step that failed its check, for a person to look at

On a disk a step is written as a .partial folder and appears by one rename. A bucket has no such thing: there it is
written in place, and a .partial object beside it says that it does not count yet. One process calls all of this.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from avlm_jax.checkpoints.storage import flush, is_bucket, resolve

if TYPE_CHECKING:
    from etils import epath

logger = logging.getLogger(__name__)

MANIFEST_FILE, QUARANTINE, PARTIAL = "manifest.json", "quarantine", ".partial"


class StepFolders:
    """The steps in `directory`, a local folder or a bucket address."""

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = resolve(directory)

    def __getitem__(self, step: int) -> epath.Path:
        """The folder of a complete step."""
        return self.directory / str(step)

    @property
    def quarantine(self) -> epath.Path:
        """Where damaged steps go."""
        return self.directory / QUARANTINE

    def steps(self) -> list[int]:
        """Complete steps, ascending."""
        names = {entry.name for entry in self.directory.iterdir()}
        if is_bucket(self.directory):
            names -= {name.partition(".")[0] for name in names if name.endswith(PARTIAL)}
        return sorted(int(name) for name in names if name.isdecimal())

    def begin(self, step: int) -> epath.Path:
        """An empty folder to write `step` to."""
        partial = self._partial(step)
        if is_bucket(partial):
            partial.write_text("")
            if self[step].exists():
                self[step].rmtree()
            return self[step]
        partial.mkdir()
        return partial

    def finish(self, step: int, folder: epath.Path) -> None:
        """From here on `folder`, whose manifest was written last, is `step`."""
        if is_bucket(folder):
            for entry in list(self.directory.glob(f"{step}.*{PARTIAL}")):
                entry.unlink()
            return
        for path in (folder / MANIFEST_FILE, folder):
            flush(path)
        folder.rename(self[step])
        flush(self.directory)

    def keep_newest(self, count: int) -> None:
        """Removes all but the newest `count` steps; a kill in between leaves no half ones."""
        for step in self.steps()[:-count]:
            partial = self._partial(step)
            if is_bucket(partial):
                partial.write_text("")
                (self[step] / MANIFEST_FILE).unlink(missing_ok=True)
                self[step].rmtree()
                partial.unlink()
            else:
                self[step].rename(partial)
                partial.rmtree()

    def clear(self) -> None:
        """Makes the directory if it is missing, and removes what an interrupted run left of saves and removals."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for entry in list(self.directory.glob(f"*{PARTIAL}")):
            logger.info("removing %s, which an interrupted run left", entry)
            if not is_bucket(entry):
                entry.rmtree()
                continue
            step = self.directory / entry.name.partition(".")[0]
            if step.exists() and not (step / MANIFEST_FILE).exists():
                step.rmtree()
            entry.unlink()

    def set_aside(self, step: int) -> epath.Path:
        """Moves a damaged step to quarantine/; returns where to."""
        self.quarantine.mkdir(parents=True, exist_ok=True)
        count = sum(1 for path in self.quarantine.iterdir() if path.name.startswith(f"{step}-"))
        return self[step].rename(self.quarantine / f"{step}-{count}")

    def space(self) -> str:
        """A sentence on the disk that the directory lies on; empty for a bucket."""
        if is_bucket(self.directory):
            return ""
        mount = Path(self.directory)
        while not os.path.ismount(mount):
            mount = mount.parent
        usage = shutil.disk_usage(mount)
        return f"the disk at {mount} has {usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB free"

    def _partial(self, step: int) -> epath.Path:
        # The token: threads of a save that failed in this process may still be writing to its folder.
        return self.directory / f"{step}.{secrets.token_hex(4)}{PARTIAL}"
