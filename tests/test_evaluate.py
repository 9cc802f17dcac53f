"""Evaluation: every question once, whatever its media hold; files that `avlm score` reads; the verb."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from avlm_jax import cli, score
from avlm_jax.assembly import Assembly, assemble
from avlm_jax.evals.predictions import read_predictions
from avlm_jax.evaluate import evaluate
from input_pipeline.errors import UserError
from tests.tiny_system import publish, random_params, save_tokenizer, tiny_config, write_records

VIDEOS, QUESTIONS = 3, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def assembly(place: Path) -> Assembly:
    return assemble(tiny_config(save_tokenizer(place / "tokenizer")))


@pytest.fixture(scope="module")
def params(assembly: Assembly) -> dict:
    return random_params(assembly)


@pytest.fixture(scope="module")
def records(place: Path, assembly: Assembly) -> Path:
    return write_records(place / "records", assembly.system.spec, VIDEOS, QUESTIONS)


def test_every_question_is_asked_once(
    assembly: Assembly, params: dict, records: Path, tmp_path: Path
) -> None:
    report = evaluate(
        assembly, params, records, out_dir=tmp_path, batch_size=4, max_new_tokens=2, model="mine"
    )
    assert report["total"] == report["n"] == VIDEOS * QUESTIONS
    assert report["answered"] + report["unparsed"] == report["total"]
    assert report["videos"] == VIDEOS and set(report["by_type"]) == {"1", "2"}
    rows = read_predictions(tmp_path / "predictions.jsonl")
    assert [row.item_key for row in rows] == [f"v{v}-q{q}" for v in range(VIDEOS) for q in (1, 2)]
    assert [row.video_id for row in rows] == ["v0", "v0", "v1", "v1", "v2", "v2"]
    assert rows[0].prompt.startswith("<video>\nAt 00:01") and "(B)" not in rows[0].prompt
    assert rows[0].n_frames == 4 and rows[0].modalities == ("video", "audio") and rows[0].model == "mine"
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["accuracy"] == report["accuracy"] and written["protocol"] == "official"
    # The files alone give the same numbers, and so do the records.
    assert (
        cli.main(["score", str(tmp_path / "predictions.jsonl"), "--out", str(tmp_path / "again.json")]) == 0
    )
    again = json.loads((tmp_path / "again.json").read_text())
    assert {key: again[key] for key in ("accuracy", "ci95", "by_type")} == {
        key: written[key] for key in ("accuracy", "ci95", "by_type")
    }
    assert len(score.references_of_records(records)) == VIDEOS * QUESTIONS


def test_questions_count_even_if_nothing_can_be_seen(
    assembly: Assembly, params: dict, records: Path, tmp_path: Path
) -> None:
    # The second video has no sound: shown only sound, its questions are still asked.
    report = evaluate(
        assembly, params, records, modalities=("audio",), out_dir=tmp_path, batch_size=4, max_new_tokens=2
    )
    assert report["total"] == VIDEOS * QUESTIONS
    assert {row.n_frames for row in read_predictions(tmp_path / "predictions.jsonl")} == {0}


def test_limit(assembly: Assembly, params: dict, records: Path) -> None:
    assert evaluate(assembly, params, records, limit=3, batch_size=4, max_new_tokens=2)["total"] == 3


def test_right_answers_are_counted_right(
    assembly: Assembly, params: dict, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(self: object, batch: dict[str, np.ndarray], names: list[str]) -> list[str]:
        wanted = ["ABCD"[(int(name[1]) + int(name[4])) % 4] for name in names]
        wanted[0] = "x"  # Each batch's first answer has no letter.
        return [f"word ({letter})" for letter in wanted] + [""] * (len(batch["tokens"]) - len(names))

    monkeypatch.setattr("avlm_jax.generate.Generator.texts", told)
    report = evaluate(assembly, params, records, modalities=(), batch_size=4)
    assert (report["correct"], report["unparsed"], report["total"]) == (4, 2, 6)


def test_what_cannot_be_used(assembly: Assembly, params: dict, records: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its tasks are \\['mcq'\\]"):
        evaluate(assembly, params, records, tasks=("caption",))
    with pytest.raises(UserError, match="unknown modalities"):
        evaluate(assembly, params, records, modalities=("subtitles",))
    with pytest.raises(UserError, match="strict"):
        evaluate(assembly, params, records, protocol="lenient")
    with pytest.raises(UserError, match="does not exist"):
        evaluate(assembly, params, tmp_path / "none")


def test_verb(
    assembly: Assembly, params: dict, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(assembly, params, tmp_path / "final")
    command = ["evaluate", "--checkpoint", str(tmp_path / "final"), "--records", str(records)]
    options = [
        "--out",
        str(tmp_path / "out"),
        "--modalities",
        "none",
        "--max-new-tokens",
        "2",
        "--batch-size",
        "4",
    ]
    assert cli.main([*command, *options]) == 0
    out = capsys.readouterr().out
    assert "protocol official" in out and "type 2" in out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["modalities"] == []
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--tasks", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
