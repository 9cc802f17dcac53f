"""What every launch script prints under --dry-run, against stored copies.

A change that is meant is written down with `python -m tests.launch.test_dry_run`, and read in the diff.
"""

from __future__ import annotations

import shlex
import subprocess

import pytest

from tests.launch.shell import LAUNCH, ROOT, TRAIN, environment, run, scripts

GOLDEN = ROOT / "tests" / "golden" / "launch"
COMMAND = "python -m tests.launch.test_dry_run"
BUCKET = ("--bucket", "my-bucket")
QUEUED = ("--name", "saven-2a", "--zone", "us-west4-a")
GROUP = ("--name", "saven-2a", "--zone", "us-central1-c", "--project", "my-project")
CLUSTER = ("--name", "saven-2a", "--cluster", "pods", "--zone", "us-central2-b", "--project", "my-project")
IMAGE = ("--image", "us-docker.pkg.dev/my-project/avlm/avlm:1")

# File of tests/golden/launch -> script, and what stands before --dry-run.
CASES: dict[str, tuple[str, ...]] = {
    "queued_v5e": ("tpu_queued_resources.sh", *QUEUED, "--topology", "v5e:16x16", *BUCKET, "--spot"),
    "queued_v4": ("tpu_queued_resources.sh", *QUEUED, "--topology", "v4:2x2x4", *BUCKET, "--no-preflight"),
    "queued_two_slices_of_v5p": (
        *("tpu_queued_resources.sh", *QUEUED, "--topology", "v5p:2x2x4", "--node-count", "2", *BUCKET),
        *("--reserved", "--project", "my-project", "--network", "net", "--subnetwork", "sub", "--internal-ips"),
        *("--service-account", "avlm@my-project.iam.gserviceaccount.com", "--keep"),
    ),
    "queued_v6e_create": ("tpu_queued_resources.sh", "create", *QUEUED, "--topology", "v6e:2x4", *BUCKET),
    "queued_start": ("tpu_queued_resources.sh", "start", *QUEUED, *BUCKET),
    "queued_watch": ("tpu_queued_resources.sh", "watch", *QUEUED, "--topology", "v6e:2x4", *BUCKET),
    "queued_logs": ("tpu_queued_resources.sh", "logs", *QUEUED),
    "queued_stop": ("tpu_queued_resources.sh", "stop", *QUEUED, "--node-count", "2"),
    "queued_delete": ("tpu_queued_resources.sh", "delete", *QUEUED),
    "group_tpu7x": ("gce_instance_group.sh", *GROUP, "--topology", "tpu7x:2x2x2", *BUCKET, "--spot"),
    "group_v6e_one_machine": ("gce_instance_group.sh", *GROUP, "--topology", "v6e:2x4", *BUCKET),
    "group_v5p_reserved": (
        *("gce_instance_group.sh", "create", *GROUP, "--topology", "v5p:2x2x2", *BUCKET),
        *("--reservation", "projects/my-project/reservations/tpus", "--internal-ips", "--network", "net"),
        *("--subnetwork", "projects/my-project/regions/us-central1/subnetworks/sub", "--disk-size", "500GB"),
        *("--service-account", "avlm@my-project.iam.gserviceaccount.com"),
    ),
    "group_logs": ("gce_instance_group.sh", "logs", *GROUP),
    "group_delete": ("gce_instance_group.sh", "delete", *GROUP),
    "xpk_two_slices": ("xpk.sh", *CLUSTER, *IMAGE, *BUCKET, "--topology", "v5e:16x16", "--num-slices", "2"),
    "xpk_tpu7x_create": ("xpk.sh", "create", *CLUSTER, *IMAGE, *BUCKET, "--topology", "tpu7x:2x2x2", "--telemetry"),
    "xpk_attach": ("xpk.sh", "attach", *CLUSTER, *BUCKET),
    "xpk_logs": ("xpk.sh", "logs", *CLUSTER),
    "xpk_delete": ("xpk.sh", "delete", *CLUSTER),
    "skypilot_tpu": ("skypilot.sh", "--name", "saven-2a", "--topology", "v6e:4x4", *BUCKET, "--infra", "gcp/us-east5"),
    "skypilot_gpus": (
        *("skypilot.sh", "--name", "saven-2a", "--gpus", "H200:8", "--num-nodes", "2", *BUCKET),
        *("--on-demand", "--secret", "WANDB_API_KEY"),
    ),
    "skypilot_cancel": ("skypilot.sh", "cancel", "--name", "saven-2a"),
    "slurm": ("slurm.sh", "--name", "saven-2a", "--nodes", "2", "--time", "1-00:00:00", "--partition", "gpu"),
    "slurm_all_options": (
        *("slurm.sh", "--name", "saven-2a", "--nodes", "4", "--gpus-per-node", "4", "--cpus-per-task", "16"),
        *("--memory", "480G", "--time", "12:00:00", "--account", "lab", "--qos", "high", "--max-requeues", "9"),
    ),
    "local_one_process": ("local_cpu.sh",),
    "local_two_processes": ("local_cpu.sh", "--processes", "2", "--devices", "8"),
    "worker_install": ("on_worker.sh", "install", *BUCKET),
    "worker_start": ("on_worker.sh", "start", "--name", "saven-2a", *BUCKET),
    "worker_stop": ("on_worker.sh", "stop"),
    "worker_logs": ("on_worker.sh", "logs"),
    "supervise": ("supervise.sh",),
}  # fmt: skip


def printed(case: str) -> str:
    """With a PATH without cloud commands: --dry-run needs none."""
    script, *arguments = CASES[case]
    train = ["avlm", "train", *TRAIN] if script == "supervise.sh" else TRAIN
    done = run(script, *arguments, "--dry-run", "--", *train)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return f"# launch/{shlex.join(CASES[case])} --dry-run -- ...\n{done.stdout}"


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_is_as_stored(case: str) -> None:
    path = GOLDEN / f"{case}.txt"
    assert path.is_file(), f"{path} is missing; write it with `{COMMAND}`"
    assert printed(case) == path.read_text(), f"{case} prints something else now; if meant: `{COMMAND}`"


def test_every_stored_dry_run_has_a_source() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


def test_every_script_has_a_dry_run_that_is_stored() -> None:
    parts = {"shell.sh", "slices.sh", "slurm_job.sh"}  # Sourced, and shown by slurm.sh.
    assert {path.name for path in scripts()} - parts == {script for script, *_ in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_what_is_printed_is_shell(case: str) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=printed(case), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_writes_nothing(case: str, tmp_path) -> None:
    before = sorted(ROOT.glob(".cache/launch/*"))
    printed(case)
    assert sorted(ROOT.glob(".cache/launch/*")) == before


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for file in GOLDEN.iterdir():
        file.unlink()
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(printed(name))
    print(f"wrote {len(CASES)} files to {GOLDEN}, from {LAUNCH}")
