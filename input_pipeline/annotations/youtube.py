"""Files of clips from YouTube, by the names that the field's downloaders give them.

A file is either a clip, already cut, or a whole video, out of which the annotation's seconds are taken:

    <id>_000030             VGGSound's own form, the start in six digits
    <id>_30_40, <id>_30.000_40.000, <id>_30000_40000      start and end in seconds or milliseconds
    <id>_30, <id>_30000     the start alone
    Y<id>_..., Y<id>        the same with the letter that AudioSet's tools put ahead; Y<id> alone is a clip too
    <id>                    a whole video, or a clip: the option `bare_ids` says which
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.rows import AnnotationError, RowError

BARE_IDS = ("source", "clip")
BARE_IDS_HELP = (
    "what a file named by the video's id alone holds: the whole video (source) or the clip already cut (clip)"
)
VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{11}")


def check_bare_ids(value: str) -> None:
    """Raises AnnotationError for an unknown value of the option."""
    if value not in BARE_IDS:
        raise AnnotationError(f"bare_ids is {value!r}; use one of {', '.join(BARE_IDS)}")


def clip_stems(video_id: str, start: float, end: float) -> list[str]:
    """Names, without suffix, of a clip that is already cut; start and end in seconds."""
    begin, finish = _number(start), _number(end)
    times = [f"{int(start):06d}"] if start == int(start) else []
    times += [f"{begin}_{finish}", f"{start:.3f}_{end:.3f}", f"{round(start * 1000)}_{round(end * 1000)}"]
    times += [begin, f"{round(start * 1000)}"]
    stems = [f"{prefix}{video_id}_{time}" for prefix in ("", "Y") for time in times]
    return list(dict.fromkeys([*stems, f"Y{video_id}"]))


def locate(
    files: MediaFiles,
    video_id: str,
    start: float,
    end: float,
    *,
    kinds: Sequence[str],
    bare_ids: str,
    clips: Sequence[str] = (),
) -> tuple[str, tuple[float, float] | None]:
    """The file that holds the seconds `start` to `end` of a video.

    Args:
        files: of the data set.
        video_id: on YouTube.
        start, end: seconds.
        kinds: see `MediaFiles.find`.
        bare_ids: see above.
        clips: further names of the clip, in front of the usual ones.

    Returns:
        (path relative to the media root, interval to take out of it or None for a clip).

    Raises:
        RowError: no file has one of the names, or start and end are no interval.
    """
    if not 0 <= start < end:
        raise RowError(f"its clip begins at {_number(start)} s and ends at {_number(end)} s")
    stems = list(dict.fromkeys([*clips, *clip_stems(video_id, start, end)]))
    path, stem = files.find([*stems, video_id], kinds)
    cut = stem in stems or bare_ids == "clip"
    return path, None if cut else (start, end)


def check_video_id(video_id: str) -> str:
    """The id; RowError if it cannot be one of YouTube's."""
    if not VIDEO_ID.fullmatch(video_id):
        raise RowError(f"{video_id!r} is no id of YouTube; those have 11 letters, digits, '-' and '_'")
    return video_id


def seconds(text: str, what: str) -> float:
    """A plain number of seconds; RowError naming `what` for anything else."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise RowError(f"its {what} is {text!r}; a number of seconds is expected") from None
    if not 0 <= value < 1e6:
        raise RowError(f"its {what} is {text!r}; seconds of a video are expected")
    return value


_CLOCK = re.compile(r"(\d{1,3}):([0-5]\d):([0-5]\d(?:\.\d+)?)")


def clock_seconds(text: str, what: str) -> float:
    """Seconds of "HH:MM:SS.mmm", to the millisecond; RowError naming `what` for anything else."""
    match = _CLOCK.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise RowError(f"its {what} is {text!r}; a time as HH:MM:SS.mmm is expected")
    hours, minutes, rest = match.groups()
    return round(int(hours) * 3600 + int(minutes) * 60 + float(rest), 3)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
