"""The engine on real vLLM servers, on the CPU: always the weights that were published, and what is asked of it.

Two servers hold a model with a tied head and are started by the engine; one holds an untied model, is started by
scripts/serve_vllm.py as for another host, and gets its weights over HTTP.
"""

import asyncio
import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import httpx
import jax
import numpy as np
import pytest
import torch
from letters import metrics_of
from letters import settings as settings_of
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxrl.batch import Prompt, Rollout
from jaxrl.config import Model, VllmSection, from_dict
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import head_table, hidden_states, init_params
from jaxrl.models.truncation import keep_top_k, keep_top_p
from jaxrl.parallel import make_mesh
from jaxrl.roles import abstract_variables, actor_config, load_base, model_config
from jaxrl.rollout.engine import Engine, Sampling
from jaxrl.rollout.jax_engine import JaxEngine
from jaxrl.rollout.protocol import Refused
from jaxrl.rollout.turns import Turns
from jaxrl.rollout.vllm_client import ServerLost
from jaxrl.rollout.vllm_engine import VllmEngine
from jaxrl.rollout.vllm_pool import SERVING, Server
from jaxrl.trainer import Trainer
from jaxrl.weights.export import export_hf
from jaxrl.weights.load import load_params
from jaxrl.weights.packed import load_packed
from jaxrl.weights.pretrained import Pretrained, open_pretrained
from jaxrl.weights.sync import FileSink, model_export

ROOT = Path(__file__).parents[1]
KEY = "a key for tests"
ENV = {"OMP_NUM_THREADS": "1"}


class Served(NamedTuple):
    """An engine, and what its model is."""

    engine: VllmEngine
    config: ModelConfig
    source: Pretrained
    params: dict
    folder: Path


def opened(source: Pretrained, folder: Path, **settings) -> Served:
    mesh = make_mesh(1, 1, 1)
    config = model_config(Model(path="", compute_dtype="float32"), source.hf_config)
    params = load_base(source, config, abstract_variables(mesh, config, "lm"))
    section = VllmSection(env=ENV, **settings)
    engine = VllmEngine(
        config, mesh, section, source=source, folder=folder, max_model_len=256, max_num_seqs=16, sleeps=True
    )
    return Served(engine, config, source, params, folder)


@pytest.fixture(scope="module")
def url(vllm_python, served_models, tmp_path_factory) -> Iterator[str]:
    """Of a server that scripts/serve_vllm.py started."""
    folder = tmp_path_factory.mktemp("serve")
    command = [sys.executable, "scripts/serve_vllm.py", str(served_models["untied"]), "--python", vllm_python]
    command += ["--port", "0", "--max-model-len", "256", "--max-num-seqs", "16", "--folder", str(folder)]
    env = os.environ | ENV | {"VLLM_API_KEY": KEY}
    serving = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    for line in serving.stdout:
        if line.startswith("ready: rollout.vllm.urls=["):
            break
    else:
        pytest.fail((folder / "server.log").read_text()[-5000:])
    yield line.split("[")[1].split("]")[0]
    serving.terminate()
    assert serving.wait(120) == 0


@pytest.fixture(scope="module")
def tied(vllm_python, served_models, tmp_path_factory) -> Iterator[Served]:
    source, folder = open_pretrained(served_models["tied"]), tmp_path_factory.mktemp("tied")
    served = opened(source, folder, python=vllm_python, num_servers=2)
    with closing(served.engine):
        both_serve(served)
        yield served


@pytest.fixture(scope="module")
def untied(url, served_models, tmp_path_factory) -> Iterator[Served]:
    os.environ["VLLM_API_KEY"] = KEY
    source = open_pretrained(served_models["untied"])
    served = opened(source, tmp_path_factory.mktemp("untied"), urls=(url,), transport="http")
    yield served
    served.engine.close()


@pytest.fixture(params=["tied", "untied"])
def served(request) -> Served:
    return request.getfixturevalue(request.param)


def both_serve(served: Served) -> list[Server]:
    pool = served.engine.pool
    ready = pool.until(lambda: all(server.state == SERVING for server in pool.servers))
    served.engine._call(asyncio.wait_for(ready, 600.0))
    return pool.servers


def urls_of(served: Served, monkeypatch) -> tuple[str, ...]:
    """For another engine on its servers."""
    servers = both_serve(served)
    monkeypatch.setenv("VLLM_API_KEY", servers[0].key)
    return tuple(server.process.url for server in servers if server.process is not None)


def prompt_of(ids: list[int], index: int = 0) -> Prompt:
    return Prompt(ids, "", "", None, {}, None, index)


def changed(params: dict, version: int) -> dict:
    """Weights that visibly differ from those of other versions, in the head too."""
    key = jax.random.key(version)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.fold_in(key, x.size), x.shape), params)


def logprobs_by_transformers(served: Served, params: dict, folder: Path, rollouts: list[Rollout], prompts) -> list:
    """Of the responses, by transformers on the exported folder."""
    export_hf(params, served.config, folder, source_folder=served.source, dtype="float32", overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for r in rollouts:
        prompt = prompts[r.group].token_ids
        ids = torch.tensor([[*prompt, *r.token_ids.tolist()]])
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        found.append(logprobs[torch.arange(len(r.token_ids)), torch.tensor(r.token_ids.tolist())].numpy())
    return found


def test_five_updates_answer_with_their_own_weights_also_with_a_warm_prefix_cache(served, tmp_path):
    # Longer than the 128 tokens from which on vLLM keeps prefixes; asked again at every version, so that it could.
    prompts = [prompt_of([3 + (7 * i + j) % 70 for j in range(200)], i) for i in range(2)]
    sampling = Sampling(max_tokens=12, n=3, stop_ids=(1,))
    texts = set()
    for version in range(5):
        params = changed(served.params, version)
        if version % 2:
            served.engine.sleep()
        served.engine.update_weights({"params": params}, version)
        for seed in range(2):
            rollouts = served.engine.generate(prompts, sampling, seed=seed)
            assert [r.group for r in rollouts] == [0, 0, 0, 1, 1, 1]
            assert {r.weights_version for r in rollouts} == {version}
            expected = logprobs_by_transformers(served, params, tmp_path / "hf", rollouts, prompts)
            for r, logprobs in zip(rollouts, expected, strict=True):
                np.testing.assert_allclose(r.logprobs, logprobs, atol=1e-3)
        texts.add(tuple(rollouts[0].token_ids))
    assert len(texts) == 5  # the weights did differ


def test_responses_are_those_of_the_jax_engine_where_nothing_is_left_to_chance(tied):
    tied.engine.update_weights({"params": tied.params}, 10)
    ours = JaxEngine(tied.config)
    ours.update_weights({"params": tied.params}, 10)
    prompts = [prompt_of([3 + i, 5, 7], i) for i in range(4)]
    free = ours.generate(prompts, Sampling(max_tokens=20, temperature=0.0), seed=0)
    stops = (int(free[0].token_ids[5]),)
    for sampling in (
        Sampling(max_tokens=20, temperature=0.0, stop_ids=stops),
        Sampling(max_tokens=20, top_k=1, n=2, stop_ids=stops),
    ):
        theirs = tied.engine.generate(prompts, sampling, seed=0)
        for a, b in zip(theirs, ours.generate(prompts, sampling, seed=0), strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)
            assert (a.finished, a.group, a.weights_version) == (b.finished, b.group, b.weights_version)
        assert theirs[0].finished and len(theirs[0].token_ids) <= 6


def test_logprobs_are_of_the_distribution_that_was_sampled_from(tied):
    """The JAX engine's program scores the very tokens that vLLM drew, at this temperature, top-k and top-p."""

    tied.engine.update_weights({"params": tied.params}, 11)
    sampling = Sampling(max_tokens=16, n=4, temperature=0.7, top_k=9, top_p=0.8)
    prompt = [3, 5, 7]
    for r in tied.engine.generate([prompt_of(prompt)], sampling, seed=0):
        tokens = np.array([[*prompt, *r.token_ids]])
        places, ones = np.arange(tokens.shape[1])[None], np.ones_like(tokens)
        variables = {"params": tied.params}
        hidden = hidden_states(tied.config, variables, tokens, places, ones, ones)[0, len(prompt) - 1 : -1]
        logits = hidden @ head_table(tied.config, tied.params).T / 0.7
        logits = keep_top_p(keep_top_k(logits, np.int32(9)), np.float32(0.8))
        logprobs = jax.nn.log_softmax(logits)[np.arange(len(r.token_ids)), r.token_ids]
        np.testing.assert_allclose(r.logprobs, logprobs, atol=1e-3)


def test_the_same_seed_draws_the_same_and_another_one_does_not(tied):
    tied.engine.update_weights({"params": tied.params}, 12)
    prompts = [prompt_of([3 + i, 5], i) for i in range(3)]
    # More responses to a prompt than the server decodes at once: they are asked for in parts.
    sampling = Sampling(max_tokens=8, n=20)
    a, b, c = (tied.engine.generate(prompts, sampling, seed=seed) for seed in (1, 1, 2))
    drawn = [[tuple(r.token_ids) for r in rollouts] for rollouts in (a, b, c)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 50


def test_stop_strings_bad_words_grammars_and_limits_reach_vllm(tied):
    tied.engine.update_weights({"params": tied.params}, 13)
    letters = {i + 2: letter for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789+= ")}
    prompts = [prompt_of([3, 5], 0), prompt_of([4, 6], 1)]

    def drawn(**settings) -> list[Rollout]:
        return tied.engine.generate(prompts, Sampling(max_tokens=20, n=4, **settings), seed=0)

    free = drawn()
    most = max(letters, key=lambda i: sum((r.token_ids == i).sum() for r in free))
    stopped = drawn(stop=(letters[most],))
    assert any(r.finished and r.token_ids[-1] == most for r in stopped)
    assert all(most not in r.token_ids[:-1] for r in stopped)
    assert all(most not in r.token_ids for r in drawn(bad_words=(letters[most],)))
    reports = []
    each = tied.engine.generate(
        prompts, Sampling(max_tokens=20, n=2, max_tokens_each=(3, 7)), seed=0, report=lambda *x: reports.append(x)
    )
    assert [len(r.token_ids) for r in each] == [3, 3, 7, 7]
    assert reports[-1] == (4, 20)
    chosen = drawn(guided={"choice": ["ab", "cd"]}, stop_ids=(1,))
    assert {"".join(letters[i] for i in r.token_ids if i in letters) for r in chosen} <= {"ab", "cd"}


def test_what_the_model_cannot_answer_is_refused_by_row(tied):
    with pytest.raises(
        ValueError, match="the prompt of row 7 has 250 tokens, and .* longer than the model's context of 256"
    ):
        tied.engine.generate([prompt_of([3] * 250, 7)], Sampling(max_tokens=8), seed=0)


def test_weights_that_went_wrong_are_refused_and_the_old_ones_go_on_answering(served):
    engine, sampling = served.engine, Sampling(max_tokens=8, n=2)
    engine.update_weights({"params": served.params}, 20)
    before = engine.generate([prompt_of([3, 5])], sampling, seed=0)
    broken = jax.tree.map(lambda x: x, served.params)
    broken["norm"]["scale"] = broken["norm"]["scale"].at[3].set(np.nan)
    with pytest.raises(ValueError, match="version 21 of the weights has NaN or infinity in model.norm.weight"):
        engine.update_weights({"params": broken}, 21)
    after = engine.generate([prompt_of([3, 5])], sampling, seed=0)
    assert [tuple(r.token_ids) for r in after] == [tuple(r.token_ids) for r in before]
    assert {r.weights_version for r in after} == {20}


def test_truncated_foreign_and_misshapen_exports_are_refused_and_the_old_weights_go_on_answering(tied):
    """On the way to a real server: files that are not what was announced, and a model that it does not serve."""
    engine, sampling = tied.engine, Sampling(max_tokens=8, n=2)
    engine.update_weights({"params": changed(tied.params, 30)}, 30)
    before = engine.generate([prompt_of([3, 5])], sampling, seed=0)
    server = engine.pool.servers[0]
    publication = engine._publication
    path, manifest = engine._call(publication.place(server)), publication.manifest
    other = Path(path).with_name("other.safetensors")
    data = Path(path).read_bytes()

    def refused(words: str, content: bytes, manifest) -> None:
        other.write_bytes(content)
        with pytest.raises(Refused, match=words):
            engine._call(server.client.load(str(other), manifest, timeout_s=60.0))

    refused("truncated", data[:-100], manifest)
    refused("it holds version 30 of run", data, dataclasses.replace(manifest, run="another"))
    refused("damaged on its way", data[:-1] + bytes([data[-1] ^ 1]), manifest)
    larger = dataclasses.replace(tied.config, vocab_size=96)

    for config, words in (
        (larger, r"model.embed_tokens.weight has shape \[96, 32\], and the model that is served \[80, 32\]"),
        (dataclasses.replace(tied.config, num_layers=1), "lacks 9 tensors of the model that is served"),
        (dataclasses.replace(tied.config, tie_embeddings=False), "is of another model .* has no tensor lm_head.weight"),
    ):
        export = model_export(engine.run, 31, init_params(config, "lm", jax.random.key(0)), config, "float32")
        sink = FileSink(other)
        export.send([sink])
        sink.close()
        refused(words, other.read_bytes(), export.manifest)
    after = engine.generate([prompt_of([3, 5])], sampling, seed=0)
    assert [tuple(r.token_ids) for r in after] == [tuple(r.token_ids) for r in before]


def test_a_server_that_answers_with_other_weights_is_found_by_the_probe(tied):
    """The bound is what finds it: here the trainer's logprobs are of other weights than those it sends."""
    engine = tied.engine
    engine.update_weights({"params": tied.params}, 40)
    server, publication = engine.pool.servers[0], engine._publication
    publication.probe_logprobs = [x - 0.01 for x in publication.probe_logprobs]

    with pytest.raises(
        ServerLost, match="does not answer with these weights: .* are 0.01 from the trainer's in the mean"
    ):
        engine._call(engine.pool._probe(server, publication))


def test_unchanged_weights_do_not_travel(tied):
    engine = tied.engine
    engine.update_weights({"params": tied.params}, 50)
    loads = engine.pool.loads
    engine.update_weights({"params": tied.params}, 51)
    assert engine.pool.loads == loads
    assert {r.weights_version for r in engine.generate([prompt_of([3, 5])], Sampling(max_tokens=2), seed=0)} == {51}


def test_only_what_changed_is_uploaded_and_the_server_answers_with_all_of_it(untied, tmp_path):
    prompts, sampling = [prompt_of([3, 5, 7])], Sampling(max_tokens=8, n=2)
    first = changed(untied.params, 52)
    untied.engine.update_weights({"params": first}, 52)
    whole, loads = untied.engine.weights_gb, untied.engine.pool.loads
    for version in (53, 100):  # a longer number does not move what follows it
        params = {**first, "norm": {"scale": first["norm"]["scale"] * version / 50}}
        untied.engine.update_weights({"params": params}, version)
        assert 0 < untied.engine.weights_gb < 0.2 * whole
        rollouts = untied.engine.generate(prompts, sampling, seed=0)
        assert {r.weights_version for r in rollouts} == {version}
        expected = logprobs_by_transformers(untied, params, tmp_path / "hf", rollouts, prompts)
        for r, logprobs in zip(rollouts, expected, strict=True):
            np.testing.assert_allclose(r.logprobs, logprobs, atol=1e-3)
    untied.engine.update_weights({"params": params}, 102)
    assert untied.engine.weights_gb == 0 and untied.engine.pool.loads == loads + 2
    assert {r.weights_version for r in untied.engine.generate(prompts, sampling, seed=0)} == {102}


def test_a_wrong_key_is_said(url, served_models, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    served = opened(open_pretrained(served_models["untied"]), tmp_path, urls=(url,))
    try:
        with pytest.raises(ValueError, match=f"{url} refuses the API key: set the environment variable VLLM_API_KEY"):
            served.engine.update_weights({"params": served.params}, 0)
    finally:
        served.engine.close()


def test_every_route_asks_for_the_key(url):

    for method, route in (
        ("POST", "/collective_rpc"),
        ("GET", "/v1/models"),
        ("PUT", "/jaxrl/weights/v1/model.safetensors"),
    ):
        reply = httpx.request(method, url + route, headers={"Authorization": "Bearer other"})
        assert reply.status_code == 401, route
    assert httpx.get(url + "/health").status_code == 200


def test_a_server_that_is_not_there_is_dropped_and_the_others_go_on(url, served_models, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    urls = ("http://127.0.0.1:9", url)
    served = opened(open_pretrained(served_models["untied"]), tmp_path, urls=urls, start_timeout_s=3.0)
    try:
        served.engine.update_weights({"params": served.params}, 0)  # by shared memory: it sees ours
        prompts = [prompt_of([3 + i], i) for i in range(12)]
        rollouts = served.engine.generate(prompts, Sampling(max_tokens=4, n=3), seed=0)
        assert [r.group for r in rollouts] == [p for p in range(12) for _ in range(3)]
        deadline = time.monotonic() + 120.0
        while served.engine.pool.servers[0].state != "dead":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "it was waited for 3 s (rollout.vllm.start_timeout_s) to start" in served.engine.pool.servers[0].reason
        served.engine.update_weights({"params": changed(served.params, 1)}, 1)
        assert {r.weights_version for r in served.engine.generate(prompts, Sampling(max_tokens=4), seed=0)} == {1}
    finally:
        served.engine.close()


def test_weights_on_a_shared_disk_are_read_from_there_and_go_at_the_end(url, served_models, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    source, shared = open_pretrained(served_models["untied"]), tmp_path / "shared"
    served = opened(source, tmp_path / "run", urls=(url,), transport="file", file_dir=str(shared))
    try:
        prompts, sampling = [prompt_of([3, 5, 7])], Sampling(max_tokens=8, n=2)
        for version in range(2):
            params = changed(served.params, version)
            served.engine.update_weights({"params": params}, version)
            rollouts = served.engine.generate(prompts, sampling, seed=0)
            assert {r.weights_version for r in rollouts} == {version}
            expected = logprobs_by_transformers(served, params, tmp_path / "hf", rollouts, prompts)
            for r, logprobs in zip(rollouts, expected, strict=True):
                np.testing.assert_allclose(r.logprobs, logprobs, atol=1e-3)
        assert (served.engine.pool.loads, served.engine.pool.restarts) == (2, 0)
        served.engine._forgetting.join()
        assert [path.name.partition("-")[0] for path in shared.glob("*/*")] == ["v1"]
    finally:
        served.engine.close()
    assert not list(shared.iterdir())


def test_prompts_that_fill_more_than_one_step_of_the_server_are_read_whole(vllm_python, served_models, tmp_path):
    # Of 256 tokens a step the third prompt would be cut, which ends vLLM's engine on a CPU: its draws are seeded.
    source = open_pretrained(served_models["tied"])
    served = opened(source, tmp_path, python=vllm_python, args={"max_num_batched_tokens": 256})
    prompts = [prompt_of([3 + (7 * i + j) % 70 for j in range(100)], i) for i in range(5)]
    try:
        served.engine.update_weights({"params": served.params}, 1)
        process = served.engine.pool.servers[0].process
        assert process is not None
        before = process.pid
        rollouts = served.engine.generate(prompts, Sampling(max_tokens=4, n=2), seed=0)
        assert [r.group for r in rollouts] == [p for p in range(5) for _ in range(2)]
        assert process.pid == before, "the server was started again"
    finally:
        served.engine.close()


def in_four_bits(model: Path, folder: Path) -> Path:
    """The model as bitsandbytes writes it in NF4: a code of four bits for each number, and a scale for each 64 of them."""
    like = load_file(ROOT / "tests" / "data" / "bnb_nf4" / "llama-nf4-single" / "model.safetensors")
    table = like["model.layers.0.mlp.up_proj.weight.quant_map"]
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        shape, blocks = tensors[name].shape, tensors[name].reshape(-1, 64)
        scales = np.abs(blocks).max(axis=1)
        codes = np.abs(blocks[..., None] / scales[:, None, None] - table).argmin(axis=-1).reshape(-1, 2)
        state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": shape})
        tensors |= {
            name: (codes[:, :1] * 16 + codes[:, 1:]).astype(np.uint8), f"{name}.absmax": scales,
            f"{name}.quant_map": table,
            f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(state.encode(), np.uint8),
        }  # fmt: skip
    shutil.copytree(model, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((model / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def base_of_adapters(source: Pretrained) -> tuple[ModelConfig, dict]:
    """The model with room for adapters, and what stays as it is: in 4 bits where the source is."""
    targets = ("q_proj", "o_proj", "down_proj")
    config = actor_config(
        Model(path="", compute_dtype="float32", lora_rank=4, lora_alpha=8.0, lora_targets=targets), source
    )
    wanted = abstract_variables(make_mesh(1, 1, 1), config, "lm")
    base = {"params": load_params(source.checkpoint, config, wanted["params"])}
    if config.packed is not None:
        base["packed"] = load_packed(source.checkpoint, config, wanted["packed"])
    return config, base


def answers_to_three_adapters(engine: Engine, base: dict, lora: dict) -> list[Rollout]:
    prompts = [prompt_of([3 + (7 * i + j) % 70 for j in range(150)], i) for i in range(4)]
    answers = []
    for version in range(3):
        key = jax.random.key(version)
        moved = jax.tree.map(lambda x, v=version, key=key: x + 0.05 * v * jax.random.normal(key, x.shape), lora)
        engine.update_weights(base | {"lora": moved}, version)
        answers += engine.generate(prompts, Sampling(max_tokens=16, temperature=0.0), seed=0)
    return answers


def test_adapters_alone_go_to_a_server_that_holds_the_base(vllm_python, served_models, tmp_path, monkeypatch):
    """It holds numbers, whether the trainer does too or, for QLoRA, has them in 4 bits."""
    source = open_pretrained(in_four_bits(served_models["tied"], tmp_path / "nf4"))
    config, base = base_of_adapters(source)
    assert config.packed is not None and len(config.packed.modules) == 7
    lora = init_params(config, "lm", jax.random.key(0))["lora"]
    expected = answers_to_three_adapters(JaxEngine(config), base, lora)
    assert len({tuple(r.token_ids) for r in expected[::4]}) == 3  # of the first prompt: the adapters do differ

    def assert_are_followed(stack: ExitStack, source: Pretrained, folder: Path, **settings) -> Server:
        config, base = base_of_adapters(source)
        section = VllmSection(env=ENV, publish="adapter", **settings)
        engine = VllmEngine(
            config, make_mesh(1, 1, 1), section, source=source, folder=folder, max_model_len=256, max_num_seqs=16
        )
        stack.enter_context(closing(engine))
        for a, b in zip(answers_to_three_adapters(engine, base, lora), expected, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)
            assert a.weights_version == b.weights_version
        return engine.pool.servers[0]

    with ExitStack() as stack:
        server = assert_are_followed(stack, source, tmp_path / "qlora", python=vllm_python)
        monkeypatch.setenv("VLLM_API_KEY", server.key)
        unpacked = open_pretrained(tmp_path / "qlora" / "base")
        assert_are_followed(stack, unpacked, tmp_path / "lora", urls=(server.process.url,))


def test_merged_adapters_are_published_without_a_restart(tied, tmp_path, monkeypatch):
    # They change nothing but packed weights, which no look at live parameters sees on a CPU.
    config = dataclasses.replace(tied.config, lora_rank=4, lora_alpha=8.0, lora_targets=("q_proj", "down_proj"))
    lora = init_params(config, "lm", jax.random.key(0))["lora"]
    settings = VllmSection(urls=urls_of(tied, monkeypatch)[:1])
    engine = VllmEngine(
        config, make_mesh(1, 1, 1), settings, source=tied.source, folder=tmp_path, max_model_len=256, max_num_seqs=16
    )
    try:
        for version in range(3):
            moved = jax.tree.map(lambda x, v=version: x + 0.1 * v, lora)
            engine.update_weights({"params": tied.params, "lora": moved}, version)
            rollouts = engine.generate([prompt_of([3, 5, 7])], Sampling(max_tokens=8, n=2), seed=0)
            assert {r.weights_version for r in rollouts} == {version}
        assert (engine.pool.restarts, engine.pool.loads) == (0, 3)
    finally:
        engine.close()


def test_what_a_function_appends_between_turns_is_conditioned_on_and_not_trained_on(tied, served_models, tmp_path):
    (tmp_path / "tools.py").write_text("def count(turn):\n    return str(turn.number) if turn.number < 3 else None\n")
    tokenizer = AutoTokenizer.from_pretrained(served_models["tied"])
    prompts, params = [prompt_of([3 + i, 5, 7], i) for i in range(4)], changed(tied.params, 60)
    stops = tuple(range(1, 60))  # most words, so that turns are short
    tied.engine.update_weights({"params": params}, 60)
    turns = Turns(
        tied.engine, tokenizer, f"{tmp_path}/tools.py:count", kwargs={}, max_assistant_turns=4, timeout_s=10.0,
        template_kwargs={},
    )  # fmt: skip
    with closing(turns):
        rollouts = turns.generate(prompts, Sampling(max_tokens=24, n=4, stop_ids=stops), seed=0)
    expected = logprobs_by_transformers(tied, params, tmp_path / "hf", rollouts, prompts)
    for r, logprobs in zip(rollouts, expected, strict=True):
        np.testing.assert_allclose(r.logprobs, np.where(r.response_mask, logprobs, 0.0), atol=1e-3)
        assert tokenizer.decode(r.token_ids[~r.response_mask]).replace(" ", "") == "12"[: r.num_turns - 1]
        assert r.weights_version == 60
    assert max(r.num_turns for r in rollouts) == 3


def test_the_doctor_finds_engine_and_trainer_agree(url, served_models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    rollout = {"engine": "vllm", "max_num_seqs": 16, "vllm": {"urls": [url], "transport": "http"}}
    tree = settings_of(tmp_path / "run", model={"path": str(served_models["untied"])}, rollout=rollout)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--config", str(tmp_path / "config.json")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "doctor.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.count("The engine and the trainer agree.") == 2, said


REWARD = """
def letters(solution_str):
    return sum(map(ord, solution_str)) % 7 / 7
"""


def test_a_run_on_the_sidecar_is_the_run_on_the_jax_engine_where_nothing_is_left_to_chance(
    url, served_models, tmp_path, monkeypatch
):
    """top_k 1: both engines draw the same tokens, so the first step's numbers are the same but for rounding."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"{a}+{b}=", "data_source": "sums"} for a in range(4) for b in range(4)]
    for split, part in (("train", rows[:8]), ("val", rows[8:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    logs = {}
    for name, rollout in (("jax", {}), ("vllm", {"engine": "vllm", "vllm": {"urls": [url], "transport": "http"}})):
        tree = {
            "model": {"path": str(served_models["untied"]), "compute_dtype": "float32"},
            "data": {
                "train_files": str(tmp_path / "train.jsonl"), "val_files": str(tmp_path / "val.jsonl"),
                "max_prompt_length": 8, "max_response_length": 6, "train_batch_size": 8,
            },
            "rollout": {
                "top_k": 1, "max_num_seqs": 16, "val_kwargs": {"top_k": 1, "temperature": 1.0, "n": 2, "greedy": True},
                **rollout,
            },
            "reward": {"functions": [{"name": f"{tmp_path}/reward.py:letters"}]},
            "algorithm": {"adv_estimator": "reinforce_plus_plus"},
            "actor": {"ppo_mini_batch_size": 8, "ppo_max_token_len_per_gpu": 256, "optim": {"lr": 1e-3}},
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
            "trainer": {
                "experiment_name": name, "run_dir": str(tmp_path / name), "row_length": 64, "total_training_steps": 2,
                "test_freq": 1,
            },
        }  # fmt: skip
        Trainer(from_dict(tree)).fit()
        logs[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
    for theirs, ours in zip(logs["vllm"], logs["jax"], strict=True):
        names = [name for name, value in ours.items() if not (name.startswith(("timing", "perf/")) or value != value)]
        for name in names:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-4), (ours["step"], name)
    assert logs["vllm"][1]["actor/grad_norm"] > 0
    assert {"val-core/sums/reward/mean@1", "val-core/sums/reward/mean@2"} <= logs["vllm"][0].keys()


def test_a_run_learns_on_the_sidecar_as_it_does_on_the_jax_engine(url, served_models, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    for name, rollout in (("jax", {}), ("vllm", {"engine": "vllm", "vllm": {"urls": [url], "transport": "http"}})):
        tree = settings_of(
            tmp_path / name, model={"path": str(served_models["untied"])}, rollout={"max_num_seqs": 16, **rollout},
            trainer={"total_training_steps": 16},
        )  # fmt: skip
        Trainer(from_dict(tree)).fit()
        rows = metrics_of(tmp_path / name)
        reward = [row["critic/score/mean"] for row in rows]
        assert np.mean(reward[:3]) < 0.2 and np.mean(reward[-3:]) > 0.9, (name, reward)
        assert all(row["training/rollout_probs_diff_max"] < 1e-4 for row in rows), name  # each with the weights of now


def test_a_run_one_step_off_publishes_while_its_servers_may_still_answer(tied, served_models, tmp_path, monkeypatch):
    tree = settings_of(
        tmp_path / "run", model={"path": str(served_models["tied"])},
        algorithm={"rollout_correction": {"rollout_is": "token"}},
        rollout={"engine": "vllm", "max_num_seqs": 16, "vllm": {"urls": list(urls_of(tied, monkeypatch))}},
        trainer={"trainer_mode": "one_step_off", "total_training_steps": 3},
    )  # fmt: skip
    trainer, came_before_wait = Trainer(from_dict(tree)), []
    publish = trainer.engine.update_weights

    def update_weights(variables, version):
        came_before_wait.append(trainer.ahead._pending is not None)
        publish(variables, version)

    monkeypatch.setattr(trainer.engine, "update_weights", update_weights)
    trainer.fit()
    rows = metrics_of(tmp_path / "run")
    assert came_before_wait == [False, True, True, False]
    assert [row["training/staleness"] for row in rows] == [0, 1, 1]
    assert rows[0]["training/rollout_probs_diff_max"] < 1e-4 < rows[1]["training/rollout_probs_diff_max"]
    assert all(row["perf/overlap_s"] > 0 for row in rows[:-1])
    assert all(row["perf/update_weights_gb"] > 0 for row in rows)


def test_two_servers_share_the_work_take_the_weights_of_now_and_stand_in_for_each_other(tied, tmp_path):
    engine, servers = tied.engine, both_serve(tied)
    prompts, sampling = [prompt_of([3 + i, 5, 7], i) for i in range(24)], Sampling(max_tokens=60, n=4)
    versions = {version: changed(tied.params, version) for version in (70, 71)}
    busy, begun = set(), threading.Event()

    def report(num_finished: int, _: int) -> None:
        busy.update(server.name for server in servers if server.in_flight)
        if num_finished:
            begun.set()

    def assert_are_of(version: int, rollouts: list[Rollout]) -> None:
        assert [r.group for r in rollouts] == [p for p in range(24) for _ in range(4)]
        assert {r.weights_version for r in rollouts} == {version}
        expected = logprobs_by_transformers(tied, versions[version], tmp_path / "hf", rollouts, prompts)
        for r, logprobs in zip(rollouts, expected, strict=True):
            np.testing.assert_allclose(r.logprobs, logprobs, atol=1e-3)

    engine.update_weights({"params": versions[70]}, 70)
    with ThreadPoolExecutor(1) as beside:
        drawing = beside.submit(engine.generate, prompts, sampling, seed=0, report=report)
        assert begun.wait(60.0)
        engine.update_weights({"params": versions[71]}, 71)  # what is under way is answered with the weights before
        assert_are_of(70, drawing.result())
        assert busy == {"server 0", "server 1"}
        for server in servers:
            engine._call(engine.pool._probe(server, engine._publication))
        begun.clear()
        os.killpg(servers[0].process.pid, signal.SIGSTOP)  # it answers nothing of what it is asked before it is killed
        drawing = beside.submit(engine.generate, prompts, sampling, seed=0, report=report)
        assert begun.wait(60.0)  # the other one has answered
        os.killpg(servers[0].process.pid, signal.SIGKILL)
        rollouts = drawing.result()
    assert_are_of(71, rollouts)
    assert engine.pool.restarts == 1 and servers[1].state == SERVING
    # Each sample has a seed of its own: one that had come twice, or in another's place, would be another now.
    again = engine.generate(prompts, sampling, seed=0)
    assert [tuple(r.token_ids) for r in again] == [tuple(r.token_ids) for r in rollouts]
