"""From a conversation to token ids and a label mask.

Ids are built segment by segment: a template says which pieces of text, control tokens and media tokens follow
each other and which are to be learnt; each piece becomes ids on its own. Nothing is tokenised twice, so no
mask can slip, and text written by others can never turn into a control token.

Media cut the text. What stands between two of them has the ids that the tokenizer gives it alone, as in LLaVA's
`tokenizer_image_token`; this matters for LLaMA's tokenizers, which begin every text with a blank ("\u2581").
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from input_pipeline.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PLACEHOLDERS = ("<video>", "<image>", "<audio>")  # All mean the same: the media tokens go here.
MEDIA_TOKEN = "<|media|>"  # The reserved token of this project's own tokenizers.
_LEADING_NEWLINES = re.compile(r"\s*[\r\n]")
_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS)))
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class ConversationError(UserError):
    """A sample's conversation is none (order of roles, no question, several placeholders) or does not suit the template."""


class ControlTokenError(UserError):
    """Text of a sample would have become a control token; the sample is refused."""


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
            f"sample {sample_id!r} does not fit: {plan}. Raise text.max_length to at least {plan.total}, "
            "ask for fewer frames or media tokens, or shorten the text"
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


# Pieces that templates are made of


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
                "placeholder, or set drop_question=True if it is a mere instruction to describe"
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


TEMPLATES: Mapping[str, type[ChatMLTemplate] | type[VicunaTemplate] | type[PlainTemplate]] = {
    "chatml": ChatMLTemplate,
    "vicuna": VicunaTemplate,
    "plain": PlainTemplate,
}


def make_template(name: str, **fields: Any) -> Template:
    """The template called `name` in config.text.template, with its attributes.

    Raises:
        UserError: there is no such template, or it has no such attribute.
    """
    if name not in TEMPLATES:
        raise UserError(f"text.template is {name!r}; known templates: {', '.join(sorted(TEMPLATES))}")
    known = [field.name for field in dataclasses.fields(TEMPLATES[name])]
    if unknown := sorted(set(fields) - set(known)):
        raise UserError(f"text.template {name!r} has no {', '.join(unknown)}; it has {', '.join(known)}")
    return TEMPLATES[name](**fields)


# Tokenizers


def load_tokenizer(directory: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer in a local Hugging Face folder; nothing is downloaded and no code of the folder is run.

    tokenizer.json is taken as it stands. AutoTokenizer of transformers 5 goes by config.json's model_type instead and puts
    Qwen2's own normaliser and word pattern in the place of the file's.

    Raises:
        UserError: the folder holds no tokenizer.json.
    """
    directory = os.fspath(directory)
    if not os.path.isfile(os.path.join(directory, "tokenizer.json")):
        raise UserError(
            f"{directory} holds no tokenizer.json; text.tokenizer must name a Hugging Face tokenizer folder"
        )
    # transformers advises to install torch on import; this project does without it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def find_media_token_id(tokenizer: PreTrainedTokenizerFast, vocab_rows: int) -> int:
    """The id that stands for media: `<|media|>` if the tokenizer has it, else the first id no token uses.

    Args:
        tokenizer: of the language model.
        vocab_rows: rows of the embedding table; Qwen2-7B has 152064 rows for 151646 tokens.

    Raises:
        UserError: neither exists.
    """
    vocabulary = tokenizer.get_vocab()
    if MEDIA_TOKEN in vocabulary:
        return vocabulary[MEDIA_TOKEN]
    unused = max(vocabulary.values()) + 1
    if unused >= vocab_rows:
        raise UserError(
            f"the tokenizer uses all {vocab_rows} ids of the model; add the token {MEDIA_TOKEN!r} to it"
        )
    return unused


# Where a text stands: apart from other text (at the beginning, behind media), behind a control token, or inside a
# text, whose first part is encoded already. LLaMA's tokenizers add their blank accordingly.
Place = Literal["apart", "behind_control", "inside"]


@dataclasses.dataclass(frozen=True)
class _TextEncoder:
    backends: Mapping[
        Place, Tokenizer
    ]  # tokenizers', private and never changed: safe to use from several threads
    added: frozenset[int]  # ids that text must not produce
    spelt_out: re.Pattern[str]  # matches, at no length, wherever such a token is spelt out

    def encode(self, text: str, place: Place) -> list[int]:
        return self.backends[place].encode(text, add_special_tokens=False).ids


@functools.lru_cache(maxsize=8)
def _text_encoder(tokenizer: PreTrainedTokenizerFast) -> _TextEncoder:
    from tokenizers import Tokenizer

    own = copy.deepcopy(tokenizer.backend_tokenizer)
    description = own.to_str()
    backends: dict[Place, Tokenizer] = {"apart": own}
    for place in ("behind_control", "inside"):
        changed = json.loads(description)
        for part in ("normalizer", "pre_tokenizer"):
            changed[part] = _without_blank(changed[part], place)
        same = changed == json.loads(description)
        backends[place] = own if same else Tokenizer.from_str(json.dumps(changed))
    for backend in backends.values():
        backend.encode_special_tokens = True  # transformers calls this split_special_tokens
        backend.no_padding()
        backend.no_truncation()
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    names = sorted({*added.values(), MEDIA_TOKEN}, key=len, reverse=True)
    pattern = re.compile("(?=" + "|".join(map(re.escape, names)) + ")")
    return _TextEncoder(backends, frozenset(added) | frozenset(tokenizer.all_special_ids), pattern)


def _without_blank(step: dict[str, Any] | None, place: Place) -> dict[str, Any] | None:
    """A step of tokenizer.json so changed that it adds no blank where the tokenizer adds none to such a text.

    Prepend (LLaMA's legacy form) and ByteLevel add it behind control tokens too, Metaspace by its prepend_scheme.
    """
    if step is None:
        return None
    for steps in ("normalizers", "pretokenizers"):
        if steps in step:
            changed = [_without_blank(one, place) for one in step[steps]]
            return {**step, steps: [one for one in changed if one is not None]}
    inside = place == "inside"
    if step["type"] == "Prepend" and inside:
        return None
    if step["type"] == "Metaspace" and (inside or step["prepend_scheme"] == "first"):
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel" and inside:
        return {**step, "add_prefix_space": False}
    return step


def encode_text(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    media_token_id: int,
    sample_id: str = "",
    place: Place = "apart",
) -> list[int]:
    """Ids of plain text, none of which is a control token or the media token, whatever the text spells out.

    Special tokens are not recognised in text. Added tokens that are not flagged special would be all the same
    (transformers#47386); where one is spelt out, the text is cut behind its first character.

    Raises:
        ControlTokenError: a control id came out even so (a normaliser of the tokenizer could do that, or a
            character that the tokenizer has no token for).
    """
    if not text:
        return []
    encoder = _text_encoder(tokenizer)
    ids = encoder.encode(text, place)
    if not encoder.added.isdisjoint(ids):
        cuts = [0, *(match.start() + 1 for match in encoder.spelt_out.finditer(text)), len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(cuts) if a < b]
        ids = encoder.encode(parts[0], place)
        ids += [index for part in parts[1:] for index in encoder.encode(part, "inside")]
    forbidden = encoder.added | {media_token_id}
    if not forbidden.isdisjoint(ids):
        found = sorted(forbidden.intersection(ids))
        raise ControlTokenError(
            f"sample {sample_id!r}: its text encodes to the control tokens {found}: {text[:200]!r}"
        )
    return ids


def end_of_turn_id(tokenizer: PreTrainedTokenizerFast, template: Template) -> int:
    """Id of the token that ends an answer: a control token, or what a newline becomes ('plain').

    Raises:
        UserError: the tokenizer has no such token.
    """
    name = template.end_of_turn
    if name.strip():
        return _control_id(tokenizer, name)
    ids = encode_text(tokenizer, name, -1, place="inside")
    if len(ids) != 1:
        raise UserError(
            f"the tokenizer has no token for {name!r}, which text.template needs to end an answer"
        )
    return ids[0]


# Conversations


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
                new, place = [_control_id(self.tokenizer, piece.name)], "behind_control"
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


def _control_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    index = tokenizer.get_added_vocab().get(name)
    if index is None:
        raise UserError(f"the tokenizer has no control token {name!r}, which text.template needs")
    return index


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
