"""Answers the questions of prepared records with a trained checkpoint and scores the answers.

Writes predictions.jsonl, references.jsonl and metrics.json; `avlm score` scores the first two again without a
model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from avlm_jax import __version__
from avlm_jax.assembly import Assembly
from avlm_jax.config import enable_compilation_cache
from avlm_jax.evals.multiple_choice import EXTRACTORS, format_report, score_multiple_choice
from avlm_jax.evals.predictions import Prediction, reference_of_sample, write_rows
from avlm_jax.features import check_readable
from avlm_jax.generate import DEFAULT_NEW_TOKENS, Generator, load_model
from avlm_jax.processes.multihost import Timeouts, gather, initialize, is_first, say
from avlm_jax.processes.preemption import StopSignal
from avlm_jax.sharding import share_of_batch
from input_pipeline.errors import UserError
from input_pipeline.loader import iter_eval, num_eval_batches
from input_pipeline.mixture import MODALITIES, Mixture, SourceConfig, SourceIndex, open_source
from input_pipeline.progress import track
from input_pipeline.records import unpack_record

PREDICTIONS, REFERENCES, METRICS = "predictions.jsonl", "references.jsonl", "metrics.json"
DEFAULT_BATCH_SIZE = 16
TOLD_AT_ONCE = 512  # Answers in a message between processes, which may have 4 MB.

EPILOG = """\
examples:
  avlm evaluate --checkpoint runs/demo/full/2b/final --records runs/demo/records/test \\
      --protocol strict --out runs/mine
  avlm evaluate --checkpoint runs/demo/full/2b/final --records runs/demo/records/test \\
      --protocol strict --out runs/deaf --modalities video
  avlm evaluate --config configs/savenvideo.py:size=7b --checkpoint W/2b/final \\
      --records records/avbench --out W/avbench

Questions come from the records: samples of the tasks with the extra keys "answer" (a letter), "options" (texts)
and, if there are kinds of questions, "qa_type". The exit code is 0 when every question was asked, whatever was
answered.
"""


def evaluate(
    assembly: Assembly,
    params: Mapping[str, Any],
    records: str | Path,
    *,
    tasks: Sequence[str] = ("mcq",),
    modalities: Sequence[str] = MODALITIES,
    out_dir: str | Path | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    limit: int = 0,
    protocol: str = "official",
    model: str = "",
    label: str = "questions",
) -> dict[str, Any]:
    """Asks every question of `records` once, in their order; several processes share them, and each gets the report.

    Args:
        assembly, params: the model; see `generate.load_model`.
        records: folder made by `avlm prepare`, or its features made by `avlm cache-features`.
        tasks: which samples; each needs a letter under "answer" and its texts under "options".
        modalities: what the model is shown, of "video", "audio"; () shows neither. Every question is asked
            whatever its media hold.
        out_dir: gets predictions.jsonl, references.jsonl and metrics.json, from process 0; None writes nothing.
        batch_size: questions per step, over all processes.
        max_new_tokens: per answer.
        limit: only the first so many questions; 0 = all.
        protocol: how a letter is found in an answer; see `score_multiple_choice`.
        model: name that goes into the predictions.
        label: of the progress bar.

    Returns:
        The report of `score_multiple_choice`, with benchmark, tasks, modalities, model, decoding and
        versions.

    Raises:
        UserError: records, tasks or modalities that cannot be used; a sample without answer or that does not
            fit, by id.
        GenerationError: the model gave logits that are not finite.
    """
    if protocol not in EXTRACTORS:
        raise UserError(f"protocol is {protocol!r}; use one of {', '.join(EXTRACTORS)}")
    modalities = tuple(modalities)
    builder = assembly.builder(prompt=True)
    # () takes samples without picture or sound as well: a question that cannot be seen counts all the same.
    index = open_source(SourceConfig(str(records), tuple(tasks), modalities=()), builder.spec)
    check_readable(assembly, index.reader)
    index = _shown(index, SourceConfig(str(records), tuple(tasks), modalities), limit)
    items = [reference_of_sample(sample, video_id) for sample, video_id in _samples(index)]
    generator = Generator(assembly, params, max_new_tokens)
    decoding = {"method": "greedy", "max_new_tokens": max_new_tokens}
    mixture = Mixture((index,), shuffle=False)
    share, shares = share_of_batch(assembly.mesh)
    batches = iter_eval(mixture, builder, batch_size=batch_size, process_index=share, process_count=shares)
    if is_first():
        batches = track(batches, total=num_eval_batches(mixture, batch_size), label=label, unit="batches")
    found: dict[int, Prediction] = {}
    for number, rows in enumerate(batches):
        names = [sample["id"] for sample in rows.samples if sample is not None]
        texts = generator.texts(rows.batch, names)
        shown = rows.batch["frame_mask"].sum(axis=1)
        for row, (text, sample, frames) in enumerate(zip(texts, rows.samples, shown, strict=True)):
            if sample is None:
                continue
            place = number * batch_size + row * shares + share
            found[place] = Prediction(
                benchmark=Path(records).name,
                task=sample.get("task", ""),
                item_key=sample["id"],
                video_id=items[place].video_id,
                prompt=_question(sample),
                response=text,
                model=model or assembly.config.system,
                decoding=decoding,
                n_frames=int(frames),
                modalities=modalities,
            )
    predictions = _of_all_processes(found, len(items))
    report = score_multiple_choice(predictions, items, protocol)
    report |= {
        "benchmark": Path(records).name,
        "tasks": list(tasks),
        "modalities": list(modalities),
        "model": model or assembly.config.system,
        "decoding": decoding,
        "versions": _versions(),
    }
    if out_dir is not None and is_first():
        out = Path(out_dir)
        write_rows(out / PREDICTIONS, predictions)
        write_rows(out / REFERENCES, items)
        (out / METRICS).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _of_all_processes(own: Mapping[int, Prediction], count: int) -> list[Prediction]:
    """`count` predictions in order of their number, each from a process that made it."""
    found = dict(own)
    for start in range(0, count if jax.process_count() > 1 else 0, TOLD_AT_ONCE):
        told = {n: dataclasses.asdict(own[n]) for n in range(start, start + TOLD_AT_ONCE) if n in own}
        for text in gather(f"answers from {start}", json.dumps(told)):
            for number, fields in json.loads(text).items():
                found[int(number)] = Prediction(**{**fields, "modalities": tuple(fields["modalities"])})
    return [found[number] for number in range(count)]


def _shown(index: SourceIndex, config: SourceConfig, limit: int) -> SourceIndex:
    """The index with other modalities to show, cut after `limit` samples."""
    if limit < 0:
        raise UserError(f"limit is {limit}; it is a number of questions, 0 for all")
    end = limit or len(index)
    cut = {name: getattr(index, name)[:end] for name in ("records", "samples", "offsets")}
    return dataclasses.replace(index, config=config, **cut)


def _samples(index: SourceIndex) -> Iterator[tuple[dict[str, Any], str]]:
    """(sample, id of its media) in order; nothing is decoded."""
    number, record = -1, {}
    for wanted, within in zip(index.records.tolist(), index.samples.tolist(), strict=True):
        if wanted != number:
            number, record = wanted, unpack_record(index.reader[wanted])
        yield record["samples"][within], record["id"]


def _question(sample: Mapping[str, Any]) -> str:
    """The last question of a sample, as it stands in its conversation."""
    return [turn["value"] for turn in sample["conversations"] if turn["from"] in ("human", "user")][-1]


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "avlm_jax": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`avlm evaluate`'s arguments."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a finished stage: <workdir>/<stage>/final"
    )
    parser.add_argument("--records", required=True, metavar="DIR", help="folder made by `avlm prepare`")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for predictions and metrics")
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGS]",
        help="configuration by path (default: the one stored with the checkpoint); single keys follow as "
        "--config.key.of.config=value",
    )
    parser.add_argument(
        "--tasks", default="mcq", metavar="A,B", help="which samples of the records (default: %(default)s)"
    )
    parser.add_argument(
        "--modalities",
        default="video,audio",
        choices=("video,audio", "video", "audio", "none"),
        help="what the model is shown (default: %(default)s)",
    )
    parser.add_argument(
        "--protocol",
        default="official",
        choices=sorted(EXTRACTORS),
        help="how a letter is found; strict also takes an option's text (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=DEFAULT_BATCH_SIZE, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N questions")


def run(args: argparse.Namespace) -> int:
    """Runs the verb; 0 when every question was asked."""
    timeouts = Timeouts.of_overrides(args.config_overrides)
    initialize(timeouts)
    enable_compilation_cache()
    with StopSignal(timeouts.grace):
        return _load_and_evaluate(args)


def _load_and_evaluate(args: argparse.Namespace) -> int:
    model = load_model(args.checkpoint, args.config, args.config_overrides)
    report = evaluate(
        model.assembly,
        model.params,
        args.records,
        tasks=[task.strip() for task in args.tasks.split(",") if task.strip()],
        modalities=() if args.modalities == "none" else args.modalities.split(","),
        out_dir=args.out,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        limit=args.limit,
        protocol=args.protocol,
        model=model.name,
    )
    say(format_report(report, f"{report['benchmark']}, shown {args.modalities}"))
    say(f"written: {Path(args.out) / PREDICTIONS}, {METRICS}")
    return 0
