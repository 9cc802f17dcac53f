"""Features of frozen encoders in records: they stand where pictures (JPEG) and samples (PCM) stood.

A folder of features is a folder of records like any other. Its records hold, in place of the media they stand
for, {"shape": [...], "data": bytes} with bf16 values, little-endian, nothing padded:

    frame_features   [t p d]   in place of what "frames" holds; frame_times stays
    audio_features   [w k d]   in place of every window's "pcm"; the windows' spans stay

Its manifest has the section "features", by modality, with at least "shape": that of one frame or window.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.spec import FEATURE_DTYPE, FeatureShapes

# glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX.
ALLOCATOR = {-1: 2**30, -3: 64 * 2**20, -8: 1}
FIELDS = {"video": "frame_features", "audio": "audio_features"}
SUFFIX = ".features"  # Of the folder beside the records it was made from.


def replace_media(
    record: Mapping[str, Any], *, video: np.ndarray | None = None, audio: np.ndarray | None = None
) -> bytes:
    """A record (its map, see `unpack_record`) with features in place of its media, as it is stored.

    Args:
        record: with frames and windows of its own.
        video: bf16 [t p d], one per frame of the record (t may be 0); None keeps the pictures.
        audio: bf16 [w k d], one per window of the record (w may be 0); None keeps the sound.
    """
    changed = dict(record)
    if video is not None:
        changed |= {"frames": [], FIELDS["video"]: _pack(video, len(record["frames"]))}
    if audio is not None:
        windows = [{"span": window["span"]} for window in record["windows"]]
        changed |= {"windows": windows, FIELDS["audio"]: _pack(audio, len(windows))}
    return msgpack.packb(changed, use_bin_type=True)


def _pack(features: np.ndarray, count: int) -> dict[str, Any]:
    if features.dtype != FEATURE_DTYPE or features.ndim != 3 or len(features) != count:
        raise ValueError(
            f"features are {features.dtype}{list(features.shape)}, expected bfloat16[{count}, ., .]"
        )
    # A view: tobytes would copy 26 MB of a video once more.
    return {
        "shape": list(features.shape),
        "data": np.ascontiguousarray(features).reshape(-1).view(np.uint8).data,
    }


def features_in(record: Mapping[str, Any], modality: str) -> np.ndarray | None:
    """bf16 features of "video" or "audio" that a record's map holds, a view and no copy; None if it has the media.

    Raises:
        ValueError: shape and bytes do not fit each other.
    """
    packed = record.get(FIELDS[modality])
    return None if packed is None else np.frombuffer(packed["data"], FEATURE_DTYPE).reshape(packed["shape"])


def feature_shapes(manifest: Mapping[str, Any]) -> FeatureShapes:
    """What the records of a manifest hold as features; nothing for a folder of pictures and samples.

    Raises:
        UserError: the section "features" is damaged.
    """
    try:
        sections = {
            name: manifest["features"][name] for name in FIELDS if name in manifest.get("features", {})
        }
        shapes = {name: tuple(map(int, section["shape"])) for name, section in sections.items()}
        if any(len(shape) != 2 for shape in shapes.values()):
            raise ValueError(f"shapes {shapes}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the section 'features' of manifest.json is damaged ({error}); run `avlm cache-features` again"
        ) from None
    return FeatureShapes(**shapes)


@functools.cache
def keep_large_buffers() -> None:
    """Lets this process's allocator keep freed buffers of up to 64 MB for the next record instead of unmapping them.

    A record of 26 MB passes through three such buffers, each of which the kernel would else hand out anew, page by
    page: that is two thirds of the time of reading it. All threads share one arena (M_ARENA_MAX): a buffer that one of
    them has freed is there for the next, whichever thread that is, which saves a third of the page faults that are left.
    Without glibc nothing is changed but the speed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ALLOCATOR.items():
            mallopt(parameter, value)
