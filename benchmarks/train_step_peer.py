"""The PyTorch side of train_step.py: transformers and PEFT, and for stage 2 the modules that `avlm export` ships.

    python benchmarks/train_step_peer.py SPEC     # SPEC: JSON, as train_step.py writes it

Needs torch, transformers 5 and peft, and nothing of this project's own requirements.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from train_step import make_batch, time_steps
from transformers import AutoModelForCausalLM, Qwen2Config, SiglipVisionConfig, SiglipVisionModel

ROOT = Path(__file__).resolve().parents[1]
IGNORED = -100  # What transformers' loss leaves out.


def device_name() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_llm(spec: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """Qwen2 with random weights and adapters, its blocks under gradient checkpointing."""
    c = spec["model"]["llm"]
    config = Qwen2Config(
        vocab_size=c["vocab_size"],
        hidden_size=c["width"],
        num_hidden_layers=c["depth"],
        num_attention_heads=c["num_heads"],
        num_key_value_heads=c["num_kv_heads"],
        intermediate_size=c["mlp_dim"],
        rms_norm_eps=c["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
        tie_word_embeddings=c["tie_embeddings"],
        use_cache=False,
    )
    with torch.device(device_name()):
        llm = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=spec["peer_attention"]
        )
    llm.requires_grad_(False)
    if c["remat"] != "none":
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(
        r=c["lora"]["rank"],
        lora_alpha=c["lora"]["alpha"],
        lora_dropout=c["lora"]["dropout"],
        target_modules=[f"{name}_proj" for name in c["lora"]["targets"]],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(llm, lora)


def load_modules() -> ModuleType:
    """modeling_savenvideo.py, with PyTorch's fused attention in place of its own and its filterbank kept in fp32."""
    file = ROOT / "avlm_jax" / "pytorch" / "modeling_savenvideo.py"
    spec = importlib.util.spec_from_file_location("modeling_savenvideo", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fbank = module.kaldi_fbank

    def kaldi_fbank(waveform: torch.Tensor) -> torch.Tensor:
        with torch.autocast(waveform.device.type, enabled=False):
            return fbank(waveform)

    module.kaldi_fbank, module.attend = kaldi_fbank, attend
    return module


def attend(q, k, v, heads, mask, scale=None, bias=None):
    """What modeling_savenvideo.py's function of this name computes, by `scaled_dot_product_attention`."""
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (y.to(torch.get_autocast_dtype(q.device.type)) for y in (q, k, v))
    if bias is not None and not isinstance(bias, float):
        mask = bias.to(q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    else:
        mask = mask.expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


def make_system(spec: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """SAVEnVideo of random weights; encoders and language model frozen in `dtype`, what is trained in fp32."""
    sizes, device = spec["model"], torch.device(device_name())
    c = sizes["vision"]
    vision = SiglipVisionConfig(
        hidden_size=c["width"],
        intermediate_size=c["mlp_dim"],
        num_hidden_layers=c["depth"],  # Up to the layer whose features are taken.
        num_attention_heads=c["num_heads"],
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        vision_use_head=False,
    )
    vision._attn_implementation = "sdpa"
    config = {name: sizes[name] for name in ("vision", "audio", "time", "avts")} | {
        "media": spec["media"],
        "llm_width": sizes["llm"]["width"],
        "media_token_id": spec["vocabulary"],
    }
    with device:
        tower = SiglipVisionModel(vision)
        tower.post_layernorm = torch.nn.Identity()
        model = load_modules().SaveNVideo(config, tower, make_llm(spec, dtype), None)
        for name, parameter in model.connector.named_parameters():
            if name.rpartition(".")[2] in ("queries", "query_pos", "slots", "groups"):
                torch.nn.init.normal_(parameter, std=0.02)
    for part in (model.vision, model.audio):
        part.to(dtype).requires_grad_(False)
    # Their results go into fp32 buffers.
    see, hear = model.vision.forward, model.audio.forward
    model.vision.forward = lambda x: SimpleNamespace(
        last_hidden_state=see(x.to(dtype)).last_hidden_state.float()
    )
    model.audio.forward = lambda *x: (lambda y, mask: (y.float(), mask))(*hear(*x))
    return model


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    device = device_name()
    torch.manual_seed(0)
    frozen = {"int8": "bfloat16"}.get(spec["frozen_dtype"], spec["frozen_dtype"])
    dtype = getattr(torch, frozen)
    media = spec["what"] == "stage2"
    model = make_system(spec, dtype) if media else make_llm(spec, dtype)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=device == "cuda")
    batches = []
    for seed in (0, 1):
        batch = {name: torch.from_numpy(array).to(device) for name, array in make_batch(spec, seed).items()}
        batch["tokens"] = batch["tokens"].long()
        batch["labels"] = batch["tokens"].masked_fill(~batch["loss_mask"], IGNORED)
        batches.append(batch)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # Rows are full: without a mask SDPA takes its fastest kernel, the causal one.
        if not media:
            return model(input_ids=batch["tokens"], labels=batch["labels"]).loss
        embeddings, _ = model.spliced(batch)
        return model.llm(inputs_embeds=embeddings, labels=batch["labels"]).loss

    def step(number: int) -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype != torch.float32):
            loss = loss_of(batches[number % 2])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    timed = time_steps(step, spec)
    peak = torch.cuda.max_memory_reserved() if device == "cuda" else _peak_resident()
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    count = sum(parameter.numel() for parameter in trained)
    return timed | {"trained": count, "memory_gib": peak / 2**30, "versions": versions}


def _peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
