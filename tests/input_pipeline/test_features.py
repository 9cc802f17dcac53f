"""Records of features: read without copies, padded and masked like media, and handed out by the loader as bf16."""

from __future__ import annotations

import json
from pathlib import Path

import msgpack
import numpy as np
import pytest

from input_pipeline import features as features_module
from input_pipeline.errors import UserError
from input_pipeline.features import feature_shapes, keep_large_buffers, replace_media
from input_pipeline.loader import Loader, iter_eval
from input_pipeline.mixture import SourceConfig
from input_pipeline.records import RecordError, RecordReader, finish_records, unpack_record, write_shard
from input_pipeline.spec import FEATURE_DTYPE, PIXELS, FeatureShapes, MediaSpec, check_batch
from input_pipeline.transforms.media import decode_record
from input_pipeline.transforms.sample import SampleBuilder
from input_pipeline.working_folder import WorkingFolder

VIDEO, AUDIO = (4, 6), (8, 5)  # (tokens, width)
LENGTH = 120


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(FEATURE_DTYPE)


def write_features(folder: Path, records: str, *, video: bool = True, audio: bool = True) -> str:
    """Features drawn by the record's number in place of the media of `records`."""
    reader = RecordReader(records)

    def encoded(number: int) -> bytes:
        record = unpack_record(reader[number])
        return replace_media(
            record,
            video=draw(number, len(record["frames"]), *VIDEO) if video else None,
            audio=draw(number, len(record["windows"]), *AUDIO) if audio else None,
        )

    section = {
        **({"video": {"shape": VIDEO}} if video else {}),
        **({"audio": {"shape": AUDIO}} if audio else {}),
    }
    with WorkingFolder(folder, "test") as work:
        entry = write_shard(work.path, 0, 1, map(encoded, range(len(reader))))
        finish_records(work.path, reader.spec, [entry], plan="test", manifest_lines=1, features=section)
        work.put_in_place()
    return str(folder)


@pytest.fixture
def builder(spec: MediaSpec, tokenizer) -> SampleBuilder:
    media = tokenizer.convert_tokens_to_ids("<|media|>")
    return SampleBuilder(spec, tokenizer, media, num_media_tokens=4, max_length=LENGTH)


def test_features_come_back_as_they_were(tmp_path: Path, make_records, spec: MediaSpec) -> None:
    records = make_records(tmp_path / "r", 2)
    reader = RecordReader(write_features(tmp_path / "f", records))
    assert reader.features == FeatureShapes(VIDEO, AUDIO) and RecordReader(records).features == PIXELS
    media = decode_record(RecordReader(records)[1], spec)
    row = decode_record(reader[1], spec)
    assert row.keys() - media.keys() == {"frame_features", "audio_features"}
    assert media.keys() - row.keys() == {"frames", "audio"}
    np.testing.assert_array_equal(row["frame_features"], draw(1, 2, *VIDEO))
    np.testing.assert_array_equal(row["audio_features"][:1], draw(1, 1, *AUDIO))
    assert row["audio_features"].shape == (2, *AUDIO) and not row["audio_features"][1].any()
    # Frames that need no padding are a view of the record's bytes.
    assert not row["frame_features"].flags.owndata and not row["frame_features"].flags.writeable
    for key in ("frame_times", "frame_mask", "audio_spans", "audio_mask", "duration", "samples", "id"):
        np.testing.assert_array_equal(row[key], media[key])
    hidden = decode_record(reader[1], spec, frames=False, audio=False)
    assert not any(
        hidden[key].any() for key in hidden if key.endswith(("_features", "_mask", "_times", "_spans"))
    )
    assert {key: hidden[key].shape for key in hidden if key.endswith("_features")} == {
        "frame_features": (2, *VIDEO),
        "audio_features": (2, *AUDIO),
    }


def test_what_does_not_fit_is_refused(tmp_path: Path, make_records, spec: MediaSpec) -> None:
    record = unpack_record(RecordReader(make_records(tmp_path / "r", 1))[0])
    with pytest.raises(ValueError, match=r"float32\[2, 4, 6\], expected bfloat16\[2"):
        replace_media(record, video=draw(0, 2, *VIDEO).astype(np.float32))
    with pytest.raises(ValueError, match=r"bfloat16\[3, 8, 5\], expected bfloat16\[1"):
        replace_media(record, audio=draw(0, 3, *AUDIO))
    cut = unpack_record(replace_media(record, video=draw(0, 2, *VIDEO)))
    cut["frame_features"]["data"] = cut["frame_features"]["data"][:-2]
    with pytest.raises(RecordError, match="s-0: damaged features"):
        decode_record(msgpack.packb(cut), spec)
    small = MediaSpec(num_frames=1, image_size=8, window_frames=16, max_windows=2)
    with pytest.raises(RecordError, match="has 2 frames"):
        decode_record(replace_media(record, video=draw(0, 2, *VIDEO)), small)


@pytest.mark.parametrize(
    "section", [{"video": {}}, {"video": {"shape": [1]}}, {"audio": {"shape": "ab"}}, None]
)
def test_a_damaged_manifest_is_told(section) -> None:
    with pytest.raises(UserError, match="'features' of manifest.json is damaged"):
        feature_shapes({"features": section})


@pytest.mark.parametrize(("video", "audio"), [(True, True), (True, False), (False, True)])
def test_the_loader_gives_out_features(
    tmp_path: Path, make_records, builder: SampleBuilder, video: bool, audio: bool
) -> None:
    records = make_records(tmp_path / "r", 3, tasks=("one",))
    folder = write_features(tmp_path / "f", records, video=video, audio=audio)
    shapes = FeatureShapes(VIDEO if video else None, AUDIO if audio else None)
    with Loader([SourceConfig(folder)], builder, batch_size=3, shuffle=False, threads=0) as loader:
        batch = next(loader)
    check_batch(batch, builder.spec, 3, LENGTH, features=shapes)
    with pytest.raises(ValueError, match="_features|frames|audio"):
        check_batch(batch, builder.spec, 3, LENGTH)
    if video:
        expected = np.stack([draw(number, 2, *VIDEO) for number in range(3)])
        np.testing.assert_array_equal(batch["frame_features"], expected)
    with Loader([SourceConfig(records)], builder, batch_size=3, shuffle=False, threads=0) as loader:
        pixels = next(loader)
    for key in batch.keys() & pixels.keys():
        np.testing.assert_array_equal(batch[key], pixels[key])
    # The last batch of an evaluation is filled up with padding rows of the same kind.
    rows = list(iter_eval([SourceConfig(folder)], builder, batch_size=2, threads=0))
    check_batch(rows[-1].batch, builder.spec, 2, LENGTH, features=shapes)
    assert not rows[-1].batch["frame_mask"][1].any()


def test_worker_processes_hand_over_bf16(tmp_path: Path, make_records, builder: SampleBuilder) -> None:
    folder = write_features(tmp_path / "f", make_records(tmp_path / "r", 2))
    batches = []
    for workers in (0, 1):
        with Loader([SourceConfig(folder)], builder, batch_size=2, workers=workers, threads=0) as loader:
            batches.append({key: np.array(value) for key, value in next(loader).items()})
    for key, value in batches[0].items():
        assert batches[1][key].dtype == value.dtype
        np.testing.assert_array_equal(batches[1][key], value)


def test_only_readers_of_features_touch_the_allocator(
    tmp_path: Path, make_records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make_records(tmp_path / "r", 1)
    folder = write_features(tmp_path / "f", records)
    set_to: dict[int, int] = {}

    class Library:
        def __init__(self, name: None) -> None:
            self.mallopt = set_to.__setitem__

    monkeypatch.setattr(features_module.ctypes, "CDLL", Library)
    keep_large_buffers.cache_clear()
    RecordReader(records)[0]
    assert not set_to
    RecordReader(folder)[0]
    assert set_to == features_module.ALLOCATOR
    keep_large_buffers.cache_clear()


def test_the_shard_is_not_compressed(tmp_path: Path, make_records) -> None:
    folder = write_features(tmp_path / "f", make_records(tmp_path / "r", 1))
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    data = (Path(folder) / manifest["shards"][0]["file"]).read_bytes()
    assert draw(0, 2, *VIDEO).tobytes() in data
