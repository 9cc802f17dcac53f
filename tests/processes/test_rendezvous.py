"""The roll call: everybody is told who is there, or what is wrong."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from avlm_jax.processes.rendezvous import PeerError, roll_call
from input_pipeline.errors import UserError
from tests.process_group import free_port


def call(members: list[tuple[int, int]], timeout: float = 10.0, port: int = 0) -> list[list[str] | UserError]:
    """What each of the members (index, count) is told."""
    address = f"localhost:{port or free_port()}"

    def one(member: tuple[int, int]) -> list[str] | UserError:
        try:
            return roll_call(address, *member, timeout)
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(one, members))


def test_all_learn_the_hosts_of_all() -> None:
    host = socket.gethostname()
    assert call([(1, 3), (2, 3), (0, 3)]) == [[host] * 3] * 3


def test_those_who_do_not_come_are_named_to_all() -> None:
    found = call([(0, 4), (2, 4)], timeout=1.0)
    for told in found:
        assert isinstance(told, PeerError) and told.exit_code == 75
        assert "of 4 processes process 1, process 3 did not come within 1 s" in str(told)
        assert f"process 2 ({socket.gethostname()})" in str(told)


def test_processes_that_disagree_on_their_number_are_told() -> None:
    for told in call([(0, 2), (1, 3)]):
        assert isinstance(told, UserError) and told.exit_code == 2
        assert "was started as one of 3 processes, process 0" in str(told) and "as one of 2;" in str(told)


def test_an_index_given_twice_is_told() -> None:
    found = call([(0, 3), (1, 3), (1, 3)])
    assert all("two processes say that they are process 1" in str(told) for told in found)


def test_a_process_0_that_is_not_there_is_told_with_its_address() -> None:
    port = free_port()
    (told,) = call([(1, 2)], timeout=0.7, port=port)
    assert isinstance(told, PeerError) and f"does not reach process 0 at localhost:{port} within 1 s" in str(
        told
    )


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        with pytest.raises(UserError, match="cannot listen on port .*choose another port"):
            roll_call(f"localhost:{taken.getsockname()[1]}", 0, 2, 1.0)


def test_whoever_is_not_of_the_run_is_passed_over() -> None:
    """A port scanner, or a health check."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll_call, f"localhost:{port}", 0, 2, 20.0)
        for message in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"index": "x"}\n', b""):
            for _ in range(100):
                try:
                    with socket.create_connection(("localhost", port)) as stranger:
                        stranger.sendall(message)
                    break
                except OSError:
                    time.sleep(0.05)
        second = pool.submit(roll_call, f"localhost:{port}", 1, 2, 20.0)
        assert first.result() == second.result() == [socket.gethostname()] * 2


def test_a_process_started_anew_takes_its_own_place() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll_call, f"localhost:{port}", 0, 3, 20.0)
        for _ in range(100):
            try:
                with socket.create_connection(("localhost", port)) as died:
                    died.sendall(b'{"index": 1, "count": 3, "host": "old"}\n')
                    time.sleep(0.2)
                break
            except OSError:
                time.sleep(0.05)
        others = [pool.submit(roll_call, f"localhost:{port}", index, 3, 20.0) for index in (1,)]
        assert call([(2, 3)], timeout=20.0, port=port) == [[socket.gethostname()] * 3]
        assert first.result() == others[0].result() == [socket.gethostname()] * 3
