"""Public annotation files, a few rows each, made up in the public formats; media files that are names only."""

from __future__ import annotations

from pathlib import Path

import pytest

from input_pipeline.annotations import import_annotations


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return Path(__file__).parent / "fixtures"


@pytest.fixture
def media(tmp_path):
    """Makes empty files below a folder and returns it: importers look at names and never open a medium."""

    def make(*names: str) -> Path:
        root = tmp_path / "media"
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return root

    return make


@pytest.fixture
def load(fixtures, media):
    """(data set, fixture's name, media files, options) -> Listing."""

    def call(dataset: str, name: str, names=(), **options):
        return import_annotations(dataset, fixtures / name, media(*names), **options)

    return call


@pytest.fixture
def shown():
    """(path, interval) of each line by its id."""
    return lambda listing: {line.id: (line.name.partition("#")[0], line.interval) for line in listing.lines}


@pytest.fixture
def reasons():
    """Reason of each rejection by its id; several without an id are joined."""

    def collect(listing):
        found: dict[str, str] = {}
        for rejection in listing.rejections:
            found[rejection.id] = found.get(rejection.id, "") + rejection.reason + "\n"
        return found

    return collect
