"""What a mixture costs before the first step: opening it, finding positions, counting tokens, planning epochs.

    python benchmarks/mixture.py                        # 1,000 and 100,000 samples
    python benchmarks/mixture.py --samples 1000 1000000

samples.jsonl of that many samples is written, without records: nothing here reads media. Every figure is per sample
where it says so; "held" is what stays in memory per sample, plans of two epochs included. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input_pipeline.conversation import find_media_token_id, load_tokenizer  # noqa: E402
from input_pipeline.lengths import Lengths, compute_lengths  # noqa: E402
from input_pipeline.mixture import Mixture, SourceConfig, open_mixture  # noqa: E402
from input_pipeline.records import MANIFEST, SAMPLES, SCHEMA_VERSION  # noqa: E402
from input_pipeline.schedule import make_plan  # noqa: E402
from input_pipeline.spec import MediaSpec  # noqa: E402
from input_pipeline.transforms.sample import SampleBuilder  # noqa: E402

TOKENIZER = Path(__file__).resolve().parents[1] / "avlm_jax" / "demo_backbones" / "qwen2"
LENGTH, BATCH, MEDIA_TOKENS = 2048, 512, 256
MOST_COUNTED = 20_000  # Tokens are counted of so many samples; the time is per sample.
MODES: dict[str, dict[str, Any]] = {"plain": {}, "buckets": {"buckets": (512, 1024)}, "packed": {"pack": 4}}


def write_index(folder: Path, count: int) -> Path:
    """A folder as `avlm prepare` leaves it, but without shards: two samples a record, texts of all lengths."""
    folder.mkdir(parents=True)
    with open(folder / SAMPLES, "w", encoding="utf-8") as file:
        for number in range(count):
            question = "<video>\nAt 00:01, which sound is heard while the red circle moves?" + " so" * (
                number % 40
            )
            turns = [
                {"from": "human", "value": question},
                {"from": "gpt", "value": "a bell (B)" + " and more" * (number % 60)},
            ]
            row = {
                "record": number // 2,
                "sample": number % 2,
                "id": f"v{number}",
                "task": "mcq",
                "source": "made",
            }
            row |= {"has_video": True, "has_audio": number % 3 > 0, "conversations": turns}
            file.write(json.dumps(row) + "\n")
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "media_spec": dataclasses.asdict(MediaSpec()),
        "counts": {"samples": count, "records": -(-count // 2)},
        "shards": [],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def seconds(function: Any, repeat: int = 1) -> tuple[float, Any]:
    """(time of one call, its last result)."""
    begun = time.perf_counter()
    for _ in range(repeat):
        result = function()
    return (time.perf_counter() - begun) / repeat, result


def measure_index(folder: Path, count: int) -> dict[str, float]:
    """Opening a mixture and finding positions in it."""
    opening, mixture = seconds(lambda: open_mixture({"made": SourceConfig(str(folder))}))
    tracemalloc.start()
    open_mixture({"made": SourceConfig(str(folder))})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    mixture.at(0)
    positions = iter(np.random.default_rng(0).integers(0, count, 2000).tolist())
    finding, _ = seconds(lambda: mixture.at(next(positions)), 2000)
    tokens = SampleBuilder(
        MediaSpec(),
        load_tokenizer(TOKENIZER),
        find_media_token_id(load_tokenizer(TOKENIZER), 0),
        MEDIA_TOKENS,
        LENGTH,
    )
    some = mixture.sources[0].only(slice(0, MOST_COUNTED))
    counting, _ = seconds(lambda: compute_lengths(some, tokens))
    return {
        "open_us_per_sample": 1e6 * opening / count,
        "open_peak_bytes_per_sample": peak / count,
        "position_us": 1e6 * finding,
        "count_tokens_us_per_sample": 1e6 * counting / len(some),
    }


def measure_plans(mixture: Mixture, count: int) -> dict[str, dict[str, float]]:
    """Planning the first epoch of each mode, and finding rows in it."""
    drawn = np.random.default_rng(0).lognormal(5, 0.9, count) + MEDIA_TOKENS
    tokens = np.minimum(drawn, LENGTH).astype(np.int32)
    found = {}
    for mode, options in MODES.items():
        tracemalloc.start()
        plan = make_plan(mixture, [Lengths(tokens, tokens)], batch_size=BATCH, length=LENGTH, **options)
        planning, _ = seconds(lambda plan=plan: plan.row(0, 0))
        plan.row(int(plan.batches_in(1.5)), 0)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        rows = iter(range(BATCH))
        finding, _ = seconds(lambda plan=plan, rows=rows: plan.row(1, next(rows)), BATCH)
        fill = plan.fill()
        found[mode] = {
            "plan_seconds": planning,
            "row_us": 1e6 * finding,
            "held_bytes_per_sample": held / count,
            "text_filled": fill.text,
            "clips_filled": fill.clips,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 100_000], metavar="N")
    results = []
    for count in parser.parse_args().samples:
        with tempfile.TemporaryDirectory() as place:
            folder = write_index(Path(place) / "records", count)
            index = measure_index(folder, count)
            plans = measure_plans(open_mixture({"made": SourceConfig(str(folder))}), count)
        results.append({"samples": count, **index, "plans": plans})
        print(f"{count} samples: " + ", ".join(f"{name} {value:.1f}" for name, value in index.items()))
        for mode, values in plans.items():
            print(f"  {mode:8}" + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))
    print(json.dumps({"benchmark": "mixture", "results": results}))


if __name__ == "__main__":
    main()
