"""The doctor names each fault that is really there: every engine here is wrong in one way of its own."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_trainer import model, settings, settings_in  # noqa: F401 (fixtures)
from vllm_stub import Stub

from jaxrl.config import from_dict
from jaxrl.doctor import perturbed
from jaxrl.rollout.jax_engine import JaxEngine
from jaxrl.rollout.vllm_adapter import INFO
from jaxrl.trainer import Trainer
from jaxrl.update import merge

ROOT = Path(__file__).parents[1]


class Sampling(JaxEngine):
    """Samples as `changes` say, not as it is told."""

    def __init__(self, config, mesh, **changes):
        super().__init__(config, mesh)
        self.changes = changes

    def generate(self, prompts, sampling, **kwargs):
        return super().generate(prompts, dataclasses.replace(sampling, **self.changes), **kwargs)


class MoreTokens(JaxEngine):
    """Reads one more token, the end token, before each prompt, as an engine that adds a second BOS does."""

    def generate(self, prompts, sampling, **kwargs):
        return super().generate(
            [dataclasses.replace(p, token_ids=[1, *p.token_ids]) for p in prompts], sampling, **kwargs
        )


class Rounded(JaxEngine):
    """Computes in bfloat16."""

    def __init__(self, config, mesh):
        super().__init__(dataclasses.replace(config, compute_dtype="bfloat16"), mesh)


class Stuck(JaxEngine):
    """Keeps the first weights that it is given, and says otherwise."""

    def update_weights(self, variables, version):
        if self.weights is None:
            super().update_weights(variables, version)
        self.version = version


class StaleHead(JaxEngine):
    """Keeps the output head that it was given first, as a vLLM does that has packed a tied one."""

    def __init__(self, config, mesh):
        super().__init__(dataclasses.replace(config, tie_embeddings=False), mesh)
        self.head = None

    def update_weights(self, variables, version):
        params = variables["params"]
        if self.head is None:
            self.head = params["embed_tokens"]["embedding"]
        super().update_weights({**variables, "params": {**params, "lm_head": {"kernel": self.head}}}, version)


class StaleCache(JaxEngine):
    """Reads prompts that it has read before with the weights of that time, as a prefix cache that is not reset does."""

    def __init__(self, config, mesh):
        super().__init__(config, mesh)
        self.seen, begin = {}, self.programs.begin

        def begin_with_the_cached(weights, *args, **kwargs):
            return begin(self.reading, *args, **kwargs)

        self.programs.begin = begin_with_the_cached

    def generate(self, prompts, sampling, **kwargs):
        key = tuple(tuple(p.token_ids) for p in prompts)
        self.reading = self.seen.setdefault(key, self.weights)
        return super().generate(prompts, sampling, **kwargs)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, model):  # noqa: F811
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 7, "top_p": 0.9}))
    tree = settings_in(tmp_path_factory.mktemp("doctor"), model)(
        "doctor", data__max_response_length=16, algorithm__adv_estimator="grpo", data__val_files=None,
        rollout__free_cache_engine=False,
    )  # fmt: skip
    return Trainer(from_dict(tree))


def examined(trainer, make, *, update: bool):
    """As `scripts/doctor.py` does it, with another engine."""
    before = trainer.roles.actor_variables()
    trainer.engine = make(trainer.roles.model, trainer.mesh)
    trainer.engine.update_weights(before, 0)
    doctor = trainer.doctor()
    doctor.tokenizer.bos_token = "<eos>"
    if not update:
        return doctor.examine(before)
    assert doctor.examine(before).cause is None
    after = merge(perturbed(trainer.roles.actor.trained, share=0.5), {})
    trainer.engine.update_weights(after, 1)
    return doctor.examine(after, before=before)


def test_an_engine_that_does_as_it_is_told_agrees_before_and_after_an_update(trainer):
    for update in (False, True):
        found = examined(trainer, JaxEngine, update=update)
        assert (found.trials, found.cause, found.sentence) == ([], None, "The engine and the trainer agree.")
        assert found.mean < 1e-5 and found.correlation > 0.9999


FAULTS = {
    "temperature": (lambda c, m: Sampling(c, m, temperature=1.5), "of temperature 1.5"),
    "truncation": (lambda c, m: Sampling(c, m, top_p=0.8), "truncates with top_k -1, top_p 0.8"),
    "generation_config": (
        lambda c, m: Sampling(c, m, temperature=0.6, top_k=7, top_p=0.9),
        "temperature 0.6, top_k 7, top_p 0.9 of generation_config.json",
    ),
    "tokens": (MoreTokens, "put one more BOS before the prompt"),
    "dtype": (Rounded, "computes in bfloat16"),
}
FAULTS_OF_AN_UPDATE = {
    "weights": (Stuck, "has the weights from before the update"),
    "head": (StaleHead, "output head is from before the update"),
    "cache": (StaleCache, "that the engine has never seen are answered right"),
}


@pytest.mark.parametrize("cause", [*FAULTS, *FAULTS_OF_AN_UPDATE])
def test_the_cause_is_named(trainer, cause):
    make, words = (FAULTS | FAULTS_OF_AN_UPDATE)[cause]
    found = examined(trainer, make, update=cause in FAULTS_OF_AN_UPDATE)
    assert found.cause == cause, str(found)
    assert words in found.sentence, str(found)
    assert len(found.worst) == 5 and found.worst[0][2] != found.worst[0][3]


@pytest.mark.parametrize("sleeps", [True, False])
def test_the_engine_sleeps_while_the_trainer_computes_where_it_does_in_training(trainer, monkeypatch, sleeps):
    variables, engine = trainer.roles.actor_variables(), JaxEngine(trainer.roles.model, trainer.mesh)
    engine.update_weights(variables, 0)
    trainer.engine = engine
    doctor, awake = trainer.doctor(), []
    doctor.c = dataclasses.replace(doctor.c, rollout=dataclasses.replace(doctor.c.rollout, free_cache_engine=sleeps))
    compute = doctor.policy.logprobs

    def logprobs(*args):
        awake.append(engine.weights is not None)
        return compute(*args)

    monkeypatch.setattr(doctor.policy, "logprobs", logprobs)
    assert doctor.examine(variables).cause is None
    assert awake == [not sleeps]


def test_a_run_does_not_start_above_the_bound(settings, tmp_path, monkeypatch):  # noqa: F811
    tree = settings("refused", data__val_files=None, rollout__max_probs_diff=1e-4)
    Trainer(from_dict(tree))  # the two agree
    monkeypatch.setattr("jaxrl.trainer.JaxEngine", lambda c, m, **_: Sampling(c, m, temperature=1.5))
    with pytest.raises(ValueError, match=r"more than rollout.max_probs_diff 0.0001. The cause: .* of temperature 1.5"):
        Trainer(from_dict(tree))
    assert not (tmp_path / "refused").exists()


def test_the_script_says_that_all_is_well_and_leaves_nothing(settings, tmp_path):  # noqa: F811
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings("script", data__val_files=None, algorithm__adv_estimator="grpo")))
    command = [sys.executable, str(ROOT / "scripts" / "doctor.py"), "--config", str(path), "rollout.top_p=0.9"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("The engine and the trainer agree.") == 2 and "After an update" in run.stdout
    assert not (tmp_path / "script").exists()


def broken_python(folder: Path, last_words: str) -> str:
    path = folder / f"python {last_words[:5]}"
    path.write_text(f'#!/bin/sh\necho "{last_words}" >&2\nexit 1\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("fault", ["no vLLM", "unknown model", "port in use", "wrong key"])
def test_a_server_that_cannot_be_used_is_said_in_one_sentence(settings, tmp_path, monkeypatch, fault):  # noqa: F811
    stub = Stub()
    stub.answers[INFO] = lambda _: (401, {})
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    vllm, words = {
        "no vLLM": ({"python": sys.executable}, "vLLM server 0: it did not start: its Python has no vLLM: make"),
        "unknown model": (
            {"python": broken_python(tmp_path, "Model architectures ['Foo'] are not supported")},
            r"vLLM server 0: it did not start: this vLLM does not know the model's architecture \['Foo'\]",
        ),
        "port in use": (
            {"python": broken_python(tmp_path, "OSError: [Errno 98] Address already in use")},
            "vLLM server 0: it did not start: its port is in use",
        ),
        "wrong key": ({"urls": [stub.url]}, f"vLLM server {stub.url}: {stub.url} refuses the API key: set the environment"),
    }[fault]  # fmt: skip
    path = tmp_path / "config.json"
    tree = settings("script", data__val_files=None, algorithm__adv_estimator="grpo")
    path.write_text(json.dumps(tree | {"rollout": tree["rollout"] | {"engine": "vllm", "vllm": vllm}}))
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--config", str(path)])
    try:
        with pytest.raises(SystemExit, match=f"^error: {words}") as end:
            runpy.run_path(str(ROOT / "scripts" / "doctor.py"), run_name="__main__")
        assert "\n" not in str(end.value)
        assert "its log is" not in str(end.value) or Path(str(end.value).rpartition("its log is ")[2]).exists()
    finally:
        stub.close()
