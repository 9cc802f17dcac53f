"""From a conversation to token ids and a label mask.

Ids are built segment by segment: a template says which pieces of text, control tokens and media tokens follow
each other and which are to be learnt; each piece becomes ids on its own. Nothing is tokenised twice, so no
mask can slip, and text written by others can never turn into a control token.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

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
    """A sample's conversation is not one: wrong order of roles, no question, several media placeholders."""


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
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    rounds: int
    dropped_rounds: int = 0


# Pieces that templates are made of


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text: can never become a control token."""

    value: str
    target: bool = False


@dataclasses.dataclass(frozen=True)
class Control:
    """A control token by its name in the tokenizer, e.g. "<|im_end|>"."""

    name: str
    target: bool = False


@dataclasses.dataclass(frozen=True)
class Media:
    """The place of the media tokens."""


Piece = Text | Control | Media


@dataclasses.dataclass(frozen=True)
class Round:
    """One question and its answer; `answer` is None where the model is to speak."""

    question: tuple[Text | Media, ...]
    answer: str | None


class Template(Protocol):
    """How rounds are laid out. `end_of_turn` is the control token at which generation stops."""

    @property
    def end_of_turn(self) -> str: ...

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


TEMPLATES: Mapping[str, type[ChatMLTemplate]] = {"chatml": ChatMLTemplate}


def make_template(name: str, **fields: Any) -> Template:
    """The template called `name` in config.text.template."""
    if name not in TEMPLATES:
        raise UserError(f"text.template is {name!r}; known templates: {', '.join(sorted(TEMPLATES))}")
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


@dataclasses.dataclass(frozen=True)
class _TextEncoder:
    backend: Tokenizer  # tokenizers', a private copy that is never changed: safe to use from several threads
    added: frozenset[int]  # ids that text must not produce
    spelt_out: re.Pattern[str]  # matches, at no length, wherever such a token is spelt out


@functools.lru_cache(maxsize=8)
def _text_encoder(tokenizer: PreTrainedTokenizerFast) -> _TextEncoder:
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True  # transformers calls this split_special_tokens
    backend.no_padding()
    backend.no_truncation()
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    names = sorted({*added.values(), MEDIA_TOKEN}, key=len, reverse=True)
    pattern = re.compile("(?=" + "|".join(map(re.escape, names)) + ")")
    return _TextEncoder(backend, frozenset(added) | frozenset(tokenizer.all_special_ids), pattern)


def encode_text(
    tokenizer: PreTrainedTokenizerFast, text: str, media_token_id: int, sample_id: str = ""
) -> list[int]:
    """Ids of plain text, none of which is a control token or the media token, whatever the text spells out.

    Special tokens are not recognised in text. Added tokens that are not flagged special would be all the same
    (transformers#47386); where one is spelt out, the text is cut behind its first character.

    Raises:
        ControlTokenError: a control id came out even so (a normaliser of the tokenizer could do that).
    """
    if not text:
        return []
    encoder = _text_encoder(tokenizer)

    def encode(part: str) -> list[int]:
        return encoder.backend.encode(part, add_special_tokens=False).ids

    ids = encode(text)
    if not encoder.added.isdisjoint(ids):
        cuts = [0, *(match.start() + 1 for match in encoder.spelt_out.finditer(text)), len(text)]
        parts = (text[a:b] for a, b in itertools.pairwise(cuts))
        ids = [index for part in parts if part for index in encode(part)]
    forbidden = encoder.added | {media_token_id}
    if not forbidden.isdisjoint(ids):
        found = sorted(forbidden.intersection(ids))
        raise ControlTokenError(
            f"sample {sample_id!r}: its text encodes to the control tokens {found}: {text[:200]!r}"
        )
    return ids


# Conversations


def split_rounds(
    turns: Sequence[Mapping[str, str]], *, has_media: bool, sample_id: str = ""
) -> tuple[str | None, list[Round]]:
    """Checks a conversation and cuts it into rounds; puts the media where the placeholder stands.

    Args:
        turns: [{"from": "human" | "gpt", "value": text}, ...], the two alternating, human first; a first turn
            "system" gives the system text. "user" and "assistant" are accepted too. The last answer may be
            missing. A turn with {"verbatim": True} is what somebody typed: a placeholder in it is text.
        has_media: whether media tokens belong into the first question; without a placeholder they go in front
            of it.
        sample_id: named in errors.

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
    if not (text if verbatim else _PLACEHOLDER.sub("", text)).strip():
        raise refuse("a question is empty")
    if not (is_first and has_media):
        return (Text(text),)
    if not found:
        return (Media(), Text("\n" + text))  # The usual form: placeholder, newline, question.
    before, after = text[: found[0].start()], text[found[0].end() :]
    return tuple(piece for piece in (Text(before), Media(), Text(after)) if piece != Text(""))


def _encode(
    pieces: Iterable[Piece],
    tokenizer: PreTrainedTokenizerFast,
    num_media_tokens: int,
    media_token_id: int,
    sample_id: str,
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for piece in pieces:
        if isinstance(piece, Media):
            new, target = [media_token_id] * num_media_tokens, False
        elif isinstance(piece, Control):
            new, target = [_control_id(tokenizer, piece.name)], piece.target
        else:
            new, target = encode_text(tokenizer, piece.value, media_token_id, sample_id), piece.target
        ids += new
        mask += [target] * len(new)
    return ids, mask


def _control_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    index = tokenizer.get_added_vocab().get(name)
    if index is None:
        raise UserError(f"the tokenizer has no control token {name!r}, which text.template needs")
    return index


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
    own_system, rounds = split_rounds(turns, has_media=num_media_tokens > 0, sample_id=sample_id)
    if rounds[-1].answer is None:
        raise ConversationError(f"sample {sample_id!r}: the last question has no answer to learn")
    encode = functools.partial(
        _encode,
        tokenizer=tokenizer,
        num_media_tokens=num_media_tokens,
        media_token_id=media_token_id,
        sample_id=sample_id,
    )
    ids, mask = encode(template.opening(own_system if own_system is not None else system))
    kept = 0
    for turns_of_round in rounds:
        new_ids, new_mask = encode(template.round(turns_of_round))
        if len(ids) + len(new_ids) > max_length:
            if kept == 0:
                text_tokens = len(ids) + len(new_ids) - num_media_tokens
                raise DoesNotFit(sample_id, TokenPlan(0, 0, 0, num_media_tokens, text_tokens, max_length))
            break
        ids += new_ids
        mask += new_mask
        kept += 1
    return EncodedText(np.array(ids, np.int32), np.array(mask, np.bool_), kept, len(rounds) - kept)


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
    own_system, rounds = split_rounds(turns, has_media=num_media_tokens > 0, sample_id=sample_id)
    rounds[-1] = dataclasses.replace(rounds[-1], answer=None)
    pieces = template.opening(own_system if own_system is not None else system)
    for turns_of_round in rounds:
        pieces += template.round(turns_of_round)
    ids, mask = _encode(pieces, tokenizer, num_media_tokens, media_token_id, sample_id)
    if len(ids) > max_length:
        text_tokens = len(ids) - num_media_tokens
        raise DoesNotFit(sample_id, TokenPlan(0, 0, 0, num_media_tokens, text_tokens, max_length))
    return EncodedText(np.array(ids, np.int32), np.zeros(len(mask), np.bool_), len(rounds))
