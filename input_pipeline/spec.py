"""The glossary: every array that crosses from the input pipeline to a model, with shape, dtype and unit.

Letters used in shapes everywhere in this project: b batch (rows of text), c clips (media of the batch; c = b
unless rows are packed with k clips each, then c = b * k and row r has the clips r * k .. r * k + k - 1), t
frames, w audio windows, s samples per window, i intervals, l text length, n media tokens, d width;
of cached features p tokens per frame, k tokens per window.
"""

from __future__ import annotations

import dataclasses
from typing import TypedDict

import ml_dtypes
import numpy as np

SAMPLE_RATE = 16_000  # Hz; BEATs and every other audio encoder of the four papers but CLAP read 16 kHz mono.
FBANK_FRAME_LENGTH = 400  # samples = 25 ms, Kaldi's default and BEATs' (microsoft/unilm:beats/BEATs.py).
FBANK_FRAME_SHIFT = 160  # samples = 10 ms, same source.


class Batch(TypedDict, total=False):
    """One process's share of a global batch. Static shapes; a missing modality is a mask that is False.

    `frame_features` stands in for `frames`, `audio_features` for `audio`, when records of features are read.
    """

    frames: np.ndarray  # uint8 [c t h w 3], RGB
    frame_features: np.ndarray  # bf16 [c t p d], what the picture encoder gives for `frames`
    frame_times: np.ndarray  # f32 [c t], seconds from the start of the media
    frame_mask: np.ndarray  # bool [c t]
    audio: np.ndarray  # f32 [c w s], 16 kHz mono in [-1, 1]
    audio_features: np.ndarray  # bf16 [c w k d], what the sound encoder gives for `audio`
    audio_spans: (
        np.ndarray
    )  # f32 [c w 2], seconds; end - start = valid audio of the window, the rest is padding
    audio_mask: np.ndarray  # bool [c w]
    intervals: np.ndarray  # f32 [c i 2], seconds: the times the question names, or [0, duration]
    interval_mask: np.ndarray  # bool [c i]
    duration: np.ndarray  # f32 [c], seconds
    tokens: np.ndarray  # i32 [b l], right-padded; media tokens are a run of one reserved id
    loss_mask: np.ndarray  # bool [b l]; True at j: token j is a target, predicted from position j - 1
    positions: np.ndarray  # i32 [b l], counted from 0 within a segment
    segment_ids: np.ndarray  # i32 [b l], 0 = padding, 1.. = sequences packed into the row


# Arrays with one entry per row of text; all others have one per clip.
TEXT_KEYS = ("tokens", "loss_mask", "positions", "segment_ids")

FEATURE_DTYPE = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class FeatureShapes:
    """Which media come as features of their encoders instead of as pixels and samples, and in which shapes.

    Attributes:
        video: (p, d) of a frame's features, bf16; None: frames come as pixels.
        audio: (k, d) of a window's features, bf16; None: windows come as samples.
    """

    video: tuple[int, int] | None = None
    audio: tuple[int, int] | None = None

    def __str__(self) -> str:
        named = {"video": self.video, "audio": self.audio}
        told = [f"{name} features {list(shape)}" for name, shape in named.items() if shape]
        return ", ".join(told) or "pixels and samples"


PIXELS = FeatureShapes()  # No features: pixels and samples.


@dataclasses.dataclass(frozen=True)
class MediaSpec:
    """How media become arrays. Records are prepared for one MediaSpec and say so in their manifest.

    Attributes:
        num_frames: t, frames per video, uniformly sampled (SAVEn-Vid paper: 16).
        image_size: h = w in pixels; pictures are resized straight to a square as SigLIP does.
        sampler: "midpoint" (middle of each of t equal segments) or "linspace" (end points included).
        window_frames: filterbank frames per audio window; 1024 = 10.24 s, BEATs' pre-training length.
        max_windows: w.
        max_intervals: i.
    """

    num_frames: int = 16
    image_size: int = 384
    sampler: str = "midpoint"
    window_frames: int = 1024
    max_windows: int = 16
    max_intervals: int = 8

    def __post_init__(self) -> None:
        if self.sampler not in ("midpoint", "linspace"):
            raise ValueError(f"media.sampler is {self.sampler!r}; use 'midpoint' or 'linspace'")
        for name in ("num_frames", "image_size", "window_frames", "max_windows", "max_intervals"):
            if getattr(self, name) < 1:
                raise ValueError(f"media.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def window_samples(self) -> int:
        """s: exactly the samples that give `window_frames` filterbank frames with Kaldi's snip_edges."""
        return FBANK_FRAME_LENGTH + FBANK_FRAME_SHIFT * (self.window_frames - 1)

    @property
    def window_hop(self) -> int:
        """Samples between the starts of contiguous windows: their filterbank frames join without a seam."""
        return FBANK_FRAME_SHIFT * self.window_frames

    def batch_shapes(
        self, batch_size: int, length: int, *, clips_per_row: int = 1, features: FeatureShapes = PIXELS
    ) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every array of a batch of `batch_size` rows of `length` text positions."""
        b, t, h, w, i = batch_size, self.num_frames, self.image_size, self.max_windows, self.max_intervals
        c = b * clips_per_row
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "frames": ((c, t, h, h, 3), np.uint8),
            "frame_times": ((c, t), np.float32),
            "frame_mask": ((c, t), np.bool_),
            "audio": ((c, w, self.window_samples), np.float32),
            "audio_spans": ((c, w, 2), np.float32),
            "audio_mask": ((c, w), np.bool_),
            "intervals": ((c, i, 2), np.float32),
            "interval_mask": ((c, i), np.bool_),
            "duration": ((c,), np.float32),
            "tokens": ((b, length), np.int32),
            "loss_mask": ((b, length), np.bool_),
            "positions": ((b, length), np.int32),
            "segment_ids": ((b, length), np.int32),
        }
        if features.video:
            del shapes["frames"]
            shapes["frame_features"] = ((c, t, *features.video), FEATURE_DTYPE)
        if features.audio:
            del shapes["audio"]
            shapes["audio_features"] = ((c, w, *features.audio), FEATURE_DTYPE)
        return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}


def check_batch(
    batch: Batch,
    spec: MediaSpec,
    batch_size: int,
    length: int,
    *,
    clips_per_row: int = 1,
    features: FeatureShapes = PIXELS,
) -> None:
    """Raises ValueError naming the key, what it should be and what it is, if `batch` is not of `spec`."""
    expected = spec.batch_shapes(batch_size, length, clips_per_row=clips_per_row, features=features)
    for key in sorted(expected.keys() | batch.keys()):
        if key not in batch:
            raise ValueError(f"batch lacks {key!r}; a missing modality is a False mask, not a missing key")
        if key not in expected:
            raise ValueError(f"batch has an unknown key {key!r}; known: {', '.join(sorted(expected))}")
        shape, dtype = expected[key]
        value = batch[key]
        if value.shape != shape or value.dtype != dtype:
            raise ValueError(
                f"batch[{key!r}] is {value.dtype}{list(value.shape)}, expected {dtype}{list(shape)}"
            )
