"""The roll call: every process of a run tells process 0 who it is before JAX connects them.

JAX ends a process by SIGABRT when the others do not come, and says no host names. Here the ones that are missing are named,
and a wrong number of processes or one number given twice is found. It takes the coordinator's own port, before JAX does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

from input_pipeline.errors import UserError

EX_TEMPFAIL = 75  # sysexits.h: try again. Launchers start all processes anew.
LONGEST_LINE = 2**20  # bytes; the answer holds every host's name.
RETRY_SECONDS = 0.5
SILENCE_SECONDS = 2.0  # What connects and says nothing for so long is not one of ours.
PATIENCE_SECONDS = 10.0  # Longer than process 0 waits for the others, for its answer to arrive.


class PeerError(UserError):
    """Another process did not come or is gone. Starting all processes again may mend it."""

    exit_code = EX_TEMPFAIL


@dataclasses.dataclass(frozen=True)
class Member:
    """One process of a run as it introduces itself.

    Attributes:
        index, count: its number, and how many it was told there are.
        host: its machine's name.
    """

    index: int
    count: int
    host: str

    def __str__(self) -> str:
        return f"process {self.index} ({self.host})"


def roll_call(address: str, index: int, count: int, timeout: float) -> list[str]:
    """Waits until all processes are there; every process calls it.

    Args:
        address: "host:port" of process 0.
        index, count: this process's number and how many there are.
        timeout: seconds.

    Returns:
        Host names by process number.

    Raises:
        PeerError: naming who did not come in time, or that process 0 cannot be reached.
        UserError: the port is taken, processes disagree on their number, or two have the same one.
    """
    host, _, port = address.rpartition(":")
    host, me = host.strip("[]"), Member(index, count, socket.gethostname())  # IPv6 stands in brackets.
    if index == 0:
        return _call(int(port), me, timeout)
    return _answer(host, int(port), me, timeout)


def _call(port: int, me: Member, timeout: float) -> list[str]:
    """Process 0's side."""
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} of {me.host}: {error.strerror}; is another run (or what is left of "
            "one) on this host? End it, or choose another port for the coordinator"
        ) from error
    there: dict[int, tuple[Member, socket.socket]] = {}
    deadline = time.monotonic() + timeout
    with server, contextlib.ExitStack() as connections:
        while len(there) < me.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = connections.enter_context(server.accept()[0])
            except TimeoutError:
                problem, code = _missing(me, [member for member, _ in there.values()], timeout), EX_TEMPFAIL
                break
            member = _introduced(connection)
            if member is None:
                continue
            problem, code = _contradiction(me, member, there.get(member.index)), UserError.exit_code
            if problem:
                _send(connection, {"error": problem, "exit_code": code})
                break
            there[member.index] = (member, connection)
            # One that has gone since does not count; started anew, it comes again.
            there = {index: found for index, found in there.items() if not _closed(found[1])}
        else:
            hosts = [me.host] + [there[index][0].host for index in range(1, me.count)]
            for _, connection in there.values():
                _send(connection, {"hosts": hosts})
            return hosts
        for _, connection in there.values():
            _send(connection, {"error": problem, "exit_code": code})
    raise _error(problem, code)


def _missing(me: Member, there: list[Member], timeout: float) -> str:
    absent = sorted(set(range(1, me.count)) - {member.index for member in there})
    named = ", ".join(f"process {index}" for index in absent)
    others = "".join(f", {member}" for member in sorted(there, key=lambda member: member.index))
    return (
        f"of {me.count} processes {named} did not come within {timeout:.0f} s; there are {me}{others}. See the log of the "
        "missing ones' hosts: were they started, with the same command, and can they reach process 0?"
    )


def _contradiction(me: Member, member: Member, known: tuple[Member, socket.socket] | None) -> str:
    """Why `member` cannot belong to the run; empty if it can."""
    if member.count != me.count or not 0 < member.index < me.count:
        return (
            f"{member} was started as one of {member.count} processes, {me} as one of {me.count}; start all with the same "
            f"number, and with indices 0 to {me.count - 1}"
        )
    if known is not None and not _closed(known[1]):
        return (
            f"two processes say that they are process {member.index}, on {known[0].host} and on {member.host}; give each "
            "process its own index"
        )
    return ""


def _closed(connection: socket.socket) -> bool:
    """Whether its process is gone: then a new one may take its place."""
    return bool(select.select([connection], [], [], 0)[0])


def _introduced(connection: socket.socket) -> Member | None:
    """Who has connected; None for what is not one of our processes."""
    connection.settimeout(SILENCE_SECONDS)
    try:
        found = _read(connection)
        return Member(int(found["index"]), int(found["count"]), str(found["host"]))
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return None


def _answer(host: str, port: int, me: Member, timeout: float) -> list[str]:
    """The other processes' side: says who it is and waits for the verdict."""
    deadline, trouble = time.monotonic() + timeout, "it closed the connection"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                _send(connection, dataclasses.asdict(me))
                connection.settimeout(max(deadline - time.monotonic(), 0) + PATIENCE_SECONDS)
                verdict = _read(connection)
        except (OSError, ValueError) as error:  # Not there yet, or started anew just now.
            trouble = getattr(error, "strerror", None) or str(error) or type(error).__name__
            time.sleep(min(RETRY_SECONDS, max(deadline - time.monotonic(), 0)))
            continue
        if "error" in verdict:
            raise _error(str(verdict["error"]), int(verdict["exit_code"]))
        return [str(name) for name in verdict["hosts"]]
    raise PeerError(
        f"{me} does not reach process 0 at {host}:{port} within {timeout:.0f} s ({trouble}); is process 0 running there, "
        "does the address name its host, and does a firewall leave the port open?"
    )


def _error(problem: str, code: int) -> UserError:
    return PeerError(problem) if code == EX_TEMPFAIL else UserError(problem)


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # Whoever is gone will be missed later.
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket) -> dict[str, Any]:
    """One line of JSON. ValueError if it is none."""
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(4096)
        if not part or len(data) > LONGEST_LINE:
            raise ValueError("the connection ended early")
        data += part
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value
