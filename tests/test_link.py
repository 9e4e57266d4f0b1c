"""The processes of a run find each other, exchange values, and tell of the dead. No JAX here, so a process costs little."""

import asyncio
import errno
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytest

from jaxrl.cluster import Place
from jaxrl.distributed import _code, _user_files, check_same
from jaxrl.link import PEER_LOST, Link
from jaxrl.rewards.score import Sample, Score
from jaxrl.rewards.shared import shared
from jaxrl.wire import Channel

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(places: list[Place], do: Callable[[Link], Any] = lambda link: None, **settings) -> list[Any]:
    """What `do` returns for the link of each place, or the ValueError that it ran into."""
    results: list[Any] = [None] * len(places)

    def one(number: int, place: Place) -> None:
        try:
            link = Link(place, **{"start_timeout_s": 10, **settings})
            results[number] = do(link)
            link.close()
        except ValueError as error:
            results[number] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return results


def places(n: int) -> list[Place]:
    address = f"127.0.0.1:{free_port()}"
    return [Place(address, n, i) for i in range(n)]


def test_every_process_learns_the_value_of_every_other():
    def do(link: Link):
        return [link.gather("squares", {"it is": link.process_id**2}) for _ in range(3)][-1], link.name

    results = together(places(3), do)
    assert [values for values, _ in results] == [[{"it is": 0}, {"it is": 1}, {"it is": 4}]] * 3
    assert results[2][1] == f"process 2 (host {socket.gethostname()}, pid {os.getpid()})"


def test_floats_and_long_values_arrive_as_they_were():
    values = [0.1 + 0.2, 1e-308, float("inf"), *range(200_000)]
    assert together(places(2), lambda link: link.gather("floats", values)[1 - link.process_id] == values) == [
        True,
        True,
    ]


def test_what_process_0_decides_holds_for_all_and_so_does_its_error():
    asked = []

    def decide(link: Link):
        asked.append(link.process_id)
        return "here"

    assert together(places(3), lambda link: link.first("a place", lambda: decide(link))) == ["here"] * 3
    assert asked == [0]

    def refuse():
        raise ValueError("the folder holds another run")

    errors = together(places(2), lambda link: pytest.raises(ValueError, link.first, "a place", refuse).value)
    assert [str(error) for error in errors] == ["the folder holds another run"] * 2


def test_a_process_alone_needs_no_one():
    with Link() as link:
        assert link.gather("x", 1) == [1]
        assert link.first("x", lambda: 2) == 2
        link.finished(1)
        assert link.is_first


def test_hosts_that_differ_are_named_with_what_differs():
    def do(link: Link):
        check_same(link, "the config", {"actor.optim.lr": 1e-5 if link.process_id == 2 else 1e-6, "trainer.seed": 1})

    errors = together(places(3), do)
    for error in errors:
        assert "process 2 (host" in str(error) and "do not agree on the config: actor.optim.lr is 1e-05" in str(error)


def test_every_file_of_the_code_and_the_libraries_that_compute_are_compared():
    found = _code()
    own = {f"jaxrl/{path.relative_to(ROOT / 'jaxrl').as_posix()}" for path in (ROOT / "jaxrl").rglob("*.py")}
    assert {name for name in found if name.startswith("jaxrl/")} == own
    assert found["jax"] == version("jax") and found["Python"] == platform.python_version()

    def do(link: Link):
        theirs = {"jaxrl/update.py": "another"} if link.process_id == 1 else {}
        check_same(link, "the code", found | theirs)

    told = f"agree on the code: jaxrl/update.py is another on the one and {found['jaxrl/update.py']} on the other"
    assert all(told in str(error) for error in together(places(2), do))


def test_a_users_file_is_compared_wherever_the_config_names_it(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def score(): ...")
    rewards = [{"name": f"{mine}:score", "kwargs": {"url": "x" * 300}}] * 4
    long = "Answer in main.py: " * 40
    found = _user_files({"reward.functions": rewards, "data.system_prompt": long, "data.train_files": f"{mine}:rows"})
    assert list(found) == [str(mine)]
    mine.write_text("def score(): return 1")
    assert _user_files({"reward.functions": rewards}) != found


def test_processes_share_the_samples_of_a_reward_and_one_of_whole_batches_runs_once():
    def do(link: Link):
        calls: list[list[str]] = []

        class Counted:
            def __init__(self, whole_batch: bool):
                self.whole_batch = whole_batch

            def score(self, samples):
                calls.append([sample.response for sample in samples])
                error = "it is empty"
                return [Score(len(s.response) / 3, {"x": 0.1}, None if s.response else error) for s in samples]

            def close(self):
                calls.append(["closed"])

        samples = [Sample("", text, None, "", {}, 1, True) for text in ("a", "", "ccc", "dd", "e")]
        reward, whole = shared("one", Counted(False), link), shared("two", Counted(True), link)
        return reward.score(samples), whole.score(samples), reward.score(samples[:1]), calls

    first, second = together(places(2), do)
    assert first[:3] == second[:3]
    scores = [Score(n / 3, {"x": 0.1}, None if n else "it is empty") for n in (1, 0, 3, 2, 1)]
    assert first[:3] == (scores, scores, scores[:1])
    assert first[3] == [["a", "ccc", "e"], ["a", "", "ccc", "dd", "e"], ["a"]]
    assert second[3] == [["closed"], ["", "dd"]]


def test_a_coordinator_that_is_not_there_is_an_error_within_the_time():
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"process 1 on .* could not reach the coordinator 127.0.0.1:\d+ within 0.5 s"):
        Link(places(2)[1], start_timeout_s=0.5)
    with pytest.raises(ValueError, match="could not reach the coordinator no.such.host.invalid:8476"):
        Link(Place("no.such.host.invalid:8476", 2, 1), start_timeout_s=0.5)
    assert time.monotonic() - start < 20  # the second is a name server's answer


def test_a_process_that_does_not_come_is_named_to_all_that_did():
    errors = together(places(4)[:2], start_timeout_s=1)
    for error in errors:
        assert "of 4 processes only 2 came within 1 s (0 on " in str(error) and "processes 2, 3 are missing" in str(
            error
        )


def test_two_processes_of_one_number_are_refused():
    address = f"127.0.0.1:{free_port()}"
    errors = together([Place(address, 3, 0), Place(address, 3, 1), Place(address, 3, 1)])
    assert any("two processes call themselves process 1" in str(error) for error in errors)


def test_processes_that_count_differently_are_refused():
    address = f"127.0.0.1:{free_port()}"
    errors = together([Place(address, 2, 0), Place(address, 3, 2)])
    assert "process 2 on " in str(errors[0]) and "counts 3 processes, process 0 2" in str(errors[0])


def test_a_port_in_use_is_said_in_words():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"process 0 cannot listen on port \d+ .* Name another port"):
            Link(Place(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0))


@pytest.mark.parametrize("number", [errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH])
def test_a_connection_that_breaks_in_whatever_way_is_one_that_has_ended(number):
    async def receive() -> dict | None:
        reader = asyncio.StreamReader()
        reader.set_exception(OSError(number, os.strerror(number)))  # as asyncio does where a read fails
        return await Channel(reader, cast(Any, None)).receive()

    assert asyncio.run(receive()) is None


def test_a_stranger_at_the_port_does_no_harm():
    address = places(2)

    def knock():
        for content in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 7 + b"\x02[]"):
            for _ in range(50):
                try:
                    with socket.create_connection((address[0].host, address[0].port), timeout=1) as stranger:
                        stranger.sendall(content)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)

    threading.Thread(target=knock, daemon=True).start()
    assert together(address, lambda link: (time.sleep(0.5), link.gather("x", link.process_id))[1]) == [[0, 1], [0, 1]]


def test_jax_finds_its_coordinator_through_the_link_also_where_that_begins_to_listen_later():
    def do(link: Link) -> bytes:
        address, _, port = link.relay().rpartition(":")
        if link.is_first:
            time.sleep(0.5)  # the other has dialled by now
            with socket.create_server((address, int(port))) as service:
                connection, _ = service.accept()
                with connection:
                    heard = connection.recv(5)
                    connection.sendall(heard[::-1])
                    return heard
        with socket.create_connection((address, int(port)), timeout=10) as dialled:
            dialled.sendall(b"hello")
            return dialled.recv(5)

    assert together(places(2), do) == [b"hello", b"olleh"]


MEMBER = """
import sys, time
from jaxrl.cluster import Place
from jaxrl.link import Link
place = Place(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
with Link(place, heartbeat_timeout_s=2, start_timeout_s=30) as link:
    link.gather("a step", None)
    link.finished(7)
    print("ready", flush=True)
    time.sleep(60 if sys.argv[4] == "wait" else 1)
    raise RuntimeError("the disk is full")
"""


def members(n: int, failing: int = -1) -> list[subprocess.Popen]:
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, address, str(n), str(i), "fail" if i == failing else "wait"],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(n)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # for the last step to be heard of
    return processes


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize(
    ("signum", "how", "within_s"),
    [(signal.SIGKILL, "has died: its connection was closed", 5), (signal.SIGSTOP, "has not been heard of for 2 s", 8)],
)
def test_a_dead_process_is_news_to_all_others_with_its_name_and_last_step(signum, how, within_s, victim):
    processes = members(4)
    try:
        processes[victim].send_signal(signum)
        start = time.monotonic()
        for i, process in enumerate(processes):
            if i != victim:
                _, errors = process.communicate(timeout=30)
                assert process.returncode == PEER_LOST
                name = f"process {victim} (host {socket.gethostname()}, pid {processes[victim].pid})"
                assert f"error: {name} {how}; the last step it finished was 7. This is process {i} " in errors
        assert time.monotonic() - start < within_s + 5  # the bound, and room for a busy machine
    finally:
        for process in processes:
            process.kill()
            process.communicate()


HANGS = """
import sys, time
from jaxrl.cluster import Place
from jaxrl.link import Link
place, hanging = Place(sys.argv[1], 3, int(sys.argv[2])), int(sys.argv[3])
with Link(place, heartbeat_timeout_s=20, stall_timeout_s=6, start_timeout_s=30) as link:
    for step in range(1, 4):  # each shorter than the limit, together longer
        time.sleep(2.5)
        link.finished(step)
    link.at("reward")
    if link.process_id != hanging:
        time.sleep(3)
        link.at("update_actor")
    time.sleep(60)
"""


@pytest.mark.parametrize("hanging", [0, 2])
def test_a_process_that_hangs_while_it_lives_is_named_with_what_it_was_at(hanging):
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen([sys.executable, "-c", HANGS, address, str(i), str(hanging)], stderr=subprocess.PIPE, text=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
        for i in range(3)
    ]  # fmt: skip
    said = [process.communicate(timeout=40)[1] for process in processes]
    for i, (process, errors) in enumerate(zip(processes, said, strict=True)):
        assert process.returncode == PEER_LOST
        name = f"process {hanging} (host {socket.gethostname()}, pid {processes[hanging].pid})"
        if i != hanging or i == 0:
            assert f"error: {name} has been at 'reward' for" in errors and "the last step it finished was 3" in errors


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_is_told_to_the_others(failing):
    processes = members(3, failing)
    outcomes = [(process.communicate(timeout=30)[1], process.returncode) for process in processes]
    for i, (errors, code) in enumerate(outcomes):
        if i == failing:
            assert code == 1 and "RuntimeError: the disk is full" in errors and "Traceback" in errors
        else:
            assert code == PEER_LOST
            assert f"process {failing} (host" in errors and "failed (RuntimeError: the disk is full)" in errors
