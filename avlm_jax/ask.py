"""Asks a trained model a question about one media file: video, sound or picture.

Prints what the question costs (frames, audio windows, times, tokens) and the answer. A video without sound
and a sound without picture are as good as any.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from avlm_jax.assembly import Assembly, assemble
from avlm_jax.checkpoints.stage_result import METADATA_FILE
from avlm_jax.config import apply_overrides, enable_compilation_cache, load_config
from avlm_jax.generate import Generator, checkpoint_config, checkpoint_stage, load_model
from input_pipeline.conversation import DoesNotFit, TokenPlan
from input_pipeline.errors import UserError
from input_pipeline.media import LoadedMedia, load_media
from input_pipeline.transforms.intervals import interval_source, parse_intervals
from input_pipeline.transforms.media import pad_media
from input_pipeline.transforms.sample import Row

DEMO_CONFIG = "configs/savenvideo.py:size=demo"
DEMO_CHECKPOINT = "runs/demo/full/2b/final"
# An answer in whole sentences; the demo's longest, one phrase for each of 16 moments, takes about 70.
DEFAULT_NEW_TOKENS = 128

EPILOG = """\
examples:
  avlm ask holiday.mp4 "What is heard?"
  avlm ask holiday.mp4 "What happens between 2 s and 5 s?" --checkpoint runs/mine/2b/final
  avlm ask holiday.mp4 "Who speaks?" --frames 32 --show-plan
      what the question would cost with 32 frames; nothing is answered and no checkpoint is needed

Times in a question ("at 0:07", "between 2 s and 5 s", "the first 10 seconds") reach the model as tokens of
their own.
"""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question put to a file, ready for the model.

    Attributes:
        row: unbatched arrays and token plan.
        media: what was decoded.
        times: (start, end) in seconds that the question names; empty: it is about the whole.
    """

    row: Row
    media: LoadedMedia
    times: tuple[tuple[float, float], ...]

    @property
    def plan(self) -> TokenPlan:
        assert self.row.plan is not None
        return self.row.plan


def prepare_question(assembly: Assembly, path: str | Path, question: str) -> Question:
    """Decodes a file and lays out a question about it.

    Raises:
        MediaError: the file cannot be read.
        DoesNotFit: media and question are longer than text.max_length; the error holds the token plan.
        UserError: the question is empty or names more times than media.max_intervals.
    """
    if not question.strip():
        raise UserError("the question is empty; ask something, in quotes")
    spec = assembly.system.spec
    media = load_media(path, spec)
    arrays = pad_media(media.frames, media.frame_times, media.windows, media.duration, spec, name=str(path))
    turn = {"from": "human", "value": question, "verbatim": True}
    sample = {"id": Path(path).name, "conversations": [turn]}
    row = assembly.builder(prompt=True).build(arrays, sample)
    stem = interval_source(question)
    times = parse_intervals(stem, media.duration, spec.max_intervals, sample["id"])
    return Question(row, media, tuple(times))


def describe_question(path: str | Path, question: Question) -> str:
    """What is shown and what it costs, for people."""
    media, times = question.media, question.times
    size = f" of {media.frames.shape[2]} x {media.frames.shape[1]}" if media.has_video else ""
    heard = sum(end - start for start, end, _ in media.windows)
    sound = f"{len(media.windows)} audio windows ({heard:.1f} s of sound)" if media.has_audio else "no sound"
    picture = f"{len(media.frames)} frames{size}" if media.has_video else "no picture"
    named = ", ".join(f"{a:.2f} s" if a == b else f"{a:.2f} to {b:.2f} s" for a, b in times)
    return "\n".join(
        [
            f"media:      {Path(path).name}, {media.duration:.2f} s, {picture}, {sound}",
            f"times:      {named or f'none named: the whole, 0 to {media.duration:.2f} s'}",
            f"token plan: {question.plan}",
        ]
    )


def check_frames(config: ConfigDict, frames: int | None) -> list[str]:
    """Overrides for `--frames`.

    Raises:
        UserError: fewer than one.
    """
    if frames is None or frames == config.media.num_frames:
        return []
    if frames < 1:
        raise UserError(f"--frames is {frames}; ask for at least 1")
    return [f"media.num_frames={frames}"]


def refuse_other_frames(config: ConfigDict, assembly: Assembly, path: str | Path, question: str) -> None:
    """Refuses another number of frames than a resampler with queries per frame was trained with.

    Args:
        config: of the checkpoint.
        assembly: of `config` with the number of frames that is asked for.
        path, question: what is asked.

    Raises:
        UserError: with the token plan that so many frames would have.
    """
    avts = config.model.get("avts")
    trained, wanted = config.media.num_frames, assembly.config.media.num_frames
    if avts is None or avts.resampler != "avts" or avts.scope != "per_frame" or trained == wanted:
        return
    tokens = avts.num_queries // trained * wanted
    try:
        plan = prepare_question(assembly, path, question).plan
    except DoesNotFit as error:
        plan = error.plan
    plan = dataclasses.replace(plan, frames=wanted, media_tokens=tokens)
    fits = "" if plan.total <= plan.limit else f", {plan.total - plan.limit} too many"
    raise UserError(
        f"--frames {wanted} does not go with this model: its resampler holds queries for {trained} frames "
        f"(model.avts.scope is per_frame), a number that training fixes.\n"
        f"token plan with {wanted} frames: {plan}{fits}\n"
        f"leave --frames out, or train with --config.media.num_frames={wanted}"
    )


def ask(assembly: Assembly, params: Any, question: Question, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> str:
    """The model's answer, greedily decoded.

    Raises:
        GenerationError: the model's numbers are not finite.
    """
    batch = {key: value[None] for key, value in question.row.arrays.items()}
    name = question.row.sample["id"] if question.row.sample else ""
    return Generator(assembly, params, max_new_tokens).texts(batch, [name])[0]


def resolve_config(
    checkpoint: Path, config: str | None, overrides: Sequence[str], plan_only: bool
) -> ConfigDict:
    """The given configuration, else the checkpoint's own; the demo's where a plan needs no checkpoint."""
    if config is not None:
        return load_config(config, overrides)
    if plan_only and not (checkpoint / METADATA_FILE).is_file():
        return load_config(DEMO_CONFIG, overrides)
    return apply_overrides(checkpoint_config(checkpoint), overrides)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`avlm ask`'s arguments."""
    parser.add_argument("video", metavar="FILE", help="any video, sound or picture")
    parser.add_argument("question", metavar="QUESTION", help="in quotes")
    parser.add_argument(
        "--checkpoint",
        default=DEMO_CHECKPOINT,
        metavar="DIR",
        help="a finished stage, <workdir>/<stage>/final (default: the demo's, %(default)s)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGS]",
        help="configuration by path (default: the one stored with the checkpoint); single keys follow as "
        "--config.key.of.config=value",
    )
    parser.add_argument(
        "--frames", type=int, metavar="N", help="sample N frames instead of the configuration's number"
    )
    parser.add_argument(
        "--show-plan", action="store_true", help="print the token plan and stop; needs no checkpoint"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, metavar="N", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb; 0 when there is an answer."""
    checkpoint = Path(args.checkpoint)
    trained = resolve_config(checkpoint, args.config, args.config_overrides, args.show_plan)
    config = apply_overrides(trained, check_frames(trained, args.frames))
    # A plan needs no checkpoint; where there is one, what it was trained with counts.
    stage = checkpoint_stage(checkpoint) if (checkpoint / METADATA_FILE).is_file() else ""
    assembly = assemble(config, stage)
    refuse_other_frames(trained, assembly, args.video, args.question)
    question = prepare_question(assembly, args.video, args.question)
    print(describe_question(args.video, question), flush=True)
    if args.show_plan:
        return 0
    enable_compilation_cache()
    model = load_model(checkpoint, config)
    answer = ask(model.assembly, model.params, question, args.max_new_tokens)
    print(f"model:      {model.name}\nanswer:     {answer}")
    return 0
