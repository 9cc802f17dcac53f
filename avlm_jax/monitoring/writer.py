"""Metrics of a run: JSON lines always, TensorBoard where tensorboardX is installed, Weights & Biases where a project is
named, progress on the console.

The trace of a run that was killed and continued equals the undisturbed one's: lines written after the
checkpoint it continues from are dropped, because those steps are run again.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from input_pipeline.errors import UserError

METRICS_FILE = "metrics.jsonl"
WANDB_FILE = "wandb_run_id"
PLAIN_LINE_SECONDS = 10.0  # How often a log file gets a line when there is no terminal to draw a bar on.


class MetricsWriter:
    """Writes scalars per step to <directory>/metrics.jsonl and, if possible, to TensorBoard event files
    beside it.

    A line is in the hands of the operating system when `write_scalars` returns, so SIGKILL loses none. A loop
    that reads metrics one step late has to write those of a step before it saves that step's checkpoint; else
    a continued run would never have them.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        resume_step: int | None = None,
        tensorboard: bool = True,
        *,
        enabled: bool = True,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the files.

        Args:
            directory: made if missing.
            resume_step: step of the checkpoint the run continues from; later lines are dropped. None: a fresh
                run, an existing file is emptied.
            tensorboard: False writes JSON lines only.
            enabled: False writes nothing: of a run's processes only one writes.
            wandb: project of Weights & Biases; empty for none. A run that continues from a checkpoint goes on under the
                id it had, which lies in the directory; steps that are run again W&B leaves as they were.
            config: what W&B shows as the run's configuration.

        Raises:
            UserError: W&B is wanted but not installed, or $WANDB_API_KEY is not set.
        """
        self._path = Path(directory) / METRICS_FILE
        self._file: TextIO | None = None
        self._tensorboard = self._wandb = None
        if not enabled:
            return
        if wandb:
            self._wandb = _open_wandb(wandb, self._path.parent, resume_step, config or {})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        if tensorboard:
            self._tensorboard = _open_tensorboard(self._path.parent, resume_step)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds one line {"step": step, name: value, ...}.

        Args:
            step: finished optimizer updates.
            scalars: Python, numpy or device scalars and short strings. NaN and infinities, which JSON lacks,
                become the strings "nan", "inf" and "-inf"; float32 values come back exactly.
        """
        if self._file is None:
            return
        values = {name: _to_json(value) for name, value in scalars.items()}
        self._file.write(json.dumps({"step": int(step), **values}, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(name, value, int(step))
        if self._wandb is not None:
            self._wandb.log(values, step=int(step))

    def sync(self) -> None:
        """Returns when all lines are on the disk, or in the bucket that is mounted there."""
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        self._file.close()  # A mounted bucket takes a file when it is closed.
        self._file = self._path.open("a", encoding="utf-8")
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self, *, failed: bool = False) -> None:
        """Closes the files; W&B shows a run that failed as such."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=1 if failed else 0)
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; an incomplete last line (a killed run's) is left out."""
    return [line for _, line in _complete_lines(Path(directory) / METRICS_FILE)]


def _complete_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                line["step"] = int(line["step"])
            except (ValueError, KeyError, TypeError) as error:
                if not text.endswith("\n"):
                    return
                raise ValueError(f"{path}, line {number} is no metrics line: {text[:80]!r}") from error
            if text.endswith("\n"):
                yield text, line


def _drop_after(path: Path, resume_step: int | None) -> None:
    """Rewrites the file by one rename: a kill in between leaves the old or the new one, never half of it."""
    if not path.exists():
        return
    kept = (
        []
        if resume_step is None
        else [text for text, line in _complete_lines(path) if line["step"] <= resume_step]
    )
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def _open_tensorboard(directory: Path, resume_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    # purge_step hides what earlier event files say about the steps that are run again.
    return SummaryWriter(str(directory), purge_step=0 if resume_step is None else resume_step + 1)


def import_wandb(project: str) -> Any:
    """The module, once it is sure to work.

    Raises:
        UserError: it is not installed, or $WANDB_API_KEY is not set.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"config.watch.wandb is {project!r}, but wandb is not installed; pip install 'avlm_jax[wandb]', or leave "
            "config.watch.wandb empty"
        ) from error
    offline = os.environ.get("WANDB_MODE", "") in ("offline", "disabled", "dryrun")
    if not offline and not os.environ.get("WANDB_API_KEY"):
        # Else wandb would ask for it on the terminal, and a run without one would wait for ever.
        raise UserError(
            f"config.watch.wandb is {project!r}, but the environment has no WANDB_API_KEY; set it, or WANDB_MODE=offline"
        )
    return wandb


def _open_wandb(project: str, directory: Path, resume_step: int | None, config: Mapping[str, Any]) -> Any:
    wandb = import_wandb(project)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / WANDB_FILE
    if resume_step is None or not file.exists():  # A run that begins at step 1 is another one.
        file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return wandb.init(
        project=project,
        id=file.read_text(encoding="utf-8").strip(),
        resume="allow",
        name=f"{directory.parent.name}/{directory.name}",
        dir=str(directory),
        config=dict(config),
    )


def _to_json(value: Any) -> int | float | str | bool | None:
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    number = np.asarray(value)
    if number.size != 1:
        raise ValueError(f"a metric must be a scalar, this one has shape {number.shape}")
    plain = number.reshape(()).item() if number.dtype.kind in "biuf" else float(number.reshape(()))
    if isinstance(plain, float) and not math.isfinite(plain):
        return str(plain)
    return plain


class Console:
    """Progress of a training run on stderr: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(
        self, total_steps: int, *, start_step: int = 0, label: str = "train", stream: TextIO | None = None
    ) -> None:
        """Begins to show.

        Args:
            total_steps: steps of the whole run.
            start_step: steps an earlier process has done; they do not enter speed and time left.
            label: what is running, e.g. "stage 2a".
            stream: stderr unless given.
        """
        self._stream = stream if stream is not None else sys.stderr
        self._total, self._start, self._step, self._label = total_steps, start_step, start_step, label
        self._samples = 0
        self._began = self._last_line = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                desc=label,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
            )

    def update(self, step: int, samples: int, loss: float | None = None) -> None:
        """Tells that `step` steps are done.

        Args:
            step: finished steps, counted from the run's beginning.
            samples: samples that were processed since the last call.
            loss: the newest one known, or None.
        """
        self._samples += samples
        advanced, self._step = step - self._step, step
        now = time.monotonic()
        if self._bar is not None:
            shown = {"loss": f"{loss:.4f}"} if loss is not None else {}
            self._bar.set_postfix({**shown, "samples/s": f"{self._rate(now):.1f}"}, refresh=False)
            self._bar.update(advanced)
        elif now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            self._print(self._line(now, loss))

    def close(self) -> None:
        """Ends the bar, or prints a last line."""
        if self._bar is not None:
            self._bar.close()
        else:
            now = time.monotonic()
            seconds = now - self._began
            self._print(
                f"{self._label}: {self._step}/{self._total} steps in {seconds:.1f} s, "
                f"{self._rate(now):.1f} samples/s"
            )

    def _rate(self, now: float) -> float:
        return self._samples / max(now - self._began, 1e-9)

    def _line(self, now: float, loss: float | None) -> str:
        steps_per_second = (self._step - self._start) / max(now - self._began, 1e-9)
        left = (self._total - self._step) / steps_per_second if steps_per_second > 0 else math.inf
        parts = [f"{self._label}: {self._step}/{self._total} steps"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        parts.append(f"{self._rate(now):.1f} samples/s")
        if math.isfinite(left):
            parts.append(f"{left:.0f} s left")
        return ", ".join(parts)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
