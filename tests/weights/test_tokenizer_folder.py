"""A tokenizer's files are copied as they are, unless AutoTokenizer would read other ids out of them."""

import json
from pathlib import Path

import pytest

from avlm_jax.weights.tokenizer_folder import PROBES, copy_tokenizer, reads_alike
from input_pipeline.conversation import load_tokenizer
from tests.tiny_system import save_tokenizer

# Qwen2's own word pattern (Qwen2-7B-Instruct, tokenizer.json: pre_tokenizer).
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CONFIG = {"model_type": "qwen2", "vocab_size": 300}


def save_qwen2_tokenizer(folder: Path) -> Path:
    """Bytes and a few merges, behind the normaliser and the word pattern of the released Qwen2."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    save_tokenizer(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("he", "a"), ("hea", "r"), ("\u0120", "i"), ("\u0120i", "s"), ("1", "2")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def llm(tmp_path) -> Path:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "llm"


def test_the_released_tokenizer_is_copied_as_it_is(llm, tmp_path):
    source = save_qwen2_tokenizer(tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "model.safetensors").write_bytes(b"not a tokenizer's")
    assert copy_tokenizer(source, llm)
    copied = {file.name: file.read_bytes() for file in llm.iterdir() if file.name != "config.json"}
    assert copied == {
        name: (source / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }


@pytest.mark.parametrize("with_config", [True, False])
def test_another_tokenizer_keeps_its_ids(llm, tmp_path, with_config):
    source = save_tokenizer(tmp_path / "source")
    if not with_config:
        (source / "tokenizer_config.json").unlink()
    state = json.loads((source / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Lowercase"}
    (source / "tokenizer.json").write_text(json.dumps(state))
    for file in source.iterdir():
        (llm / file.name).write_bytes(file.read_bytes())
    assert not reads_alike(llm), "as it is AutoTokenizer reads other ids, so the test can fail"
    assert copy_tokenizer(source, llm)
    assert (llm / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    from transformers import AutoTokenizer

    auto, plain = AutoTokenizer.from_pretrained(llm), load_tokenizer(source)
    for text in PROBES:
        assert auto(text).input_ids == plain(text).input_ids == load_tokenizer(llm)(text).input_ids


def test_where_nothing_helps_the_files_stay_as_they_were(llm, tmp_path, monkeypatch):
    source = save_tokenizer(tmp_path / "source")
    monkeypatch.setattr("avlm_jax.weights.tokenizer_folder.reads_alike", lambda folder: False)
    assert not copy_tokenizer(source, llm)
    assert (llm / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    (source / "tokenizer_config.json").unlink()
    (llm / "tokenizer_config.json").unlink()
    assert not copy_tokenizer(source, llm)
    assert not (llm / "tokenizer_config.json").exists()
