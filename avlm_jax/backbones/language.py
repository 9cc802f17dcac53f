"""A tiny Qwen2 that can answer questions about a scene it is told in words, and its tokenizer.

The scene stands where media tokens stand later: 16 vectors, one a moment, each the sum of its words' embeddings. Noise on
them makes the model read a vector that is near a bag of words as these words, which is what a resampler will send it.
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
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from avlm_jax.layers.mask import causal_mask
from avlm_jax.llm.decoder import Decoder, DecoderConfig
from avlm_jax.models.api import MediaTokens, splice
from input_pipeline.synthetic.described import DescribedScene, corpus, describe
from input_pipeline.synthetic.scene import MOMENTS

# Qwen2's control tokens (Qwen2 tokenizer_config.json) and the placeholder that media tokens replace.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|media|>")
VOCAB_SIZE = 640
WORDS_PER_MOMENT = 4  # Colour, shape, motion, sound; see synthetic/tasks.py.
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
    steps: int = 1500
    batch_size: int = 32
    length: int = 176
    lr: float = 0.02  # Muon's, for the blocks' matrices.
    adam_lr: float = 3e-3  # For embeddings, norms, biases.
    warmup: int = 100
    weight_decay: float = 0.01
    # Share of scenes with drills instead of questions: from the first step on, and once `drill_steps` are over.
    drills: tuple[float, float] = (0.9, 0.15)
    drill_steps: int = 700
    noise: float = (
        0.5  # Largest deviation of the moments' vectors, in units of the embeddings' root mean square ...
    )
    noise_steps: int = 800  # ... reached after so many steps.
    # From which step on a scene has up to so many events; half of the scenes have them all, the others fewer.
    curriculum: tuple[tuple[int, int], ...] = ((0, 4), (200, 6))


def train_tokenizer(seed: int = 0, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen2's, learnt on described scenes."""
    tokenizer = Tokenizer(models.BPE())
    # A word is one and the same token at the start of a text and within it: look-ups compare tokens.
    tokenizer.normalizer = normalizers.Prepend(" ")
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
    """Turns described scenes into token rows: one dialogue a row, placeholders for the moments in its first turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int):
        self.backend = tokenizer.backend_tokenizer
        self.length = length
        ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
        user, assistant, newline = self._ids(["user\n", "assistant\n", "\n"])
        self.user = [ids["<|im_start|>"], *user]
        self.assistant = [ids["<|im_start|>"], *assistant]
        self.end = [ids["<|im_end|>"], *newline]
        self.pad, self.media = ids["<|endoftext|>"], ids["<|media|>"]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]

    def rows(self, scenes: list[DescribedScene]) -> dict[str, np.ndarray]:
        """tokens i32 [b l], target bool [b l], valid bool [b l], and the moments' words i32 [b moments 4]."""
        texts: list[str] = []
        for scene in scenes:
            texts.append(" ".join(scene.words))
            for question, answer in scene.dialogue:
                texts += ["\n" + question, answer]
        encoded = iter(self._ids(texts))
        shape = (len(scenes), self.length)
        tokens = np.full(shape, self.pad, np.int32)
        target, valid = np.zeros(shape, bool), np.zeros(shape, bool)
        moments = np.zeros((len(scenes), MOMENTS, WORDS_PER_MOMENT), np.int32)
        for row, scene in enumerate(scenes):
            words = next(encoded)
            if len(words) != moments[row].size:
                raise ValueError(
                    f"{moments[row].size} words became {len(words)} tokens: the tokenizer splits a word"
                )
            moments[row] = np.reshape(words, moments[row].shape)
            dialogue = [(next(encoded), next(encoded)) for _ in scene.dialogue]
            ids: list[int] = []
            marks: list[bool] = []
            for turn, (question, answer) in enumerate(dialogue):
                media = [self.media] * MOMENTS if turn == 0 else []
                prompt = [*self.user, *media, *question, *self.end, *self.assistant]
                if len(ids) + len(prompt) + len(answer) + len(self.end) > self.length:
                    break
                ids += [*prompt, *answer, *self.end]
                marks += [False] * len(prompt) + [True] * (len(answer) + len(self.end))
            tokens[row, : len(ids)] = ids
            target[row, : len(marks)] = marks
            valid[row, : len(ids)] = True
        return {"tokens": tokens, "target": target, "valid": valid, "moments": moments}


def batches(recipe: LanguageRecipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, np.ndarray]]:
    """The training batches in order: a pure function of the recipe, made a few steps ahead in a thread."""
    batcher = TextBatcher(tokenizer, recipe.length)
    ready: queue.Queue = queue.Queue(maxsize=4)

    def fill() -> None:
        for step in range(recipe.steps):
            rng = np.random.default_rng([recipe.seed, 0x7E87, step])
            most = max(level for start, level in recipe.curriculum if start <= step)
            levels = [
                most if rng.random() < 0.5 else int(rng.integers(1, most + 1))
                for _ in range(recipe.batch_size)
            ]
            progress = min(1.0, step / recipe.drill_steps)
            share = recipe.drills[0] + (recipe.drills[1] - recipe.drills[0]) * progress
            batch = batcher.rows([describe(rng, level, drill_share=share) for level in levels])
            scale = (
                recipe.noise
                * min(1.0, step / recipe.noise_steps)
                * rng.random((recipe.batch_size, 1), dtype=np.float32)
            )
            ready.put(batch | {"noise": np.float32(scale), "key": np.uint32(step)})

    threading.Thread(target=fill, daemon=True).start()
    for _ in range(recipe.steps):
        yield ready.get()


def logits_of(model: Decoder, batch: dict[str, Array], media_token_id: int) -> Float[Array, "b l v"]:
    """Next-token logits of dialogues about described scenes.

    A moment is one vector, the scaled sum of its four words' embeddings: what belongs together stands in one place, as in the
    tokens of a resampler. Gaussian noise of the batch's deviations [b 1] is added to it.
    """
    tokens = batch["tokens"]
    words = model.embed(batch["moments"])
    moments = words.sum(axis=2) * WORDS_PER_MOMENT**-0.5
    if "noise" in batch:
        rms = jnp.sqrt(jnp.mean(jnp.square(model.embedding["embedding"])))
        noise = jax.random.normal(jax.random.key(batch["key"]), moments.shape) * rms
        moments = moments + noise * batch["noise"][:, :, None]
    media = MediaTokens(moments, jnp.ones(moments.shape[:2], bool))
    x, segments = splice(model.embed(tokens), tokens, batch["valid"].astype(jnp.int32), media, media_token_id)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = model(x, positions, causal_mask(segments))
    return hidden @ model.head_kernel()


def loss_and_hits(logits: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
    """(mean cross-entropy of the answers' tokens, which of them [b l-1] are predicted right)."""
    tokens, mask = batch["tokens"][:, 1:], batch["target"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens)
    hits = (jnp.argmax(logits[:, :-1], -1) == tokens) & mask
    return jnp.sum(losses * mask) / jnp.maximum(jnp.sum(mask), 1), hits


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


def rescale(params: dict) -> dict:
    """Fresh parameters with louder embeddings and quieter block outputs.

    At width 128 a block's first output is twenty times as large as an embedding of deviation 0.02: the tokens' identity,
    which look-ups need, would drown until training has turned that round.
    """
    layers = params["layers"]
    for part, name in (("attn", "o"), ("mlp", "down")):
        layers[part][name]["kernel"] = layers[part][name]["kernel"] * 0.1
    params["embed"]["embedding"] = params["embed"]["embedding"] * 8.0
    return params


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
    media_token_id = tokenizer.convert_tokens_to_ids("<|media|>")
    model = Decoder(config)
    optimizer = make_optimizer(recipe)

    @jax.jit
    def init(key):
        tokens = jnp.zeros((1, 8), jnp.int32)
        moments = jnp.zeros((1, MOMENTS, WORDS_PER_MOMENT), jnp.int32)
        batch = {"tokens": tokens, "valid": tokens == 0, "moments": moments}
        return model.init(key, batch, media_token_id, method=logits_of)["params"]

    @jax.jit
    def step(params, state, batch):
        def loss_fn(params):
            logits = model.apply({"params": params}, batch, media_token_id, method=logits_of)
            return loss_and_hits(logits, batch)

        (loss, hits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        counts = jnp.stack([jnp.sum(hits), jnp.sum(batch["target"])])
        return optax.apply_updates(params, updates), state, loss, counts

    params = rescale(init(jax.random.key(recipe.seed)))
    state = optimizer.init(params)
    begun = time.monotonic()
    losses: list[float] = []
    counts = np.zeros(2)
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
                    "seconds": round(time.monotonic() - begun, 1),
                }
            )
            losses, counts = [], np.zeros(2)
            if keep is not None:
                keep(number, params)
    return params
