"""Chat templates: which pieces of text, control tokens and media follow each other, and which are to be learnt."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

_LEADING_NEWLINES = re.compile(r"\s*[\r\n]")


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text: can never become a control token.

    Attributes:
        continues: goes on with the text ahead of it, if one stands there. It then gets no blank of the tokenizer's
            own, and the two are tokenised as one, except that a target always begins with a token of its own.
    """

    value: str
    target: bool = False
    continues: bool = False


@dataclasses.dataclass(frozen=True)
class Control:
    """A control token by its name in the tokenizer, e.g. "<|im_end|>"."""

    name: str
    target: bool = False


@dataclasses.dataclass(frozen=True)
class Begin:
    """What the tokenizer puts ahead of a whole text, its bos_token: "<s>" with LLaMA, nothing with Qwen2.

    It is no part of the text: a tokenizer that adds a blank to the beginning of a text adds it behind this token.
    """


@dataclasses.dataclass(frozen=True)
class Media:
    """The place of the media tokens."""


Piece = Text | Control | Begin | Media


@dataclasses.dataclass(frozen=True)
class Round:
    """One question and its answer; `answer` is None where the model is to speak."""

    question: tuple[Text | Media, ...]
    answer: str | None


class Template(Protocol):
    """How rounds are laid out. Between two rounds stands a control token.

    Attributes:
        end_of_turn: the token at which generation stops, see `end_of_turn_id`.
        keeps_questions: False if the text of questions is left out; it may then be empty.
    """

    @property
    def end_of_turn(self) -> str: ...

    @property
    def keeps_questions(self) -> bool: ...

    def unsuited(self, system: str | None, rounds: Sequence[Round]) -> str | None:
        """Why a conversation cannot be laid out so, in words for its author; None if it can."""
        ...

    def opening(self, system: str | None) -> list[Piece]:
        """What stands ahead of the first round; `system` replaces the template's own system text."""
        ...

    def round(self, turns: Round) -> list[Piece]:
        """One round; with an open answer it ends where the answer's first token belongs."""
        ...


@dataclasses.dataclass(frozen=True)
class ChatMLTemplate:
    """Qwen2's ChatML: "<|im_start|>role\\ncontent<|im_end|>\\n".

    Learnt are the answer, its <|im_end|> and the newline behind it, as in DAMO-NLP-SG/VideoLLaMA2. The
    newline is harmless (generation stops at <|im_end|>) and keeps the losses comparable with theirs.

    Attributes:
        system: default system text (Qwen2's own); empty for no system turn at all.
    """

    system: str = "You are a helpful assistant."
    end_of_turn: ClassVar[str] = "<|im_end|>"
    keeps_questions: ClassVar[bool] = True

    def unsuited(self, system: str | None, rounds: Sequence[Round]) -> str | None:
        return None

    def opening(self, system: str | None) -> list[Piece]:
        text = self.system if system is None else system
        return self._turn("system", [Text(text)]) if text else []

    def round(self, turns: Round) -> list[Piece]:
        pieces = self._turn("user", turns.question)
        if turns.answer is None:
            return [*pieces, Control("<|im_start|>"), Text("assistant\n")]
        answer = self._turn("assistant", [Text(turns.answer, target=True)])
        return [*pieces, *answer[:-2], Control(self.end_of_turn, target=True), Text("\n", target=True)]

    @staticmethod
    def _turn(role: str, content: Sequence[Piece]) -> list[Piece]:
        head, body = f"{role}\n", list(content)
        if body and isinstance(body[0], Text) and not body[0].target:
            # Qwen2's tokenizer joins newlines into one token, the header's with those that the text begins with. An
            # answer's stay apart: generation begins behind the header.
            text = body[0].value
            length = leading.end() if (leading := _LEADING_NEWLINES.match(text)) else 0
            head, body[0] = head + text[:length], Text(text[length:])
        return [Control("<|im_start|>"), Text(head), *body, Control("<|im_end|>"), Text("\n")]


@dataclasses.dataclass(frozen=True)
class VicunaTemplate:
    """Vicuna v1: "<s>system USER: question ASSISTANT: answer</s>USER: ..." (FastChat's vicuna_v1.1, LLaVA's v1).

    Learnt are the answer and its </s>. The blank behind "ASSISTANT:" belongs to the answer's first token, so a
    prompt ends with the colon. Roles are plain words here: an answer may hold "ASSISTANT: " (the mask does not
    go by the text), but what a user types can look like a turn of its own, as everywhere with this format.

    Attributes:
        system: default system text (FastChat's); empty for none, and then no blank ahead of "USER:" either.
    """

    system: str = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    end_of_turn: ClassVar[str] = "</s>"
    keeps_questions: ClassVar[bool] = True

    def unsuited(self, system: str | None, rounds: Sequence[Round]) -> str | None:
        return None

    def opening(self, system: str | None) -> list[Piece]:
        text = self.system if system is None else system
        return [Begin(), Text(f"{text} ")] if text else [Begin()]

    def round(self, turns: Round) -> list[Piece]:
        pieces: list[Piece] = [Text("USER: "), *turns.question, Text(" ASSISTANT:")]
        if turns.answer is not None:
            pieces += [Text(f" {turns.answer}", target=True), Control(self.end_of_turn, target=True)]
        return [dataclasses.replace(x, continues=True) if isinstance(x, Text) else x for x in pieces]


@dataclasses.dataclass(frozen=True)
class PlainTemplate:
    """LLaVA's "plain", for alignment on captions: media, caption, newline; no roles, no system text.

    Learnt are the caption and the newline, as in LLaVA: the newline is what ends a caption, without it generation
    would never stop. It is always a token of its own (Qwen2's tokenizer would join it with a full stop), so
    generation can stop at it; of a caption with several lines, all of which are learnt, it gives the first.

    Attributes:
        drop_question: leave out the text of questions, as LLaVA does. The question of LCS-558K's samples is one
            of a few instructions ("Write a terse but informative summary of the picture."), which alignment does
            without. By default such a sample is refused, lest questions that matter be lost; those left out
            are counted (`EncodedText.dropped_questions`).
    """

    drop_question: bool = False
    end_of_turn: ClassVar[str] = "\n"
    keeps_questions: ClassVar[bool] = False

    def unsuited(self, system: str | None, rounds: Sequence[Round]) -> str | None:
        if len(rounds) != 1:
            return f"text.template 'plain' holds one caption, but the conversation has {len(rounds)} rounds"
        if Media() not in rounds[0].question:
            return "text.template 'plain' is for captions of media, but the sample has no media"
        if system:
            return f"text.template 'plain' has no place for the system text {system[:80]!r}"
        if has_words(rounds[0]) and not self.drop_question:
            return (
                "text.template 'plain' leaves out the question's text; take the text away from beside the "
                "placeholder, or set drop_question=True in text.template_options if it is a mere instruction to describe"
            )
        return None

    def opening(self, system: str | None) -> list[Piece]:
        return [Begin()]

    def round(self, turns: Round) -> list[Piece]:
        if turns.answer is None:
            return [Media()]
        return [Media(), Text(turns.answer, target=True), Text(self.end_of_turn, target=True, continues=True)]


def has_words(turns: Round) -> bool:
    """Whether a question has text beside the media."""
    return any(isinstance(piece, Text) and piece.value.strip() for piece in turns.question)


# By its name in config.text.template.
TEMPLATES: Mapping[str, type[ChatMLTemplate] | type[VicunaTemplate] | type[PlainTemplate]] = {
    "chatml": ChatMLTemplate,
    "vicuna": VicunaTemplate,
    "plain": PlainTemplate,
}
