"""A version on its way to stubs of servers: over HTTP, and to those that start later."""

import asyncio
import dataclasses
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load as load_safetensors
from vllm_stub import Stub, stub_python

from jaxrl.batch import Prompt
from jaxrl.config import Model, VllmSection
from jaxrl.models.decoder import init_params
from jaxrl.parallel import make_mesh
from jaxrl.roles import model_config
from jaxrl.rollout.engine import Sampling
from jaxrl.rollout.protocol import Refused, check_export
from jaxrl.rollout.vllm_adapter import GENERATE, SEES, UPLOAD
from jaxrl.rollout.vllm_engine import VllmEngine
from jaxrl.rollout.vllm_pool import DEAD, SERVING, Server
from jaxrl.rollout.vllm_publication import Publication
from jaxrl.weights.pretrained import open_pretrained
from jaxrl.weights.sync import FileSink, model_export

MODEL = Path(__file__).parent / "data" / "hf_torch" / "llama32-tied"
PROMPTS = [Prompt([3 + i, 5], "", "", None, {}, None, i) for i in range(8)]


@pytest.fixture
def stubs():
    found = [Stub() for _ in range(2)]
    yield found
    for stub in found:
        stub.close()


@pytest.fixture
def engine_of(tmp_path):
    """Makes an engine; the stubs' logprobs are far from any model's, so the probe is let off."""
    engines = []

    def make(lora_rank: int = 0, vocab_size: int = 80, model: str = str(MODEL), **settings) -> VllmEngine:
        source = open_pretrained(model)
        config = model_config(Model(path="", compute_dtype="float32"), source.hf_config)
        config = dataclasses.replace(
            config, vocab_size=vocab_size, lora_rank=lora_rank, lora_targets=("q_proj",) if lora_rank else ()
        )
        times = {"start_timeout_s": 20.0, "load_timeout_s": 10.0, "stall_timeout_s": 4.0, "probe_tolerance": 1e3}
        section = VllmSection(**(times | settings))
        engine = VllmEngine(
            config, make_mesh(1, 1, 1), section, source=source, folder=tmp_path / f"run{len(engines)}",
            max_model_len=64, max_num_seqs=4,
        )  # fmt: skip
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def weights(engine: VllmEngine, version: int) -> dict:
    return init_params(engine.config, "lm", jax.random.key(version))


def until(engine: VllmEngine, condition: Callable[[], bool]) -> None:
    engine._call(asyncio.wait_for(engine.pool.until(condition), 30.0))


def all_serve(engine: VllmEngine) -> bool:
    return all(server.state == SERVING for server in engine.pool.servers)


def ready(engine: VllmEngine) -> None:
    until(engine, lambda: all(server.info for server in engine.pool.servers))


def versions(engine: VllmEngine) -> set[int]:
    return {r.weights_version for r in engine.generate(PROMPTS, Sampling(max_tokens=2), seed=0)}


def lose(engine: VllmEngine, i: int) -> None:
    server = engine.pool.servers[i]
    engine._call(engine.pool.lost(server, server.gone, "for the test"))


def spoilt(variables: dict, wrong: float) -> dict:
    norm = variables["params"]["norm"]
    norm["scale"] = norm["scale"].at[3].set(wrong)
    return variables


def assert_has(stub: Stub, variables: dict) -> None:
    (data,) = stub.uploads.values()
    found = load_safetensors(data)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], variables["params"]["embed_tokens"]["embedding"])


@pytest.mark.parametrize("room", ["in memory", "on disk"])
def test_a_server_that_is_started_again_gets_the_weights_that_training_has_gone_on_from(
    stubs, engine_of, monkeypatch, room
):
    if room == "on disk":
        monkeypatch.setattr("jaxrl.rollout.vllm_engine.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2, 1, 1))
    engine = engine_of(urls=tuple(stub.url for stub in stubs), transport="http", max_restarts=1)
    ready(engine)
    variables = weights(engine, 1)
    kept = jax.tree.map(np.array, variables)
    engine.update_weights(variables, 1)
    for x in jax.tree.leaves(variables):
        x.delete()
    stubs[1].uploads.clear()
    lose(engine, 1)
    until(engine, lambda: all_serve(engine))
    assert_has(stubs[1], kept)
    assert versions(engine) == {1}
    assert bool(list(engine.folder.glob("published/v1-*/model.safetensors"))) == (room == "on disk")
    engine.close()
    assert not (engine.folder / "published").exists()


@pytest.mark.parametrize("transport", ["auto", "shm"])
def test_servers_of_a_container_with_little_shared_memory_read_from_the_disk(
    engine_of, tmp_path, monkeypatch, transport
):
    monkeypatch.setattr("jaxrl.rollout.vllm_engine.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2, 1, 1))
    engine = engine_of(python=stub_python(tmp_path), transport=transport)
    if transport == "shm":
        with pytest.raises(
            ValueError, match=r"/dev/shm has 0.00 GB left, .* --shm-size\), or set rollout.vllm.transport"
        ):
            engine.update_weights(weights(engine, 1), 1)
        return
    for version in (1, 2):
        engine.update_weights(weights(engine, version), version)
        assert versions(engine) == {version}
        assert [path.name.split("-")[0] for path in engine.folder.glob("published/*")][-1:] == [f"v{version}"]
    assert not engine.pool.restarts


def test_a_server_that_starts_while_a_version_is_published_finds_a_copy_of_it(engine_of, tmp_path):
    may_start = tmp_path / "may start"
    may_start.touch()
    engine = engine_of(python=stub_python(tmp_path), env={"WAIT_FOR": str(may_start)})
    engine.update_weights(weights(engine, 1), 1)
    may_start.unlink()
    lose(engine, 0)
    threading.Timer(2.0, may_start.touch).start()
    variables = weights(engine, 2)
    engine.update_weights(variables, 2)
    for x in jax.tree.leaves(variables):
        x.delete()
    lose(engine, 0)
    until(engine, lambda: all_serve(engine))
    assert versions(engine) == {2}


def test_versions_on_a_shared_disk_go_when_the_engine_is_closed(stubs, engine_of, tmp_path):
    engine = engine_of(urls=(stubs[0].url,), transport="file", file_dir=str(tmp_path / "shared"))
    for version in (1, 2):
        engine.update_weights(weights(engine, version), version)
    assert all(Path(path).is_relative_to(tmp_path / "shared") for path in stubs[0].loaded)
    engine._forgetting.join()
    assert [str(path) for path in (tmp_path / "shared").glob("*/v*/model.safetensors")] == stubs[0].loaded[1:]
    engine.close()
    assert not list((tmp_path / "shared").iterdir())


def test_a_version_that_is_published_again_is_still_there(engine_of, tmp_path):
    engine = engine_of(python=stub_python(tmp_path))
    for seed in (1, 2):
        engine.update_weights(weights(engine, seed), 0)
    engine._forgetting.join()
    lose(engine, 0)
    until(engine, lambda: all_serve(engine))
    server = engine.pool.servers[0]
    assert Path(engine._call(engine._publication.place(server))).exists()


def test_weights_that_went_wrong_are_refused_before_a_server_hears_of_them(stubs, engine_of):
    engine = engine_of(urls=(stubs[0].url,))
    ready(engine)
    engine.update_weights(weights(engine, 1), 1)
    for wrong in (np.nan, -np.inf):
        with pytest.raises(
            ValueError, match="version 2 of the weights has NaN or infinity in model.norm.weight: training"
        ):
            engine.update_weights(spoilt(weights(engine, 2), wrong), 2)
    assert versions(engine) == {1} and engine.pool.loads == 1


@pytest.mark.parametrize("reply", [(500, {"error": "no"}), (200, "<html>")], ids=["an error", "a page"])
def test_one_server_that_cannot_be_asked_for_its_transport_does_not_end_the_run(stubs, engine_of, reply):
    engine = engine_of(urls=tuple(stub.url for stub in stubs), max_restarts=1)
    ready(engine)
    engine.update_weights(weights(engine, 1), 1)
    until(engine, lambda: all_serve(engine))
    stubs[0].answers[SEES] = lambda _: reply
    engine.update_weights(weights(engine, 2), 2)
    until(engine, lambda: engine.pool.servers[0].state == DEAD)
    assert "a look at a file" in engine.pool.servers[0].reason
    assert versions(engine) == {2}


def test_uploads_to_more_servers_than_asyncio_has_threads_do_not_wait_for_each_other(engine_of):
    many = [Stub() for _ in range(min(32, (os.cpu_count() or 1) + 4) + 2)]
    many[-1].pause_s = 2.0  # before it reads: more than its connection holds waits meanwhile
    engine = engine_of(urls=tuple(stub.url for stub in many), transport="http", vocab_size=400_000)
    try:
        ready(engine)
        variables = weights(engine, 1)
        publishing = threading.Thread(target=engine.update_weights, args=(variables, 1), daemon=True)
        publishing.start()
        publishing.join(60.0)
        assert not publishing.is_alive()
        until(engine, lambda: all_serve(engine))
        for stub in many:
            assert_has(stub, variables)
    finally:
        engine.close()
        for stub in many:
            stub.close()


def test_whoever_waits_for_an_upload_hears_when_another_version_has_followed(engine_of, tmp_path):
    """A server that has started again would wait for ever, and nobody would bring it the version of now."""
    engine = engine_of(urls=("http://127.0.0.1:9",))
    export = model_export("run", 3, weights(engine, 3), engine.config, "float32")

    async def http(server: Server) -> str:
        return "http"

    async def wait() -> None:
        server = Server("server", "key", "http://127.0.0.1:9", None)
        server.client = cast(Any, SimpleNamespace(upload=lambda *args, **kwargs: asyncio.sleep(60)))
        publication = Publication(
            export.manifest, [1], [], asyncio.get_running_loop(), engine.config, adapter_of=None, transports=http,
            timeout_s=5.0,
        )  # fmt: skip
        await asyncio.to_thread(publication.send, export, {"disk": tmp_path / "published"}, [])
        waiting = asyncio.ensure_future(publication.place(server))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(publication.forget)
        with pytest.raises(Refused, match="version 3 of the weights has been followed by another"):
            await waiting

    asyncio.run(asyncio.wait_for(wait(), 20))


def test_why_an_upload_failed_is_said_and_the_others_go_on(stubs, engine_of):
    stubs[0].answers[UPLOAD] = lambda _: (507, {"error": "No space left on device"})
    engine = engine_of(urls=tuple(stub.url for stub in stubs), transport="http", max_restarts=1)
    ready(engine)
    engine.update_weights(weights(engine, 1), 1)
    until(engine, lambda: engine.pool.servers[0].state == DEAD)
    assert "No space left on device" in engine.pool.servers[0].reason
    assert versions(engine) == {1}


def test_an_adapter_over_http_comes_with_its_config(stubs, engine_of):
    engine = engine_of(lora_rank=2, publish="adapter", urls=(stubs[0].url,), transport="http")
    ready(engine)
    stubs[0].answers["/v1/load_lora_adapter"] = lambda _: (200, {})
    engine.update_weights(weights(engine, 1), 1)
    assert {name.partition("/")[2] for name in stubs[0].uploads} == {"adapter_config.json", "adapter_model.safetensors"}


def changed(variables: dict, version: int) -> dict:
    """With another norm."""
    scale = variables["params"]["norm"]["scale"] + version
    return {"params": {**variables["params"], "norm": {"scale": scale}}}


def test_only_what_changed_is_uploaded_and_what_is_there_then_is_the_whole_version(stubs, engine_of):
    engine = engine_of(urls=tuple(stub.url for stub in stubs), transport="http")
    ready(engine)
    first = weights(engine, 1)
    engine.update_weights(first, 1)
    until(engine, lambda: all_serve(engine))
    whole = 2 * len(next(iter(stubs[0].uploads.values())))
    assert engine.weights_gb == whole / 2**30
    for version in (2, 9, 10, 100):  # a longer number must not move what follows it
        variables = changed(first, version)
        engine.update_weights(variables, version)
        for stub in stubs:
            _, base, size = stub.received[-1]
            assert base and size < 0.1 * whole
            ((name, data),) = stub.uploads.items()
            check_export(Path(engine._publication._file.path), engine._publication.manifest, None)
            assert data == engine._publication._file.path.read_bytes() and stub.loaded[-1] == name
        assert engine.weights_gb == sum(stub.received[-1][2] for stub in stubs) / 2**30
        assert versions(engine) == {version}


def test_unchanged_weights_move_on_in_number_alone_and_are_probed(stubs, engine_of):
    probes = []

    def generate(message):
        probes.append("prompt_logprobs" in message["sampling_params"])
        return stubs[0].usual(GENERATE, message)

    stubs[0].answers[GENERATE] = generate
    engine = engine_of(urls=(stubs[0].url,), transport="http")
    ready(engine)
    variables = weights(engine, 1)
    last = None
    for version in (1, 2, 3):
        if last is not None:
            last.probe_logprobs = []  # nothing that is answered fits them: each version is probed with its own
        engine.update_weights(variables, version)
        assert versions(engine) == {version} and engine.pool.restarts == 0
        last = engine._publication
    assert len(stubs[0].received) == len(stubs[0].loaded) == 1 and sum(probes) == 3
    assert engine.weights_gb == 0.0
    # Of the same weights, whatever their number, there is one file, and a server that starts again gets it.
    engine._forgetting.join()
    assert len(list(engine._publication._file.path.parents[1].iterdir())) == 1
    stubs[0].uploads.clear()
    lose(engine, 0)
    until(engine, lambda: all_serve(engine))
    assert_has(stubs[0], variables)
    assert versions(engine) == {3}
    engine.update_weights(changed(variables, 4), 4)
    assert stubs[0].received[-1][1] and versions(engine) == {4}


def test_a_server_that_has_not_the_version_before_gets_everything(stubs, engine_of):
    engine = engine_of(urls=tuple(stub.url for stub in stubs), transport="http")
    ready(engine)
    variables = weights(engine, 1)
    engine.update_weights(variables, 1)
    until(engine, lambda: all_serve(engine))
    stubs[1].uploads = {"v1-0-another/model.safetensors": b"of another trainer"}
    engine.update_weights(changed(variables, 2), 2)
    (_, base, few), (_, none, all_of_it) = (stub.received[-1] for stub in stubs)
    assert base and not none and few < 0.1 * all_of_it
    assert stubs[0].uploads == stubs[1].uploads and versions(engine) == {2}


def test_a_server_of_adapters_is_started_with_the_files_of_a_model_that_is_named_by_its_id(
    engine_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(MODEL))
    engine = engine_of(lora_rank=2, publish="adapter", python=stub_python(tmp_path), model="somebody/llama")
    assert engine.source.base == "somebody/llama"
    assert engine.pool.servers[0].process._spec.model == str(MODEL)


def test_a_file_can_be_followed_while_it_is_written(tmp_path):
    sink, parts = FileSink(tmp_path / "v1" / "file"), []

    async def read():
        async for piece in sink.follow():
            parts.append(piece)

    async def work():
        reading = asyncio.ensure_future(read())
        for i in range(5):
            sink.write(memoryview(bytes([i] * 100_000)))
            await asyncio.sleep(0.01)
        assert parts and not reading.done()
        sink.close()
        await reading

    asyncio.run(asyncio.wait_for(work(), 30.0))
    assert b"".join(parts) == b"".join(bytes([i] * 100_000) for i in range(5))


def test_whoever_follows_a_file_that_is_abandoned_hears_of_it(tmp_path):
    sink = FileSink(tmp_path / "v1" / "file")

    async def work():
        follow = sink.follow()
        sink.write(memoryview(b"x" * 10_000))
        assert await anext(follow)
        sink.abandon()
        with pytest.raises(OSError, match="file was never written to its end"):
            async for _ in follow:
                pass

    asyncio.run(asyncio.wait_for(work(), 30.0))
