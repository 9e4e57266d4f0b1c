"""What a run writes down: once a step, bit for bit, and on after a kill."""

import importlib.util
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxrl.loggers import JsonLines, Metrics, Run, Samples


def some_run(folder, first_step: int = 1) -> Run:
    return Run(folder, "project", "experiment", {"lr": 1e-6}, epochs=3, steps=12, first_step=first_step)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_jsonl_reads_back_bit_for_bit(tmp_path):
    values = {
        "python": 0.1 + 0.2,
        "numpy": np.float32(0.1),
        "jax": jnp.float32(1e-42) + 1,
        "count": np.int64(2**53 + 1),
        "tiny": 5e-324,
        "nan": math.nan,
    }
    metrics = Metrics(some_run(tmp_path), ("jsonl",))
    metrics.log(1, values)
    line = (tmp_path / "metrics.jsonl").read_text()  # before close: it is flushed
    assert line.startswith('{"step": 1, ')
    read = json.loads(line)
    assert read["python"] == 0.1 + 0.2
    assert np.float32(read["numpy"]).tobytes() == np.float32(0.1).tobytes()
    assert read["jax"] == float(values["jax"])
    assert read["count"] == 2**53 + 1
    assert read["tiny"] == 5e-324
    assert math.isnan(read["nan"])
    metrics.close()


def test_a_run_that_goes_on_writes_each_step_once(tmp_path):
    for first_step, last_step in ((0, 5), (4, 6)):  # killed after step 5, the last checkpoint was of step 3
        run = some_run(tmp_path, first_step)
        metrics, samples = Metrics(run, ("jsonl",)), Samples(run)
        for step in range(first_step, last_step + 1):
            metrics.log(step, {"from": first_step})
            answers = {"prompts": ["1+1=\n"], "responses": ["zwei √4"], "ground_truths": [np.array([2])]}
            samples.log(step, split="train", **answers, rewards=np.full(1, 0.5), data_sources=["sums"])
        metrics.close()
        samples.close()
        if first_step == 0:
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 3, "fr')  # the kill cut a line short
    assert [(row["step"], row["from"]) for row in rows(tmp_path / "metrics.jsonl")] == [
        *[(step, 0) for step in (0, 1, 2, 3)],
        *[(step, 4) for step in (4, 5, 6)],
    ]
    written = rows(tmp_path / "samples.jsonl")
    assert [row["step"] for row in written] == [0, 1, 2, 3, 4, 5, 6]
    assert written[-1] == {
        "step": 6,
        "split": "train",
        "data_source": "sums",
        "prompt": "1+1=\n",
        "response": "zwei √4",
        "ground_truth": [2],
        "reward": 0.5,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_line_that_no_run_has_written_is_shown(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\0\0\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl holds a line that no run has written \(.*x00.*\): remove it"):
        JsonLines(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n\0\0\n'


def test_console_prints_a_line_a_step_and_one_a_validation(tmp_path):
    lines = []
    metrics = Metrics(some_run(tmp_path), ("console",), print_line=lines.append)
    metrics.log(0, {"val-core/sums/reward/mean@1": 0.125})
    metrics.log(1, {"training/epoch": 0, "timing_s/step": 1.23, "critic/score/mean": 0.25})
    assert lines == [
        "[validation] step  0/12 | sums/reward/mean@1 0.125",
        "[epoch 0/3] step  1/12 | reward 0.250 | 1.2 s",
    ]


def test_tensorboard_has_every_step_once_after_a_run_goes_on(tmp_path):
    for first_step, last_step in ((0, 3), (2, 4)):
        metrics = Metrics(some_run(tmp_path, first_step), ("tensorboard",))
        for step in range(first_step, last_step + 1):
            metrics.log(step, {"critic/score/mean": 10 * first_step + step})
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("critic/score/mean")] == [
        (0, 0),
        (1, 1),
        (2, 22),
        (3, 23),
        (4, 24),
    ]


def test_an_unknown_logger_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="Unknown trainer.logger 'jsonlines'. Did you mean 'jsonl'"):
        Metrics(some_run(tmp_path / "run"), ("console", "jsonlines"))
    assert not (tmp_path / "run").exists()


def test_wandb_that_is_not_installed_is_an_error_naming_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxrl\[wandb\]'"):
        Metrics(some_run(tmp_path), ("wandb",))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_without_a_key_writes_an_offline_run(tmp_path, monkeypatch, caplog):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    metrics = Metrics(some_run(tmp_path), ("wandb",))
    metrics.log(1, {"critic/score/mean": 0.5})
    metrics.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert "wandb sync" in caplog.text
