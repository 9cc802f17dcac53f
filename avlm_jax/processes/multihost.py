"""Several processes as one run: how they find each other, wait for each other, and end together.

`initialize` comes before anything that touches a device. How many processes there are it learns from

    Cloud TPU (a slice, several slices, GKE), Slurm, Open MPI   what these set, as JAX reads it; nothing is to be done
    everything else                                             AVLM_COORDINATOR=host:port, AVLM_NUM_PROCESSES,
                                                                AVLM_PROCESS_ID in each process's environment
    neither                                                     one process, which waits for nobody

Every process is started with the same command. One that does not come, fails or stops is named, with its host, and then the
others end as well, so that a launcher can start all of them again.
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from avlm_jax.processes import peers
from avlm_jax.processes.rendezvous import PeerError, roll_call
from input_pipeline.errors import UserError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = VARIABLES = (
    "AVLM_COORDINATOR",
    "AVLM_NUM_PROCESSES",
    "AVLM_PROCESS_ID",
)
# Set by launchers for each of several processes: its number among them, and how many there are. Without what JAX needs
# besides, each process would believe to be alone and all would write to one folder.
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI": ("PMI_RANK", "PMI_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "torchrun": ("RANK", "WORLD_SIZE"),
}
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
EXIT_DEFECT = 1  # As Python ends after an exception.
CONNECT_SECONDS = 120  # For JAX, once the roll call is complete.
SHUTDOWN_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Section config.timeouts: after how many seconds a run is taken to be stuck, and ends. None changes a result.

    Attributes:
        connect: for all processes to be started.
        ready: for all to be set up (data measured, weights read and placed, a checkpoint restored), per stage.
        first_step: for the first step of a stage, which compiles.
        step: for any other step, the wait for its data included. It must leave time to compile where a stage has buckets.
        save: for a checkpoint, or a stage's result.
        late: after which a process that the others wait for is named.
        grace: from SIGTERM to the end of the process. Clouds allow 30 s and more.
    """

    connect: float = 300.0
    ready: float = 1800.0
    first_step: float = 1800.0
    step: float = 600.0
    save: float = 900.0
    late: float = 30.0
    grace: float = 20.0

    @classmethod
    def of_overrides(cls, overrides: Sequence[str]) -> Timeouts:
        """Those of a command line (`--config.timeouts.ready=60`), for verbs that must find their processes before they
        have read a configuration.

        Raises:
            UserError: an unknown one, or no number of seconds.
        """
        found = {}
        for override in overrides:
            key, _, value = override.removeprefix("--config.").partition("=")
            if key.startswith("timeouts."):
                found[key.removeprefix("timeouts.")] = value
        try:
            return cls(**{name: float(value) for name, value in found.items()})
        except (TypeError, ValueError) as error:
            known = ", ".join(field.name for field in dataclasses.fields(cls))
            raise UserError(f"--config.timeouts: {error}; known: {known}") from error

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it is a number of seconds")


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a process is told about the run it belongs to.

    Attributes:
        coordinator: "host:port" of process 0.
        index, count: its number and how many there are.
        devices: the ones of its host that are its own; None for all.
    """

    coordinator: str
    index: int
    count: int
    devices: tuple[int, ...] | None = None


def initialize(timeouts: Timeouts) -> None:
    """Makes this process one of a run's, if it is; a verb calls it before anything touches a device.

    Raises:
        PeerError: naming the processes that did not come in time.
        UserError: the environment contradicts itself, or the processes contradict each other.
    """
    if peers.current() is not None or (launch := find_launch(os.environ, timeouts.connect)) is None:
        return
    hosts = roll_call(launch.coordinator, launch.index, launch.count, timeouts.connect)
    jax.config.update(
        "jax_cpu_collectives_implementation", "gloo"
    )  # Between CPU processes; no other device's.
    jax.distributed.initialize(
        launch.coordinator,
        launch.count,
        launch.index,
        local_device_ids=launch.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=CONNECT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    from jax._src import distributed  # The store has no public name.

    found = peers.Peers(distributed.global_state.client, launch.index, hosts, timeouts.late, timeouts.ready)
    peers.enter(found)
    found.start()
    # Before what JAX and the interpreter do at exit: there a failure of another process would end this one by SIGABRT, and so
    # would a thread that comes back from the store's C++ while the interpreter is being taken down.
    atexit.register(found.finish, SHUTDOWN_SECONDS)


def find_launch(environment: Mapping[str, str], timeout: float) -> Launch | None:
    """What the environment says about the run; None for one process alone.

    Raises:
        UserError: it says half of what is needed.
    """
    if any(environment.get(name) for name in VARIABLES):
        return _stated(environment)
    found = _detected(environment, timeout)
    if found is None:
        for launcher, (rank, size) in LAUNCHERS.items():
            if rank in environment and environment.get(size, "1") not in ("", "1"):
                raise UserError(
                    f"{size}={environment[size]}: {launcher} has started several processes, but not in a way that tells them "
                    f"of each other. Set {', '.join(VARIABLES)} in each (under Slurm `srun` does without), or "
                    f"{NUM_PROCESSES}=1 if this process is to run alone"
                )
    return None if found is None or found.count == 1 else found


def _stated(environment: Mapping[str, str]) -> Launch | None:
    values = {name: environment.get(name, "") for name in VARIABLES}
    if values[NUM_PROCESSES] == "1":
        return None
    if missing := [name for name, value in values.items() if not value]:
        told = ", ".join(f"{name}={value}" for name, value in values.items() if value)
        raise UserError(f"{told} is set, but {' and '.join(missing)} is not; every process needs all three")
    host, colon, port = values[COORDINATOR].rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"{COORDINATOR} is {values[COORDINATOR]!r}; process 0's host:port is expected")
    for name in (NUM_PROCESSES, PROCESS_ID):
        if not values[name].isdecimal():
            raise UserError(f"{name} is {values[name]!r}; a number is expected")
    count, index = int(values[NUM_PROCESSES]), int(values[PROCESS_ID])
    if not 0 <= index < count:
        raise UserError(f"{PROCESS_ID} is {index}; with {NUM_PROCESSES}={count} it is at most {count - 1}")
    return Launch(values[COORDINATOR], index, count)


def _detected(environment: Mapping[str, str], timeout: float) -> Launch | None:
    """As JAX finds it. Asked by hand, because `jax.distributed.initialize` ends a process that misses others by SIGABRT."""
    from jax._src import clusters

    for cluster in (clusters.OmpiCluster, clusters.SlurmCluster):
        if cluster.is_env_present():
            local = _own_device(environment, cluster) if cluster is clusters.SlurmCluster else None
            return _of_cluster(cluster, timeout, local)
    platforms = str(jax.config.jax_platforms or "")
    if platforms and "tpu" not in platforms.split(","):
        return None
    named = next((environment[name] for name in TPU_HOSTS if environment.get(name)), None)
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if named is not None:  # GKE, and the notebooks of Colab and Kaggle, which name one host.
        several = len(named.split(",")) > 1 or slices > 1
        return _of_cluster(clusters.GkeTpuCluster, timeout) if several else None
    try:
        return (
            _of_cluster(clusters.GceTpuCluster, timeout) if clusters.GceTpuCluster.is_env_present() else None
        )
    except (
        OSError
    ) as error:  # `requests` raises it: a TPU without a metadata server is not one host of a slice.
        print(
            f"no metadata server of a Cloud TPU answers ({type(error).__name__}): one process",
            file=sys.stderr,
        )
        return None


def _of_cluster(cluster: Any, timeout: float, devices: tuple[int, ...] | None = None) -> Launch:
    address = cluster.get_coordinator_address(
        timeout_secs=int(timeout), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
    )
    return Launch(address, cluster.get_process_id(), cluster.get_process_count(), devices)


def _own_device(environment: Mapping[str, str], cluster: Any) -> tuple[int, ...] | None:
    """One GPU per task, where a host has several tasks and Slurm has not bound each to its own already."""
    several = int(environment["SLURM_NTASKS"]) > int(environment.get("SLURM_STEP_NUM_NODES") or 1)
    bound = len(environment.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    return (cluster.get_local_process_id(),) if several and not bound else None


def is_first() -> bool:
    """Whether this is process 0, the one that prints and writes for all."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints for people; process 0's words are enough."""
    if is_first():
        print(text, flush=True)


_met: collections.Counter[str] = collections.Counter()


def ready(name: str) -> None:
    """Waits until every process has come here. No device takes part; one process alone does not wait.

    Args:
        name: what for, for messages.

    Raises:
        PeerError: naming those that did not come within config.timeouts.ready, and where they stand.
    """
    gather(name, "")


def gather(name: str, value: str) -> list[str]:
    """What every process has said here, by process; see `ready`."""
    if (here := peers.current()) is None:
        return [value]
    _met[name] += 1
    before = here.status
    peers.announce(lambda status: dataclasses.replace(status, phase=peers.WAITS))
    found = here.meet(f"ready/{name}/{_met[name]}", value, here.patience)
    if missing := sorted(set(range(len(here.hosts))) - found.keys()):
        names = ", ".join(here.name(process) for process in missing)
        told = "; ".join(behind.text for behind in here.behind() if behind.process in missing)
        raise PeerError(
            f"{name}: {names} did not come within {here.patience:.0f} s{f' ({told})' if told else ''}; "
            "see the log of that host, then start all processes again"
        )
    peers.announce(lambda status: dataclasses.replace(status, phase=before.phase))
    return [found[process] for process in range(len(here.hosts))]


def leave(code: int, message: str = "") -> None:
    """Ends this process by `code`, and has the others end by it, if there are any and it is not 0; else it returns.

    Args:
        code: exit code.
        message: why, for the others; empty if they know.
    """
    if code and (here := peers.current()) is not None:
        here.leave(code, message)


def crash(trace: str) -> None:
    """Ends this process after an error nobody expected, if there are others; else it returns.

    Often the error only says that a connection broke. If it did because another process has failed, that one's reason and
    exit code are given; if one is gone without a word, the exit code is that of a PeerError.
    """
    if (here := peers.current()) is None:
        return
    print(trace, file=sys.stderr, flush=True)
    here.follow()
    gone = [found.text for found in here.behind() if not found.alive]
    here.follow()
    for text in gone:
        print(text, file=sys.stderr, flush=True)
    here.leave(PeerError.exit_code if gone else EXIT_DEFECT, "; ".join(gone) or trace)
