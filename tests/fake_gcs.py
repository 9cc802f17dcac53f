"""gs:// on the local disk, for every process that has AVLM_FAKE_GCS in its environment and calls `register`.

Like gcsfs: names come back without a scheme, there are no folders but by what is in them, and a move is one call.
"""

from __future__ import annotations

import os

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

ROOT = "AVLM_FAKE_GCS"


class FakeGcs(DirFileSystem):
    """Objects gs://bucket/name as files $AVLM_FAKE_GCS/bucket/name."""

    protocol = ("gs", "gcs")

    def __init__(self, **options: object) -> None:
        super().__init__(path=os.environ[ROOT], fs=LocalFileSystem(auto_mkdir=True), skip_instance_cache=True)

    def _join(self, path):
        self.path = os.environ[ROOT]  # epath keeps one instance for good, tests have a root each
        if isinstance(path, str | os.PathLike):
            path = os.fspath(path).removeprefix("gs://")
        return super()._join(path)

    def mkdir(self, path, *arguments, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def exists(self, path, **options):
        full = self._join(path)
        return os.path.isfile(full) or any(files for _, _, files in os.walk(full))

    def isdir(self, path):
        return self.exists(path) and not os.path.isfile(self._join(path))


def register() -> None:
    """Makes fsspec, and so epath, take this for Cloud Storage."""
    for protocol in FakeGcs.protocol:
        fsspec.register_implementation(protocol, FakeGcs, clobber=True)
