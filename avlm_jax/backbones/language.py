"""A tiny Qwen2 that can answer questions about a scene it is told in words, and its tokenizer.

The scene stands where media tokens stand later: 64 words, four a moment. Noise on their embeddings makes the model read
vectors that are near a word as that word, which is what a resampler will send it.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from avlm_jax.llm.decoder import Decoder, DecoderConfig, causal_mask
from avlm_jax.lora import LoraConfig
from input_pipeline.synthetic.described import DescribedScene, corpus, describe
from input_pipeline.synthetic.questions import LETTERS

# Qwen2's control tokens (Qwen2 tokenizer_config.json) and the placeholder that media tokens replace.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|media|>")
VOCAB_SIZE = 640
# Letters with one leading space, digits in threes, other signs: few, whole tokens for short texts.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class LanguageRecipe:
    """How the tiny language model is trained; the defaults are what made the shipped one."""

    seed: int = 0
    steps: int = 8000
    batch_size: int = 24
    length: int = 224
    lr: float = 0.02
    adam_lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.01
    # Weight of the loss of all tokens that are no answers.
    text_weight: float = 0.0
    # Share of scenes with drills instead of questions: from the first step on, and once `drill_steps` are over.
    drills: tuple[float, float] = (0.9, 0.15)
    drill_steps: int = 1500
    noise: float = 0.5  # Largest deviation of the scene's embeddings, in units of their root mean square ...
    noise_steps: int = 1500  # ... reached after so many steps.
    # From which step on a scene has up to so many events; the level itself is drawn from 1..that number.
    curriculum: tuple[tuple[int, int], ...] = ((0, 2), (1000, 4), (2000, 6))


DEMO_DECODER = DecoderConfig(
    vocab_size=VOCAB_SIZE,
    width=128,
    depth=4,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=384,
    tie_embeddings=True,
    dtype="float32",
    remat=False,
    lora=LoraConfig(rank=0),
)


def train_tokenizer(seed: int = 0, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen2's, learnt on described scenes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, 3000), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class TextBatcher:
    """Turns described scenes into token rows: one dialogue a row, the scene's words in its first turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int):
        self.backend = tokenizer.backend_tokenizer
        self.length = length
        ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
        newline = self._ids(["\n"])[0]
        user, assistant = self._ids(["user\n", "assistant\n"])
        self.user = [ids["<|im_start|>"], *user]
        self.assistant = [ids["<|im_start|>"], *assistant]
        self.end = [ids["<|im_end|>"], *newline]
        self.newline = newline
        self.pad = ids["<|endoftext|>"]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]

    def rows(self, scenes: list[DescribedScene]) -> dict[str, np.ndarray]:
        """tokens i32 [b l], target bool [b l], scene bool [b l] (True at the words of the description), valid bool [b l]."""
        texts: list[str] = []
        for scene in scenes:
            texts.append(" " + " ".join(scene.words))
            for question, answer in scene.dialogue:
                texts += [question, answer]
        encoded = iter(self._ids(texts))
        shape = (len(scenes), self.length)
        tokens = np.full(shape, self.pad, np.int32)
        target, told, valid = (np.zeros(shape, bool) for _ in range(3))
        for row, scene in enumerate(scenes):
            words = next(encoded)
            if len(words) != len(scene.words):
                raise ValueError(f"{len(scene.words)} words became {len(words)} tokens: the tokenizer splits a word")
            ids: list[int] = []
            marks: list[bool] = []
            for turn in range(len(scene.dialogue)):
                question, answer = next(encoded), next(encoded)
                prompt = [*self.user, *(words + self.newline if turn == 0 else []), *question, *self.end, *self.assistant]
                if len(ids) + len(prompt) + len(answer) + 2 > self.length:
                    for _ in range(turn + 1, len(scene.dialogue)):
                        next(encoded), next(encoded)
                    break
                if turn == 0:
                    told[row, len(self.user) : len(self.user) + len(words)] = True
                ids += [*prompt, *answer, *self.end]
                marks += [False] * len(prompt) + [True] * (len(answer) + 1) + [False] * (len(self.end) - 1)
            tokens[row, : len(ids)] = ids
            target[row, : len(marks)] = marks
            valid[row, : len(ids)] = True
        return {"tokens": tokens, "target": target, "scene": told, "valid": valid}


def batches(recipe: LanguageRecipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, np.ndarray]]:
    """The training batches in order: a pure function of the recipe, made a few steps ahead in a thread."""
    batcher = TextBatcher(tokenizer, recipe.length)
    ready: queue.Queue = queue.Queue(maxsize=4)

    def fill() -> None:
        for step in range(recipe.steps):
            rng = np.random.default_rng([recipe.seed, 0x7E87, step])
            most = max(level for start, level in recipe.curriculum if start <= step)
            # Half of the scenes are of the hardest kind reached so far, so that time is not spent on easy ones.
            levels = [most if rng.random() < 0.5 else int(rng.integers(1, most + 1)) for _ in range(recipe.batch_size)]
            progress = min(1.0, step / recipe.drill_steps)
            share = recipe.drills[0] + (recipe.drills[1] - recipe.drills[0]) * progress
            batch = batcher.rows([describe(rng, level, drill_share=share) for level in levels])
            scale = recipe.noise * min(1.0, step / recipe.noise_steps) * rng.random((recipe.batch_size, 1), dtype=np.float32)
            ready.put(batch | {"noise": np.float32(scale), "key": np.uint32(step)})

    threading.Thread(target=fill, daemon=True).start()
    for _ in range(recipe.steps):
        yield ready.get()


def logits_of(model: Decoder, batch: dict[str, Array]) -> Float[Array, "b l v"]:
    """Next-token logits; the description's embeddings get Gaussian noise where the batch asks for it."""
    tokens = batch["tokens"]
    x = model.embed(tokens)
    if "noise" in batch:
        rms = jnp.sqrt(jnp.mean(jnp.square(model.embedding["embedding"])))
        noise = jax.random.normal(jax.random.key(batch["key"]), x.shape) * rms * batch["noise"][:, :, None]
        x = x + jnp.where(batch["scene"][:, :, None], noise, 0.0)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = model(x, positions, causal_mask(batch["valid"].astype(jnp.int32)))
    return hidden @ model.head_kernel()


def loss_and_hits(logits: Array, batch: dict[str, Array], text_weight: float) -> tuple[Array, tuple[Array, Array]]:
    """(what is minimised, (mean cross-entropy of the answers, which of their tokens [b l-1] are predicted right))."""
    tokens, mask = batch["tokens"][:, 1:], batch["target"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens)
    hits = (jnp.argmax(logits[:, :-1], -1) == tokens) & mask
    answers = jnp.sum(losses * mask) / jnp.maximum(jnp.sum(mask), 1)
    rest = batch["valid"][:, 1:] & ~mask
    text = jnp.sum(losses * rest) / jnp.maximum(jnp.sum(rest), 1)
    return answers + text_weight * text, (answers, hits)


def make_optimizer(recipe: LanguageRecipe) -> optax.GradientTransformation:
    """Muon for the blocks' matrices, Adam for embeddings, norms and biases; one cosine for both."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, recipe.warmup, recipe.steps, peak * 0.02)

    def dimensions(params):
        # The layers' leading axis is a stack, not a dimension of the matrix.
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda x: matrix if x.ndim == 3 else None, params)

    muon = optax.contrib.muon(
        schedule(recipe.lr),
        adam_b2=0.98,
        weight_decay=recipe.weight_decay,
        adam_learning_rate=schedule(recipe.adam_lr),
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def train(
    recipe: LanguageRecipe,
    config: DecoderConfig,
    tokenizer: PreTrainedTokenizerFast,
    log: Callable[[dict], None],
    log_every: int = 25,
    keep: Callable[[int, dict], None] | None = None,
) -> dict:
    """Trains the decoder and returns its parameters.

    Args:
        recipe: how.
        config: the decoder's sizes.
        tokenizer: from `train_tokenizer`.
        log: gets a line of averages every `log_every` steps.
        keep: gets (step, parameters) at the same times, to save what there is.
    """
    letters = np.asarray([tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS])
    model = Decoder(config)
    optimizer = make_optimizer(recipe)

    @jax.jit
    def init(key):
        tokens = jnp.zeros((1, 8), jnp.int32)
        batch = {"tokens": tokens, "valid": tokens == 0, "scene": tokens > 0}
        return model.init(key, batch, method=logits_of)["params"]

    @jax.jit
    def step(params, state, batch):
        def loss_fn(params):
            logits = model.apply({"params": params}, batch, method=logits_of)
            return loss_and_hits(logits, batch, recipe.text_weight)

        (_, (loss, hits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        is_letter = jnp.isin(batch["tokens"][:, 1:], letters) & batch["target"][:, 1:]
        counts = jnp.stack([jnp.sum(hits), jnp.sum(batch["target"]), jnp.sum(hits & is_letter), jnp.sum(is_letter)])
        return optax.apply_updates(params, updates), state, loss, counts

    params = init(jax.random.key(recipe.seed))
    state = optimizer.init(params)
    begun = time.monotonic()
    losses: list[float] = []
    counts = np.zeros(4)
    for number, batch in enumerate(batches(recipe, tokenizer), start=1):
        params, state, loss, count = step(params, state, batch)
        losses.append(float(loss))
        counts += np.asarray(count)
        if number % log_every == 0 or number == recipe.steps:
            log(
                {
                    "part": "language",
                    "step": number,
                    "loss": round(float(np.mean(losses)), 4),
                    "accuracy": round(float(counts[0] / counts[1]), 4),
                    "letter_accuracy": round(float(counts[2] / counts[3]), 4),
                    "seconds": round(time.monotonic() - begun, 1),
                }
            )
            losses, counts = [], np.zeros(4)
            if keep is not None:
                keep(number, params)
    return params
