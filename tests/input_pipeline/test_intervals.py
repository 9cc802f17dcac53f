"""The times a question names."""

from __future__ import annotations

import numpy as np
import pytest

from input_pipeline.transforms.intervals import (
    TooManyIntervals,
    interval_source,
    parse_intervals,
    parse_seconds,
)

TABLE = [
    ("Between 00:00:05.250 and 00:00:10.000, which sound is heard?", [(5.25, 10.0)]),
    ("Between 00:05 and 01:10, what moves?", [(5.0, 70.0)]),
    ("What happens from 1s to 13s?", [(1.0, 13.0)]),
    ("What happens from 1s till 13s?", [(1.0, 13.0)]),
    ("What happens from 5 to 10 seconds?", [(5.0, 10.0)]),
    ("Between 5 and 10.5 seconds?", [(5.0, 10.5)]),
    ("Between 1 and 2 minutes?", [(60.0, 120.0)]),
    ("At 00:12.", [(12.0, 12.0)]),
    ("At 12.5 seconds, what is seen?", [(12.5, 12.5)]),
    ("What is heard 12s in?", [(12.0, 12.0)]),
    ("After 2 minutes, who speaks?", [(120.0, 120.0)]),
    ("After 1 minute and 5 seconds, who speaks?", [(65.0, 65.0)]),
    ("At 0h 59m 3s?", [(3543.0, 3543.0)]),
    ("Compare 00:01 - 00:03 with 00:05\u201300:07.", [(1.0, 3.0), (5.0, 7.0)]),
    ("In [00:00:01,00:00:13], what is seen?", [(1.0, 13.0)]),
    ("00:00:01,500 - 00:00:02,250?", [(1.5, 2.25)]),
    ("From 00:10 until 00:05?", [(5.0, 10.0)]),
    ("From 00:10s to 00:15s?", [(10.0, 15.0)]),
    ("In the first 10 seconds?", [(0.0, 10.0)]),
    ("In the last 5 seconds?", [(3595.0, 3600.0)]),
    ("At 01:00:10?", [(3600.0, 3600.0)]),  # beyond the end
    ("From 00:59:59 to 02:00:00?", [(3599.0, 3600.0)]),
    # No times: lengths, counts, sizes, times of day, years.
    ("Which sound is heard for 5 seconds?", []),
    ("What is this 10-second clip about?", []),
    ("How many of the 3 men speak?", []),
    ("Count from 5 to 10.", []),
    ("It is 3:15 pm. What is heard?", []),
    ("Is the wall 10 m tall in 1984?", []),
    ("Which sound is heard while the red circle moves?", []),
    ("", []),
]


def _same(found: list, expected: list) -> bool:
    return len(found) == len(expected) and np.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("stem", "expected"), TABLE)
def test_table(stem, expected):
    assert _same(parse_intervals(stem, 3600.0, 8), expected)


def _written(seconds: float) -> list[str]:
    """`seconds` (whole milliseconds) in every form that can express it."""
    millis = round(seconds * 1000)
    h, m, s = millis // 3_600_000, millis // 60_000 % 60, millis % 60_000 / 1000
    forms = [f"{h:02d}:{m:02d}:{s:06.3f}", f"{h:02d}:{m:02d}:{s:06.3f}".replace(".", ",")]
    forms += [f"{millis // 60_000:02d}:{s:06.3f}", f"{millis / 1000}s", f"{millis / 1000} seconds"]
    forms += [f"{h} hours {m} minutes {s} seconds", f"{h} h {m} min and {s} sec"]
    return forms


def test_every_written_form_reads_back():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = np.round(rng.uniform(0, 7200, size=2), 3)
        for one in _written(a):
            assert parse_seconds(one) == pytest.approx(a, abs=1e-6), one
            assert _same(parse_intervals(f"At {one}, what?", 7200.0, 1), [(a, a)]), one
            for two in _written(b):
                low, high = sorted((a, b))
                for text in (f"From {one} to {two}?", f"between {one} and {two}", f"{one} - {two}"):
                    assert _same(parse_intervals(text, 7200.0, 8), [(low, high)]), text


def test_clamped_into_the_media():
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b = rng.uniform(0, 300, size=2)
        duration = rng.uniform(0, 200)
        ((start, end),) = parse_intervals(f"from {a:.3f}s to {b:.3f}s", duration, 8)
        assert 0 <= start <= end <= duration
    assert parse_intervals("At 00:05?", 0.0, 8) == [(0.0, 0.0)]  # an image


def test_not_a_time():
    with pytest.raises(ValueError, match="'soon' is not a time"):
        parse_seconds("soon")


def test_fractions_and_powers_are_no_whole_numbers():
    for stem in ("After \u00bd s, what?", "After 1\u00bd minutes, what?"):
        assert parse_intervals(interval_source(stem), 3600.0, 8) == []


def test_too_many_are_refused_by_name():
    stem = " ".join(f"00:{i:02d}" for i in range(4))
    assert len(parse_intervals(stem, 60.0, 4)) == 4
    with pytest.raises(TooManyIntervals, match="'clip-7' names 4 times.*max_intervals"):
        parse_intervals(stem, 60.0, 3, sample_id="clip-7")


@pytest.mark.parametrize(
    "options",
    [
        "A: 00:01 - 00:03\nB: 00:05 - 00:07\nC: 00:08 - 00:09\nD: 00:10 - 00:11",
        "A. 00:01 - 00:03\nB. 00:05 - 00:07",
        "A) 00:01 - 00:03\nB) 00:05 - 00:07",
        "(A) 00:01 - 00:03\n(B) 00:05 - 00:07",
        "  a. 00:01 - 00:03\n  b. 00:05 - 00:07",
        "Option 1: 00:01 - 00:03\nOption 2: 00:05 - 00:07",
        "1. 00:01 - 00:03\n2. 00:05 - 00:07",
        "(A) 00:01 - 00:03 (B) 00:05 - 00:07",
        "A. 00:01 - 00:03 B. 00:05 - 00:07",
        "A\uff1a00:01 - 00:03\nB\uff1a00:05 - 00:07",
        "\uff21\uff1a\uff10\uff1a\uff10\uff11\n\uff22\uff1a\uff10\uff1a\uff10\uff15",
        "\uff08A\uff0900:01\uff08B\uff0900:05",
        "(i) 00:01 - 00:03\n(ii) 00:05 - 00:07\n(iii) 00:08\n(iv) 00:09\n(v) 00:10",
        "i) 00:01 - 00:03\nii) 00:05 - 00:07",
        "I. 00:01\nII. 00:05\nIII. 00:08",
        "(i) 00:01 (ii) 00:05",
        "i. 00:01 ii. 00:05",
        "A, 0:01\nB, 0:05",
        "A, 0:01 B, 0:05",
        "A\u3001 0:01\nB\u3001 0:05",
        "\u2460 00:01\n\u2461 00:05",
        "\u246000:01 \u246100:05",
        "\u2776 00:01\n\u2777 00:05",
        "\u24b6 00:01 \u24b7 00:05",
        "\u2474 00:01\n\u2475 00:05",
    ],
)
def test_options_do_not_leak(options):
    text = f"<video>\nWhen does the bell ring after 00:00:30?\n{options}\nAnswer with the letter."
    source = interval_source(text)
    assert parse_intervals(source, 60.0, 8) == [(30.0, 30.0)]
    assert "<video>" not in source and source.startswith("When")


def test_stem_that_begins_like_an_option_is_kept():
    for stem in (
        "It rings at \uff10\uff10\uff1a\uff10\uff15.",
        "In scene A, and in B, at 00:05, what is seen?",
        "Ivan sings at 00:05.",
        "At \u2460, who speaks at 00:05?",
        "A bell rings at 00:05.",
        "B-flat is heard at 00:05.",
        "10:05 is shown; what is heard at 00:05?",
    ):
        assert parse_intervals(interval_source(stem), 3600.0, 8)[-1] == (5.0, 5.0)
