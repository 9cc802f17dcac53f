"""How the launch scripts are spoken to: help, errors that say what to write, quoting, and the shell they are written in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.shell import LAUNCH, ROOT, StandIns, environment, run, scripts, words_of

COMMANDS = [path.name for path in scripts() if os.access(path, os.X_OK)]
QUEUED = ("--name", "a", "--zone", "z", "--topology", "v5e:4x4", "--bucket", "b")
GROUP = ("--name", "a", "--zone", "z-a", "--project", "p", "--bucket", "b")
TRAIN = ("--", "--config", "c.py", "--workdir", "/mnt/avlm/w")
# What a shell could take apart or take for something else.
HOSTILE = (
    "a b",
    "it's",
    'say "no"',
    "$HOME",
    "`id`",
    "$(id)",
    "a\\b",
    "*",
    "~",
    "",
    "a;b",
    "ü",
    "--x=('llm/.*', 'b')",
    "!x",
    "#x",
)
OVERRIDES = [f"--config.x={word}" for word in HOSTILE]


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_bash_can_parse_it(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    done = subprocess.run(["shellcheck", "-x", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", COMMANDS)
def test_it_stops_at_the_first_failure(script: str) -> None:
    assert "\nset -euo pipefail\n" in (LAUNCH / script).read_text()


@pytest.mark.parametrize("script", COMMANDS)
def test_help_tells_every_option_and_a_whole_command(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert {"--dry-run", "-h, --help"} <= set(
        re.findall(r"^  (-h, --help|--dry-run)", done.stdout, re.MULTILINE)
    )
    assert f"launch/{script}" in done.stdout or script == "slurm_job.sh"
    assert max(map(len, done.stdout.splitlines())) <= 128


@pytest.mark.parametrize("script", COMMANDS)
def test_every_option_of_the_help_is_read(script: str) -> None:
    """An option that is declared in the text alone would be accepted and forgotten."""
    text = (LAUNCH / script).read_text()
    _, _, code = text.partition("-h, --help")
    for option in re.findall(r"^  --([a-z][a-z-]*)", run(script, "--help").stdout, re.MULTILINE):
        variable = option.replace("-", "_")
        shared = (LAUNCH / "slices.sh").read_text() + (LAUNCH / "shell.sh").read_text()
        assert re.search(rf"(?<![\w-]){variable}(?![\w=-])", code + shared), f"--{option} is never read"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dryrun",), "unknown option --dryrun; did you mean --dry-run?"),
        (("--node-cout", "2"), "unknown option --node-cout; did you mean --node-count?"),
        (("--quux",), "unknown option --quux; there are: --bucket --dry-run --help --internal-ips --keep"),
        (("--config", "c"), "--config is an option of `avlm train`; those stand behind --, as in:"),
        (("--zone",), "--zone needs a value"),
        (("--spot=no",), "--spot takes no value"),
        ((), "--name, --zone must be given, for example: --name saven-2a --zone us-west4-a"),
        (("creat",), "unknown action 'creat'; did you mean create?"),
        (("create", "delete"), "one action at a time, not: create delete"),
        (("--name", "A b", "--zone", "z"), "--name is 'A b'; use up to 40 of a-z"),
        ((*QUEUED, "--node-count", "0"), "--node-count is '0'; it must be a whole number from 1 on"),
        (QUEUED, "say behind -- what to train, for example:"),
        ((*QUEUED, "--topology", "v5litepod-16", *TRAIN), "--topology is 'v5litepod-16'; write it as v5e:4x4"),
        ((*QUEUED, "--topology", "v5e:3x3", *TRAIN), "a v5e slice is 1x1, 2x2, 2x4"),
        ((*QUEUED, "--topology", "v5p:4x4", *TRAIN), "a v5p slice has three sides"),
        ((*QUEUED, "--topology", "v5p:4x4x1", *TRAIN), "v5p-32 is a slice of 2x2x4; write v5p:2x2x4"),
        ((*QUEUED, "--topology", "tpu7x:2x2x1", *TRAIN), "does not offer TPU7x; use launch/gce_instance_group.sh"),
        ((*QUEUED, "--spot", "--reserved", *TRAIN), "--spot and --reserved exclude each other"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_remedy(arguments: tuple[str, ...], message: str) -> None:
    done = run("tpu_queued_resources.sh", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "gce_instance_group.sh",
            (*GROUP, "--topology", "v5e:4x4", *TRAIN),
            "use launch/tpu_queued_resources.sh",
        ),
        (
            "skypilot.sh",
            ("--name", "a", "--bucket", "b", "--topology", "tpu7x:2x2x1", *TRAIN),
            "launch/xpk.sh",
        ),
        ("skypilot.sh", ("--name", "a", "--bucket", "b", "--gpus", "H200:8"), "say behind -- what to train"),
        ("slurm.sh", ("--name", "a"), "--time must be given, for example: --time 1-00:00:00"),
        ("local_cpu.sh", ("--processes", "3", *TRAIN), "--devices 8 cannot be shared out among 3 processes"),
        (
            "supervise.sh",
            ("avlm", "train"),
            "the command stands behind --: launch/supervise.sh -- avlm train",
        ),
        ("xpk.sh", (), "--cluster, --zone, --project must be given"),
    ],
)
def test_other_scripts_likewise(script: str, arguments: tuple[str, ...], message: str) -> None:
    done = run(script, *arguments)
    assert done.returncode == 2 and message in done.stderr


LASTS = "only /mnt/avlm outlives the machines: --workdir /mnt/avlm/runs/7b"
CLUSTER = ("--cluster", "c", "--zone", "z", "--project", "p", "--name", "a", "--image", "i", "--bucket", "b")
# Script -> what it needs before --.
RENTING = {
    "tpu_queued_resources.sh": QUEUED,
    "gce_instance_group.sh": (*GROUP, "--topology", "v6e:2x4"),
    "skypilot.sh": ("--name", "a", "--bucket", "b", "--topology", "v6e:4x4"),
    "xpk.sh": (*CLUSTER, "--topology", "v5e:4x4"),
}


@pytest.mark.parametrize("script", RENTING)
def test_results_that_would_go_with_the_machines_are_refused(script: str) -> None:
    done = run(script, *RENTING[script], "--dry-run", "--", "--config", "c.py", "--workdir", "runs/7b")
    assert done.returncode == 2 and done.stdout == ""
    assert f"--workdir is 'runs/7b'; {LASTS}" in done.stderr


@pytest.mark.parametrize(
    ("words", "lasts"),
    [
        (("--workdir=/mnt/avlm/runs/7b",), True),
        (("--workdir=runs/7b",), False),
        (("--workdir", "/mnt/avlm"), False),  # The bucket's own root: records and weights lie there.
        (("--workdir", "/mnt/avlm/"), False),
        (("--workdir", "/mnt/avlm2/runs"), False),
        (("--workdir", "/mnt/avlm/../runs"), False),
        (("--workdir", "/mnt/avlm/runs/.."), False),
        (("--workdir", "/mnt/avlm/runs/7b..x"), True),
        (("--workdir", "/mnt/avlm/runs", "--workdir", "runs"), False),  # The last one counts.
        (("--workdir", "runs", "--workdir", "/mnt/avlm/runs"), True),
    ],
)  # fmt: skip
def test_what_lasts(words: tuple[str, ...], lasts: bool) -> None:
    done = run("tpu_queued_resources.sh", *QUEUED, "--dry-run", "--", "--config", "c.py", *words)
    assert done.returncode == (0 if lasts else 2) and (LASTS in done.stderr) == (not lasts)


@pytest.mark.parametrize(
    ("script", "arguments"), [("slurm.sh", ("--name", "a", "--time", "1")), ("local_cpu.sh", ())]
)
def test_machines_of_ones_own_keep_what_they_have(script: str, arguments: tuple[str, ...]) -> None:
    done = run(script, *arguments, "--dry-run", "--", "--config", "c.py", "--workdir", "runs/7b")
    assert done.returncode == 0 and "--workdir runs/7b" in done.stdout


def test_an_option_may_carry_its_value_either_way() -> None:
    one = run("tpu_queued_resources.sh", *QUEUED, "--dry-run", *TRAIN)
    other = run(
        "tpu_queued_resources.sh",
        "--name=a", "--zone=z", "--topology=v5e:4x4", "--bucket=gs://b", "--dry-run", *TRAIN,
    )  # fmt: skip
    assert one.returncode == 0 and one.stdout == other.stdout


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """Commands that print their words as JSON."""
    stand_ins = StandIns(tmp_path)
    for name in ("gcloud", "avlm", "git", "mkdir", "bash", "sbatch", "srun", "xpk", "env", "docker"):
        stand_ins.add(name, "print(json.dumps([os.path.basename(sys.argv[0]), *argv]))")
    return stand_ins.path


def test_every_word_survives_to_the_machines(echo: Path) -> None:
    """What is printed, run by a shell, starts on_worker.sh with the words that were given: through two shells."""
    printed = run("tpu_queued_resources.sh", *QUEUED, "--dry-run", *TRAIN, *OVERRIDES, *HOSTILE).stdout
    called = words_of(printed, echo)
    assert called[0] == ["avlm", "preflight", "--config", "c.py", *OVERRIDES, "--topology", "v5e:4x4"]
    start = next(words for words in called if "on_worker.sh start" in words[-1])
    (there,) = words_of(start[-1].removeprefix("--command="), echo)
    assert there[there.index("--") + 1 :] == [*TRAIN[1:], *OVERRIDES, *HOSTILE]


def test_every_word_survives_slurm_and_the_unit(echo: Path) -> None:
    words = [*TRAIN[1:], *HOSTILE]
    printed = run("slurm.sh", "--name", "a", "--time", "1", "--dry-run", *TRAIN, *HOSTILE).stdout
    _, submitted, tasks = words_of(printed, echo)
    assert submitted[submitted.index("--") + 1 :] == words
    assert tasks[tasks.index("--") + 1 :] == ["avlm", "train", *words]

    printed = run(
        "on_worker.sh", "start", "--name", "a", "--bucket", "b", "--dry-run", *TRAIN, *HOSTILE
    ).stdout
    script = printed[printed.index("exec bash") : printed.index("END\ncat")]
    (unit,) = words_of(script, echo)
    assert unit[unit.index("--") + 2 :] == ["train", *words]


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_nothing_is_rented_when_it_does_not_fit(code: int, tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    stand_ins.add("avlm", f"sys.exit({code})")
    stand_ins.add("gcloud", "sys.exit(9)")
    stand_ins.add("git")
    copy = shutil.copytree(LAUNCH, tmp_path / "launch")  # A checkout without a .venv of its own.
    script = str(copy / "tpu_queued_resources.sh")
    done = subprocess.run(
        ["bash", script, *QUEUED, *TRAIN], env=environment(stand_ins.path), capture_output=True, text=True
    )
    assert [call[1] for call in stand_ins.calls("avlm")] == ["preflight"]
    assert bool(stand_ins.calls("gcloud")) == (code == 0)
    assert done.returncode == (9 if code == 0 else code)  # 9: gcloud's own, of the refused request.


def test_no_secret_stands_in_a_command() -> None:
    secret = "wandb-0123456789"
    done = run(
        "skypilot.sh",
        *(
            "--name",
            "a",
            "--bucket",
            "b",
            "--gpus",
            "H200:8",
            "--secret",
            "WANDB_API_KEY",
            "--dry-run",
            *TRAIN,
        ),
        WANDB_API_KEY=secret,
    )
    assert done.returncode == 0 and "--secret WANDB_API_KEY" in done.stdout and secret not in done.stdout


def test_the_job_file_of_skypilot_says_what_the_script_sets() -> None:
    job = (LAUNCH / "skypilot.yaml").read_text()
    declared = re.findall(r"^  (AVLM_[A-Z]+):", job, re.MULTILINE)
    printed = run(
        "skypilot.sh", "--name", "a", "--bucket", "b", "--gpus", "H200:8", "--dry-run", *TRAIN
    ).stdout
    assert sorted(declared) == sorted(re.findall(r"(AVLM_[A-Z]+)=", printed))
