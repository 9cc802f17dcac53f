"""A folder is put in its place whole or not at all, whatever stands there and whatever a killed run has left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from avlm_jax import staging
from avlm_jax.staging import StagingError, check_out, check_space, describe_bytes, is_vacant, lies_in, staged
from input_pipeline.errors import UserError


def tree(folder: Path) -> dict[str, str]:
    """Content of every file below a folder by path; links are followed."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def make(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def put(target: Path) -> None:
    """Puts the folder {a: new, config: new} there."""
    with staged(target, last=("config",)) as partial:
        assert not list(partial.iterdir())
        make(partial, a="new", config="new")


NEW = {"a": "new", "config": "new"}


def test_the_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "made" / "out"
    with staged(target) as partial:
        make(partial, a="new")
        assert not target.exists()
    assert tree(tmp_path) == {"made/out/a": "new"} and os.listdir(tmp_path / "made") == ["out"]


@pytest.mark.parametrize("before", ["nothing", "empty", "full", "file", "link", "link to nothing"])
def test_what_stood_there_is_replaced_and_nothing_else_is_left(tmp_path, before):
    room, elsewhere = make(tmp_path / "room"), make(tmp_path / "elsewhere", a="theirs", b="theirs")
    target = room / "out"
    if before in ("empty", "full"):
        make(target, **({"a": "old", "b": "old"} if before == "full" else {}))
    elif before == "file":
        target.write_text("old")
    elif before == "link":
        target.symlink_to(elsewhere)
    elif before == "link to nothing":
        target.symlink_to(room / "nowhere")
    put(target)
    assert os.listdir(room) == ["out"] and tree(target) == NEW and not target.is_symlink()
    assert tree(elsewhere) == {"a": "theirs", "b": "theirs"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device"), UserError("no")])
@pytest.mark.parametrize("before", [{}, {"a": "old"}])
def test_an_error_leaves_what_was_there(tmp_path, before, stop):
    target = make(tmp_path / "out", **before)
    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        with staged(target) as partial:
            make(partial, a="new")
            raise stop
    assert os.listdir(tmp_path) == ["out"] and tree(target) == before


def test_a_rename_that_fails_brings_the_earlier_folder_back(tmp_path):
    target = make(tmp_path / "out", a="old")
    with pytest.raises(FileNotFoundError):
        with staged(target) as partial:
            shutil.rmtree(partial)  # So that it is the second rename that fails.
    assert os.listdir(tmp_path) == ["out"] and tree(target) == {"a": "old"}


@pytest.mark.parametrize("target_there", [True, False])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_leftovers_of_a_killed_run_go(tmp_path, kind, target_there):
    room, elsewhere = make(tmp_path / "room"), make(tmp_path / "elsewhere", a="theirs")
    if target_there:
        make(room / "out", a="old")
    for leftover in (room / ".out.partial", room / ".out.old"):
        if kind == "folder":
            make(leftover, b="half")
        elif kind == "file":
            leftover.write_text("half")
        else:
            leftover.symlink_to(elsewhere)
    put(room / "out")
    assert os.listdir(room) == ["out"] and tree(room / "out") == NEW and tree(elsewhere) == {"a": "theirs"}


def test_a_run_killed_between_two_renames_loses_nothing(tmp_path):
    make(tmp_path / ".out.old", a="old")
    make(tmp_path / ".out.partial", a="new")
    check_out(tmp_path / "out")
    assert tree(tmp_path / "out") == {"a": "old"}
    put(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and tree(tmp_path / "out") == NEW


@pytest.mark.parametrize("name", [".", "", "../here", "{here}"])
def test_the_current_folder_is_filled(tmp_path, monkeypatch, name):
    here = make(tmp_path / "here")
    inode = here.stat().st_ino
    monkeypatch.chdir(here)
    name = name.format(here=here)
    make(here / ".here.partial", a="half")  # Of a run that was killed.
    assert is_vacant(name)
    check_out(name, overwrite=True)
    put(Path(name))
    assert tree(here) == NEW and here.stat().st_ino == inode and os.listdir(tmp_path) == ["here"]
    (here / "sub").mkdir()
    for folder in (here, here / "sub"):  # From below it, too.
        monkeypatch.chdir(folder)
        with pytest.raises(StagingError, match="is the current folder or a mount point"):
            check_out(here, overwrite=True)


def test_a_name_that_ends_in_dots(tmp_path):
    make(tmp_path / "out" / "sub", a="old")
    put(tmp_path / "out" / "sub" / "..")
    assert tree(tmp_path / "out") == NEW and os.listdir(tmp_path) == ["out"]


def test_what_makes_a_filled_folder_valid_comes_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (moved.append(path.name), rename(path, to))[1])
    with staged(".", last=("m", "b")) as partial:
        make(partial, b="", m="", z="", a="")
    assert moved == ["a", "z", "m", "b"]


def test_a_folder_in_one_that_is_read_only_is_filled(tmp_path, monkeypatch):
    target = make(tmp_path / "out")
    inode = target.stat().st_ino
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    put(target)
    assert tree(target) == NEW and os.listdir(tmp_path) == ["out"] and target.stat().st_ino == inode


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    """Somebody has made room elsewhere."""
    room, elsewhere = make(tmp_path / "room"), make(tmp_path / "disk" / "elsewhere")
    (room / "out").symlink_to(elsewhere)
    put(room / "out")
    assert (room / "out").is_symlink() and tree(elsewhere) == NEW
    assert os.listdir(room) == ["out"] and os.listdir(tmp_path / "disk") == ["elsewhere"]


def test_on_a_read_only_disk_nothing_is_missing_to_remove(tmp_path, monkeypatch):
    def unlink(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", unlink)
    put(tmp_path / "out")
    assert tree(tmp_path / "out") == NEW


def test_mount_points_are_known_by_the_kernels_list(tmp_path, monkeypatch):
    bound = make(tmp_path / "a b")
    (tmp_path / "mounts").write_text(
        f"1 2 0:1 / / rw - ext4 x rw\n9 1 0:1 /x {tmp_path}/a\\040b rw - ext4 x rw\n"
    )
    monkeypatch.setattr(staging, "MOUNTS", tmp_path / "mounts")
    inode = bound.stat().st_ino
    put(bound)
    assert tree(bound) == NEW and bound.stat().st_ino == inode
    with pytest.raises(StagingError, match="mount point"):
        check_out(bound, overwrite=True)
    check_out(tmp_path / "a", overwrite=True)


IN_A_MOUNT = """
import sys, pathlib
from avlm_jax.staging import staged
target = pathlib.Path(sys.argv[1])
with staged(target, last=("config",)) as partial:
    for name in ("a", "config"):
        (partial / name).write_text("new")
print(sorted(entry.name for entry in target.iterdir()))
"""


@pytest.mark.parametrize("kind", ["-t tmpfs none", "--bind source"])
def test_a_real_mount_point(tmp_path, repository, kind):
    (make(tmp_path / "source"), make(tmp_path / "out"))
    unshare = shutil.which("unshare")
    mount = f"mount {kind} out"
    if (
        unshare is None
        or subprocess.run([unshare, "-rm", "sh", "-c", mount], cwd=tmp_path, capture_output=True).returncode
    ):
        pytest.skip("this system lets no process of ours mount anything")
    command = f"{mount} && exec {sys.executable} -c '{IN_A_MOUNT}' {tmp_path}/out"
    result = subprocess.run(
        [unshare, "-rm", "sh", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "['a', 'config']\n", result.stderr


def test_what_cannot_be_a_folder_is_told_before_any_work(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for name in ("dangling", "loop"):
        with pytest.raises(
            StagingError, match=f"{name} is a link to .*, where nothing is; remove it or choose another --out"
        ):
            check_out(tmp_path / name)
    for name in ("file", "file/out"):
        with pytest.raises(StagingError, match="file is a file; --out names a folder"):
            check_out(tmp_path / name)


def test_what_is_read_is_not_written_over(tmp_path):
    out = make(tmp_path / "out", weights="")
    make(out / "deep", weights="")
    (tmp_path / "link").symlink_to(out)
    linked = make(tmp_path / "linked")
    (linked / "model").symlink_to(out / "weights")
    for source in (out, out / "deep", out / "deep/weights", tmp_path / "link/deep", linked, f"{out}/../out"):
        for target in (out, tmp_path / "link"):
            with pytest.raises(StagingError, match="is where --out wants to write, and .* is read"):
                check_out(target, ["", tmp_path / "other", source])
    assert lies_in(linked, out) == linked / "model"
    # A folder is read at its top; what lies deeper in it is not read.
    check_out(out, ["", tmp_path, tmp_path / "outer", "nowhere"])


def test_figures_of_a_full_disk_add_up(tmp_path, monkeypatch):
    free = staging.SPARE_BYTES + 30_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))
    check_space(tmp_path / "a" / "b", 30_000, "the export")
    with pytest.raises(StagingError) as error:
        check_space(tmp_path / "a" / "b", 30_001, "the export")
    assert str(error.value) == (
        f"{tmp_path}: no room for the export, which takes 30.0 kB: 67.1 MB are free, of which 67.1 MB have to stay so; "
        "1 bytes are missing. Make room or choose another --out"
    )
    with pytest.raises(StagingError, match=r"takes 15\.2 GB: .* 15\.2 GB are missing"):
        check_space(tmp_path, 15_231_000_000, "llm")


def test_sizes_for_people():
    sizes = (0, 999, 1000, 30_349, 999_000, 2**26, 1_234_567_890, 98_765_432_100, 5 * 10**11)
    assert [describe_bytes(size) for size in sizes] == [
        "0 bytes", "999 bytes", "1.00 kB", "30.3 kB", "999 kB", "67.1 MB", "1.23 GB", "98.8 GB", "500 GB",
    ]  # fmt: skip
