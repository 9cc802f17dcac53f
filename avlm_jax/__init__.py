"""avlm_jax: audio-visual video LLMs in JAX/Flax, trained on TPU pods."""

__version__ = "0.1.0"
