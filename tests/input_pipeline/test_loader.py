"""Batches: the same for any number of threads, workers and processes, and after any interruption."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from input_pipeline.conversation import find_media_token_id
from input_pipeline.errors import UserError
from input_pipeline.loader import Loader, iter_eval, num_eval_batches
from input_pipeline.mixture import SourceConfig, open_mixture
from input_pipeline.records import RecordReader
from input_pipeline.spec import TEXT_KEYS, check_batch
from input_pipeline.transforms.media import decode_record
from input_pipeline.transforms.sample import SampleBuilder

LENGTH = 160
MODES = {"plain": {}, "buckets": {"buckets": (60, 80)}, "packed": {"pack": 3}}


@pytest.fixture(scope="module")
def builder(tokenizer, spec) -> SampleBuilder:
    return SampleBuilder(
        spec=spec,
        tokenizer=tokenizer,
        media_token_id=find_media_token_id(tokenizer, 0),
        num_media_tokens=5,
        max_length=LENGTH,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_records) -> list[SourceConfig]:
    root = tmp_path_factory.mktemp("loader")
    return [
        SourceConfig(make_records(root / "a", 5, name="a", words=10)),
        SourceConfig(make_records(root / "b", 3, name="b", words=10), modalities=("audio",)),
        SourceConfig(make_records(root / "c", 2, name="c", audio=False, words=10), weight=0.5),
    ]


def _take(count: int, sources, builder, *, first: int = 0, **kwargs) -> tuple[list[dict], list[list[str]]]:
    kwargs = {"batch_size": 4, "seed": 7, **kwargs}
    with Loader(sources, builder, **kwargs) as loader:
        loader.seek(first)
        batches = [next(loader) for _ in range(count)]
        return batches, [loader.sample_ids(n) for n in range(first, first + count)]


def _assert_equal(batches: list[dict], others: list[dict]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def _answer(builder, tokens, mask) -> str:
    return builder.tokenizer.decode(tokens[mask])


def test_batches_obey_the_glossary_and_hold_the_samples_they_name(sources, builder, spec):
    batches, ids = _take(8, sources, builder)
    for batch, names in zip(batches, ids, strict=True):
        check_batch(batch, spec, 4, LENGTH)
        for row, name in enumerate(names):
            source, number, index = name.split("-")
            answer = _answer(builder, batch["tokens"][row], batch["loss_mask"][row])
            assert answer == f"sound {number}.{index}<|im_end|>\n"
            assert batch["frame_mask"][row].all() == (source != "b")  # b is shown by ear alone
            assert batch["audio_mask"][row].any() == (source != "c")  # c has no sound
            assert (batch["frames"][row] != 0).any() == (source != "b")
            expected = (int(number) + 1) / 1024 if source != "c" else 0.0
            assert batch["audio"][row, 0, 0] == expected
            assert batch["intervals"][row, 0].tolist() == [1.0, 1.0]
            assert batch["interval_mask"][row].tolist() == [True, False, False]
        valid = batch["segment_ids"] == 1
        assert (batch["tokens"][~valid] == builder.tokenizer.pad_token_id).all()
        assert not batch["loss_mask"][~valid].any() and not batch["positions"][~valid].any()
        for row in range(4):
            count = valid[row].sum()
            assert valid[row, :count].all()
            assert batch["positions"][row, :count].tolist() == list(range(count))
            assert (batch["tokens"][row] == builder.media_token_id).sum() == 5


def test_order_does_not_depend_on_threads(sources, builder):
    expected, ids = _take(12, sources, builder, threads=0)
    for threads in (1, 2, 4):
        batches, other_ids = _take(12, sources, builder, threads=threads)
        _assert_equal(batches, expected)
        assert other_ids == ids
    other, _ = _take(12, sources, builder, threads=0, seed=8)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(expected, other, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_are_the_batch_in_parts(sources, builder, mode):
    whole, ids = _take(6, sources, builder, **MODES[mode])
    for first in (0, 3):  # From the beginning and from a saved position.
        parts, same = (
            _take(2 * (6 - first), sources, builder, first=first, accumulate=2, **MODES[mode])[0],
            [],
        )
        for one, other in zip(parts[::2], parts[1::2], strict=True):
            same.append({key: np.concatenate([one[key], other[key]]) for key in one})
        _assert_equal(same, whole[first:])
    # Two processes: each micro-batch has its share of both.
    shares = [
        _take(12, sources, builder, accumulate=2, process_index=p, process_count=2, **MODES[mode])
        for p in range(2)
    ]
    for number in range(6):
        assert sorted(shares[0][1][number] + shares[1][1][number]) == sorted(ids[number])
        for part in range(2):
            rows = whole[number]["tokens"][2 * part : 2 * part + 2]
            for process in range(2):
                found = shares[process][0][2 * number + part]["tokens"]
                np.testing.assert_array_equal(found, rows[process : process + 1])


def test_micro_batches_leave_the_position_alone(sources, builder):
    with Loader(sources, builder, batch_size=4, accumulate=2) as loader:
        states = [(next(loader), loader.state())[1] for _ in range(4)]
        assert [state["next_batch"] for state in states] == [0, 1, 1, 2]
    with Loader(sources, builder, batch_size=4) as loader:
        loader.restore(states[-1])
        assert loader.next_batch == 2
    with pytest.raises(UserError, match="batch_size 4 does not divide among 1 processes x 3 micro-batches"):
        Loader(sources, builder, batch_size=4, accumulate=3)


def test_epochs_visit_each_sample_once(sources, builder):
    two = [dataclasses.replace(source, weight=1.0) for source in sources]
    with Loader(two, builder, batch_size=4, seed=1) as loader:
        assert loader.batches_in(1) == 5
        for epoch in range(3):
            ids = [name for n in range(5 * epoch, 5 * epoch + 5) for name in loader.sample_ids(n)]
            assert len(ids) == 20 == len(set(ids))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threads", [0, 2])
def test_resume_at_any_step_gives_the_same_batches(sources, builder, threads, mode):
    options = MODES[mode]
    expected, _ = _take(9, sources, builder, **options)
    for step in range(9):
        with Loader(sources, builder, batch_size=4, seed=7, threads=threads, **options) as loader:
            for _ in range(step):
                next(loader)
            state = loader.state()
        assert state["next_batch"] == step
        with Loader(sources, builder, batch_size=4, seed=7, **options) as loader:
            loader.restore(state)
            _assert_equal([next(loader) for _ in range(9 - step)], expected[step:])
        batches, _ = _take(9 - step, sources, builder, first=step, **options)
        _assert_equal(batches, expected[step:])


@pytest.mark.parametrize("count", [1, 2])
def test_one_row_a_process(sources, builder, count):
    with Loader(sources, builder, batch_size=4, seed=7) as loader:
        expected = [number for batch in range(3) for number in loader.sample_numbers(batch)]
    loaders = [
        Loader(sources, builder, batch_size=count, seed=7, process_index=index, process_count=count)
        for index in range(count)
    ]
    found = []
    for batch in range(12 // count):
        for loader in loaders:
            assert len(next(loader)["tokens"]) == 1
            found += loader.sample_numbers(batch)
    for loader in loaders:
        loader.close()
    assert found == expected


def test_seeking_is_free_of_what_lies_before(sources, builder):
    far = 10**9
    batches, ids = _take(2, sources, builder, first=far)
    with Loader(sources, builder, batch_size=4, seed=7) as loader:
        next(loader)
        loader.seek(far + 1)
        assert loader.next_batch == far + 1
        _assert_equal([next(loader)], batches[1:])
        assert loader.sample_ids(far) == ids[0]


def test_state_of_another_order_is_refused(sources, builder):
    with Loader(sources, builder, batch_size=4, seed=7) as loader:
        state = loader.state()
    for changed, name in (
        ({"seed": 8}, "seed was 7 and is now 8"),
        ({"batch_size": 2}, "batch_size was 4 and is now 2"),
        ({"sources": sources[:2]}, "fingerprint"),
        ({"pack": 2}, "fingerprint"),
        ({"buckets": (60,)}, "fingerprint"),
    ):
        kwargs = {"sources": sources, "batch_size": 4, "seed": 7, **changed}
        with Loader(kwargs.pop("sources"), builder, **kwargs) as loader:
            with pytest.raises(UserError, match=name):
                loader.restore(state)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_out_the_global_batch(sources, builder, count, mode):
    options = MODES[mode]
    clips = options.get("pack", 1)
    expected, ids = _take(6, sources, builder, **options)
    shares = [
        _take(6, sources, builder, process_index=i, process_count=count, **options) for i in range(count)
    ]
    for step in range(6):
        assert sorted(name for _, names in shares for name in names[step]) == sorted(ids[step])
        for index, (batches, _) in enumerate(shares):
            for key, value in batches[step].items():
                rows = expected[step][key]
                if key not in TEXT_KEYS:  # By row, then by slot.
                    rows = rows.reshape(-1, clips, *rows.shape[1:])
                    value = value.reshape(-1, clips, *value.shape[1:])
                np.testing.assert_array_equal(value, rows[index::count], err_msg=key)
    # A state saved by one of two processes continues on one.
    with Loader(
        sources, builder, batch_size=4, seed=7, process_index=1, process_count=2, **options
    ) as loader:
        next(loader)
        state = loader.state()
        assert loader.state(5) == {**state, "next_batch": 5}
    with Loader(sources, builder, batch_size=4, seed=7, **options) as loader:
        loader.restore(state)
        _assert_equal([next(loader)], expected[1:2])


def test_batch_that_does_not_divide_among_processes(sources, builder):
    with pytest.raises(UserError, match="batch_size 4 does not divide among 3 processes"):
        Loader(sources, builder, batch_size=4, process_count=3)


# Each worker process takes seconds to start.
@pytest.mark.parametrize(
    ("workers", "mode"),
    [
        (1, "packed"),
        (2, "plain"),
        pytest.param(2, "packed", marks=pytest.mark.slow),
        pytest.param(4, "plain", marks=pytest.mark.slow),
        pytest.param(4, "buckets", marks=pytest.mark.slow),
        pytest.param(4, "packed", marks=pytest.mark.slow),
    ],
)
def test_worker_processes_keep_the_order(sources, builder, workers, mode):
    expected, _ = _take(6, sources, builder, **MODES[mode])
    batches, _ = _take(5, sources, builder, workers=workers, threads=1, first=1, **MODES[mode])
    _assert_equal(batches, expected[1:])


def test_worker_processes_hand_over_in_shared_memory(sources, builder):
    with Loader(sources, builder, batch_size=4, seed=7, workers=1, threads=0) as loader:
        rows = loader.next_rows()
        assert len(rows.samples) == 4
        for key, array in rows.batch.items():
            assert type(array).__name__ == "SharedMemoryArray", key


def test_slots_that_are_left_share_one_padding_row(sources, builder, monkeypatch):
    made = []
    padding_row = SampleBuilder.padding_row
    monkeypatch.setattr(SampleBuilder, "padding_row", lambda self: made.append(1) or padding_row(self))
    with Loader(sources, builder, batch_size=2, seed=7, pack=3, threads=0) as loader:
        first = [{key: array.copy() for key, array in next(loader).items()} for _ in range(5)]
        loader.seek(0)
        _assert_equal([next(loader) for _ in range(5)], first)
    assert len(made) == 1


def test_batches_of_a_bucket_are_as_long_as_it_is(sources, builder):
    batches, _ = _take(30, sources, builder, **MODES["buckets"])
    found = [batch["tokens"].shape[1] for batch in batches]
    assert set(found) == {60, 80, LENGTH}
    for batch, length in zip(batches, found, strict=True):
        longest = (batch["segment_ids"] > 0).sum(axis=1).max()
        assert length == min(bucket for bucket in (60, 80, LENGTH) if bucket >= longest)
        assert batch["positions"].shape == batch["loss_mask"].shape == (4, length)


def test_packed_rows_hold_whole_samples_end_to_end(sources, builder, spec):
    with Loader(sources, builder, batch_size=2, seed=7, pack=3) as loader:
        for _ in range(5):
            rows = loader.next_rows()
            check_batch(rows.batch, spec, 2, LENGTH, clips_per_row=3)
            assert len(rows.samples) == 6
            for row in range(2):
                segments = rows.batch["segment_ids"][row]
                members = [sample for sample in rows.samples[3 * row : 3 * row + 3] if sample is not None]
                assert segments.max() == len(members) > 0
                for number, sample in enumerate(members, 1):
                    clip, here = 3 * row + number - 1, segments == number
                    answer = _answer(builder, rows.batch["tokens"][row], here & rows.batch["loss_mask"][row])
                    assert answer == sample["conversations"][1]["value"] + "<|im_end|>\n"
                    assert rows.batch["positions"][row][here].tolist() == list(range(here.sum()))
                    assert (rows.batch["tokens"][row][here] == builder.media_token_id).sum() == 5
                    source, record, _ = sample["id"].split("-")
                    expected = (int(record) + 1) / 1024 if source != "c" else 0.0
                    assert rows.batch["audio"][clip, 0, 0] == expected
                for clip in range(3 * row + len(members), 3 * row + 3):
                    for key in ("frame_mask", "audio_mask", "interval_mask", "frames", "audio"):
                        assert not rows.batch[key][clip].any()
        counts = loader.count_samples(0, 5)
        assert sum(counts.values()) == sum(loader.num_samples(batch) for batch in range(5))
        names = [name for batch in range(5) for name in loader.sample_ids(batch, whole=True)]
        assert counts == {str(i): sum(n.startswith(x) for n in names) for i, x in enumerate("abc")}
        assert "rows of 160 positions" in loader.describe() and "of 3 clips a row" in loader.describe()


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_sees_every_sample_once(sources, builder, spec, count):
    prompts = dataclasses.replace(builder, prompt=True)
    seen, counted, padding = [], 0, 0
    for index in range(count):
        batches = list(iter_eval(sources, prompts, batch_size=8, process_index=index, process_count=count))
        assert len(batches) == num_eval_batches(open_mixture(sources), 8) == 3
        for rows in batches:
            check_batch(rows.batch, spec, 8 // count, LENGTH)
            assert not rows.batch["loss_mask"].any()
            for row, sample in enumerate(rows.samples):
                if sample is None:
                    padding += 1
                    for key in ("frame_mask", "audio_mask", "interval_mask", "segment_ids"):
                        assert not rows.batch[key][row].any()
                    continue
                seen.append(sample["id"])
                valid = rows.batch["segment_ids"][row] == 1
                text = builder.tokenizer.decode(rows.batch["tokens"][row][valid])
                assert text.endswith("<|im_start|>assistant\n") and "sound" not in text
                assert sample["conversations"][1]["value"].startswith("sound")
        counted += sum(rows.num_samples for rows in batches)
    assert (padding, counted) == (4, 20)
    assert len(seen) == len(set(seen)) == 20
    if count == 1:
        mixture = open_mixture(sources)
        # Weights are ignored, the order is kept.
        assert seen == [mixture.line(number)["id"] for number in range(20)]


def test_text_alone_shows_no_media(sources, builder):
    blind = [dataclasses.replace(source, modalities=()) for source in sources]
    (batch,), _ = _take(1, blind, builder)
    for key in ("frames", "frame_mask", "audio", "audio_mask"):
        assert not batch[key].any()
    assert (batch["tokens"] == builder.media_token_id).sum() == 4 * 5


def test_what_does_not_fit_is_refused_by_name_before_anything_is_read(sources, builder):
    small = dataclasses.replace(builder, max_length=20)
    with pytest.raises(UserError) as caught:
        Loader(sources, small, batch_size=4, seed=7)
    needed = len(builder.encode(RecordReader(sources[0].records).samples[0]).tokens)
    for part in (
        "20 samples do not fit 20 tokens",
        "10 of 10 of source '0'",
        f"'a-0-0' needs {needed} = 5 media + {needed - 5} text",
        "and 2 more",
        "max_length",
        'oversize="leave_out"',
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="source '0': none of its 10 samples fits 20 tokens"):
        Loader(sources, small, batch_size=4, oversize="leave_out")
    with pytest.raises(UserError, match="oversize is 'drop'"):
        Loader(sources, small, batch_size=4, oversize="drop")


def test_dropped_rounds_are_counted_and_their_times_forgotten(sources, builder):
    record = decode_record(RecordReader(sources[0].records)[0], builder.spec)
    sample = {
        "id": "long",
        "conversations": [
            {"from": "human", "value": "At 00:01, what is heard?"},
            {"from": "gpt", "value": "a bell"},
            {"from": "human", "value": "Between 00:00.500 and 00:01.500?"},
            {"from": "gpt", "value": "a drum"},
        ],
    }
    whole = builder.build(record, sample)
    assert whole.dropped_rounds == 0
    assert whole.arrays["intervals"][:2].tolist() == [[1.0, 1.0], [0.5, 1.5]]
    assert (whole.plan.frames, whole.plan.audio_windows, whole.plan.time_tokens) == (2, 1, 4)
    short = dataclasses.replace(builder, max_length=whole.plan.total - 1).build(record, sample)
    assert short.dropped_rounds == 1
    assert short.arrays["interval_mask"].tolist() == [True, False, False]


def test_question_without_times_asks_about_the_whole(sources, builder):
    record = decode_record(RecordReader(sources[0].records)[0], builder.spec)
    sample = {"id": "x", "conversations": [{"from": "human", "value": "What?\nA: 00:01\nB: 00:02"}]}
    prompt = dataclasses.replace(builder, prompt=True)
    row = prompt.build(record, sample)
    assert row.arrays["intervals"][0].tolist() == [0.0, 2.0]
    image = {**record, "duration": np.float32(0)}
    assert prompt.build(image, sample).arrays["intervals"][0].tolist() == [0.0, 0.0]


def test_a_sample_that_cannot_be_read_is_told_with_its_folder(sources, builder, tmp_path):
    folder = Path(shutil.copytree(sources[0].records, tmp_path / "r"))
    (shard,) = folder.glob("*.array_record")
    shard.write_bytes(bytes(shard.stat().st_size))
    with Loader([SourceConfig(str(folder))], builder, batch_size=1, shuffle=False) as loader:
        with pytest.raises(UserError, match=f"^{folder}, sample 0: .*the shard is damaged"):
            next(loader)


def test_closed_loader_says_so(sources, builder):
    loader = Loader(sources, builder, batch_size=4)
    next(loader)
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)
