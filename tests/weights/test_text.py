"""A tokenizer is checked against the model whose ids it is to make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avlm_jax.weights.json_file import JsonFileError
from avlm_jax.weights.qwen2 import read_config
from avlm_jax.weights.text import TokenizerError, check_tokenizer
from tests.input_pipeline.llama_tokenizer import VICUNA, make_llama_tokenizer
from tests.released_folders import CHAT_TEMPLATE, QWEN2, edit_json, write_json
from tests.tiny_system import save_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", QWEN2)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [256, 257], "pad_token_id": 257})
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tmp_path


def check(folder: Path) -> list[str]:
    return check_tokenizer(folder, read_config(folder))


def refused(folder: Path) -> str:
    with pytest.raises((TokenizerError, JsonFileError)) as error:
        check(folder)
    return str(error.value)


def edit_tokens(folder: Path, change) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    write_json(file, content)


def test_the_models_own_tokenizer_passes_in_silence(folder):
    assert check(folder) == []


def test_without_tokenizer_json(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    message = refused(folder)
    assert (
        f"{folder}/tokenizer.json: missing" in message and "chat_template.jinja, tokenizer.model" in message
    )


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"model": {"type": "BPE"}}', "\x00\x01"])
def test_a_broken_tokenizer_json(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert f"{folder}/tokenizer.json: cannot be read" in refused(folder)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_broken_tokenizer_config(folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    assert f"{folder}/tokenizer_config.json: " in refused(folder)


def test_ids_beyond_the_table(folder):
    edit_json(folder / "config.json", vocab_size=259)
    message = refused(folder)
    assert "'<|media|>' has the id 259, but the model's table has 259 rows" in message
    edit_json(folder / "config.json", vocab_size=260)
    assert check(folder) == []  # <|media|> is the media token, so no unused row is needed


def test_a_table_much_larger_than_the_vocabulary(folder):
    """418 rows are padding in Qwen2-7B; thousands mean that the tokenizer is another model's."""
    edit_json(folder / "config.json", vocab_size=260 + 418)
    assert check(folder) == []
    edit_json(folder / "config.json", vocab_size=260 + 1024)
    assert "its 260 tokens leave 1024 of the model's 1284 rows" in refused(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_control_ids_of_another_vocabulary(folder, file):
    edit_json(folder / file, eos_token_id=[256, 65])
    message = refused(folder)
    assert f"{folder / file}: eos_token_id is 65, which is the ordinary token" in message
    edit_json(folder / file, eos_token_id=290)
    assert "eos_token_id is 290, which is no token at all in tokenizer.json" in refused(folder)
    edit_json(folder / file, eos_token_id="<|im_end|>")
    assert "eos_token_id is '<|im_end|>', not an id" in refused(folder)


def test_padding_is_only_remarked_upon(folder):
    edit_json(folder / "config.json", pad_token_id=-1)
    edit_json(folder / "generation_config.json", pad_token_id=65)
    first, second = check(folder)
    assert "pad_token_id is 65" in first and "its pad token is 257 (<|endoftext|>)" in second


def test_another_end_of_text_is_told(folder):
    """A base model's files: it ends at <|endoftext|>, its tokenizer at <|im_end|>."""
    edit_json(folder / "config.json", eos_token_id=257)
    edit_json(folder / "generation_config.json", eos_token_id=257)
    (warning,) = check(folder)
    assert "its eos token is 256 (<|im_end|>)" in warning and "is 257 (<|endoftext|>)" in warning


def test_a_special_token_that_tokenizer_json_lacks(folder):
    """transformers would give it a new id without a word."""
    edit_json(folder / "tokenizer_config.json", bos_token="<|begin|>")
    message = refused(folder)
    assert "tokenizer_config.json: names the special token '<|begin|>'" in message
    declared = {"260": {"content": "<|begin|>", "special": True}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=declared)
    assert check(folder) == []


def test_chatml_tokens(folder):
    def rename(content):
        for token in content["added_tokens"]:
            token["content"] = token["content"].replace("im_start", "im_begin")

    edit_tokens(folder, rename)
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=["<|im_begin|>", "<|media|>"])
    assert "has no control token <|im_start|>" in refused(folder)
    edit_json(folder / "config.json", model_type="llama")
    (warning,) = check(folder)
    assert "no <|im_start|>; text.template 'chatml' does not fit" in warning


def test_media_need_no_row(folder):
    def drop(content):
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|media|>"]

    edit_tokens(folder, drop)
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=["<|im_start|>"])
    for rows in (300, 259):  # With and without a row that no token uses.
        edit_json(folder / "config.json", vocab_size=rows)
        assert check(folder) == []


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("+ '<|im_end|>\\n' }}{%- endfor", "+ '<|im_end|>' }}{%- endfor", ["differs from text.template 'chatml'"]),
        (
            "You are a helpful assistant.",
            "You are Qwen.",
            ["its chat template is 'You are Qwen.'; text.system has 'You are a helpful assistant.'"],
        ),
        ("messages[0]['role'] != 'system'", "false", ["no system text of its own; text.system ''"]),
        ("{%- if add", "{{ raise_exception('no') }}{%- if add", ["cannot be rendered (no)"]),
        ("{%- if add", "{{ unclosed {%- if add", ["cannot be rendered"]),
        ("{%- if add", "{{ ''.__class__.__mro__[1].__subclasses__() }}{%- if add", ["cannot be rendered"]),
    ],
)  # fmt: skip
def test_another_chat_template_is_told(folder, old, new, messages):
    assert old in CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace(old, new))
    warnings = check(folder)
    assert len(warnings) == len(messages)
    for warning, message in zip(warnings, messages, strict=True):
        assert message in warning


def test_the_same_text_but_other_ids_are_told(folder):
    """As with a tokenizer that marks the beginning of every text: here pieces are encoded one by one."""

    def prepend(content):
        content["normalizer"] = {"type": "Prepend", "prepend": "_"}

    edit_tokens(folder, prepend)
    (warning,) = check(folder)
    assert "the same text as text.template 'chatml' but other tokens from place" in warning


def test_without_a_chat_template_nothing_is_compared(folder):
    (folder / "chat_template.jinja").unlink()
    assert check(folder) == []


@pytest.fixture
def vicuna(tmp_path: Path) -> Path:
    tokenizer = make_llama_tokenizer("metaspace")
    tokenizer.save_pretrained(tmp_path)
    llama = {"model_type": "llama", "vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0}
    write_json(tmp_path / "config.json", {**QWEN2, **llama})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 2, "bos_token_id": 1})
    return tmp_path


def test_a_vicuna_is_compared_with_its_own_template(vicuna):
    """Every row is used, the chat template is FastChat's: only that the default template does not fit is told."""
    told = "no <|im_start|>, <|im_end|>; text.template 'chatml' does not fit this model, 'vicuna' does"
    (warning,) = check(vicuna)
    assert told in warning and warning.endswith("--config.text.template=vicuna")
    for template, message in (
        ("{{ bos_token }}" + VICUNA, None),  # As most LLaMAs spell it.
        (
            VICUNA.replace("helpful, ", ""),
            'The assistant gives detailed, and polite answers to the user\'s questions."; text.system has "A chat ',
        ),
        (VICUNA.replace("</s>", "</s> "), "differs from text.template 'vicuna'"),
        (CHAT_TEMPLATE, "differs from text.template 'vicuna'"),
    ):
        (vicuna / "chat_template.jinja").write_text(template)
        first, *others = check(vicuna)
        assert told in first and len(others) == (message is not None)
        assert all(message in warning for warning in others), others
