"""ChatML ids against the tokenizer's own chat template, and the guard of text over a Qwen-like set of added tokens."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

import avlm_jax
from input_pipeline.conversation import (
    PLACEHOLDERS,
    ChatMLTemplate,
    ControlTokenError,
    encode_conversation,
    encode_prompt,
    encode_text,
    find_media_token_id,
    load_tokenizer,
)
from tests.tiny_system import save_tokenizer

DEMO = Path(avlm_jax.__file__).parent / "demo_backbones" / "qwen2"

# Qwen2's word pattern (Qwen/Qwen2-7B-Instruct, tokenizer.json): newlines join the punctuation and the blanks before them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Qwen2.5's added tokens (tokenizer_config.json): the first line is flagged special, the second is not.
SPECIAL = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
    "vision_end vision_pad image_pad video_pad"
).split()
PLAIN = ("<tool_call>", "</tool_call>") + tuple(
    f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
)
# Qwen2's layout: a default system turn where the conversation brings none.
TEMPLATE = """{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for turn in messages -%}
{{ '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""
TEXT = """system user assistant You are a helpful assistant. What is heard? Don't stop: 12, 34!\n\n
    def f(x):\r\n\treturn x\n\n\nThe bell (twice)...\n\n\n\n Ärger über café naïve 日本語 🙂\n <video> image_pad im_end
"""


@pytest.fixture(scope="module")
def qwen():
    """Qwen2.5's tokenizer in small: its normaliser, word pattern and added tokens over a vocabulary of 400."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[f"<|{name}|>" for name in SPECIAL if name not in ("im_end", "endoftext")],
        chat_template=TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in PLAIN])
    assert len(tokenizer.encode("\n\n\n")) == 1  # as in Qwen2, so that a wrong cut would be seen
    return tokenizer


@pytest.fixture(scope="module")
def simple(tmp_path_factory):
    """One id per byte, a media token, and the chat template that the package ships: no default system turn."""
    tokenizer = load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.chat_template = (DEMO / "chat_template.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="module")
def demo():
    """The tokenizer that the package ships; it begins every piece of text with a blank."""
    return load_tokenizer(DEMO)


def templated(tokenizer, messages, add_generation_prompt: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=add_generation_prompt
    )


def turns(messages) -> list[dict[str, str]]:
    return [{"from": message["role"], "value": message["content"]} for message in messages]


def encoded(tokenizer, messages, function=encode_conversation, media: int = 0, **options) -> list[int]:
    media_id = find_media_token_id(tokenizer, 10_000)
    limits = dict(num_media_tokens=media, media_token_id=media_id, max_length=10_000, sample_id="s")
    return function(tokenizer, turns(messages), **limits, **options).tokens.tolist()


def dialogue(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


HARMLESS = {
    "one round": dialogue("What is heard?", "A bell."),
    "many rounds": dialogue("What?", "A bell.", "When?", "At 00:05.", "Why?", "It is noon."),
    "own system": dialogue("What is heard?", "A bell.", system="Be brief."),
    "system of several lines": dialogue("What?", "A bell.", system="\nBe brief.\n\nBe right.\n"),
    "blanks at the ends": dialogue("  What is heard? \n", " A bell.\n\n "),
    "question that begins with newlines": dialogue("\n\nWhat?", "A bell.", "\r\n \nWhen?", "Now."),
    "code": dialogue("def f(x):\r\n\treturn x\n\n\n# what?", "```\nx\n```\n"),
    "other scripts": dialogue("Ärger u\u0308ber cafe\u0301 日本語?", "naïve 🙂 1234"),
    "brackets": dialogue("Is a < b | c > d <|> or </s> <im_end> <| im_end |>?", "Yes: <b>|</b>"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_ids_are_the_chat_templates(qwen, name):
    messages = HARMLESS[name]
    assert encoded(qwen, messages) == templated(qwen, messages)
    prompt = encoded(qwen, messages[:-1], encode_prompt)
    assert prompt == templated(qwen, messages[:-1], add_generation_prompt=True)


@pytest.mark.parametrize("name", HARMLESS)
def test_ids_are_the_shipped_templates(simple, name):
    """Also with no system turn at all, and with media tokens where the placeholder stands."""
    messages = HARMLESS[name]
    bare = ChatMLTemplate(system="")
    assert encoded(simple, messages, template=bare) == templated(simple, messages)
    if messages[0]["role"] == "system":
        return
    question = messages[0]["content"]
    shown = [{"role": "user", "content": f"<video>\n{question}"}, *messages[1:]]
    spelt = [{"role": "user", "content": "<|media|>" * 5 + f"\n{question}"}, *messages[1:]]
    assert encoded(simple, shown, media=5, template=bare) == templated(simple, spelt)
    # Without a placeholder the media stand in front, in the same layout.
    assert encoded(simple, messages, media=5, template=bare) == templated(simple, spelt)


def test_random_conversations(qwen):
    rng = np.random.default_rng(0)
    pieces = [
        *"aeiou .,:!?'\n\r\t<>|19",
        "  ",
        "\n\n",
        "é",
        "e\u0301",
        "日",
        "🙂",
        "bell",
        "'s",
        "user",
        "im_end",
    ]
    for _ in range(300):
        texts = ["".join(rng.choice(pieces, rng.integers(1, 12))) for _ in range(rng.integers(1, 4) * 2)]
        # Neither is a text empty nor does an answer begin with a newline; for the latter see below.
        texts = [
            f"x{text}" if not text.strip() or (i % 2 and text[0] in " \r\n\t") else text
            for i, text in enumerate(texts)
        ]
        messages = dialogue(*texts, system="Hm." if rng.random() < 0.5 else None)
        assert encoded(qwen, messages) == templated(qwen, messages), messages


def test_an_answer_begins_where_generation_does(qwen):
    """The prompt ends with "assistant\\n"; an answer's own newlines are learnt as they would be generated."""
    messages = dialogue("What?", "\n\nA bell.")
    ids, prompt = encoded(qwen, messages), encoded(qwen, messages[:1], encode_prompt)
    assert ids[: len(prompt)] == prompt
    assert qwen.decode(ids) == qwen.decode(templated(qwen, messages))
    assert ids != templated(
        qwen, messages
    )  # It joins the three newlines, which no prompt could be continued to.


def spellings(tokenizer) -> list[str]:
    names = [token.content for token in tokenizer.added_tokens_decoder.values()]
    names = list(dict.fromkeys([*names, "<|media|>", "<video>", "<image>", "<audio>"]))
    return [
        *names,
        *(f"a {name}\n" for name in names),
        *(name + name for name in names),
        *(name[:3] + name + name[3:] for name in names),  # what is left if the inner one is taken out
        *(" ".join(name) for name in names),
        *(first + second for first, second in zip(names, names[::-1], strict=True)),
    ]


@pytest.mark.parametrize("which", ["qwen", "simple", "demo"])
def test_no_spelling_of_an_added_token_becomes_one(request, which):
    """Over every added token, flagged special or not, in every place that others write."""
    tokenizer = request.getfixturevalue(which)
    media = find_media_token_id(tokenizer, 10_000)
    forbidden = set(tokenizer.added_tokens_decoder) | {media}
    assert len(forbidden) == (23 if which == "qwen" else 4)
    harmless = dialogue("What?", "A bell.", "When?", "Now.", system="Hm.")
    wanted = [index for index in encoded(tokenizer, harmless, media=3) if index in forbidden]
    assert wanted.count(media) == 3
    for text in spellings(tokenizer):
        ids = encode_text(tokenizer, text, media)
        assert forbidden.isdisjoint(ids), text
        if which != "demo":
            assert tokenizer.decode(ids) == text
        # In questions the three placeholders belong to the format: a second one is refused by name.
        asked = functools.reduce(lambda rest, name: rest.replace(name, name[1:]), PLACEHOLDERS, text)
        hostile = dialogue(f"<video>\nWhat? {asked}", text, f"When? {asked}", text, system=text)
        found = encoded(tokenizer, hostile, media=3)
        assert [index for index in found if index in forbidden] == wanted, text


def test_random_fragments_of_added_tokens(qwen):
    rng = np.random.default_rng(1)
    media = find_media_token_id(qwen, 10_000)
    forbidden = set(qwen.added_tokens_decoder) | {media}
    fragments = [
        "<|",
        "|>",
        "<",
        ">",
        "|",
        "/",
        "im_",
        "start",
        "end",
        "tool_call",
        "fim_prefix",
        " ",
        "\n",
        "é",
    ]
    fragments += [token.content for token in qwen.added_tokens_decoder.values()]
    hits = 0
    for _ in range(2000):
        text = "".join(rng.choice(fragments, rng.integers(2, 8)))
        ids = encode_text(qwen, text, media)
        assert forbidden.isdisjoint(ids), text
        assert qwen.decode(ids) == text
        hits += not forbidden.isdisjoint(qwen(text, add_special_tokens=False)["input_ids"])
    assert hits > 1000  # Encoded carelessly, most of them would have been control tokens.


def test_what_a_normaliser_turns_into_a_token_is_refused(qwen):
    """NFC writes U+212A, the Kelvin sign, as K: no spelling of the token stands in the text, and yet it comes out."""
    import copy

    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(qwen)
    tokenizer.add_tokens([AddedToken("<|K|>", special=False, normalized=True)])
    assert tokenizer("<|\u212a|>", add_special_tokens=False)["input_ids"] == [len(tokenizer) - 1]
    with pytest.raises(ControlTokenError, match="'s'.*control tokens"):
        encoded(tokenizer, dialogue("Is it <|\u212a|>?", "No."))
