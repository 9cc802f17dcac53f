"""Prediction files: what is written comes back, what is wrong is named with its line; and `avlm score`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from avlm_jax import cli
from avlm_jax.evals.predictions import (
    Prediction,
    PredictionError,
    Reference,
    read_predictions,
    read_references,
    reference_of_sample,
    write_rows,
)

ROW = Prediction(
    "b", "mcq", "v-1", "v", "Wer \u2028 da?", "Ärger (A)\n", "m", {"method": "greedy"}, 16, ("video",)
)
REFERENCE = Reference("v-1", "v", "A", ("p", "q", "r", "s"), "3")


def test_round_trip(tmp_path: Path) -> None:
    failed = Prediction("b", "mcq", "v-2", "v", "?", "", "m", {}, 0, (), "does not fit")
    write_rows(tmp_path / "new" / "p.jsonl", [ROW, failed])
    assert read_predictions(tmp_path / "new" / "p.jsonl") == [ROW, failed]
    write_rows(tmp_path / "r.jsonl", [REFERENCE])
    assert read_references(tmp_path / "r.jsonl") == [REFERENCE]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "new",
        "r.jsonl",
    ]  # Nothing unfinished is left.


def line(**changes: object) -> str:
    values = {"schema": 1, **json.loads(json.dumps(ROW.__dict__)), **changes}
    return json.dumps({key: value for key, value in values.items() if value != "gone"})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "is list"),
        (line(schema=2), "has schema 2"),
        (line(schema="gone"), "lacks 'schema'"),
        (line(response="gone"), "lacks 'response'"),
        (line(reponse="x"), "unknown key 'reponse'"),
        (line(n_frames="16"), "'n_frames' is \"16\"; a int"),
        (line(n_frames=True), "'n_frames'"),
        (line(response=None), "'response' is null"),
        (line(modalities="video"), "'modalities'"),
        (line(modalities=[1]), "'modalities' must be a list of texts"),
        (line(), "item 'v-1' stands in line 1 already"),
        ("", "is empty"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, bad: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join([line(), bad, line(item_key="v-9")]) + "\n")
    with pytest.raises(PredictionError, match=r"p\.jsonl, line 2") as caught:
        read_predictions(path)
    assert message in str(caught.value)


def test_no_prediction_at_all(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(PredictionError, match="holds no line"):
        read_predictions(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PredictionError, match="no UTF-8"):
        read_predictions(tmp_path / "p.jsonl")


def test_references_know_their_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'E' is no letter of 4"):
        Reference("v-1", "v", "E", ("p", "q", "r", "s"))
    sample = {"id": "v-1", "task": "mcq", "answer": "b", "options": ["p", "q"]}
    with pytest.raises(PredictionError, match="'v-1' of task 'mcq'"):
        reference_of_sample(sample, "v")
    with pytest.raises(PredictionError, match="name other --tasks"):
        reference_of_sample({"id": "v-1", "task": "caption"}, "v")
    assert reference_of_sample({**sample, "answer": "B", "qa_type": 3}, "v") == Reference(
        "v-1", "v", "B", ("p", "q"), "3"
    )


def test_score_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "predictions.jsonl", [ROW])
    write_rows(tmp_path / "references.jsonl", [REFERENCE])
    predictions = str(tmp_path / "predictions.jsonl")
    assert cli.main(["score", predictions, "--out", str(tmp_path / "m" / "metrics.json")]) == 0
    assert "100.0 %" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert (metrics["accuracy"], metrics["protocol"], metrics["total"]) == (1.0, "official", 1)
    write_rows(tmp_path / "more.jsonl", [REFERENCE, Reference("w-1", "w", "B", ("p", "q"))])
    more = ["--references", str(tmp_path / "more.jsonl")]
    assert cli.main(["score", predictions, *more]) == 2
    assert "'w-1'" in capsys.readouterr().err
    assert cli.main(["score", predictions, *more, "--missing", "zero"]) == 1
    assert "50.0 %" in capsys.readouterr().out


def test_score_needs_no_jax() -> None:
    code = "import sys, avlm_jax.score; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
