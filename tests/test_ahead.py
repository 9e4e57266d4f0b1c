"""One step off: what is trained on is one version old, never more; a killed run goes on with the samples it had."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_trainer import metrics_of, model, numbers_of, run, settings, settings_in  # noqa: F401 (fixtures)
from vllm_stub import stub_python

from jaxrl.config import from_dict
from jaxrl.rollout.jax_engine import JaxEngine
from jaxrl.trainer import Trainer

ONE_OFF = {
    "trainer__trainer_mode": "one_step_off", "algorithm__rollout_correction": {"rollout_is": "token"},
    "algorithm__adv_estimator": "grpo", "data__val_files": None, "actor__optim": {"lr": 3e-3},
    "trainer__total_training_steps": 5,
}  # fmt: skip
SYNC = ONE_OFF | {"trainer__trainer_mode": "sync"}


def responses_of(folder: Path) -> dict[int, list[str]]:
    """By step."""
    steps: dict[int, list[str]] = {}
    for line in (folder / "samples.jsonl").open():
        row = json.loads(line)
        steps.setdefault(row["step"], []).append(row["response"])
    return steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings_here(folder, model):  # noqa: F811
    """Of runs in one folder that the tests share."""
    return settings_in(folder, model)


@pytest.fixture(scope="module")
def whole(settings_here):
    return run(settings_here("whole", **ONE_OFF))


def test_samples_are_of_the_weights_one_update_ago(settings_here, folder, whole):
    assert [row["training/staleness"] for row in whole] == [0, 1, 1, 1, 1]
    run(settings_here("still", **SYNC | {"actor__optim": {"lr": 0.0}}))
    run(settings_here("sync", **SYNC))
    ours, still, sync = (responses_of(folder / name) for name in ("whole", "still", "sync"))
    assert ours[1] == sync[1] == still[1]
    assert ours[2] == still[2] != sync[2]  # of the weights that the run began with
    assert ours[3] != still[3]  # of those after the first update, which both runs made from the same samples


def test_the_stale_samples_are_weighted_and_generation_overlaps_training(whole):
    # Step 1 is on-policy; from then on the policy has moved on from the one that sampled.
    assert whole[0]["training/rollout_probs_diff_max"] < 1e-4 < 1e-3 < whole[1]["training/rollout_probs_diff_max"]
    assert whole[0]["rollout_corr/rollout_is_max"] < 1.001 < whole[1]["rollout_corr/rollout_is_max"]
    for row in whole[:-1]:
        assert row["perf/overlap_s"] > 0 and row["timing_s/wait"] >= 0
    for row in whole[1:-1]:  # the first step collects its own samples too
        assert row["perf/overlap_s"] + row["timing_s/wait"] == pytest.approx(row["timing_s/collect"])
    assert "perf/overlap_s" not in whole[-1]  # there is no next step


def test_waiting_for_servers_to_answer_is_neither_publishing_nor_overlap(settings, tmp_path):  # noqa: F811
    vllm = {"python": stub_python(tmp_path), "num_servers": 2, "env": {"PAUSE_S": "2.0"}, "probe_tolerance": 1e3}
    served = {"rollout__engine": "vllm", "rollout__vllm": vllm, "rollout__max_num_seqs": 4}
    row = run(settings("served", **ONE_OFF | served | {"trainer__total_training_steps": 3}))[1]
    # Of the eight prompts four are asked at a time, so they take four seconds; training and publishing take less.
    assert row["timing_s/update_weights"] < row["timing_s/wait"]
    assert row["perf/overlap_s"] <= row["timing_s/step"] - row["timing_s/wait"]


class LateLoader:
    """Gives the prompts of the third step once there was time to publish the weights of the second."""

    def __init__(self, loader, has_trained: threading.Event):
        self._loader, self._has_trained, self._num_given = loader, has_trained, 0

    def __next__(self):
        self._num_given += 1
        if self._num_given == 3:
            assert self._has_trained.wait(60.0)
            time.sleep(1.0)
        return next(self._loader)

    def __getattr__(self, name):
        return getattr(self._loader, name)


def test_weights_are_not_published_before_the_engine_was_asked_for_answers_by_those_before(
    settings, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    vllm = {"python": stub_python(tmp_path), "num_servers": 2, "probe_tolerance": 1e3}
    served = {"rollout__engine": "vllm", "rollout__vllm": vllm}
    trainer = Trainer(from_dict(settings("late", **ONE_OFF | served | {"trainer__total_training_steps": 3})))
    has_trained, learn = threading.Event(), trainer.learner.step

    def learn_and_tell(step, *args):
        metrics = learn(step, *args)
        if step == 2:
            has_trained.set()
        return metrics

    monkeypatch.setattr(trainer.learner, "step", learn_and_tell)
    trainer.collector.loader = LateLoader(trainer.collector.loader, has_trained)
    trainer.fit()
    rows = metrics_of(trainer.folder)
    assert [row["training/staleness"] for row in rows] == [0, 1, 1]
    assert rows[1]["timing_s/wait"] >= 0.9  # and the second that was waited is no overlap
    assert rows[1]["perf/overlap_s"] <= rows[1]["timing_s/step"] - rows[1]["timing_s/wait"]


def test_it_learns(settings):  # noqa: F811
    rows = run(settings("learns", **ONE_OFF | {"trainer__total_training_steps": 16}))
    reward = [row["critic/score/mean"] for row in rows]
    assert np.mean(reward[-3:]) > reward[0] + 0.3, reward


class Killed(Trainer):
    """Dies in the middle of step 4, after the checkpoint of step 2 and the metrics of step 3."""

    def step(self, step, samples, progress):
        if step == 4:
            raise KeyboardInterrupt
        return super().step(step, samples, progress)


def test_a_killed_run_goes_on_bit_for_bit_with_the_samples_that_were_waiting(settings_here, folder, whole):
    tree = settings_here("killed", **ONE_OFF, trainer__save_freq=2)
    with pytest.raises(KeyboardInterrupt):
        Killed(from_dict(tree)).fit()
    assert [row["step"] for row in metrics_of(folder / "killed")] == [1, 2, 3]
    again = run(tree)
    assert [row["step"] for row in again] == [1, 2, 3, 4, 5]
    for before, after in zip(whole, again, strict=True):
        assert numbers_of(before) == numbers_of(after)
    assert responses_of(folder / "whole") == responses_of(folder / "killed")
    exports = [(folder / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert exports[0] == exports[1]


class Watched(Trainer):
    """Looks where it validates: the engine is idle and has the newest weights."""

    def validate(self, step, samples):
        assert self.engine.version == step and self.ahead._pending is None
        return super().validate(step, samples)


def test_validation_sees_the_new_weights_and_changes_nothing(settings_here, folder, whole):
    tree = settings_here("validated", **ONE_OFF, trainer__test_freq=1)
    tree["data"]["val_files"] = str(folder / "val.jsonl")
    Watched(from_dict(tree)).fit()
    rows = metrics_of(folder / "validated")[1:]
    assert all(any(name.startswith("val-core") for name in row) for row in rows)
    for with_validation, without in zip(rows, whole, strict=True):
        assert {n: x for n, x in numbers_of(with_validation).items() if not n.startswith("val-")} == numbers_of(without)


class Stuck(JaxEngine):
    """Keeps the first weights that it is given."""

    def update_weights(self, variables, version):
        if self.version < 0:
            super().update_weights(variables, version)

    def sleep(self):
        pass


def test_samples_of_other_weights_enter_no_batch(settings):  # noqa: F811
    for name, modes in (("sync", SYNC), ("one_step_off", ONE_OFF)):
        trainer = Trainer(from_dict(settings(name, **modes)))
        engine = Stuck(trainer.roles.model, trainer.mesh)
        trainer.engine, trainer.collector.generate = engine, engine.generate
        step = 2 if name == "sync" else 3
        with pytest.raises(RuntimeError, match=rf"step {step} was given samples of the weights of version \[0\]"):
            trainer.fit()


def test_it_is_refused_without_a_correction_and_for_what_takes_the_devices_of_a_mesh(settings):  # noqa: F811
    with pytest.raises(ValueError, match="samples of the weights before: set algorithm.rollout_correction.rollout_is"):
        from_dict(settings("a", **ONE_OFF | {"algorithm__rollout_correction": {}}))
    with pytest.raises(ValueError, match="one_step_off is not for rollout.engine jax on the 8 devices"):
        Trainer(from_dict(settings("b", **ONE_OFF, mesh={"data": 8, "fsdp": 1, "tensor": 1})))
    served = {"rollout__engine": "vllm", "rollout__vllm": {"urls": ["http://host:8000"]}}
    with pytest.raises(ValueError, match="is not for a reward model on the 8 devices .* or let servers answer"):
        mesh = {"data": 8, "fsdp": 1, "tensor": 1}
        Trainer(from_dict(settings("c", **ONE_OFF | served, mesh=mesh, reward__model={"path": "x"})))
