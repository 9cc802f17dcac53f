"""Records come back as they went in, a folder is whole or absent, and what does not fit says why."""

from __future__ import annotations

import json
import pickle

import msgpack
import numpy as np
import pytest

from input_pipeline.media import LoadedMedia
from input_pipeline.records import (
    RecordError,
    RecordReader,
    RecordWriter,
    decode_record,
    encode_record,
    pad_media,
    unpack_record,
)
from input_pipeline.spec import MediaSpec

SPEC = MediaSpec(num_frames=3, image_size=16, window_frames=16, max_windows=2)
SAMPLES = [
    {"id": "q1", "task": "qa", "conversations": [{"from": "human", "value": "Was läuft?"}], "answer": "B"},
    {"id": "q2", "task": "caption", "source": "other", "conversations": []},
]


def make_media(frames: int = 2, windows: int = 1, seed: int = 0) -> LoadedMedia:
    rng = np.random.default_rng(seed)
    steps = np.linspace(0, 255, 16, dtype=np.uint8)
    picture = np.stack([np.tile(steps, (16, 1)), np.tile(steps[:, None], (1, 16)), np.full((16, 16), 99)], -1)
    sound = rng.integers(-32768, 32768, 1000) / 32768
    return LoadedMedia(
        frames=np.repeat(picture[None].astype(np.uint8), frames, 0),
        frame_times=np.arange(frames) * 0.5 + 0.25,
        windows=[(0.0, 1000 / 16_000, sound.astype(np.float32))] * windows,
        duration=1.5,
    )


def write(folder, records=1, **options):
    with RecordWriter(folder, SPEC, **options) as writer:
        for number in range(records):
            media = make_media(seed=number)
            writer.add(encode_record(media, media_id=f"m{number}", source="set", samples=SAMPLES))
        return writer.finish(manifest_lines=records * 2)


def test_round_trip():
    media = make_media()
    row = decode_record(encode_record(media, media_id="a/b.mp4", source="set", samples=SAMPLES), SPEC)
    shapes = SPEC.batch_shapes(1, 1)
    for key in ("frames", "frame_times", "frame_mask", "audio", "audio_spans", "audio_mask", "duration"):
        shape, dtype = shapes[key]
        assert (np.shape(row[key]), row[key].dtype) == (shape[1:], dtype), key
    assert row["frame_mask"].tolist() == [True, True, False]
    assert row["audio_mask"].tolist() == [True, False]
    assert row["frame_times"].tolist() == [0.25, 0.75, 0.0]
    assert np.abs(row["frames"][:2].astype(int) - media.frames).mean() < 2 and not row["frames"][2].any()
    np.testing.assert_array_equal(row["audio"][0, :1000], media.windows[0][2])  # int16 sound is exact
    assert not row["audio"][0, 1000:].any()
    assert row["audio_spans"].tolist() == [[0.0, 0.0625], [0.0, 0.0]]
    assert (row["samples"], row["id"], row["source"]) == (SAMPLES, "a/b.mp4", "set")
    assert row["duration"] == 1.5


def test_full_scale_does_not_wrap_around():
    media = LoadedMedia(
        np.zeros((0, 16, 16, 3), np.uint8), np.zeros(0), [(0, 1, np.array([1.0, -1.0], "f4"))], 1
    )
    audio = decode_record(encode_record(media, media_id="a"), SPEC)["audio"][0, :2]
    np.testing.assert_allclose(audio, [1.0, -1.0], atol=1e-4)


@pytest.mark.parametrize("missing", ["frames", "audio"])
def test_a_missing_modality_is_a_mask(missing):
    media = make_media(frames=0 if missing == "frames" else 2, windows=0 if missing == "audio" else 1)
    for row in (
        decode_record(encode_record(media, media_id="a"), SPEC),
        decode_record(encode_record(make_media(), media_id="a"), SPEC, **{missing: False}),
    ):
        assert not row["frame_mask" if missing == "frames" else "audio_mask"].any()
        assert row["audio_mask" if missing == "frames" else "frame_mask"].any()
    record = unpack_record(encode_record(media, media_id="a"))
    assert (record["has_video"], record["has_audio"]) == (missing != "frames", missing != "audio")


def test_what_does_not_fit_is_refused():
    data = encode_record(make_media(frames=3, windows=2), media_id="clip.mp4")
    decode_record(data, SPEC)
    with pytest.raises(RecordError, match=r"clip\.mp4 has 3 frames"):
        decode_record(data, MediaSpec(num_frames=2, image_size=16, window_frames=16, max_windows=2))
    with pytest.raises(RecordError, match="2 audio windows"):
        decode_record(data, MediaSpec(num_frames=3, image_size=16, window_frames=16, max_windows=1))
    with pytest.raises(RecordError, match=r"frames of \[16, 16, 3\]"):
        decode_record(data, MediaSpec(num_frames=3, image_size=8, window_frames=16, max_windows=2))
    with pytest.raises(RecordError, match="1000 samples"):
        decode_record(data, MediaSpec(num_frames=3, image_size=16, window_frames=2, max_windows=2))
    media = make_media()
    row = pad_media(media.frames, media.frame_times, media.windows, media.duration, SPEC)
    np.testing.assert_array_equal(row["frames"][:2], media.frames)


def test_foreign_bytes_and_schemas_are_refused():
    for data in (b"", b"no record", msgpack.packb([1]), msgpack.packb({"id": "a"})):
        with pytest.raises(RecordError, match="schema 1"):
            unpack_record(data)
    with pytest.raises(RecordError, match="schema 2.*avlm prepare"):
        unpack_record(msgpack.packb({"schema": 2}))


def test_folder_of_records(tmp_path):
    manifest = write(tmp_path / "r", 5, shard_bytes=8_000)
    assert len(manifest["shards"]) > 1
    assert manifest["counts"] == {"manifest_lines": 10, "records": 5, "samples": 10, "rejected": 0}
    names = sorted(path.name for path in (tmp_path / "r").iterdir())
    count = len(manifest["shards"])
    shards = [f"shard-{i:05d}-of-{count:05d}.array_record" for i in range(count)]
    assert names == ["manifest.json", "rejected.jsonl", "samples.jsonl", *shards]
    assert [path.name for path in tmp_path.iterdir()] == ["r"]  # nothing left beside it

    reader = pickle.loads(pickle.dumps(RecordReader(tmp_path / "r", SPEC)))
    assert len(reader) == 5 and reader.spec == SPEC
    for index in (4, 0, 3, 1, 2):
        assert unpack_record(reader[index])["id"] == f"m{index}"
    with pytest.raises(IndexError):
        reader[5]
    assert reader.samples[3] == {
        "record": 1, "sample": 1, "id": "q2", "task": "caption", "source": "other",
        "has_video": True, "has_audio": True, "conversations": [],
    }  # fmt: skip
    assert reader.samples[2]["source"] == "set"
    reader.verify()


def test_same_input_gives_the_same_bytes(tmp_path):
    assert write(tmp_path / "a", 3) == write(tmp_path / "b", 3)


def test_another_media_spec_is_named_field_by_field(tmp_path):
    write(tmp_path / "r")
    other = MediaSpec(num_frames=4, image_size=16, window_frames=16, max_windows=2, sampler="linspace")
    with pytest.raises(RecordError) as caught:
        RecordReader(tmp_path / "r", other)
    assert "num_frames is 3 in the records, 4 in the config" in str(caught.value)
    assert "sampler" in str(caught.value) and "image_size" not in str(caught.value)
    more_intervals = MediaSpec(3, 16, window_frames=16, max_windows=2, max_intervals=99)
    assert len(RecordReader(tmp_path / "r", more_intervals)) == 1  # times are not in the records


def test_damage_is_named(tmp_path):
    write(tmp_path / "r", 3)
    (shard,) = (tmp_path / "r").glob("shard-*")
    data = shard.read_bytes()
    place = len(data) // 2
    while data[place] == 0:  # between the records is padding
        place -= 1
    shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    reader = RecordReader(tmp_path / "r")
    with pytest.raises(RecordError, match=f"{shard.name} differs"):
        reader.verify()
    with pytest.raises(RecordError, match=rf"{shard.name}: record \d cannot be read"):
        for index in range(3):
            reader[index]
    shard.write_bytes(data[:-1])
    with pytest.raises(RecordError, match=f"{shard.name} has {len(data) - 1} bytes"):
        RecordReader(tmp_path / "r")
    shard.unlink()
    with pytest.raises(RecordError, match=f"{shard.name} is missing"):
        RecordReader(tmp_path / "r")


def test_unfinished_and_foreign_folders(tmp_path):
    with pytest.raises(RecordError, match="does not exist"):
        RecordReader(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"no manifest\.json"):
        RecordReader(tmp_path / "empty")
    write(tmp_path / "empty")  # an empty folder may be filled
    manifest = tmp_path / "empty" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "schema_version": 9}))
    with pytest.raises(RecordError, match="schema_version 9"):
        RecordReader(tmp_path / "empty")
    manifest.write_text('{"schema_version": 1}')
    with pytest.raises(RecordError, match="media_spec"):
        RecordReader(tmp_path / "empty")
    manifest.write_text("{")
    with pytest.raises(RecordError, match="cannot be read"):
        RecordReader(tmp_path / "empty")


def test_writing_is_all_or_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), RecordWriter(tmp_path / "r", SPEC) as writer:
        writer.add(encode_record(make_media(), media_id="a"))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []

    first = write(tmp_path / "r", 2)
    with pytest.raises(RecordError, match="--overwrite"):
        RecordWriter(tmp_path / "r", SPEC)
    with pytest.raises(ZeroDivisionError), RecordWriter(tmp_path / "r", SPEC, overwrite=True):
        raise ZeroDivisionError
    assert RecordReader(tmp_path / "r").manifest == first
    assert write(tmp_path / "r", 1, overwrite=True) == RecordReader(tmp_path / "r").manifest != first

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "manifest.json").write_text("{}")
    (tmp_path / "photos" / "holiday.jpg").write_text("dear")
    with pytest.raises(RecordError, match=r"holiday\.jpg"):
        RecordWriter(tmp_path / "photos", SPEC, overwrite=True)
    assert (tmp_path / "photos" / "holiday.jpg").exists()
    with pytest.raises(RecordError, match="is a file"):
        RecordWriter(tmp_path / "photos" / "holiday.jpg", SPEC)
