"""A run's metrics as one picture: loss, learning rate, speed, waiting for data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avlm_jax.monitoring.writer import read_metrics

PLOT_FILE = "training.png"
PANELS = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_s": "tokens/s",
    "data_wait": "share of the time that was spent waiting for data",
    "skipped": "steps skipped so far",
}


def save_training_plot(directory: Path) -> Path | None:
    """Draws <directory>/metrics.jsonl as PNG beside it and returns its path; None where no step was logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(directory)
    if not lines:
        return None
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 2, sharex=True)
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        axis.set_title(title, fontsize=11, loc="left")
        axis.grid(color="0.9")
        points = [(line["step"], line[name]) for line in lines if is_number(line.get(name))]
        if points:
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "", linewidth=1.2)
        else:
            axis.text(0.5, 0.5, "none logged", transform=axis.transAxes, ha="center", color="0.5")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(f"{directory.parent.name}, stage {directory.name}", x=0.01, ha="left")
    path = directory / PLOT_FILE
    figure.savefig(path, dpi=100)
    return path


def is_number(value: Any) -> bool:
    """False for what is missing and for the strings that stand for NaN and infinities."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
