"""From a conversation to token ids and a label mask.

Ids are built segment by segment: a template says which pieces of text, control tokens and media tokens follow
each other and which are to be learnt; each piece becomes ids on its own. Nothing is tokenised twice, so no
mask can slip, and text written by others can never turn into a control token.

Media cut the text. What stands between two of them has the ids that the tokenizer gives it alone, as in LLaVA's
`tokenizer_image_token`; this matters for LLaMA's tokenizers, which begin every text with a blank ("\u2581").
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.templates import (
    TEMPLATES,
    Begin,
    ChatMLTemplate,
    Control,
    Media,
    Piece,
    PlainTemplate,
    Round,
    Template,
    Text,
    VicunaTemplate,
    has_words,
)
from input_pipeline.tokenizer import (
    MEDIA_TOKEN,
    ControlTokenError,
    Place,
    control_id,
    encode_text,
    find_media_token_id,
    load_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Also the names of templates.py and tokenizer.py that go with a conversation: other packages take them from here.
__all__ = [
    "MEDIA_TOKEN",
    "PLACEHOLDERS",
    "TEMPLATES",
    "Begin",
    "ChatMLTemplate",
    "Control",
    "ControlTokenError",
    "ConversationError",
    "DoesNotFit",
    "EncodedText",
    "Media",
    "Piece",
    "PlainTemplate",
    "Round",
    "Template",
    "Text",
    "TokenPlan",
    "VicunaTemplate",
    "encode_conversation",
    "encode_prompt",
    "encode_text",
    "end_of_turn_id",
    "find_media_token_id",
    "load_tokenizer",
    "split_rounds",
]

PLACEHOLDERS = ("<video>", "<image>", "<audio>")  # All mean the same: the media tokens go here.
_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS)))
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class ConversationError(UserError):
    """A sample's conversation is none (order of roles, no question, several placeholders) or does not suit the template."""


@dataclasses.dataclass(frozen=True)
class TokenPlan:
    """What a sample asks of the model, in counts.

    Attributes:
        frames, audio_windows: media given to the encoders.
        time_tokens: two per interval, its start and its end (SAVEn-Vid's architecture figure).
        media_tokens: length of the run of media tokens in the prompt.
        text_tokens: all other tokens of the prompt (and, in training, of the answers).
        limit: the text length l of the batch.
    """

    frames: int
    audio_windows: int
    time_tokens: int
    media_tokens: int
    text_tokens: int
    limit: int

    @property
    def total(self) -> int:
        return self.media_tokens + self.text_tokens

    def __str__(self) -> str:
        return (
            f"{self.frames} frames + {self.audio_windows} audio windows + {self.time_tokens} time tokens "
            f"-> {self.media_tokens} media tokens; {self.media_tokens} media + {self.text_tokens} text "
            f"= {self.total} tokens of at most {self.limit}"
        )


class DoesNotFit(UserError):
    """Media and first round (or prompt) are longer than the limit. Media are never cut."""

    def __init__(self, sample_id: str, plan: TokenPlan):
        self.sample_id, self.plan = sample_id, plan
        super().__init__(
            f"sample {sample_id!r} does not fit: {plan}. Raise the text length (text.max_length, or the stage's "
            f"max_length) to at least {plan.total}, ask for fewer frames or media tokens, or shorten the text"
        )

    def __reduce__(self) -> tuple[type[DoesNotFit], tuple[str, TokenPlan]]:
        return type(self), (self.sample_id, self.plan)  # Worker processes hand it over pickled.


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """Ids of one sample, not padded.

    Attributes:
        tokens: i32 [l'].
        loss_mask: bool [l']; True at j means token j is a target, predicted from position j - 1.
        rounds: question-answer rounds that were kept.
        dropped_rounds: rounds dropped from the end because they did not fit.
        dropped_questions: kept rounds whose question has text that the template leaves out (`PlainTemplate`).
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    rounds: int
    dropped_rounds: int = 0
    dropped_questions: int = 0


def split_rounds(
    turns: Sequence[Mapping[str, str]],
    *,
    has_media: bool,
    sample_id: str = "",
    empty_questions: bool = False,
) -> tuple[str | None, list[Round]]:
    """Checks a conversation and cuts it into rounds; puts the media where the placeholder stands.

    Args:
        turns: [{"from": "human" | "gpt", "value": text}, ...], the two alternating, human first; a first turn
            "system" gives the system text. "user" and "assistant" are accepted too. The last answer may be
            missing. A turn with {"verbatim": True} is what somebody typed: a placeholder in it is text.
        has_media: whether media tokens belong into the first question; without a placeholder they go in front
            of it.
        sample_id: named in errors.
        empty_questions: whether a question may have no text.

    Returns:
        The sample's system text (None if it has none) and its rounds.

    Raises:
        ConversationError: roles out of order, an empty question or answer, more than one placeholder, one
            outside the first question, or one in a sample without media.
    """

    def refuse(what: str) -> ConversationError:
        return ConversationError(f"sample {sample_id!r}: {what}")

    roles, values = [], []
    for number, turn in enumerate(turns):
        role = _ROLES.get(turn.get("from", ""))
        if role is None:
            raise refuse(f"turn {number} is from {turn.get('from')!r}; use 'human' or 'gpt'")
        if not isinstance(turn.get("value"), str):
            raise refuse(f"turn {number} has no text under 'value'")
        roles.append(role)
        values.append(turn["value"])
    system = None
    if roles[:1] == ["system"]:
        system, roles, values = values[0], roles[1:], values[1:]
    if not roles:
        raise refuse("its conversation has no turn; such media can be asked about but not trained on")
    for number, role in enumerate(roles):
        if role != ("human", "gpt")[number % 2]:
            raise refuse(f"turns must alternate 'human', 'gpt', ... but turn {number} is from {role!r}")

    rounds = []
    for first in range(0, len(values), 2):
        answer = values[first + 1] if first + 1 < len(values) else None
        if answer is not None and not answer.strip():
            raise refuse(f"answer {first // 2} is empty")
        typed = bool(turns[first + len(turns) - len(values)].get("verbatim"))
        rounds.append(Round(_question(values[first], first == 0, has_media, typed, refuse), answer))
        if not (empty_questions or has_words(rounds[-1])):
            raise refuse("a question is empty")
    return system, rounds


def _question(
    text: str, is_first: bool, has_media: bool, verbatim: bool, refuse: Any
) -> tuple[Text | Media, ...]:
    found = [] if verbatim else list(_PLACEHOLDER.finditer(text))
    if len(found) > 1:
        raise refuse(f"{len(found)} media placeholders in one question; keep one")
    if found and not is_first:
        raise refuse(f"the placeholder {found[0].group()} stands in a later question; move it to the first")
    if found and not has_media:
        raise refuse(f"the placeholder {found[0].group()} stands in its text but the sample has no media")
    if not (is_first and has_media):
        return (Text(text),)
    if not found:
        return (Media(), Text("\n" + text))  # The usual form: placeholder, newline, question.
    before, after = text[: found[0].start()], text[found[0].end() :]
    return tuple(piece for piece in (Text(before), Media(), Text(after)) if piece != Text(""))


@dataclasses.dataclass(frozen=True)
class _PieceEncoder:
    tokenizer: PreTrainedTokenizerFast
    num_media_tokens: int
    media_token_id: int
    sample_id: str

    def __call__(self, pieces: Iterable[Piece], place: Place) -> tuple[list[int], list[bool]]:
        """Ids and mask of pieces of which the first stands at `place`."""
        ids: list[int] = []
        mask: list[bool] = []
        for piece in _joined(pieces):
            target = getattr(piece, "target", False)
            if isinstance(piece, Text):
                where = "apart" if place == "inside" and not piece.continues else place
                new = encode_text(self.tokenizer, piece.value, self.media_token_id, self.sample_id, where)
                place = "inside" if piece.value else place
            elif isinstance(piece, Control):
                new, place = [control_id(self.tokenizer, piece.name)], "behind_control"
            elif isinstance(piece, Media):
                new, place = [self.media_token_id] * self.num_media_tokens, "apart"
            else:
                begin = self.tokenizer.bos_token_id
                new, place = [] if begin is None else [begin], "apart"
            ids += new
            mask += [target] * len(new)
        return ids, mask


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """`pieces` with every context that continues a context made one with it."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, Text) and piece.continues and not piece.target:
            if isinstance(last, Text) and not last.target:
                found[-1] = dataclasses.replace(last, value=last.value + piece.value)
                continue
        found.append(piece)
    return found


def _lay_out(
    template: Template,
    turns: Sequence[Mapping[str, str]],
    system: str | None,
    encoder: _PieceEncoder,
    open_answer: bool = False,
) -> tuple[list[Round], list[list[Piece]]]:
    """Rounds and the pieces of each; the first one's begin with the template's opening."""
    own_system, rounds = split_rounds(
        turns,
        has_media=encoder.num_media_tokens > 0,
        sample_id=encoder.sample_id,
        empty_questions=not template.keeps_questions,
    )
    if open_answer:
        rounds[-1] = dataclasses.replace(rounds[-1], answer=None)
    system = system if own_system is None else own_system
    if fault := template.unsuited(system, rounds):
        raise ConversationError(f"sample {encoder.sample_id!r}: {fault}")
    pieces = [template.round(one) for one in rounds]
    pieces[0] = template.opening(system) + pieces[0]
    return rounds, pieces


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Mapping[str, str]],
    *,
    num_media_tokens: int,
    media_token_id: int,
    max_length: int,
    template: Template | None = None,
    system: str | None = None,
    sample_id: str = "",
) -> EncodedText:
    """Ids and label mask of a whole conversation, for training.

    Args:
        tokenizer: of the language model.
        turns: see `split_rounds`; the last one must be an answer.
        num_media_tokens: length of the run of media tokens; 0 for a sample without media.
        media_token_id: see `find_media_token_id`.
        max_length: l. Whole rounds are dropped from the end until the rest fits.
        template: default ChatML.
        system: system text instead of the template's; the sample's own goes first.
        sample_id: named in errors.

    Raises:
        DoesNotFit: media and first round alone are longer than `max_length`.
        ConversationError, ControlTokenError: see `split_rounds`, `encode_text`.
    """
    template = template or ChatMLTemplate()
    encode = _PieceEncoder(tokenizer, num_media_tokens, media_token_id, sample_id)
    rounds, pieces = _lay_out(template, turns, system, encode)
    if rounds[-1].answer is None:
        raise ConversationError(f"sample {sample_id!r}: the last question has no answer to learn")
    ids: list[int] = []
    mask: list[bool] = []
    kept = 0
    for pieces_of_round in pieces:
        new_ids, new_mask = encode(pieces_of_round, "behind_control" if kept else "apart")
        if len(ids) + len(new_ids) > max_length:
            if kept == 0:
                text_tokens = len(new_ids) - num_media_tokens
                raise DoesNotFit(sample_id, TokenPlan(0, 0, 0, num_media_tokens, text_tokens, max_length))
            break
        ids += new_ids
        mask += new_mask
        kept += 1
    dropped_questions = 0 if template.keeps_questions else sum(map(has_words, rounds[:kept]))
    return EncodedText(
        np.array(ids, np.int32), np.array(mask, np.bool_), kept, len(rounds) - kept, dropped_questions
    )


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Mapping[str, str]],
    *,
    num_media_tokens: int,
    media_token_id: int,
    max_length: int,
    template: Template | None = None,
    system: str | None = None,
    sample_id: str = "",
) -> EncodedText:
    """Ids up to the place where the last answer begins, for generation. A last answer in `turns` is left out.

    Arguments and errors are those of `encode_conversation`; a prompt loses no rounds, it fits or is refused.
    No token is a target.
    """
    template = template or ChatMLTemplate()
    encode = _PieceEncoder(tokenizer, num_media_tokens, media_token_id, sample_id)
    rounds, pieces = _lay_out(template, turns, system, encode, open_answer=True)
    ids: list[int] = []
    for pieces_of_round in pieces:
        ids += encode(pieces_of_round, "behind_control" if ids else "apart")[0]
    if len(ids) > max_length:
        text_tokens = len(ids) - num_media_tokens
        raise DoesNotFit(sample_id, TokenPlan(0, 0, 0, num_media_tokens, text_tokens, max_length))
    dropped_questions = 0 if template.keeps_questions else sum(map(has_words, rounds))
    return EncodedText(
        np.array(ids, np.int32),
        np.zeros(len(ids), np.bool_),
        len(rounds),
        dropped_questions=dropped_questions,
    )


def end_of_turn_id(tokenizer: PreTrainedTokenizerFast, template: Template) -> int:
    """Id of the token that ends an answer: a control token, or what a newline becomes ('plain').

    Raises:
        UserError: the tokenizer has no such token.
    """
    name = template.end_of_turn
    if name.strip():
        return control_id(tokenizer, name)
    ids = encode_text(tokenizer, name, -1, place="inside")
    if len(ids) != 1:
        raise UserError(
            f"the tokenizer has no token for {name!r}, which text.template needs to end an answer"
        )
    return ids[0]
