"""One sample of a record becomes one unbatched row of the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from input_pipeline.conversation import (
    ChatMLTemplate,
    DoesNotFit,
    EncodedText,
    Template,
    TokenPlan,
    encode_conversation,
    encode_prompt,
)
from input_pipeline.spec import PIXELS, FeatureShapes, MediaSpec
from input_pipeline.transforms.intervals import interval_source, parse_intervals
from input_pipeline.transforms.media import decode_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of each modality; its first or its second key is there, the second if features stand in for the first.
VIDEO_KEYS = ("frames", "frame_features", "frame_times", "frame_mask")
AUDIO_KEYS = ("audio", "audio_features", "audio_spans", "audio_mask")
MEDIA_KEYS = (*VIDEO_KEYS, *AUDIO_KEYS, "duration")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        arrays: the arrays of `Batch` without their first axis.
        sample: the sample's own fields (id, task, conversations, ...); None for a padding row.
        plan: what the sample asks of the model; None for a padding row.
        dropped_rounds: dialogue rounds that did not fit.
        dropped_questions: questions whose text the template leaves out.
    """

    arrays: dict[str, np.ndarray]
    sample: dict[str, Any] | None
    plan: TokenPlan | None
    dropped_rounds: int = 0
    dropped_questions: int = 0


@dataclasses.dataclass(frozen=True)
class SampleBuilder:
    """(record, number of the sample within it) -> Row.

    Attributes:
        spec: shapes of the media.
        tokenizer: of the language model, see `load_tokenizer`.
        media_token_id: see `find_media_token_id`.
        num_media_tokens: n, length of the run of media tokens; the model fills exactly so many.
        max_length: l, text length of the batch.
        modalities: what is shown: "video" and/or "audio". The other is masked; it is not even decoded.
        prompt: False encodes whole conversations for training; True leaves the last answer open, for
            generation.
        template: chat template.
        system: system text instead of the template's.
        features: what comes as features of its encoder; records and padding rows alike.
    """

    spec: MediaSpec
    tokenizer: PreTrainedTokenizerFast
    media_token_id: int
    num_media_tokens: int
    max_length: int
    modalities: tuple[str, ...] = ("video", "audio")
    prompt: bool = False
    template: Template = ChatMLTemplate()
    system: str | None = None
    features: FeatureShapes = PIXELS

    def __call__(self, record: bytes | Mapping[str, Any], index: int) -> Row:
        """The row of sample `index` of a record, given as stored or as `decode_record` returns it.

        Raises:
            UserError: the sample is malformed, names too many times or does not fit; the message names its
                id.
        """
        if isinstance(record, bytes):
            shown = self.modalities
            record = decode_record(record, self.spec, frames="video" in shown, audio="audio" in shown)
        return self.build(record, record["samples"][index])

    def build(self, media: Mapping[str, Any], sample: Mapping[str, Any]) -> Row:
        """The row of media and text from any source.

        Args:
            media: padded arrays frames, frame_times, frame_mask, audio, audio_spans, audio_mask, duration, as
                `decode_record` and `pad_media` return them; frame_features and audio_features may stand in.
            sample: {"id": str, "conversations": [{"from": ..., "value": ...}, ...], ...}.
        """
        sample_id = sample.get("id", "")
        arrays: dict[str, Any] = {key: np.asarray(media[key]) for key in MEDIA_KEYS if key in media}
        if "video" not in self.modalities:
            _mask(arrays, VIDEO_KEYS)
        if "audio" not in self.modalities:
            _mask(arrays, AUDIO_KEYS)
        frames, windows = int(arrays["frame_mask"].sum()), int(arrays["audio_mask"].sum())
        try:
            text = self.encode(sample)
        except DoesNotFit as error:
            spans = self.intervals(sample, float(arrays["duration"]))
            plan = dataclasses.replace(
                error.plan, frames=frames, audio_windows=windows, time_tokens=2 * len(spans)
            )
            raise DoesNotFit(sample_id, plan) from None
        spans = self.intervals(sample, float(arrays["duration"]), rounds=text.rounds)
        plan = TokenPlan(
            frames,
            windows,
            2 * len(spans),
            self.num_media_tokens,
            len(text.tokens) - self.num_media_tokens,
            self.max_length,
        )
        arrays |= self._interval_arrays(spans) | self._text_arrays(text)
        return Row(arrays, dict(sample), plan, text.dropped_rounds, text.dropped_questions)

    def intervals(
        self, sample: Mapping[str, Any], duration: float, rounds: int | None = None
    ) -> list[tuple[float, float]]:
        """Times named by the sample's questions, in order; the whole media (0, duration) if none are.

        Args:
            sample: its conversations are read, answers and options are not.
            duration: seconds; 0 for an image, whose interval is (0, 0).
            rounds: only so many first questions.
        """
        questions = [turn["value"] for turn in sample["conversations"] if turn["from"] in ("human", "user")]
        stems = "\n".join(interval_source(question) for question in questions[:rounds])
        spans = parse_intervals(stems, duration, self.spec.max_intervals, sample.get("id", ""))
        return spans or [(0.0, duration)]

    def padding_row(self) -> Row:
        """A row of which nothing is valid: every mask False, every segment id 0."""
        shapes = self.spec.batch_shapes(1, self.max_length, features=self.features)
        arrays = {key: np.zeros(shape[1:], dtype) for key, (shape, dtype) in shapes.items()}
        arrays["tokens"] += self.padding_id
        return Row(arrays, None, None)

    @property
    def padding_id(self) -> int:
        """Token of positions that nobody looks at."""
        return self.tokenizer.pad_token_id or 0

    def encode(self, sample: Mapping[str, Any]) -> EncodedText:
        """Ids of a sample's conversation (its prompt, if `prompt`); its media are not needed."""
        encode = encode_prompt if self.prompt else encode_conversation
        return encode(
            self.tokenizer,
            sample["conversations"],
            num_media_tokens=self.num_media_tokens,
            media_token_id=self.media_token_id,
            max_length=self.max_length,
            template=self.template,
            system=self.system,
            sample_id=sample.get("id", ""),
        )

    def _interval_arrays(self, spans: list[tuple[float, float]]) -> dict[str, np.ndarray]:
        intervals = np.zeros((self.spec.max_intervals, 2), np.float32)
        intervals[: len(spans)] = spans
        return {"intervals": intervals, "interval_mask": np.arange(self.spec.max_intervals) < len(spans)}

    def _text_arrays(self, text: EncodedText) -> dict[str, np.ndarray]:
        length = len(text.tokens)
        valid = np.arange(self.max_length) < length
        tokens = np.full(self.max_length, self.padding_id, np.int32)
        tokens[:length] = text.tokens
        loss_mask = np.zeros(self.max_length, np.bool_)
        loss_mask[:length] = text.loss_mask
        positions = np.where(valid, np.arange(self.max_length), 0).astype(np.int32)
        return {
            "tokens": tokens,
            "loss_mask": loss_mask,
            "positions": positions,
            "segment_ids": valid.astype(np.int32),
        }


def _mask(arrays: dict[str, np.ndarray], keys: tuple[str, ...]) -> None:
    for key in arrays.keys() & set(keys):
        arrays[key] = np.zeros_like(arrays[key])
