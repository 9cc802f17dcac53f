"""Folders of records for tests that do not care how they are made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from input_pipeline.records import finish_records, write_shard
from input_pipeline.spec import MediaSpec
from input_pipeline.working_folder import WorkingFolder


def write_folder(
    out_dir: str | os.PathLike[str],
    spec: MediaSpec,
    records: Iterable[bytes],
    *,
    manifest_lines: int,
    shards: int = 1,
    plan: str = "test",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes records, made by `encode_record`, into shards of about equal length; returns the manifest."""
    records = list(records)
    with WorkingFolder(out_dir, plan, overwrite=overwrite) as work:
        parts = [
            records[i * len(records) // shards : (i + 1) * len(records) // shards] for i in range(shards)
        ]
        entries = [write_shard(work.path, index, shards, part) for index, part in enumerate(parts)]
        manifest = finish_records(work.path, spec, entries, plan=plan, manifest_lines=manifest_lines)
        work.put_in_place()
    return manifest
