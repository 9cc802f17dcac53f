"""The times a question names: from its wording to spans in seconds.

Only the stem of a question is read. Options may hold times too (SAVEn-Vid's fifth question type asks for a
range), and a model told those would be told the answer.
"""

from __future__ import annotations

import math
import re
import unicodedata

from input_pipeline.conversation import PLACEHOLDERS
from input_pipeline.errors import UserError

# A clock reading: HH:MM:SS or MM:SS, each with an optional fraction. SubRip's comma counts as a decimal point
# only in the full form and with three digits, so that "[00:00:01,00:00:13]" stays a pair.
_CLOCK = (
    r"(?<![\d:.])(?:\d{1,3}:[0-5]?\d:[0-5]\d(?:\.\d+|,\d{3}(?!\d|:\d))?|\d{1,3}:[0-5]\d(?:\.\d+)?)"
    r"(?:s\b)?(?!\d|[:.]\d)(?!\s*[ap]\.?m\b)"
)
_NUMBER = r"\d+(?:\.\d+)?"
_HOURS, _MINUTES = r"\s*(?:hours?|hrs?|h)\b", r"\s*(?:minutes?|mins?)\b"
_SECONDS = r"\s*(?:seconds?|secs?|s)\b"
_NEXT = r"(?:(?:\s*,)?\s*(?:and\s+)?)"  # One run of blanks is never split between two \s*: that takes quadratic time.
# Amounts with units, also composed: "12s", "12.5 seconds", "2 minutes", "1 minute and 5 seconds", "1h 2m 3s".
# A lone "m" is left out (it is mostly metres).
_AMOUNT = (
    rf"(?<![\w.:\u2044])(?:{_NUMBER}\s*(?:h|m|h\s*\d+\s*m)\s*{_NUMBER}\s*s\b"
    rf"|{_NUMBER}{_HOURS}(?:{_NEXT}{_NUMBER}{_MINUTES})?(?:{_NEXT}{_NUMBER}{_SECONDS})?"
    rf"|{_NUMBER}{_MINUTES}(?:{_NEXT}{_NUMBER}{_SECONDS})?"
    rf"|{_NUMBER}{_SECONDS})"
)
_TIME = rf"(?:{_CLOCK}|{_AMOUNT})"
_DASH = r"[-\u2010-\u2015~]"  # hyphen, en dash, em dash and their kin
_JOINED = rf"(?:\s*{_DASH}\s*|\s+to\s+|\s+until\s+|\s+till\s+|\s+through\s+)"
# A number whose unit stands behind its partner only: "from 5 to 10 seconds".
_BARE = rf"(?<![\w.:\u2044]){_NUMBER}"

_SPAN = re.compile(
    rf"""
      \[\s*(?P<b0>{_TIME})\s*,\s*(?P<b1>{_TIME})\s*\]                                  # [00:00:01,00:00:13]
    | \bbetween\s+(?P<w0>{_TIME})\s+and\s+(?P<w1>{_TIME})                               # between X and Y
    | \bbetween\s+(?P<u0>{_BARE})\s+and\s+(?P<u1>{_AMOUNT})                             # between 5 and 10 s
    | (?P<j0>{_TIME}){_JOINED}(?P<j1>{_TIME})                                          # from X to Y, X - Y
    | (?P<k0>{_BARE}){_JOINED}(?P<k1>{_AMOUNT})                                        # from 5 to 10 seconds
    | \b(?:first|opening)\s+(?P<first>{_AMOUNT})                                       # the first 10 seconds
    | \b(?:last|final|closing)\s+(?P<last>{_AMOUNT})                                   # the last 10 seconds
    | (?:\b(?:for|lasts|lasting|lasted|every|during\s+those)\s+(?:about\s+)?{_AMOUNT}  # a length alone
        | {_AMOUNT}\s*(?:-\s*)?(?:long\b|clip\b|video\b|audio\b|recording\b|later\b|earlier\b|apart\b)
        | \b\d+(?:\.\d+)?-(?:second|minute|hour)\b)
    | (?P<at>{_TIME})                                                                  # at X
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Circled numbers and letters, black circles too, as if they stood in brackets; the ideographic comma as a comma.
# The rest of Unicode's other forms, such as full-width colons and digits, is NFKC's.
_MARKS = {0x2460 + i: f"({i + 1})" for i in range(20)} | {0x2776 + i: f"({i % 10 + 1})" for i in range(30)}
_MARKS |= {0x24B6 + i: f"({chr(65 + i % 26)})" for i in range(52)} | {0x3001: ","}
_UNIT_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}

# An option line: "A: ...", "A. ...", "A) ...", "(A) ...", "[A] ...", "A - ...", "A 00:01", "A, 00:01", "**A.** ...",
# "Option 1: ...", "1. ...", "1) ...", "(ii) ...", with a bullet or without; "10:05 is shown" and "5.5 s later" are none.
_BULLET = r"[\s*\u2022>-]*"
_ROMAN = r"[ivx]{1,4}"
_BEHIND = r"[*:.]*(?=\s|$|[\d(\[\"'])"
_OPTION_LINE = re.compile(
    rf"{_BULLET}(?:(?:option\s+)?(?:(?:[A-J]|{_ROMAN})[.:]|[1-9]\d?[.:](?!\d)){_BEHIND}"
    rf"|[(\[](?:[A-J]|[1-9]\d?|{_ROMAN})[)\]]|(?:[A-J]|[1-9]\d?|{_ROMAN})\)|option\s+\w+\b"
    r"|[A-H](?:\s+(?:[-\u2013\u2014]\s|\d+:\d)|,\s*\d))",
    re.IGNORECASE,
)
# Options within a line: the marker of the first and that of the second. "a)", "1)" and "1." are words as well, hence
# the first of them must stand behind a punctuation mark.
_STOP = r"(?:^|[?.!:;,]\s|\n)[^\S\n]*"
_INLINE = (
    (
        re.compile(
            rf"(?<!\w)(?:[(\[][AaIi][)\]]|A(?:[).:]{_BEHIND}|,\s*(?=\d)))|{_STOP}[aiI][).:]{_BEHIND}"
            r"|\b[Oo]ption\s+[Aa]\b"
        ),
        re.compile(
            rf"(?<!\w)(?:[(\[](?:[Bb]|ii|II)[)\]]|(?:[Bb]|ii|II)(?:[).:]{_BEHIND}|,\s*(?=\d)))"
            r"|\b[Oo]ption\s+[Bb]\b"
        ),
    ),
    (
        re.compile(rf"(?<!\w)[(\[]1[)\]]|{_STOP}1(?:\)|[.:](?!\d)){_BEHIND}|\b[Oo]ption\s+1\b"),
        re.compile(rf"(?<!\w)[(\[]2[)\]]|(?<![\w.:])2(?:\)|[.:](?!\d)){_BEHIND}|\b[Oo]ption\s+2\b"),
    ),
)


class TooManyIntervals(UserError):
    """A question names more times than the batch has slots for."""


def interval_source(text: str) -> str:
    """The part of a human turn in which times may be looked for: its stem, without options and placeholders.

    Lines between the first and the last option belong to the options, as do indented lines behind the last; other
    lines behind them belong to the stem. A wrong guess costs the stem's times rather than tells the options'. Options
    marked in yet another way, or not at all, are not told from the stem. What is returned is in Unicode's NFKC.

    >>> interval_source("<video>\\nWhen does the bell ring?\\nA: 00:01 - 00:03\\nB: 00:05 - 00:07")
    'When does the bell ring?'
    """
    text = unicodedata.normalize("NFKC", text.translate(_MARKS))
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, " ")
    lines = text.splitlines()
    options = [number for number, line in enumerate(lines) if _OPTION_LINE.match(line)]
    if options:  # All from the first to the last, and the indented lines that go on with the last.
        end = options[-1] + 1
        while end < len(lines) and lines[end][:1].isspace():
            end += 1
        del lines[options[0] : end]
    stem = "\n".join(lines)
    for first, second in _INLINE:
        if (found := first.search(stem)) and second.search(stem, found.end()):
            stem = stem[: found.start()]
    return stem.strip()


def format_timestamp(seconds: float) -> str:
    """HH:MM:SS.mmm, the form printed in SAVEn-Vid's captions and questions (paper, supplementary figures).

    >>> format_timestamp(59.9996)
    '00:01:00.000'

    Raises:
        ValueError: `seconds` is negative or not finite.
    """
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds!r} is no time from the beginning of a medium in seconds")
    millis = round(seconds * 1000)
    hours, rest = divmod(millis, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}.{rest % 1000:03d}"


def parse_seconds(text: str) -> float:
    """Seconds of one time expression: "01:02:03.5", "02:03", "12s", "12.5 seconds", "1 minute and 5 seconds".

    Raises:
        ValueError: `text` is not such an expression.
    """
    text = text.strip()
    if re.fullmatch(_CLOCK, text, re.IGNORECASE):
        seconds = 0.0
        for part in text.casefold().removesuffix("s").replace(",", ".").split(":"):
            seconds = seconds * 60 + float(part)
        return seconds
    if not re.fullmatch(_AMOUNT, text, re.IGNORECASE):
        raise ValueError(f"{text!r} is not a time such as 01:02:03.5, 02:03, 12s or 2 minutes")
    return _amount(text)


def _amount(text: str) -> float:
    # casefold: to IGNORECASE a long s (U+017F) is an s.
    parts = re.findall(rf"({_NUMBER})\s*([hms])", text, re.IGNORECASE)
    return sum(float(number) * _UNIT_SECONDS[unit.casefold()] for number, unit in parts)


def _pair(start: str, end: str) -> tuple[float, float]:
    if re.fullmatch(_NUMBER, start):  # "5 to 10 seconds": the unit of the end is meant for both.
        start += next(filter(str.isalpha, end))
        return _amount(start), parse_seconds(end)
    return parse_seconds(start), parse_seconds(end)


def parse_intervals(
    stem: str, duration: float, max_intervals: int, sample_id: str = ""
) -> list[tuple[float, float]]:
    """The spans of time that `stem` names, in order of appearance.

    Understood are HH:MM:SS(.mmm), MM:SS(.mmm), "12s", "12.5 seconds", "2 minutes", and between two of them
    "from X to Y", "between X and Y", "X - Y", "[X,Y]"; "the first (last) 10 seconds". A time alone ("at X")
    gives (X, X). Lengths ("for 5 seconds", "a 10-second clip") are no times.

    Args:
        stem: text of a question without its options, see `interval_source`.
        duration: seconds of the media; times beyond it are moved to it. 0 for an image.
        max_intervals: slots of the batch (`MediaSpec.max_intervals`).
        sample_id: named in the error.

    Returns:
        (start, end) in seconds, 0 <= start <= end <= duration. Empty when no time is named: the caller then
        takes the whole media, (0, duration).

    Raises:
        TooManyIntervals: more than `max_intervals` are named. Nothing is cut silently.
    """
    found = []
    for match in _SPAN.finditer(stem):
        groups = {name: value for name, value in match.groupdict().items() if value is not None}
        if not groups:
            continue
        if "at" in groups:
            start = end = parse_seconds(groups["at"])
        elif "first" in groups:
            start, end = 0.0, parse_seconds(groups["first"])
        elif "last" in groups:
            start, end = duration - parse_seconds(groups["last"]), duration
        else:
            start, end = _pair(*groups.values())
        if start > end:
            start, end = end, start
        found.append((min(max(start, 0.0), duration), min(max(end, 0.0), duration)))
    if len(found) > max_intervals:
        raise TooManyIntervals(
            f"sample {sample_id!r} names {len(found)} times in its questions but the batch holds "
            f"{max_intervals}; raise media.max_intervals to {len(found)} or split the sample"
        )
    return found
