"""The project's commands, one after the other, on files that nobody generated: prepare, train stage 2b, ask."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from avlm_jax import cli
from avlm_jax.assembly import assemble
from avlm_jax.backbones.make import hf_config
from avlm_jax.monitoring.writer import read_metrics
from avlm_jax.state import flatten, unflatten
from avlm_jax.weights.qwen2 import save_qwen2
from input_pipeline.records import RecordReader
from tests.tiny_system import CONFIG, SIZES, random_params, save_tokenizer, tiny_config

pytestmark = pytest.mark.e2e

# Frames as in the paper; everything else as tiny as in the other tests.
MEDIA = {"num_frames": 16, "image_size": 16, "window_frames": 32, "max_windows": 4}
SYSTEM = (
    *(size for size in SIZES if not size.startswith(("media.", "init.llm"))),
    *(f"media.{key}={value}" for key, value in MEDIA.items()),
    "model.avts.num_queries=16",
)
STEPS = 15
TURNS = {
    "nasa_13013.mp4": [
        ("What is heard?", "A narrator speaks."),
        ("What is seen between 0:02 and 0:06?", "A telescope in a clean room."),
    ],
    "jfk.flac": [("What is heard?", "A man gives a speech.")],
    "h265_video.mp4": [("Is there any sound?", "No, the video is silent.")],
    "video_0.mov": [("What is seen?", "The keys of a keyboard.")],
}


def overrides(*values: str) -> list[str]:
    return [f"--config.{value}" for value in values]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("footage")


@pytest.fixture(scope="module")
def language_model(place: Path) -> Path:
    """Tokenizer and a language model that does not say everything with the same probability, as fresh ones do."""
    assembly = assemble(tiny_config(save_tokenizer(place / "llm")))
    llm = {
        path: leaf for path, leaf in flatten(random_params(assembly)["llm"]).items() if "lora_" not in path
    }
    save_qwen2(place / "llm", hf_config(assembly.system.llm_config, assembly.tokenizer), unflatten(llm))
    return place / "llm"


@pytest.fixture(scope="module")
def records(place: Path, shared_media: Path) -> Path:
    """Records of a manifest written by hand, with a line on a damaged file among the good ones."""
    lines = []
    for name, rounds in [*TURNS.items(), ("corrupted.mp4", [("What is seen?", "A test pattern.")])]:
        kind = "audio" if name.endswith(".flac") else "video"
        for question, answer in rounds:
            turns = [{"from": "human", "value": f"<{kind}>\n{question}"}, {"from": "gpt", "value": answer}]
            lines.append(json.dumps({"id": f"{name}-{len(lines)}", kind: name, "conversations": turns}))
    manifest = place / "conversations.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    command = ["prepare", "--manifest", str(manifest), "--media-root", str(shared_media)]
    command += ["--out", str(place / "records"), "--config", f"{CONFIG}:size=demo", "--workers", "1"]
    for key, value in MEDIA.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    assert cli.main(command) == 1  # The damaged file is told by the exit code, and costs nothing else.
    return place / "records"


@pytest.fixture(scope="module")
def workdir(place: Path, records: Path, language_model: Path) -> Path:
    command = ["train", "--config", f"{CONFIG}:size=demo,stage=2b", "--workdir", str(place / "run")]
    command += overrides(*SYSTEM, f"text.tokenizer={language_model}", f"init.llm={language_model}")
    command += overrides("stage.2b.parent=", "stage.2b.max_length=0", "stage.2b.optim.lr=0.01")
    command += overrides(f"stage.2b.sources.mcq.records={records}", "stage.2b.sources.mcq.tasks=()")
    command += overrides(f"stage.2b.steps={STEPS}", f"stage.2b.batch_size={sum(map(len, TURNS.values()))}")
    assert cli.main(command) == 0
    return place / "run"


def test_every_file_of_a_folder_becomes_a_record_or_is_rejected_with_a_reason(
    shared_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "records"
    command = ["prepare", "--folder", str(shared_media), "--out", str(out)]
    assert cli.main([*command, "--config", f"{CONFIG}:size=demo"]) == 1
    printed = capsys.readouterr().out
    assert "14 records with 0 conversations" in printed and "corrupted.mp4" in printed
    (rejected,) = (json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines())
    assert rejected["path"] == str(shared_media / "corrupted.mp4") and rejected["reason"]
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts["records"] == 14 and counts["rejected"] == 1


def test_a_manifest_written_by_hand(records: Path) -> None:
    reader = RecordReader(records)
    assert len(reader) == len(TURNS) and len(reader.samples) == sum(map(len, TURNS.values()))
    shown = {sample["id"].rpartition("-")[0]: sample for sample in reader.samples}
    assert (shown["h265_video.mp4"]["has_video"], shown["h265_video.mp4"]["has_audio"]) == (True, False)
    assert (shown["jfk.flac"]["has_video"], shown["jfk.flac"]["has_audio"]) == (False, True)
    (rejected,) = (json.loads(line) for line in (records / "rejected.jsonl").read_text().splitlines())
    assert rejected["path"].endswith("corrupted.mp4") and rejected["stage"] == "decode"


def test_the_loss_of_stage_2b_falls(workdir: Path) -> None:
    losses = [line["loss"] for line in read_metrics(workdir / "2b")]
    assert len(losses) == STEPS and np.mean(losses[-3:]) < 0.8 * losses[0]
    assert (workdir / "2b" / "final" / "trainable.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("nasa_13013.mp4", "16 frames + 4 audio windows + 2 time tokens -> 16 media tokens"),
        ("h264_10bits.mp4", "16 frames + 0 audio windows + 2 time tokens -> 16 media tokens"),
        ("sine_mono_s16.wav", "0 frames + 4 audio windows + 2 time tokens -> 16 media tokens"),
    ],
    ids=["both", "silent", "sound"],
)
def test_asking_the_trained_model(
    name: str, plan: str, workdir: Path, shared_media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ask", str(shared_media / name), "What is heard?", "--max-new-tokens", "4"]
    assert cli.main([*command, "--checkpoint", str(workdir / "2b" / "final")]) == 0
    printed = capsys.readouterr().out
    assert f"token plan: {plan}" in printed and "model:      savenvideo/2b/" in printed
    assert "answer:" in printed
