"""What every test runs under (the CPU, strict shapes, a compilation cache), and shared fixtures.

The environment is set here and not in the Makefile alone, so that a bare `pytest` means the same. It is set
before JAX is imported, and subprocesses inherit it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Broadcasting that adds axes is more often a mistake than meant; code that means it says [None].
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_media() -> Path:
    """The folder of real media files: $AVLM_TEST_MEDIA, or `shared/media` beside the repository."""
    chosen = os.environ.get("AVLM_TEST_MEDIA")
    folder = Path(chosen) if chosen else ROOT.parent / "shared" / "media"
    if not folder.is_dir():
        pytest.skip(f"no media files at {folder}; AVLM_TEST_MEDIA names another folder")
    return folder
