"""What people look at: the table that compares an experiment's rows, the picture of one video's timeline."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from avlm_jax.assembly import Assembly
from avlm_jax.connectors.avts import pooled_grid
from avlm_jax.evals.multiple_choice import percent
from avlm_jax.generate import Generator
from input_pipeline.conversation import PLACEHOLDERS
from input_pipeline.errors import UserError
from input_pipeline.records import RecordReader
from input_pipeline.spec import FBANK_FRAME_LENGTH, FBANK_FRAME_SHIFT, SAMPLE_RATE
from input_pipeline.transforms.intervals import interval_source, parse_intervals
from input_pipeline.transforms.media import decode_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AUDIO_BINS = 400  # Columns of the sound's heat map; more than a screen shows apart.
SEEN, HEARD, ASKED = "#4878a8", "#c8743c", "#3a9a5b"


def comparison_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of an experiment as text that lines up.

    Args:
        rows: title -> a report with "accuracy" (0..1 or None), "n" and "ci95" ([low, high] or None), as
            `evaluate` returns it; "unparsed" and "protocol" are shown if they are there.
    """
    head = ("", "accuracy", "95 % interval", "questions", "unparsed")
    cells = [head]
    for title, row in rows.items():
        interval = row["ci95"]
        spelt = "-" if interval is None else f"{100 * interval[0]:5.1f} to {100 * interval[1]:5.1f} %"
        cells.append((title, percent(row["accuracy"]), spelt, str(row["n"]), str(row.get("unparsed", "-"))))
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    protocols = sorted({str(row["protocol"]) for row in rows.values() if "protocol" in row})
    if protocols:
        lines.append(f"accuracy: right answers of all questions; protocol {', '.join(protocols)}")
    return "\n".join(lines)


class ResamplerAttention(NamedTuple):
    """How each query of the resampler divides its attention; the three sum to 1 per query,
    or to 0 for a query that may read nothing.

    Attributes:
        over_frames: f32 [m t], summed over the patches of a frame.
        over_audio: f32 [m w*steps], summed over the mel rows of a time step; one step a window where freq_pool is
            "window".
        over_time: f32 [m n], over the time tokens.
    """

    over_frames: np.ndarray
    over_audio: np.ndarray
    over_time: np.ndarray


def resampler_attention(
    assembly: Assembly, params: Mapping[str, Any], batch: Mapping[str, np.ndarray], row: int = 0
) -> ResamplerAttention:
    """Cross-attention of the AVTS resampler on one row of a batch, mean over its layers and heads.

    Raises:
        UserError: the system has no attending resampler (model.avts.resampler is "mlp").
    """
    system = assembly.system

    @jax.jit
    def attend(params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        tokens, state = system.apply(
            {"params": params}, batch, method="media_tokens", mutable=["intermediates"]
        )
        return tokens.mask, state

    one = {key: value[row : row + 1] for key, value in batch.items()}
    mask, state = attend(params, one)
    sown = state.get("intermediates", {}).get("connector", {}).get("resampler", {})
    layers = [np.asarray(layer["cross"]["weights"][0][0], np.float32) for layer in sown.values()]
    if not layers:
        raise UserError(
            "this system's connector does not attend (model.avts.resampler is 'mlp'): no attention to show"
        )
    weights = np.mean(layers, axis=0)
    # A query that may read nothing has the same weight everywhere, and uses none of it; what a masked one reads is lost.
    used = (np.ptp(weights, axis=1, keepdims=True) > 0) & np.asarray(mask[0])[:, None]
    weights = np.where(used, weights, 0.0)
    spec = system.spec
    patches = pooled_grid(system.vision_config.grid, system.avts_config.visual_pool) ** 2
    mel_rows = system.audio_config.mel_rows
    steps = system.audio_config.num_tokens(spec.window_frames) // mel_rows
    pool = system.avts_config.freq_pool
    rows = mel_rows if pool == "none" else 1
    ends = np.cumsum(
        [spec.num_frames * patches, spec.max_windows * (1 if pool == "window" else steps * rows)]
    )
    seen, heard, time = np.split(weights, ends, axis=1)
    queries = len(weights)
    return ResamplerAttention(
        seen.reshape(queries, spec.num_frames, patches).sum(axis=2),
        heard.reshape(queries, -1, rows).sum(axis=2),
        time,
    )


@dataclasses.dataclass(frozen=True)
class Happening:
    """Something that is seen or heard in a video.

    Attributes:
        start, end: seconds.
        label: a few words.
        kind: "visual" or "sound".
    """

    start: float
    end: float
    label: str
    kind: str


def happenings(annotation: Mapping[str, Any]) -> list[Happening]:
    """What an annotation in SAVEn-Vid's form tells of its clips; "nothing" to see and "silence" are left out.

    Captions begin "From <start> to <end>, we can see (hear) "; labels are what follows.
    """
    found = []
    for clip in annotation["clips"]:
        for key, kind, verb, empty in (
            ("visual", "visual", "see ", "nothing"),
            ("audio", "sound", "hear ", "silence"),
        ):
            label = clip[key].partition(f"we can {verb}")[2].rstrip(".") or clip[key]
            if label != empty:
                found.append(Happening(clip["start"], clip["end"], label, kind))
    return found


def save_timeline(
    path: str | Path,
    assembly: Assembly,
    params: Mapping[str, Any],
    records: str | Path,
    *,
    annotations: str | Path | None = None,
    sample_id: str | None = None,
    task: str = "mcq",
    max_new_tokens: int = 32,
) -> Path:
    """Asks one question of a folder of records and draws what the model looked at as PNG.

    Args:
        path: of the picture.
        assembly, params: the model.
        records: folder made by `avlm prepare`.
        annotations: JSON list in SAVEn-Vid's form; what it tells of the video is drawn as bars.
        sample_id: of the question; default: the first one of `task` that names a time, or else the first one.
        task: see `sample_id`.
        max_new_tokens: of the answer.

    Raises:
        UserError: no such sample; a system without attention.
    """
    reader = RecordReader(records, assembly.system.spec)
    record, sample = _find_sample(reader, sample_id, task)
    builder = assembly.builder(prompt=True)
    row = builder.build(record, sample)
    batch = {key: value[None] for key, value in row.arrays.items()}
    answer = Generator(assembly, params, max_new_tokens).texts(batch, [sample["id"]])[0]
    right = [turn["value"] for turn in sample["conversations"] if turn["from"] in ("gpt", "assistant")][-1:]
    known: list[Happening] = []
    if annotations is not None:
        for annotation in json.loads(Path(annotations).read_text(encoding="utf-8")):
            if any(question["id"] == sample["id"] for question in annotation["qa"]):
                known = happenings(annotation)
    question = [turn["value"] for turn in sample["conversations"] if turn["from"] in ("human", "user")][-1]
    draw_timeline(
        path,
        row.arrays,
        resampler_attention(assembly, params, batch),
        groups=_query_groups(assembly),
        happenings=known,
        asked=parse_intervals(interval_source(question), float(row.arrays["duration"]), 99),
        name=record["id"],
        question=question,
        answer=answer,
        right=right[0] if right else None,
    )
    return Path(path)


def _find_sample(
    reader: RecordReader, sample_id: str | None, task: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    if reader.features.video:
        raise UserError(
            f"{reader.directory} holds features and no pictures; name the records they were made from"
        )
    lines = [line for line in reader.samples if sample_id in (None, line["id"]) and line["task"] == task]
    if not lines:
        raise UserError(f"{reader.directory} has no sample {sample_id or ''} of the task {task!r}")
    first = None
    for line in lines[:20]:
        record = decode_record(reader[line["record"]], reader.spec)
        sample = record["samples"][line["sample"]]
        first = first or (record, sample)
        stem = interval_source(sample["conversations"][0]["value"])
        if sample_id is not None or parse_intervals(stem, float(record["duration"]), 99):
            return record, sample
    assert first is not None
    return first


def _query_groups(assembly: Assembly) -> int:
    """How many rows the heat maps get: one per group of queries, or per query where there are no groups."""
    config = assembly.system.avts_config
    return assembly.system.spec.num_frames if config.scope == "per_frame" else config.num_queries


def draw_timeline(
    path: str | Path,
    row: Mapping[str, np.ndarray],
    attention: ResamplerAttention,
    *,
    groups: int,
    happenings: Sequence[Happening] = (),
    asked: Sequence[tuple[float, float]] = (),
    name: str = "",
    question: str = "",
    answer: str = "",
    right: str | None = None,
) -> None:
    """Draws one video's timeline: frames, what happens, and the resampler's attention over frames and sound.

    Args:
        path: of the PNG; its folder is made.
        row: the media arrays of one batch row (without the batch axis).
        attention: of the same row.
        groups: rows of the heat maps; consecutive queries are averaged.
        happenings: bars of what is seen and heard.
        asked: time ranges that the question names, in seconds; drawn as a shade over everything.
        name: of the video; question, answer, right: for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # An image, whose duration is 0, still needs a width.
    duration = float(row["duration"]) or 1.0
    figure = Figure(figsize=(14, 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = (1.0, 1.3, 2.6, 2.6)
    grid = figure.add_gridspec(4, 2, height_ratios=ratios, width_ratios=(60, 1))
    axes = [figure.add_subplot(grid[0, 0])]
    axes += [figure.add_subplot(grid[line, 0], sharex=axes[0]) for line in range(1, 4)]
    _draw_frames(axes[0], row, duration)
    _draw_bars(axes[1], happenings, duration)

    def grouped(weights: np.ndarray) -> np.ndarray:
        return weights.reshape(groups, -1, weights.shape[1]).mean(axis=1)

    live = max(1, int((sum(part.sum(axis=1) for part in attention) > 0).sum()))
    shares = [float(part.sum()) / live for part in attention]
    frames = int(row["frame_mask"].sum())
    edges, values = _frame_cells(
        row["frame_times"][:frames], grouped(attention.over_frames)[:, :frames], duration
    )
    audio_edges, audio_values = _audio_cells(row, grouped(attention.over_audio), duration)
    for line, what, edges_, values_, share in (
        (2, "frames", edges, values, shares[0]),
        (3, "sound", audio_edges, audio_values, shares[1]),
    ):
        axis = axes[line]
        axis.set_ylabel("query group" if groups < attention.over_frames.shape[0] else "query", fontsize=11)
        axis.set_title(f"attention over {what}: {100 * share:.0f} % of all", fontsize=12, loc="left")
        if values_.size == 0 or not np.isfinite(values_).any():
            axis.text(0.5, 0.5, f"no {what}", transform=axis.transAxes, ha="center", fontsize=14, color="0.5")
            figure.add_subplot(grid[line, 1]).set_axis_off()
            continue
        mesh = axis.pcolormesh(edges_, np.arange(groups + 1) - 0.5, values_, cmap="viridis", vmin=0)
        axis.set_facecolor("0.9")
        axis.invert_yaxis()
        bar = figure.colorbar(mesh, cax=figure.add_subplot(grid[line, 1]))
        bar.set_label("share of attention", fontsize=10)
    for number, axis in enumerate(axes):
        axis.set_xlim(0, duration)
        axis.tick_params(labelsize=10, labelbottom=number == 3)
        for start, end in asked if number else ():
            width = max(end - start, duration / 200)  # A moment is a line.
            axis.axvspan(start, start + width, facecolor="none", edgecolor=ASKED, linewidth=2, linestyle="--")
    axes[3].set_xlabel(f"seconds (time tokens get {100 * shares[2]:.0f} % of the attention)", fontsize=11)
    figure.suptitle(_title(name, question, answer, right, asked), x=0.01, ha="left", fontsize=12)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")


def _title(
    name: str, question: str, answer: str, right: str | None, asked: Sequence[tuple[float, float]]
) -> str:
    for placeholder in PLACEHOLDERS:
        question = question.replace(placeholder, "")
    lines = [part for line in question.strip().splitlines() for part in textwrap.wrap(line, 130)]
    says = f"model: {answer or '(nothing)'}"
    says += "" if right is None else f"      right: {right}"
    named = [f"{start:.2f} to {end:.2f} s" for start, end in asked]
    says += f"      asked about (dashed): {', '.join(named)}" if named else ""
    # matplotlib reads a pair of dollar signs as mathematics.
    return "\n".join([name, *lines, *textwrap.wrap(says, 130)]).replace("$", r"\$")


def _draw_frames(axis: Axes, row: Mapping[str, np.ndarray], duration: float) -> None:
    count = int(row["frame_mask"].sum())
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    width = 0.95 * duration / max(count, 10)
    for frame, time in zip(row["frames"][:count], row["frame_times"][:count], strict=True):
        left = min(max(float(time) - width / 2, 0.0), duration - width)
        axis.imshow(frame, extent=(left, left + width, 0, 1), aspect="auto", interpolation="nearest")
    if not count:
        axis.text(0.5, 0.5, "no picture", transform=axis.transAxes, ha="center", fontsize=14, color="0.5")


def _draw_bars(axis: Axes, happenings: Sequence[Happening], duration: float) -> None:
    axis.set_ylim(-0.5, 3.5)
    axis.invert_yaxis()
    axis.set_yticks([0.5, 2.5], ["seen", "heard"], fontsize=11)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    ends = {}
    for item in sorted(happenings, key=lambda item: item.start):
        lane = 0 if item.kind == "visual" else 2
        # Where two overlap, the later one goes a line lower.
        line = lane + (ends.get(lane, -1.0) > item.start)
        ends[lane] = max(ends.get(lane, -1.0), item.end) if line == lane else ends[lane]
        color = SEEN if lane == 0 else HEARD
        axis.barh(line, item.end - item.start, left=item.start, height=0.9, color=color, alpha=0.85)
        middle = (item.start + item.end) / 2
        # About eighty signs fit on the width of the axis; what is longer than its bar takes two lines.
        room = max(8, int(130 * (item.end - item.start) / duration))
        label = "\n".join(textwrap.wrap(item.label, room)[:2])
        axis.text(middle, line, label, ha="center", va="center", fontsize=9, color="black", clip_on=True)
    if not happenings:
        axis.text(0.5, 0.5, "no annotation", transform=axis.transAxes, ha="center", fontsize=14, color="0.5")


def _frame_cells(times: np.ndarray, weights: np.ndarray, duration: float) -> tuple[np.ndarray, np.ndarray]:
    """Cell borders halfway between the frames' times, and the weights between them."""
    if not len(times):
        return np.zeros(0), np.zeros((0, 0))
    middles = (times[1:] + times[:-1]) / 2
    return np.concatenate([[0.0], middles, [max(duration, float(times[-1]))]]), weights


def _audio_cells(
    row: Mapping[str, np.ndarray], weights: np.ndarray, duration: float
) -> tuple[np.ndarray, np.ndarray]:
    """Attention on an even grid of time; NaN where no window listened: long sounds have gaps between them."""
    windows, samples = row["audio"].shape
    steps = weights.shape[1] // windows
    # A time step is as many filterbank frames as its share of a window.
    frames = (samples - FBANK_FRAME_LENGTH) // FBANK_FRAME_SHIFT + 1
    length = frames // steps * FBANK_FRAME_SHIFT / SAMPLE_RATE
    starts, ends = row["audio_spans"][:, :1], row["audio_spans"][:, 1:]
    seconds = starts + (np.arange(steps)[None] + 0.5) * length
    heard = (row["audio_mask"][:, None] & (seconds < ends)).reshape(-1)
    bins = int(np.clip(duration / length, 1, AUDIO_BINS))
    edges = np.linspace(0, duration, bins + 1)
    place = np.clip(np.digitize(seconds.reshape(-1), edges) - 1, 0, bins - 1)[heard]
    sums = np.zeros((len(weights), bins))
    np.add.at(sums.T, place, weights[:, heard].T)
    filled = np.bincount(place, minlength=bins) > 0
    return edges, np.where(filled[None], sums, np.nan)
