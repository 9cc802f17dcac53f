"""From the public annotation files of data sets to manifests: one small importer each.

    listing = import_annotations("audiocaps", "train.csv", "audiocaps/wav")
    write_manifest(listing, "audiocaps.jsonl")

Nothing is dropped unseen: a row becomes a line, or a rejection that says why, or is counted under what an option
leaves out.
"""

from __future__ import annotations

import dataclasses
import difflib
import heapq
import inspect
import os
import re
import sys
from collections import Counter
from typing import Any

from input_pipeline.annotations import youtube
from input_pipeline.annotations.audiocaps import AudioCaps
from input_pipeline.annotations.audioset import AudioSet
from input_pipeline.annotations.auto_acd import AutoAcd
from input_pipeline.annotations.importer import Importer, LeftOut, Refused
from input_pipeline.annotations.internvid import InternVid
from input_pipeline.annotations.lcs558k import Lcs558k
from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.music_avqa import MusicAvqa
from input_pipeline.annotations.panda70m import Panda70m
from input_pipeline.annotations.rows import AnnotationError, Head, WrongFile, open_text, read_head
from input_pipeline.annotations.saven_vid import AvBench, SavenVid
from input_pipeline.annotations.vggsound import VggSound
from input_pipeline.annotations.videoinstruct import VideoInstruct
from input_pipeline.annotations.videomme import VideoMme
from input_pipeline.manifest import Listing, MediaLine, Rejection, SeenIds, id_hash, parse_line
from input_pipeline.paths import join
from input_pipeline.progress import track

__all__ = ["DATASETS", "AnnotationError", "describe_dataset", "describe_datasets", "import_annotations"]

DATASETS: dict[str, type[Importer]] = {
    importer.name: importer
    for importer in (
        Lcs558k,
        Panda70m,
        AudioSet,
        AudioCaps,
        AutoAcd,
        VideoInstruct,
        InternVid,
        VggSound,
        SavenVid,
        AvBench,
        VideoMme,
        MusicAvqa,
    )
}


def import_annotations(
    dataset: str,
    path: str | os.PathLike[str],
    media_root: str | os.PathLike[str],
    *,
    max_samples: int | str = 0,
    **options: Any,
) -> Listing:
    """Reads a public annotation file.

    Args:
        dataset: a name of DATASETS, or the data set's usual name; case, '-' and '_' do not matter.
        path: the annotation file; which one, says the importer's docstring.
        media_root: folder below which the media lie; it is listed once.
        max_samples: keep so many of the samples that can be used, the same ones in every run (those whose ids
            have the smallest hashes, so that a larger number only adds); 0 keeps all.
        options: fields of the importer's class; texts are converted to the type of the default.

    All of it is held in memory, 1.3 KB for a line with a short caption and 0.3 KB for a refused row: ten million
    rows take 13 GB. Larger files are divided before.

    Returns:
        Lines in the order of the file, one per sample. lines + rejections + everything left_out are the samples
        of the file, and its rows where a row is one sample.

    Raises:
        AnnotationError: unknown data set or option, a file of another data set (told, if it is recognised), one
            that cannot be read or holds no row, or no such folder of media.
    """
    path, media_root = join(".", os.fspath(path)), join(".", os.fspath(media_root))
    importer = _make(_find(dataset), options)
    keep = _number("max_samples", max_samples, 0)
    with open_text(path):  # Tells a missing file before anything else.
        head = read_head(path)
    if other := _finer(importer, head):
        raise WrongFile(f"{path}: {_looks_like([other])}")
    files = MediaFiles(media_root)
    samples = _Sample(keep)
    rejections: list[Rejection] = []
    left_out: Counter[str] = Counter()
    ids = SeenIds()
    try:
        for where, outcome in track(
            importer.read(path, files), label=f"import {importer.name}", unit="items"
        ):
            if isinstance(outcome, LeftOut):
                left_out[outcome.reason] += 1
                continue
            if isinstance(outcome, Refused):
                reason = f"{where}: {outcome.reason}"
                rejections.append(Rejection(path, outcome.id, reason, "manifest"))
                continue
            line = parse_line(outcome, media_root, default_source=importer.name, where=where, manifest=path)
            line = ids.check(line, where)
            if isinstance(line, Rejection):
                rejections.append(line)
                continue
            samples.add(line)
    except WrongFile as error:
        known = [o for o in DATASETS.values() if o.recognises(head) and not isinstance(importer, o)]
        raise WrongFile(f"{error}; {_looks_like(known)}" if known else str(error)) from None
    if samples.dropped:
        left_out[f"beyond max_samples={keep}"] += samples.dropped
    listing = Listing(samples.lines(), rejections, left_out=dict(left_out))
    if not listing.count and not left_out:
        raise AnnotationError(f"{path}: holds no row")
    return listing


def describe_datasets() -> str:
    """The data sets, a line each with the file they read."""
    width = max(map(len, DATASETS))
    return "\n".join(f"  {n:{width}}  {i.title}: {i.summary}" for n, i in DATASETS.items())


def describe_dataset(dataset: str) -> str:
    """What one data set's importer expects, where the public files come from, and its options.

    Raises:
        AnnotationError: unknown data set.
    """
    importer = _find(dataset)
    texts = [sys.modules[importer.__module__].__doc__, importer.__doc__]
    if hasattr(importer, "bare_ids"):
        texts.append(youtube.__doc__)
    lines = [f"{importer.title} (--dataset {importer.name})", ""]
    lines += [line for text in texts for line in (inspect.cleandoc(text or ""), "")]
    lines += ["options:", "  max_samples=0: keep so many, the same ones in every run; 0 keeps all"]
    for field in dataclasses.fields(importer):
        lines.append(f"  {field.name}={field.default}: {field.metadata['help']}")
    return "\n".join(lines)


class _Sample:
    """All lines, or those `keep` whose ids have the smallest hashes."""

    def __init__(self, keep: int):
        self._keep, self._count = keep, 0
        self._heap: list[tuple[int, int, MediaLine]] = []

    def add(self, line: MediaLine) -> None:
        # The count parts equal hashes, so lines themselves are never compared.
        item = (-id_hash(line.id) if self._keep else 0, self._count, line)
        self._count += 1
        if not self._keep:
            self._heap.append(item)
        elif len(self._heap) < self._keep:
            heapq.heappush(self._heap, item)
        else:
            heapq.heappushpop(self._heap, item)

    @property
    def dropped(self) -> int:
        return self._count - len(self._heap)

    def lines(self) -> list[MediaLine]:
        return [line for _, _, line in sorted(self._heap, key=lambda item: item[1])]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _find(dataset: str) -> type[Importer]:
    names = {
        _plain(name): importer for i in DATASETS.values() for name, importer in ((i.name, i), (i.title, i))
    }
    if _plain(dataset) in names:
        return names[_plain(dataset)]
    near = difflib.get_close_matches(_plain(dataset), names, 1, 0.6)
    hint = f"; did you mean {names[near[0]].name}?" if near else ""
    raise AnnotationError(f"unknown data set {dataset!r}{hint}. Known: {', '.join(DATASETS)}")


def _make(importer: type[Importer], options: dict[str, Any]) -> Importer:
    fields = {field.name: field.default for field in dataclasses.fields(importer)}
    for name in options:
        if name not in fields:
            known = ", ".join([*fields, "max_samples"])
            raise AnnotationError(f"{importer.name} has no option {name!r}; its options are {known}")
    return importer(**{name: _number(name, value, fields[name]) for name, value in options.items()})


def _number(name: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`."""
    try:
        converted = type(default)(value)
    except (TypeError, ValueError):
        raise AnnotationError(f"{name} is {value!r}; it must be a {type(default).__name__}") from None
    if isinstance(converted, int | float) and not converted >= 0:
        raise AnnotationError(f"{name} is {value!r}; it must not be negative")
    return converted


def _finer(importer: Importer, head: Head) -> type[Importer] | None:
    """Another data set whose files have all that `importer` needs and more, if the file is of that one."""
    return next((o for o in DATASETS.values() if o.fields > importer.fields and o.recognises(head)), None)


def _looks_like(known: list[type[Importer]]) -> str:
    best = max(known, key=lambda importer: len(importer.fields))
    return f"it looks like {best.title} (--dataset {best.name})"
