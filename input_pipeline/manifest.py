"""What to prepare: a manifest of JSON lines, a folder, or files. Bad lines are listed, not lost.

A line of a manifest is one object:

    {"id": "clip7-q1", "video": "clips/7.mp4", "task": "qa", "source": "savenvid", "conversations":
     [{"from": "human", "value": "<video>\\nWhat is heard?"}, {"from": "gpt", "value": "A bell."}]}

The medium stands under "video" (picture and sound), "audio" (the sound alone) or "image"; its path is
relative to the manifest's folder or the media root. "interval": [12.0, 22.0] means those seconds of it alone.
"task", "source" and "conversations" may be missing; further keys are kept.

`write_manifest` also notes what is no sample: {"rejected": {...}} for each refused row of a public data set, and
{"left_out": {reason: count}} for what its options left out. Reading them back keeps the counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from input_pipeline.containers import MEDIA_SUFFIXES
from input_pipeline.conversation import ConversationError, split_rounds
from input_pipeline.errors import UserError
from input_pipeline.paths import appearing, is_remote, join, to_path, walk

MEDIA_KEYS = ("video", "audio", "image")
DEFAULT_TASK = "chat"  # Of a conversation that does not name its task: plain instruction following.


class ManifestError(UserError):
    """A manifest or folder that cannot be read at all; bad lines are Rejections instead."""


@dataclasses.dataclass(frozen=True)
class Rejection:
    """One row of rejected.jsonl.

    Attributes:
        path: the media file; the manifest where the line names none.
        id: the line's id, "" if unknown.
        reason: what is wrong.
        stage: "manifest" (the line itself), "open", "limit", "decode" (see MediaError), "timeout" or "crash".
    """

    path: str
    id: str
    reason: str
    stage: str


@dataclasses.dataclass(frozen=True)
class MediaLine:
    """One conversation about one media file, or, with conversations None, the media file alone.

    Attributes:
        path: the file, absolute and normalised.
        name: the file's path relative to the media root, with forward slashes: its key in the data set.
            With an interval, "clips/7.mp4#12.000-22.000": parts of one file are different media.
        kind: "video", "audio", "image", or "auto" for files that come without a manifest.
        interval: (start, end) in seconds of the file if only a part of it is meant, 0 <= start < end.
        extra: keys of the line that have no meaning here; they travel into the sample.
    """

    path: str
    name: str
    kind: str = "auto"
    id: str = ""
    task: str = DEFAULT_TASK
    source: str = ""
    conversations: list[dict[str, str]] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    interval: tuple[float, float] | None = None

    def sample(self) -> dict[str, Any]:
        """The sample of a record that this line becomes."""
        known = {"id": self.id, "task": self.task, "source": self.source, "conversations": self.conversations}
        return {**known, **self.extra}


@dataclasses.dataclass(frozen=True)
class Listing:
    """Everything that was asked for: what can be tried, what was refused, and files that are no media.

    Attributes:
        left_out: what the options of an importer left out on purpose: reason -> how many.
        count: lines of the manifest or media files, refused ones included, those left out not.
    """

    lines: list[MediaLine]
    rejections: list[Rejection]
    ignored: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.lines) + len(self.rejections)


def read_manifest(path: str | os.PathLike[str], media_root: str | os.PathLike[str] | None = None) -> Listing:
    """Reads a manifest of JSON lines; blank lines are skipped.

    Args:
        path: the manifest, local or gs://.
        media_root: folder that media paths are relative to; default the manifest's own.

    Returns:
        A Listing in the manifest's order. A line that is no JSON object, lacks a field, holds no proper
        conversation or one with an id that an earlier one has becomes a Rejection that names its number.

    Raises:
        ManifestError: the manifest cannot be read, holds no line, or is one JSON array.
    """
    path = to_path(path)
    root = path.parent if media_root is None else media_root
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such manifest") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if text.lstrip().startswith("["):
        raise ManifestError(f"{path} is one JSON array; write one object per line (jq -c '.[]' {path.name})")
    # Absolute: the same manifest, named from another folder, has the same listing.
    shown, lines, rejections, ids = join(".", str(path)), [], [], SeenIds()
    left_out: dict[str, int] = {}
    for number, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            entry = json.loads(raw)
        except (ValueError, RecursionError) as error:
            rejections.append(Rejection(shown, "", f"line {number} is not JSON: {error}", "manifest"))
            continue
        if _is_note(entry, "rejected", Rejection.__annotations__):
            rejections.append(Rejection(**entry["rejected"]))
            continue
        if _is_note(entry, "left_out"):
            left_out.update(entry["left_out"])
            continue
        where = f"line {number}"
        parsed = parse_line(entry, root, default_source=path.stem, where=where, manifest=shown)
        parsed = ids.check(parsed, where)
        (lines if isinstance(parsed, MediaLine) else rejections).append(parsed)
    if not lines and not rejections:
        raise ManifestError(f"{path} holds no line")
    return Listing(lines, rejections, left_out=left_out)


def _is_note(entry: Any, key: str, fields: Iterable[str] | None = None) -> bool:
    """Whether a line is one of `write_manifest`'s notes and no sample."""
    if not isinstance(entry, Mapping) or set(entry) != {key} or not isinstance(entry[key], Mapping):
        return False
    return fields is None or set(entry[key]) == set(fields)


def write_manifest(listing: Listing, path: str | os.PathLike[str]) -> None:
    """Writes a Listing as JSON lines that `read_manifest`, given the same media root, reads back unchanged.

    The file appears complete or not at all.

    Args:
        listing: of an importer or a manifest.
        path: the file, local or gs://; replaced if it is there.

    Raises:
        ManifestError: a line's kind is "auto" (files without a manifest), or the file cannot be written.
    """
    path = to_path(path)
    try:
        with appearing(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            for line in listing.lines:
                file.write(json.dumps(_entry(line), ensure_ascii=False) + "\n")
            for rejection in listing.rejections:
                note = {"rejected": dataclasses.asdict(rejection)}
                file.write(json.dumps(note, ensure_ascii=False) + "\n")
            if listing.left_out:
                file.write(json.dumps({"left_out": listing.left_out}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be written ({error.strerror or error})") from None


def _entry(line: MediaLine) -> dict[str, Any]:
    """The object that `parse_line` makes `line` of."""
    if line.kind not in MEDIA_KEYS:
        raise ManifestError(f"{line.path}: whether it is video, audio or image is not known; name its kind")
    entry: dict[str, Any] = {
        "id": line.id,
        line.kind: line.name.removesuffix(_interval_suffix(line.interval)),
    }
    if line.interval is not None:
        entry["interval"] = list(line.interval)
    entry |= {"task": line.task, "source": line.source}
    if line.conversations is not None:
        entry["conversations"] = line.conversations
    return entry | line.extra


def parse_lines(
    entries: Iterable[Mapping[str, Any]], media_root: str | os.PathLike[str] = ".", *, source: str = ""
) -> Listing:
    """Like `read_manifest` for lines that are already objects; `source` is the default of their "source"."""
    lines, rejections, ids = [], [], SeenIds()
    for number, entry in enumerate(entries, start=1):
        where = f"entry {number}"
        parsed = ids.check(parse_line(entry, media_root, default_source=source, where=where), where)
        (lines if isinstance(parsed, MediaLine) else rejections).append(parsed)
    return Listing(lines, rejections)


def list_folder(folder: str | os.PathLike[str]) -> Listing:
    """Every media file below a folder, by suffix, sorted by path; hidden and other files are `ignored`."""
    folder = to_path(folder)
    if not folder.is_dir():
        raise ManifestError(f"{folder} is no folder")
    media, ignored = [], []
    for directory, folders, files in walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            wanted = Path(name).suffix.lower() in MEDIA_SUFFIXES and not name.startswith(".")
            below = os.path.relpath(os.path.join(directory, name), folder)
            (media if wanted else ignored).append(Path(below).as_posix())
    if not media:
        known = " ".join(sorted(MEDIA_SUFFIXES))
        raise ManifestError(f"{folder} holds no media file (suffixes: {known}; {len(ignored)} other files)")
    source = Path(join(folder, ".")).name
    lines = [MediaLine(join(folder, name), name, source=source) for name in sorted(media)]
    return _checked_names(lines, sorted(_printable(name) for name in ignored))


def list_files(files: Sequence[str | os.PathLike[str]]) -> Listing:
    """The files given, in their order, whatever their suffix; one named twice is listed once."""
    lines = {}
    for file in files:
        path = join(".", os.fspath(file))
        if not is_remote(path) and os.path.isdir(path):
            raise ManifestError(f"{os.fspath(file)} is a folder; pass it with --folder")
        lines.setdefault(path, MediaLine(path, Path(file).as_posix(), source=Path(path).parent.name))
    return _checked_names(list(lines.values()))


def parse_line(
    entry: Any,
    root: str | os.PathLike[str],
    *,
    default_source: str = "",
    where: str = "line",
    manifest: str = "manifest",
) -> MediaLine | Rejection:
    """Checks one object of a manifest.

    Args:
        entry: the object.
        root: folder its path is relative to.
        default_source: "source" if it has none.
        where: how to call it in a reason, "line 7".
        manifest: path to name in a Rejection when the line has none.
    """
    if not isinstance(entry, Mapping):
        return Rejection(manifest, "", f"{where} is no JSON object but a {type(entry).__name__}", "manifest")
    line_id, media = entry.get("id", ""), [key for key in MEDIA_KEYS if entry.get(key) is not None]

    def refuse(reason: str) -> Rejection:
        named = entry.get(media[0]) if len(media) == 1 else None
        shown = join(root, named) if isinstance(named, str) and named else manifest
        return Rejection(_printable(shown), _printable(str(line_id)), f"{where}: {reason}", "manifest")

    try:
        msgpack.packb(dict(entry))
    # half a surrogate pair, an integer beyond 64 bits
    except (ValueError, OverflowError, TypeError) as error:
        return refuse(f"holds a value that no record can store ({_printable(str(error))})")
    if len(media) != 1:
        what = "names no medium" if not media else f"names {len(media)} media ({', '.join(media)})"
        return refuse(f'{what}; give one of "video", "audio", "image"')
    kind = media[0]
    if not isinstance(entry[kind], str) or not entry[kind] or "\0" in entry[kind]:
        return refuse(f'"{kind}" is {entry[kind]!r}; it must be the path of a file')
    for key in ("id", "task", "source"):
        if not isinstance(entry.get(key, ""), str):
            return refuse(f'"{key}" is {entry[key]!r}; it must be text')
    interval = entry.get("interval")
    if interval is not None:
        if kind == "image":
            return refuse('"interval" is of a video or a sound; a picture has none')
        if not _is_interval(interval):
            shown = _printable(json.dumps(interval, default=str)[:80])
            return refuse(f'"interval" is {shown}; it must be [start, end] in seconds, 0 <= start < end')
        interval = (float(interval[0]), float(interval[1]))
    conversations = entry.get("conversations")
    if conversations is not None:
        if not line_id:
            return refuse('has conversations but no "id"; predictions are matched by it')
        if not isinstance(conversations, list) or not all(
            isinstance(turn, Mapping) for turn in conversations
        ):
            return refuse('"conversations" must be a list of {"from": ..., "value": ...}')
        try:
            split_rounds(
                conversations, has_media=True, sample_id=line_id, empty_questions=len(conversations) < 3
            )
        except ConversationError as error:
            return refuse(str(error))
    path = join(root, entry[kind])
    known = {"id", "task", "source", "conversations", "interval", *MEDIA_KEYS}
    return MediaLine(
        path=path,
        name=os.path.relpath(path, root).replace(os.sep, "/") + _interval_suffix(interval),
        kind=kind,
        id=line_id,
        task=entry.get("task") or DEFAULT_TASK,
        source=entry.get("source") or default_source,
        conversations=conversations,
        extra={key: value for key, value in entry.items() if key not in known},
        interval=interval,
    )


def id_hash(line_id: str) -> int:
    """64 bits that stand for an id: two of ten million are the same with a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(line_id.encode(), digest_size=8).digest(), "big")


class SeenIds:
    """The ids of the conversations of one listing: predictions and annotations are matched by them."""

    def __init__(self) -> None:
        self._where: dict[int, str] = {}

    def check(self, line: MediaLine | Rejection, where: str) -> MediaLine | Rejection:
        """The line; a Rejection if an earlier one has its id. `where` is what to call it, "line 7"."""
        if isinstance(line, Rejection) or line.conversations is None:
            return line
        key = id_hash(line.id)
        if key in self._where:
            reason = f"{where}: {self._where[key]} has the same id"
            return Rejection(line.path, line.id, reason, "manifest")
        self._where[key] = where
        return line


def _is_interval(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return False
    if any(isinstance(t, bool) or not isinstance(t, int | float) for t in value):
        return False
    return all(math.isfinite(t) for t in value) and 0 <= value[0] < value[1]


def _interval_suffix(interval: tuple[float, float] | None) -> str:
    """ "#12.000-22.000"; more digits where milliseconds would not tell two intervals apart."""
    if interval is None:
        return ""
    start, end = (text if float(text := f"{t:.3f}") == t else repr(t) for t in interval)
    return f"#{start}-{end}"


def group_by_media(lines: Iterable[MediaLine]) -> list[list[MediaLine]]:
    """Lines on the same file, read the same way, together; in the order in which the files first appear."""
    groups: dict[tuple[str, str, tuple[float, float] | None], list[MediaLine]] = {}
    for line in lines:
        groups.setdefault((line.path, line.kind, line.interval), []).append(line)
    return list(groups.values())


def _checked_names(lines: Sequence[MediaLine], ignored: Sequence[str] = ()) -> Listing:
    """Rejects files whose names are no UTF-8, which neither a record nor a JSON line can hold."""
    rejections = [
        Rejection(_printable(line.path), "", "its name is not UTF-8; rename the file", "open")
        for line in lines
        if _printable(line.path) != line.path
    ]
    kept = [line for line in lines if _printable(line.path) == line.path]
    return Listing(kept, rejections, list(ignored))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
