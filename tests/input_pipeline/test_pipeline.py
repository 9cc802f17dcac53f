"""Shards on Beam: the same bytes however many work on them and whatever is killed; gs://; other runners."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avlm_jax import cli
from input_pipeline import decoding, prepare_command
from input_pipeline import prepare as prepare_module
from input_pipeline.errors import UserError
from input_pipeline.manifest import Listing, MediaLine, list_folder, read_manifest
from input_pipeline.prepare import prepare
from input_pipeline.records import RecordError, RecordReader, unpack_record
from input_pipeline.spec import MediaSpec
from input_pipeline.synthetic.generate import generate
from tests import fake_gcs, killed_runs
from tests.killed_runs import contents, finished_shards

SPEC = MediaSpec(num_frames=4, image_size=16, window_frames=50, max_windows=2)
SIZES = ("--num-frames", "4", "--image-size", "16", "--window-frames", "50", "--max-windows", "2")
VIDEOS = 24

# A decoding process in which some files do what files in the wild do to a decoder.
POISONED = """\
import os, signal, sys, time
sys.path.insert(0, {root!r})
from input_pipeline import decoding
real, seen = decoding.prepare_one, []
def poisoned(lines, *arguments, **options):
    name = os.path.basename(lines[0].path)
    if seen and seen[-1].startswith("spoils"):
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(name)
    if name.startswith("spoils then"):
        raise MemoryError("heap")
    if name.startswith("hangs"):
        time.sleep(600)
    if name.startswith("crashes"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(lines, *arguments, **options)
decoding.prepare_one = poisoned
decoding.serve()
"""


# One that notes what is through; the file "long" is when 28 others are, or after a minute without them.
WAITING = """\
import os, struct, sys, time
import msgpack
sys.path.insert(0, {root!r})
from input_pipeline.workers import send
send(1, b"")
while header := sys.stdin.buffer.read(8):
    job = msgpack.unpackb(sys.stdin.buffer.read(struct.unpack("<Q", header)[0]))
    path = job["lines"][0]["path"]
    end = time.monotonic() + 60
    while path.endswith("long") and time.monotonic() < end:
        if os.path.exists({log!r}) and open({log!r}).read().count("through") >= 28:
            break
        time.sleep(0.01)
    with open({log!r}, "a") as file:
        print(os.path.basename(path), "through", file=file)
    row = dict(path=path, id="", reason="no medium", stage="decode")
    send(1, msgpack.packb(dict(rejection=row)))
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """The manifest of 24 generated videos of four seconds, one of them damaged, and of some bad lines."""
    folder = tmp_path_factory.mktemp("videos")
    manifest = generate(folder, VIDEOS, 7, workers=2, size=64, shortest=4.0, longest=4.5)
    damaged = sorted((folder / "videos").iterdir())[5]
    data = damaged.read_bytes()
    damaged.write_bytes(data[: len(data) // 2])
    lines = manifest.read_text().splitlines()
    lines[10:10] = ['{"id": "no medium"}', "no JSON"]
    lines += [json.dumps({"id": "alone", "video": f"videos/{name.name}"}) for name in [damaged]]
    lines.append(json.dumps({"id": "missing", "video": "videos/missing.mp4"}))
    manifest.write_text("\n".join(lines))
    return manifest


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "records"
    prepare(read_manifest(videos), out, SPEC, workers=1)
    return out


@pytest.fixture
def poisoned(monkeypatch):
    code = POISONED.format(root=str(Path(decoding.__file__).parents[1]))
    monkeypatch.setattr(prepare_module, "worker_command", lambda tfio: [sys.executable, "-c", code])


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """gs://bucket on the local disk, for this process and for the decoding ones."""
    monkeypatch.setenv(fake_gcs.ROOT, str(tmp_path / "gcs"))
    fake_gcs.register()
    root = str(Path(decoding.__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {root!r})\n"
        "from tests import fake_gcs\nfrom input_pipeline import decoding\n"
        "fake_gcs.register()\ndecoding.serve()"
    )
    monkeypatch.setattr(prepare_module, "worker_command", lambda tfio: [sys.executable, "-c", code])
    (tmp_path / "gcs" / "bucket").mkdir(parents=True)
    return tmp_path / "gcs" / "bucket"


def call(*arguments) -> int:
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    return prepare_command.run(parser.parse_args([str(argument) for argument in arguments]))


def killed_before_the_lists(listing, out, spec=SPEC, **options) -> None:
    """A run that is killed when all its shards are made."""

    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "finish_records", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(listing, out, spec, **options)


def test_every_line_is_accounted_for(videos, undisturbed):
    listing, reader = read_manifest(videos), RecordReader(undisturbed, SPEC)
    counts = reader.manifest["counts"]
    assert counts["records"] == VIDEOS - 1 and len(reader.manifest["shards"]) == VIDEOS + 1
    rejected = [json.loads(line) for line in (undisturbed / "rejected.jsonl").read_text().splitlines()]
    stages = [row["stage"] for row in rejected]
    assert stages[:2] == ["manifest", "manifest"] and rejected[-1]["id"] == "missing"
    assert len([row for row in rejected if row["stage"] == "decode" or row["stage"] == "open"]) > 2
    assert counts["rejected"] == len(rejected)
    assert counts["manifest_lines"] == listing.count == counts["samples"] + counts["rejected"]
    by_id = {line.id: line.conversations for line in listing.lines}
    assert all(row["conversations"] == by_id[row["id"]] for row in reader.samples)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(videos, undisturbed, tmp_path, workers):
    report = prepare(read_manifest(videos), tmp_path / "r", SPEC, workers=workers)
    assert contents(tmp_path / "r") == contents(undisturbed)
    assert (report.resumed, report.exit_code) == (0, 1) and os.listdir(tmp_path) == ["r"]


def test_killed_again_and_again_it_ends_with_the_same_bytes(videos, undisturbed, tmp_path):
    out = tmp_path / "r"
    arguments = ["--manifest", videos, "--out", out, "--workers", "2", *SIZES]
    early = killed_runs.start(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert killed_runs.kill_when(early, lambda: (tmp_path / ".r.lock").exists())
    shards = len(RecordReader(undisturbed).manifest["shards"])
    found = killed_runs.kill_at_random_points(arguments, out, shards - 6, kills=3, seed=3)
    assert not out.exists() and found == sorted(found)
    last = killed_runs.start(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    printed, errors = last.communicate(timeout=300)
    assert last.returncode == 1, errors
    assert f"{found[-1]} shards were there" in printed
    assert contents(out) == contents(undisturbed)
    assert os.listdir(tmp_path) == ["r"]
    assert "Traceback" not in errors and "apitools" not in errors and "WARNING" not in errors


def test_ctrl_c_leaves_what_is_finished(videos, undisturbed, tmp_path):
    out = tmp_path / "r"
    arguments = ["--manifest", videos, "--out", out, "--workers", "1", *SIZES]
    process = killed_runs.start(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    while finished_shards(out) < 2 and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the decoding processes get it as well
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_INTERRUPTED, errors
    assert errors.splitlines()[-1] == "avlm prepare: interrupted" and "Traceback" not in errors
    assert not out.exists() and finished_shards(out) >= 2
    report = prepare(read_manifest(videos), out, SPEC, workers=2)
    assert report.resumed >= 2 and contents(out) == contents(undisturbed)


def test_finished_records_are_left_alone(videos, undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "r")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").iterdir()}
    arguments = ("--manifest", videos, "--out", tmp_path / "r", *SIZES)
    assert call(*arguments) == 1  # as the first run: something is in rejected.jsonl
    printed = capsys.readouterr().out
    assert (
        "nothing was done; media files were not looked at again, --overwrite" in printed
        and "lines rejected" in printed
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").iterdir()} == before
    for name in ("samples.jsonl", "rejected.jsonl"):
        text = (tmp_path / "r" / name).read_text()
        for damage in (lambda path: path.unlink(), lambda path, text=text: path.write_text(text + "{}\n")):
            damage(tmp_path / "r" / name)
            with pytest.raises(RecordError, match=f"{name} is missing or not as long.*--overwrite"):
                call(*arguments)
        (tmp_path / "r" / name).write_text(text)
    with pytest.raises(RecordError, match="--overwrite"):
        call(*arguments, "--max-bytes", 10**9)
    assert os.listdir(tmp_path) == ["r"]


def test_a_file_that_hangs_or_crashes_the_decoder_costs_itself_alone(videos, poisoned, tmp_path):
    (tmp_path / "in").mkdir()
    sound = sorted((videos.parent / "videos").iterdir())[:4]
    for name, source in zip(("a.mp4", "crashes.mp4", "hangs.mp4", "z.mp4"), sound, strict=True):
        os.link(source, tmp_path / "in" / name)
    os.mkfifo(tmp_path / "in" / "pipe.mp4")  # opened, it would wait for a writer that never comes
    report = prepare(list_folder(tmp_path / "in"), tmp_path / "r", SPEC, workers=2, timeout=3.0)
    assert [(os.path.basename(row.path), row.stage) for row in report.rejected] == [
        ("crashes.mp4", "crash"), ("hangs.mp4", "timeout"), ("pipe.mp4", "open"),
    ]  # fmt: skip
    assert "SIGSEGV" in report.rejected[0].reason and "3 s" in report.rejected[1].reason
    reader = RecordReader(tmp_path / "r")
    assert [unpack_record(reader[i])["id"] for i in range(2)] == ["a.mp4", "z.mp4"]


def test_what_another_file_did_to_the_process_is_not_blamed_on_the_next(videos, poisoned, tmp_path):
    (tmp_path / "in").mkdir()
    sound = sorted((videos.parent / "videos").iterdir())[:4]
    for name, source in zip(("a.mp4", "spoils.mp4", "spoils then raises.mp4", "z.mp4"), sound, strict=True):
        os.link(source, tmp_path / "in" / name)
    report = prepare(list_folder(tmp_path / "in"), tmp_path / "r", SPEC, workers=1)
    assert [(os.path.basename(row.path), row.stage) for row in report.rejected] == [
        ("spoils then raises.mp4", "crash")
    ]
    assert "MemoryError: heap" in report.rejected[0].reason and report.records == 3


@pytest.mark.parametrize(
    "error", ["OSError(28, 'No space left on device')", "RuntimeError('401 token expired')"]
)
def test_a_bucket_that_cannot_be_read_ends_the_run_and_rejects_nothing(videos, bucket, monkeypatch, error):
    shutil.copytree(videos.parent, bucket / "data")
    listing, out = read_manifest("gs://bucket/data/manifest.jsonl"), "gs://bucket/records"
    with monkeypatch.context() as patch:
        command = prepare_module.worker_command(None)
        code = command[-1].replace(
            "decoding.serve()",
            "real, count = fake_gcs.FakeGcs.open, []\n"
            "def broken(self, path, *rest, **options):\n"
            "    count.append(path)\n"
            f"    if len(count) > 3: raise {error}\n"
            "    return real(self, path, *rest, **options)\n"
            "fake_gcs.FakeGcs.open = broken\ndecoding.serve()",
        )
        patch.setattr(prepare_module, "worker_command", lambda tfio: [*command[:-1], code])
        with pytest.raises(
            UserError, match=r"gs://bucket/data/.* cannot be fetched .*the same command goes on"
        ):
            prepare(listing, out, SPEC, workers=1)
    assert not (bucket / "records").exists()
    report = prepare(listing, out, SPEC, workers=2)
    assert report.records == VIDEOS - 1 and report.resumed == 3
    assert not any(row.stage == "crash" or "cannot be fetched" in row.reason for row in report.rejected)


def test_what_waits_behind_a_long_file_goes_to_the_other_workers(tmp_path, monkeypatch):
    """Four processes, 33 files: dealt out beforehand, eight would wait for the long one."""
    log = tmp_path / "log"
    code = WAITING.format(root=str(Path(decoding.__file__).parents[1]), log=str(log))
    monkeypatch.setattr(prepare_module, "worker_command", lambda tfio: [sys.executable, "-c", code])
    names = ["long", *map(str, range(32))]
    listing = Listing([MediaLine(str(tmp_path / name), name, "video") for name in names], [])
    assert len(prepare(listing, tmp_path / "r", SPEC, workers=4).rejected) == 33
    order = [line.split()[0] for line in log.read_text().splitlines()]
    assert len(order) == 33 and order.index("long") >= 28


def test_media_that_changed_since_the_kill_are_decoded_again(videos, tmp_path):
    (tmp_path / "in").mkdir()
    sound = sorted((videos.parent / "videos").iterdir())[:3]
    for number, source in enumerate(sound):
        shutil.copy(source, tmp_path / "in" / f"{number}.mp4")
    (tmp_path / "in" / "1.mp4").write_bytes(b"broken")
    killed_before_the_lists(list_folder(tmp_path / "in"), tmp_path / "r", workers=1)
    assert finished_shards(tmp_path / "r") == 3
    shutil.copy(sound[1], tmp_path / "in" / "1.mp4")
    report = prepare(list_folder(tmp_path / "in"), tmp_path / "r", SPEC, workers=1)
    assert (report.records, report.rejected, report.resumed) == (3, [], 2)


def test_the_same_listing_has_the_same_plan_from_anywhere_and_under_any_time_limit(
    videos, undisturbed, tmp_path, monkeypatch
):
    killed_before_the_lists(read_manifest(videos), tmp_path / "r", workers=2)
    monkeypatch.chdir(videos.parent)
    report = prepare(read_manifest(videos.name), tmp_path / "r", SPEC, workers=1, timeout=99.0)
    assert report.resumed == VIDEOS + 1 and contents(tmp_path / "r") == contents(undisturbed)


def test_late_files_are_tried_again_under_another_time_limit(videos, poisoned, tmp_path):
    (tmp_path / "in").mkdir()
    for name, source in zip(
        ("a.mp4", "hangs.mp4"), sorted((videos.parent / "videos").iterdir())[:2], strict=True
    ):
        os.link(source, tmp_path / "in" / name)
    listing = list_folder(tmp_path / "in")
    killed_before_the_lists(listing, tmp_path / "r", workers=2, timeout=1.0)
    report = prepare(listing, tmp_path / "r", SPEC, workers=2, timeout=2.0)
    assert report.resumed == 1 and "2 s" in report.rejected[0].reason


def test_a_job_of_another_plan_cannot_slip_its_shards_in(videos, undisturbed, tmp_path):
    """Not ended on its cluster, it goes on writing into the folder of its --out."""
    other, listing = (
        MediaSpec(num_frames=2, image_size=16, window_frames=50, max_windows=2),
        read_manifest(videos),
    )
    prepare_other, shard = tmp_path / "other", f"shard-00003-of-{VIDEOS + 1:05d}.array_record"
    killed_before_the_lists(listing, prepare_other, spec=other, workers=2)
    orphaned = list(killed_runs.working_folder(prepare_other).glob(f"{shard}*"))
    killed_before_the_lists(listing, tmp_path / "r", workers=2)
    working = killed_runs.working_folder(tmp_path / "r")
    for path in orphaned:
        shutil.copy(path, working)

    run = prepare_module._make_shards

    def overtaken(*arguments, **options):
        made = run(*arguments, **options)
        for path in orphaned:
            shutil.copy(path, working)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_make_shards", overtaken)
        with pytest.raises(RecordError, match=f"{shard} was written by a job with other arguments"):
            prepare(listing, tmp_path / "r", SPEC, workers=2)
    report = prepare(listing, tmp_path / "r", SPEC, workers=2)
    assert report.resumed == VIDEOS and contents(tmp_path / "r") == contents(undisturbed)


def test_a_fault_of_the_machine_is_no_rejection(videos, tmp_path, monkeypatch, capfd):
    broken = [sys.executable, "-c", "raise ImportError('no libav')"]
    monkeypatch.setattr(prepare_module, "worker_command", lambda tfio: broken)
    with pytest.raises(RuntimeError, match="could not start:(.|\n)*no libav"):
        prepare(read_manifest(videos), tmp_path / "r", SPEC, workers=2)
    assert not (tmp_path / "r").exists() and "Traceback" not in capfd.readouterr().err
    monkeypatch.undo()
    with pytest.raises(UserError, match="--workers is 0"):
        prepare(read_manifest(videos), tmp_path / "r", SPEC, workers=0)


def test_gs_media_manifest_and_records(videos, undisturbed, bucket):
    shutil.copytree(videos.parent, bucket / "data")
    data = "gs://bucket/data"
    report = prepare(read_manifest(f"{data}/manifest.jsonl"), "gs://bucket/records", SPEC, workers=2)
    assert report.records == VIDEOS - 1 and sorted(os.listdir(bucket)) == ["data", "records"]
    here, there = contents(undisturbed), contents(bucket / "records")
    assert here.keys() == there.keys() and here["samples.jsonl"] == there["samples.jsonl"]
    assert {name for name in here if here[name] != there[name]} == {"rejected.jsonl", "manifest.json"}
    rows = [json.loads(line) for line in there["rejected.jsonl"].splitlines()]
    assert rows[-1]["path"] == f"{data}/videos/missing.mp4" and rows[-1]["reason"] == "no such file"
    assert json.loads(there["manifest.json"])["shards"] == json.loads(here["manifest.json"])["shards"]
    again = prepare(read_manifest(f"{data}/manifest.jsonl"), "gs://bucket/records", SPEC, workers=2)
    assert again.up_to_date and again.rejected == report.rejected

    listing = list_folder(f"{data}/videos")
    assert [line.name for line in listing.lines] == sorted(os.listdir(bucket / "data" / "videos"))
    assert listing.lines[0].path.startswith(f"{data}/videos/") and listing.lines[0].source == "videos"


def test_without_gcsfs_gs_says_what_to_install(monkeypatch):
    import fsspec

    def missing(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"gcsfs.*pip install 'avlm_jax\[gcp\]'"):
        read_manifest("gs://bucket/m.jsonl")


def test_other_runners(videos, tmp_path, monkeypatch):
    common = ("--manifest", videos, "--out", tmp_path / "r", *SIZES)
    with pytest.raises(UserError, match=r"cannot reach .*gcloud storage cp"):
        call(*common, "--runner", "DataflowRunner")
    with pytest.raises(UserError, match="NoRunner"):
        call(*common, "--runner", "NoRunner")
    seen = {}

    def run_pipeline(work, shards, **options):
        seen.update(options)
        raise KeyboardInterrupt

    from input_pipeline import pipeline

    monkeypatch.setattr(pipeline, "run_pipeline", run_pipeline)
    with pytest.raises(KeyboardInterrupt):
        call(*common, "--runner", "FlinkRunner", "--", "--flink_master=host:1", "--parallelism", "4")
    assert (seen["runner"], seen["beam_options"]) == (
        "FlinkRunner", ["--flink_master=host:1", "--parallelism", "4"]
    )  # fmt: skip


def test_a_runner_that_is_not_this_process(videos, undisturbed, tmp_path, monkeypatch, capfd):
    """By its full name the in-process runner is treated as a cluster: nothing is shared with this process."""
    out, runner = tmp_path / "r", "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            prepare_module, "worker_command", lambda tfio: [sys.executable, "-c", "raise OSError(7)"]
        )
        with pytest.raises(RuntimeError, match="could not start"):
            prepare(read_manifest(videos), out, SPEC, runner=runner)
    assert finished_shards(out) == 0 and not out.exists()
    report = prepare(read_manifest(videos), out, SPEC, runner=runner)
    assert contents(out) == contents(undisturbed) and report.resumed == 0
    assert "25 shard done" in capfd.readouterr().err


def test_work_that_travels_to_other_processes(videos, undisturbed, tmp_path):
    """Beam's own processes, as a cluster's: what they need is in the work, nothing of this process."""
    options = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    report = prepare(read_manifest(videos), tmp_path / "r", SPEC, workers=2, beam_options=options)
    assert report.exit_code == 1 and contents(tmp_path / "r") == contents(undisturbed)


def test_help_and_other_verbs_do_not_import_beam():
    code = (
        "import sys\nfrom avlm_jax import cli\n"
        "cli.main(['prepare', '--help'])\nprint('beam' if 'apache_beam' in sys.modules else 'lean')"
    )
    root = Path(decoding.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.stdout.splitlines()[-1] == "lean" and "--runner DataflowRunner" in result.stdout
