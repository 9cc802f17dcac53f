"""A record's media become the padded arrays of one batch row: pixels and samples, or features of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import simplejpeg

from input_pipeline.features import features_in
from input_pipeline.records import PCM_SCALE, RecordError, unpack_record
from input_pipeline.spec import FEATURE_DTYPE, PIXELS, FeatureShapes, MediaSpec


def decode_record(data: bytes, spec: MediaSpec, *, frames: bool = True, audio: bool = True) -> dict[str, Any]:
    """Unpacks a record into the arrays of one batch row.

    Args:
        data: one record as `RecordReader` or Grain's ArrayRecord source gives it.
        spec: the MediaSpec of the batch.
        frames, audio: False leaves that modality out (mask False) and saves its decoding.

    Returns:
        frames uint8 [t h w 3], frame_times f32 [t], frame_mask bool [t], audio f32 [w s],
        audio_spans f32 [w 2], audio_mask bool [w], duration f32 [], all padded on the right, and "samples"
        (list of maps), "id", "source". A record of features gives frame_features bf16 [t p d] in place of
        frames, audio_features bf16 [w k d] in place of audio; frames that need no padding are not copied.

    Raises:
        RecordError: another schema, another picture size, or more frames or windows than the spec has room
            for.
    """
    record = unpack_record(data)
    try:
        encoded = {name: features_in(record, name) for name in ("video", "audio")}
    except ValueError as error:
        raise RecordError(f"{record['id']}: damaged features ({error}); cache them again") from None
    shapes = FeatureShapes(*(None if e is None else e.shape[1:] for e in encoded.values()))
    pictures: Any = []
    if frames:
        pictures = record["frames"] if not shapes.video else encoded["video"]
    times = record["frame_times"] if frames else []
    windows = []
    for i, window in enumerate(record["windows"] if audio else ()):
        if shapes.audio:
            sound = encoded["audio"][i]
        else:
            sound = np.frombuffer(window["pcm"], "<i2").astype(np.float32) / PCM_SCALE
        windows.append((*window["span"], sound))
    row = pad_media(pictures, times, windows, record["duration"], spec, name=record["id"], features=shapes)
    return {**row, "samples": record["samples"], "id": record["id"], "source": record["source"]}


def pad_media(
    frames: Sequence[np.ndarray | bytes] | np.ndarray,
    frame_times: Sequence[float] | np.ndarray,
    windows: Sequence[tuple[float, float, np.ndarray]],
    duration: float,
    spec: MediaSpec,
    *,
    name: str = "media",
    features: FeatureShapes = PIXELS,
) -> dict[str, np.ndarray]:
    """Pads frames and windows to the spec's static shapes; what is missing is masked. See `decode_record`.

    Also takes the fields of a `LoadedMedia` directly; frames may be JPEG. With `features`, frames [p d] and the windows' arrays
    [k d] are those. Raises RecordError naming `name` if something does not fit.
    """
    t, h, w, s = spec.num_frames, spec.image_size, spec.max_windows, spec.window_samples
    if len(frames) > t or len(windows) > w:
        raise RecordError(
            f"{name} has {len(frames)} frames and {len(windows)} audio windows, the spec has room for "
            f"{t} and {w}; prepare it for this media spec"
        )
    row = {
        "frame_times": np.zeros(t, np.float32),
        "frame_mask": np.arange(t) < len(frames),
        "audio_spans": np.zeros((w, 2), np.float32),
        "audio_mask": np.arange(w) < len(windows),
        "duration": np.float32(duration),
    }
    for i, (_, time) in enumerate(zip(frames, frame_times, strict=True)):
        row["frame_times"][i] = time
    for i, (start, end, _) in enumerate(windows):
        row["audio_spans"][i] = start, end
    if features.video:
        row["frame_features"] = _pad_rows(frames, (t, *features.video))
    else:
        row["frames"] = np.zeros((t, h, h, 3), np.uint8)
        for i, frame in enumerate(frames):
            _put_picture(frame, row["frames"][i], name)
    if features.audio:
        row["audio_features"] = _pad_rows([sound for *_, sound in windows], (w, *features.audio))
    else:
        row["audio"] = np.zeros((w, s), np.float32)
        for i, (_, _, samples) in enumerate(windows):
            if len(samples) > s:
                raise RecordError(
                    f"{name} has audio windows of {len(samples)} samples, the spec has room for {s}"
                )
            row["audio"][i, : len(samples)] = samples
    return row


def _put_picture(frame: np.ndarray | bytes, place: np.ndarray, name: str) -> None:
    """A picture, as pixels or as JPEG, into its place [h w 3]; JPEG is decoded right there, without a copy."""
    try:
        height, width = (
            simplejpeg.decode_jpeg_header(frame)[:2] if isinstance(frame, bytes) else frame.shape[:2]
        )
        if (height, width, 3) != place.shape:
            raise RecordError(
                f"{name} has frames of [{height}, {width}, 3], the spec wants {list(place.shape)}"
            )
        if isinstance(frame, bytes):
            simplejpeg.decode_jpeg(frame, "RGB", buffer=place)
        else:
            place[:] = frame
    except ValueError as error:
        raise RecordError(f"{name}: a frame is no readable JPEG ({error}); prepare again") from None


def _pad_rows(rows: Sequence[np.ndarray] | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`rows` (features) with zeros behind them; not copied if there are enough of them already."""
    if isinstance(rows, np.ndarray) and rows.shape == shape:
        return rows
    padded = np.zeros(shape, FEATURE_DTYPE)
    for i, row in enumerate(rows):
        padded[i] = row
    return padded
