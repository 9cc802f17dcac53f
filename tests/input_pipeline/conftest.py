"""A tiny tokenizer with Qwen2's control tokens, trained on the spot, and tiny records."""

from __future__ import annotations

import numpy as np
import pytest

from input_pipeline.media import LoadedMedia
from input_pipeline.records import encode_record
from input_pipeline.spec import MediaSpec
from tests.record_folder import write_folder

TEXT = """system user assistant You are a helpful assistant.
Which sound is heard while the red circle moves? Between 00:00:05.250 and 00:00:10.000
Answer with the letter of the right option. A: bell B: drum C: whistle D: buzz video image audio
""".splitlines(keepends=True)


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|media|>"],
    )
    # Qwen2.5 has such tokens: added to the vocabulary, not flagged special.
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer


@pytest.fixture(scope="session")
def spec() -> MediaSpec:
    return MediaSpec(num_frames=2, image_size=8, window_frames=16, max_windows=2, max_intervals=3)


@pytest.fixture(scope="session")
def make_records(spec):
    """(folder, number of records, ...) -> folder; a record has two samples, "<name>-<record>-<sample>".

    `words`: the questions are longer by 0, 1, 2, 3 times so many words, in turn.
    """

    def make(
        folder,
        count: int,
        *,
        name: str = "s",
        video: bool = True,
        audio: bool = True,
        tasks=("one", "two"),
        words: int = 0,
    ) -> str:
        records = []
        for number in range(count):
            frames = np.full((spec.num_frames, 8, 8, 3), 40 + number, np.uint8)
            pcm = np.full(spec.window_samples, (number + 1) / 1024, np.float32)
            media = LoadedMedia(
                frames=frames if video else frames[:0],
                frame_times=np.arange(2.0) if video else np.zeros(0),
                windows=[(0.0, len(pcm) / 16_000, pcm)] if audio else [],
                duration=2.0,
            )
            samples = [
                {
                    "id": f"{name}-{number}-{index}",
                    "task": task,
                    "conversations": [
                        {
                            "from": "human",
                            "value": f"<video>\nAt 00:01, what is heard in {number}?"
                            + " bell" * (words * ((2 * number + index) % 4)),
                        },
                        {"from": "gpt", "value": f"sound {number}.{index}"},
                    ],
                }
                for index, task in enumerate(tasks)
            ]
            records.append(encode_record(media, media_id=f"{name}-{number}", source=name, samples=samples))
        write_folder(folder, spec, records, manifest_lines=count * len(tasks))
        return str(folder)

    return make
