"""Floating-point operations of one optimizer step, counted from the sizes of its matrix products.

XLA's own count is of no use for a scanned model (`cost_analysis()` counts the body of a scan once), so this is what every
figure of utilisation here rests on:

    MFU = model FLOPs / (seconds x chips x peak)           HFU = hardware FLOPs / (seconds x chips x peak)

A product [m k] x [k n] takes 2 m k n operations, and so does each of the two products of its gradient:

    forward         of everything that a step runs
    input_gradient  only where something that is trained lies in the same segment or before it: in stages 1a and 1b the whole
                    frozen language model passes gradients back to the media tokens, frozen encoders pass none
    weight_gradient only of trained kernels: with adapters on a frozen base a token costs 4 N operations, not 6 N
    recomputed      what rematerialisation runs a second time, see `KEPT`; the loss head always does, by chunks

    extra           what a leaner program would not run: frozen adapters (a stage that trains none still runs them, they could
                    be merged into their kernels), and the half of causal attention's square that the reference backend
                    computes and throws away

Model FLOPs are the first three, hardware FLOPs all five.

Counted are linear layers, adapters, attention's two products and BEATs' convolution, not norms, softmax, rotary positions,
the filterbank and the optimizer, nor what attention kernels compute twice inside of themselves. Causal attention counts as
half of the square (as in MaxText, docs/reference/performance_metrics.md), packed rows as if they were one sequence. Shapes
are static, so padded positions, frames and windows count; a modality that no row of a step has is skipped and does not, nor
does an encoder whose features were read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from avlm_jax.connectors.avts import AvtsConfig
    from avlm_jax.connectors.time import TimeConfig
    from avlm_jax.encoders.beats import BeatsConfig
    from avlm_jax.encoders.siglip import SiglipConfig
    from avlm_jax.llm.decoder import DecoderConfig
    from avlm_jax.models.api import System

PARTS = ("vision", "audio", "connector", "llm", "head")
Result = Literal["", "qkv", "attention", "output"]

# Results of a layer that need not be computed again, by the policy of model.llm.remat (`llm.remat`). A layer's output is
# what the next one keeps as its input.
KEPT: Mapping[str, tuple[Result, ...]] = {
    "full": ("output",),
    "minimal": ("output", "qkv", "attention"),
    "offload": ("output", "qkv", "attention"),
}


@dataclasses.dataclass(frozen=True)
class Matmul:
    """One product, or several alike, over all layers of its segment.

    Attributes:
        flops: of the forward product.
        path: of its kernel; empty for attention, a product of two activations, both of which may need a gradient.
        result: what it gives, where a remat policy asks; "" is something that none of them keeps.
        first: its input is the segment's input, which needs a gradient only if something before the segment is trained.
        run: how many times `flops` the backend really computes.
    """

    flops: float
    path: str = ""
    result: Result = ""
    first: bool = False
    run: float = 1.0


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of products through which a gradient flows either wholly or not at all.

    Attributes:
        prefix: of its parameters' paths.
        matmuls: its products.
        upstream: prefixes of the segments whose results it reads.
        remat: "none", or a key of `KEPT`.
    """

    prefix: str
    matmuls: tuple[Matmul, ...]
    upstream: tuple[str, ...] = ()
    remat: str = "none"

    @property
    def part(self) -> str:
        return "head" if self.prefix == HEAD else self.prefix.split("/")[0]


HEAD = "llm/head"  # The segment of the loss; where embeddings are tied its kernel lies elsewhere.


@dataclasses.dataclass(frozen=True)
class PartFlops:
    """Operations of one part of a system in a step; see the module's text."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    recomputed: float = 0.0
    extra: float = 0.0

    @property
    def model(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient

    @property
    def hardware(self) -> float:
        return self.model + self.recomputed + self.extra

    def __add__(self, other: PartFlops) -> PartFlops:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return PartFlops(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one optimizer step over all devices, by part (`PARTS`)."""

    parts: Mapping[str, PartFlops]

    @property
    def model(self) -> float:
        return sum(part.model for part in self.parts.values())

    @property
    def hardware(self) -> float:
        return sum(part.hardware for part in self.parts.values())

    def __str__(self) -> str:
        told = [f"{name} {part.hardware / 1e12:.3g}" for name, part in self.parts.items()]
        return f"{self.model / 1e12:.4g} TFLOP of the model, {self.hardware / 1e12:.4g} of the hardware ({', '.join(told)})"


def step_flops(
    system: System,
    trainable: Collection[str],
    *,
    rows: int,
    length: int,
    clips: int | None = None,
    video: Literal["pixels", "features", "none"] = "pixels",
    audio: Literal["samples", "features", "none"] = "samples",
    backend: Literal["reference", "cudnn", "splash"] = "splash",
) -> Flops:
    """Operations of one optimizer step, all micro-batches and devices together.

    Args:
        system: its configurations say the sizes, the adapters and the remat policy.
        trainable: paths of the trained parameters (`state.flatten(trainable)`, or its keys).
        rows: of text, in the global batch.
        length: text positions of a row, media included.
        clips: media of the batch; default one a row. 0: text alone, neither encoders nor connector run.
        video, audio: what the batch holds; "features" are cached ones, "none" means that no row has the modality.
        backend: that the language model's attention runs on.
    """
    clips = rows if clips is None else clips
    segments = [] if clips == 0 else list(system.media_work(clips, video=video, audio=audio))
    before = tuple(segment.prefix for segment in segments)
    segments += decoder_work(system.llm_config, rows, length, upstream=before, backend=backend)
    return count(segments, trainable)


def attention_kernel(backend: str, platform: str) -> str:
    """What attention runs on where a configuration says `backend` and the devices are "tpu", "gpu" or "cpu"."""
    return {"tpu": "splash", "gpu": "cudnn"}.get(platform, "reference") if backend == "auto" else backend


def count(segments: Sequence[Segment], trainable: Collection[str]) -> Flops:
    """Adds up a system's segments, which stand in the order of the forward pass."""
    parts = dict.fromkeys(PARTS, PartFlops())
    live: set[str] = set()
    for segment in segments:
        fed = not live.isdisjoint(segment.upstream)
        own = any(path.startswith(f"{segment.prefix}/") for path in trainable)
        if fed or own:
            live.add(segment.prefix)
        for matmul in segment.matmuls:
            parts[segment.part] += _of(matmul, segment, trainable, fed=fed, live=fed or own)
    return Flops(parts)


def _of(matmul: Matmul, segment: Segment, trainable: Collection[str], *, fed: bool, live: bool) -> PartFlops:
    flops, trained = matmul.flops, matmul.path in trainable
    adapter = matmul.path.endswith(("/lora_a", "/lora_b"))
    operands = 1 if matmul.path else 2
    into = operands * flops if live and (fed or not matmul.first) else 0.0
    weights = flops if trained else 0.0
    kept = segment.remat == "none" or (matmul.result and matmul.result in KEPT[segment.remat])
    if trained and matmul.path.endswith(
        "/lora_a"
    ):  # The gradient of its lora_b asks for it, whatever comes of that.
        kept = segment.remat == "none"
    # Where no gradient flows nothing is computed again.
    again = flops if live and not kept else 0.0
    total = flops + into + weights + again
    if adapter and not trained:
        return PartFlops(extra=total)
    return PartFlops(flops, into, weights, again, total * (matmul.run - 1.0))


def decoder_work(
    config: DecoderConfig, rows: int, length: int, *, upstream: tuple[str, ...] = (), backend: str = "splash"
) -> list[Segment]:
    """The language model's layers and its loss head."""
    tokens, c = rows * length, config
    q, kv = c.num_heads * c.dim_per_head, c.num_kv_heads * c.dim_per_head
    sizes = {
        "attn/q": (c.width, q),
        "attn/k": (c.width, kv),
        "attn/v": (c.width, kv),
        "attn/o": (q, c.width),
        "mlp/gate": (c.width, c.mlp_dim),
        "mlp/up": (c.width, c.mlp_dim),
        "mlp/down": (c.mlp_dim, c.width),
    }
    matmuls = []
    results = {"attn/q": "qkv", "attn/k": "qkv", "attn/v": "qkv", "mlp/down": "output"}
    for name, (k, n) in sizes.items():
        path, result = f"llm/layers/{name}", results.get(name, "")
        matmuls.append(Matmul(2.0 * c.depth * tokens * k * n, f"{path}/kernel", result))
        if c.lora.rank and name.split("/")[1] in c.lora.targets:
            for half, size in (("a", k), ("b", n)):
                flops = 2.0 * c.depth * tokens * c.lora.rank * size
                matmuls.append(Matmul(flops, f"{path}/lora_{half}", result))
    triangle = 2.0 * c.depth * rows * length * length * q
    # Of the backends splash alone gives its result a name by which it is kept.
    result, run = "attention" if backend == "splash" else "", 2.0 if backend == "reference" else 1.0
    matmuls.append(Matmul(triangle, result=result, run=run))
    embed = "llm/embed/embedding"
    head = Matmul(2.0 * tokens * c.width * c.vocab_size, embed if c.tie_embeddings else f"{HEAD}/kernel")
    return [
        Segment(
            "llm/embed", ()
        ),  # A row is looked up, which is no product, but its gradient passes all that follows.
        Segment("llm/layers", tuple(matmuls), (*upstream, "llm/embed"), c.remat),
        Segment("llm/norm", (), ("llm/layers",)),
        Segment(HEAD, (head,), ("llm/norm",), "full"),
    ]


def siglip_work(config: SiglipConfig, images: int) -> Segment:
    """The picture encoder, up to the layer whose features are taken."""
    c, tokens = config, images * config.num_patches
    patch = Matmul(2.0 * tokens * 3 * c.patch_size**2 * c.width, "vision/patch_embed/kernel", first=True)
    layers = _encoder_layers("vision", c.feature_depth, tokens, c.num_patches, c.width, c.mlp_dim)
    return Segment("vision", (patch, *layers))


def beats_work(config: BeatsConfig, windows: int, frames: int) -> Segment:
    """The sound encoder on windows of so many filterbank frames."""
    c = config
    per_window = c.num_tokens(frames)
    tokens = windows * per_window
    matmuls = [Matmul(2.0 * tokens * c.patch_size**2 * c.embed_dim, "audio/patch_embed/kernel", first=True)]
    if c.embed_dim != c.width:
        matmuls.append(Matmul(2.0 * tokens * c.embed_dim * c.width, "audio/proj/kernel"))
    convolution = 2.0 * tokens * c.conv_pos_kernel * (c.width // c.conv_pos_groups) * c.width
    matmuls.append(Matmul(convolution, "audio/pos_conv/v"))
    matmuls += _encoder_layers("audio", c.depth, tokens, per_window, c.width, c.mlp_dim)
    if c.gru_gate:
        matmuls.append(Matmul(2.0 * c.depth * tokens * c.width * 8, "audio/layers/attn/gate/kernel"))
    return Segment("audio", tuple(matmuls))


def _encoder_layers(
    part: str, depth: int, tokens: int, per_item: int, width: int, hidden: int
) -> list[Matmul]:
    square = 2.0 * depth * tokens * width * width
    matmuls = [Matmul(square, f"{part}/layers/attn/{name}/kernel") for name in "qkvo"]
    perceptron = 2.0 * depth * tokens * width * hidden
    matmuls += [Matmul(perceptron, f"{part}/layers/mlp/{name}/kernel") for name in ("fc1", "fc2")]
    return [*matmuls, Matmul(4.0 * depth * tokens * per_item * width)]


def avts_work(
    avts: AvtsConfig,
    time: TimeConfig,
    clips: int,
    keys: tuple[int, int, int],
    widths: tuple[int, int, int, int],
) -> list[Segment]:
    """SAVEnVideo's connector: two perceptrons, the Temporal Linear Projection, the resampler.

    Args:
        avts, time: its configurations.
        clips: media.
        keys: visual, audio and time tokens of a clip.
        widths: of visual features, audio features, the connector and the language model.
    """
    seen, heard, width, out_width = widths
    inner = "connector/visual_mlp", "connector/audio_mlp", "connector/tlp"
    features = 1 + 2 * time.periods * (time.f == "sinusoid")
    projection = 0.0 if time.f == "table" else 2.0 * clips * keys[2] * features * width
    return [
        perceptron_work(inner[0], clips * keys[0], (seen, width, width), "vision"),
        perceptron_work(inner[1], clips * keys[1], (heard, width, width), "audio"),
        Segment(inner[2], (Matmul(projection, f"{inner[2]}/kernel", first=True),)),
        resampler_work(avts, clips, sum(keys), width=width, out_width=out_width, upstream=inner),
    ]


def perceptron_work(prefix: str, tokens: int, sizes: tuple[int, int, int], upstream: str) -> Segment:
    """A perceptron of two layers on the features of segment `upstream`."""
    first, hidden, out = sizes
    return Segment(
        prefix,
        (
            Matmul(2.0 * tokens * first * hidden, f"{prefix}/fc1/kernel", first=True),
            Matmul(2.0 * tokens * hidden * out, f"{prefix}/fc2/kernel"),
        ),
        (upstream,),
    )


def resampler_work(
    config: AvtsConfig, clips: int, keys: int, *, width: int, out_width: int, upstream: tuple[str, ...]
) -> Segment:
    """The AVTS resampler; `keys`: visual, audio and time tokens of a clip together."""
    c, prefix = config, "connector/resampler"
    if c.resampler == "mlp":
        out = Matmul(2.0 * clips * keys * width * out_width, f"{prefix}/out/kernel", first=True)
        return Segment(prefix, (out,), upstream)
    m = c.num_queries
    matmuls = []
    for layer in range(c.num_layers):
        for name, read in (("self", m), ("cross", keys)):
            path = f"{prefix}/layer_{layer}/{name}"
            if c.attention == "mha":
                tokens = {"q": m, "k": read, "v": read, "o": m}
                matmuls += [
                    Matmul(2.0 * clips * n * width * width, f"{path}/{kernel}/kernel")
                    for kernel, n in tokens.items()
                ]
            matmuls.append(Matmul(4.0 * clips * m * read * width))
        hidden = 2.0 * clips * m * width * c.mlp_ratio * width
        matmuls += [Matmul(hidden, f"{prefix}/layer_{layer}/mlp/{name}/kernel") for name in ("fc1", "fc2")]
    matmuls.append(Matmul(2.0 * clips * m * width * out_width, f"{prefix}/out/kernel"))
    return Segment(prefix, tuple(matmuls), upstream)
