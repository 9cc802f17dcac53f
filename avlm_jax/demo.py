"""`avlm demo`: SAVEnVideo end to end at the size of a laptop, from video files to the paper's ablation table.

Generates real video files, prepares records, trains the four stages twice (AVTS, and MLPs in its place), asks held-out
questions with and without picture and sound, and writes <workdir>/demo_report.json and a picture. Interrupted, the same
command goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from avlm_jax.config import ConfigError, enable_compilation_cache, load_config, to_dataclass
from avlm_jax.evaluate import evaluate
from avlm_jax.generate import Model, load_model
from avlm_jax.models.api import build_system
from avlm_jax.monitoring.run_record import versions
from avlm_jax.report import comparison_table, save_timeline
from avlm_jax.train import train
from input_pipeline.manifest import read_manifest
from input_pipeline.prepare import prepare
from input_pipeline.spec import MediaSpec
from input_pipeline.synthetic.generate import generate

CONFIG = "configs/savenvideo.py:size=demo"
BACKBONES = Path(__file__).parent / "demo_backbones"
PROTOCOL = (
    "strict"  # The demo's answers are an option's text or its letter; the official rule reads letters only.
)
ANSWER_TOKENS = 6
REPORT, TIMELINE = "demo_report.json", "timeline.png"
TRAIN_VIDEOS, TEST_VIDEOS = 280, 50  # 50 videos with five questions each: 250 held-out questions.
TEST_SEED = 1_000_000  # Added to the seed: test videos are drawn apart from training videos.

# Row of the report -> (model, modalities that it is shown); the rows of Table 4 in the SAVEn-Vid paper, and text alone.
ROWS = {
    "full": ("avts", ("video", "audio")),
    "no_audio": ("avts", ("video",)),
    "no_video": ("avts", ("audio",)),
    "text_only": ("avts", ()),
    "mlp_resampler": ("mlp", ("video", "audio")),
}
TITLES = {
    "full": "full model",
    "no_audio": "without audio",
    "no_video": "without video",
    "text_only": "text only",
    "mlp_resampler": "MLPs instead of AVTS",
}


class Clock:
    """Seconds of each part of the demo, for the report and for people who wait."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.parts: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str, title: str) -> Iterator[None]:
        begun = time.monotonic()
        print(f"\n== {title}", flush=True)
        yield
        self.parts[name] = round(time.monotonic() - begun, 1)
        print(f"   {self.parts[name]} s, {self.total:.0f} s in all", flush=True)

    @property
    def total(self) -> float:
        return time.monotonic() - self.begun


def records_of(workdir: Path, split: str, count: int, seed: int, spec: MediaSpec) -> Path:
    """The records of one split, generated and prepared unless they are there for the same seed and count."""
    out = workdir / "records" / split
    stamp = workdir / "records" / f"{split}.json"
    asked = {"count": count, "seed": seed}
    made = json.loads(stamp.read_text()) if stamp.exists() else None
    if made is not None and made != asked:
        raise ConfigError(
            f"{workdir} was made with {made}, now {asked} is asked; add --fresh or choose another --workdir"
        )
    if made is not None:
        print(f"   {split}: records are there")
        return out
    videos = workdir / "videos" / split
    shutil.rmtree(videos, ignore_errors=True)
    manifest = generate(videos, count, seed)
    report = prepare(read_manifest(manifest), out, spec, overwrite=True, label=f"records for {split}")
    if report.rejected:
        raise ConfigError(
            f"{len(report.rejected)} generated videos were rejected; see {out / 'rejected.jsonl'}"
        )
    stamp.write_text(json.dumps(asked))
    return out


def stage_config(workdir: Path, seed: int, resampler: str) -> ConfigDict:
    """configs/savenvideo.py:size=demo on this workdir's records, with AVTS or with its MLP ablation."""
    base = load_config(CONFIG)
    overrides = [f"seed={seed}", f"model.avts.resampler={resampler}"]
    if resampler == "mlp":
        # All that the perceptrons give reaches the prompt: one token a frame, a window and a time slot, so it is longer.
        overrides += ["model.avts.visual_pool=frame", "model.avts.freq_pool=window"]
        shortest = num_media_tokens(base)
        more = num_media_tokens(load_config(CONFIG, overrides)) - shortest
        overrides.append(f"text.max_length={base.text.max_length + more}")
        overrides += [
            f"stage.{name}.max_length={base.stage[name].max_length + more}"
            for name in base.stages
            if base.stage[name].max_length
        ]
    for name in base.stages:
        for source in base.stage[name].sources:
            overrides.append(f"stage.{name}.sources.{source}.records={workdir / 'records' / 'train'}")
    return load_config(CONFIG, overrides)


def num_media_tokens(config: ConfigDict) -> int:
    """Media tokens in a prompt of this configuration."""
    return build_system(config, media_token_id=0).num_media_tokens


def run_demo(workdir: Path, seed: int, train_videos: int, test_videos: int) -> dict[str, Any]:
    """The whole demo; returns what it wrote to demo_report.json."""
    clock = Clock()
    spec = to_dataclass(MediaSpec, load_config(CONFIG).media, "media")
    with clock.part("data", f"{train_videos + test_videos} videos with sound, decoded into records"):
        records_of(workdir, "train", train_videos, seed, spec)
        test_records = records_of(workdir, "test", test_videos, seed + TEST_SEED, spec)
    models: dict[str, Model] = {}
    for kind, folder, title in (
        ("avts", "full", "AVTS resampler"),
        ("mlp", "mlp_resampler", "MLPs in its place"),
    ):
        with clock.part(f"train_{kind}", f"training: four stages, {title}"):
            finals = train(stage_config(workdir, seed, kind), workdir / folder)
            models[kind] = load_model(list(finals.values())[-1])
    rows: dict[str, dict[str, Any]] = {}
    with clock.part("evaluate", "held-out questions on unseen videos"):
        for name, (kind, modalities) in ROWS.items():
            found = evaluate(
                models[kind].assembly,
                models[kind].params,
                test_records,
                modalities=modalities,
                out_dir=workdir / "predictions" / name,
                protocol=PROTOCOL,
                max_new_tokens=ANSWER_TOKENS,
                model=models[kind].name,
                label=TITLES[name],
            )
            rows[name] = found
    picture = draw_timeline(workdir, models["avts"], test_records)
    report = {
        "rows": rows,
        "seconds": round(clock.total, 1),
        "seconds_by_part": clock.parts,
        "seed": seed,
        "videos": {"train": train_videos, "test": test_videos},
        "versions": versions() | {"devices": [str(d) for d in jax.devices()], "cores": os.cpu_count()},
        "picture": str(picture),
    }
    (workdir / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + comparison_table({TITLES[name]: row for name, row in rows.items()}))
    return report


def draw_timeline(workdir: Path, model: Model, records: Path) -> Path:
    """A picture of the first test video: what happens, and what the resampler looks at."""
    path = workdir / TIMELINE
    save_timeline(
        path,
        model.assembly,
        model.params,
        records,
        annotations=workdir / "videos" / "test" / "annotations.json",
    )
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`avlm demo`'s arguments."""
    parser.description = (
        "SAVEnVideo end to end on generated videos: records, the four-stage recipe, evaluation with and without picture and "
        "sound, a table and a picture. About ten minutes on two CPU cores; run it from a clone of the repository."
    )
    parser.add_argument(
        "--workdir", default="runs/demo", metavar="DIR", help="everything goes there (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of videos, order and weights (default: %(default)s)"
    )
    parser.add_argument(
        "--train-videos", type=int, default=TRAIN_VIDEOS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--test-videos", type=int, default=TEST_VIDEOS, metavar="N", help="five questions each"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="delete the workdir first instead of continuing in it"
    )
    parser.add_argument(
        "--make-backbones",
        metavar="DIR",
        nargs="?",
        const=str(BACKBONES),
        help="train the three tiny backbones anew instead (about an hour on two cores); DIR defaults to the shipped ones",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    enable_compilation_cache()
    if args.make_backbones:
        from avlm_jax.backbones.make import make_backbones

        make_backbones(load_config(CONFIG), Path(args.make_backbones))
        return 0
    workdir = Path(args.workdir)
    if args.fresh:
        shutil.rmtree(workdir, ignore_errors=True)
    report = run_demo(workdir, args.seed, args.train_videos, args.test_videos)
    print(f"\n{workdir / REPORT} and {report['picture']} written; {report['seconds']:.0f} s in all")
    video = min((workdir / "videos" / "test" / "videos").glob("*.mp4"))
    checkpoint = workdir / "full" / "2b" / "final"
    print(
        f'Ask about any video: .venv/bin/avlm ask {video} "What is heard, in order?" --checkpoint {checkpoint}'
    )
    return 0
