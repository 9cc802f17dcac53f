"""SAVEnVideo: SigLIP and BEATs, Temporal Linear Projection, AVTS resampler, Qwen2 with LoRA (SAVEn-Vid paper, section 4).

Composition only. Parameter paths: vision/..., audio/..., connector/{visual_mlp,audio_mlp,tlp,resampler}/..., llm/...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array
from ml_collections import ConfigDict

from avlm_jax.config import ConfigError, to_dataclass
from avlm_jax.connectors import avts as avts_lib
from avlm_jax.connectors.avts import AvtsConfig, Perceptron, Resampler, Tokens
from avlm_jax.connectors.time import TemporalLinearProjection, TimeConfig, time_tokens
from avlm_jax.encoders.beats import BeatsConfig, BeatsEncoder
from avlm_jax.encoders.siglip import SiglipConfig, SiglipEncoder
from avlm_jax.layers.fbank import beats_normalize, kaldi_fbank
from avlm_jax.llm.decoder import Decoder, DecoderConfig
from avlm_jax.models.api import MediaTokens, System
from input_pipeline.spec import FBANK_FRAME_LENGTH, FBANK_FRAME_SHIFT, SAMPLE_RATE, MediaSpec


class Connector(nn.Module):
    """Everything between the frozen encoders and the language model; the part that alignment trains."""

    avts: AvtsConfig
    time: TimeConfig
    llm_width: int
    frames: int

    def setup(self) -> None:
        width = self.avts.d_model or self.llm_width
        self.visual_mlp = Perceptron(width, self.avts.dtype)
        self.audio_mlp = Perceptron(width, self.avts.dtype)
        self.tlp = TemporalLinearProjection(self.time, width)
        self.resampler = Resampler(self.avts, width, self.llm_width, self.frames)

    def __call__(self, visual: Tokens, audio: Tokens, batch: dict[str, Array]) -> MediaTokens:
        seconds, spans, mask = time_tokens(batch, self.time.source)
        time = Tokens(self.tlp(seconds, batch["duration"]), seconds, mask, spans=spans)
        visual = dataclasses.replace(visual, features=self.visual_mlp(visual.features))
        audio = dataclasses.replace(audio, features=self.audio_mlp(audio.features))
        return MediaTokens(*self.resampler(visual, audio, time, batch["duration"]))


class SaveNVideo(System):
    """See `avlm_jax.models.api.System` for what every system offers.

    Attributes:
        spec: shapes of the media; the *_config fields are the parts' own.
    """

    spec: MediaSpec
    vision_config: SiglipConfig
    audio_config: BeatsConfig
    time_config: TimeConfig
    avts_config: AvtsConfig
    llm_config: DecoderConfig

    def setup(self) -> None:
        self.vision = SiglipEncoder(self.vision_config)
        self.audio = BeatsEncoder(self.audio_config)
        self.connector = Connector(
            self.avts_config, self.time_config, self.llm_config.width, self.spec.num_frames
        )
        self.llm = Decoder(self.llm_config)

    @property
    def connector_width(self) -> int:
        return self.avts_config.d_model or self.llm_config.width

    @property
    def num_media_tokens(self) -> int:
        """n: how often the placeholder stands in a prompt with media."""
        rows = self.audio_config.mel_rows
        time = {"query": 2 * self.spec.max_intervals, "frames": self.spec.num_frames}
        time["both"] = time["query"] + time["frames"]
        return avts_lib.num_media_tokens(
            self.avts_config,
            frames=self.spec.num_frames,
            grid=self.vision_config.grid,
            windows=self.spec.max_windows,
            steps=self.audio_config.num_tokens(self.spec.window_frames) // rows,
            rows=rows,
            time_tokens=time[self.time_config.source],
        )

    def media_tokens(self, batch: dict[str, Array]) -> MediaTokens:
        return self.connector(self.visual_tokens(batch), self.audio_tokens(batch), batch)

    def _where_any(self, mask: Array, encode: Callable[..., Any], *inputs: Array) -> Any:
        """encode(self, *inputs), or zeros in its place without any computation if the whole batch lacks the modality.

        Stage 1a shows no sound and its encoder is a third of a step; masks keep the zeros from being read as silence.
        """
        if self.is_initializing():
            return encode(self, *inputs)
        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda *x: encode(self, *x), *inputs)
        )
        return nn.cond(jnp.any(mask), encode, lambda model, *_: empty, self, *inputs)

    def visual_tokens(self, batch: dict[str, Array]) -> Tokens:
        """SigLIP's patch features of all frames; every patch carries its frame's time."""
        frames = batch["frames"]
        b, t = frames.shape[:2]
        flat = frames.reshape(b * t, *frames.shape[2:])
        features = self._where_any(batch["frame_mask"], lambda model, x: model.vision(x), flat)
        features = features.reshape(b, t, *features.shape[1:])
        pool = self.avts_config.visual_pool
        features = avts_lib.pool_patches(features, self.vision_config.grid, pool)
        grid = avts_lib.pooled_grid(self.vision_config.grid, pool)
        patches = grid * grid
        return Tokens(
            features.reshape(b, t * patches, -1),
            jnp.repeat(batch["frame_times"], patches, axis=1),
            jnp.repeat(batch["frame_mask"], patches, axis=1),
            jnp.tile(avts_lib.patch_places(grid, self.connector_width), (t, 1)),
        )

    def audio_tokens(self, batch: dict[str, Array]) -> Tokens:
        """BEATs' features of all windows; a token's time is the middle of its 160 ms."""
        audio, spans = batch["audio"], batch["audio_spans"]
        b, w, _ = audio.shape
        # Samples that are sound, not padding; of these whole frames, as the filterbank counts. The tolerance is what fp32
        # seconds can be off by two hours into a film.
        samples = jnp.where(
            batch["audio_mask"], jnp.round((spans[..., 1] - spans[..., 0]) * SAMPLE_RATE), 0.0
        )
        audio = jnp.where(jnp.arange(audio.shape[-1])[None, None] < samples[..., None], audio, 0.0)
        frames = jnp.floor((samples + 8 - FBANK_FRAME_LENGTH) / FBANK_FRAME_SHIFT) + 1
        frames = frames.reshape(b * w)

        def encode(model: SaveNVideo, audio: Array, frames: Array) -> tuple[Array, Array]:
            fbank = beats_normalize(kaldi_fbank(audio))
            return model.audio(fbank, jnp.arange(fbank.shape[1])[None] < frames[:, None])

        features, mask = self._where_any(batch["audio_mask"], encode, audio.reshape(b * w, -1), frames)
        rows = self.audio_config.mel_rows
        steps = features.shape[1] // rows
        step_seconds = self.audio_config.patch_size * FBANK_FRAME_SHIFT / SAMPLE_RATE
        seconds = spans[..., :1] + (jnp.arange(steps)[None, None] + 0.5) * step_seconds
        pool = self.avts_config.freq_pool
        features, mask, seconds = avts_lib.pool_audio(
            features.reshape(b, w, steps, rows, -1), mask.reshape(b, w, steps, rows), seconds, pool
        )
        places = (
            jnp.tile(avts_lib.mel_places(rows, self.connector_width), (w * steps, 1))
            if pool == "none"
            else None
        )
        return Tokens(features, seconds, mask, places)


def build(config: ConfigDict, media_token_id: int) -> SaveNVideo:
    """The system of a configuration with the sections media and model.{vision,audio,time,avts,llm}.

    Raises:
        ConfigError: sections that do not fit each other; see also `to_dataclass`.
    """
    model = config.model
    system = SaveNVideo(
        media_token_id=media_token_id,
        spec=to_dataclass(MediaSpec, config.media, "media"),
        vision_config=to_dataclass(SiglipConfig, model.vision, "model.vision"),
        audio_config=to_dataclass(BeatsConfig, model.audio, "model.audio"),
        time_config=to_dataclass(TimeConfig, model.time, "model.time"),
        avts_config=to_dataclass(AvtsConfig, model.avts, "model.avts"),
        llm_config=to_dataclass(DecoderConfig, model.llm, "model.llm"),
    )
    if system.spec.image_size != system.vision_config.image_size:
        raise ConfigError(
            f"media.image_size is {system.spec.image_size} but model.vision.image_size is "
            f"{system.vision_config.image_size}; records are prepared at the encoder's size"
        )
    return system
