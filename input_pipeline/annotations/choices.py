"""Multiple-choice questions: Video-MME's prompt, and the texts of options without their letters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from input_pipeline.annotations.rows import RowError

LETTERS = "ABCD"  # Those of the instruction.
# The wording of the benchmark (Video-MME's README, "Evaluation pipeline"); another one would be another protocol.
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
CLOSING = "The best answer is:"
_LETTERED = re.compile(r"\(?([A-Z])[.:)]\s*(.*)", re.DOTALL)


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """The question as Video-MME puts it.

    Args:
        question: its stem.
        options: the four texts, without letters.
    """
    lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([INSTRUCTION, question, *lettered, CLOSING])


def option_texts(options: Any) -> list[str]:
    """Options as they stand, without blanks around them; RowError if they are no list of four texts."""
    if not isinstance(options, list) or len(options) != len(LETTERS):
        raise RowError(f"its options are {str(options)[:80]!r}; a list of four texts is expected")
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise RowError("one of its options is no text")
    return [option.strip() for option in options]


def without_letters(options: Any) -> list[str]:
    """The texts of options that are written "A. ...", "B. ...", ...

    Raises:
        RowError: see `option_texts`; or they are lettered otherwise.
    """
    matches = [_LETTERED.fullmatch(option) for option in option_texts(options)]
    letters = "".join(match[1] if match else "-" for match in matches)
    if letters != LETTERS:
        raise RowError(f"its options are lettered {letters}, not {LETTERS}")
    return option_texts([match[2] for match in matches if match])


def answer_letter(answer: Any) -> str:
    """The letter; RowError if it is none."""
    if not isinstance(answer, str) or len(answer.strip()) != 1 or answer.strip() not in LETTERS:
        raise RowError(f"its answer is {answer!r}; a letter of {LETTERS} is expected")
    return answer.strip()
