"""Token lengths from the text alone: those the rows will have, computed once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from input_pipeline import conversation as conversation_lib
from input_pipeline import lengths as lengths_lib
from input_pipeline.conversation import ChatMLTemplate, PlainTemplate, find_media_token_id
from input_pipeline.errors import UserError
from input_pipeline.lengths import compute_lengths, find_lengths, measure
from input_pipeline.loader import Loader
from input_pipeline.media import LoadedMedia
from input_pipeline.mixture import SourceConfig, open_mixture, open_source
from input_pipeline.records import LENGTHS, SAMPLES, encode_record
from input_pipeline.transforms import sample as sample_lib
from input_pipeline.transforms.sample import SampleBuilder
from input_pipeline.working_folder import WorkingFolder
from tests.record_folder import write_folder

LONG = 7  # Sample with a first answer that does not fit.


@pytest.fixture(scope="module")
def builder(tokenizer, spec) -> SampleBuilder:
    return SampleBuilder(spec, tokenizer, find_media_token_id(tokenizer, 0), 5, max_length=150)


def write(folder: Path, spec, count: int = 10) -> str:
    """Sample n asks n + 1 questions; sample LONG has a long first answer."""
    media = LoadedMedia(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2.0), [], 2.0)
    records = []
    for number in range(count):
        turns = []
        for _ in range(number + 1):
            answer = "bell " * (200 if number == LONG else 1)
            turns += [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]
        sample = {"id": f"n{number}", "task": "long" if number == LONG else "short", "conversations": turns}
        records.append(encode_record(media, media_id=str(number), samples=[sample]))
    write_folder(folder, spec, records, manifest_lines=count)
    return str(folder)


@pytest.fixture
def source(tmp_path, spec):
    return open_source(SourceConfig(write(tmp_path / "records", spec)), name="mine")


def test_lengths_are_those_of_the_rows(source, builder) -> None:
    found = compute_lengths(source, builder)
    for number in range(len(source)):
        if number == LONG:
            first = {"id": "n7", "conversations": source.line(number)["conversations"][:2]}
            needed = len(dataclasses.replace(builder, max_length=10_000).encode(first).tokens)
            assert found.tokens[number] == -needed < -builder.max_length
            continue
        row = builder(source.reader[number], 0)
        assert row.plan.total == found.tokens[number]
        assert row.dropped_rounds == found.dropped_rounds[number]
    assert found.dropped_rounds[0] == 0 < found.dropped_rounds[9]
    assert found.fits.tolist() == [number != LONG for number in range(10)]


def test_many_samples_are_shared_out_among_processes(source, builder, monkeypatch) -> None:
    expected = compute_lengths(source, builder)
    pools = []

    class Pool(lengths_lib.ProcessPoolExecutor):
        def __init__(self, workers, context):
            pools.append((workers, context.get_start_method()))
            super().__init__(workers, context)

    monkeypatch.setattr(lengths_lib, "PART", 4)
    monkeypatch.setattr(lengths_lib.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(lengths_lib, "ProcessPoolExecutor", Pool)
    found = compute_lengths(source, builder)
    assert pools == [(2, "spawn")]
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.dropped_rounds, expected.dropped_rounds)


def test_they_are_computed_once(source, builder, monkeypatch) -> None:
    found = find_lengths(source, builder)
    (kept,) = (Path(source.config.records) / LENGTHS).iterdir()
    monkeypatch.setattr(lengths_lib, "compute_lengths", lambda *_: pytest.fail("computed again"))
    again = find_lengths(source, builder)
    for name in ("tokens", "dropped_rounds", "dropped_questions"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    # The records are still whole and may be replaced by `avlm prepare --overwrite`.
    with WorkingFolder(source.config.records, "another plan", overwrite=True) as work:
        work.discard()
    assert kept.suffix == ".npy" and not kept.name.startswith(".")


def test_whatever_they_depend_on_makes_others(source, builder, tokenizer, spec, tmp_path) -> None:
    class Other(ChatMLTemplate):
        def round(self, turns):
            return [*super().round(turns), *super().round(turns)[-1:]]

    changed = [
        builder,
        dataclasses.replace(builder, max_length=140),
        dataclasses.replace(builder, num_media_tokens=6),
        dataclasses.replace(builder, system="Listen."),
        dataclasses.replace(builder, template=Other()),
    ]
    for number, one in enumerate(changed, 1):
        find_lengths(source, one)
        assert len(list((Path(source.config.records) / LENGTHS).iterdir())) == number
        find_lengths(source, one)
        assert len(list((Path(source.config.records) / LENGTHS).iterdir())) == number
    # The modalities shown do not change the text.
    find_lengths(source, dataclasses.replace(builder, modalities=("audio",)))
    assert len(list((Path(source.config.records) / LENGTHS).iterdir())) == len(changed)
    find_lengths(open_source(SourceConfig(source.config.records, tasks=("short",))), builder)
    assert len(list((Path(source.config.records) / LENGTHS).iterdir())) == len(changed) + 1


def test_code_that_treats_conversations_otherwise_makes_others(source, builder, monkeypatch) -> None:
    opening, encode = ChatMLTemplate.opening, sample_lib.encode_conversation
    changed = (
        (ChatMLTemplate, "opening", lambda self, system: opening(self, system and system.strip())),
        (conversation_lib, "_PLACEHOLDER", re.compile("<nothing>")),
        (
            sample_lib,
            "encode_conversation",
            lambda *args, max_length, **more: encode(*args, max_length=max_length + 1, **more),
        ),
    )
    found = {lengths_lib._fingerprint(source, builder)}
    for number, (where, name, value) in enumerate(changed, 2):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            found.add(lengths_lib._fingerprint(source, builder))
        assert len(found) == number, name


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_damaged_file_is_replaced(source, builder, damage) -> None:
    found = find_lengths(source, builder)
    (kept,) = (Path(source.config.records) / LENGTHS).iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    np.testing.assert_array_equal(find_lengths(source, builder).tokens, found.tokens)
    assert kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(source, builder, monkeypatch, capsys) -> None:
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lengths_lib.Path, "mkdir", refuse)
    monkeypatch.setattr(lengths_lib, "SHOWN_FROM", 1)
    find_lengths(source, builder)
    told = capsys.readouterr().err
    assert "cannot be kept there (Permission denied)" in told
    assert "mine: token lengths of 10 samples: 1 parts of 20000 done" in told
    assert not (Path(source.config.records) / LENGTHS).exists()


def test_what_does_not_fit_is_told_before_training_or_left_out(source, builder) -> None:
    sources = {"mine": source.config}
    mixture = open_mixture(sources)
    with pytest.raises(
        UserError, match=r"1 samples do not fit 150 tokens .*1 of 10 of source 'mine': 'n7' needs"
    ):
        measure(mixture, builder)
    kept, lengths, left_out = measure(mixture, builder, "leave_out")
    assert (len(kept), left_out) == (9, {"mine": 1})
    assert [kept.line(number)["id"] for number in range(9)] == [f"n{n}" for n in range(10) if n != LONG]
    assert len(lengths[0].tokens) == 9 and lengths[0].fits.all()
    states = []
    for options in ({"oversize": "leave_out"}, {"oversize": "leave_out", "pack": 2}):
        with Loader(sources, builder, batch_size=3, **options) as loader:
            batches = round(loader.batches_in(3))
            ids = {name for batch in range(batches) for name in loader.sample_ids(batch)}
            assert ids == {f"n{n}" for n in range(10) if n != LONG}
            next(loader)
            assert loader.summary()["mine"] == {
                "samples": 9,
                "per_epoch": 9,
                "of_other_tasks_or_modalities": 0,
                "left_out_as_oversize": 1,
                "dropped_rounds": int(lengths[0].dropped_rounds.sum()),
                "dropped_questions": 0,
            }
            told = loader.describe()
            assert (
                "1 left out, they do not fit 150 tokens" in told and "rounds dropped that do not fit" in told
            )
            states.append(loader.state())
    # Leaving out is part of the order, and so is packing.
    short = {"mine": SourceConfig(source.config.records, tasks=("short",))}
    with Loader(short, builder, batch_size=3) as loader:
        states.append(loader.state())
    assert len({state["fingerprint"] for state in states}) == 3


def test_malformed_conversations_are_listed_before_training(source, builder, monkeypatch) -> None:
    path = Path(source.config.records) / SAMPLES
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number in (2, 5):
        lines[number]["conversations"] = lines[number]["conversations"][1:]
    lines[6]["conversations"][0]["value"] = "At 1 s, at 2 s, at 3 s and at 4 s?"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    broken = open_source(source.config)
    told = "3 of 10 samples cannot be used: sample 'n2'.*sample 'n5'.*sample 'n6' names 4 times"
    with pytest.raises(UserError, match=told):
        compute_lengths(broken, builder)
    for line in lines:
        del line["conversations"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="holds no conversations.*prepare these records again"):
        compute_lengths(open_source(source.config), builder)


def test_records_that_are_not_those_of_the_lengths_are_refused(source, builder) -> None:
    """samples.jsonl was edited by hand: what is planned is not what is read."""
    path = Path(source.config.records) / SAMPLES
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["conversations"][1]["value"] += "and more"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = SourceConfig(source.config.records, tasks=("short",))
    with Loader({"mine": config}, builder, batch_size=9) as loader:
        told = rf"'n3' \(number 3 of {config.records}\) takes .* planned for it: .*{SAMPLES} does not .*--overwrite"
        with pytest.raises(UserError, match=told):
            next(loader)


def test_lengths_that_are_out_of_date_are_told_by_their_folder(source, builder, monkeypatch) -> None:
    """As another version of this program may have left them: the text is the records', its lengths are not."""
    short = SourceConfig(source.config.records, tasks=("short",))
    find_lengths(open_source(short), builder)
    (kept,) = (Path(source.config.records) / LENGTHS).iterdir()
    np.save(kept, np.load(kept) + np.array([[1], [0], [0]], np.int32))
    with Loader({"mine": short}, builder, batch_size=9) as loader:
        with pytest.raises(UserError, match=f"{kept.parent} are out of date; delete that folder"):
            next(loader)
    monkeypatch.setattr(lengths_lib, "LENGTHS_VERSION", 0)
    with Loader({"mine": short}, builder, batch_size=9) as loader:
        next(loader)


def test_nothing_is_left_behind_by_a_write_that_fails(source, builder, monkeypatch) -> None:
    def fail(file, values):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lengths_lib.np, "save", fail)
    find_lengths(source, builder)
    assert os.listdir(Path(source.config.records) / LENGTHS) == []


def test_questions_that_the_template_leaves_out_are_counted(builder, tmp_path) -> None:
    sources = {"captions": SourceConfig(write(tmp_path / "captions", builder.spec, 1))}
    plain = dataclasses.replace(builder, template=PlainTemplate(drop_question=True))
    with Loader(sources, plain, batch_size=2) as loader:
        assert loader.summary()["captions"]["dropped_questions"] == 1
        assert "; 1 questions left out by the template" in loader.describe()
        rows = loader.next_rows()
        assert (rows.dropped_questions, rows.dropped_rounds) == (rows.num_samples, 0) == (2, 0)
    with pytest.raises(UserError, match="1 of 1 samples cannot be used: sample 'n0'.*drop_question=True"):
        Loader(sources, dataclasses.replace(builder, template=PlainTemplate()), batch_size=2)
