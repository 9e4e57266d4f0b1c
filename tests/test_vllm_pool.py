"""What the pool does about servers that fail, with stubs in their place: it ends, and it says why."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm_stub import LOGPROB, Stub, stub_python

from jaxrl.config import VllmSection
from jaxrl.rollout.engine import EngineLost, Sampling
from jaxrl.rollout.protocol import Manifest, Refused, Tensor
from jaxrl.rollout.vllm_adapter import GENERATE, INFO, ServerSpec
from jaxrl.rollout.vllm_client import Client
from jaxrl.rollout.vllm_pool import ASLEEP, DEAD, SERVING, STARTING, Pool, Server
from jaxrl.rollout.vllm_process import ServerProcess
from jaxrl.rollout.vllm_requests import Job, answer

SAMPLING = Sampling(max_tokens=3)


@dataclass
class Weights:
    """A publication that every server finds where it is."""

    version: int
    is_adapter: bool = False
    content: int = 0  # where a version is published again
    probe_ids: list[int] = field(default_factory=lambda: [3, 4, 5])
    probe_logprobs: list[float] = field(default_factory=lambda: [LOGPROB, LOGPROB])

    @property
    def label(self) -> str:
        return self.manifest.label

    @property
    def manifest(self) -> Manifest:
        return Manifest("run", self.version, (Tensor("weight", (1,), "F32", self.version + self.content),))

    async def place(self, server: Server) -> str:
        return f"/exports/v{self.version + self.content}"

    async def load(self, server: Server) -> dict[str, Any]:
        path, client = await self.place(server), server.client
        assert client is not None
        if not self.is_adapter:
            return await client.load(path, self.manifest, timeout_s=5.0)
        await client.load_adapter(path, self.manifest, timeout_s=5.0)
        return {"digest": None}

    def anew(self, server: Server) -> None: ...


def at(*urls: str) -> list[Server]:
    return [Server(f"server {url}", "key", url, None) for url in urls]


def local(folder: Path, **env: str) -> Server:
    spec = ServerSpec("model", "127.0.0.1", 0, str(folder / "server_0"), env=env)
    return Server("server 0", "key", None, ServerProcess(stub_python(folder), spec, "key"))


@asynccontextmanager
async def opened(servers: list[Server], **settings: Any):
    settings = {"start_timeout_s": 20.0, "load_timeout_s": 5.0, "stall_timeout_s": 20.0} | settings
    pool = Pool(servers, VllmSection(**settings), max_num_seqs=4)
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close()


def run(work: Coroutine[Any, Any, None], timeout_s: float = 60.0) -> None:
    """A wait without an end is what most of these tests are about."""
    asyncio.run(asyncio.wait_for(work, timeout_s))


def jobs(*prompts: int) -> list[Job]:
    return [Job(i, [prompt, 4], 1, 3, 0) for i, prompt in enumerate(prompts)]


@pytest.fixture
def stubs():
    found = [Stub(), Stub()]
    yield found
    for stub in found:
        stub.close()


def test_a_url_that_answers_with_a_page_is_said(stubs):
    stubs[0].answers[INFO] = lambda _: (200, "<html>It works!</html>")

    async def work():
        async with opened(at(stubs[0].url)) as pool:
            with pytest.raises(ValueError, match=f"{stubs[0].url} is no server that scripts/serve_vllm.py started"):
                await pool.ready()

    run(work())


def test_what_nobody_foresaw_ends_a_start_with_its_reason(stubs):
    async def work():
        async with opened(at("http://127.0.0.1:80OO")) as pool:
            with pytest.raises(ValueError, match="InvalidURL"):
                await pool.ready()

    run(work())


def test_a_python_that_cannot_be_started_is_said_and_leaves_no_scratch_folder(tmp_path):
    python = tmp_path / "python"
    python.write_text("no program")
    python.chmod(0o755)
    before = set(os.listdir("/dev/shm"))
    server = Server(
        "server 0", "key", None, ServerProcess(str(python), ServerSpec("m", "127.0.0.1", 0, str(tmp_path)), "k")
    )

    async def work():
        async with opened([server]) as pool:
            with pytest.raises(ValueError, match="Exec format error"):
                await pool.ready()

    run(work())
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("jaxrl-vllm-")}


def test_a_port_that_stays_in_use_is_not_tried_for_ever(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Address already in use >&2\nexit 4\n")
    python.chmod(0o755)
    server = Server(
        "server 0", "key", None, ServerProcess(str(python), ServerSpec("m", "127.0.0.1", 0, str(tmp_path)), "k")
    )

    async def work():
        async with opened([server], start_timeout_s=1.0) as pool:
            with pytest.raises(ValueError, match="it did not start: its port is in use: set another one"):
                await pool.ready()

    run(work(), timeout_s=20.0)


def test_a_sign_of_life_that_waits_for_a_load_is_waited_for_no_longer_than_the_load(stubs):
    asked = []

    def ping(message):
        if not asked:
            asked.append(message)
            time.sleep(2.0)
        return stubs[0].usual("/collective_rpc", message)

    def load(message):
        time.sleep(2.0)
        return stubs[0].usual("/collective_rpc", message)

    async def work():
        async with opened(at(stubs[0].url), stall_timeout_s=1.0, load_timeout_s=20.0) as pool:
            await pool.install(Weights(1))
            stubs[0].answers |= {"jaxrl_ping": ping, "jaxrl_load": load}
            while not asked:
                await asyncio.sleep(0.01)
            await pool.install(Weights(2))
            assert pool.restarts == 0

    run(work())


def test_a_request_that_always_ends_its_server_ends_the_run_after_max_restarts(tmp_path):
    server = local(tmp_path, POISON="7")

    async def work():
        async with opened([server], max_restarts=2) as pool:
            await pool.install(Weights(1))
            answered = await answer(pool, jobs(3), SAMPLING, None)
            assert [label for _, _, label in answered] == ["run:1"]
            with pytest.raises(EngineLost, match="server 0: "):
                await answer(pool, jobs(7), SAMPLING, None)
            assert (pool.restarts, server.state) == (2, DEAD)

    run(work())


def refuses(stub: Stub, version: int) -> None:
    def load(message):
        if message["args"][1]["version"] == version:
            return 200, {"results": [{"refused": f"version {version} is not for me"}]}
        return stub.usual("/collective_rpc", message)

    stub.answers["jaxrl_load"] = load


def test_after_a_refusal_by_one_of_two_servers_both_answer_with_the_weights_before(stubs):
    refuses(stubs[1], 2)

    async def work():
        async with opened(at(*(stub.url for stub in stubs))) as pool:
            await pool.until(lambda: all(server.info for server in pool.servers))
            await pool.install(Weights(1))
            with pytest.raises(Refused, match="version 2 is not for me"):
                await pool.install(Weights(2))
            assert stubs[0].loaded == ["/exports/v1", "/exports/v2", "/exports/v1"]
            answered = await answer(pool, jobs(*range(3, 30)), SAMPLING, None)
            assert {label for _, _, label in answered} == {"run:1"}
            assert all(stub.num_answered for stub in stubs)

    run(work())


def test_a_server_that_loads_while_its_version_is_published_again_with_other_weights_gets_those(stubs):
    async def work():
        async with opened(at(*(stub.url for stub in stubs))) as pool:
            await pool.until(lambda: all(server.info for server in pool.servers))
            await pool.install(Weights(1))

            def load(message):
                stubs[1].answers.pop("jaxrl_load")
                time.sleep(1.0)
                return stubs[1].usual("/collective_rpc", message)

            stubs[1].answers["jaxrl_load"] = load
            await pool.lost(pool.servers[1], pool.servers[1].gone, "for the test")
            while "jaxrl_load" in stubs[1].answers:
                await asyncio.sleep(0.01)
            await pool.install(Weights(1, content=10))
            await pool.until(lambda: all(server.state == SERVING for server in pool.servers))
            assert [stub.loaded[-1] for stub in stubs] == ["/exports/v11", "/exports/v11"]

    run(work())


def test_a_server_that_starts_while_others_refuse_gets_the_weights_before(stubs):
    for stub in stubs:
        refuses(stub, 2)

    async def work():
        async with opened(at(*(stub.url for stub in stubs))) as pool:
            await pool.until(lambda: all(server.info for server in pool.servers))
            await pool.install(Weights(1))
            await pool.lost(pool.servers[1], pool.servers[1].gone, "for the test")
            with pytest.raises(Refused):
                await pool.install(Weights(2))
            await pool.until(lambda: all((s.state, s.label) == (SERVING, "run:1") for s in pool.servers))

    run(work())


def test_an_answer_to_a_load_that_nobody_foresaw_starts_the_server_again(stubs):
    stubs[0].answers["jaxrl_load"] = lambda _: (400, {"error": "what is that?"})

    async def work():
        async with opened(at(*(stub.url for stub in stubs))) as pool:
            await pool.until(lambda: all(server.info for server in pool.servers))
            await pool.install(Weights(1))
            await pool.until(lambda: pool.servers[0].state == DEAD)
            assert "what is that?" in pool.servers[0].reason
            assert len(await answer(pool, jobs(3, 4), SAMPLING, None)) == 2

    run(work())


def test_a_load_that_left_the_live_parameters_as_they_were_is_not_believed(stubs):
    stubs[0].answers["jaxrl_load"] = lambda message: (200, {"results": [{"loaded": 0, "digest": "of the old ones"}]})

    async def work():
        async with opened(at(stubs[0].url)) as pool:
            await pool.install(Weights(1))
            assert pool.restarts == 0
            await pool.install(Weights(2))
            assert pool.restarts == 1
            assert pool.servers[0].reason == "version 2 of the weights left its parameters as they were"

    run(work())


def test_of_what_is_installed_for_the_trainer_a_server_sees_jaxrl_alone(tmp_path):
    server = local(tmp_path, REPORT=str(tmp_path / "path"))

    async def work():
        async with opened([server]) as pool:
            await pool.ready()
            path = Path((tmp_path / "path").read_text())
            assert [each.name for each in path.iterdir()] == ["jaxrl"]
            assert (path / "jaxrl" / "rollout" / "vllm_server.py").exists()
        assert not path.exists()

    run(work())


def test_a_reply_that_is_lost_while_its_server_lives_is_asked_for_again(stubs, monkeypatch):
    monkeypatch.setattr("jaxrl.rollout.vllm_requests.SLOWEST_S", 0.1)
    lost = []

    def generate(message):
        if "prompt_logprobs" not in message["sampling_params"] and not lost:
            lost.append(message)
            time.sleep(20.0)
        return stubs[0].usual(GENERATE, message)

    stubs[0].answers[GENERATE] = generate

    async def work():
        async with opened(at(stubs[0].url), stall_timeout_s=4.0) as pool:
            await pool.install(Weights(1))
            assert len(await answer(pool, jobs(3), SAMPLING, None)) == 1
            assert "it was waited for 5 s for a response in vain" in pool.servers[0].reason

    run(work(), timeout_s=18.0)  # less than the answer takes


def test_a_connection_that_nobody_answers_is_found_dead_by_tcp(stubs):
    async def work():
        client = Client(stubs[0].url, "key", timeout_s=5.0)
        await client.info()
        (connection,) = client._http._transport._pool.connections
        stream = connection._connection._network_stream
        assert stream.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        await client.close()

    run(work())


def once(stub: Stub, reply: Any) -> None:
    """The first response that is asked for is `reply` of what it would have been."""
    given = []

    def generate(message):
        usual = stub.usual(GENERATE, message)
        if "prompt_logprobs" in message["sampling_params"] or given:
            return usual
        given.append(message)
        return reply(usual[1])

    stub.answers[GENERATE] = generate


def with_choice(**changes: Any):
    return lambda message: (200, {"choices": [message["choices"][0] | changes]})


NONSENSE = {
    "another version": (
        with_choice(weight_versions=[{"version": "run:0", "start": 0, "end": 3}]),
        "it answered with the weights ['run:0'] where it has run:1",
    ),
    "two versions": (
        with_choice(weight_versions=[{"version": f"run:{i}", "start": i, "end": i + 1} for i in range(2)]),
        "it answered with the weights ['run:0', 'run:1'] where it has run:1",
    ),
    "no version": (with_choice(weight_versions=None), "it answered with the weights [] where it has run:1"),
    "no tokens": (with_choice(token_ids=[]), "tokens and logprobs do not belong together"),
    "other logprobs": (with_choice(token_ids=[5, 6, 5]), "tokens and logprobs do not belong together"),
    "an abort": (with_choice(finish_reason="abort"), "a response ended by 'abort'"),
    "no number": (
        with_choice(token_ids=[5], logprobs={"content": [{"token_id": 5, "logprob": float("nan")}]}),
        "a logprob is not a number below 0",
    ),
    "too few": (lambda _: (200, {"choices": []}), "0 responses came where 1 were asked for"),
    "no response": (lambda _: (200, {"hello": 1}), "it answered a prompt with what is no response"),
    "a page": (lambda _: (200, "<html>"), "it answered a prompt with what is no response"),
    "an error": (lambda _: (500, {"error": "EngineCore"}), "was asked for a response and answered 500"),
}  # fmt: skip


@pytest.mark.parametrize("reply, words", NONSENSE.values(), ids=NONSENSE.keys())
def test_an_answer_that_is_none_of_these_weights_is_not_used_and_asked_for_again(stubs, reply, words):
    once(stubs[0], reply)

    async def work():
        async with opened(at(stubs[0].url)) as pool:
            await pool.install(Weights(1))
            ((_, answers, label),) = await answer(pool, jobs(3), SAMPLING, None)
            assert (answers[0].token_ids, answers[0].labels, label) == ([5, 5, 5], {"run:1"}, "run:1")
            assert pool.restarts == 1 and words in pool.servers[0].reason

    run(work())


def test_two_servers_share_the_work_and_one_takes_new_weights_while_the_other_answers_to_the_end(stubs):
    in_flight, first_loads = [], threading.Event()  # at the other server, when one of them loads

    async def work():
        async with opened(at(*(stub.url for stub in stubs))) as pool:
            await pool.until(lambda: all(server.info for server in pool.servers))
            await pool.install(Weights(1))
            for stub, other in zip(stubs, reversed(pool.servers), strict=True):

                def generate(message, stub=stub):
                    if stub is stubs[1] and "prompt_logprobs" not in message["sampling_params"]:
                        assert first_loads.wait(30.0)
                    return stub.usual(GENERATE, message)

                def load(message, stub=stub, other=other):
                    in_flight.append(other.in_flight)
                    first_loads.set()
                    return stub.usual("/collective_rpc", message)

                stub.answers |= {GENERATE: generate, "jaxrl_load": load}
            answering = asyncio.ensure_future(answer(pool, jobs(*range(3, 103)), SAMPLING, None))
            while not stubs[0].num_answered:
                await asyncio.sleep(0.01)
            await pool.install(Weights(2))  # no job is left for these weights: all had been asked before they came
            answered = await answering
            assert [label for _, _, label in answered] == ["run:1"] * 100
            assert all(answers[0].labels == {"run:1"} for _, answers, _ in answered)
            assert all(stub.num_answered >= 8 for stub in stubs)
            assert {label for _, _, label in await answer(pool, jobs(*range(8)), SAMPLING, None)} == {"run:2"}
            assert pool.restarts == 0

    run(work())
    assert in_flight[0] > 0 == in_flight[1]


def test_waiting_for_answers_is_told_from_loading_weights(stubs):
    times: dict[str, float] = {}

    def slow(stub: Stub, name: str, seconds: float) -> None:
        def generate(message):
            if "prompt_logprobs" not in message["sampling_params"]:
                time.sleep(seconds)
                times[f"{name} answered"] = time.perf_counter()
            return stub.usual(GENERATE, message)

        def load(message):
            time.sleep(0.5)
            times[f"{name} loaded"] = time.perf_counter()
            return stub.usual("/collective_rpc", message)

        stub.answers |= {GENERATE: generate, "jaxrl_load": load}

    async def work():
        async with opened(at(*(stub.url for stub in stubs))) as pool:
            await pool.until(lambda: all(server.info for server in pool.servers))
            await pool.install(Weights(1))
            slow(stubs[0], "first", 0.8)
            slow(stubs[1], "second", 4.8)
            answering = asyncio.ensure_future(answer(pool, jobs(3, 4), SAMPLING, None))
            while not all(server.in_flight for server in pool.servers):
                await asyncio.sleep(0.01)
            start = time.perf_counter()
            await pool.install(Weights(2))
            took = time.perf_counter() - start
            await answering
            # The first server loads while the second one still answers: both begin with a wait, and each loads for 0.5 s.
            waits = times["first answered"] - start, times["second answered"] - times["first loaded"]
            # From below it is bounded less sharply: a load ends for the pool after the stub has said so, and a probe.
            assert sum(waits) > 2.6 and sum(waits) - 1.6 < pool.waited_s < took - 1.0
            await pool.install(Weights(3))  # nobody is asked anything
            assert pool.waited_s < 0.45

    run(work())


def test_what_waits_for_a_lost_server_is_answered_with_the_weights_of_now_and_not_with_later_ones(stubs):
    async def work():
        async with opened(at(*(stub.url for stub in stubs))) as pool:
            await pool.until(lambda: all(server.info for server in pool.servers))
            await pool.install(Weights(1))

            def generate(message):
                time.sleep(0.0 if "prompt_logprobs" in message["sampling_params"] else 0.3)
                return stubs[0].usual(GENERATE, message)

            stubs[0].answers[GENERATE] = generate
            stubs[1].answers[INFO] = lambda _: (500, {"error": "not yet"})
            await pool.lost(pool.servers[1], pool.servers[1].gone, "for the test")
            answering = asyncio.ensure_future(answer(pool, jobs(*range(3, 19)), SAMPLING, None))
            while not pool.servers[0].in_flight:
                await asyncio.sleep(0.01)
            await pool.install(Weights(2))
            assert [label for _, _, label in await answering] == ["run:1"] * 16

    run(work())


# A stub that is asleep answers nothing, and one that has slept without its weights answers nothing before it has new ones.


@pytest.mark.parametrize("is_adapter", [False, True], ids=["weights", "adapter"])
def test_a_server_that_slept_answers_with_the_next_weights_also_where_they_are_the_same(tmp_path, is_adapter):
    async def work():
        async with opened([local(tmp_path)], publish="adapter" if is_adapter else "merged") as pool:
            await pool.install(Weights(1, is_adapter))
            for loads in (2, 3):
                await pool.sleep()
                assert pool.servers[0].state == ASLEEP
                await pool.install(Weights(1, is_adapter))
                ((_, answers, _),) = await answer(pool, jobs(3), SAMPLING, None)
                assert answers[0].labels == {"run:1"} and (pool.loads, pool.restarts) == (loads, 0)

    run(work())


def test_a_server_that_refuses_what_comes_after_its_sleep_gets_the_weights_before(tmp_path):
    async def work():
        async with opened([local(tmp_path, REFUSE="2")]) as pool:
            await pool.install(Weights(1))
            await pool.sleep()
            with pytest.raises(Refused, match="version 2 is not for me"):
                await pool.install(Weights(2))
            ((_, answers, _),) = await answer(pool, jobs(3), SAMPLING, None)
            assert answers[0].labels == {"run:1"} and pool.restarts == 0

    run(work())


def test_a_server_that_dies_in_its_sleep_is_not_started_before_there_is_memory_for_it(tmp_path):
    server = local(tmp_path)

    async def work():
        async with opened([server]) as pool:
            await pool.install(Weights(1))
            await pool.sleep()
            assert server.process is not None
            os.killpg(server.process.pid, signal.SIGKILL)
            await pool.until(lambda: server.state == STARTING)
            await asyncio.sleep(0.5)
            assert server.process.ended() is not None
            await pool.install(Weights(2))
            ((_, answers, _),) = await answer(pool, jobs(3), SAMPLING, None)
            assert answers[0].labels == {"run:2"} and pool.restarts == 1

    run(work())


def test_a_server_that_does_not_fall_asleep_is_ended_and_started_again_when_there_is_memory(tmp_path):
    server = local(tmp_path, SLEEPLESS="1")

    async def work():
        async with opened([server]) as pool:
            await pool.install(Weights(1))
            await pool.sleep()
            assert server.process is not None
            while server.process.ended() is None:
                await asyncio.sleep(0.05)
            assert server.state == STARTING and "Memory usage increased after sleeping" in server.reason
            with pytest.raises(RuntimeError, match="the servers sleep: update_weights comes before generate"):
                await answer(pool, jobs(3), SAMPLING, None)
            await pool.install(Weights(2))
            ((_, answers, _),) = await answer(pool, jobs(3), SAMPLING, None)
            assert answers[0].labels == {"run:2"}

    run(work())


def test_a_server_that_starts_is_not_forgotten_when_the_others_fall_asleep(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    servers = [local(folders[0]), local(folders[1], WAIT_FOR=str(tmp_path / "now"))]

    async def work():
        async with opened(servers) as pool:
            await pool.install(Weights(1))
            sleeping = asyncio.ensure_future(pool.sleep())
            await asyncio.sleep(0.5)
            assert not sleeping.done() and [server.state for server in servers] == [SERVING, STARTING]
            (tmp_path / "now").touch()
            await sleeping
            assert [server.state for server in servers] == [ASLEEP, ASLEEP]

    run(work())


def test_servers_that_somebody_else_started_do_not_sleep(stubs):
    async def work():
        async with opened(at(stubs[0].url)) as pool:
            await pool.install(Weights(1))
            await pool.sleep()
            assert not stubs[0].asleep and pool.servers[0].state == SERVING

    run(work())
