"""Builds a virtual environment from the lock file that fits the interpreter: what `make install` runs.

    python3 requirements/install.py [.venv] [--extra torch]
    python3.11 requirements/install.py .venv-tfio --only requirements/tfio-py311.txt

Only the standard library is used, and nothing that an old Python 3 could not parse: such an
interpreter is to read the message below and not a SyntaxError. (Hence no f-strings and no annotations here.)
"""

import argparse
import glob
import hashlib
import os
import subprocess
import sys
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
OLDEST = (3, 11)
MARKER = "avlm-installed"  # In an environment made for one lock file alone; `avlm doctor` asks for it.
VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"

# Debian and Ubuntu ship Python without ensurepip (it is in python3-venv). There pip comes from PyPI, checked
# against this hash; the environment itself needs nothing but the standard library.
PIP_WHEEL = (
    "https://files.pythonhosted.org/packages/07/25/"
    "ee8c39ae72d66b844ce8eb9711ba905dba21ca1a8a0c960057c41cd23337/pip-26.3-py3-none-any.whl"
)
PIP_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"


def fail(message):
    sys.exit("install: " + message)


def run(*command):
    """Runs a command in the repository's root and leaves with its exit code if it fails."""
    code = subprocess.call(command, cwd=ROOT)
    if code:
        fail("`{}` failed with exit code {}".format(" ".join(command[:4]) + " ...", code))


def version_of(python):
    """'3.11' of the interpreter at `python`; None if it does not run, as after an upgrade of the system's."""
    try:
        return subprocess.check_output([python, "-c", VERSION]).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def lock_for(version):
    """The lock file for an interpreter: that of its version, or for a newer one the newest there is."""
    wanted = tuple(int(part) for part in version.split("."))
    locks = {}
    for path in glob.glob(os.path.join(HERE, "lock-py3*.txt")):
        minor = int(os.path.basename(path)[len("lock-py3") : -len(".txt")])
        locks[(3, minor)] = path
    fitting = [key for key in locks if key <= wanted]
    if not fitting:
        fail("no lock file under requirements/ fits Python " + version)
    return locks[max(fitting)]


def make_environment(folder, python, only=None):
    """Creates the environment with pip inside, anew if there is one of another Python version."""
    marker = os.path.join(ROOT, folder, MARKER)
    inhabited = os.path.isdir(os.path.join(ROOT, folder)) and os.listdir(os.path.join(ROOT, folder))
    if only and inhabited and not os.path.exists(marker):
        packages = os.path.join(ROOT, folder, "lib", "python3.*", "site-packages", "tensorflow_io")
        if not glob.glob(packages):
            fail(folder + " is not an environment made for " + only + "; name a new folder")
    inside = os.path.join(ROOT, python)
    here = "%d.%d" % sys.version_info[:2]
    if version_of(inside) != here:
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", folder)
    if only:
        with open(marker, "w") as file:
            file.write(only + "\n")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for provides_pip in (["pip", "--version"], ["ensurepip"]):
        if subprocess.call([inside, "-m"] + provides_pip, **quiet) == 0:
            return
    print("This Python lacks ensurepip; fetching pip itself.", flush=True)
    wheel = os.path.join(ROOT, folder, os.path.basename(PIP_WHEEL))
    try:
        with urllib.request.urlopen(PIP_WHEEL, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        fail("cannot fetch pip ({}); install the system's python3-venv package instead".format(error))
    if hashlib.sha256(content).hexdigest() != PIP_SHA256:
        fail("the fetched pip has a wrong SHA-256; install the system's python3-venv package instead")
    with open(wheel, "wb") as file:
        file.write(content)
    run(inside, os.path.join(wheel, "pip"), "install", "--quiet", "--no-index", wheel)


def main():
    if sys.version_info < OLDEST:
        fail(
            "avlm_jax needs Python {}.{} or newer, and this is {} ({}). "
            "Name another one: make install PYTHON=python3.12".format(
                OLDEST[0], OLDEST[1], sys.version.split()[0], sys.executable
            )
        )
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default=".venv", help="the environment")
    parser.add_argument("--extra", action="append", default=[], help="an extra of setup.py, e.g. torch")
    parser.add_argument("--only", metavar="LOCK", help="install this lock file alone, not the project")
    args = parser.parse_args()

    python = os.path.join(args.folder, "bin", "python")
    make_environment(args.folder, python, args.only)
    lock = args.only or os.path.relpath(lock_for(version_of(os.path.join(ROOT, python))), ROOT)
    pip = [os.path.join(ROOT, python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    # Wheels alone: a newcomer's machine need not have a compiler, and no package runs code while it is
    # installed.
    print("Installing what {} names into {} ...".format(lock, args.folder), flush=True)
    run(*(pip + ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", lock]))
    if not args.only:
        run(*(pip + ["--no-deps", "--no-build-isolation", "-e", "."]))
    if args.extra:
        run(*(pip + ["--no-build-isolation", "-e", ".[{}]".format(",".join(args.extra))]))
    print("Done: {} with Python {}.".format(args.folder, version_of(os.path.join(ROOT, python))), flush=True)


if __name__ == "__main__":
    main()
