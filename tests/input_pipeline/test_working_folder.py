"""A folder of records is whole or absent, whatever is killed; two runs never share one; gs:// alike."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from input_pipeline import working_folder
from input_pipeline.paths import to_path
from input_pipeline.records import RecordError, RecordReader, finish_records, write_shard
from input_pipeline.spec import MediaSpec
from input_pipeline.working_folder import WorkingFolder
from tests import fake_gcs
from tests.record_folder import write_folder

SPEC = MediaSpec(num_frames=3, image_size=16, window_frames=16, max_windows=2)


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the program catches it."""


@pytest.fixture
def gcs(tmp_path, monkeypatch):
    monkeypatch.setenv(fake_gcs.ROOT, str(tmp_path / "gcs"))
    fake_gcs.register()
    yield tmp_path / "gcs"


def fill(work: WorkingFolder, plan: str, shards: int = 2) -> None:
    entries = [write_shard(work.path, index, shards, []) for index in range(shards)]
    finish_records(work.path, SPEC, entries, plan=plan, manifest_lines=0)


def plan_of(out) -> str:
    return RecordReader(out).manifest["plan"]


def test_the_same_plan_finds_its_work_and_another_discards_it_when_asked(tmp_path):
    with pytest.raises(Killed), WorkingFolder(tmp_path / "r", "one") as work:
        write_shard(work.path, 0, 2, [])
        (work.path / ".shard.0123.tmp").write_text("half a shard")
        raise Killed
    with WorkingFolder(tmp_path / "r", "one") as work:
        assert sorted(path.name for path in work.path.glob("*shard*")) == [
            "shard-00000-of-00002.array_record", "shard-00000-of-00002.array_record.json",
        ]  # fmt: skip
        assert work.finished is None and work.complete is None
    with (
        pytest.raises(RecordError, match=r"\.r\.partial holds 1 finished shards.*--overwrite"),
        WorkingFolder(tmp_path / "r", "two"),
    ):
        pass
    with WorkingFolder(tmp_path / "r", "one") as work:
        assert len(list(work.path.glob("shard*"))) == 2
        next(work.path.glob("shard*.json")).unlink()
    with WorkingFolder(tmp_path / "r", "three") as work:  # half a shard is nobody's loss
        assert not list(work.path.glob("shard*"))
        write_shard(work.path, 0, 2, [])
    with WorkingFolder(tmp_path / "r", "two", overwrite=True) as work:
        assert not list(work.path.glob("*shard*"))
        fill(work, "two")
        work.put_in_place()
    assert plan_of(tmp_path / "r") == "two" and os.listdir(tmp_path) == ["r"]
    names = {path.name for path in (tmp_path / "r").iterdir() if not path.name.startswith("shard")}
    assert names == {"manifest.json", "samples.jsonl", "rejected.jsonl"}


def test_finished_records_are_replaced_only_when_asked(tmp_path):
    write_folder(tmp_path / "r", SPEC, [], manifest_lines=0, plan="one")
    with WorkingFolder(tmp_path / "r", "one") as work:
        assert work.finished["plan"] == "one"
        work.discard()
    with pytest.raises(RecordError, match="--overwrite"), WorkingFolder(tmp_path / "r", "two"):
        pass
    assert plan_of(tmp_path / "r") == "one" and os.listdir(tmp_path) == ["r"]
    (shard,) = (tmp_path / "r").glob("shard*")
    os.truncate(shard, 100)
    with (
        pytest.raises(RecordError, match=f"{shard.name} is missing.*--overwrite"),
        WorkingFolder(tmp_path / "r", "one"),
    ):
        pass
    write_folder(tmp_path / "r", SPEC, [], manifest_lines=0, plan="two", overwrite=True)
    assert plan_of(tmp_path / "r") == "two"


def test_what_a_link_points_to_is_made(tmp_path):
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "r").symlink_to(tmp_path / "disk" / "big")
    for plan in ("one", "two"):
        with WorkingFolder(tmp_path / "r", plan, overwrite=True) as work:
            assert work.path.parent == tmp_path / "disk"
            fill(work, plan)
            work.put_in_place()
        assert plan_of(tmp_path / "disk" / "big") == plan
    assert (tmp_path / "r").is_symlink() and sorted(os.listdir(tmp_path)) == ["disk", "r"]
    assert os.listdir(tmp_path / "disk") == ["big"]


def test_a_place_that_cannot_be_renamed_is_refused_before_the_work(tmp_path, monkeypatch, gcs):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) in ("/", str(tmp_path / "disk")))
    for place in ("/", tmp_path / "disk"):
        with pytest.raises(RecordError, match="is a mount point; name a folder below it"):
            WorkingFolder(place, "p").__enter__()
    for place in ("gs://bucket", "gs://bucket/"):
        with pytest.raises(RecordError, match="is a whole bucket; name a folder below it"):
            WorkingFolder(place, "p").__enter__()
    assert os.listdir(tmp_path) == []


def test_foreign_files_are_never_touched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "manifest.json").write_text("{}")
    (tmp_path / "photos" / "holiday.jpg").write_text("dear")
    with (
        pytest.raises(RecordError, match=r"holiday\.jpg"),
        WorkingFolder(tmp_path / "photos", "p", overwrite=True),
    ):
        pass
    with (
        pytest.raises(RecordError, match="is a file"),
        WorkingFolder(tmp_path / "photos" / "holiday.jpg", "p"),
    ):
        pass
    assert sorted(os.listdir(tmp_path / "photos")) == ["holiday.jpg", "manifest.json"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_while_records_are_replaced(tmp_path, monkeypatch, renames):
    """Before the first rename, between the two, and after: old records or new ones, never none for good."""
    out, rename, calls = tmp_path / "r", os.rename, []
    write_folder(out, SPEC, [], manifest_lines=0, plan="old")

    def killed_rename(*arguments):
        if len(calls) == renames:
            raise Killed
        calls.append(arguments)
        rename(*arguments)

    def killed_rmtree(path, **options):
        if len(calls) == renames == 2:
            raise Killed

    with pytest.raises(Killed), WorkingFolder(out, "new", overwrite=True) as work:
        fill(work, "new")
        monkeypatch.setattr(working_folder.os, "rename", killed_rename)
        monkeypatch.setattr(working_folder.shutil, "rmtree", killed_rmtree)
        work.put_in_place()
    monkeypatch.undo()
    if renames < 2:  # a run of a third plan, without leave to replace anything, finds the old records
        with pytest.raises(RecordError, match="--overwrite"), WorkingFolder(out, "third"):
            pass
        assert plan_of(out) == "old"
        with WorkingFolder(out, "new", overwrite=True) as work:
            assert work.complete["plan"] == "new"
            work.put_in_place()
    else:
        with WorkingFolder(out, "new", overwrite=True) as work:
            assert work.finished["plan"] == "new"
            work.discard()
    assert plan_of(out) == "new" and os.listdir(tmp_path) == ["r"]


def test_two_runs_never_share_a_folder(tmp_path):
    program = (
        "import sys, time\n"
        "from input_pipeline.working_folder import WorkingFolder\n"
        "with WorkingFolder(sys.argv[1], 'p'):\n"
        "    print('inside', flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = os.path.dirname(os.path.dirname(working_folder.__file__))
    command = [sys.executable, "-c", program, str(tmp_path / "r")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as other:
        try:
            assert other.stdout.readline() == "inside\n"
            with (
                pytest.raises(RecordError, match=f"another run.*process {other.pid} on"),
                WorkingFolder(tmp_path / "r", "p"),
            ):
                pass
            assert (tmp_path / ".r.partial").is_dir()
        finally:
            other.kill()
        other.wait()
    assert (tmp_path / ".r.lock").exists()
    with WorkingFolder(tmp_path / "r", "p"):  # a lock does not outlive its process
        pass
    assert not (tmp_path / ".r.lock").exists()


def test_records_on_gs_appear_with_their_manifest(gcs, monkeypatch):
    out = "gs://bucket/records/train"
    with pytest.raises(Killed), WorkingFolder(out, "one") as work:
        write_shard(work.path, 0, 2, [])
        raise Killed
    with WorkingFolder(out, "one") as work:
        assert (work.path / "shard-00000-of-00002.array_record").exists()
        fill(work, "one")
        move = WorkingFolder._move_object

        def killed_move(self, name):
            if name.startswith("shard-00001"):
                raise Killed
            move(self, name)

        monkeypatch.setattr(WorkingFolder, "_move_object", killed_move)
        with pytest.raises(Killed):
            work.put_in_place()
        monkeypatch.undo()
    monkeypatch.setenv(fake_gcs.ROOT, str(gcs))
    assert to_path(out).exists() and not (to_path(out) / "manifest.json").exists()
    with WorkingFolder(out, "one") as work:
        assert work.complete["plan"] == "one"
        work.put_in_place()
    assert plan_of(gcs / "bucket" / "records" / "train") == "one"
    assert os.listdir(gcs / "bucket" / "records") == ["train"]

    with pytest.raises(RecordError, match="--overwrite"), WorkingFolder(out, "two"):
        pass
    with WorkingFolder(out, "two", overwrite=True) as work:
        fill(work, "two", shards=1)
        work.put_in_place()
    assert plan_of(gcs / "bucket" / "records" / "train") == "two"
    assert len(os.listdir(gcs / "bucket" / "records" / "train")) == 4
    with pytest.raises(RecordError, match="gcsfuse.*gcloud storage cp"):
        RecordReader(out)
