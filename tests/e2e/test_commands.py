"""Bad input at the command line: a clear message, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from avlm_jax import cli
from tests.tiny_system import CONFIG, save_tokenizer

pytestmark = pytest.mark.e2e

DEMO = f"{CONFIG}:size=demo"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "tone.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((8000 * np.sin(np.arange(32_000) * 0.2)).astype("<i2").tobytes())
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", DEMO, "--config.model.avts.num_querys=8"], "did you mean 'model.avts.num_queries'?"),
        (["--config", DEMO, "--config.stage.2b.batchsize=8"], "did you mean 'stage.2b.batch_size'?"),
        (["--config", DEMO, "--config.stage.1a.steps=many"], "config.stage.1a.steps is int"),
        (["--config", f"{CONFIG}:sise=demo"], "did you mean 'size'?"),
        (["--config", f"{CONFIG}:size=8b"], "unknown size '8b'; known: demo, 0.5b, 1.5b, 7b"),
        (["--config", f"{CONFIG}:size=7b,stage=3"], "unknown stage '3'; known: 1a, 1b, 2a, 2b"),
        (["--config", str(CONFIG).replace("savenvideo", "savenvidoe")], "savenvideo.py"),
        (["--config", DEMO, "--config.text.tokenizer=no/such/folder"], "no/such/folder"),
    ],
    ids=["key", "stage_key", "type", "argument", "size", "stage", "file", "tokenizer"],
)
def test_an_unusable_configuration(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    assert cli.main(["train", *arguments, "--workdir", str(workdir)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("avlm train: ") and message in error
    assert not workdir.exists()


def test_files_that_are_no_media_are_listed_and_the_rest_goes_through(
    sound: Path, tmp_path: Path, repository: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    good = sound.read_bytes()
    files = {
        "empty.mp4": b"",
        "good.wav": good,
        "noise.mp4": bytes(range(256)) * 40,
        "text.mp4": b"This is no video.\n" * 50,
        "truncated.mp4": b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41\x00\x00\x00\x08free",
        "notes.txt": b"no media by its name, and not tried\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    command = [sys.executable, "-m", "avlm_jax", "prepare", "--folder", str(folder), "--out", str(out)]
    command += ["--image-size", "16", "--workers", "1"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    bad = ["empty.mp4", "noise.mp4", "text.mp4", "truncated.mp4"]
    assert [line["path"] for line in rejected] == [str(folder / name) for name in bad]
    assert all(line["reason"] and line["stage"] for line in rejected)
    for name in bad:
        assert f"{folder / name}: " in result.stdout
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (counts["records"], counts["rejected"], counts["manifest_lines"]) == (1, 4, 5)
    assert "1 files ignored" in result.stdout


@pytest.mark.parametrize("resampler", ["avts", "mlp"])
def test_more_frames_than_fit_are_refused_with_the_token_plan(
    resampler: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any checkpoint is read: the configuration alone tells."""
    command = ["ask", str(sound), "What is heard?", "--frames", "4000", "--show-plan", "--config", DEMO]
    command += [f"--config.text.tokenizer={save_tokenizer(tmp_path)}", "--config.model.llm.vocab_size=300"]
    assert cli.main([*command, f"--config.model.avts.resampler={resampler}"]) == 2
    error = capsys.readouterr().err
    frames = {"avts": "token plan with 4000 frames: 4000 frames", "mlp": "of at most 160"}
    assert error.startswith("avlm ask: ") and frames[resampler] in error and "media tokens" in error
    assert "answer" not in error


def test_an_unreadable_file_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    command = ["--config", DEMO, f"--config.text.tokenizer={tokenizer}", "--config.model.llm.vocab_size=300"]
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    for path in (empty, tmp_path / "missing.mp4"):
        assert cli.main(["ask", str(path), "What is heard?", *command]) == 2
        error = capsys.readouterr().err
        assert error.startswith("avlm ask: ") and path.name in error
