"""The media files below a folder, listed once and found by name: data sets have millions of rows."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence

from input_pipeline.annotations.rows import AnnotationError, RowError
from input_pipeline.containers import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from input_pipeline.paths import is_remote, to_path, walk

SUFFIXES = {"video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES, "image": IMAGE_SUFFIXES}
_KINDS = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}


class MediaFiles:
    """Finds files by stem (their name without suffix), in whatever folder below `root` they lie.

    Args:
        root: the folder, or a bucket (gs://).

    Raises:
        AnnotationError: there is no such folder.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.fspath(root)
        if not is_remote(self.root) and not os.path.isdir(self.root):
            raise AnnotationError(f"{self.root}: no such media folder")

    @functools.cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """Stem -> paths relative to the root, sorted. Hidden files and folders are left out."""
        found: dict[str, list[str]] = {}
        for name in _names_below(self.root):
            stem, suffix = os.path.splitext(name.rpartition("/")[2])
            if suffix.lower() in _KINDS:
                found.setdefault(stem, []).append(name)
        if not found:
            known = " ".join(sorted(_KINDS))
            raise AnnotationError(f"{self.root}: holds no media file (suffixes: {known})")
        for names in found.values():
            names.sort()
        return found

    def find(self, stems: Sequence[str], kinds: Sequence[str] = ("video",)) -> tuple[str, str]:
        """The first of `stems` that a file has.

        Args:
            stems: names without suffix, the preferred one first.
            kinds: of "video", "audio", "image", the preferred one first.

        Returns:
            (path relative to the root, the stem).

        Raises:
            RowError: there is none (some names are told), or several of one name and kind.
        """
        for stem in stems:
            names = self.by_stem.get(stem)
            if names is None:
                continue
            for kind in kinds:
                fitting = [name for name in names if kind_of(name) == kind]
                if len(fitting) > 1:
                    raise RowError(
                        f"{len(fitting)} files have its name, {fitting[0]} and {fitting[1]}; keep one"
                    )
                if fitting:
                    return fitting[0], stem
        # Short: a listing may hold millions of these.
        shown = stems if len(stems) < 4 else [*stems[:2], stems[-1]]
        tried = ", ".join(shown) + (f" or as {more} more" if (more := len(stems) - len(shown)) else "")
        raise RowError(f"no {' or '.join(kinds)} file below {self.root} is named {tried}")


def kind_of(name: str) -> str:
    """ "video", "audio" or "image", by suffix."""
    return _KINDS[os.path.splitext(name)[1].lower()]


def _names_below(root: str) -> Iterator[str]:
    """Paths relative to the root, with forward slashes."""
    for directory, folders, files in walk(to_path(root)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(directory, root).replace(os.sep, "/")
        prefix = "" if below == "." else below + "/"
        yield from (prefix + name for name in files if not name.startswith("."))
