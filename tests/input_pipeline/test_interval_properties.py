"""Properties of the reader of times: every written form gives its time back, options never leak, no text is slow."""

from __future__ import annotations

import string
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from input_pipeline.transforms.intervals import (
    TooManyIntervals,
    format_timestamp,
    interval_source,
    parse_intervals,
    parse_seconds,
)

LONG = 1e6  # s; no medium of these tests is longer
always_alike = settings(max_examples=300, deadline=None, derandomize=True)
milliseconds = st.integers(0, 100 * 3_600_000 - 1)  # below 100 h, HH


def written(millis: int) -> dict[str, tuple[str, int]]:
    """A time in every form: name -> (text, resolution in ms); the text is the time cut down to the resolution."""
    seconds, rest = divmod(millis, 1000)
    minutes, s = divmod(seconds, 60)
    h, m = divmod(minutes, 60)
    fraction = f"{rest:03d}"
    forms = {
        "HH:MM:SS": (f"{h:02d}:{m:02d}:{s:02d}", 1000),
        "H:MM:SS": (f"{h}:{m:02d}:{s:02d}", 1000),
        "HH:MM:SS.mmm": (f"{h:02d}:{m:02d}:{s:02d}.{fraction}", 1),
        "HH:MM:SS.m": (f"{h:02d}:{m:02d}:{s:02d}.{fraction[0]}", 100),
        "SubRip": (f"{h:02d}:{m:02d}:{s:02d},{fraction}", 1),
        "HH:MM:SSs": (f"{h:02d}:{m:02d}:{s:02d}s", 1000),
        "12s": (f"{seconds}s", 1000),
        "12.5s": (f"{seconds}.{fraction}s", 1),
        "12.5 seconds": (f"{seconds}.{fraction} seconds", 1),
        "1 second": (f"{seconds} second", 1000),
        "12 secs": (f"{seconds} secs", 1000),
        "2 minutes": (f"{minutes} minutes", 60_000),
        "2 mins": (f"{minutes} mins", 60_000),
        "1 minute and 5 seconds": (f"{minutes} minute and {s} seconds", 1000),
        "1 minute, 5 seconds": (f"{minutes} minute, {s} seconds", 1000),
        "1 min 5.5 sec": (f"{minutes} min {s}.{fraction} sec", 1),
        "1 hour": (f"{h} hour", 3_600_000),
        "1 hour and 2 minutes": (f"{h} hour and {m} minutes", 60_000),
        "1 hour, 2 minutes and 3 seconds": (f"{h} hour, {m} minutes and {s} seconds", 1000),
        "1h 2m 3s": (f"{h}h {m}m {s}s", 1000),
        "1h2m3.5s": (f"{h}h{m}m{s}.{fraction}s", 1),
        "1 hr 2 min": (f"{h} hr {m} min", 60_000),
        "2m 3s": (f"{minutes}m {s}s", 1000),
    }
    if minutes < 1000:
        forms |= {
            "MM:SS": (f"{minutes:02d}:{s:02d}", 1000),
            "M:SS": (f"{minutes}:{s:02d}", 1000),
            "MM:SS.mmm": (f"{minutes:02d}:{s:02d}.{fraction}", 1),
        }
    return forms


FORMS = sorted(written(0))


def cut(millis: int, resolution: int) -> float:
    return millis // resolution * resolution / 1000


@pytest.mark.parametrize("form", FORMS)
@always_alike
@given(millis=milliseconds)
@example(millis=0)
@example(millis=59_999)
@example(millis=3_599_999)
def test_a_written_time_reads_back(form, millis):
    forms = written(millis)
    if form not in forms:
        return
    text, resolution = forms[form]
    expected = pytest.approx(cut(millis, resolution), abs=1e-6)
    for each in (text, text.upper(), f" {text}\n"):
        assert parse_seconds(each) == expected
    for stem in (
        f"At {text}, what?",
        f"What is heard at {text}?",
        f"({text})",
        f"{text}: who?",
        f"Who?\n{text}.",
    ):
        ((start, end),) = parse_intervals(stem, LONG, 1)
        assert start == end == expected, stem


JOINERS = (
    "from {} to {}", "From {} until {}", "from {} till {}", "{} through {}", "between {} and {}", "Between {} and {}",
    "{} - {}", "{}-{}", "{}\u2013{}", "{} \u2014 {}", "{}~{}", "[{},{}]", "[ {} , {} ]", "[{}, {}]",
)  # fmt: skip


@always_alike
@given(
    first=milliseconds,
    second=milliseconds,
    joiner=st.sampled_from(JOINERS),
    forms=st.tuples(*[st.sampled_from(FORMS)] * 2),
)
def test_a_written_range_reads_back(first, second, joiner, forms):
    """All forms with all joiners; the two ends need not be written alike nor in order."""
    both = [
        written(millis).get(form, written(millis)["HH:MM:SS"])
        for millis, form in zip((first, second), forms, strict=True)
    ]
    spans = parse_intervals(f"What is heard {joiner.format(both[0][0], both[1][0])}?", LONG, 8)
    low, high = sorted(
        cut(millis, resolution) for millis, (_, resolution) in zip((first, second), both, strict=True)
    )
    assert spans == [pytest.approx((low, high), abs=1e-6)]


@always_alike
@given(low=st.integers(0, 500), high=st.integers(0, 500), joiner=st.sampled_from(JOINERS[:6] + JOINERS[6:11]))
def test_a_unit_behind_the_second_number_is_meant_for_both(low, high, joiner):
    for unit, seconds in (("seconds", 1), ("s", 1), (" minutes", 60), (" hours", 3600)):
        text = joiner.format(low, f"{high} {unit}")
        assert parse_intervals(text, LONG * 10, 2) == [
            (min(low, high) * seconds, max(low, high) * seconds)
        ], text


@always_alike
@given(
    times=st.lists(st.tuples(milliseconds, milliseconds), min_size=1, max_size=6),
    duration=st.integers(0, 400_000),
)
def test_spans_come_in_order_and_lie_within_the_media(times, duration):
    stem = " Then, ".join(
        f"from {format_timestamp(a / 1000)} to {format_timestamp(b / 1000)}" for a, b in times
    )
    spans = parse_intervals(stem, float(duration), len(times))
    for (a, b), (start, end) in zip(times, spans, strict=True):
        assert 0 <= start <= end <= duration
        assert (start, end) == pytest.approx([min(x / 1000, duration) for x in sorted((a, b))], abs=1e-6)
    with pytest.raises(TooManyIntervals, match=f"'clip-7' names {len(times)} times"):
        parse_intervals(stem, float(duration), len(times) - 1, "clip-7")


@always_alike
@given(length=st.integers(0, 1000), duration=st.integers(0, 1000))
def test_the_first_and_the_last_seconds(length, duration):
    shown = min(length, duration)
    assert parse_intervals(f"In the first {length} seconds?", duration, 1) == [(0, shown)]
    assert parse_intervals(f"In the last {length} seconds?", duration, 1) == [(duration - shown, duration)]


MARKERS = (
    "{A}. {}", "{A}: {}", "{A}) {}", "({A}) {}", "[{A}] {}", "({A}){}", "[{A}]{}", "{A}:{}", "{A}){}", "- {A}. {}",
    "* ({A}) {}", "**{A}.** {}", "{A} - {}", "{A} {}", "  {A}. {}", "Option {A}: {}",
    "option {A} {}", "Option {A}. {}", "({A}): {}",
)  # fmt: skip
NUMBERED = (
    "{A}. {}",
    "{A}: {}",
    "{A}) {}",
    "({A}) {}",
    "[{A}] {}",
    "({A}){}",
    "{A}){}",
    "- {A}. {}",
    "Option {A}: {}",
    " ({A}) {}",
)
INLINE = (
    "{A}. {}",
    "{A}: {}",
    "{A}) {}",
    "({A}) {}",
    "[{A}] {}",
    "({A}){}",
    "Option {A}: {}",
    "Option {A} {}",
)
stems = st.sampled_from(
    [
        "When does the bell ring after 00:00:30?",
        "After 30 seconds: when?",
        "What is heard from 00:30 on? Choose!",
    ]
)
ends = st.sampled_from(["", "\nAnswer with the letter.", "\n\nThe best answer is:"])


@always_alike
@given(
    stem=stems,
    end=ends,
    style=st.sampled_from(
        [("A", marker) for marker in MARKERS] + [("a", m) for m in MARKERS] + [("1", m) for m in NUMBERED]
    ),
    times=st.lists(st.tuples(milliseconds, milliseconds), min_size=1, max_size=6),
    form=st.sampled_from(["{} - {}", "from {} to {}", "{}", "[{}, {}]", "between {} and\n   {}"]),
)
def test_option_lines_never_leak(stem, end, style, times, form):
    first, marker = style
    if marker == "{A} {}" and not form.startswith("{"):
        return  # "A from ..." is how a sentence begins.
    options = [
        marker.format(form.format(*(format_timestamp(x / 1000) for x in pair)), A=chr(ord(first) + number))
        for number, pair in enumerate(times)
    ]
    source = interval_source(f"<video>\n{stem}\n" + "\n".join(options) + end)
    assert parse_intervals(source, LONG, 99) == [(30, 30)]
    assert source.startswith(stem) and source.removeprefix(stem).strip() == end.strip()


@always_alike
@given(
    stem=stems,
    style=st.sampled_from([(first, marker) for first in "Aa1" for marker in INLINE]),
    times=st.lists(milliseconds, min_size=2, max_size=6),
    between=st.sampled_from([" ", ", ", "; ", "  ", " or "]),
)
def test_options_within_a_line_never_leak(stem, style, times, between):
    first, marker = style
    options = [
        marker.format(format_timestamp(x / 1000), A=chr(ord(first) + number))
        for number, x in enumerate(times)
    ]
    source = interval_source(f"{stem} {between.join(options)}")
    assert parse_intervals(source, LONG, 99) == [(30, 30)]
    assert source.startswith(stem[:-1])


@pytest.mark.parametrize(
    "stem",
    [
        "A bell rings at 00:05.",
        "A 10-second clip; what is heard at 00:05?",
        "10:03 is shown; what is heard at 00:05?",
        "5.5 s is not it, 00:05",
        "[3 s, 4 s] and 00:05",
        "I - or you - hear it at 00:05.",
        "In the scenes (left 1) and (right 2), what is heard at 00:05?",
        "Version 1.1 and 2.2 at 00:05?",
        "He counts to 1 and 2 at 00:05.",
        "Is it vitamin A or B at 00:05?",
    ],
)
def test_stems_that_look_like_options_keep_their_times(stem):
    assert (5.0, 5.0) in parse_intervals(interval_source(stem), LONG, 8)


WORDS = (
    "the",
    "bell",
    "rings",
    "A",
    "3",
    "men",
    "12",
    "m",
    "tall",
    "1984",
    "B-flat",
    "pm",
    "No.",
    "7",
    "4K",
    "s",
    "seconds",
    "h",
)
NO_UNITS = tuple(word for word in WORDS if word not in ("s", "seconds", "h"))


@always_alike
@given(words=st.lists(st.sampled_from(NO_UNITS), max_size=12))
def test_texts_without_times_give_none(words):
    assert parse_intervals(" ".join(words), LONG, 8) == []


@always_alike
@given(
    text=st.text(
        st.characters(exclude_characters=string.digits, exclude_categories=["Cs", "Nd"]), max_size=60
    )
)
def test_texts_without_digits_give_none(text):
    assert parse_intervals(interval_source(text), LONG, 0) == []


TIMELIKE = (
    *"0159:.,-~[]()ABab sShHmM\n\t\u00a0\u2013\u017f\u212a\u0663\u00b2", "00:05", "12s", "1h", " and ", "between ",
    "from ", " to ", "first ", "last ", "for ", " minutes", " seconds", "Option 1", "A. ", "(B) ",
    "1" * 400, "<video>", "\u2028", "pm", ",250",
)  # fmt: skip


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    text=st.one_of(st.text(max_size=80), st.lists(st.sampled_from(TIMELIKE), max_size=25).map("".join)),
    duration=st.floats(0, 1e6),
)
@example(text="12\u017f 00:05\u017f 5 to 7 \u017fec", duration=9.0)  # to IGNORECASE a long s is an s
@example(text="1" * 400 + " hours, the last " + "1" * 400 + "s", duration=9.0)
def test_no_text_raises_anything_but_too_many(text, duration):
    spans = parse_intervals(interval_source(text), duration, 10_000)
    assert all(0 <= start <= end <= duration for start, end in spans)
    if spans:
        with pytest.raises(TooManyIntervals):
            parse_intervals(interval_source(text), duration, len(spans) - 1)


PATTERNS = (
    "1", "1 ", "1:", "00:", " ", "\n", " \n", "\t", "-", "[ ", "1s , ", "1h ", "5 to ", "1 and ", "between ",
    "between 5 and ", "first ", "for about ", "during those ", "1s - ", "1.", "1.1 ", "1 hours and ", "1234:56 ",
    "12:30 a", "5-secon ", "1m1m", "x A. ", "x (A) ", "x. 1. ", "x? a. ", "? ", "x option ", "(A", "*", "option ",
    "x:", "A.",
)  # fmt: skip
HEADS = (
    "1h", "1", "12:30", "[1s", "between", "first", "during", "for", "x?", "A.", "option", "x A. ", "1 hour ,", "1s",
)  # fmt: skip


def seconds_of(text: str) -> float:
    """What reading a text costs of this thread's own time; a busy machine changes little about it."""
    start = time.thread_time()
    interval_source(text)
    parse_intervals(text, 100.0, 10**6)
    return time.thread_time() - start


def test_no_text_takes_quadratic_time():
    """10 kB of every pattern behind every head take 40 ms at most, a second where the rest is scanned at each place."""
    for head, pattern in [("", each) for each in PATTERNS] + [
        (h, p) for h in HEADS for p in (" ", "*", "1", ", ")
    ]:
        assert seconds_of(head + pattern * (10_000 // len(pattern)) + "x") < 0.4, (head, pattern)


@pytest.mark.parametrize(
    ("head", "pattern"), [("1h", " "), ("", "\n"), ("", " \n"), ("", "x A. "), ("", "1h ")]
)
def test_a_line_of_100_kb_takes_less_than_a_second(head, pattern):
    """With the patterns that were the slowest: minutes, as long as two \\s* shared a run of blanks."""
    assert seconds_of(head + pattern * (100_000 // len(pattern)) + "x") < 1


@always_alike
@given(millis=milliseconds)
def test_timestamps_round_trip(millis):
    text = format_timestamp(millis / 1000)
    assert round(parse_seconds(text) * 1000) == millis
    assert format_timestamp(parse_seconds(text)) == text
    hours, minutes, seconds = text.split(":")
    assert len(hours) == len(minutes) == 2 and len(seconds) == 6 and int(minutes) < 60 and float(seconds) < 60


@always_alike
@given(seconds=st.floats(0, 359_999))
def test_timestamps_are_the_nearest(seconds):
    assert abs(parse_seconds(format_timestamp(seconds)) - seconds) <= 0.0005 + 1e-6


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "00:00:00.000"),
        (5.25, "00:00:05.250"),
        (59.9996, "00:01:00.000"),
        (59.9994, "00:00:59.999"),
        (3599.9996, "01:00:00.000"),
        (86_400, "24:00:00.000"),
        (360_000, "100:00:00.000"),
    ],
)
def test_timestamps_carry(seconds, expected):
    assert format_timestamp(seconds) == expected


@pytest.mark.parametrize("seconds", [-0.001, float("nan"), float("inf")])
def test_no_timestamp_for_what_is_no_time(seconds):
    with pytest.raises(ValueError, match="no time from the beginning"):
        format_timestamp(seconds)
