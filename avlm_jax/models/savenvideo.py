"""SAVEnVideo: SigLIP and BEATs, Temporal Linear Projection, AVTS resampler, Qwen2 with LoRA (SAVEn-Vid paper, section 4).

Composition only. Parameter paths: vision/..., audio/..., connector/{visual_mlp,audio_mlp,tlp,resampler}/..., llm/...
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, UInt8
from ml_collections import ConfigDict

from avlm_jax import flops
from avlm_jax.config import ConfigError, to_dataclass
from avlm_jax.connectors import avts as avts_lib
from avlm_jax.connectors.avts import AvtsConfig, Perceptron, Resampler, Tokens
from avlm_jax.connectors.time import TemporalLinearProjection, TimeConfig, time_tokens
from avlm_jax.encoders.beats import BeatsConfig, BeatsEncoder, token_mask
from avlm_jax.encoders.frozen import encode_present
from avlm_jax.encoders.siglip import SiglipConfig, SiglipEncoder
from avlm_jax.flops import Segment
from avlm_jax.layers.fbank import beats_normalize, kaldi_fbank
from avlm_jax.llm.decoder import Decoder, DecoderConfig
from avlm_jax.models.api import EncoderSpec, MediaTokens, System
from avlm_jax.sharding import constrain
from input_pipeline.spec import FBANK_FRAME_LENGTH, FBANK_FRAME_SHIFT, SAMPLE_RATE, MediaSpec


def valid_samples(spans: Float[Array, "... 2"], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """How many samples of an audio window are sound, not padding: its span says so; 0 where masked."""
    return jnp.where(mask, jnp.round((spans[..., 1] - spans[..., 0]) * SAMPLE_RATE), 0.0)


def valid_fbank_frames(samples: Float[Array, " n"], num_frames: int) -> Bool[Array, "n f"]:
    """Which filterbank frames lie wholly in so many first samples, as the filterbank counts.

    The tolerance of half a hop is what fp32 seconds can be off by two hours into a film.
    """
    count = jnp.floor((samples + 8 - FBANK_FRAME_LENGTH) / FBANK_FRAME_SHIFT) + 1
    return jnp.arange(num_frames)[None] < count[:, None]


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
        embeddings, mask = self.resampler(visual, audio, time, batch["duration"])
        return MediaTokens(constrain(embeddings, "batch"), constrain(mask, "batch"))


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
    def heads(self) -> dict[str, int]:
        heads = {
            "model.llm.num_heads": self.llm_config.num_heads,
            "model.llm.num_kv_heads": self.llm_config.num_kv_heads,
        }
        if self.avts_config.resampler == "avts" and self.avts_config.attention == "mha":
            heads["model.avts.num_heads"] = self.avts_config.num_heads
        return heads

    @property
    def num_media_tokens(self) -> int:
        """n: how often the placeholder stands in a prompt with media."""
        return avts_lib.num_media_tokens(self.avts_config, self.num_key_tokens)

    @property
    def num_key_tokens(self) -> tuple[int, int, int]:
        """Visual, audio and time tokens that the resampler reads of one clip."""
        rows, spec = self.audio_config.mel_rows, self.spec
        time = {"query": 2 * spec.max_intervals, "frames": spec.num_frames}
        time["both"] = time["query"] + time["frames"]
        return avts_lib.num_key_tokens(
            self.avts_config,
            frames=spec.num_frames,
            grid=self.vision_config.grid,
            windows=spec.max_windows,
            steps=self.audio_config.num_tokens(spec.window_frames) // rows,
            rows=rows,
            time_tokens=time[self.time_config.source],
        )

    @property
    def encoders(self) -> dict[str, EncoderSpec]:
        vision, audio = self.vision_config, self.audio_config
        tokens = audio.num_tokens(self.spec.window_frames)
        return {
            "video": EncoderSpec("vision", (vision.num_patches, vision.width), vision),
            "audio": EncoderSpec("audio", (tokens, audio.width), audio),
        }

    def media_work(self, clips: int, *, video: str, audio: str) -> list[Segment]:
        spec, vision, sound = self.spec, self.vision_config, self.audio_config
        work = []
        if video == "pixels":
            work.append(flops.siglip_work(vision, clips * spec.num_frames))
        if audio == "samples":
            work.append(flops.beats_work(sound, clips * spec.max_windows, spec.window_frames))
        widths = vision.width, sound.width, self.connector_width, self.llm_config.width
        return work + flops.avts_work(self.avts_config, self.time_config, clips, self.num_key_tokens, widths)

    def media_tokens(self, batch: dict[str, Array]) -> MediaTokens:
        frames, windows = self.encoded(batch)
        return self.connector(self.visual_tokens(frames, batch), self.audio_tokens(windows, batch), batch)

    def encoded(self, batch: dict[str, Array]) -> tuple[Float[Array, "b t p d"], Float[Array, "b w k e"]]:
        """The encoders' features of all frames and windows: cached ones of the batch, or computed here.

        The one place that decides; whatever follows cannot tell. Cached features are bf16 and go on in the encoder's own
        dtype.
        """
        if self.is_initializing():  # The parameter tree never depends on what a batch holds.
            shapes = self.spec.batch_shapes(batch["duration"].shape[0], 1)
            media = {key: jnp.zeros(*shapes[key]) for key in ("frames", "audio")}
            batch = media | {key: value for key, value in batch.items() if not key.endswith("_features")}
        if "frame_features" in batch:
            frames = batch["frame_features"].astype(self.vision_config.dtype)
        else:
            how = {"encode": SaveNVideo.encode_frames, "chunk": self.vision_config.chunk}
            frames = encode_present(self, batch["frame_mask"], batch["frames"], **how)
        if "audio_features" in batch:
            windows = batch["audio_features"].astype(self.audio_config.dtype)
        else:
            how = {"encode": SaveNVideo.encode_audio, "chunk": self.audio_config.chunk}
            audio, spans, mask = batch["audio"], batch["audio_spans"], batch["audio_mask"]
            windows = encode_present(self, mask, audio, spans, mask, **how)
        return constrain(frames, "batch"), constrain(windows, "batch")

    def encode_frames(self, frames: UInt8[Array, "n h w 3"]) -> Float[Array, "n p d"]:
        return self.vision(frames)

    def encode_audio(
        self, audio: Float[Array, "n s"], spans: Float[Array, "n 2"], mask: Bool[Array, " n"]
    ) -> Float[Array, "n k e"]:
        samples = valid_samples(spans, mask)
        audio = jnp.where(jnp.arange(audio.shape[-1])[None] < samples[:, None], audio, 0.0)
        fbank = beats_normalize(kaldi_fbank(audio))
        return self.audio(fbank, valid_fbank_frames(samples, fbank.shape[1]))[0]

    def visual_tokens(self, features: Float[Array, "b t p d"], batch: dict[str, Array]) -> Tokens:
        """SigLIP's patch features of all frames, pooled; every patch carries its frame's time."""
        b, t = features.shape[:2]
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

    def audio_tokens(self, features: Float[Array, "b w k e"], batch: dict[str, Array]) -> Tokens:
        """BEATs' features of all windows, pooled; a token's time is the middle of its 160 ms."""
        spans = batch["audio_spans"]
        b, w = features.shape[:2]
        samples = valid_samples(spans, batch["audio_mask"]).reshape(b * w)
        mask = token_mask(valid_fbank_frames(samples, self.spec.window_frames), self.audio_config)
        rows = self.audio_config.mel_rows
        steps = features.shape[2] // rows
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
