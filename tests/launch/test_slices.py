"""The scripts that rent slices, against a stand-in for the cloud: what they ask for, when they ask again, that they delete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.shell import LAUNCH, ROOT, StandIns, environment, run

QUEUED = (
    *(
        "--name",
        "a",
        "--zone",
        "z-a",
        "--topology",
        "v5e:2x4",
        "--bucket",
        "b",
        "--poll",
        "1",
        "--no-preflight",
    ),
    *("--", "--config", "c.py", "--workdir", "/mnt/avlm/w"),
)
GROUP = ("--project", "p", *(word.replace("v5e", "v5p").replace("2x4", "2x2x2") for word in QUEUED))

# The cloud: `script.json` holds a list of states and of reports; each question takes the next, and the last one stays.
# A state of NOT_FOUND or BROKEN is an answer that gcloud fails with.
GCLOUD = """
folder = {folder!r}
with open(folder + "/script.json") as file:
    script = json.load(file)

def following(name):
    number_file = folder + "/" + name
    number = int(open(number_file).read()) if os.path.exists(number_file) else 0
    with open(number_file, "w") as file:
        file.write(str(number + 1))
    return script[name][min(number, len(script[name]) - 1)]

words = " ".join(argv)
if "describe" in argv or "list-instances" in argv:
    answer = following("states")
    if answer == "BROKEN":
        sys.exit("ERROR: (gcloud) connection reset")
    if answer == "NOT_FOUND":
        sys.exit("ERROR: (gcloud) NOT_FOUND: the resource 'a' was not found")
    print(answer)
elif words.startswith("storage cat") and words.endswith(".status"):
    print(following("reports"))
elif "create" in argv and (script.get("refuse") or script.get("refuse_group") and "managed" in argv):
    sys.exit(7)
elif "--command" in words and script.get("unreachable"):
    sys.exit(255)
"""


@pytest.fixture
def cloud(tmp_path: Path) -> StandIns:
    stand_ins = StandIns(tmp_path)
    stand_ins.add("gcloud", GCLOUD.format(folder=str(tmp_path)))
    stand_ins.add("git")
    return stand_ins


def play(cloud: StandIns, states: list[str], reports: list[str], **more: bool) -> None:
    script = {"states": states, "reports": reports, **more}
    (cloud.log.parent / "script.json").write_text(json.dumps(script))


def counts(cloud: StandIns) -> dict[str, int]:
    """How often slices were asked for, training was started on them, and they were deleted."""
    tpu = ("gcloud", "compute", "tpus")
    started = [call for call in cloud.calls(*tpu, "tpu-vm", "ssh") if "on_worker.sh start" in call[-1]]
    group = ("gcloud", "compute", "instance-groups", "managed")
    return {
        "asked": len(cloud.calls(*tpu, "queued-resources", "create") + cloud.calls(*group, "create")),
        "started": len(started),
        "deleted": len(cloud.calls(*tpu, "queued-resources", "delete") + cloud.calls(*group, "delete")),
    }


def test_from_the_request_to_the_end_of_the_bill(cloud: StandIns) -> None:
    play(
        cloud, ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], ["running 1", "ended 0 after 1 attempts"]
    )
    done = run("tpu_queued_resources.sh", *QUEUED, path=cloud.path)
    assert done.returncode == 0, done.stderr
    assert counts(cloud) == {"asked": 1, "started": 1, "deleted": 1}
    assert "a is PROVISIONING" in done.stderr and "training has finished" in done.stderr


def test_it_waits_for_every_worker(cloud: StandIns) -> None:
    play(cloud, ["ACTIVE"], ["ended 0\nrunning 1", "ended 0\nrunning 1", "ended 0\nended 0"])
    assert run("tpu_queued_resources.sh", *QUEUED, path=cloud.path).returncode == 0
    assert (
        len([call for call in cloud.calls("gcloud", "storage", "cat") if call[-1].endswith(".status")]) == 3
    )


def test_a_taken_slice_is_asked_for_again(cloud: StandIns) -> None:
    """Its machines report 143 before the cloud says anything: that is not the end of training."""
    states = ["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "NOT_FOUND", "ACTIVE"]
    play(cloud, states, ["running 1", "ended 143", "ended 143", "running 1", "ended 0"])
    done = run("tpu_queued_resources.sh", *QUEUED, path=cloud.path)
    assert done.returncode == 0, done.stderr
    # Deleted until it is gone, and at the end.
    found = counts(cloud)
    assert (found["asked"], found["started"]) == (2, 2) and found["deleted"] >= 2
    # The run goes on with the code that it began with, whatever has been committed since.
    assert len(cloud.calls("git", "archive")) == 1


def test_what_somebody_deletes_while_it_is_asked_for_again_is_not_rented(cloud: StandIns) -> None:
    play(cloud, ["ACTIVE", "SUSPENDED", "NOT_FOUND", "WAITING_FOR_RESOURCES", "NOT_FOUND"], ["running 1"])
    done = run("tpu_queued_resources.sh", *QUEUED, path=cloud.path)
    assert done.returncode == 1 and "has been deleted" in done.stderr
    assert counts(cloud) == {"asked": 2, "started": 1, "deleted": 1}


def test_without_the_code_nothing_is_rented(cloud: StandIns) -> None:
    cloud.add("git", "sys.exit(128)")
    play(cloud, ["ACTIVE"], ["running 1"])
    done = run("tpu_queued_resources.sh", *QUEUED, path=cloud.path)
    assert done.returncode == 128 and counts(cloud)["asked"] == 0


def test_a_refused_group_leaves_nothing_in_the_way_of_the_next_attempt(cloud: StandIns) -> None:
    play(cloud, ["NOT_FOUND"], [""], refuse_group=True)
    done = run("gce_instance_group.sh", *GROUP, path=cloud.path)
    assert done.returncode == 7
    for kind in ("instance-templates", "resource-policies"):
        calls = [call for call in cloud.calls("gcloud", "compute", kind) if {"create", "delete"} & set(call)]
        assert ["create" in call for call in calls] == [True, False]


def test_it_does_not_ask_for_ever(cloud: StandIns) -> None:
    taken = ["ACTIVE", "SUSPENDED", "NOT_FOUND"]
    play(cloud, taken * 4, ["running 1"])
    done = run("tpu_queued_resources.sh", "--recreations", "2", *QUEUED, path=cloud.path)
    assert done.returncode == 1 and "taken too often" in done.stderr
    assert counts(cloud)["asked"] == 3


@pytest.mark.parametrize("code", [1, 2])
def test_a_failure_is_shown_and_costs_nothing_more(code: int, cloud: StandIns) -> None:
    play(cloud, ["ACTIVE"], [f"running 1\nended {code} after 1 attempts"])
    done = run("tpu_queued_resources.sh", *QUEUED, path=cloud.path)
    assert done.returncode == code and counts(cloud) == {"asked": 1, "started": 1, "deleted": 1}
    assert cloud.calls("gcloud", "storage", "cat", "--display-url", "gs://b/launch/a/*.log")


def test_what_has_given_up_on_machines_that_are_there_is_the_end(cloud: StandIns) -> None:
    play(cloud, ["ACTIVE"], ["ended 75 after 11 attempts"])
    done = run("tpu_queued_resources.sh", *QUEUED, path=cloud.path)
    assert done.returncode == 75 and counts(cloud) == {"asked": 1, "started": 1, "deleted": 1}


def test_a_broken_connection_is_no_taken_slice(cloud: StandIns) -> None:
    play(cloud, ["ACTIVE", "BROKEN", "BROKEN", "ACTIVE"], ["running 1", "running 1", "running 1", "ended 0"])
    done = run("tpu_queued_resources.sh", *QUEUED, path=cloud.path)
    assert done.returncode == 0 and counts(cloud) == {"asked": 1, "started": 1, "deleted": 1}
    assert "connection reset" in done.stderr


def test_what_somebody_has_deleted_is_not_rented_again(cloud: StandIns) -> None:
    play(cloud, ["ACTIVE", "NOT_FOUND"], ["running 1"])
    done = run("tpu_queued_resources.sh", *QUEUED, path=cloud.path)
    assert done.returncode == 1 and "has been deleted" in done.stderr
    assert counts(cloud) == {"asked": 1, "started": 1, "deleted": 0}


def test_a_refused_request_ends_with_the_clouds_code_and_deletes_nothing(cloud: StandIns) -> None:
    """Another run may go on under that name."""
    play(cloud, ["ACTIVE"], ["running 1"], refuse=True)
    done = run("tpu_queued_resources.sh", *QUEUED, path=cloud.path)
    assert done.returncode == 7 and counts(cloud) == {"asked": 1, "started": 0, "deleted": 0}


def test_machines_that_cannot_be_set_up_are_given_back(cloud: StandIns) -> None:
    play(cloud, ["ACTIVE"], [""], unreachable=True)
    done = run("tpu_queued_resources.sh", *QUEUED, path=cloud.path)
    assert done.returncode == 1 and counts(cloud) == {"asked": 1, "started": 0, "deleted": 1}


def test_keep_deletes_nothing(cloud: StandIns) -> None:
    play(cloud, ["ACTIVE"], ["ended 0"])
    done = run("tpu_queued_resources.sh", "--keep", *QUEUED, path=cloud.path)
    assert done.returncode == 0 and counts(cloud)["deleted"] == 0 and "go on costing money" in done.stderr


def test_ctrl_c_leaves_the_slices_and_says_so(cloud: StandIns) -> None:
    play(cloud, ["ACTIVE"], ["running 1"])
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "tpu_queued_resources.sh"), *QUEUED],
        cwd=ROOT, env=environment(cloud.path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not [call for call in cloud.calls("gcloud", "storage", "cat") if call[-1].endswith(".status")]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and "the slices go on, and cost money" in told
    assert counts(cloud)["deleted"] == 0


def test_a_group_is_watched_likewise(cloud: StandIns) -> None:
    """Two machines of v5p; one of them is stopped."""
    up = "RUNNING\nRUNNING"
    states = ["STAGING\nRUNNING", up, up, "RUNNING\nSTOPPING", "NOT_FOUND", up]
    play(cloud, states, ["running 1", "running 1", "ended 0\nended 0"])
    done = run("gce_instance_group.sh", *GROUP, path=cloud.path)
    assert done.returncode == 0, done.stderr
    assert counts(cloud)["asked"] == 2
    for kind in ("instance-templates", "resource-policies"):
        made = [call for call in cloud.calls("gcloud", "compute", kind) if "create" in call]
        deleted = [call for call in cloud.calls("gcloud", "compute", kind) if "delete" in call]
        assert len(made) == 2 and len(deleted) == 2
