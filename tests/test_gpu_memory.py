"""Trainer and vLLM on one GPU: who takes how much, and when. Nothing here needs a GPU, and nothing here proves one."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from jaxrl.config import Config, VllmSection, from_dict
from jaxrl.gpu_memory import SETTLED, jax_environment, kept_asleep, prepare_environment, shares_gpus, vllm_share
from jaxrl.parallel import make_mesh
from jaxrl.plan import check
from jaxrl.plan.programs import roles_of
from jaxrl.rollout.vllm_adapter import ServerSpec, command

QWEN3 = Path(__file__).parent / "data" / "hf_torch" / "qwen3"


def config(*, engine: str = "vllm", mode: str = "sync", free: bool = True, **vllm: Any) -> Config:
    given = {"python": "/vllm/bin/python"} | vllm
    return from_dict({
        "model": {"path": str(QWEN3), "compute_dtype": "float32"},
        "data": {"train_files": "none", "max_prompt_length": 32, "max_response_length": 32, "train_batch_size": 8},
        "rollout": {"engine": engine, "free_cache_engine": free} | ({"vllm": given} if engine == "vllm" else {}),
        "reward": {"functions": [{"name": "gsm8k"}]},
        "algorithm": {"rollout_correction": {"bypass_mode": True}},
        "actor": {"ppo_mini_batch_size": 8},
        "trainer": {"experiment_name": "shared", "trainer_mode": mode},
    })  # fmt: skip


@pytest.mark.parametrize(
    "seen, vllm, shared",
    [
        (None, {"python": "p"}, True),
        (None, {"urls": ("http://host:8000",)}, False),
        (None, {"python": "p", "devices": ("1",)}, True),  # the trainer sees them all
        ("0", {"python": "p", "devices": ("1", "2,3")}, False),
        ("0, 3", {"python": "p", "devices": ("1", "2,3")}, True),
        ("0", {"python": "p", "env": {"CUDA_VISIBLE_DEVICES": "1"}}, False),
    ],
)
def test_servers_share_the_devices_that_the_trainer_sees(monkeypatch, seen, vllm, shared):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert shares_gpus(VllmSection(**vllm)) == shared


PLATFORM = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}


@pytest.mark.parametrize(
    "c, expected",
    [
        (config(engine="jax"), {}),
        (config(python=None, urls=["http://host:8000"]), {}),
        (config(), PLATFORM),
        (config(free=False), {"XLA_CLIENT_MEM_FRACTION": "0.45"}),
        (config(free=False, gpu_memory_utilization=0.3), {"XLA_CLIENT_MEM_FRACTION": "0.65"}),
        (config(mode="one_step_off"), {"XLA_CLIENT_MEM_FRACTION": "0.45"}),
    ],
)
def test_jax_gives_back_what_it_frees_or_takes_no_more_than_its_share(c, expected):
    with patch.dict(os.environ):
        for name in ("CUDA_VISIBLE_DEVICES", *SETTLED):
            os.environ.pop(name, None)
        prepare_environment(c)
        assert {name: value for name, value in os.environ.items() if name in SETTLED} == expected


def test_what_the_user_has_settled_stays():
    for name in SETTLED:
        with patch.dict(os.environ, {name: "mine"}):
            prepare_environment(config())
            assert SETTLED & os.environ.keys() == {name} and os.environ[name] == "mine"


def test_a_share_that_leaves_training_nothing_is_refused():
    with pytest.raises(ValueError, match="gpu_memory_utilization 0.95 leaves training nothing of a GPU"):
        jax_environment(config(free=False, gpu_memory_utilization=0.95))


def test_vllm_gets_what_training_leaves_of_a_gpu():
    assert vllm_share(config(), 30 * 10**9, 80e9) == 0.57  # 1 - 0.05 - 0.375 = 0.575, rounded down
    assert vllm_share(config(), 6 * 10**9, 24e9) == 0.66  # 2 GB, as 5 % would be too little
    assert vllm_share(config(), 10**6, 80e9) == 0.9
    assert vllm_share(config(), 79 * 10**9, 80e9) == 0.1
    assert vllm_share(config(), 30 * 10**9, None) == 0.5
    assert vllm_share(config(gpu_memory_utilization=0.7), 30 * 10**9, 80e9) == 0.7
    assert vllm_share(config(free=False), 30 * 10**9, 80e9) == 0.5
    assert vllm_share(config(python=None, urls=["http://host:8000"]), 30 * 10**9, 80e9) is None


def test_a_server_that_will_sleep_is_told_so_where_there_is_a_gpu():
    spec = ServerSpec(str(QWEN3), "127.0.0.1", 8000, "folder", sleeps=True)
    assert "--enable-sleep-mode" in command("python", spec, "cuda")
    assert "--enable-sleep-mode" not in command("python", spec, "cpu")


def test_a_run_that_leaves_vllm_nothing_is_refused_before_weights_are_read(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    roles = roles_of(config(), make_mesh(1, 1, 1))
    training = sum(check.least_memory(config(free=False), roles)[-1].parts.values())

    total = training + 40 * 10**9
    monkeypatch.setattr(check, "_memory_of_gpu", lambda c, roles: total)
    monkeypatch.setattr(check, "_memory_of", lambda device: (total, "a small GPU"))
    check.check_fits(config(), roles)
    needs = {need.when: need.parts for need in check.least_memory(config(), roles, gpu=total)}
    assert "vLLM asleep" not in needs["generation"]
    assert needs["the update of the actor"]["vLLM asleep"] == kept_asleep(total) == int(0.05 * total)
    assert check.vllm_share_of(config(), roles) == 0.9
    with pytest.raises(ValueError, match=r"cannot fit: generation needs .* a small GPU .*vLLM.*gpu_memory_utilization"):
        check.check_fits(config(gpu_memory_utilization=1.0), roles)
