"""Letters out of responses, and counts out of letters."""

from __future__ import annotations

import pytest

from avlm_jax.evals.interval import cluster_interval
from avlm_jax.evals.multiple_choice import (
    extract_official,
    extract_strict,
    format_report,
    score_multiple_choice,
)
from avlm_jax.evals.predictions import Prediction, PredictionError, Reference

REFUSAL = "I am sorry, but I cannot say anything about this video at all, it seems empty"

# Response, what Video-MME's script reads, what ours reads.
TRUTH = [
    ("C", "C", "C"),
    ("C.", "C", "C"),
    ("(C)", "C", "C"),
    ("C. Jade.", "C", "C"),
    ("Answer: C. Jade.", "A", "C"),
    ("The answer is C", "C", "C"),
    ("Best answer: C", "B", "C"),
    ("The correct option is (D)", "D", "D"),
    ("Based on the video, option C is right", "B", "C"),
    ("A man is holding C", "A", "C"),
    ("I think it is B because of Apples", "B", "B"),
    ("c", None, "C"),
    ("the answer is c.", None, "C"),
    ("None of them", None, None),
    ("Option B", "B", "B"),
    ("The best answer is: D", "D", "D"),
    ("Because the Dog is seen, the answer is B", "B", "B"),
    ("", None, None),
    (REFUSAL, None, None),
]


@pytest.mark.parametrize(("response", "official", "ours"), TRUTH)
def test_truth_table(response: str, official: str | None, ours: str | None) -> None:
    assert extract_official(response) == official
    assert extract_strict(response) == ours


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("red circle (B)", "B"),
        ("00:00:01.250 - 00:00:05.000 (D)", "D"),
        ("**B**", "B"),
        ("**Answer:** B", "B"),
        ("B) the bell", "B"),
        ("A: bell", "A"),
        ("The answer is A because a bell rings.", "A"),
        ("the answer a man gives", None),
        ("The answer is not C", None),
        ("It is not B", None),
        ("(A) or (B)", None),
        ("A or B", None),
        ("The answer is B. No, the answer is C.", None),
        ("Drum", "C"),
        ("The drum.", "C"),
        ("bell, drum", None),
        ("the drum is heard", None),
        ("E", None),
        ("A dog barks", None),
    ],
)
def test_strict_wants_one_stated_letter(response: str, letter: str | None) -> None:
    assert extract_strict(response, ("bell", "siren", "drum", "buzz")) == letter


def test_options_beyond_d() -> None:
    options = ("one", "two", "three", "four", "five")
    assert extract_strict("(E)", options) == "E"
    assert extract_official("(E)", options) is None  # Video-MME has four.


def predict(item: str, response: str, error: str | None = None) -> Prediction:
    video = item.partition("-")[0]
    return Prediction("b", "mcq", item, video, "?", response, "m", {}, 16, ("video",), error)


def refer(item: str, answer: str, kind: str = "") -> Reference:
    return Reference(item, item.partition("-")[0], answer, ("p", "q", "r", "s"), kind)


REFERENCES = [
    refer("v0-1", "A", "1"),
    refer("v0-2", "B", "2"),
    refer("v1-1", "C", "1"),
    refer("v1-2", "D", "2"),
]


def test_counts_and_both_accuracies() -> None:
    answers = [
        predict("v0-1", "(A)"),
        predict("v0-2", "x"),
        predict("v1-1", "D"),
        predict("v1-2", "", "too long"),
    ]
    report = score_multiple_choice(answers, REFERENCES)
    assert report["protocol"] == "official"
    counts = {
        key: report[key] for key in ("total", "n", "answered", "unparsed", "missing", "errors", "correct")
    }
    assert counts == {
        "total": 4,
        "n": 4,
        "answered": 2,
        "unparsed": 1,
        "missing": 0,
        "errors": 1,
        "correct": 1,
    }
    assert report["accuracy"] == 0.25  # An answer without a letter is a wrong one ...
    assert report["accuracy_answered"] == 0.5  # ... but not for Video-MME's script.
    assert [report["by_type"][kind]["accuracy"] for kind in ("1", "2")] == [0.5, 0.0]
    assert report["by_type"]["2"]["accuracy_answered"] is None
    table = format_report(report, "mine")
    assert "protocol official" in table and "25.0 %" in table and "type 2" in table
    rows = table.splitlines()[1:-1]
    assert len({len(row) for row in rows}) == 1  # It lines up.


def test_protocols_differ() -> None:
    answers = [predict("v0-1", "Best answer: A")]
    assert score_multiple_choice(answers, REFERENCES[:1], "official")["correct"] == 0
    assert score_multiple_choice(answers, REFERENCES[:1], "strict")["correct"] == 1
    with pytest.raises(ValueError, match="official"):
        score_multiple_choice(answers, REFERENCES[:1], "lenient")


def test_missing_items() -> None:
    answers = [predict("v0-1", "A")]
    with pytest.raises(PredictionError, match="3 of 4 items have no prediction, the first is 'v0-2'"):
        score_multiple_choice(answers, REFERENCES)
    zero = score_multiple_choice(answers, REFERENCES, missing="zero")
    assert (zero["total"], zero["missing"], zero["accuracy"]) == (4, 3, 0.25)
    skip = score_multiple_choice(answers, REFERENCES, missing="skip")
    assert (skip["total"], skip["missing"], skip["accuracy"]) == (1, 3, 1.0)
    nothing = score_multiple_choice([], REFERENCES, missing="skip")
    assert (nothing["total"], nothing["accuracy"], nothing["ci95"]) == (0, None, None)
    assert "-" in format_report(nothing)


def test_unknown_items_are_refused() -> None:
    with pytest.raises(PredictionError, match="'w-1'"):
        score_multiple_choice([predict("w-1", "A")], REFERENCES, missing="zero")


def test_interval_widens_with_clusters() -> None:
    hits = [True] * 100 + [False] * 100
    (low, high), _ = cluster_interval(hits, range(200))
    assert 0.40 < low < 0.46 and 0.54 < high < 0.60  # 0.5 +- 1.96 sqrt(0.25 / 200) = 0.43 .. 0.57
    # Ten videos, each all right or all wrong: ten observations, not two hundred.
    (wide_low, wide_high), _ = cluster_interval(hits, [index // 20 for index in range(200)])
    assert wide_low <= 0.25 and wide_high >= 0.75


def test_interval_is_seeded() -> None:
    hits = [index % 3 == 0 for index in range(60)]
    videos = [index // 5 for index in range(60)]
    first, method = cluster_interval(hits, videos, seed=1)
    assert cluster_interval(hits, videos, seed=1)[0] == first
    assert "12 videos" in method and "seed 1" in method


def test_interval_never_claims_certainty() -> None:
    (low, high), method = cluster_interval([True] * 8, [0, 0, 1, 1, 2, 2, 3, 3])
    assert high == 1.0 and low == pytest.approx(4 / (4 + 1.959964**2))  # Wilson's lower end for 4 of 4.
    assert "Wilson" in method
    assert cluster_interval([True], ["v"])[0] == pytest.approx([1 / (1 + 1.959964**2), 1.0])
    assert cluster_interval([], [])[0] is None
