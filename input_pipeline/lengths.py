"""How many tokens every sample takes, from its text alone: no media are read, and it is computed once.

The lengths lie beside the records, in `<records>/lengths/<fingerprint>.npy`; the fingerprint covers all that
they depend on: the records, which of their samples, the tokenizer, template, system text, number of media
tokens, the limit, and what the code makes of a few conversations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from input_pipeline.conversation import DoesNotFit
from input_pipeline.errors import UserError
from input_pipeline.mixture import Mixture, SourceIndex
from input_pipeline.progress import track
from input_pipeline.records import LENGTHS, SAMPLES

if TYPE_CHECKING:
    from input_pipeline.transforms.sample import SampleBuilder

NAMED = 8  # So many samples are named where some do not fit.
SHOWN_FROM = 10_000  # From so many samples on there is something to wait for.
PART = 20_000  # Samples that a process counts at a time: some ten seconds, of which its start takes two.
OVERSIZE = ("error", "leave_out")
# To be raised when lengths come to mean something else, or are counted otherwise in a way that no probe shows.
LENGTHS_VERSION = 1
# Encoded for the fingerprint: a template's code may change while its fields stay. A template without questions takes the
# caption.
CAPTION = ({"from": "human", "value": "<video>"}, {"from": "gpt", "value": "A bell (B)"})
PROBES = (
    (
        {"from": "human", "value": "At 00:01,\nwhat is heard?"},
        {"from": "gpt", "value": "A bell (B)"},
        {"from": "human", "value": "\nAnd seen?"},
        {"from": "gpt", "value": "Nothing."},
    ),
    (
        {"from": "system", "value": " Listen.\n"},
        {"from": "human", "value": "Look: <video> what\n is it?"},
        {"from": "gpt", "value": " A bell "},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "There"},
    ),
)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of the samples of one source, in their order.

    Attributes:
        tokens: i32 [n], media tokens included, after whole rounds were dropped; where not even the first
            round fits, minus what it would take.
        dropped_rounds: i32 [n], rounds that do not fit.
        dropped_questions: i32 [n], questions whose text the template leaves out.
    """

    tokens: np.ndarray
    dropped_rounds: np.ndarray
    dropped_questions: np.ndarray

    def only(self, mask: np.ndarray) -> Lengths:
        """Those of the samples that `mask`, bool [n], selects."""
        return Lengths(self.tokens[mask], self.dropped_rounds[mask], self.dropped_questions[mask])

    @property
    def fits(self) -> np.ndarray:
        """bool [n]."""
        return self.tokens > 0


def find_lengths(source: SourceIndex, builder: SampleBuilder) -> Lengths:
    """The lengths of a source's samples: those kept beside its records, else computed and kept.

    Where the folder cannot be written they are computed at every start, which is said.

    Raises:
        UserError: conversations that cannot be used, with their number and the first ones' ids.
    """
    path = Path(source.config.records) / LENGTHS / f"{_fingerprint(source, builder)}.npy"
    if (kept := _read(path, len(source))) is not None:
        return Lengths(*kept)
    found = compute_lengths(source, builder)
    try:
        _write(path, np.stack([found.tokens, found.dropped_rounds, found.dropped_questions]))
    except OSError as error:
        print(
            f"{source.config.records}: token lengths cannot be kept there ({error.strerror}) and are computed at "
            "every start",
            file=sys.stderr,
            flush=True,
        )
    return found


class _Encoded(NamedTuple):
    tokens: np.ndarray  # as `Lengths`
    dropped_rounds: np.ndarray
    dropped_questions: np.ndarray
    refused: list[str]  # why samples cannot be used, the first few


def compute_lengths(source: SourceIndex, builder: SampleBuilder) -> Lengths:
    """See `find_lengths`; reads samples.jsonl and writes nothing.

    More than PART samples are shared out among processes, so a script needs `if __name__ == "__main__"` then.
    """
    path = Path(source.config.records) / SAMPLES
    if "conversations" not in source.line(0):
        raise UserError(
            f"{path} holds no conversations (an older `avlm prepare` wrote it); prepare these records again"
        )
    parts = [source.only(slice(start, start + PART)) for start in range(0, len(source), PART)]
    encode = functools.partial(_encode_all, builder=builder)
    with contextlib.ExitStack() as stack:
        found: Iterable[_Encoded] = map(encode, parts)
        if (cores := min(len(os.sched_getaffinity(0)), len(parts))) > 1:
            # Spawned: the program that asks may have threads that a fork would not survive.
            pool = ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"))
            found = stack.enter_context(pool).map(encode, parts)
        if len(source) >= SHOWN_FROM:
            label = f"{source.name or source.config.records}: token lengths of {len(source)} samples"
            found = track(found, total=len(parts), label=label, unit=f"parts of {PART}")
        tokens, dropped, unasked, refused = zip(*found, strict=True)
    tokens, reasons = np.concatenate(tokens), sum(refused, [])
    if reasons:
        count = int((tokens == 0).sum())
        raise UserError(
            f"{source.config.records}: {count} of {len(source)} samples cannot be used: "
            f"{'; '.join(reasons[:NAMED])}{' ...' if count > NAMED else ''}. Correct them in the manifest and prepare "
            "again"
        )
    return Lengths(tokens, np.concatenate(dropped), np.concatenate(unasked))


def _encode_all(source: SourceIndex, builder: SampleBuilder) -> _Encoded:
    tokens = np.zeros(len(source), np.int32)  # 0 stays where a sample cannot be used.
    dropped, unasked = np.zeros((2, len(source)), np.int32)
    refused: list[str] = []
    for number, line in enumerate(source.lines()):
        try:
            text = builder.encode(line)
            if _may_name_many_times(line, builder.spec.max_intervals):
                builder.intervals(line, duration=0.0, rounds=text.rounds)
            tokens[number], dropped[number] = len(text.tokens), text.dropped_rounds
            unasked[number] = text.dropped_questions
        except DoesNotFit as error:
            tokens[number] = -error.plan.total
        except (
            UserError
        ) as error:  # Malformed, a control token in its text, more times than there is room for.
            refused += [str(error)] * (len(refused) < NAMED)
    return _Encoded(tokens, dropped, unasked, refused)


def _may_name_many_times(line: Mapping[str, Any], most: int) -> bool:
    """A time has a number, and looking for numbers is quick."""
    return sum(len(_NUMBER.findall(turn["value"])) for turn in line["conversations"]) > most


_NUMBER = re.compile(r"\d+")


def _fingerprint(source: SourceIndex, builder: SampleBuilder) -> str:
    probes = PROBES if builder.template.keeps_questions else (CAPTION,)
    parts = [
        LENGTHS_VERSION,
        source.digest,
        source.selection,
        hashlib.sha256(builder.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        [repr(builder.template), builder.system, builder.prompt],
        [builder.num_media_tokens, builder.max_length, builder.spec.max_intervals],
        [_probe(builder, turns) for turns in probes],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _probe(builder: SampleBuilder, turns: Sequence[Mapping[str, str]]) -> list[Any]:
    """What becomes of a conversation, whole and where its last round does not fit."""
    sample = {"id": "probe", "conversations": turns}
    whole = dataclasses.replace(builder, max_length=10**9).encode(sample)
    found = [whole.tokens.tolist(), whole.loss_mask.tolist()]
    if whole.rounds > 1 and not builder.prompt:  # A prompt loses no rounds.
        cut = dataclasses.replace(builder, max_length=len(whole.tokens) - 1).encode(sample)
        found += [len(cut.tokens), cut.rounds, cut.dropped_rounds]
    return found


def _read(path: Path, count: int) -> np.ndarray | None:
    """i32 [3 n], or None if there is no such file or not a whole one."""
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return kept if kept.shape == (3, count) and kept.dtype == np.int32 else None


def _write(path: Path, values: np.ndarray) -> None:
    """Appears whole or not at all; hosts that share the folder may write it at the same time."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.uname().nodename}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.save(file, values)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def measure(
    mixture: Mixture, builder: SampleBuilder, oversize: str = "error"
) -> tuple[Mixture, tuple[Lengths, ...], dict[str, int]]:
    """Lengths of every sample of a mixture, before anything is trained.

    Args:
        mixture: its sources are measured one after the other.
        builder: tokenizer, template, number of media tokens, limit.
        oversize: what becomes of samples whose media and first round alone are too long: "error" refuses
            them all by name, "leave_out" goes on without them.

    Returns:
        The mixture of what fits, the lengths of its samples by source, and how many were left out of each
        source, by its name.

    Raises:
        UserError: samples that do not fit, or no sample that does; see `find_lengths` too.
    """
    if oversize not in OVERSIZE:
        raise UserError(f"oversize is {oversize!r}; use one of {', '.join(map(repr, OVERSIZE))}")
    found = [find_lengths(source, builder) for source in mixture.sources]
    too_long = [~lengths.fits for lengths in found]
    left_out = {s.name: int(mask.sum()) for s, mask in zip(mixture.sources, too_long, strict=True)}
    if not any(left_out.values()):
        return mixture, tuple(found), left_out
    if oversize == "error":
        raise UserError(_refusal(mixture.sources, found, builder))
    for source, mask in zip(mixture.sources, too_long, strict=True):
        if mask.all():
            raise UserError(
                f"source {source.name!r}: none of its {len(source)} samples fits {builder.max_length} tokens; "
                "raise the stage's max_length"
            )
    kept = [lengths.only(lengths.fits) for lengths in found]
    sources = tuple(s.only(x.fits) for s, x in zip(mixture.sources, found, strict=True))
    return dataclasses.replace(mixture, sources=sources), tuple(kept), left_out


def _refusal(sources: Sequence[SourceIndex], found: Sequence[Lengths], builder: SampleBuilder) -> str:
    limit, media = builder.max_length, builder.num_media_tokens
    told, longest, count = [], 0, 0
    for source, lengths in zip(sources, found, strict=True):
        bad = np.flatnonzero(~lengths.fits)
        if not len(bad):
            continue
        needed = -lengths.tokens[bad]
        count, longest = count + len(bad), max(longest, int(needed.max()))
        names = [
            f"{source.line(int(number))['id']!r} needs {length} = {media} media + {length - media} text"
            for number, length in zip(bad[:NAMED], needed[:NAMED].tolist(), strict=True)
        ]
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        told.append(f"{len(bad)} of {len(source)} of source {source.name!r}: {', '.join(names)}{more}")
    return (
        f"{count} samples do not fit {limit} tokens with their media and first round; {'; '.join(told)}. "
        f"Raise the stage's max_length to {longest}, ask for fewer media tokens, shorten the texts, or set the "
        'stage\'s oversize="leave_out" to train without them'
    )
