"""SAVEnVideo's four-stage recipe (SAVEn-Vid paper, sections 4.2 and 5; its holes are fields, see each Config's docstring).

    avlm demo                                                       # size=demo end to end, ten minutes on two CPU cores
    avlm train --config configs/savenvideo.py:size=7b --workdir W   # all stages in order, resumes where it was
    avlm train --config configs/savenvideo.py:size=7b,stage=1b,weights=DIR --workdir W

Sizes: "demo" runs on a laptop; "7b" is the paper's and expects a TPU slice of at least 128 GB HBM (v5e-8, v6e-4) for stage 2;
"0.5b" and "1.5b" take the smaller Qwen2 in its place. `weights` is the folder that `avlm import-weights --out DIR` made.
`features` lets all stages read what `avlm cache-features` has made of their records; stage.<name>.features is for one.
The paper reaches 56.21 on Video-MME (without subtitles), 83.14 on Music-AVQA and 66.71 on AVBench.
"""

from ml_collections import ConfigDict

from avlm_jax.config import ConfigError, parse_arg

ALIGN_VISUAL = ("connector/visual_mlp/.*", "connector/tlp/.*", "connector/resampler/.*")
ALIGN_AUDIO = (*ALIGN_VISUAL, "connector/audio_mlp/.*")
FINE_TUNE = (*ALIGN_AUDIO, "llm/.*/lora_[ab]")


# Qwen/Qwen2-{0.5B,1.5B}-Instruct, config.json. The vocabulary has fewer padding rows than the 7B's.
SMALLER_QWEN2 = {
    "0.5b": {"width": 896, "depth": 24, "num_heads": 14, "num_kv_heads": 2, "mlp_dim": 4864},
    "1.5b": {"width": 1536, "depth": 28, "num_heads": 12, "num_kv_heads": 2, "mlp_dim": 8960},
}


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, size="demo", stage="", weights="", features=False)
    sizes = ("demo", *SMALLER_QWEN2, "7b")
    if args.size not in sizes:
        raise ConfigError(f"unknown size {args.size!r}; known: {', '.join(sizes)}")
    config = demo() if args.size == "demo" else full()
    if args.size in SMALLER_QWEN2:
        config.model.llm.update({**SMALLER_QWEN2[args.size], "vocab_size": 151_936, "tie_embeddings": True})
    if args.weights:
        config.init.update({part: f"{args.weights}/{part}" for part in ("vision", "audio", "llm")})
        config.text.tokenizer = f"{args.weights}/llm"
    if args.stage:
        if args.stage not in config.stages:
            raise ConfigError(f"unknown stage {args.stage!r}; known: {', '.join(config.stages)}")
        config.stages = (args.stage,)
    if args.features:
        for name in config.stage:
            config.stage[name].features = True
    return config.lock()


def source(
    records: str, *tasks: str, modalities: tuple[str, ...] = ("video", "audio"), weight: float = 1.0
) -> ConfigDict:
    return ConfigDict({"records": records, "tasks": tasks, "modalities": modalities, "weight": weight})


def stage(
    trainable: tuple[str, ...], sources: dict[str, ConfigDict], *, lr: float, batch_size: int, **changes
) -> ConfigDict:
    """One stage. `steps` 0 means: as many as `epochs` passes over the sources take.

    A step's batch is worked through in micro-batches of `rows_per_device` rows on each device, so that batch_size fits any
    slice. To spend less on padding: `buckets` are shorter text lengths that whole batches may have, `pack` is how many clips
    may share a row of text (batch_size counts rows).
    """
    return ConfigDict(
        {
            "trainable": trainable,
            "sources": sources,
            "batch_size": batch_size,
            "rows_per_device": 0,
            "epochs": 1.0,
            "steps": 0,
            "max_length": 0,
            "buckets": (),
            "pack": 1,
            "oversize": "error",
            "template": "",
            "template_options": None,
            "parent": "",
            "fresh_lora": False,
            "features": False,
            "optim": {
                "lr": lr,
                "warmup_ratio": 0.03,
                "weight_decay": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "clip": 1.0,
            },
            **changes,
        }
    )


def full() -> ConfigDict:
    """The paper's system: SigLIP so400m/14-384, BEATs iter3+, Qwen2-7B; 16 frames, 10.24-s audio windows."""
    return ConfigDict(
        {
            "system": "savenvideo",
            "seed": 0,
            "media": {
                "num_frames": 16,
                "image_size": 384,
                "sampler": "midpoint",
                "window_frames": 1024,
                "max_windows": 16,
                "max_intervals": 8,
            },
            "model": {
                "vision": {
                    "image_size": 384,
                    "patch_size": 14,
                    "width": 1152,
                    "depth": 27,
                    "mlp_dim": 4304,
                    "num_heads": 16,
                    "feature_layer": -2,
                    "dtype": "bfloat16",
                    "backend": "auto",
                    "chunk": 4,
                },
                "audio": {
                    "width": 768,
                    "depth": 12,
                    "num_heads": 12,
                    "mlp_dim": 3072,
                    "embed_dim": 512,
                    "mask": "time_patch",
                    "dtype": "bfloat16",
                    "backend": "auto",
                    "chunk": 4,
                },
                "time": {"f": "sinusoid", "source": "query"},
                "avts": {
                    "resampler": "avts",
                    "num_queries": 256,
                    "scope": "global",
                    "time_scope": "all",
                    "num_layers": 2,
                    "d_model": 1024,
                    "num_heads": 16,
                    "attention": "mha",
                    "type_embed": True,
                    "visual_pool": "none",
                    "freq_pool": "mean",
                    "dtype": "bfloat16",
                    "backend": "auto",
                },
                "llm": {
                    "vocab_size": 152_064,
                    "width": 3584,
                    "depth": 28,
                    "num_heads": 28,
                    "num_kv_heads": 4,
                    "mlp_dim": 18_944,
                    "rope_theta": 1e6,
                    "norm_eps": 1e-6,
                    "qkv_bias": True,
                    "tie_embeddings": False,
                    "dtype": "bfloat16",
                    "remat": "full",
                    "attention_backend": "auto",
                    "lora": {"rank": 128, "alpha": 256.0, "dropout": 0.05},
                },
            },
            # What `avlm import-weights --out weights` makes; see README, "Released weights".
            "init": {"vision": "weights/vision", "audio": "weights/audio", "llm": "weights/llm"},
            "text": {
                "tokenizer": "weights/llm",
                "max_length": 2048,
                "template": "chatml",
                "template_options": None,
                "system": None,
            },
            # "int8": a 7B model in 8.1 in place of 14.2 GiB; what that costs is in benchmarks/int8_accuracy.py.
            "frozen_dtype": "bfloat16",
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "loss_chunk": 128,
            "max_nonfinite": 5,
            "log_every": 10,
            # What a kill may cost, at most. A checkpoint is begun every half of it, since one that is being written at the
            # kill does not count.
            "max_lost_steps": 200,
            "max_lost_minutes": 10.0,  # By the pace of the last `log_every` steps; 0: steps alone count.
            "watch": {"wandb": "", "profile_start": 0, "profile_steps": 3},
            "loader": {"threads": 2, "workers": 0, "prefetch": 2},
            # Seconds after which a run is taken to be stuck and ends, to be started again; see avlm_jax/processes/multihost.py.
            "timeouts": {
                "connect": 300.0,
                "ready": 1800.0,
                "first_step": 1800.0,
                "step": 600.0,
                "save": 900.0,
                "late": 30.0,
                "grace": 20.0,
            },
            "stages": ("1a", "1b", "2a", "2b"),
            "stage": {
                # Batch sizes, rates and epochs are the paper's. Stage 1a sees no sound: its audio branch is not aligned yet.
                "1a": stage(
                    ALIGN_VISUAL,
                    {
                        "lcs558k": source("records/lcs558k", modalities=("video",)),
                        "panda70m": source("records/panda70m", modalities=("video",)),
                    },
                    lr=2e-3,
                    batch_size=512,
                    rows_per_device=4,
                ),
                "1b": stage(
                    ALIGN_AUDIO,
                    {
                        "audiocaps": source("records/audiocaps"),
                        "audioset": source("records/audioset"),
                        "auto_acd": source("records/auto_acd"),
                    },
                    lr=2e-3,
                    batch_size=512,
                    rows_per_device=4,
                    parent="1a",
                ),
                "2a": stage(
                    FINE_TUNE,
                    {
                        "internvid": source("records/internvid"),
                        "vggsound": source("records/vggsound"),
                        "videoinstruct": source("records/videoinstruct"),
                    },
                    lr=2e-4,
                    batch_size=1024,
                    rows_per_device=4,
                    parent="1b",
                ),
                "2b": stage(
                    FINE_TUNE,
                    {"saven_vid": source("records/saven_vid")},
                    lr=2e-4,
                    batch_size=1024,
                    rows_per_device=4,
                    epochs=2.0,
                    parent="2a",
                ),
            },
        }
    )


def demo() -> ConfigDict:
    """The same system at the size of a laptop, on the synthetic stage; its backbones come with the project."""
    config = full()
    config.media.update({"image_size": 64, "window_frames": 128})
    config.model.vision.update(
        {
            "image_size": 64,
            "patch_size": 16,
            "width": 96,
            "depth": 4,
            "mlp_dim": 192,
            "num_heads": 4,
            "dtype": "float32",
            "chunk": 0,
        }
    )
    config.model.audio.update(
        {
            "width": 64,
            "depth": 2,
            "num_heads": 4,
            "mlp_dim": 128,
            "embed_dim": 64,
            "conv_pos_kernel": 16,
            "conv_pos_groups": 4,
            "dtype": "float32",
            "chunk": 0,
        }
    )
    config.model.avts.update(
        {
            "num_queries": 16,
            "scope": "per_frame",
            "time_scope": "inside",
            "d_model": 128,
            "num_heads": 4,
            "dtype": "float32",
        }
    )
    config.model.llm.update(
        {
            "vocab_size": 640,
            "width": 128,
            "depth": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "mlp_dim": 384,
            "rope_theta": 1e3,
            "tie_embeddings": True,
            "dtype": "float32",
            "remat": "none",
        }
    )
    config.model.llm.lora.update({"rank": 16, "alpha": 32.0, "dropout": 0.0})
    backbones = "avlm_jax/demo_backbones"
    config.init.update(
        {k: f"{backbones}/{v}" for k, v in (("vision", "siglip"), ("audio", "beats"), ("llm", "qwen2"))}
    )
    config.text.update({"tokenizer": f"{backbones}/qwen2", "max_length": 160, "system": ""})
    config.update(
        {
            "frozen_dtype": "float32",
            "log_every": 1,
            "max_lost_steps": 100,
            "max_lost_minutes": 0.0,
            "loss_chunk": 64,
        }
    )
    config.mesh.update({"data": -1, "fsdp": 1})
    records = "runs/demo/records/train"
    config.stage = ConfigDict(
        {
            "1a": stage(
                ALIGN_VISUAL,
                {"visual_caption": source(records, "visual_caption", modalities=("video",))},
                lr=2e-3,
                batch_size=16,
                steps=110,
                max_length=72,
            ),
            "1b": stage(
                ALIGN_AUDIO,
                {"audio_caption": source(records, "audio_caption", modalities=("audio",))},
                lr=2e-3,
                batch_size=16,
                steps=70,
                max_length=64,
                parent="1a",
            ),
            "2a": stage(
                FINE_TUNE,
                {task: source(records, task) for task in ("av_caption", "av_pairs", "open_qa")},
                lr=2e-3,
                batch_size=16,
                steps=220,
                max_length=120,
                parent="1b",
            ),
            "2b": stage(
                FINE_TUNE,
                {"mcq": source(records, "mcq", "mcq_extra")},
                lr=1e-3,
                batch_size=16,
                steps=60,
                parent="2a",
            ),
        }
    )
    return config
