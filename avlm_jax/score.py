"""Scores a file of predictions; needs neither a model nor JAX.

Prints accuracy = correct/total, where an answer without a letter counts as wrong, and correct/answered beside
it.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avlm_jax import __version__
from avlm_jax.evals.multiple_choice import (
    EXTRACTORS,
    MISSING_POLICIES,
    format_report,
    score_multiple_choice,
)
from avlm_jax.evals.predictions import (
    PredictionError,
    Reference,
    read_predictions,
    read_references,
    reference_of_sample,
)
from input_pipeline.records import RecordReader, unpack_record

REFERENCES = "references.jsonl"  # What `avlm evaluate` writes beside its predictions.

EPILOG = """\
examples:
  avlm score runs/mine/predictions.jsonl
  avlm score answers.jsonl --references runs/demo/records/test --protocol strict --missing zero

A prediction is a line of JSON:
  {"schema": 1, "benchmark": "test", "task": "mcq", "item_key": "v0-q1", "video_id": "v0", "prompt": "...",
   "response": "bell (B)", "model": "...", "decoding": {"method": "greedy"}, "n_frames": 16,
   "modalities": ["video", "audio"]}
and a reference:
  {"schema": 1, "item_key": "v0-q1", "video_id": "v0", "answer": "B",
   "options": ["drum", "bell", "buzz", "siren"], "type": "1"}

exit codes:
  0 every item has an answer; 1 some are missing or failed, and --missing let that pass; 2 the files cannot be used
"""


def references_of_records(records: str | Path, tasks: Sequence[str] = ("mcq",)) -> list[Reference]:
    """The references in a folder of records, in order; no picture or sound is decoded.

    Raises:
        UserError: no records are there, none of those tasks, or one that is no multiple-choice question.
    """
    reader = RecordReader(records)
    found, number, record = [], -1, {}
    for line in reader.samples:
        if line["task"] not in tasks:
            continue
        if line["record"] != number:
            number, record = line["record"], unpack_record(reader[line["record"]])
        found.append(reference_of_sample(record["samples"][line["sample"]], record["id"]))
    reader.close()
    if not found:
        known = sorted({line["task"] for line in reader.samples})
        raise PredictionError(f"{records} has no sample of the tasks {list(tasks)}; its tasks are {known}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`avlm score`'s arguments."""
    parser.add_argument(
        "predictions", metavar="PREDICTIONS", help="JSON lines, as `avlm evaluate` writes them"
    )
    parser.add_argument(
        "--references",
        metavar="FILE_OR_DIR",
        help=f"JSON lines, or a folder of records (default: {REFERENCES} beside the predictions)",
    )
    parser.add_argument(
        "--tasks", default="mcq", metavar="A,B", help="of a folder of records (default: %(default)s)"
    )
    parser.add_argument(
        "--protocol",
        default="official",
        choices=sorted(EXTRACTORS),
        help="official: Video-MME's, the first capital A-D anywhere; strict: one letter, or one option's text, "
        "stated as the answer "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--missing",
        default="error",
        choices=MISSING_POLICIES,
        help="items without a prediction: refuse, leave out, or count as wrong (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="also write the report there, as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the verb; 1 when items are missing or failed."""
    predictions = read_predictions(args.predictions)
    source = Path(args.references) if args.references else Path(args.predictions).parent / REFERENCES
    if not source.exists():
        raise PredictionError(f"{source} does not exist; --references names a file or a folder of records")
    if source.is_dir():
        tasks = [task.strip() for task in args.tasks.split(",")]
        references = references_of_records(source, tasks)
    else:
        references = read_references(source)
    report = score_multiple_choice(predictions, references, args.protocol, missing=args.missing)
    versions = {"python": platform.python_version(), "avlm_jax": __version__, "numpy": np.__version__}
    report |= {"predictions": str(args.predictions), "references": str(source), "versions": versions}
    print(format_report(report, str(args.predictions)))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written: {args.out}")
    return 1 if report["missing"] or report["errors"] else 0
