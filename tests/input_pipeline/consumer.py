"""A consumer of batches that can be killed: a stand-in for a training process, without a model.

    python -m tests.input_pipeline.consumer PLAN.json

Reads {"records": {...}, "tokenizer": folder, "spec": {...}, "options": {...}, "lives": [...]} and runs one life after
the other. A life is {"processes": P, "workers": W, "threads": T, "steps": n, "killed": bool}: P processes, forked, each
continue at the state in `<folder>/state.json`, take n batches, write the ids they got to `<folder>/log-<process>.jsonl`
and, process 0, save the state every SAVE_EVERY steps. Killed lives end by SIGKILL, in the middle of step n + 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from input_pipeline.conversation import find_media_token_id, load_tokenizer
from input_pipeline.loader import Loader
from input_pipeline.mixture import SourceConfig
from input_pipeline.spec import MediaSpec
from input_pipeline.transforms.sample import SampleBuilder

SAVE_EVERY = 3


def make_loader(plan: dict, builder: SampleBuilder, life: dict, process: int) -> Loader:
    sources = {
        name: SourceConfig(source["records"], weight=source["weight"])
        for name, source in plan["records"].items()
    }
    return Loader(
        sources,
        builder,
        process_index=process,
        process_count=life["processes"],
        workers=life["workers"],
        threads=life["threads"],
        **plan["options"],
    )


def live(folder: Path, loader: Loader, process: int, life: dict, state: dict | None) -> None:
    if state is not None:
        loader.restore(state)
    with open(folder / f"log-{process}.jsonl", "a") as log:
        for step in range(life["steps"] + life["killed"]):
            number = loader.next_batch
            rows = loader.next_rows()
            if step == life["steps"]:
                os.kill(os.getpid(), signal.SIGKILL)
            # What was really read, not what was planned.
            ids = [sample["id"] for sample in rows.samples if sample is not None]
            log.write(json.dumps([number, ids]) + "\n")
            log.flush()
            if process == 0 and loader.next_batch % SAVE_EVERY == 0:
                partial = folder / "state.tmp"
                partial.write_text(json.dumps(loader.state()))
                partial.replace(folder / "state.json")
    loader.close()


def end_workers(group: int) -> None:
    """Worker processes outlive a killed parent, as they do on a host. Python's own that frees their shared memory is left
    to do so: it ends when they have ended.
    """
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            pid = int(entry.name)
            if os.getpgid(pid) == group and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def main(path: str) -> None:
    plan = json.loads(Path(path).read_text())
    folder = Path(path).parent
    tokenizer = load_tokenizer(plan["tokenizer"])
    builder = SampleBuilder(
        MediaSpec(**plan["spec"]), tokenizer, find_media_token_id(tokenizer, 0), 5, plan["length"]
    )
    for life in plan["lives"]:
        children, saved = [], folder / "state.json"
        state = json.loads(saved.read_text()) if saved.exists() else None
        for process in range(life["processes"]):
            # A loader made here would be the same; in the child it is made as a new start makes it.
            if (child := os.fork()) == 0:
                os.setpgrp()
                try:
                    live(folder, make_loader(plan, builder, life, process), process, life, state)
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    os._exit(1)
                os._exit(0)
            children.append(child)
        for child in children:
            status = os.waitpid(child, 0)[1]
            end_workers(child)
            expected = -signal.SIGKILL if life["killed"] else 0
            if os.waitstatus_to_exitcode(status) != expected:
                sys.exit(f"process ended with {os.waitstatus_to_exitcode(status)}, expected {expected}")


if __name__ == "__main__":
    main(sys.argv[1])
