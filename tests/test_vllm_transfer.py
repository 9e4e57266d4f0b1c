"""Weights by NCCL and CUDA IPC, without a GPU: our code and vLLM's are the real ones, libnccl, CUDA's driver and what torch
wants a GPU for are stand-ins (stand_in_for_nvidia.c, vllm_without_gpu.py).
"""

import ctypes
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_vllm_publication import MODEL, all_serve, lose, spoilt, until, versions
from vllm_stub import Stub, stub_python

import jaxrl
from jaxrl.batch import Prompt
from jaxrl.config import Model, VllmSection, from_dict
from jaxrl.gpu_memory import prepare_environment
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import head_table, hidden_states
from jaxrl.parallel import make_mesh
from jaxrl.roles import abstract_variables, load_base, model_config
from jaxrl.rollout import cuda, nccl
from jaxrl.rollout.engine import EngineLost, Sampling
from jaxrl.rollout.protocol import LAYOUT_FILE, Refused
from jaxrl.rollout.vllm_adapter import ServerSpec, Worker, command
from jaxrl.rollout.vllm_engine import VllmEngine
from jaxrl.rollout.vllm_pool import ASLEEP
from jaxrl.rollout.vllm_transfer import _looked_at
from jaxrl.weights.export import device_tensors, hf_tensors
from jaxrl.weights.pretrained import Pretrained, open_pretrained
from jaxrl.weights.safetensors_writer import dtype_named

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Iterator[Path]:
    """The library that both sides find in the place of NCCL, and this process in that of CUDA's driver."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not there, which makes the stand-in for NCCL")
    path = tmp_path_factory.mktemp("stand_in") / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-pthread", f"-Wl,-soname,{path.name}"]
    subprocess.run(["gcc", *flags, "-o", str(path), str(HERE / "stand_in_for_nvidia.c")], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_NCCL_SO_PATH", str(path))
        ctypes.CDLL(str(path))  # whoever asks for libcuda.so.1 is given this one from now on
        nccl.nccl.cache_clear(), cuda.driver.cache_clear()
        yield path
    nccl.nccl.cache_clear(), cuda.driver.cache_clear()


@pytest.fixture
def engine_of(stand_in, tmp_path):
    """Makes an engine; the stubs' logprobs are far from any model's, so the probe is let off."""
    engines = []

    def make(
        mesh: tuple[int, int, int] = (1, 1, 1),
        lora_rank: int = 0,
        transport: str = "nccl",
        sleeps: bool = False,
        **settings,
    ) -> VllmEngine:
        source = open_pretrained(str(MODEL))
        config = model_config(Model(path="", compute_dtype="float32"), source.hf_config)
        config = dataclasses.replace(config, lora_rank=lora_rank, lora_targets=("q_proj",) if lora_rank else ())
        times = {"start_timeout_s": 20.0, "load_timeout_s": 3.0, "stall_timeout_s": 4.0, "probe_tolerance": 1e3}
        engine = VllmEngine(
            config, make_mesh(*mesh), VllmSection(transport=transport, **(times | settings)), source=source,
            folder=tmp_path / f"run{len(engines)}", max_model_len=64, max_num_seqs=4, sleeps=sleeps,
        )  # fmt: skip
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with closing(Stub()) as stub:
        yield stub


def weights(engine: VllmEngine, version: int) -> dict:
    """Other ones for every version, as training holds them."""
    rng, abstract = np.random.default_rng(version), abstract_variables(engine.mesh, engine.config, "lm")
    return jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), abstract)


def assert_has(stub: Stub, engine: VllmEngine, variables: dict) -> None:
    """Its tensors are, bit by bit, those that a file would hold."""
    dtype = dtype_named(stub.dtype)
    expected = dict(hf_tensors(variables["params"], engine.config, lora=variables.get("lora"), dtype=dtype))
    assert list(stub.received_tensors) == list(expected)
    for name, array in expected.items():
        assert stub.received_tensors[name] == np.ascontiguousarray(array).tobytes(), name


def both_serve(engine: VllmEngine) -> None:
    """One that started later is sent the weights while the engine is asked."""
    engine._call(engine.pool.lend())
    until(engine, lambda: all_serve(engine))
    engine._call(engine.pool.hold())


# What is sent.


@pytest.mark.parametrize("model", ["phi3", "gpt-neox", "gpt-oss"])
def test_tensors_on_the_devices_are_those_of_an_export(model):
    """Of the families of which some are fused, one way or the other."""
    source = open_pretrained(str(HERE / "data" / "hf_torch" / model))
    config = model_config(Model(path="", compute_dtype="float32"), source.hf_config)
    params = load_base(source, config, abstract_variables(make_mesh(1, 1, 1), config, "lm"))
    for dtype in ("float32", "bfloat16"):
        pairs = zip(
            device_tensors(params, config, dtype=dtype_named(dtype)),
            hf_tensors(params, config, dtype=dtype_named(dtype)),
            strict=True,
        )
        for (name, ours), (expected_name, expected) in pairs:
            assert (name, ours.dtype) == (expected_name, expected.dtype)
            np.testing.assert_array_equal(np.asarray(ours), expected)


def checksum(words: np.ndarray) -> int:
    """MurmurHash3's fmix32 of each word and its place, one by one."""
    total = 0
    for place, word in enumerate(words.reshape(-1).tolist()):
        h = word ^ (place * 0x9E3779B9 & 0xFFFFFFFF)
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        total += h ^ h >> 16
    return total & 0xFFFFFFFF


def test_the_checksum_sees_each_bit_and_its_place_on_every_mesh():
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    assert int(_looked_at(jnp.asarray(x))[0]) == checksum(x.view(np.uint32))
    half = jnp.asarray(x, jnp.bfloat16)
    assert int(_looked_at(half)[0]) == checksum(np.asarray(half).view(np.uint16))
    mesh = make_mesh(1, 2, 2)
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))
    others = [x[::-1], x[:, ::-1], -x, x.T.copy().reshape(4, 6), np.nextafter(x, np.float32(9))]
    assert len({int(_looked_at(jnp.asarray(each))[0]) for each in (x, split, *others)}) == 6
    for wrong in (np.nan, np.inf, -np.inf):
        assert not _looked_at(jnp.asarray(x).at[3, 5].set(wrong))[1] and _looked_at(split)[1]


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_versions_come_whole_from_a_mesh_with_adapters_merged(engine_of, stub, monkeypatch, transport):
    monkeypatch.setattr("jaxrl.rollout.vllm_transfer.PORTION", 10_000)  # less than a tensor, and more than some
    stub.dtype = "bfloat16"
    engine = engine_of(mesh=(1, 2, 2), lora_rank=2, transport=transport, urls=(stub.url,))
    for version in (1, 2):
        variables = weights(engine, version)
        engine.update_weights(variables, version)
        assert_has(stub, engine, variables)
        assert versions(engine) == {version}
        assert engine.weights_gb == engine._publication.manifest.nbytes / 2**30
    assert stub.loaded == ["1", "2"] and engine.pool.restarts == 0
    num_portions = -(-engine._publication.manifest.nbytes // 10_000)
    assert stub.num_portions == (2 * num_portions if transport == "ipc" else 0)


def test_a_server_on_the_trainers_device_sleeps_and_is_sent_the_weights_when_it_wakes(engine_of, tmp_path):
    engine = engine_of(transport="ipc", python=stub_python(tmp_path), sleeps=True)
    for version in (1, 2):
        engine.update_weights(weights(engine, 1), version)  # the same ones: it has lost them
        assert versions(engine) == {version}
        engine.sleep()
    assert engine.pool.loads == 2 and engine.pool.restarts == 0


def test_a_server_that_is_lost_before_it_sleeps_is_waited_for_and_put_to_sleep(engine_of, tmp_path):
    engine = engine_of(transport="ipc", python=stub_python(tmp_path), sleeps=True)
    engine.update_weights(weights(engine, 1), 1)
    server = engine.pool.servers[0]
    os.killpg(server.process.pid, signal.SIGKILL)
    until(engine, lambda: engine.pool.restarts == 1)
    engine.sleep()
    assert server.state == ASLEEP and server.process.ended() is None
    engine.update_weights(weights(engine, 2), 2)
    assert versions(engine) == {2}


def test_unchanged_weights_are_not_sent_again(engine_of, stub):
    engine = engine_of(urls=(stub.url,))
    for version in (1, 2):
        engine.update_weights(weights(engine, 1), version)
        assert versions(engine) == {version}
    assert stub.loaded == ["1"] and engine.weights_gb == 0.0


def test_weights_that_went_wrong_are_refused_before_a_server_hears_of_them(engine_of, stub):
    engine = engine_of(urls=(stub.url,))
    engine.update_weights(weights(engine, 1), 1)
    for wrong in (np.nan, -np.inf):
        with pytest.raises(
            Refused, match="version 2 of the weights has NaN or infinity in model.norm.weight: training"
        ):
            engine.update_weights(spoilt(weights(engine, 2), wrong), 2)
    assert stub.loaded == ["1"] and versions(engine) == {1}


def test_where_one_server_refuses_a_version_those_that_took_it_wait_for_the_next(engine_of):
    with closing(Stub()) as first, closing(Stub()) as second:
        engine = engine_of(urls=(first.url, second.url))
        variables = weights(engine, 1)
        engine.update_weights(variables, 1)
        both_serve(engine)
        for x in jax.tree.leaves(variables):
            x.delete()  # as the donation of an update does
        second.answers["jaxrl_fits"] = lambda _: (200, {"results": [{"refused": "of another model"}]})
        with pytest.raises(Refused, match="of another model"):
            engine.update_weights(weights(engine, 2), 2)
        del second.answers["jaxrl_fits"]
        engine.update_weights(weights(engine, 3), 3)
        assert versions(engine) == {3} and {stub.loaded[-1] for stub in (first, second)} == {"3"}


# Servers that fail, and start again.


@pytest.mark.parametrize("fault, words", [
    ("stall 0", "the workers of the server to join a group of NCCL in vain|its part in a group of NCCL in vain"),
    ("stall 3", r"3 s \(rollout.vllm.load_timeout_s\) for the server to take model.layers.0|version 1 of the weights in vain"),
    ("die 3", "remote process exited|the connection broke"),
])  # fmt: skip
def test_a_server_that_fails_in_the_middle_is_started_again_and_gets_the_version(
    engine_of, tmp_path, caplog, fault, words
):
    may_fail = tmp_path / "may_fail"
    may_fail.touch()
    engine = engine_of(python=stub_python(tmp_path), env={"STAND_IN_FAULT": f"{fault} {may_fail}"})
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, "jaxrl"):
        engine.update_weights(weights(engine, 1), 1)
    assert time.monotonic() - started < 30.0 and not may_fail.exists()
    assert versions(engine) == {1} and engine.pool.restarts == 1
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert re.search(words, said), said
    engine.update_weights(weights(engine, 2), 2)
    assert versions(engine) == {2} and engine.pool.restarts == 1


@pytest.mark.parametrize("fault, words", [
    ("stall", r"3 s \(rollout.vllm.load_timeout_s\) for it to take version 1|3 s for a portion of new weights"),
    ("die", "the connection broke while it was asked for a portion of new weights"),
])  # fmt: skip
def test_a_server_that_fails_between_portions_is_started_again_and_gets_the_version(
    engine_of, tmp_path, caplog, monkeypatch, fault, words
):
    monkeypatch.setattr("jaxrl.rollout.vllm_transfer.PORTION", 10_000)
    may_fail = tmp_path / "may_fail"
    may_fail.write_text(fault)
    engine = engine_of(transport="ipc", python=stub_python(tmp_path), env={"PORTION_FAULT": str(may_fail)})
    with caplog.at_level(logging.WARNING, "jaxrl"):
        engine.update_weights(weights(engine, 1), 1)
    assert versions(engine) == {1} and engine.pool.restarts == 1
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert re.search(words, said), said
    engine.close()
    assert not list(Path("/tmp").glob(f"jaxrl-stand-in-{os.getpid()}-*"))  # each buffer was given back


def test_a_server_that_is_started_again_is_sent_the_weights_while_it_is_asked_and_not_while_they_change(
    engine_of, tmp_path
):
    engine = engine_of(python=stub_python(tmp_path))
    variables = weights(engine, 1)
    engine.update_weights(variables, 1)
    lose(engine, 0)
    assert versions(engine) == {1}  # sent anew, since nothing else is left that answers
    lose(engine, 0)
    for x in jax.tree.leaves(variables):
        x.delete()  # as the donation of an update does
    until(engine, lambda: bool(engine.pool.servers[0].info) and engine.pool.restarts == 2)
    time.sleep(1.0)
    assert engine.pool.loads == 2
    engine.update_weights(weights(engine, 2), 2)
    assert versions(engine) == {2} and (engine.pool.loads, engine.pool.restarts) == (3, 2)


def test_training_waits_for_a_server_that_is_being_sent_the_weights(engine_of, tmp_path):
    """Two servers: one answers all prompts while the other one is started again."""
    may_fail = tmp_path / "may_fail"
    engine = engine_of(
        python=stub_python(tmp_path), num_servers=2, env={"STAND_IN_FAULT": f"stall 3 {may_fail}"}, max_restarts=9
    )
    variables = weights(engine, 1)
    engine.update_weights(variables, 1)
    both_serve(engine)
    may_fail.touch()
    lose(engine, 0)
    engine._call(engine.pool.lend())
    until(engine, lambda: engine.pool._catching_up > 0)
    while may_fail.exists():
        time.sleep(0.01)
    assert versions(engine) == {1}
    assert engine.pool._catching_up == 0  # the load ended, in vain, before `generate` did
    for x in jax.tree.leaves(variables):
        x.delete()
    engine.update_weights(weights(engine, 2), 2)
    assert versions(engine) == {2}


def test_a_server_that_hangs_once_it_has_started_holds_up_no_step(engine_of):
    """Of two that somebody else started, one answers what it is and nothing that its workers are asked."""
    with closing(Stub()) as good, closing(Stub()) as hangs:
        engine = engine_of(urls=(good.url, hangs.url), load_timeout_s=20.0, stall_timeout_s=3.0)
        engine.update_weights(weights(engine, 1), 1)
        both_serve(engine)
        hangs.answers["jaxrl_ping"] = lambda _: time.sleep(30) or (200, {"results": [{}]})
        hangs.answers["jaxrl_fits"] = hangs.answers["jaxrl_ping"]
        lose(engine, 1)
        started = time.monotonic()
        for version in (2, 3):
            engine.update_weights(weights(engine, version), version)
            assert versions(engine) == {version}
        assert time.monotonic() - started < 10.0


def test_a_group_ends_with_its_server_and_with_the_engine(engine_of, tmp_path):
    engine = engine_of(python=stub_python(tmp_path))
    engine.update_weights(weights(engine, 1), 1)
    first = engine.pool.servers[0].channel.communicator
    lose(engine, 0)
    assert versions(engine) == {1}
    second = engine.pool.servers[0].channel.communicator
    assert first is not second
    with pytest.raises(nccl.NcclError, match="no longer waited for it"):
        first.wait("it")
    second.wait("it")
    engine.close()
    with pytest.raises(nccl.NcclError, match="no longer waited for it"):
        second.wait("it")


# What is said at the start.


def test_another_version_of_nccl_is_said(engine_of, tmp_path):
    engine = engine_of(python=stub_python(tmp_path), env={"STAND_IN_VERSION": "22907"})
    with pytest.raises(
        EngineLost, match="its NCCL is 22907 and the trainer's 23000, which must be equal: install the same"
    ):
        engine.update_weights(weights(engine, 1), 1)


def test_a_server_that_was_not_started_for_nccl_is_refused_with_what_it_lacks():
    worker = Worker()
    worker.weight_transfer_engine = None
    (arguments,) = re.findall(
        r"nccl: start it with scripts/serve_vllm.py --args '(.*)'$", worker.jaxrl_nccl()["refused"]
    )
    line = command("python", ServerSpec("m", "127.0.0.1", 1, "f", args=json.loads(arguments)), "cuda")
    assert json.loads(line[line.index("--weight-transfer-config") + 1]) == {"backend": "nccl"}


def test_a_server_on_which_a_version_broke_off_takes_no_other(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXRL_MODEL", str(tmp_path))
    worker, manifest = Worker(), {"run": "run", "version": 1, "tensors": []}
    assert worker.jaxrl_fits(manifest) == {}
    worker._jaxrl_begin(SimpleNamespace(named_parameters=lambda: [("weight", None), ("bias", None)]))
    worker._jaxrl_hand(lambda tensors: {"weight"}, [("weight", None)])
    with pytest.raises(ValueError, match="1 parameters of the model got nothing, the first is bias"):
        worker._jaxrl_end()
    assert "start the server again" in worker.jaxrl_fits(manifest)["refused"]
    worker._jaxrl_hand(lambda tensors: {"bias"}, [("bias", None)])
    worker._jaxrl_end()
    assert worker.jaxrl_fits(manifest) == {}


@pytest.mark.skipif(find_library("cuda") is not None, reason="this host has a driver for NVIDIA's GPUs")
def test_a_host_without_a_gpu_is_said():
    # Another process: this one may have been given the stand-in.
    run = [sys.executable, "-c", "from jaxrl.rollout.cuda import driver; driver()"]
    said = subprocess.run(run, cwd=HERE.parent, capture_output=True, text=True).stderr.splitlines()[-1]
    assert re.fullmatch(
        r"ValueError: there is no GPU of NVIDIA's here: set rollout.vllm.transport to auto \(libcuda.*\)", said
    )


def test_a_host_without_nccl_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", str(tmp_path / "none.so"))
    nccl.nccl.cache_clear()
    with pytest.raises(
        ValueError,
        match="transport nccl needs NCCL 2.14 or newer: install the wheel nvidia-nccl-cu12 or -cu13, .*none.so",
    ):
        nccl.version()


def test_several_processes_are_refused(stand_in, tmp_path):
    source = open_pretrained(str(MODEL))
    config = model_config(Model(path="", compute_dtype="float32"), source.hf_config)
    link = SimpleNamespace(num_processes=2, is_first=True)
    with pytest.raises(ValueError, match="sends from the devices of one process, and the run has 2: set it to auto"):
        VllmEngine(
            config, make_mesh(1, 1, 1), VllmSection(transport="nccl", python="p"), source=source, folder=tmp_path,
            max_model_len=64, max_num_seqs=4, link=link,
        )  # fmt: skip


def settings(mode: str = "sync", rank: int = 0, **vllm) -> dict:
    return {
        "model": {"path": "m", "lora_rank": rank}, "data": {"train_files": "task:arithmetic"},
        "trainer": {"experiment_name": "x", "trainer_mode": mode}, "reward": {"functions": [{"name": "exact_number"}]},
        "algorithm": {"rollout_correction": {"bypass_mode": True}},
        "rollout": {"engine": "vllm", "vllm": {"python": "p", "transport": "nccl", **vllm}},
    }  # fmt: skip


def test_settings_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="nccl sends whole models: set rollout.vllm.publish to merged"):
        from_dict(settings(rank=4, publish="adapter"))
    with pytest.raises(
        ValueError, match="one_step_off changes while servers answer with them: set trainer.trainer_mode"
    ):
        from_dict(settings(mode="one_step_off"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ValueError, match="nccl wants vLLM on GPUs of its own .rollout.vllm.devices"):
        prepare_environment(from_dict(settings(devices=["0"])))
    with pytest.raises(
        ValueError, match="ipc wants each vLLM on the trainer's first GPU, and one has another: set it to nccl"
    ):
        prepare_environment(from_dict(settings(devices=["1"], transport="ipc")))
    with pytest.raises(ValueError, match="ipc is for servers that are started here, on the trainer's GPU"):
        from_dict(settings(python=None, urls=["http://h:1"], transport="ipc"))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    prepare_environment(from_dict(settings(devices=["1"])))
    prepare_environment(from_dict(settings(devices=["0"], transport="ipc")))


# A real vLLM.


@pytest.fixture(scope="module")
def real(stand_in, vllm_python, served_models, tmp_path_factory) -> Iterator[VllmEngine]:
    """With a tied head, which a reload on a CPU does not refresh."""
    folder = tmp_path_factory.mktemp("real")
    python = folder / "python"
    python.mkdir()
    (python / "jaxrl").symlink_to(Path(jaxrl.__file__).parent)
    shutil.copy(HERE / "vllm_without_gpu.py", python / "sitecustomize.py")
    fault = f"die 4 {folder / 'may_fail'}"
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(python), "STAND_IN_FAULT": fault}
    source = open_pretrained(served_models["tied"])
    config = model_config(Model(path="", compute_dtype="float32"), source.hf_config)
    section = VllmSection(transport="nccl", python=vllm_python, env=env, load_timeout_s=60.0)
    with closing(opened(source, config, section, folder)) as engine:
        yield engine


def opened(source: Pretrained, config: ModelConfig, section: VllmSection, folder: Path) -> VllmEngine:
    return VllmEngine(
        config, make_mesh(1, 2, 1), section, source=source, folder=folder, max_model_len=128, max_num_seqs=8
    )


def assert_answers_with(engine: VllmEngine, variables: dict, version: int) -> None:
    """The logprobs of what it samples are the JAX model's with these weights, to float32's rounding."""
    (rollout,) = engine.generate([Prompt([3, 5, 7], "", "", None, {}, None, 0)], Sampling(max_tokens=40), seed=version)
    assert rollout.weights_version == version
    tokens = np.array([[3, 5, 7, *rollout.token_ids]], np.int32)
    places, ones = np.arange(tokens.size)[None], np.ones_like(tokens)
    variables = jax.device_get(variables)
    hidden = hidden_states(engine.config, variables, tokens, places, ones, ones)[0, 2:-1]
    logprobs = jax.nn.log_softmax(hidden @ head_table(engine.config, variables["params"]).T)
    np.testing.assert_allclose(rollout.logprobs, logprobs[np.arange(40), rollout.token_ids], atol=1e-3)


def trained(engine: VllmEngine, version: int) -> dict:
    params = load_base(engine.source, engine.config, abstract_variables(engine.mesh, engine.config, "lm"))
    return {"params": jax.tree.map(lambda x: x * (1 + 0.05 * version), params)}


def test_vllm_answers_with_each_version_that_came_by_nccl(real):
    for version in (1, 2, 3):
        real.update_weights(trained(real, version), version)
        assert_answers_with(real, trained(real, version), version)
    assert real.pool.loads == 3 and real.pool.restarts == 0


def test_vllm_refuses_tensors_of_another_model_and_the_version_before_answers(real):
    real.update_weights(trained(real, 4), 4)
    layout = real.folder / "model" / LAYOUT_FILE  # of what is served
    own = layout.read_text()
    layout.write_text(json.dumps(json.loads(own) | {"model.norm.weight": [33]}))
    with pytest.raises(
        Refused, match=r"version 5 of the weights: tensor model.norm.weight has shape \[32\], and .* \[33\]"
    ):
        real.update_weights(trained(real, 5), 5)
    layout.write_text(own)
    assert_answers_with(real, trained(real, 4), 4)
    assert real.pool.restarts == 0


def test_vllm_answers_with_each_version_that_came_by_ipc(real, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrl.rollout.vllm_transfer.PORTION", 10_000)
    real._call(real.pool.until(lambda: all_serve(real)))
    (server,) = real.pool.servers
    monkeypatch.setenv("VLLM_API_KEY", server.key)
    section = VllmSection(transport="ipc", urls=(server.process.url,))
    with closing(opened(real.source, real.config, section, tmp_path)) as engine:
        for version in (1, 2):
            engine.update_weights(trained(real, version + 10), version)
            assert_answers_with(engine, trained(real, version + 10), version)
        assert engine.pool.loads == 2 and engine.pool.restarts == 0


def test_a_vllm_that_dies_in_the_middle_comes_back_with_the_version(real):
    (real.folder / "may_fail").touch()
    real.update_weights(trained(real, 6), 6)
    assert not (real.folder / "may_fail").exists() and real.pool.restarts == 1
    assert_answers_with(real, trained(real, 6), 6)
