"""Files here and on gs:// behind one interface: listings that fail, requests side by side."""

from __future__ import annotations

import threading

import pytest
from fsspec import AbstractFileSystem

from input_pipeline.paths import REQUESTS_AT_ONCE, map_files, to_path, walk
from tests import fake_gcs


@pytest.mark.parametrize("folder", ["gs://bucket/r", "r"])
def test_files_are_mapped_in_order_and_not_far_ahead(folder):
    taken = []

    def items():
        for number in range(200):
            taken.append(number)
            yield number

    results = map_files(lambda number: (number, threading.get_ident()), items(), folder)
    found = []
    for number, thread in results:
        assert len(taken) - number <= REQUESTS_AT_ONCE
        found.append((number, thread))
    assert [number for number, _ in found] == list(range(200))
    here = {thread for _, thread in found} == {threading.get_ident()}
    assert here == (folder == "r")


def test_an_error_of_one_file_comes_out():
    with pytest.raises(ZeroDivisionError):
        list(map_files(lambda number: 1 // number, [1, 0, 1], "gs://bucket/r"))


def test_what_cannot_be_listed_is_no_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(fake_gcs.ROOT, str(tmp_path))
    fake_gcs.register()
    assert list(walk(to_path("gs://bucket/none"))) == []

    def forbidden(self, path, detail=True, **options):
        raise PermissionError(f"{path} is forbidden")

    monkeypatch.setattr(fake_gcs.FakeGcs, "ls", forbidden)
    monkeypatch.setattr(fake_gcs.FakeGcs, "walk", AbstractFileSystem.walk)  # which lists by `ls`, as gcsfs
    with pytest.raises(PermissionError, match="forbidden"):
        list(walk(to_path("gs://bucket/media")))
