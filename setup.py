"""Packages, dependencies and the `avlm` command. The one place that says what the project needs.

The exact versions that `make install` takes are resolved from here into requirements/lock-py*.txt by `make
lock`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version, read and not imported: at build time the dependencies are not there yet."""
    text = (ROOT / "avlm_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


def readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


# Neither torch nor TensorFlow: weights are read from safetensors, and PyAV is the only media decoder.
CORE = [
    # JAX 0.11 dropped Python 3.11; flax up to 0.12.8 needs a JAX before 0.11.1, later ones that or newer.
    # Flax states no upper bound, so the pairs are held here.
    "jax>=0.10.2,<0.11; python_version < '3.12'",
    "flax>=0.12.8,<0.12.9; python_version < '3.12'",
    "jax>=0.11.1,<0.13; python_version >= '3.12'",
    "flax>=0.12.12,<0.13; python_version >= '3.12'",
    "absl-py>=2.3,<3",
    "apache-beam>=2.77,<3",  # Runs `avlm prepare`, here or on Dataflow, Flink and Spark.
    "array_record>=0.8.3,<0.9",
    # FFmpeg before 8.1.2 has known holes (CVE-2026-8461); PyAV 18.1 is the first to bring 8.1.2.
    "av>=18.1,<20",
    "clu>=0.0.12,<0.1",
    "etils>=1.12,<2",
    "grain>=0.2.18,<0.3",
    "huggingface_hub>=1",  # transformers holds the version.
    "jaxtyping>=0.3,<0.4",
    "jinja2>=3.1,<4",  # transformers renders chat templates with it and does not declare it.
    "matplotlib>=3.10,<4",
    "ml-collections>=1.1,<2",
    "ml_dtypes>=0.5,<0.7",
    "msgpack>=1.1,<2",
    "numpy>=2.2,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=12",
    "safetensors>=0.8,<0.9",
    "simplejpeg>=1.9,<2",  # libjpeg-turbo straight into an array: Pillow takes 1.5 times as long over a record's frames.
    "tensorboardX>=2.6.2,<3",
    "tokenizers>=0.22",  # transformers holds the version.
    "tqdm>=4.66,<5",
    "transformers>=5.16,<6",  # Tokenizers, configurations and image processors only.
]

EXTRAS = {
    # libtpu holds XLA's compiler for TPUs as well, which needs no TPU (`avlm preflight`); JAX pins the release that fits it.
    "tpu": ["jax[tpu]"],
    "gpu": ["jax[cuda12]"],
    # Peers of the parity tests, and what an exported model runs on.
    "torch": ["torch==2.13.0", "kaldi-native-fbank>=1.22,<1.23", "peft>=0.18", "speechbrain>=1.0.3,<2"],
    # gs:// paths and the Dataflow runner.
    "gcp": ["apache-beam[gcp]>=2.77,<3", "gcsfs>=2025.1,<2027"],
    "wandb": ["wandb>=0.22,<1"],
    "dev": [
        "hypothesis>=6.150,<7",
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17.5,<0.18",
        "setuptools>=77",  # Builds this package; being locked, `make install` fetches nothing unlocked.
    ],
}

setup(
    name="avlm_jax",
    version=version(),
    description="Audio-visual video language models in JAX and Flax, trained on TPU pods.",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # By name: `configs/` is loaded by path, tests and benchmarks stay in the repository.
    packages=find_packages(include=["avlm_jax", "avlm_jax.*", "input_pipeline", "input_pipeline.*"]),
    package_data={"avlm_jax": ["demo_backbones/**"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["avlm = avlm_jax.cli:main"]},
    zip_safe=False,
)
