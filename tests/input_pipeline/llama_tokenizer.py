"""LLaMA-2's tokenizer in small: the same steps, control tokens and byte tokens over a vocabulary trained on the spot."""

from __future__ import annotations

import functools
import json
from typing import Any

BLANK = "\u2581"
TEXT = """A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and
polite answers to the user's questions. USER: What is heard? ASSISTANT: A bell rings twice, then a drum. A red circle moves
to the left between 00:00:05.250 and 00:00:10.000 while a whistle is heard. Is it <s>, </s> or <unk>? <0x0A> is a newline.
""".replace("\n", " ")
# FastChat's vicuna_v1.1 (lmsys/vicuna-7b-v1.5) as a chat template, without the <s> that the tokenizer puts ahead.
VICUNA = """{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}
{%- set turns = messages[1:] -%}
{%- if messages[0].content %}{{ messages[0].content ~ ' ' }}{% endif -%}
{%- else -%}
{{ "A chat between a curious user and an artificial intelligence assistant. " }}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif -%}
{%- for turn in turns -%}
{%- if turn.role == 'user' %}{{ 'USER: ' ~ turn.content ~ ' ' }}{% endif -%}
{%- if turn.role == 'assistant' %}{{ 'ASSISTANT: ' ~ turn.content ~ '</s>' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}"""


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges. Runs of blanks are tokens, no other token holds a blank but as its first character, as in LLaMA."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    runs = [(BLANK, BLANK), (BLANK * 2, BLANK * 2)]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(model["vocab"], key=model["vocab"].__getitem__) + [a + b for a, b in runs]
    return {name: index for index, name in enumerate(names)}, [*map(tuple, model["merges"]), *runs]


@functools.cache
def make_llama_tokenizer(form: str) -> Any:
    """A tokenizer with the steps of LLaMA-2's tokenizer.json; not to be changed, copy it for that.

    Args:
        form: "prepend" is the legacy one, a normaliser (as in most folders); "metaspace" a pre-tokeniser that adds the blank
            to the very beginning only (transformers' legacy=False, lmsys/vicuna-7b-v1.5).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = _vocabulary()
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if form == "prepend":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=VICUNA,
    )
