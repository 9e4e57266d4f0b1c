"""Real vLLM servers that are killed, stopped or cannot start: nothing hangs, no sample is lost, nothing is left behind.

JAXRL_VLLM_KILLS sets how often a server is killed in one run (3, one at each kind of moment; each costs a start).
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl.batch import Prompt, Rollout
from jaxrl.config import Model, VllmSection
from jaxrl.models.decoder import head_table, hidden_states
from jaxrl.parallel import make_mesh
from jaxrl.roles import abstract_variables, load_base, model_config
from jaxrl.rollout.engine import Sampling
from jaxrl.rollout.vllm_adapter import ServerSpec
from jaxrl.rollout.vllm_engine import VllmEngine
from jaxrl.rollout.vllm_pool import SERVING
from jaxrl.rollout.vllm_process import ServerProcess
from jaxrl.rollout.vllm_server import members, shared_memory
from jaxrl.weights.pretrained import open_pretrained

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("JAXRL_VLLM_KILLS", "3"))
PROMPTS = [Prompt([3 + i, 5, 7], "", "", None, {}, None, i) for i in range(6)]
SAMPLING = Sampling(max_tokens=60, n=4, stop_ids=(1,))


@pytest.fixture(scope="module")
def engine(vllm_python, served_models, tmp_path_factory) -> Iterator[VllmEngine]:
    source = open_pretrained(served_models["tied"])
    config = model_config(Model(path="", compute_dtype="float32"), source.hf_config)
    settings = VllmSection(python=vllm_python, env={"OMP_NUM_THREADS": "1"}, stall_timeout_s=20.0)
    engine = VllmEngine(
        config, make_mesh(1, 1, 1), settings, source=source, folder=tmp_path_factory.mktemp("failures"),
        max_model_len=128, max_num_seqs=8,
    )  # fmt: skip
    yield engine
    engine.close()


def weights(engine: VllmEngine, version: int) -> dict:
    """Other ones for every version."""
    params = load_base(engine.source, engine.config, abstract_variables(engine.mesh, engine.config, "lm"))
    return {"params": jax.tree.map(lambda x: x * (1 + 0.02 * version), params)}


def assert_all_are_there_and_of(variables: dict, version: int, rollouts: list[Rollout], engine: VllmEngine) -> None:
    """Each sample once, and each with the logprobs of these weights: the JAX model's, to float32's rounding."""
    assert [r.group for r in rollouts] == [p for p in range(len(PROMPTS)) for _ in range(SAMPLING.n)]
    assert {r.weights_version for r in rollouts} == {version}
    for r in rollouts:
        prompt = PROMPTS[r.group].token_ids
        tokens = np.zeros((1, 64), np.int32)
        length = len(prompt) + len(r.token_ids)
        tokens[0, :length] = [*prompt, *r.token_ids]
        places, ones = np.arange(64)[None], np.ones_like(tokens)
        hidden = hidden_states(engine.config, variables, tokens, places, ones, ones)[0, len(prompt) - 1 : length - 1]
        logprobs = jax.nn.log_softmax(hidden @ head_table(engine.config, variables["params"]).T)
        np.testing.assert_allclose(r.logprobs, logprobs[np.arange(len(r.token_ids)), r.token_ids], atol=1e-3)


def victim(engine: VllmEngine, rng: random.Random) -> Callable[[], None]:
    """Kills one process of the server, or all of them."""
    process = engine.pool.servers[0].process
    assert process is not None
    group = process.pid
    # Without Python's own resource tracker, whom nobody would miss.
    others = [
        pid for pid in sorted(members(group)) if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    if rng.random() < 0.2:
        return lambda: os.killpg(group, signal.SIGKILL)
    pid = rng.choice(others)
    return lambda: os.kill(pid, signal.SIGKILL)


def test_a_server_killed_at_any_moment_costs_no_sample(engine):
    rng = random.Random(0)
    for version in range(KILLS):
        moment = ("idle", "generating", "loading")[version % 3]
        variables, timer = weights(engine, version), None
        if moment == "loading":
            timer = threading.Timer(rng.uniform(0.0, 0.15), victim(engine, rng))
            timer.start()
        engine.update_weights(variables, version)
        if moment == "idle":
            victim(engine, rng)()
            time.sleep(rng.uniform(0.0, 1.0))
        elif moment == "generating":
            timer = threading.Timer(rng.uniform(0.0, 0.5), victim(engine, rng))
            timer.start()
        rollouts = engine.generate(PROMPTS, SAMPLING, seed=version)
        assert_all_are_there_and_of(variables, version, rollouts, engine)
        if timer is not None:
            timer.join()  # it may have come when all was done
        deadline = time.monotonic() + 300.0
        while engine.pool.restarts <= version or engine.pool.servers[0].state != SERVING:
            assert time.monotonic() < deadline, engine.pool.restarts
            time.sleep(0.1)
        # Each sample has a seed of its own: one that had come twice, or in another's place, would be another now.
        again = engine.generate(PROMPTS, SAMPLING, seed=version)
        assert [tuple(r.token_ids) for r in again] == [tuple(r.token_ids) for r in rollouts]


def test_a_server_that_stands_still_is_noticed_and_started_again(engine):
    variables = weights(engine, KILLS)
    engine.update_weights(variables, KILLS)
    before, process = engine.pool.restarts, engine.pool.servers[0].process
    for pid in members(process.pid) - {process.pid}:
        os.kill(pid, signal.SIGSTOP)
    rollouts = engine.generate(PROMPTS, SAMPLING, seed=0)
    assert_all_are_there_and_of(variables, KILLS, rollouts, engine)
    assert engine.pool.restarts == before + 1


def started(python: str, folder: Path, model: Path, **settings) -> ServerProcess:
    server = ServerProcess(python, ServerSpec(str(model), "127.0.0.1", folder=str(folder), **settings), "key")
    server.start()
    return server


def ended(server: ServerProcess) -> str:
    deadline = time.monotonic() + 300.0
    while (reason := server.ended()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    server.end()
    return reason


def test_a_port_in_use_is_said(vllm_python, served_models, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = started(vllm_python, tmp_path, served_models["tied"], port=other.getsockname()[1])
        assert ended(server).startswith("its port is in use: set another one; its log is ")


def test_a_model_that_vllm_does_not_know_is_said(vllm_python, served_models, tmp_path):
    settings = json.loads((served_models["tied"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": ["FooForCausalLM"]}))
    reason = ended(started(vllm_python, tmp_path / "log", tmp_path, port=0))
    assert reason.startswith("this vLLM does not know the model's architecture ['FooForCausalLM']"), reason


def test_a_server_without_enough_memory_is_said(vllm_python, served_models, tmp_path):
    settings = json.loads((served_models["tied"] / "config.json").read_text())
    settings |= {
        "head_dim": 256,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1 << 17,
    }  # 2 GiB for one sequence
    (tmp_path / "config.json").write_text(json.dumps(settings))
    reason = ended(started(vllm_python, tmp_path / "log", tmp_path, port=0, max_model_len=1 << 17))
    assert reason.startswith("it has too little memory for the model and its KV cache"), reason


def folders_of(trainer: int) -> set[str]:
    """The folders in shared memory that the trainer's children were told of: its exports, and its server's scratch."""
    found = set()
    for child in Path(f"/proc/{trainer}/task").glob("*/children"):
        for pid in child.read_text().split():
            found |= set(re.findall(r"/dev/shm/jaxrl-[\w-]+", Path(f"/proc/{pid}/cmdline").read_text()))
    return found


def test_nothing_is_left_of_a_trainer_that_is_killed(vllm_python, served_models, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "data_source": "sums"} for a in range(6) for b in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "reward.py").write_text("def short(solution_str):\n    return -len(solution_str) / 6\n")
    tree = {
        "model": {"path": str(served_models["tied"]), "compute_dtype": "float32"},
        "data": {
            "train_files": str(tmp_path / "train.jsonl"), "max_prompt_length": 8, "max_response_length": 6,
            "train_batch_size": 8,
        },
        "rollout": {
            "n": 4, "engine": "vllm", "max_num_seqs": 8,
            "vllm": {"python": vllm_python, "env": {"OMP_NUM_THREADS": "1"}},
        },
        "reward": {"functions": [{"name": f"{tmp_path}/reward.py:short"}]},
        "algorithm": {"adv_estimator": "grpo"},
        "actor": {"ppo_mini_batch_size": 8, "ppo_max_token_len_per_gpu": 256, "optim": {"lr": 3e-3}},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "trainer": {
            "experiment_name": "killed", "run_dir": str(tmp_path / "run"), "row_length": 64,
            "total_training_steps": 10_000,
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML
    command = [sys.executable, "scripts/train.py", "--config", str(tmp_path / "config.yaml")]
    with (tmp_path / "out.txt").open("w") as out:
        trainer = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 400.0
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert trainer.poll() is None and time.monotonic() < deadline, (tmp_path / "out.txt").read_text()[-3000:]
        time.sleep(0.2)
    log = (tmp_path / "run" / "vllm" / "server_0" / "server.log").read_text()
    group = os.getpgid(int(re.findall(r"APIServer pid=(\d+)", log)[-1]))
    shared = shared_memory(group) | folders_of(trainer.pid)
    assert len(members(group)) >= 4 and len(shared) >= 3
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 10.0
    while members(group) or any(Path(name).exists() for name in shared):
        assert time.monotonic() < deadline, (members(group), [name for name in shared if Path(name).exists()])
        time.sleep(0.1)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    # Before it ended it trained: sampler and trainer agree at every step, so each was sampled with the weights of now.
    assert all(row["training/rollout_probs_diff_max"] < 1e-4 for row in rows)
