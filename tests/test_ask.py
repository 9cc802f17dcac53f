"""`avlm ask`: any media file, its token plan, and refusals that print it."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avlm_jax import cli
from avlm_jax.assembly import assemble
from tests.tiny_system import publish, random_params, save_tokenizer, tiny_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Path) -> Callable[..., Path]:
    """Overrides -> folder of a checkpoint with random parameters."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in made:
            assembly = assemble(tiny_config(tokenizer, *overrides))
            made[overrides] = publish(assembly, random_params(assembly), tokenizer / f"checkpoint{len(made)}")
        return made[overrides]

    return make


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "tone.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((8000 * np.sin(np.arange(32_000) * 0.2)).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def test_a_sound_without_picture(
    checkpoint: Callable[..., Path], sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "What is heard between 0.5 s and 1.5 s?"
    command = ["ask", str(sound), question, "--checkpoint", str(checkpoint()), "--max-new-tokens", "4"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "tone.wav, 2.00 s, no picture, 3 audio windows" in out
    assert "times:      0.50 to 1.50 s" in out
    assert "0 frames + 3 audio windows + 2 time tokens -> 8 media tokens" in out and "of at most 160" in out
    assert "\nanswer:" in out


def test_a_picture_without_sound(
    checkpoint: Callable[..., Path], picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ask", str(picture), "What is it?", "--checkpoint", str(checkpoint()), "--show-plan"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "1 frames of 16 x 16, no sound" in out and "none named" in out
    assert "answer:" not in out  # Only the plan was asked for.


def test_real_footage(
    checkpoint: Callable[..., Path], shared_media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "ask",
        str(shared_media / "nasa_13013.mp4"),
        "What is heard?",
        "--checkpoint",
        str(checkpoint()),
    ]
    assert cli.main([*command, "--max-new-tokens", "4"]) == 0
    assert "4 frames + 3 audio windows" in capsys.readouterr().out


def test_other_frames_than_trained_are_refused_with_the_plan(
    checkpoint: Callable[..., Path], sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ask", str(sound), "What?", "--checkpoint", str(checkpoint()), "--show-plan"]
    assert cli.main([*command, "--frames", "4"]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--frames", "100"]) == 2
    error = capsys.readouterr().err
    assert "queries for 4 frames" in error
    assert "token plan with 100 frames: 100 frames" in error and "200 media tokens" in error
    assert "too many" in error
    assert cli.main([*command, "--frames", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_more_frames_than_fit_are_refused_with_the_plan(
    checkpoint: Callable[..., Path], shared_media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("model.avts.resampler=mlp", "text.max_length=320")
    video = str(shared_media / "nasa_13013.mp4")
    command = ["ask", video, "What is heard?", "--checkpoint", str(folder), "--show-plan"]
    assert cli.main([*command, "--frames", "8"]) == 0
    assert "8 frames + 3 audio windows" in capsys.readouterr().out
    assert cli.main([*command, "--frames", "90"]) == 2
    error = capsys.readouterr().err
    assert "90 frames + 3 audio windows + 2 time tokens" in error and "of at most 320" in error
    assert "Raise the text length (text.max_length" in error


def test_a_global_resampler_takes_any_number_of_frames(
    checkpoint: Callable[..., Path], shared_media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("model.avts.scope=global", "model.avts.time_scope=all")
    command = ["ask", str(shared_media / "nasa_13013.mp4"), "What?", "--checkpoint", str(folder)]
    assert cli.main([*command, "--frames", "7", "--max-new-tokens", "2"]) == 0
    assert "7 frames + 3 audio windows" in capsys.readouterr().out


def test_placeholders_that_a_user_types_are_text(
    checkpoint: Callable[..., Path], picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ask", str(picture), "What do <video> and <image> mean?", "--checkpoint", str(checkpoint())]
    assert cli.main([*command, "--show-plan"]) == 0
    plain = ["ask", str(picture), "What do [video] and [image] mean?", "--checkpoint", str(checkpoint())]
    shown = capsys.readouterr().out
    assert cli.main([*plain, "--show-plan"]) == 0
    assert capsys.readouterr().out == shown  # A byte a token: neither placeholder has become anything else.


def test_too_many_times(
    checkpoint: Callable[..., Path], sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "What is heard at 0:01, at 0:02, at 0:03 and at 0:04?"
    assert cli.main(["ask", str(sound), question, "--checkpoint", str(checkpoint()), "--show-plan"]) == 2
    assert "names 4 times" in capsys.readouterr().err


def test_the_prompt_is_that_of_the_checkpoints_stage(
    checkpoint: Callable[..., Path], sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = checkpoint("stage.2b.template=plain", "stage.2b.template_options={'drop_question': True}")
    command = ["ask", str(sound), "What?", "--show-plan", "--checkpoint"]
    assert cli.main([*command, str(plain)]) == 0
    assert (
        "8 media + 0 text = 8 tokens" in capsys.readouterr().out
    )  # The question is left out, as in training.
    assert cli.main([*command, str(checkpoint("stage.1a.template=plain"))]) == 0
    assert "8 media + 0 text" not in capsys.readouterr().out


def test_what_cannot_be_asked(
    checkpoint: Callable[..., Path], sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ask", str(sound), "What?", "--checkpoint", str(tmp_path / "none")]) == 2
    assert "make demo" in capsys.readouterr().err
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    assert cli.main(["ask", str(text), "What?", "--checkpoint", str(checkpoint())]) == 2
    assert "text.mp4" in capsys.readouterr().err
    assert cli.main(["ask", str(sound), " ", "--checkpoint", str(checkpoint())]) == 2
    assert "empty" in capsys.readouterr().err
