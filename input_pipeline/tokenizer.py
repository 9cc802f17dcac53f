"""A language model's tokenizer: loading it, and the ids of text that others wrote."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from input_pipeline.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

MEDIA_TOKEN = "<|media|>"  # The reserved token of this project's own tokenizers.


class ControlTokenError(UserError):
    """Text of a sample would have become a control token; the sample is refused."""


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

    Only its place in a prompt matters: the model never looks it up, so it may lie behind the table's last row, as
    with Vicuna v1.5, whose 32000 tokens have as many rows.

    Args:
        tokenizer: of the language model.
        vocab_rows: rows of the embedding table; Qwen2-7B has 152064 rows for 151646 tokens.

    Raises:
        UserError: the tokenizer has tokens without a row.
    """
    vocabulary = tokenizer.get_vocab()
    if MEDIA_TOKEN in vocabulary:
        return vocabulary[MEDIA_TOKEN]
    last = max(vocabulary.values())
    if last >= vocab_rows:
        raise UserError(
            f"the tokenizer's largest id is {last}, but the model's embedding table has {vocab_rows} rows "
            "(model.llm.vocab_size); text.tokenizer is another model's"
        )
    return last + 1


# Where a text stands: apart from other text (at the beginning, behind media), behind a control token, or inside a
# text, whose first part is encoded already. LLaMA's tokenizers add their blank accordingly.
Place = Literal["apart", "behind_control", "inside"]


@dataclasses.dataclass(frozen=True)
class _TextEncoder:
    # tokenizers' own, private copies that are never changed: safe to use from several threads
    backends: Mapping[Place, Tokenizer]
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


def control_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """Id of a control token.

    Raises:
        UserError: the tokenizer has none of that name.
    """
    index = tokenizer.get_added_vocab().get(name)
    if index is None:
        raise UserError(f"the tokenizer has no control token {name!r}, which text.template needs")
    return index
