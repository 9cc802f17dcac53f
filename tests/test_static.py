"""Rules for the source as text: nothing runs data as code, imports point one way, files stay readable."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("avlm_jax", "input_pipeline", "configs", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

MOST_LINES = 500
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}

# Calls by which a data file could run as code. As methods (`model.eval()`) the builtins are something else.
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    ("pickle", "load"),
    ("pickle", "loads"),
    ("cloudpickle", "load"),
    ("cloudpickle", "loads"),
    ("dill", "load"),
    ("joblib", "load"),
    ("marshal", "loads"),
    ("os", "system"),
    ("os", "popen"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
}
KEYWORDS = {("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}


def dangers(tree: ast.AST) -> Iterator[str]:
    """Calls in `tree` that run data as code, as `line: what`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in BUILTINS:
            yield f"{node.lineno}: {function.id}()"
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            called = (function.value.id, function.attr)
            if called in METHODS:
                yield f"{node.lineno}: {'.'.join(called)}()"
            if called == ("torch", "load") and "weights_only" not in {
                keyword.arg for keyword in node.keywords
            }:
                yield f"{node.lineno}: torch.load() without weights_only=True"
        for keyword in node.keywords:
            if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in KEYWORDS:
                yield f"{node.lineno}: {keyword.arg}={keyword.value.value}"


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything `tree` imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offending(folder: str, forbidden: tuple[str, ...], but: tuple[str, ...] = ()) -> list[str]:
    """Imports under `folder` of modules in (or below) `forbidden`, except those in `but`."""

    def below(name: str, roots: tuple[str, ...]) -> bool:
        return any(name == root or name.startswith(root + ".") for root in roots)

    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if below(name, forbidden) and not below(name, but)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert list(dangers(tree)) == []
    assert path.stem not in EMPTY_NAMES, "name the file after what it holds"
    # Every exported folder carries this one as its only file of code.
    most = 550 if path.name == "modeling_savenvideo.py" else MOST_LINES
    assert source.count("\n") <= most, "divide the file"
    if source.strip():
        assert ast.get_docstring(tree), "the file does not say what it is for"


@pytest.mark.parametrize(
    "source",
    [
        "eval(line)",
        "exec(text)",
        "pickle.load(file)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "os.system('ls')",
    ],
)
def test_dangers_are_seen(source: str) -> None:
    assert list(dangers(ast.parse(source)))


def test_harmless_calls_pass() -> None:
    source = "model.eval()\nast.literal_eval(x)\ntorch.load(path, weights_only=True)\nre.compile('x')"
    assert list(dangers(ast.parse(source))) == []


JAX = ("jax", "jaxlib", "flax", "optax", "orbax")


def test_the_input_pipeline_knows_no_model() -> None:
    assert offending("input_pipeline", (*JAX, "avlm_jax", "configs")) == []


def test_scorers_import_no_jax() -> None:
    assert offending("avlm_jax/evals", JAX) == []


def test_arrows_inside_the_model_point_one_way() -> None:
    above_layers = ("encoders", "connectors", "llm", "models", "weights", "evals", "train", "config")
    assert offending("avlm_jax/layers", tuple(f"avlm_jax.{name}" for name in above_layers)) == []
    for room in ("encoders", "connectors", "llm"):
        others = {"encoders", "connectors", "llm", "models", "weights", "evals", "train"} - {room}
        assert offending(f"avlm_jax/{room}", tuple(f"avlm_jax.{name}" for name in sorted(others))) == []


def test_no_torch_or_tensorflow_in_the_core() -> None:
    forbidden = ("torch", "torchvision", "torchaudio", "tensorflow", "tensorflow_io", "decord", "cv2")
    # These two need TensorFlow when they are imported.
    needing_it = ("clu.metric_writers", "clu.periodic_actions")
    # avlm_jax/pytorch is what PyTorch users run: copied into exports or started as a process, imported by nobody.
    found = offending("avlm_jax", forbidden + needing_it)
    assert [line for line in found if not line.startswith("avlm_jax/pytorch/")] == []
    # tfio_worker.py is a script for the Python of another environment, started as a process, imported by nobody.
    found = offending("input_pipeline", forbidden + needing_it)
    assert [line for line in found if not line.startswith("input_pipeline/tfio_worker.py ")] == []
    assert offending("avlm_jax", ("avlm_jax.pytorch",)) == []
    for package in PACKAGES:
        assert offending(package, ("input_pipeline.tfio_worker",)) == []


def test_the_script_for_another_environment_needs_nothing_of_this_one() -> None:
    tree = ast.parse((ROOT / "input_pipeline" / "tfio_worker.py").read_text(encoding="utf-8"))
    allowed = {*sys.stdlib_module_names, "numpy", "tensorflow", "tensorflow_io"}
    assert {name.partition(".")[0] for name in imports(tree)} <= allowed


def test_what_pytorch_users_run_needs_nothing_of_the_project() -> None:
    assert offending("avlm_jax/pytorch", (*JAX, "avlm_jax", "input_pipeline", "configs")) == []


def test_config_files_import_next_to_nothing() -> None:
    own = ("avlm_jax.config",)
    assert offending("configs", (*JAX, "numpy", "avlm_jax", "input_pipeline"), but=own) == []


def test_forbidden_imports_are_seen() -> None:
    names = list(imports(ast.parse("def f():\n    from jax import numpy\nimport avlm_jax.llm.decoder\n")))
    assert names == ["avlm_jax.llm.decoder", "jax", "jax.numpy"]
