"""A tokenizer's files, copied so that AutoTokenizer reads the same ids out of them as this project does.

tokenizer.json is the tokenizer. AutoTokenizer of transformers 5 does not always take it at its word: for some model types,
qwen2 among them, it builds the class registered for config.json's model_type and puts that class's own normaliser and word
pattern in the place of the file's (transformers: models/auto/tokenization_auto.py, MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS).
For the released Qwen2 that is the same thing; for a tokenizer trained otherwise it changes every id.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from avlm_jax.weights.text import TOKENIZER_FILES
from input_pipeline.conversation import load_tokenizer

CONFIG = "tokenizer_config.json"
# The class that takes tokenizer.json as it stands.
_PLAIN = {"tokenizer_class": "TokenizersBackend"}
# With an auto_map AutoTokenizer passes over the registered class and, since no remote code is allowed, takes tokenizer_class.
# It names no file that exists: where remote code is switched on, that is an error and not another tokenizer.
_PASS_OVER = {"auto_map": {"AutoTokenizer": ["tokenizer_json.TokenizersBackend"] * 2}}
# Digits, contractions, scripts, spaces, line ends, composed and decomposed accents, control tokens: where word patterns and
# normalisers of byte-level tokenizers differ.
PROBES = (
    "What is heard between 0:07 and 12.5 s?",
    " They're 1234567 words,\tWE'LL see;  two  spaces \n\n and\r\nlines  \n",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \ufb01ne \uff21\uff11 \u6771\u4eac\u3067\u3059 \u041f\u0440\u0438 \U0001f3b5!",
    "snake_case(x) != y/2 -- \u201cquoted\u201d \u2026",
    "<|im_start|>user\nhello<|im_end|>\n",
    "",
)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copies a tokenizer's files beside config.json of a language model.

    All are copied as they are, tokenizer_config.json alone gets keys added if AutoTokenizer would else read other ids.

    Args:
        source: Hugging Face folder with tokenizer.json.
        target: the language model's folder; its config.json is there already.

    Returns:
        Whether AutoTokenizer reads the same ids as `load_tokenizer`.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if reads_alike(target):
        return True
    file = target / CONFIG
    original = file.read_text(encoding="utf-8") if file.is_file() else None
    for change in (_PLAIN, _PLAIN | _PASS_OVER):
        changed: dict[str, Any] = json.loads(original or "{}") | change
        file.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if reads_alike(target):
            return True
    if original is None:
        file.unlink()
    else:
        file.write_text(original, encoding="utf-8")
    return False


def reads_alike(folder: Path) -> bool:
    """Whether AutoTokenizer and `load_tokenizer` agree on the probes and on the whole vocabulary."""
    from transformers import AutoTokenizer

    plain = load_tokenizer(folder)
    try:
        auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # Whatever a tokenizer class makes of files that are not its own.
        return False
    if auto.get_vocab() != plain.get_vocab():
        return False
    return all(auto(text).input_ids == plain(text).input_ids for text in PROBES)
