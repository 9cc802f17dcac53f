"""Does a tokenizer fit a language model? Checked before the weights are imported, since nothing fails later: a model
with another tokenizer runs and talks nonsense.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avlm_jax.weights.json_file import read_json_object
from input_pipeline.conversation import (
    TEMPLATES,
    Control,
    Piece,
    Round,
    Text,
    encode_prompt,
    load_tokenizer,
)
from input_pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer.json"
# What a tokenizer's folder may hold besides; transformers reads them when it loads an exported model.
TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip

CHAT_TEMPLATES = ("chatml", "vicuna")  # Those of text.template that hold a chat.

# Tables are padded to round sizes: Qwen2 has 290 (0.5B, 1.5B: 151936 rows) or 418 (7B: 152064 rows) rows more than
# tokens, LLaMA none. From here on the tokenizer is taken for another model's.
MOST_UNUSED_ROWS = 1024

_PROBE = (
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Which colour has the bus?"},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "And when does it stop?"},
)


class TokenizerError(UserError):
    """Tokenizer and model do not belong together, or a file of the tokenizer is missing or broken."""


def check_tokenizer(folder: str | Path, hf_config: Mapping[str, Any]) -> list[str]:
    """Checks the tokenizer in a model's folder against the model.

    Args:
        folder: tokenizer.json, and as published tokenizer_config.json, generation_config.json, a chat template.
        hf_config: the model's config.json, see `qwen2.read_config`.

    Returns:
        Warnings: what a user should know though it does not keep the model from working.

    Raises:
        TokenizerError: tokenizer.json is missing or broken; it has ids beyond the embedding table, or so few
            that it must be another model's; a control id of the model is no control token in it; a Qwen2
            tokenizer lacks the tokens of ChatML. A LLaMA's may lack them: it is compared with Vicuna's template.
        JsonFileError: tokenizer_config.json, added_tokens.json or generation_config.json holds no JSON object.
    """
    folder = Path(folder)
    if not (folder / TOKENIZER).is_file():
        found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        raise TokenizerError(
            f"{folder / TOKENIZER}: missing (of the tokenizer there: {', '.join(found) or 'nothing'}). Fetch it from "
            "the model's repository; where it has none, transformers' AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...) makes it out of tokenizer.model"
        )
    tokenizer = _load(folder)
    vocabulary = tokenizer.get_vocab()
    _check_rows(folder, vocabulary, hf_config["vocab_size"])
    warnings = _check_control_ids(folder, tokenizer, vocabulary, hf_config)
    lacking = {name: _lacking(name, tokenizer) for name in CHAT_TEMPLATES}
    missing = lacking["chatml"]
    if missing and hf_config["model_type"] == "qwen2":
        raise TokenizerError(
            f"{folder / TOKENIZER}: has no control token {', '.join(missing)}, which every Qwen2 tokenizer has; fetch "
            "the file from the model's repository"
        )
    fitting = next((name for name in CHAT_TEMPLATES if not lacking[name]), None)
    if missing:
        remedy = f", {fitting!r} does: --config.text.template={fitting}" if fitting else ""
        warnings.append(
            f"{folder}: the tokenizer has no {', '.join(missing)}; text.template 'chatml' does not fit this model{remedy}"
        )
    if fitting:
        warnings += _compare_templates(folder, tokenizer, fitting)
    return warnings


def _load(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as training will load it, all of whose tokens are declared in the folder."""
    from tokenizers import Tokenizer

    try:
        declared = set(Tokenizer.from_file(os.fspath(folder / TOKENIZER)).get_vocab())
    except Exception as error:  # tokenizers raises nothing narrower.
        raise TokenizerError(f"{folder / TOKENIZER}: cannot be read ({error}); fetch it again") from None
    settings = _read_json(folder / "tokenizer_config.json")
    added = settings.get("added_tokens_decoder") or {}
    declared |= {token["content"] if isinstance(token, dict) else str(token) for token in added.values()}
    declared |= set(_read_json(folder / "added_tokens.json"))
    try:
        tokenizer = load_tokenizer(folder)
    except UserError:
        raise
    except Exception as error:  # Whatever transformers makes of a broken tokenizer_config.json.
        raise TokenizerError(f"{folder}: transformers cannot load its tokenizer ({error})") from error
    for token, index in tokenizer.get_vocab().items():
        if token not in declared:
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'}: names the special token {token!r}, which {TOKENIZER} does not "
                f"have (it would become a new id, {index}); the two files are of different models"
            )
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file, {} where there is none."""
    return read_json_object(file) if file.is_file() else {}


def _check_rows(folder: Path, vocabulary: Mapping[str, int], rows: int) -> None:
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    where = f"{folder / TOKENIZER}"
    if largest >= rows:
        raise TokenizerError(
            f"{where}: token {token!r} has the id {largest}, but the model's table has {rows} rows (config.json, "
            "vocab_size). It is another model's tokenizer; fetch the file from the model's repository"
        )
    unused = rows - len(set(vocabulary.values()))
    if unused >= MOST_UNUSED_ROWS:
        raise TokenizerError(
            f"{where}: its {rows - unused} tokens leave {unused} of the model's {rows} rows (config.json, vocab_size) "
            "unused; released tables are padded by a few hundred. It is another model's tokenizer; fetch the file "
            "from the model's repository"
        )


def _check_control_ids(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: Mapping[str, int],
    hf_config: Mapping[str, Any],
) -> list[str]:
    names = {index: token for token, index in vocabulary.items()}
    control = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    configs = {
        "config.json": hf_config,
        "generation_config.json": _read_json(folder / "generation_config.json"),
    }
    warnings = []
    for kind in ("eos", "bos", "pad"):
        key = f"{kind}_token_id"
        ids: dict[int, str] = {}
        for file, config in configs.items():
            value = config.get(key)
            for index in value if isinstance(value, list) else [value]:
                if index is None or (kind == "pad" and index == -1):  # LLaMA's way of saying none.
                    continue
                if not isinstance(index, int):
                    raise TokenizerError(f"{folder / file}: {key} is {index!r}, not an id")
                ids[index] = file
                if index not in control:
                    what = f"the ordinary token {names[index]!r}" if index in names else "no token at all"
                    fault = f"{folder / file}: {key} is {index}, which is {what} in {TOKENIZER}"
                    if kind != "pad":  # Nothing of this project reads the padding's token.
                        raise TokenizerError(
                            f"{fault}; tokenizer and model are of different origin. Fetch both from one repository"
                        )
                    warnings.append(fault)
        own = getattr(tokenizer, key)
        if own is not None and ids and own not in ids:
            theirs = ", ".join(f"{index} ({names.get(index)})" for index in ids)
            warnings.append(
                f"{folder / 'tokenizer_config.json'}: its {kind} token is {own} ({names[own]}), that of "
                f"{' and '.join(sorted(set(ids.values())))} is {theirs}; generation goes by text.template"
            )
    return warnings


def _lacking(name: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Control tokens that a template needs and the tokenizer does not have."""
    template = TEMPLATES[name]()
    pieces = [*template.opening(None), *template.round(Round((Text("x"),), "y"))]
    needed = dict.fromkeys(piece.name for piece in pieces if isinstance(piece, Control))
    return [token for token in needed if token not in tokenizer.get_added_vocab()]


def _our_text(name: str, system: str | None, turns: tuple[Mapping[str, str], ...]) -> str:
    """A chat with an open end as the template lays it out, without what the tokenizer puts ahead of a text."""
    template = TEMPLATES[name]()
    pieces: list[Piece] = template.opening(system)
    for question, answer in zip(turns[::2], [*turns[1::2], None], strict=True):
        pieces += template.round(Round((Text(question["content"]),), answer and answer["content"]))
    texts = (piece.name if isinstance(piece, Control) else getattr(piece, "value", "") for piece in pieces)
    return "".join(texts)


def _compare_templates(folder: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> Iterator[str]:
    """Renders a conversation with the tokenizer's own chat template and with the one called `name`."""
    if not tokenizer.chat_template:
        return
    begin = tokenizer.bos_token or ""

    def render(conversation: tuple[Mapping[str, str], ...]) -> str:
        text = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
        return text.removeprefix(begin)  # Some templates write it out, others leave it to the tokenizer.

    try:
        theirs, bare = render(_PROBE), render(_PROBE[1:2])
    except Exception as error:  # A template may raise what it likes.
        yield f"{folder}: its chat template cannot be rendered ({error}); text.template {name!r} is used untested"
        return
    system, *turns = _PROBE
    ours = _our_text(name, system["content"], tuple(turns))
    if theirs != ours:
        yield f"{folder}: its chat template differs from text.template {name!r} {_difference(theirs, ours)}"
        return
    their_ids = tokenizer(theirs, add_special_tokens=False)["input_ids"]
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    our_ids = encode_prompt(
        tokenizer,
        [{"from": roles[turn["role"]], "value": turn["content"]} for turn in _PROBE],
        num_media_tokens=0,
        media_token_id=-1,
        max_length=len(theirs.encode()) + 1,
        template=TEMPLATES[name](),
    ).tokens.tolist()
    if our_ids[:1] == [tokenizer.bos_token_id]:
        del our_ids[0]
    if their_ids != our_ids:
        tokens = (tokenizer.convert_ids_to_tokens(ids) for ids in (their_ids, our_ids))
        yield (
            f"{folder}: its chat template gives the same text as text.template {name!r} but other tokens "
            f"{_difference(*tokens)}"
        )
    if bare == (without := _our_text(name, "", _PROBE[1:2])):
        yield f"{folder}: its chat template has no system text of its own; text.system '' does the same"
    elif bare != (with_own := _our_text(name, None, _PROBE[1:2])):
        own = TEMPLATES[name]().system
        before, after = with_own.removesuffix(without).split(own)
        wanted = bare.removesuffix(without).removeprefix(before).removesuffix(after)
        yield f"{folder}: the system text of its chat template is {wanted!r}; text.system has {own!r}"


def _difference(theirs: Any, ours: Any) -> str:
    """Where two texts or token lists part, with a little of both."""
    place = next(
        (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
    )
    begin, end = max(place - 3, 0), place + 9
    return f"from place {place} on: {theirs[begin:end]!r} against {ours[begin:end]!r}"
