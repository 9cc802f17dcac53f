"""A tiny SigLIP that can see the synthetic stage and a tiny BEATs that can hear it.

SigLIP is trained with its own loss, a sigmoid per (image, text) pair, the texts being the words of the scene; BEATs with a
predictor per token, as its fine-tuned checkpoints have. Both losses also reach the features that are handed on (the patch
tokens of the last layer but one, the audio time steps), which is where a resampler will read them.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from PIL import Image

from avlm_jax.encoders.beats import BeatsClassifier, BeatsConfig, BeatsEncoder
from avlm_jax.encoders.siglip import SiglipConfig, SiglipEncoder, SiglipPooledModel
from avlm_jax.layers.fbank import beats_normalize, kaldi_fbank
from input_pipeline.spec import FBANK_FRAME_LENGTH, FBANK_FRAME_SHIFT, SAMPLE_RATE
from input_pipeline.synthetic.render import render_frame
from input_pipeline.synthetic.scene import COLORS, MOTIONS, SHAPES, SOUNDS, Event, make_scene
from input_pipeline.synthetic.sounds import synthesize

VISUAL_WORDS = (*COLORS, *SHAPES, *MOTIONS)
RENDER_SIZE = 96  # Pixels of the generated videos, see synthetic/generate.py.


@dataclasses.dataclass(frozen=True)
class PerceptionRecipe:
    """How an encoder is trained; what made the shipped ones is `make.Recipes`."""

    seed: int = 0
    steps: int = 1500
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 100


def visual_batch(rng: np.random.Generator, size: int, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [n h w 3], labels bool [n words]): frames of random scenes behind a JPEG codec of random quality."""
    images = np.empty((size, image_size, image_size, 3), np.uint8)
    labels = np.zeros((size, len(VISUAL_WORDS)), bool)
    row = 0
    while row < size:
        scene = make_scene(int(rng.integers(2**31)))
        for moment in rng.uniform(0, scene.duration, size=min(4, size - row)):
            picture = Image.fromarray(render_frame(scene, float(moment), RENDER_SIZE))
            coded = io.BytesIO()
            picture.resize((image_size, image_size), Image.Resampling.BICUBIC).save(
                coded, "JPEG", quality=int(rng.integers(50, 96))
            )
            images[row] = np.asarray(Image.open(coded))
            event = scene.seen_at(float(moment))
            if event is not None and event.figure is not None:
                for word in (event.figure.color, event.figure.shape, str(event.motion)):
                    labels[row, VISUAL_WORDS.index(word)] = True
            row += 1
    return images, labels


def audio_batch(rng: np.random.Generator, size: int, window_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(waveforms f32 [n s], labels bool [n steps sounds]): windows of random scenes, loud and soft; a step is 160 ms."""
    samples = FBANK_FRAME_LENGTH + FBANK_FRAME_SHIFT * (window_frames - 1)
    steps = window_frames // 16
    waves = np.empty((size, samples), np.float32)
    labels = np.zeros((size, steps, len(SOUNDS)), bool)
    row = 0
    while row < size:
        scene = make_scene(int(rng.integers(2**31)), shortest=8.0, longest=30.0)
        track = synthesize(scene)
        for _ in range(min(8, size - row)):
            begin = int(rng.integers(len(track) - samples))
            gain = 10 ** (rng.uniform(-10, 6) / 20)
            waves[row] = np.clip(track[begin : begin + samples] * gain, -1, 1)
            for step in range(steps):
                event: Event | None = scene.heard_at(begin / SAMPLE_RATE + (step + 0.5) * 0.16)
                if event is not None and event.sound is not None:
                    labels[row, step, SOUNDS.index(event.sound)] = True
            row += 1
    return waves, labels


def fit(
    recipe: PerceptionRecipe,
    params: dict,
    batch_at: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
    loss_fn: Callable[[dict, Array, Array], tuple[Array, Array]],
    log: Callable[[dict], None],
    part: str,
    log_every: int = 50,
) -> dict:
    """Minimises `loss_fn(params, inputs, labels) -> (loss, accuracy)` with AdamW; returns the parameters.

    `log` gets a line of averages every `log_every` steps; step n's data are drawn from (seed, n).
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.lr, recipe.warmup, recipe.steps, recipe.lr * 0.02
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    @jax.jit
    def step(params, state, inputs, labels):
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, inputs, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, accuracy

    state = optimizer.init(params)
    begun = time.monotonic()
    recent: list[tuple[float, float]] = []
    for number in range(1, recipe.steps + 1):
        inputs, labels = batch_at(np.random.default_rng([recipe.seed, 0xE4C0, number]))
        params, state, loss, accuracy = step(params, state, inputs, labels)
        recent.append((float(loss), float(accuracy)))
        if number % log_every == 0 or number == recipe.steps:
            loss_mean, accuracy_mean = np.mean(recent, axis=0)
            log(
                {
                    "part": part,
                    "step": number,
                    "loss": round(float(loss_mean), 4),
                    "accuracy": round(float(accuracy_mean), 4),
                    "seconds": round(time.monotonic() - begun, 1),
                }
            )
            recent = []
    return params


def encoder_part(tower: dict, depth: int) -> dict:
    """The parameters of `SiglipEncoder` within those of `SiglipPooledModel`: the first `depth` layers, no head."""
    layers = jax.tree.map(lambda x: x[:depth], tower["layers"])
    return {"patch_embed": tower["patch_embed"], "pos_embed": tower["pos_embed"], "layers": layers}


def train_vision(recipe: PerceptionRecipe, config: SiglipConfig, log: Callable[[dict], None]) -> dict:
    """Parameters of `SiglipPooledModel`. The logged accuracy: share of pictures whose every word is told right."""
    tower, encoder = SiglipPooledModel(config), SiglipEncoder(config)
    key, words_key = jax.random.split(jax.random.key(recipe.seed))
    images = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.uint8)
    count = len(VISUAL_WORDS)
    params = {
        "tower": jax.jit(tower.init)(key, images)["params"],
        "words": 0.05 * jax.random.normal(words_key, (config.width, count)),  # The texts' embeddings.
        "scale": jnp.ones(()),
        "bias": jnp.zeros(()),
        "patch_words": jnp.zeros((config.width, count)),
        "patch_bias": jnp.zeros((count,)),
    }

    def loss_fn(params, images, labels):
        pooled = tower.apply({"params": params["tower"]}, images)
        logits = jnp.exp(params["scale"]) * pooled @ params["words"] + params["bias"]
        patches = encoder.apply({"params": encoder_part(params["tower"], config.feature_depth)}, images)
        tags = patches.mean(axis=1) @ params["patch_words"] + params["patch_bias"][None]
        # SigLIP's loss: a sigmoid per pair, here over all words of one image.
        loss = sum(optax.sigmoid_binary_cross_entropy(x, labels).sum(-1).mean() for x in (logits, tags))
        return loss, jnp.mean(jnp.all((tags > 0) == labels, axis=-1))

    draw = functools.partial(visual_batch, size=recipe.batch_size, image_size=config.image_size)
    return fit(recipe, params, draw, loss_fn, log, "vision")["tower"]


def train_audio(
    recipe: PerceptionRecipe, config: BeatsConfig, window_frames: int, log: Callable[[dict], None]
) -> dict:
    """Parameters of `BeatsClassifier`. The logged accuracy: share of 160-ms steps whose sound (or silence) is told right."""
    encoder = BeatsEncoder(config)
    fbank = jnp.zeros((1, window_frames, config.num_mel))
    valid = jnp.ones((1, window_frames), bool)
    classifier = BeatsClassifier(config, num_classes=len(SOUNDS))
    params = jax.jit(classifier.init)(jax.random.key(recipe.seed), fbank, valid)["params"]

    def loss_fn(params, waves, labels):
        fbank = beats_normalize(kaldi_fbank(waves))
        shared = {name: value for name, value in params.items() if name != "predictor"}
        features, _ = encoder.apply({"params": shared}, fbank, jnp.ones(fbank.shape[:2], bool))
        n, steps, _ = labels.shape
        features = features.reshape(n, steps, config.mel_rows, -1).mean(axis=2)
        logits = features @ params["predictor"]["kernel"] + params["predictor"]["bias"][None, None]
        loss = optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1).mean()
        return loss, jnp.mean(jnp.all((logits > 0) == labels, axis=-1))

    draw = functools.partial(audio_batch, size=recipe.batch_size, window_frames=window_frames)
    return fit(recipe, params, draw, loss_fn, log, "audio")
