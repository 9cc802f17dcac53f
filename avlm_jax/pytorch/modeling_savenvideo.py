"""SAVEnVideo in PyTorch: this file, torch and transformers (5.0 or newer) run the folder it lies in.

    model = SaveNVideo.from_pretrained("exported", dtype=torch.bfloat16, device="cuda")
    print(model.generate("What is heard?", frames=[picture], waveform=samples))  # PIL images; 16 kHz mono in [-1, 1]

SigLIP reads pictures, BEATs sound, a linear projection times; a resampler makes media tokens of all three, which stand in the
prompt of a Qwen2 or LLaMA (SAVEn-Vid paper, section 4). Letters in shapes: b batch, t frames, w audio windows, s samples,
l text length, n media tokens, m queries, d width, k tokens of one modality, f filterbank frames, h heads.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Embedding, LayerNorm, Linear, Module, ModuleDict, ModuleList, Parameter
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel
from transformers import __version__ as transformers_version

if int(transformers_version.split(".")[0]) < 5:  # Other tensor names, other position ids in generate.
    raise ImportError(
        f"modeling_savenvideo.py needs transformers 5.0 or newer; this is {transformers_version}"
    )

RATE, FRAME, SHIFT = 16_000, 400, 160  # Hz; a filterbank frame and the way to the next, in samples (Kaldi)

# Times in a question. A clock has two or three parts; SubRip's comma is a decimal point in the long form only; a lone "m" is no
# minute but mostly a metre; lengths ("for 5 seconds", "12 s long", "a 10-second clip") are matched to be left out.
_N, _H, _M = r"\d+(?:\.\d+)?", r"\s*(?:hours?|hrs?|h)\b", r"\s*(?:minutes?|mins?)\b"
_S, _AND, _FREE = r"\s*(?:seconds?|secs?|s)\b", r"(?:(?:\s*,)?\s*(?:and\s+)?)", r"(?<![\w.:\u2044])"
_CLOCK = r"(?<![\d:.])(?:\d{1,3}:[0-5]?\d:[0-5]\d(?:\.\d+|,\d{3}(?!\d|:\d))?|\d{1,3}:[0-5]\d(?:\.\d+)?)(?:s\b)?(?!\d|[:.]\d)"
_HMS = rf"{_N}\s*(?:h|m|h\s*\d+\s*m)\s*{_N}\s*s\b|{_N}{_H}(?:{_AND}{_N}{_M})?(?:{_AND}{_N}{_S})?"
_AMOUNT = rf"{_FREE}(?:{_HMS}|{_N}{_M}(?:{_AND}{_N}{_S})?|{_N}{_S})"
_TIME = rf"(?:{_CLOCK}(?!\s*[ap]\.?m\b)|{_AMOUNT})"
_TO = r"(?:\s*[-\u2010-\u2015~]\s*|\s+(?:to|until|till|through)\s+)"
_SPAN = re.compile(
    rf"\[\s*({_TIME})\s*,\s*({_TIME})\s*\]|\bbetween\s+({_TIME})\s+and\s+({_TIME})"
    rf"|\bbetween\s+({_FREE}{_N})\s+and\s+({_AMOUNT})|({_TIME}){_TO}({_TIME})|({_FREE}{_N}){_TO}({_AMOUNT})"
    rf"|\b(?:first|opening)\s+(?P<first>{_AMOUNT})|\b(?:last|final|closing)\s+(?P<last>{_AMOUNT})"
    rf"|\b(?:for|lasts|lasting|lasted|every|during\s+those)\s+(?:about\s+)?{_AMOUNT}|\b{_N}-(?:second|minute|hour)\b"
    rf"|{_AMOUNT}\s*(?:-\s*)?(?:long|clip|video|audio|recording|later|earlier|apart)\b|({_TIME})",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile("<video>|<image>|<audio>")  # Of data sets; when asked they are text.
_MARKS = {0x2460 + i: f"({i + 1})" for i in range(20)} | {0x2776 + i: f"({i % 10 + 1})" for i in range(30)}
_MARKS |= {0x24B6 + i: f"({chr(65 + i % 26)})" for i in range(52)} | {0x3001: ","}  # Circled ones.
# Options: whole lines, and within a line the first one's marker where a second's follows.
_END, _DOT, _STOP = r"[*:.]*(?=\s|$|[\d(\[\"'])", r"(?:\)|[.:](?!\d))", r"(?:^|[?.!:;,]\s|\n)[^\S\n]*"
_NAME = r"(?:[A-J]|[1-9]\d?|[ivx]{1,4})"
_OPTION = re.compile(
    rf"[\s*\u2022>-]*(?:(?:option\s+)?(?:(?:[A-J]|[ivx]{{1,4}})[.:]|[1-9]\d?[.:](?!\d)){_END}|[(\[]{_NAME}[)\]]"
    rf"|{_NAME}\)|option\s+\w+\b|[A-H](?:\s+(?:[-\u2013\u2014]\s|\d+:\d)|,\s*\d))",
    re.IGNORECASE,
)
_MARKERS = (
    rf"(?<!\w)(?:[(\[][AaIi][)\]]|A(?:[).:]{_END}|,\s*(?=\d)))|{_STOP}[aiI][).:]{_END}|\b[Oo]ption\s+[Aa]\b",
    rf"(?<!\w)(?:[(\[](?:[Bb]|ii|II)[)\]]|(?:[Bb]|ii|II)(?:[).:]{_END}|,\s*(?=\d)))|\b[Oo]ption\s+[Bb]\b",
    rf"(?<!\w)[(\[]1[)\]]|{_STOP}1{_DOT}{_END}|\b[Oo]ption\s+1\b",
    rf"(?<!\w)[(\[]2[)\]]|(?<![\w.:])2{_DOT}{_END}|\b[Oo]ption\s+2\b",
)


def times_named(question: str, duration: float) -> list[tuple[float, float]]:
    """Spans (start, end) in seconds that a question names outside its options; a time alone is (x, x)."""

    def seconds(text: str) -> float:
        if ":" in text:
            parts = text.casefold().rstrip("s").replace(",", ".").split(":")
            return sum(float(part) * 60**power for power, part in enumerate(reversed(parts)))
        parts = re.findall(rf"({_N})\s*([hms])", text, re.IGNORECASE)
        return sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit.casefold()] for number, unit in parts)

    question = unicodedata.normalize("NFKC", question.translate(_MARKS))
    lines, spans = _PLACEHOLDER.sub(" ", question).splitlines(), []
    if options := [number for number, line in enumerate(lines) if _OPTION.match(line)]:
        end = options[-1] + 1
        while end < len(lines) and lines[end][:1].isspace():  # An option's text goes on.
            end += 1
        del lines[options[0] : end]
    stem = "\n".join(lines)
    for first, second in (_MARKERS[:2], _MARKERS[2:]):
        found = re.search(first, stem)
        if found and re.compile(second).search(stem, found.end()):
            stem = stem[: found.start()]
    for match in _SPAN.finditer(stem):
        if texts := [text for text in match.groups() if text is not None]:
            if re.fullmatch(_N, texts[0]):  # "5 to 10 seconds": the unit is meant for both.
                texts[0] += next(filter(str.isalpha, texts[1]))
            start, end = seconds(texts[0]), seconds(texts[-1])
            start = 0.0 if match["first"] else duration - end if match["last"] else start
            spans.append((start, duration if match["last"] else end))
    return spans


def kaldi_fbank(waveform: Tensor) -> Tensor:
    """[... s] in [-1, 1] -> [... f 128]: Kaldi's log-mel energies (feat/mel-computations.h), normalised for BEATs."""
    frames = (waveform.float() * 2.0**15).unfold(-1, FRAME, SHIFT)
    frames = frames - frames.mean(-1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], -1)  # pre-emphasis
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / (FRAME - 1))) ** 0.85  # "povey"
    power = torch.fft.rfft(frames * torch.from_numpy(window).to(frames), n=512).abs().square()
    low, high, bins = (1127 * np.log1p(np.asarray(x) / 700) for x in (20, 8000, np.arange(256) * RATE / 512))
    # 128 triangles, 129 steps on the mel scale; Nyquist's bin, the 257th, is in none.
    banks = 1.0 - np.abs((bins[:, None] - low) / ((high - low) / 129) - np.arange(1, 129))
    energies = power[..., :256] @ torch.from_numpy(banks.clip(0.0)).to(frames)
    # The floor is fp32's machine epsilon; mean and deviation, doubled, are BEATs' (microsoft/unilm beats/BEATs.py).
    return (energies.clamp(min=2.0**-23).log() - 15.41663) / (2 * 6.55582)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor, scale=None, bias=0.0) -> Tensor:
    """Attention of [b t d] over [b k d] in fp32; where mask [b 1 t|1 k] leaves nothing to see, zeros."""
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q.float() @ k.float().transpose(-1, -2) * scale + bias).masked_fill(~mask, -1e30)
    weights = logits.softmax(-1) * mask.any(-1, keepdim=True)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class BeatsLayer(Module):
    """Post-norm layer; its position bias [h k k] is gated by the query, its residuals grow by deep norm."""

    def __init__(self, c: SimpleNamespace, buckets: Embedding):
        super().__init__()
        self.c, self.alpha = c, (2.0 * c.depth) ** 0.25 if c.deep_norm else 1.0
        attn = ModuleDict({f"{x}_proj": Linear(c.width, c.width) for x in ("q", "k", "v", "out")})
        attn["relative_attention_bias"] = buckets
        if c.gru_gate:
            attn["grep_linear"] = Linear(c.width // c.num_heads, 8)
            attn.grep_a = Parameter(torch.ones(1, c.num_heads, 1, 1))
        self.self_attn, self.self_attn_layer_norm = attn, LayerNorm(c.width)
        self.fc1, self.fc2 = Linear(c.width, c.mlp_dim), Linear(c.mlp_dim, c.width)
        self.final_layer_norm = LayerNorm(c.width)

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        attn, heads = self.self_attn, self.c.num_heads
        q, k, v = (attn[name](x) for name in ("q_proj", "k_proj", "v_proj"))
        if self.c.gru_gate:  # Two gates of four summands each.
            gates = attn["grep_linear"](q.unflatten(-1, (heads, -1))).float().unflatten(-1, (2, 4)).sum(-1)
            a, b = gates.sigmoid().permute(3, 0, 2, 1)[..., None]  # each [b h k 1]
            bias = (a * (b * attn.grep_a.float() - 1.0) + 2.0) * bias
        x = x * self.alpha + attn["out_proj"](attend(q, k, v, heads, mask, bias=bias))
        x = self.self_attn_layer_norm(x)
        return self.final_layer_norm(x * self.alpha + self.fc2(F.gelu(self.fc1(x))))


class Beats(Module):
    """BEATs (Chen et al. 2022) under the names of its checkpoints: 8 tokens, one per mel row, for 16 frames."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.c, self.rows = c, c.num_mel // c.patch_size
        self.patch_embedding = Conv2d(1, c.embed_dim, c.patch_size, c.patch_size, bias=False)
        self.layer_norm = LayerNorm(c.embed_dim)
        if c.embed_dim != c.width:
            self.post_extract_proj = Linear(c.embed_dim, c.width)
        taps, buckets = c.conv_pos_kernel, Embedding(c.num_buckets, c.num_heads)  # Shared by all layers.
        conv = Conv1d(c.width, c.width, taps, padding=taps // 2, groups=c.conv_pos_groups)
        self.encoder = Module()
        self.encoder.pos_conv = ModuleList([torch.nn.utils.parametrizations.weight_norm(conv, dim=2)])
        self.encoder.layer_norm = LayerNorm(c.width)
        self.encoder.layers = ModuleList(BeatsLayer(c, buckets) for _ in range(c.depth))

    def forward(self, fbank: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Filterbank [b f 128] and which frames are sound [b f] -> features [b k d], token mask [b k]."""
        c, size, frames = self.c, self.c.patch_size, valid.shape[1]
        tokens, whole = frames // size * self.rows, frames // size * size
        x = fbank[:, :whole].to(self.layer_norm.weight.dtype)
        if c.mask == "time_patch":  # Padding in a partly valid column becomes the mean spectrum.
            x = x * valid[:, :whole, None]
            mask = valid[:, :whole].unflatten(1, (-1, size)).any(-1).repeat_interleave(self.rows, 1)
        else:  # unilm cuts the frames into as many equal runs as there are tokens.
            mask = valid[:, : frames - frames % tokens].unflatten(1, (tokens, -1)).any(-1)
        x = self.layer_norm(self.patch_embedding(x[:, None]).flatten(2).transpose(1, 2))
        x = (self.post_extract_proj(x) if c.embed_dim != c.width else x).masked_fill(~mask[..., None], 0.0)
        places = self.encoder.pos_conv[0](x.transpose(1, 2))[..., :tokens].transpose(1, 2)
        x, bias = self.encoder.layer_norm(x + F.gelu(places)), self.position_bias(tokens)
        for layer in self.encoder.layers:
            x = layer(x, bias, mask[:, None, None])
        return x.masked_fill(~mask[..., None], 0.0), mask

    def position_bias(self, length: int) -> Tensor:
        """[h k k]: T5's buckets of key minus query position, half for each sign, half of those logarithmic."""
        half, distance = self.c.num_buckets // 2, np.arange(length)[None] - np.arange(length)[:, None]
        exact, far = half // 2, np.abs(distance)
        # fp32 and this order of operations decide which side of a bucket's border a distance falls on.
        log = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
        log = log / np.float32(np.log(self.c.max_distance / exact)) * np.float32(half - exact)
        far = np.where(far < exact, far, np.minimum(exact + log.astype(np.int64), half - 1))
        table = self.encoder.layers[0].self_attn["relative_attention_bias"].weight.float()
        return table[np.where(distance > 0, half, 0) + far].permute(2, 0, 1)


def sinusoid(seconds: Tensor, count: int) -> Tensor:
    """[...] -> [... 2 count], fp32: sines, then cosines, at periods from 1 s to 7200 s in equal ratios."""
    frequencies = torch.from_numpy(2 * np.pi / np.geomspace(1.0, 7200.0, count)).float()
    angles = seconds.float()[..., None] * frequencies.to(seconds.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


def grid_code(rows: int, columns: int, width: int) -> Tensor:
    """Sine-cosine code of the places of a grid, [rows * columns width]; half of the width codes the row."""
    omega = 1.0 / 10_000 ** (np.arange(width // 4) / max(width // 4, 1))
    angles = [place[:, None] * omega for place in np.divmod(np.arange(rows * columns), columns)]
    code = np.concatenate([f(x) for x in angles for f in (np.sin, np.cos)], 1)
    return torch.from_numpy(np.pad(code, ((0, 0), (0, width - code.shape[1])))).float()


def perceptron(width_in: int, hidden: int, width: int) -> Module:
    """Linear, exact GELU, Linear."""
    parts = {"fc1": Linear(width_in, hidden), "gelu": torch.nn.GELU(), "fc2": Linear(hidden, width)}
    return torch.nn.Sequential(OrderedDict(parts))


class ResamplerLayer(Module):
    """Self-attention, cross-attention, perceptron; each behind a norm and with a residual."""

    def __init__(self, c: SimpleNamespace, width: int):
        super().__init__()
        self.heads = c.num_heads
        for name in ("self", "cross"):  # "plain", Eq. 2-3 of the paper: no projections and no scale.
            projections = {x: Linear(width, width) for x in "qkvo" if c.attention == "mha"}
            self.add_module(name, ModuleDict(projections))
        self.ln_self, self.ln_cross, self.ln_mlp = (LayerNorm(width, eps=1e-6) for _ in range(3))
        self.mlp = perceptron(width, c.mlp_ratio * width, width)

    def forward(self, x, x_pos, keys, keys_pos, self_mask, cross_mask) -> Tensor:
        h = self.ln_self(x)
        x = x + self.attention("self", h, x_pos, h, x_pos, self_mask)
        x = x + self.attention("cross", self.ln_cross(x), x_pos, keys, keys_pos, cross_mask)
        return x + self.mlp(self.ln_mlp(x))

    def attention(self, name: str, x, x_pos, keys, keys_pos, mask) -> Tensor:
        p, mask = self.get_submodule(name), mask[:, None]
        q, k = x + x_pos.to(x.dtype), keys + keys_pos.to(keys.dtype)  # Values get no positions.
        if not p:
            return attend(q, k, keys, 1, mask, scale=1.0)
        return p["o"](attend(p["q"](q), p["k"](k), p["v"](keys), self.heads, mask))


class Resampler(Module):
    """AVTS: learnt queries read visual, audio and time tokens, laid side by side (paper, section 4.1.3)."""

    def __init__(self, c: SimpleNamespace, width: int, out_width: int, num_groups: int):
        super().__init__()
        self.c, self.width, self.num_groups, self.out = c, width, num_groups, Linear(width, out_width)
        if c.resampler == "mlp":  # No resampling: all tokens go to the language model.
            return
        # Per frame a query is its slot's vector plus its group's; a group has one frame's share of the time.
        shared = {"slots": c.num_queries // num_groups, "groups": num_groups}
        rows = {"queries": c.num_queries} if c.scope == "global" else shared
        rows |= {"query_pos": c.num_queries} | ({"type_embed": 3} if c.type_embed else {})
        for name, count in rows.items():
            self.register_parameter(name, Parameter(torch.zeros(count, width)))
        for i in range(c.num_layers):
            self.add_module(f"layer_{i}", ResamplerLayer(c, width))
        self.ln_out = LayerNorm(width, eps=1e-6)

    def forward(self, kinds: list[tuple], duration: Tensor) -> tuple[Tensor, Tensor]:
        """Media tokens [b n d] and which of them could read anything [b n]. See `SaveNVideo.see` for the kinds."""
        c, dtype, mask = self.c, self.out.weight.dtype, torch.cat([kind[2] for kind in kinds], 1)
        keys = torch.cat([kind[0].to(dtype) for kind in kinds], 1).masked_fill(~mask[..., None], 0.0)
        if c.resampler == "mlp":
            return self.out(keys), mask
        keys_pos = torch.cat([sinusoid(kind[1], self.width // 2) + kind[3] for kind in kinds], 1)
        which = torch.cat([torch.full_like(kind[1][0], i).long() for i, kind in enumerate(kinds)])
        keys = keys + self.type_embed[which] if c.type_embed else keys
        x, x_pos, readable = self.start(kinds, duration)
        cross_mask = readable & mask[:, None]
        valid = (cross_mask & (which < 2)).any(-1)
        if c.time_scope == "inside":  # A group whose share of the time nobody asks about has nothing to tell.
            valid = valid & (cross_mask & (which == 2)).any(-1)
        for i in range(c.num_layers):
            x = self.get_submodule(f"layer_{i}")(x, x_pos, keys, keys_pos, valid[:, None], cross_mask)
        return self.out(self.ln_out(x)), valid

    def start(self, kinds: list[tuple], duration: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First queries [b m d], their positions [b|1 m d], and which keys each may read [b m k]."""
        c, groups, b = self.c, self.num_groups, len(duration)
        if c.scope == "global":
            everything = torch.ones(b, c.num_queries, 1, dtype=torch.bool, device=duration.device)
            return self.queries.expand(b, -1, -1), self.query_pos[None], everything

        def share(times: Tensor) -> Tensor:  # Which of the equal shares of the duration a time falls into.
            return (times / duration.clamp(min=1e-6)[:, None] * groups).floor().clamp(0, groups - 1)[:, None]

        slots, own = c.num_queries // groups, torch.arange(groups, device=duration.device)[:, None]
        x = (self.groups[:, None] + self.slots).flatten(0, 1).expand(b, -1, -1)
        pos = sinusoid((own[:, 0] + 0.5) / groups * duration[:, None], self.width // 2)
        first, last = (share(kinds[2][4][..., edge]) for edge in (0, 1))
        asked = (first <= own) & (own <= last) | (c.time_scope == "all")
        readable = torch.cat([share(kinds[0][1]) == own, share(kinds[1][1]) == own, asked], 2)
        pos, readable = (y.repeat_interleave(slots, 1) for y in (pos, readable))
        return x, pos + self.query_pos, readable


def _merge_adapter(llm: Module, folder: Path) -> None:
    """Adds a PEFT adapter's updates, alpha / r * B A, to the weights; computed in fp32."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    others = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save")
    if config.get("peft_type") != "LORA" or any(config.get(name) for name in others):
        raise ValueError(f"{folder}: only LORA without {', '.join(others)} is understood")
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, layer in llm.named_modules():
        if name.rpartition(".")[2] in config["target_modules"]:
            names = [f"base_model.model.{name}.lora_{half}.weight" for half in "AB"]
            a, b = (tensors.pop(x, torch.empty(0, 0)).float() for x in names)
            if (*b.shape, *a.shape) != (layer.out_features, config["r"], config["r"], layer.in_features):
                raise RuntimeError(f"{folder}: {' or '.join(names)} is missing or mis-shaped")
            layer.weight.data = (layer.weight + config["lora_alpha"] / config["r"] * (b @ a)).to(layer.weight)
    if tensors:
        raise RuntimeError(f"{folder}: unexpected {', '.join(tensors)}")


class SaveNVideo(Module):
    """The whole model; `config` is the folder's config.json."""

    def __init__(self, config: dict, vision: Module, llm: Module, tokenizer):
        super().__init__()
        parts = [SimpleNamespace(**config[x]) for x in ("media", "vision", "audio", "time", "avts")]
        self.media, eyes, ears, self.time, self.avts = parts
        self.config, self.tokenizer, self.vision, self.llm = config, tokenizer, vision, llm
        out, self.grid = config["llm_width"], eyes.image_size // eyes.patch_size
        self.audio, self.width = Beats(ears), self.avts.d_model or out
        self.connector = Module()
        self.connector.visual_mlp = perceptron(eyes.width, self.width, self.width)
        self.connector.audio_mlp = perceptron(ears.width, self.width, self.width)
        self.connector.resampler = Resampler(self.avts, self.width, out, self.media.num_frames)
        self.connector.tlp = Linear(1 + 2 * self.time.periods * (self.time.f == "sinusoid"), self.width)
        if self.time.f == "table":
            table = torch.zeros(self.time.table_size, self.width)
            self.connector.tlp = torch.nn.ParameterDict({"table": table})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype=torch.float32, device="cpu") -> SaveNVideo:
        """Reads an exported folder, running no code of it. Errors name each tensor missing, unexpected or mis-shaped."""
        folder, dtype = Path(folder), getattr(torch, dtype) if isinstance(dtype, str) else dtype
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type"), config.get("format_version"), config.get("text", {}).get("template")
        if kind != ("savenvideo", 1, "chatml"):
            raise ValueError(f"{folder}/config.json is of {kind}, wanted: ('savenvideo', 1, 'chatml')")
        # AutoTokenizer goes by the model type and puts Qwen2's own word pattern in the place of tokenizer.json's.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "llm", local_files_only=True)
        told = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        llm, info = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=dtype, **told)
        if wrong := [f"{what}: {names}" for what, names in info.items() if names]:
            raise RuntimeError(f"{folder / 'llm'}: {'; '.join(wrong)}")
        if config["adapter"]:
            _merge_adapter(llm, folder / config["adapter"])
        sizes = SiglipVisionConfig.from_pretrained(folder / "vision", vision_use_head=False)
        sizes.num_hidden_layers = range(sizes.num_hidden_layers + 1)[config["vision"]["feature_layer"]]
        vision = SiglipVisionModel(sizes)
        vision.post_layernorm = torch.nn.Identity()  # The feature is a hidden state, not normed.
        model = cls(config, vision, llm, tokenizer)
        for part in ("vision", "audio", "connector"):
            files = [load_file(file) for file in sorted((folder / part).glob("*.safetensors"))]
            tensors = {name.removeprefix("vision_model."): x for file in files for name, x in file.items()}
            model.get_submodule(part).to(dtype).load_state_dict(tensors)
        return model.to(device).eval()  # The language model has its dtype, but for buffers that stay fp32.

    def see(self, batch: dict[str, Tensor]) -> tuple:
        """Visual tokens (SigLIP's patches): features [b k d], seconds [b k], mask [b k], code of the place in a frame [k d]."""
        shown, like, pool = batch["frame_mask"], self.connector.visual_mlp.fc1.weight, self.avts.visual_pool
        x = like.new_zeros(*shown.shape, self.grid**2, like.shape[1])
        if shown.any():
            pixels = (batch["frames"][shown].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
            x[shown] = self.vision(pixels.to(like.dtype)).last_hidden_state
        side = {"none": self.grid, "bilinear2": -(-self.grid // 2), "frame": 1}[pool]
        if pool != "none":
            how = {"mode": "bilinear", "antialias": True} if pool == "bilinear2" else {"mode": "area"}
            x = x.flatten(0, 1).transpose(1, 2).unflatten(2, (self.grid, -1)).float()
            x = F.interpolate(x, (side, side), **how).flatten(2).transpose(1, 2)
        x = self.connector.visual_mlp(x.reshape(len(shown), -1, like.shape[1]).to(like.dtype))
        seconds, mask = (batch[key].repeat_interleave(side**2, 1) for key in ("frame_times", "frame_mask"))
        return x, seconds, mask, grid_code(side, side, self.width).repeat(shown.shape[1], 1).to(like.device)

    def hear(self, batch: dict[str, Tensor]) -> tuple:
        """Audio tokens: BEATs' features, every one at the middle of its 160 ms."""
        heard, audio, spans = (batch[key] for key in ("audio_mask", "audio", "audio_spans"))
        like, size, rows = self.connector.audio_mlp.fc1.weight, self.audio.c.patch_size, self.audio.rows
        # Samples that are sound, and of these whole filterbank frames: fp32 seconds are off by up to 8 samples.
        samples = (((spans[..., 1] - spans[..., 0]) * RATE).round() * heard)[..., None]
        fbank = kaldi_fbank(audio.where(torch.arange(audio.shape[2], device=like.device) < samples, 0.0))
        valid = torch.arange(fbank.shape[2], device=like.device) < ((samples + 8 - FRAME) / SHIFT).floor() + 1
        x = like.new_zeros(*heard.shape, fbank.shape[2] // size * rows, like.shape[1])
        mask = torch.zeros_like(x[..., 0], dtype=torch.bool)
        if heard.any():
            x[heard], mask[heard] = self.audio(fbank[heard], valid[heard])
        x, mask, place = x.unflatten(2, (-1, rows)), mask.unflatten(2, (-1, rows)), 0.0
        seconds = spans[..., :1] + (torch.arange(x.shape[2], device=like.device) + 0.5) * (size / 100)
        if self.avts.freq_pool == "none":
            place = grid_code(rows, 1, self.width).repeat(heard.shape[1] * x.shape[2], 1).to(like.device)
            seconds = seconds[..., None].expand(mask.shape)
        else:  # Means over what is sound.
            over, sound = (3,), mask.any(3)
            if self.avts.freq_pool == "window":
                over, seconds = (2, 3), (seconds * sound).sum(2) / sound.sum(2).clamp(min=1)
            x, mask = x.sum(over) / mask.sum(over).clamp(min=1)[..., None], mask.any(over)
        return self.connector.audio_mlp(x.flatten(1, -2)), seconds.flatten(1), mask.flatten(1), place

    def ask(self, batch: dict[str, Tensor]) -> tuple:
        """Time tokens of the Temporal Linear Projection (paper, section 4.1.2), and last the spans they stand for [b k 2]."""
        times, c, tlp = batch["frame_times"], self.time, self.connector.tlp
        mask, asked = (batch[key].repeat_interleave(2, 1) for key in ("interval_mask", "intervals"))
        query = batch["intervals"].flatten(1), mask, asked
        frames = times, batch["frame_mask"], times[..., None].expand(-1, -1, 2)
        chosen = {"query": [query], "frames": [frames], "both": [query, frames]}[c.source]
        seconds, mask, spans = (torch.cat(parts, 1) for parts in zip(*chosen, strict=True))
        if c.f == "table":
            x = tlp["table"][seconds.floor().clamp(0, c.table_size - 1).long()]
        else:
            x = seconds if c.f == "seconds" else seconds / batch["duration"].clamp(min=1e-6)[:, None]
            x = [x[..., None]] + [sinusoid(seconds, c.periods)] * (c.f == "sinusoid")
            x = F.linear(torch.cat(x, -1), tlp.weight.float(), tlp.bias.float())
        return x, seconds, mask, 0.0, spans

    def spliced(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Input embeddings [b l d] with the media in place; segment ids [b l], 0 where media may not be seen."""
        kinds = [self.see(batch), self.hear(batch), self.ask(batch)]
        media, valid = self.connector.resampler(kinds, batch["duration"])
        here = batch["tokens"] == self.config["media_token_id"]
        if not set(counts := here.sum(1).tolist()) <= {0, media.shape[1]}:
            raise ValueError(f"the rows have {counts} media tokens, wanted: {media.shape[1]} or none")
        index, row = (here.cumsum(1) - 1).clamp(min=0), torch.arange(len(here), device=here.device)[:, None]
        media, hidden = media.masked_fill(~valid[..., None], 0.0)[row, index], here & ~valid[row, index]
        text = self.llm.get_input_embeddings()(batch["tokens"].masked_fill(here, 0))  # Media need no row.
        return torch.where(here[..., None], media.to(text.dtype), text), batch["segment_ids"] * ~hidden

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """fp32 logits [b l v] of a batch as `prepare` makes it, of any number of rows, right-padded."""
        x, segments = self.spliced(batch)
        allowed = ((segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]).tril()[:, None]
        bias = x.new_zeros(allowed.shape).masked_fill(~allowed, torch.finfo(x.dtype).min)
        return self.llm(inputs_embeds=x, attention_mask=bias, position_ids=batch["positions"]).logits.float()

    @torch.inference_mode()
    def generate(self, question: str, *, max_new_tokens: int = 128, **options) -> str:
        """The answer to one question. Options: `prepare`'s, others go to transformers' generate (default: greedy)."""
        media = ("frames", "frame_times", "waveform", "duration", "intervals")
        if options.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences: a question gets one answer")
        batch = self.prepare(question, **{key: options.pop(key) for key in media if key in options})
        x, segments = self.spliced(batch)
        options |= {"attention_mask": (segments > 0).long(), "position_ids": batch["positions"]}
        options |= {"max_new_tokens": max_new_tokens, "output_logits": True, "return_dict_in_generate": True}
        found = self.llm.generate(inputs_embeds=x, **options)
        if not all(logits.isfinite().all() for logits in found.logits):
            raise ValueError("the logits are not finite: a weight is damaged, or dtype too narrow")
        return self.tokenizer.decode(found.sequences[0], skip_special_tokens=True).strip()

    def prompt(self, question: str) -> list[int]:
        """ChatML up to where the answer begins. What a user wrote never becomes a control token."""
        if not question.strip():
            raise ValueError("the question is empty")
        added, media = self.tokenizer.get_added_vocab(), self.config["media_token_id"]
        start, end, system = added["<|im_start|>"], added["<|im_end|>"], self.config["text"]["system"]
        user = ["user\n", *[media] * self.config["num_media_tokens"], f"\n{question}"]
        pieces, ids, plain = [], [], {"add_special_tokens": False, "split_special_tokens": True}
        for text, *rest in ([[f"system\n{system}"]] if system else []) + [user]:
            cut = re.match(r"\w+\s*[\r\n]", text).end()  # A text's first newlines go with the role's.
            pieces += [start, text[:cut], text[cut:], *rest, end, "\n"]
        names, reserved = "|".join(map(re.escape, [*added, "<|media|>"])), {*added.values(), media}
        for piece in [*pieces, start, "assistant\n"]:
            new = [piece] if isinstance(piece, int) else self.tokenizer(piece, **plain).input_ids
            if reserved & {*new} and new != [piece]:  # Added but not special: cut behind its first character.
                parts = re.split(f"(?<=(?={names}).)", piece, flags=re.DOTALL)
                new = [x for part in parts for x in self.tokenizer(part, **plain).input_ids]
                if reserved & {*new}:
                    raise ValueError(f"the text holds control tokens: {piece!r}")
            ids += new
        return ids

    def prepare(self, question, frames=None, frame_times=None, waveform=None, duration=None, intervals=None):
        """A batch of one row, {name: tensor}, out of a question and pictures, sound or both.

        Args:
            question: text; the times it names reach the model. `intervals`, (start, end) in seconds, replace them.
            frames: PIL images or uint8 [t h w 3]; frame_times: seconds (default, of a single picture: 0).
            waveform: f32 [s], 16 kHz mono in [-1, 1]. duration: seconds (default: up to the last sample or frame).
        """
        from PIL import Image

        c, hop, side = self.media, SHIFT * self.media.window_frames, (self.media.image_size,) * 2
        sound, space = np.asarray(np.zeros(0) if waveform is None else waveform), hop + FRAME - SHIFT
        if sound.ndim != 1 or sound.dtype.kind != "f" or not (np.abs(sound) <= 2).all():
            raise ValueError(
                f"waveform is {sound.dtype} {[*sound.shape]}, wanted: 16 kHz mono, float [samples] in [-1, 1]; average "
                "channels, divide int16 by 32768, resample other rates"
            )
        frames = [frames] if isinstance(frames, Image.Image) else () if frames is None else frames
        times = [0.0] * (len(frames) == 1) if frame_times is None else [float(x) for x in frame_times]
        if len(frames) != len(times):
            raise ValueError(
                f"{len(frames)} frames and {len(times)} frame_times: every frame needs its second"
            )
        duration = float(np.float32(max([len(sound) / RATE, *times]) if duration is None else duration))
        if not 0 <= duration < float("inf") or not all(
            a <= b for a, b in zip([0, *times], [*times, duration], strict=True)
        ):
            raise ValueError(f"frame_times {times} must grow from 0 to at most the duration, {duration} s")
        images = []
        for x in frames:
            if not isinstance(x, Image.Image):
                x = np.asarray(x)
                if x.dtype != np.uint8 or x.ndim != 3 or x.shape[2] != 3:
                    raise ValueError(
                        f"a frame is {x.dtype} {[*x.shape]}, wanted: a PIL image or uint8 [rows columns 3]"
                    )
                x = Image.fromarray(x)
            x = Image.alpha_composite(Image.new("RGBA", x.size, "white"), x.convert("RGBA")).convert("RGB")
            images.append(np.asarray(x.resize(side, Image.Resampling.BICUBIC)))
        starts, last = range(0, len(sound), hop), len(sound) - space  # Filterbank frames join without a seam.
        if len(starts) > c.max_windows:  # Too long: whole windows around the frames, or spread evenly.
            centres = [(i + 0.5) * (len(sound) / RATE / c.max_windows) for i in range(c.max_windows)]
            centres = times if len(times) == c.max_windows else centres
            starts = sorted({min(max(round(x * RATE) - space // 2, 0), last) for x in centres})
        windows = {x: sound[x : x + space].clip(-1, 1) for x in starts if len(sound) - x >= FRAME}
        if not images and not windows:
            raise ValueError("there is nothing to see or hear: give frames=, or waveform= of at least 25 ms")
        spans = times_named(question, duration) if intervals is None else [tuple(x) for x in intervals]
        if not all(len(x) == 2 and np.isfinite(x).all() for x in spans):
            raise ValueError(f"intervals are {spans}, wanted: [(start, end), ...] in seconds")
        spans = [sorted(min(max(float(x), 0.0), duration) for x in span) for span in spans]
        tokens = torch.tensor([self.prompt(question)])
        batch = {"tokens": tokens, "duration": torch.tensor([duration], dtype=torch.float32)}
        batch |= {"positions": torch.arange(tokens.shape[1])[None], "segment_ids": torch.ones_like(tokens)}
        sounds = [np.pad(x, (0, space - len(x))) for x in windows.values()]
        bounds = [(x / RATE, (x + len(y)) / RATE) for x, y in windows.items()]
        for key, mask, size, rows in (
            ("frames", "frame_mask", (c.num_frames, *side, 3), images),
            ("frame_times", "frame_mask", (c.num_frames,), times),
            ("audio", "audio_mask", (c.max_windows, space), sounds),
            ("audio_spans", "audio_mask", (c.max_windows, 2), bounds),
            ("intervals", "interval_mask", (c.max_intervals, 2), spans or [(0.0, duration)]),
        ):
            if len(rows) > size[0]:
                raise ValueError(f"{len(rows)} {key} are given, the model takes {size[0]} at most")
            full = np.zeros(size, np.uint8 if key == "frames" else np.float32)
            for i, row in enumerate(rows):
                full[i] = row
            batch |= {key: torch.from_numpy(full)[None], mask: (torch.arange(size[0]) < len(rows))[None]}
        return {key: x.to(self.llm.device) for key, x in batch.items()}
