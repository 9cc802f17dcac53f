"""Manifests, killable workers and the command: what is bad is listed, what is good goes through."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from input_pipeline import prepare_command
from input_pipeline.decoding import prepare_one
from input_pipeline.errors import UserError
from input_pipeline.manifest import (
    ManifestError,
    MediaLine,
    Rejection,
    list_files,
    list_folder,
    read_manifest,
)
from input_pipeline.media import Limits
from input_pipeline.media_config import media_spec_from_config
from input_pipeline.prepare import prepare
from input_pipeline.records import RecordReader, unpack_record
from input_pipeline.spec import MediaSpec
from input_pipeline.transforms.media import decode_record
from input_pipeline.workers import Worker, WorkerFailure
from tests.input_pipeline.media_corpus import cut, grey_levels, write_sound, write_video

SPEC = MediaSpec(num_frames=4, image_size=16, window_frames=50, max_windows=2)
TURNS = [{"from": "human", "value": "<video>\nWhat is heard?"}, {"from": "gpt", "value": "A tone."}]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with a film, a film with sound, a sound, a picture-less text, and a cut-off film."""
    folder = tmp_path_factory.mktemp("clips")
    times = [i / 10 for i in range(12)]
    write_video(folder / "plain.mp4", grey_levels(12), times)
    tone = (8000 * np.sin(np.arange(16_000) / 6)).astype(np.int16)
    write_video(folder / "both.mkv", grey_levels(12), times, sound=tone)
    write_sound(folder / "tone.wav", tone[None], 16_000)
    (folder / "notes.txt").write_text("no media")
    (folder / ".hidden.mp4").write_text("no media")
    cut(folder / "plain.mp4", 0.6, "cut.mp4")
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def call(*arguments) -> int:
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    return prepare_command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_manifest_with_bad_lines(tmp_path, clips):
    def line(**fields):
        return json.dumps({"id": "x", "video": "plain.mp4", "conversations": TURNS, **fields})

    human, gpt = TURNS
    bad = {
        "not JSON": '{"id": ',
        "no JSON object": '["a"]',
        "names no medium": json.dumps({"id": "x", "conversations": TURNS}),
        "names 2 media": line(audio="tone.wav"),
        'no "id"': json.dumps({"video": "plain.mp4", "conversations": TURNS}),
        '"id" is 7': line(id=7),
        "must be a list": line(conversations="Hello"),
        "media placeholders": line(conversations=[{**human, "value": "<video> <image> What?"}, gpt]),
        "later question": line(conversations=[{**human, "value": "What?"}, gpt, human, gpt]),
        "is empty": line(conversations=[human, {**gpt, "value": "  "}]),
        "alternate": line(conversations=[gpt, human]),
        "question is empty": line(conversations=[{**human, "value": "<video>"}, gpt, human, gpt]),
        "no turn": line(conversations=[]),
        "no record can store": line(note=2**70),
    }
    # The third has no question: a caption that the template 'plain' can use.
    caption = [{**human, "value": "<video>"}, gpt]
    good = [line(id="first", task="qa"), line(id="second", source="own", letter="B")]
    good += [line(id="third", conversations=caption)]
    manifest = clips / "m.jsonl"
    manifest.write_text("\n".join(["", good[0], *bad.values(), "", *good[1:]]))
    listing = read_manifest(manifest)
    assert listing.count == len(bad) + 3
    for number, (reason, rejection) in enumerate(zip(bad, listing.rejections, strict=True), start=3):
        assert reason in rejection.reason and f"line {number}" in rejection.reason, rejection
        assert rejection.stage == "manifest"
    assert listing.rejections[-1].path == str(clips / "plain.mp4") and listing.rejections[-1].id == "x"
    first, second, third = listing.lines
    assert third.sample()["conversations"] == caption
    assert first.path == str(clips / "plain.mp4") and first.name == "plain.mp4" and first.kind == "video"
    assert (first.task, first.source, second.source) == ("qa", "m", "own")
    assert second.sample() == {
        "id": "second", "task": "chat", "source": "own", "letter": "B", "conversations": TURNS
    }  # fmt: skip


def test_manifests_that_cannot_be_read(tmp_path):
    for content, reason in ((b"", "no line"), (b'[{"id": 1}]', "JSON array"), (b"\xff\xfe\x00", "UTF-8")):
        (tmp_path / "m.jsonl").write_bytes(content)
        with pytest.raises(ManifestError, match=reason):
            read_manifest(tmp_path / "m.jsonl")
    with pytest.raises(ManifestError, match="no such manifest"):
        read_manifest(tmp_path / "missing.jsonl")


def test_folders_and_files(clips, tmp_path):
    listing = list_folder(clips)
    assert [line.name for line in listing.lines] == ["both.mkv", "cut.mp4", "plain.mp4", "tone.wav"]
    assert {"notes.txt", ".hidden.mp4"} <= set(listing.ignored) and listing.rejections == []
    assert all(line.conversations is None and line.source == clips.name for line in listing.lines)
    files = [clips / "notes.txt", clips / "tone.wav", clips / "." / "tone.wav"]
    assert [os.path.basename(line.path) for line in list_files(files).lines] == ["notes.txt", "tone.wav"]
    with pytest.raises(ManifestError, match="--folder"):
        list_files([clips])
    with pytest.raises(ManifestError, match="no media file"):
        list_folder(tmp_path)
    name = os.fsdecode(b"bad\xff.mp4")
    shutil.copy(clips / "plain.mp4", tmp_path / name)
    listing = list_folder(tmp_path)
    assert listing.lines == [] and "not UTF-8" in listing.rejections[0].reason
    json.dumps(vars(listing.rejections[0])).encode()


def test_prepare_one_is_a_function_of_the_file(clips):
    line = MediaLine(str(clips / "both.mkv"), "both.mkv", "video", "q", conversations=TURNS)
    data = prepare_one([line, MediaLine(line.path, line.name, "video")], SPEC)
    assert data == prepare_one([line, MediaLine(line.path, line.name, "video")], SPEC)
    record = unpack_record(data)
    assert record["id"] == "both.mkv" and [sample["id"] for sample in record["samples"]] == ["q"]
    rejection = prepare_one([line], SPEC, Limits(max_bytes=10))
    assert (
        rejection == Rejection(line.path, "q", rejection.reason, "limit") and "max_bytes" in rejection.reason
    )


def test_good_lines_go_through_in_order_with_any_number_of_workers(clips, tmp_path):
    entries = [
        {"id": "a", "video": "plain.mp4", "conversations": TURNS},
        {"id": "b", "audio": "tone.wav"},
        {"id": "c", "video": "cut.mp4", "conversations": TURNS},
        {"id": "d", "video": "both.mkv", "conversations": TURNS},
        {"id": "e", "video": "plain.mp4", "conversations": TURNS, "task": "qa"},
        {"id": "f", "video": "cut.mp4", "conversations": TURNS},
        {"id": "g", "video": "missing.mp4"},
        {"id": "h", "video": "plain.mp4", "conversations": "none"},
    ]
    shards = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        report = prepare(entries, out, SPEC, media_root=clips, source="test", workers=workers)
        assert (report.records, report.samples, report.manifest_lines) == (3, 3, 8)
        assert report.exit_code == 1
        assert [(row["id"], row["stage"]) for row in rows(out / "rejected.jsonl")] == [
            ("h", "manifest"), ("c", "open"), ("f", "open"), ("g", "open"),
        ]  # fmt: skip
        assert [vars(rejection) for rejection in report.rejected] == rows(out / "rejected.jsonl")
        assert str(clips / "missing.mp4") in report.summary() and "4 of 8 lines" in report.summary()
        reader = RecordReader(out, SPEC)
        assert [unpack_record(reader[i])["id"] for i in range(3)] == ["plain.mp4", "tone.wav", "both.mkv"]
        assert [(s["record"], s["sample"], s["id"]) for s in reader.samples] == [
            (0, 0, "a"), (0, 1, "e"), (2, 0, "d"),
        ]  # fmt: skip
        shards.append(reader.manifest["shards"])
    assert shards[0] == shards[1] == shards[2]
    sound = decode_record(reader[1], SPEC)
    assert not sound["frame_mask"].any() and sound["audio_mask"].all() and sound["samples"] == []


def test_a_worker_that_hangs_or_crashes_costs_one_message():
    program = (
        "import os, signal, struct, sys, time\n"
        "def send(data):\n"
        "    sys.stdout.buffer.write(struct.pack('<Q', len(data)) + data)\n"
        "    sys.stdout.buffer.flush()\n"
        "send(b'')\n"
        "while header := sys.stdin.buffer.read(8):\n"
        "    job = sys.stdin.buffer.read(struct.unpack('<Q', header)[0])\n"
        "    if job == b'hang': signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)\n"
        "    if job == b'crash': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if job == b'leave': sys.exit(3)\n"
        "    send(job[::-1])\n"
    )
    worker = Worker([sys.executable, "-c", program])
    try:
        assert worker.run(b"abc", 60) == b"cba"
        large = os.urandom(3 << 20)
        assert worker.run(large, 60) == large[::-1]
        began = time.monotonic()
        with pytest.raises(WorkerFailure, match="limit of 0.5 s") as caught:
            worker.run(b"hang", 0.5)
        assert caught.value.stage == "timeout" and time.monotonic() - began < 60
        assert worker.run(b"abc", 60) == b"cba"  # by another process
        with pytest.raises(WorkerFailure, match="SIGSEGV") as caught:
            worker.run(b"crash", 60)
        assert caught.value.stage == "crash"
        with pytest.raises(WorkerFailure, match="exit code 3"):
            worker.run(b"leave", 60)
    finally:
        worker.stop()
        worker.join()
    with pytest.raises(WorkerFailure, match="stopped"):
        worker.run(b"abc", 60)
    with pytest.raises(RuntimeError, match="no such thing"):
        Worker([sys.executable, "-c", "raise ImportError('no such thing')"]).run(b"abc", 1)


def test_late_files_are_rejected_and_the_rest_goes_on(clips, tmp_path):
    entries = [{"video": "plain.mp4"}, {"video": "both.mkv"}]
    report = prepare(entries, tmp_path / "r", SPEC, media_root=clips, workers=1, timeout=1e-6)
    assert [rejection.stage for rejection in report.rejected] == ["timeout", "timeout"]
    assert "--timeout" in report.rejected[0].reason and report.records == 0


def test_workers_import_only_the_decoder():
    code = "import sys, input_pipeline.decoding; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root()
    )
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert "av" in loaded
    assert not loaded & {
        "jax",
        "flax",
        "grain",
        "array_record",
        "transformers",
        "tensorflow",
        "torch",
        "apache_beam",
    }


def _root() -> str:
    return os.path.dirname(os.path.dirname(prepare_command.__file__))


def test_command(clips, tmp_path, capsys):
    config = tmp_path / "system.py"
    config.write_text(
        "def get_config(arg):\n"
        "    return {'media': {'num_frames': 3, 'image_size': 16 if arg == 'size=demo' else 32}}\n"
    )
    out = tmp_path / "r"
    common = ("--out", out, "--workers", 1, "--config", f"{config}:size=demo", "--max-windows", 1)
    assert call(clips / "plain.mp4", clips / "tone.wav", *common) == 0
    assert RecordReader(out).spec == MediaSpec(num_frames=3, image_size=16, max_windows=1)
    assert "2 records" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        call(clips / "plain.mp4", *common)
    assert call("--folder", clips, *common, "--overwrite") == 1
    printed = capsys.readouterr().out
    assert "cut.mp4" in printed and "files ignored" in printed and "1 of 4 lines rejected" in printed

    for arguments, reason in (
        ((), "none was given"),
        (("--folder", clips, clips / "plain.mp4"), "files and --folder"),
        (("--folder", clips, "--num-frames", 0), "num_frames"),
        (("--folder", clips, "--timeout", 0), "--timeout"),
        (("--folder", clips, "--workers", 0), "--workers"),
        (("--dataset", "any"), "belong together"),
        (("--folder", clips, "--annotations", "a.json"), "belong together"),
        (("--folder", clips, "--write-manifest", "m.jsonl"), "leave out --out"),
        (("--folder", clips, "--config", tmp_path / "none.py"), "there is no file"),
    ):
        with pytest.raises(UserError, match=reason):
            call(*arguments, "--out", tmp_path / "never")
    with pytest.raises(UserError, match="--out DIR"):
        call("--folder", clips)
    assert not (tmp_path / "never").exists()
    config.write_text("def get_config(arg):\n    return {'media': {'num_frame': 3}}\n")
    with pytest.raises(UserError, match=r"media\.num_frame is unknown; did you mean media\.num_frames"):
        media_spec_from_config(str(config))


def test_a_data_set_goes_through_its_importer(clips, tmp_path, capsys):
    (tmp_path / "a.csv").write_text('abcdefghijk,0,"a bell, ringing",train\n-bcdefghijk,5,rain,train\n')
    media = tmp_path / "media"
    media.mkdir()
    shutil.copy(clips / "both.mkv", media / "abcdefghijk_000000.mkv")
    common = ("--dataset", "vggsound", "--annotations", tmp_path / "a.csv", "--media-root", media)
    assert call(*common, "--out", tmp_path / "r", "--image-size", 16) == 1
    assert RecordReader(tmp_path / "r").manifest["counts"] == {
        "manifest_lines": 2, "records": 1, "samples": 1, "rejected": 1
    }  # fmt: skip
    assert "-bcdefghijk_000005" in capsys.readouterr().out

    manifest = tmp_path / "m.jsonl"
    assert call(*common, "--write-manifest", manifest) == 1
    assert "1 of 2 lines rejected" in capsys.readouterr().out
    assert (
        call("--manifest", manifest, "--media-root", media, "--out", tmp_path / "r2", "--image-size", 16) == 1
    )
    shard = "shard-00000-of-00001.array_record"
    assert (tmp_path / "r2" / shard).read_bytes() == (tmp_path / "r" / shard).read_bytes()

    with pytest.raises(UserError, match="nothing is left .* 2 left out: split train"):
        call(*common, "--out", tmp_path / "r3", "--dataset-option", "split=test")


def test_options_of_an_importer(clips, tmp_path, capsys):
    common = ("--dataset", "vggsound", "--annotations", tmp_path / "a.csv", "--out", tmp_path / "r")
    (tmp_path / "a.csv").write_text("abcdefghijk,0,rain,train\n")
    for wrong, reason in (
        ("split", "NAME=VALUE"),
        ("splt=test", "split"),
        ("path=x", "of the command itself"),
    ):
        with pytest.raises(UserError, match=reason):
            call(*common, "--dataset-option", wrong)
    with pytest.raises(UserError, match="goes with --dataset"):
        call("--folder", clips, "--out", tmp_path / "r", "--dataset-option", "split=test")
    with pytest.raises(UserError, match="vggsound"):
        call("--dataset", "vgsound", "--annotations", tmp_path / "a.csv", "--out", tmp_path / "r")
    assert call("--describe-dataset", "VGGSound") == 0
    assert "split=train" in capsys.readouterr().out
    assert call("--describe-dataset") == 0
    assert "  vggsound       VGGSound: clips with the label" in capsys.readouterr().out


def test_the_audio_backend_is_part_of_the_plan(clips, tmp_path, monkeypatch):
    plain = prepare(list_files([clips / "tone.wav"]), tmp_path / "a", MediaSpec(image_size=16))
    python = os.environ.get("AVLM_TFIO_PYTHON") or ".venv-tfio/bin/python"
    if not os.path.isfile(python):
        pytest.skip("no environment with tensorflow-io; `avlm doctor --make-tfio-venv` builds one")
    other = prepare(list_files([clips / "tone.wav"]), tmp_path / "b", MediaSpec(image_size=16), tfio=python)
    assert plain.records == other.records == 1
    manifests = [RecordReader(tmp_path / name).manifest for name in "ab"]
    assert manifests[0]["plan"] != manifests[1]["plan"]
    assert manifests[1]["audio_backend"]["name"] == "tfio" and "audio_backend" not in manifests[0]


def test_overrides_of_the_configuration_count(tmp_path):
    config = tmp_path / "own.py"
    config.write_text("def get_config(arg):\n    return {'media': {'num_frames': 3}}\n")
    spec = media_spec_from_config(
        str(config), ["--config.media.num_frames=2", "--config.media.sampler=linspace"]
    )
    assert spec == MediaSpec(num_frames=2, sampler="linspace")
    for override, reason in (
        ("--config.media.num_frame=2", "did you mean media.num_frames"),
        ("--config.media.num_frames=two", r"media\.num_frames='two': it must be a whole number"),
        ("--config.media.num_frames=0.5", r"media\.num_frames='0\.5': it must be a whole number"),
        ("--config.media.num_frames=", r"media\.num_frames='': it must be a whole number"),
        ("--config.media.num_frames=-1", r"num_frames.* -1"),
        ("--config.media.sampler=2", "sampler is '2'; use 'midpoint'"),
        ("--config.model.llm.width=2", "reads the section media only"),
    ):
        with pytest.raises(UserError, match=reason):
            media_spec_from_config(str(config), [override])
    for value in (2.5, "two", True, None):
        config.write_text(f"def get_config(arg):\n    return {{'media': {{'num_frames': {value!r}}}}}\n")
        with pytest.raises(UserError, match=f"num_frames={value!r}: it must be a whole number"):
            media_spec_from_config(str(config))


def test_real_media(shared_media, tmp_path):
    spec = MediaSpec(image_size=32)
    report = prepare(list_folder(shared_media), tmp_path / "r", spec, workers=2)
    assert report.records == 14 and report.exit_code == 1
    ((path, stage),) = [(r.path, r.stage) for r in report.rejected]
    assert (path, stage) == (str(shared_media / "corrupted.mp4"), "decode")
    reader = RecordReader(tmp_path / "r", spec)
    kinds = {}
    for index in range(len(reader)):
        row = decode_record(reader[index], spec)
        kinds[row["id"]] = (int(row["frame_mask"].sum()), int(row["audio_mask"].sum()))
        lengths = row["audio_spans"][:, 1] - row["audio_spans"][:, 0]
        assert (lengths > 0).tolist() == row["audio_mask"].tolist()
        assert (np.diff(row["frame_times"][row["frame_mask"]]) > 0).all()
        assert row["duration"] > 0
    assert kinds["nasa_13013.mp4"] == (16, 2) and kinds["jfk.flac"] == (0, 2)
    assert kinds["h265_video.mp4"] == (10, 0) and kinds["unordered.mov"] == (4, 0)
