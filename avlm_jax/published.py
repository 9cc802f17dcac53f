"""What a training run has published below its workdir: stages, which came out of which, and how they were scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avlm_jax.checkpoints.stage_result import METADATA_FILE
from avlm_jax.evaluate import METRICS
from input_pipeline.errors import UserError


class StageNotFound(UserError):
    """A workdir lacks the finished stage that is asked for, or its record is damaged."""


def find_stage(workdir: Path, stage: str | None) -> Path:
    """The published folder of a stage in a workdir; without a name that of the last one.

    Raises:
        StageNotFound: there is none, or several end a lineage.
    """
    finals = {
        path.parent.parent.name: path.parent for path in sorted(workdir.glob(f"*/final/{METADATA_FILE}"))
    }
    known = ", ".join(finals) or "none"
    if stage is not None:
        if stage not in finals:
            raise StageNotFound(f"{workdir} has no finished stage {stage!r} (finished: {known})")
        return finals[stage]
    if not finals:
        raise StageNotFound(
            f"{workdir} has no finished stage, <stage>/final/{METADATA_FILE}; --workdir is the folder that `avlm train` "
            "was given"
        )
    read = {name: _read_metadata(final) for name, final in finals.items()}
    parents = {
        metadata.get("parent") for metadata in read.values() if metadata.get("parent") != metadata["hash"]
    }
    last = [name for name, metadata in read.items() if metadata["hash"] not in parents]
    if len(last) != 1:
        raise StageNotFound(f"{workdir} has several last stages: {', '.join(last)}; choose one with --stage")
    return finals[last[0]]


def _read_metadata(final: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((final / METADATA_FILE).read_text(encoding="utf-8"))
        return {**metadata, "hash": str(metadata["hash"])}
    except (ValueError, KeyError, TypeError) as error:
        raise StageNotFound(
            f"{final / METADATA_FILE} is damaged ({error!r}); copy the checkpoint again"
        ) from error


def find_lineage(workdir: Path, metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Metadata of the stages in `workdir` that a stage descends from, oldest first."""
    by_hash = {}
    for file in workdir.glob(f"*/final/{METADATA_FILE}"):
        found = _read_metadata(file.parent)
        by_hash[found["hash"]] = found
    lineage: list[dict[str, Any]] = []
    parent = metadata.get("parent")
    while parent in by_hash:
        found = by_hash.pop(parent)  # Taken out, so that a forged circle ends.
        lineage.insert(0, found)
        parent = found.get("parent")
    return lineage


def find_reports(workdir: Path, checkpoint_hash: str) -> list[dict[str, Any]]:
    """Reports of `avlm evaluate` below `workdir` on the checkpoint with that hash."""
    reports = []
    for file in sorted(workdir.rglob(METRICS)):
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        # `generate.Model.name` ends in the first digits of the hash.
        name = str(report.get("model", "")) if isinstance(report, dict) else ""
        if name.rpartition("/")[2] == checkpoint_hash[:12]:
            reports.append(report)
    return reports
