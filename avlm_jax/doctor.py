"""Checks this installation: versions that fit together, the media library, devices, memory, and known traps.

Nothing is changed, but for the environment that --make-tfio-venv asks for. The exit code is 1 if something would
keep avlm from working or makes it unsafe.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from avlm_jax import __version__
from input_pipeline.errors import UserError

EPILOG = """examples:
  avlm doctor
  avlm doctor --json > doctor.json      to attach to a report of a problem
  avlm doctor --make-tfio-venv          build .venv-tfio for `avlm prepare --audio-backend tfio`
"""

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array_record",
    "apache-beam",
    "av",
    "numpy",
    "transformers",
    "safetensors",
    "simplejpeg",
    "ml-collections",
)

OLDEST_PYTHON = (3, 11)
OLDEST_FFMPEG = (8, 1, 2)  # Older ones write out of bounds on crafted files: CVE-2026-8461, CVE-2026-40962.
OLDEST_TORCH = (2, 10)  # Older ones: CVE-2026-24747, heap corruption by a weights file despite weights_only.
# flax up to 0.12.8 uses hijax.MutableHiType, which JAX 0.11.1 removed; flax 0.12.12 requires that JAX.
LAST_OLD_FLAX, FIRST_NEW_JAX = (0, 12, 8), (0, 11, 1)
TFIO_VENV = ".venv-tfio"
TFIO_MARKER = "avlm-installed"  # requirements/install.py leaves it where it installs one lock file alone.
TFIO_PYTHONS = ((3, 11), (3, 12))  # What both this project and the wheels of tensorflow-cpu 2.16 run on.
LITTLE_SHARED_MEMORY = 2**30  # bytes. Docker gives 64 MiB; a batch of 8 clips takes 60 MB, and several wait.
LITTLE_MEMORY = 4 * 2**30  # bytes. Loading, compiling and training side by side are tight below.

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report. `remedy` says what to do about it and is empty when all is well."""

    name: str
    value: str
    status: str = OK
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument(
        "--make-tfio-venv",
        metavar="DIR",
        nargs="?",
        const=TFIO_VENV,
        help="first build the environment of the tensorflow-io audio backend there (%(const)s; 1.6 GB)",
    )


def run(args: argparse.Namespace) -> int:
    tfio_python = make_tfio_venv(args.make_tfio_venv) if args.make_tfio_venv is not None else None
    checks = [
        *check_system(),
        *check_packages(installed_versions()),
        *check_media(),
        *check_tfio(tfio_python),
        *check_devices(),
    ]
    problems = [check for check in checks if check.status == PROBLEM]
    if args.json:
        report = {
            "ok": not problems,
            "avlm_jax": __version__,
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        print(json.dumps(report, indent=2))
        return 1 if problems else 0
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:<7}  {check.name:<{width}}  {check.value}")
        if check.remedy:
            print(f"{'':<7}  {'':<{width}}  -> {check.remedy}")
    print(f"\n{len(problems)} problem(s) found." if problems else "\nAll is well.")
    return 1 if problems else 0


def check_system() -> Iterator[Check]:
    """The interpreter and the machine."""
    yield Check("avlm_jax", f"{__version__} in {Path(__file__).parent}")
    python = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info >= OLDEST_PYTHON:
        yield Check("python", python)
    else:
        yield Check("python", python, PROBLEM, "Python 3.11 or newer is needed")
    yield Check("platform", f"{platform.system()} {platform.machine()}")
    yield Check("cpu cores", str(usable_cores()))
    memory = memory_bytes()
    if memory is not None:
        scarce = memory < LITTLE_MEMORY
        remedy = "4 GiB are advisable even for the demo" if scarce else ""
        yield Check("memory", f"{memory / 2**30:.1f} GiB", NOTE if scarce else OK, remedy)
    shared = shared_memory_bytes()
    if shared is not None:
        scarce = shared < LITTLE_SHARED_MEMORY
        remedy = "config.loader.workers pass batches through it; give a container more (docker --shm-size)"
        yield Check(
            "shared memory", f"{shared / 2**30:.1f} GiB", NOTE if scarce else OK, remedy if scarce else ""
        )


def check_packages(versions: dict[str, str | None]) -> Iterator[Check]:
    """The packages of `versions` (None: not installed): do they fit together, is one unsafe or unneeded."""
    for name in PACKAGES:
        version = versions.get(name)
        if version is None:
            yield Check(name, "not installed", PROBLEM, "run `make install`, or `pip install -e .`")
        else:
            yield Check(name, version)
    jax, jaxlib, flax = (versions.get(name) for name in ("jax", "jaxlib", "flax"))
    if jax and jaxlib and numbers(jax)[:3] != numbers(jaxlib)[:3]:
        yield Check("jax pair", f"jax {jax} with jaxlib {jaxlib}", PROBLEM, f"pip install jaxlib=={jax}")
    if jax and flax and (numbers(flax) <= LAST_OLD_FLAX) != (numbers(jax) < FIRST_NEW_JAX):
        yield Check(
            "flax pair",
            f"flax {flax} with jax {jax}",
            PROBLEM,
            "flax 0.12.8 goes with jax 0.10.2 (Python 3.11), flax 0.12.12 with jax from 0.11.1 (Python 3.12)",
        )
    torch = versions.get("torch")
    if torch and numbers(torch) < OLDEST_TORCH:
        yield Check(
            "torch", torch, PROBLEM, "older than 2.10: a crafted weights file can take it over; upgrade it"
        )
    elif torch:
        yield Check("torch", f"{torch} (only parity tests and exported models use it)")
    if versions.get("tensorflow"):
        yield Check("tensorflow", f"{versions['tensorflow']} (not used)")
    if versions.get("tensorflow-io"):
        remedy = "no tensorflow-io works beside this JAX; `avlm doctor --make-tfio-venv` makes it a place"
        yield Check("tensorflow-io", str(versions["tensorflow-io"]), NOTE, remedy)


def check_media() -> Iterator[Check]:
    """PyAV and the FFmpeg inside it."""
    try:
        import av
        from av.codec import Codec
    except ImportError as error:
        yield Check("ffmpeg", f"PyAV cannot be imported: {error}", PROBLEM, 'pip install "av>=18.1"')
        return
    ffmpeg = str(av.ffmpeg_version_info)
    if numbers(ffmpeg) < OLDEST_FFMPEG:
        yield Check(
            "ffmpeg", f"{ffmpeg} inside PyAV", PROBLEM, 'older than 8.1.2 and unsafe: pip install "av>=18.1"'
        )
    else:
        yield Check("ffmpeg", f"{ffmpeg} inside PyAV")
    missing = []
    for codec, mode in (("h264", "r"), ("aac", "r"), ("libx264", "w"), ("aac", "w")):
        try:
            Codec(codec, mode)
        except av.codec.codec.UnknownCodecError:
            missing.append(f"{codec} ({'decoder' if mode == 'r' else 'encoder'})")
    if missing:
        remedy = (
            "PyAV was built against another FFmpeg; take its wheel: pip install --only-binary av --force av"
        )
        yield Check("codecs", "missing: " + ", ".join(missing), PROBLEM, remedy)
    else:
        yield Check("codecs", "H.264 and AAC, reading and writing")


def check_tfio(python: str | None = None) -> Iterator[Check]:
    """The environment of the tensorflow-io audio backend, where there is one; it is started."""
    try:
        from input_pipeline.tfio_audio import DEFAULT_PYTHON, PYTHON_VARIABLE, backend_versions, tfio_python
    except ImportError:
        return  # PyAV cannot be imported, which has its own line.
    if not python and not os.environ.get(PYTHON_VARIABLE) and not Path(DEFAULT_PYTHON).exists():
        return
    try:
        python = tfio_python(python)
        versions = backend_versions(python)
    except UserError as error:
        yield Check("tfio backend", f"broken: {error}", PROBLEM, "build it anew, or remove its folder")
        return
    yield Check(
        "tfio backend",
        f"tensorflow-io {versions['tensorflow_io']} with tensorflow {versions['tensorflow']} and Python "
        f"{versions['python']}, its native operations run: {python}",
    )


def make_tfio_venv(folder: str, root: Path = Path(__file__).parents[1]) -> str:
    """Builds the environment of the tensorflow-io audio backend in `folder`; returns the path of its Python.

    Args:
        folder: to be made; one that is such an environment already is brought up to date.
        root: the repository, whose requirements/ say what goes in, with versions and hashes.

    Raises:
        UserError: no repository, no Python that fits, another folder there, or pip failed.
    """
    installer, lock = root / "requirements" / "install.py", root / "requirements" / "tfio-py311.txt"
    for file in (installer, lock):
        if not file.is_file():
            raise UserError(f"--make-tfio-venv: {file} is not here; run it in a checkout of the repository")
    if not folder:
        raise UserError(f"--make-tfio-venv is empty; name a new folder, or nothing for {TFIO_VENV}")
    target = Path(folder).absolute()
    if not may_become_tfio(target):
        raise UserError(f"--make-tfio-venv {folder}: there is something else; name a new folder")
    command = [find_tfio_python(), str(installer), str(target), "--only", str(lock)]
    # Its own output is progress; standard output stays the report's.
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code:
        raise UserError(
            f"--make-tfio-venv {folder}: the installation failed with exit code {code}, see above"
        )
    return str(target / "bin" / "python")


def may_become_tfio(target: Path) -> bool:
    """Whether nothing is lost by installing there: what is new, empty, or was made for tensorflow-io."""
    if not target.is_dir():
        return not os.path.lexists(target)
    made_for_it = (target / TFIO_MARKER).is_file() or any(
        target.glob("lib/python3.*/site-packages/tensorflow_io")
    )
    return made_for_it or not any(target.iterdir())


def find_tfio_python() -> str:
    """A Python 3.11 or 3.12: this one, else one on the PATH. UserError if there is none."""
    if sys.version_info[:2] in TFIO_PYTHONS:
        return sys.executable
    for version in TFIO_PYTHONS:
        name = "python{}.{}".format(*version)
        path = shutil.which(name)
        # It must run: pyenv puts a name on the PATH for every version that any of its folders has.
        asked = [path, "-c", "import sys; print('python%d.%d' % sys.version_info[:2])"]
        if path and subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == name:
            return path
    raise UserError(
        "--make-tfio-venv: tensorflow-io has wheels for Python up to 3.12, this is "
        f"{platform.python_version()}, and neither python3.11 nor python3.12 is on the PATH; install one of "
        "them, from your system's packages or with `uv python install 3.12`"
    )


def check_devices() -> Iterator[Check]:
    """What JAX computes on, and accelerators it does not see."""
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # Plugins raise what they like; the report must come out all the same.
        yield Check(
            "devices",
            f"JAX finds none: {error}",
            PROBLEM,
            "JAX_PLATFORMS=cpu makes do without an accelerator",
        )
        return
    kinds: dict[str, int] = {}
    for device in devices:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    backend = jax.default_backend()
    unused = None
    if backend == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        if Path("/dev/nvidia0").exists():
            unused = 'an NVIDIA GPU is here but not used: pip install "avlm_jax[gpu]"'
        elif Path("/dev/accel0").exists():
            unused = 'a TPU is here but not used: pip install "avlm_jax[tpu]"'
    yield Check("devices", f"{backend}: {listed}", NOTE if unused else OK, unused or "")


def installed_versions() -> dict[str, str | None]:
    """Versions of the packages the report speaks of, from their metadata; nothing is imported."""
    versions: dict[str, str | None] = {}
    for name in (*PACKAGES, "torch", "tensorflow", "tensorflow-io"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 12, 0, 1) of "0.12.0.1", (8, 1, 2) of "n8.1.2-3-gabc"."""
    match = re.match(r"\D*(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def usable_cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def shared_memory_bytes() -> int | None:
    """Size of /dev/shm; None where there is none."""
    return shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None


def memory_bytes() -> int | None:
    """The machine's memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
