"""Which sample comes when."""

from __future__ import annotations

import collections
import pickle
import shutil
from pathlib import Path

import pytest

from input_pipeline.errors import UserError
from input_pipeline.mixture import (
    HELD_PERMUTATION,
    MixtureOrder,
    SourceConfig,
    open_mixture,
    open_source,
    shuffled,
)
from input_pipeline.records import SAMPLES, RecordError
from input_pipeline.spec import MediaSpec


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_records) -> dict[str, str]:
    root = tmp_path_factory.mktemp("mixture")
    return {
        "a": make_records(root / "a", 5, name="a"),
        "b": make_records(root / "b", 3, name="b"),
        "silent": make_records(root / "silent", 2, name="silent", audio=False),
        "blind": make_records(root / "blind", 2, name="blind", video=False),
    }


def _epoch(mixture, epoch: int) -> list[int]:
    length = mixture.epoch_length
    return [mixture.at(position) for position in range(epoch * length, (epoch + 1) * length)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_visits_each_sample_once(folders, shuffle):
    sources = [SourceConfig(folders["a"]), SourceConfig(folders["b"])]
    mixture = open_mixture(sources, seed=3, shuffle=shuffle)
    assert len(mixture) == mixture.epoch_length == 16
    epochs = [_epoch(mixture, epoch) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert (len(set(map(tuple, epochs))) == 4) == shuffle  # shuffled anew each time, or never
    assert all((epoch == list(range(16))) != shuffle for epoch in epochs)


def test_order_is_a_function_of_the_seed(folders):
    sources = [SourceConfig(folders["a"]), SourceConfig(folders["b"], weight=0.5)]
    same = [_epoch(open_mixture(sources, seed=1), 2) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != _epoch(open_mixture(sources, seed=2), 2)
    pickled = pickle.loads(pickle.dumps(open_mixture(sources, seed=1)))
    assert _epoch(pickled, 2) == same[0]


def test_weights_count_visits_per_epoch_without_replacement(folders):
    sources = [SourceConfig(folders["a"], weight=0.5), SourceConfig(folders["b"], weight=2)]
    mixture = open_mixture(sources, seed=0)
    assert mixture.epoch_length == 5 + 12
    epochs = [collections.Counter(_epoch(mixture, epoch)) for epoch in range(2)]
    for epoch in epochs:
        assert sum(epoch[number] for number in range(10)) == 5
        assert all(epoch[number] == 2 for number in range(10, 16))
    both = epochs[0] + epochs[1]
    assert all(
        both[number] == 1 for number in range(10)
    )  # the other half of source a came in the second epoch


def test_order_by_hand():
    order = MixtureOrder(lengths=(4, 3), shares=(2, 3), seed=None)
    assert [order[i] for i in range(7)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 2), (0, 3)]


@pytest.mark.parametrize("length", [1, 2, 7, 100, HELD_PERMUTATION, HELD_PERMUTATION + 1])
def test_shuffled_permutes_each_epoch_anew(length):
    epochs = []
    for epoch in range(2):
        start = epoch * length
        elements = [shuffled(start + i, length, seed=5) - start for i in range(length)]
        assert sorted(elements) == list(range(length))
        epochs.append(elements)
    if length >= 7:
        assert epochs[0] != epochs[1]
        assert epochs[0] != [shuffled(i, length, seed=6) for i in range(length)]
        assert epochs[0] != [shuffled(i, length, seed=5, stream=1) for i in range(length)]


def test_shuffled_never_changes():
    # A run that is continued after an upgrade must find the order it began with.
    assert [shuffled(i, 8, seed=0) for i in range(8)] == [3, 2, 1, 6, 0, 7, 4, 5]
    assert [shuffled(i, 100_000, seed=0) for i in range(4)] == [53375, 63346, 47120, 40488]


def test_tasks_and_modalities_select_and_count(folders):
    source = open_source(SourceConfig(folders["a"], tasks=("two",)))
    assert (len(source), source.left_out) == (5, 5)
    assert [source.line(i)["id"] for i in range(5)] == [f"a-{i}-1" for i in range(5)]
    for folder, modalities, count in (
        ("silent", ("video", "audio"), 4),
        ("silent", ("video",), 4),
        ("blind", ("audio",), 4),
        ("blind", (), 4),
    ):
        assert len(open_source(SourceConfig(folders[folder], modalities=modalities))) == count
    for folder, modality in (("silent", "audio"), ("blind", "video")):
        with pytest.raises(UserError, match=rf"{folder} has 4 samples but none of .*{modality}"):
            open_source(SourceConfig(folders[folder], modalities=(modality,)))
    with pytest.raises(UserError, match=r"none of tasks \['three'\].*\['one', 'two'\]"):
        open_source(SourceConfig(folders["a"], tasks=("three",)))


def test_lines_are_found_by_global_number(folders):
    mixture = open_mixture([SourceConfig(folders["a"]), SourceConfig(folders["b"], tasks=("one",))])
    ids = [mixture.line(number)["id"] for number in range(len(mixture))]
    assert ids == [f"a-{i}-{j}" for i in range(5) for j in range(2)] + [f"b-{i}-0" for i in range(3)]


def test_misprepared_records_are_named(folders, spec):
    with pytest.raises(UserError) as caught:
        open_mixture([SourceConfig(folders["a"])], MediaSpec(num_frames=16, image_size=8))
    message = str(caught.value)
    for part in (folders["a"], "num_frames is 2", "16 in the config", "window_frames is 16", "avlm prepare"):
        assert part in message
    # Intervals are parsed when loading; their number does not concern the records.
    other = MediaSpec(num_frames=2, image_size=8, window_frames=16, max_windows=2, max_intervals=99)
    open_mixture([SourceConfig(folders["a"])], other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modalities": ("vision",)}, "unknown modalities"),
        ({"modalities": "video"}, r"write \('video',\)"),
        ({"tasks": "one"}, r"write \('one',\)"),
        ({"weight": -1}, "weight is -1"),
        ({"weight": float("nan")}, "weight is nan"),
    ],
)
def test_bad_source_config(fields, message):
    with pytest.raises(UserError, match=message):
        SourceConfig("records", **fields)


def test_missing_folder_and_empty_mixture(tmp_path):
    with pytest.raises(UserError, match="nowhere.*avlm prepare"):
        open_source(SourceConfig(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="at least one source"):
        open_mixture({})


def test_sources_go_by_their_names(folders):
    sources = {"x": SourceConfig(folders["b"]), "a": SourceConfig(folders["a"], weight=2)}
    mixture = open_mixture(sources, seed=1)
    assert [source.name for source in mixture.sources] == ["a", "x"]
    assert mixture.shares == {"a": 20, "x": 6}
    turned = open_mixture(dict(reversed(sources.items())), seed=1)
    assert turned.fingerprint(4) == mixture.fingerprint(4)
    assert _epoch(turned, 0) == _epoch(mixture, 0)


def test_a_source_of_no_weight_is_left_out(folders, tmp_path):
    gone = SourceConfig(str(tmp_path / "gone"), weight=0)
    mixture = open_mixture({"a": SourceConfig(folders["a"]), "gone": gone})
    assert [source.name for source in mixture.sources] == ["a"]
    with pytest.raises(UserError, match="at least one source"):
        open_mixture({"gone": gone})


@pytest.mark.parametrize("shuffle", [True, False])
def test_epochs_as_a_whole_are_the_positions_one_by_one(folders, shuffle):
    sources = [
        SourceConfig(folders["a"], weight=0.7),
        SourceConfig(folders["b"], weight=2),
        SourceConfig(folders["silent"], weight=1.5),
    ]
    mixture = open_mixture(sources, seed=3, shuffle=shuffle)
    assert not mixture.whole_passes
    for epoch in range(5):
        assert mixture.epoch(epoch).tolist() == _epoch(mixture, epoch)
    length = mixture.epoch_length
    assert mixture.numbers(length - 3, 3 * length + 2).tolist() == [
        mixture.at(position) for position in range(length - 3, 3 * length + 2)
    ]
    assert mixture.numbers(5, 5).tolist() == []


def test_samples_jsonl_that_is_cut_short_is_told(folders, tmp_path):
    folder = Path(shutil.copytree(folders["a"], tmp_path / "a"))
    path = folder / SAMPLES
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]))
    with pytest.raises(RecordError, match=f"{path} has 6 lines, manifest.json says 10; .*prepare again"):
        open_source(SourceConfig(str(folder)))
    path.write_bytes(b"".join(lines[:6]) + lines[6][:-20])
    with pytest.raises(RecordError, match=f"{path}: line 7 cannot be read .*prepare again"):
        open_source(SourceConfig(str(folder)))


def test_fingerprint_sees_which_samples_the_lines_name(folders, tmp_path):
    folder = Path(shutil.copytree(folders["a"], tmp_path / "a"))
    mixtures = [open_mixture([SourceConfig(str(folder))])]
    lines = (folder / SAMPLES).read_bytes().splitlines(keepends=True)
    assert len(set(map(len, lines))) == 1  # Where the lines stand stays as it is.
    (folder / SAMPLES).write_bytes(b"".join(reversed(lines)))
    mixtures.append(open_mixture([SourceConfig(str(folder))]))
    assert mixtures[0].fingerprint(4) != mixtures[1].fingerprint(4)


def test_fingerprint_follows_what_the_order_depends_on(folders):
    def fingerprint(batch_size=4, seed=0, shuffle=True, **fields):
        return open_mixture([SourceConfig(folders["a"], **fields)], seed=seed, shuffle=shuffle).fingerprint(
            batch_size
        )

    others = [
        fingerprint(batch_size=2),
        fingerprint(seed=1),
        fingerprint(shuffle=False),
        fingerprint(weight=2),
        fingerprint(tasks=("one",)),
        open_mixture([SourceConfig(folders["b"])]).fingerprint(4),
    ]
    assert fingerprint() == fingerprint()
    assert len({fingerprint(), *others}) == 7
