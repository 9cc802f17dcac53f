"""What to prepare: a manifest of JSON lines, a folder, or files. Bad lines are listed, not lost.

A line of a manifest is one object:

    {"id": "clip7-q1", "video": "clips/7.mp4", "task": "qa", "source": "savenvid", "conversations":
     [{"from": "human", "value": "<video>\\nWhat is heard?"}, {"from": "gpt", "value": "A bell."}]}

The medium stands under "video" (picture and sound), "audio" (the sound alone) or "image"; its path is
relative to the manifest's folder or the media root. "task", "source" and "conversations" may be missing;
further keys are kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from input_pipeline.containers import MEDIA_SUFFIXES
from input_pipeline.conversation import ConversationError, split_rounds
from input_pipeline.errors import UserError

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
        kind: "video", "audio", "image", or "auto" for files that come without a manifest.
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

    def sample(self) -> dict[str, Any]:
        """The sample of a record that this line becomes."""
        known = {"id": self.id, "task": self.task, "source": self.source, "conversations": self.conversations}
        return {**known, **self.extra}


@dataclasses.dataclass(frozen=True)
class Listing:
    """Everything that was asked for: what can be tried, what was refused, and files that are no media.

    Attributes:
        count: lines of the manifest or media files, refused ones included.
    """

    lines: list[MediaLine]
    rejections: list[Rejection]
    ignored: list[str] = dataclasses.field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.lines) + len(self.rejections)


def read_manifest(path: str | os.PathLike[str], media_root: str | os.PathLike[str] | None = None) -> Listing:
    """Reads a manifest of JSON lines; blank lines are skipped.

    Args:
        path: the manifest.
        media_root: folder that media paths are relative to; default the manifest's own.

    Returns:
        A Listing in the manifest's order. A line that is no JSON object, lacks a field or holds no proper
        conversation becomes a Rejection that names its number.

    Raises:
        ManifestError: the manifest cannot be read, holds no line, or is one JSON array.
    """
    path = Path(path)
    root = Path(media_root) if media_root is not None else path.parent
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such manifest") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if text.lstrip().startswith("["):
        raise ManifestError(f"{path} is one JSON array; write one object per line (jq -c '.[]' {path.name})")
    lines, rejections = [], []
    for number, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            entry = json.loads(raw)
        except (ValueError, RecursionError) as error:
            rejections.append(Rejection(str(path), "", f"line {number} is not JSON: {error}", "manifest"))
            continue
        parsed = parse_line(entry, root, default_source=path.stem, where=f"line {number}", manifest=str(path))
        (lines if isinstance(parsed, MediaLine) else rejections).append(parsed)
    if not lines and not rejections:
        raise ManifestError(f"{path} holds no line")
    return Listing(lines, rejections)


def parse_lines(
    entries: Iterable[Mapping[str, Any]], media_root: str | os.PathLike[str] = ".", *, source: str = ""
) -> Listing:
    """Like `read_manifest` for lines that are already objects; `source` is the default of their "source"."""
    lines, rejections = [], []
    for number, entry in enumerate(entries, start=1):
        parsed = parse_line(entry, Path(media_root), default_source=source, where=f"entry {number}")
        (lines if isinstance(parsed, MediaLine) else rejections).append(parsed)
    return Listing(lines, rejections)


def list_folder(folder: str | os.PathLike[str]) -> Listing:
    """Every media file below a folder, by suffix, sorted by path; hidden and other files are `ignored`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ManifestError(f"{folder} is no folder")
    media, ignored = [], []
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(directory, name)
            wanted = path.suffix.lower() in MEDIA_SUFFIXES and not name.startswith(".")
            (media if wanted else ignored).append(path.relative_to(folder).as_posix())
    if not media:
        known = " ".join(sorted(MEDIA_SUFFIXES))
        raise ManifestError(f"{folder} holds no media file (suffixes: {known}; {len(ignored)} other files)")
    source = folder.resolve().name
    lines = [MediaLine(_absolute(folder, name), name, source=source) for name in sorted(media)]
    return _checked_names(lines, sorted(_printable(name) for name in ignored))


def list_files(files: Sequence[str | os.PathLike[str]]) -> Listing:
    """The files given, in their order, whatever their suffix; one named twice is listed once."""
    lines = {}
    for file in files:
        path = _absolute(Path("."), os.fspath(file))
        if os.path.isdir(path):
            raise ManifestError(f"{os.fspath(file)} is a folder; pass it with --folder")
        lines.setdefault(path, MediaLine(path, Path(file).as_posix(), source=Path(path).parent.name))
    return _checked_names(list(lines.values()))


def parse_line(
    entry: Any, root: Path, *, default_source: str = "", where: str = "line", manifest: str = "manifest"
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
        shown = _absolute(root, named) if isinstance(named, str) and named else manifest
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
    path = _absolute(root, entry[kind])
    known = {"id", "task", "source", "conversations", *MEDIA_KEYS}
    return MediaLine(
        path=path,
        name=Path(os.path.relpath(path, root)).as_posix(),
        kind=kind,
        id=line_id,
        task=entry.get("task") or DEFAULT_TASK,
        source=entry.get("source") or default_source,
        conversations=conversations,
        extra={key: value for key, value in entry.items() if key not in known},
    )


def group_by_media(lines: Iterable[MediaLine]) -> list[list[MediaLine]]:
    """Lines on the same file, read the same way, together; in the order in which the files first appear."""
    groups: dict[tuple[str, str], list[MediaLine]] = {}
    for line in lines:
        groups.setdefault((line.path, line.kind), []).append(line)
    return list(groups.values())


def _absolute(root: Path, path: str) -> str:
    return os.path.normpath(os.path.join(os.path.abspath(root), path))


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
