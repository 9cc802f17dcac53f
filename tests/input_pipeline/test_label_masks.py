"""What each template learns, keeps and refuses. A reader sees the masks: learnt text stands between [ and ]."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from input_pipeline.conversation import (
    ChatMLTemplate,
    ConversationError,
    DoesNotFit,
    PlainTemplate,
    VicunaTemplate,
    encode_conversation,
    encode_prompt,
    end_of_turn_id,
    find_media_token_id,
)
from input_pipeline.errors import UserError
from input_pipeline.transforms.sample import SampleBuilder
from tests.input_pipeline.llama_tokenizer import make_llama_tokenizer

MEDIA = 3
VICUNA = VicunaTemplate(system="Be brief.")
CHATML = ChatMLTemplate(system="Be brief.")


def turns(*values: str, system: str | None = None) -> list[dict[str, str]]:
    found = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return found if system is None else [{"from": "system", "value": system}, *found]


def encode(tokenizer, template, conversation, function=encode_conversation, **options):
    fields = {
        "num_media_tokens": MEDIA,
        "media_token_id": find_media_token_id(tokenizer, 10_000),
        "max_length": 1000,
        "template": template,
        "sample_id": "clip-7",
    }
    return function(tokenizer, conversation, **{**fields, **options})


def picture(tokenizer, encoded) -> str:
    """The text of ids, learnt parts in [ ], a run of media tokens as <MEDIA>, byte tokens and blanks as what they mean."""
    from tokenizers import decoders

    media = find_media_token_id(tokenizer, 10_000)
    if tokenizer.bos_token_id is None:
        steps = [decoders.ByteLevel()]
    else:
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    decoder = decoders.Sequence(steps)
    shown = ""
    kinds = zip(encoded.tokens.tolist(), encoded.loss_mask.tolist(), strict=True)
    for (is_media, learnt), group in itertools.groupby(kinds, key=lambda pair: (pair[0] == media, pair[1])):
        ids = [index for index, _ in group]
        part = decoder.decode(tokenizer.convert_ids_to_tokens(ids)) if not is_media else "<MEDIA>"
        assert not is_media or len(ids) == MEDIA
        shown += f"[{part}]" if learnt else part
    return shown


@pytest.fixture(scope="module", params=["prepend", "metaspace"])
def llama(request):
    return make_llama_tokenizer(request.param)


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (
            turns("<video>\nWhat?", "A bell."),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<MEDIA>\nWhat?<|im_end|>\n"
            "<|im_start|>assistant\n[A bell.<|im_end|>\n]",
        ),
        (
            turns("What?\n<video>", "A bell.", "When?", "<|im_end|>", system=""),
            "<|im_start|>user\nWhat?\n<MEDIA><|im_end|>\n<|im_start|>assistant\n[A bell.<|im_end|>\n]"
            "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n[<|im_end|><|im_end|>\n]",
        ),
    ],
)
def test_chatml_learns_answers_their_end_and_a_newline(tokenizer, conversation, expected):
    assert picture(tokenizer, encode(tokenizer, CHATML, conversation)) == expected


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (
            turns("<video>\nWhat?", "A bell."),
            "<s> Be brief. USER: <MEDIA> \nWhat? ASSISTANT:[ A bell.</s>]",
        ),
        (
            turns("What?\n<video>", "A bell.", "When?", "Now.", "Why?", "Noon."),
            "<s> Be brief. USER: What?\n<MEDIA>{blank} ASSISTANT:[ A bell.</s>]"
            "{blank}USER: When? ASSISTANT:[ Now.</s>]{blank}USER: Why? ASSISTANT:[ Noon.</s>]",
        ),
        (
            turns("In <video>, what?", "A bell.", system="Hear."),
            "<s> Hear. USER: In <MEDIA> , what? ASSISTANT:[ A bell.</s>]",
        ),
        (
            turns("What?", "USER: no. ASSISTANT: A bell.</s>", "When?", "  Now. \n", system=""),
            "<s> USER: <MEDIA> \nWhat? ASSISTANT:[ USER: no. ASSISTANT: A bell.</s></s>]"
            "{blank}USER: When? ASSISTANT:[   Now. \n</s>]",
        ),
    ],
)
def test_vicuna_learns_answers_and_their_end(llama, conversation, expected):
    """The blank behind "ASSISTANT:" is the first learnt token's; other blanks ahead of text are the tokenizer's."""
    blank = (
        " " if llama.backend_tokenizer.normalizer is not None else ""
    )  # prepend: to every part of the text
    assert picture(llama, encode(llama, VICUNA, conversation)) == expected.format(blank=blank)


@pytest.mark.parametrize("question", ["<image>", "<image>\n", "\n<video>", ""])
@pytest.mark.parametrize("caption", ["a bell", "a bell.", "a bell\nand a drum", "bell</s><s>\n"])
def test_plain_learns_captions_and_a_newline(llama, tokenizer, question, caption):
    for each, head, blank in ((llama, "<s>", " "), (tokenizer, "", "")):
        encoded = encode(each, PlainTemplate(), turns(question, caption))
        assert picture(each, encoded) == f"{head}<MEDIA>[{blank}{caption}\n]"
        # The end is a token of its own, whatever the caption ends with, so generation can stop at it.
        assert encoded.tokens[-1] == end_of_turn_id(each, PlainTemplate())
        assert (encoded.rounds, encoded.dropped_rounds, encoded.dropped_questions) == (1, 0, 0)
        prompt = encode(each, PlainTemplate(), turns(question), encode_prompt)
        assert picture(each, prompt) == f"{head}<MEDIA>"


def test_plain_newline_is_no_part_of_a_token_with_the_full_stop():
    """Qwen2's word pattern joins them; the newline would then be none that generation could stop at."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate([*letters, ".\u010a"])}
    backend = Tokenizer(models.BPE(vocabulary, [(".", "\u010a")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    qwen = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(qwen.encode(".\n")) == 1
    assert picture(qwen, encode(qwen, PlainTemplate(), turns("<image>", "bell."))) == "<MEDIA>[bell.\n]"
    assert encode(qwen, PlainTemplate(), turns("<image>", "bell.")).tokens[-1] == vocabulary["\u010a"]


LCS = turns("Write a terse but informative summary of the picture.\n<image>", "a bell")  # LCS-558K's form


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        (LCS, {}, "leaves out the question's text.*drop_question=True"),
        ([{"from": "human", "value": "<image>", "verbatim": True}, LCS[1]], {}, "leaves out"),
        (turns("<image>", "a", "Why?", "b"), {}, "holds one caption, but the conversation has 2 rounds"),
        (turns("<image>", "a", system="Hear."), {}, "no place for the system text 'Hear.'"),
        (turns("<image>", "a"), {"system": "Hear."}, "no place for the system text 'Hear.'"),
        (turns("", "a"), {"num_media_tokens": 0}, "the sample has no media"),
        (turns("<image><image>", "a"), {}, "2 media placeholders"),
        (turns("<image>", " "), {}, "answer 0 is empty"),
        (turns("<image>"), {}, "no answer to learn"),
    ],
)
def test_plain_refuses_what_it_would_lose(tokenizer, conversation, options, message):
    with pytest.raises(ConversationError, match=f"sample 'clip-7': .*{message}"):
        encode(tokenizer, PlainTemplate(), conversation, **options)


def test_plain_drops_instructions_when_told_and_counts_them(tokenizer):
    template = PlainTemplate(drop_question=True)
    encoded = encode(tokenizer, template, LCS)
    assert picture(tokenizer, encoded) == "<MEDIA>[a bell\n]" and encoded.dropped_questions == 1
    assert encode(tokenizer, template, LCS, encode_prompt).dropped_questions == 1
    assert encode(tokenizer, template, turns("<image>\n", "a bell")).dropped_questions == 0
    for other in (ChatMLTemplate(), ChatMLTemplate(system="")):  # Their questions stay.
        assert encode(tokenizer, other, LCS).dropped_questions == 0


CASES = {
    "chatml": (CHATML, "<|im_end|>\n]"),
    "vicuna": (VICUNA, "</s>]"),
    "plain": (PlainTemplate(), "\n]"),
}


@pytest.fixture(
    scope="module", params=["chatml", "vicuna-prepend", "vicuna-metaspace", "plain-prepend", "plain"]
)
def case(request, tokenizer):
    """(tokenizer, template, how a kept round ends, conversations of one to four rounds, of one for plain)."""
    name, _, form = request.param.partition("-")
    rounds = [
        ("<video>\nWhich sound?", "bell"),
        ("And then?", "A drum."),
        ("When?", "At noon."),
        ("Why?", "So."),
    ]
    if name == "plain":
        rounds = [("<video>", "a bell rings twice")]
    whole = [turns(*itertools.chain(*rounds[: count + 1])) for count in range(len(rounds))]
    return make_llama_tokenizer(form) if form else tokenizer, *CASES[name], whole


def test_whole_rounds_are_dropped_from_the_end(case):
    """At every limit: what is kept is the conversation of fewer rounds, whole; the last one always complete."""
    tokenizer, template, end, conversations = case
    by_rounds = [encode(tokenizer, template, conversation) for conversation in conversations]
    lengths = [len(encoded.tokens) for encoded in by_rounds]
    assert lengths == sorted(set(lengths))
    for limit in range(lengths[0], lengths[-1] + 2):
        encoded = encode(tokenizer, template, conversations[-1], max_length=limit)
        kept = sum(length <= limit for length in lengths)
        assert (encoded.rounds, encoded.dropped_rounds) == (kept, len(lengths) - kept)
        np.testing.assert_array_equal(encoded.tokens, by_rounds[kept - 1].tokens)
        np.testing.assert_array_equal(encoded.loss_mask, by_rounds[kept - 1].loss_mask)
        shown = picture(tokenizer, encoded)
        assert shown.endswith(end) and shown.count("[") == kept and shown.count("<MEDIA>") == 1


@pytest.mark.parametrize("function", [encode_conversation, encode_prompt])
def test_media_that_do_not_fit_are_refused(case, function):
    """By the sample's id and its plan: never is a part of the media or of the first round given out."""
    tokenizer, template, _, conversations = case
    conversation = conversations[-1] if function is encode_conversation else conversations[-1][:-1]
    needed = encode(tokenizer, template, conversations[0])  # A training row needs its first round at least,
    if function is encode_prompt:
        needed = encode(tokenizer, template, conversation, encode_prompt)  # a prompt all of them.
    length = len(needed.tokens)
    np.testing.assert_array_equal(
        encode(tokenizer, template, conversation, function, max_length=length).tokens, needed.tokens
    )
    for limit in (1, MEDIA - 1, length - 1):
        with pytest.raises(DoesNotFit, match="sample 'clip-7' does not fit.*text.max_length") as caught:
            encode(tokenizer, template, conversation, function, max_length=limit)
        plan = caught.value.plan
        assert (plan.media_tokens, plan.text_tokens, plan.limit) == (MEDIA, length - MEDIA, limit)


def test_system_texts_of_vicuna():
    tokenizer = make_llama_tokenizer("prepend")
    conversation = turns("What?", "A bell.")

    def opening(conversation, template=VICUNA, **options) -> str:
        return picture(tokenizer, encode(tokenizer, template, conversation, **options)).partition("<MEDIA>")[
            0
        ]

    standard = opening(conversation, VicunaTemplate())
    assert standard.startswith(
        "<s> A chat between a curious user and an artificial intelligence assistant. The"
    )
    assert standard.endswith("answers to the user's questions. USER: ")
    assert opening(conversation, system="Hear.") == "<s> Hear. USER: "
    assert opening([{"from": "system", "value": "See."}, *conversation], system="Hear.") == "<s> See. USER: "
    assert (
        opening(conversation, system="") == opening(conversation, VicunaTemplate(system="")) == "<s> USER: "
    )


def test_templates_name_what_a_tokenizer_lacks(tokenizer):
    llama = make_llama_tokenizer("prepend")
    with pytest.raises(UserError, match="no control token '</s>'"):
        encode(tokenizer, VICUNA, turns("What?", "A bell."))
    with pytest.raises(UserError, match="no control token '<|im_start|>'"):
        encode(llama, CHATML, turns("What?", "A bell."))
    with pytest.raises(UserError, match="no control token '</s>'"):
        end_of_turn_id(tokenizer, VICUNA)
    assert end_of_turn_id(llama, VICUNA) == llama.eos_token_id == 2
    assert end_of_turn_id(tokenizer, CHATML) == tokenizer.eos_token_id


def test_padding(spec, tokenizer):
    """LLaMA has no pad token: 0, its <unk>, as in LLaVA; Qwen2 has <|endoftext|>. No mask shows either."""
    for each, expected in ((make_llama_tokenizer("prepend"), 0), (tokenizer, tokenizer.pad_token_id)):
        media_id = find_media_token_id(each, 10_000)
        builder = SampleBuilder(spec, each, media_id, MEDIA, 64, template=PlainTemplate())
        arrays = builder.padding_row().arrays
        assert (arrays["tokens"] == expected).all()
        assert not arrays["segment_ids"].any() and not arrays["loss_mask"].any()
