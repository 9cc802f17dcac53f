"""Multiple choice: which letter a response names, and how many are right; pure functions, no model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from avlm_jax.evals.interval import cluster_interval
from avlm_jax.evals.predictions import Prediction, PredictionError, Reference

MISSING_POLICIES = ("error", "skip", "zero")
LETTERS = "ABCDEFGH"

Extractor = Callable[[str, Sequence[str]], str | None]


def extract_official(response: str, options: Sequence[str] = ()) -> str | None:
    """Video-MME's rule: the first capital A, B, C or D anywhere (eval_your_results.py of
    deeplearning-LI/parse_answer 0379c42), so that "Answer: C" is an A.

    That script first deletes phrases such as "The best answer is" and refuses long responses without a
    letter; neither phrase holds a capital A-D, so neither step can change which letter comes first.
    """
    found = re.search("[ABCD]", response)
    return found.group() if found else None


# What may stand around a letter that is meant as one.
_LETTER = r"[(\[*_`\"']*([A-Ha-h])(?![\w'’])[)\]*_`\"']*"
_WHOLE = re.compile(rf"^{_LETTER}[.:,!)]*$")
_PHRASE = re.compile(
    rf"\b(?:answer|option|choice)(?:\s+(?:is|would\s+be|must\s+be)(?:\s+(?:option|choice))?\s*:?|\s*[:=]|(?=\s))\s*{_LETTER}",
    re.IGNORECASE,
)
_LEADING = re.compile(r"^[(\[*_`]*([A-H])(?:[)\]*_`]+[.:]?|[.:])(?=\s|$)")
_TRAILING = re.compile(r"[(\[]([A-H])[)\]][.!*_`\"']*$")
_ALONE = re.compile(r"(?<![\w'’])([A-H])(?![\w'’])")
# "a man", "A dog barks", but not "A because ..." or "A or B".
_ARTICLE = re.compile(r"[Aa]\s+(?!(?:because|since|as|or|and|is|seems|which)\b)\w")
_NEGATED = re.compile(r"\b(?:not|isn't|never|nor|neither)\W+(?:\w+\W+){0,2}$", re.IGNORECASE)


def extract_strict(response: str, options: Sequence[str] = ()) -> str | None:
    """This project's rule: the one letter that the response states as its answer, or None.

    In this order, and the first kind of statement that is found decides: the response is a letter; "answer (option, choice)
    is X", "answer: X"; it begins with "X." or "(X)", or ends in "(X)"; it is one option word for word (an article in front
    is free); it holds one capital that stands alone and is no article. A kind of statement that names two letters is no
    answer, nor is a negated one.

    Args:
        response: of the model.
        options: their texts; letters beyond them do not count. Empty: four options, not compared with the
            text.
    """
    text = response.strip()
    letters = LETTERS[: len(options) or 4]
    if whole := _WHOLE.match(text):
        letter = whole.group(1).upper()
        return letter if letter in letters else None
    phrases = [match for match in _PHRASE.finditer(text) if _is_stated(match, text)]
    for matches in (phrases, [*_LEADING.finditer(text), *_TRAILING.finditer(text)]):
        if matches:
            return _one({m.group(1).upper() for m in matches}, letters)
    same = [
        letter for letter, option in zip(letters, options, strict=False) if _plain(option) == _plain(text)
    ]
    if text and len(same) == 1:
        return same[0]
    return _one({m.group(1) for m in _ALONE.finditer(text) if _is_stated(m, text)}, letters)


def _is_stated(match: re.Match[str], text: str) -> bool:
    if match.group(1) in ("A", "a") and _ARTICLE.match(text, match.start(1)):
        return False
    return not _NEGATED.search(text[: match.start()])


def _one(found: set[str], letters: str) -> str | None:
    found &= set(letters)
    return found.pop() if len(found) == 1 else None


def _plain(text: str) -> str:
    words = re.sub(r"[^\w:.\s-]", "", text.casefold()).split()
    if words[:1] in (["a"], ["an"], ["the"]) and len(words) > 1:
        words = words[1:]
    return " ".join(words).rstrip(". ")


EXTRACTORS: Mapping[str, Extractor] = {"official": extract_official, "strict": extract_strict}


def score_multiple_choice(
    predictions: Iterable[Prediction],
    references: Iterable[Reference],
    protocol: str = "official",
    *,
    missing: str = "error",
    seed: int = 0,
) -> dict[str, Any]:
    """Scores multiple-choice predictions.

    Args:
        predictions: at most one per item, for items of `references` only.
        references: the right answers.
        protocol: how a letter is found in a response: "official" or "strict".
        missing: items without a prediction: "error", "zero" (wrong, counted), "skip" (left out of the total).
            Video-MME's own script asserts that every video is there.
        seed: of the bootstrap.

    Returns:
        protocol, missing_policy; counts total, answered (a letter was found), unparsed (a response without
        one), missing, errors (a prediction without a response), correct; accuracy = correct / total, so that
        unanswered counts as wrong; accuracy_answered = correct / answered, Video-MME's own number; ci95 of
        accuracy and how it was made; videos; by_type: the same counts per type of question. Shares are 0..1,
        None where nothing was counted.

    Raises:
        PredictionError: a prediction of an unknown item, or a missing one under "error".
        ValueError: unknown protocol or policy.
    """
    if protocol not in EXTRACTORS:
        raise ValueError(f"protocol is {protocol!r}; use one of {', '.join(EXTRACTORS)}")
    if missing not in MISSING_POLICIES:
        raise ValueError(f"missing is {missing!r}; use one of {', '.join(MISSING_POLICIES)}")
    given = {prediction.item_key: prediction for prediction in predictions}
    known = list(references)
    unknown = given.keys() - {reference.item_key for reference in known}
    if unknown:
        raise PredictionError(
            f"{len(unknown)} predictions are of items that the references lack, the first is "
            f"{min(unknown)!r}; score them against the references of the same items"
        )
    absent = [reference.item_key for reference in known if reference.item_key not in given]
    if absent and missing == "error":
        raise PredictionError(
            f"{len(absent)} of {len(known)} items have no prediction, the first is {absent[0]!r}; answer "
            "them, or choose --missing zero (counted as wrong) or --missing skip (left out)"
        )
    judged = [(reference, *_judge(given.get(reference.item_key), reference, protocol)) for reference in known]
    report: dict[str, Any] = {"protocol": protocol, "missing_policy": missing}
    report |= _count(judged, missing, seed)
    types = sorted({reference.type for reference in known if reference.type})
    report["by_type"] = {
        kind: _count([row for row in judged if row[0].type == kind], missing, seed) for kind in types
    }
    return report


def _judge(prediction: Prediction | None, reference: Reference, protocol: str) -> tuple[str, bool]:
    """(what became of the item, whether it is right)."""
    if prediction is None:
        return "missing", False
    if prediction.error is not None:
        return "errors", False
    letter = EXTRACTORS[protocol](prediction.response, reference.options)
    return ("unparsed", False) if letter is None else ("answered", letter == reference.answer)


def _count(judged: Sequence[tuple[Reference, str, bool]], missing: str, seed: int) -> dict[str, Any]:
    fates = [fate for _, fate, _ in judged]
    counted = [row for row in judged if not (row[1] == "missing" and missing == "skip")]
    correct, answered = sum(right for *_, right in judged), fates.count("answered")
    low_high, method = cluster_interval(
        [right for *_, right in counted], [reference.video_id for reference, *_ in counted], seed=seed
    )
    return {
        "n": len(counted),
        "total": len(counted),
        "answered": answered,
        "unparsed": fates.count("unparsed"),
        "missing": fates.count("missing"),
        "errors": fates.count("errors"),
        "correct": correct,
        "videos": len({reference.video_id for reference, *_ in counted}),
        "accuracy": correct / len(counted) if counted else None,
        "accuracy_answered": correct / answered if answered else None,
        "ci95": low_high,
        "ci95_method": method,
    }


def format_report(report: Mapping[str, Any], title: str = "") -> str:
    """The report as a table: overall and by type, counts beside every share."""
    head = (
        "",
        "accuracy",
        "95 % interval",
        "correct/answered",
        "total",
        "answered",
        "unparsed",
        "missing",
        "errors",
    )
    rows = [head]
    named = {"all": report, **{f"type {kind}": part for kind, part in report["by_type"].items()}}
    for name, part in named.items():
        interval = (
            "-" if part["ci95"] is None else f"{100 * part['ci95'][0]:.1f} - {100 * part['ci95'][1]:.1f}"
        )
        shares = [percent(part["accuracy"]), interval, percent(part["accuracy_answered"])]
        rows.append((name, *shares, *(str(part[key]) for key in head[4:])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    top = f"multiple choice, protocol {report['protocol']}, {report['videos']} videos"
    return "\n".join(
        [
            f"{title}: {top}" if title else top,
            *lines,
            f"accuracy = correct/total; interval: {report['ci95_method']}",
        ]
    )


def percent(share: float | None) -> str:
    """A share as "12.3 %"; "-" for none."""
    return "-" if share is None else f"{100 * share:.1f} %"
