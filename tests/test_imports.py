"""The core imports without torch and TensorFlow, even when a package would like to have them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

BLOCKED = {blocked!r}

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, path, target)

sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
count = 0
for package in ("avlm_jax", "input_pipeline"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        # avlm_jax.pytorch is for PyTorch users: nobody imports it, it is copied or started as a process.
        if not module.name.endswith(".__main__") and not module.name.startswith("avlm_jax.pytorch."):
            importlib.import_module(module.name)
            count += 1
print(count)
"""

BLOCKED = (
    "torch",
    "torchvision",
    "torchaudio",
    "tensorflow",
    "tensorboard",
    "wandb",
    "tokamax",
    "nnx",
)


def run(code: str, repository: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)


def test_every_module_imports_without_the_extras(repository: Path) -> None:
    result = run(IMPORT_ALL.format(blocked=BLOCKED), repository)
    assert result.returncode == 0, result.stderr
    files = [
        path
        for name in ("avlm_jax", "input_pipeline")
        for path in (repository / name).rglob("*.py")
        if path.parent.name != "pytorch" or path.name == "__init__.py"
    ]
    assert int(result.stdout.split()[-1]) == len(files) - 3  # Without the two packages and __main__.


def test_hidden_packages_are_hidden(repository: Path) -> None:
    result = run(IMPORT_ALL.format(blocked=("numpy",)), repository)
    assert result.returncode != 0 and "No module named 'numpy'" in result.stderr
