"""The numbers of a step: worked by hand, and validation against a plain reading of verl's definition."""

import time

import numpy as np
import pytest

from jaxrl.metrics import Timer, data_metrics, memory_metrics, throughput_metrics, validation_metrics


def some_batch() -> dict:
    """Three responses of at most 3 tokens: one ended, one cut at the limit, one aborted."""
    mask = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    junk = 1e6  # what stands outside the mask must not count
    return {
        "scores": np.array([1.0, 0.0, junk], np.float32),
        "rewards_sum": np.array([0.5, -0.5, junk], np.float32),
        "advantages": np.where(mask, [[1.0, 2.0, 0], [-1.0, -2.0, 5.0], [0, 0, 0]], junk).astype(np.float32),
        "returns": np.where(mask, [[1.0, 1.0, 0], [0.0, 0.0, 3.0], [0, 0, 0]], junk).astype(np.float32),
        "values": np.where(mask, [[1.0, 0.0, 0], [0.0, 0.0, 2.0], [0, 0, 0]], junk).astype(np.float32),
        "response_mask": mask,
        "prompt_lengths": np.array([4, 8, 6]),
        "response_lengths": np.array([2, 3, 0]),
        "max_prompt_length": 8,
        "finished": np.array([True, False, True]),
    }


def test_data_metrics_give_worked_numbers():
    metrics = data_metrics(**some_batch())
    expected = {
        "critic/score": (0.5, 1, 0),
        "critic/rewards": (0.0, 0.5, -0.5),
        "critic/advantages": (1.0, 5, -2),
        "critic/returns": (1.0, 3, 0),
        "critic/values": (0.6, 2, 0),
        "response_length": (5 / 3, 3, 0),
        "response_length_non_aborted": (2.5, 3, 2),
        "prompt_length": (6, 8, 4),
    }
    for name, numbers in expected.items():
        assert [metrics[f"{name}/{kind}"] for kind in ("mean", "max", "min")] == pytest.approx(numbers), name
    assert metrics["response_length/clip_ratio"] == pytest.approx(1 / 3)
    assert metrics["response/aborted_ratio"] == pytest.approx(1 / 3)
    assert metrics["prompt_length/clip_ratio"] == pytest.approx(1 / 3)
    # returns 1 1 0 0 3: variance 6/4; returns - values 0 1 0 0 1: variance 1.2/4
    assert metrics["critic/vf_explained_var"] == pytest.approx(1 - 0.3 / (1.5 + 1e-5))


def test_without_a_critic_there_are_no_value_metrics():
    metrics = data_metrics(**{**some_batch(), "values": None})
    assert not [name for name in metrics if "values" in name or "vf_" in name]


def test_a_batch_that_was_aborted_whole_has_lengths_and_no_scores():
    batch = some_batch()
    batch |= {"response_lengths": np.zeros(3, int), "response_mask": np.zeros((3, 3), bool)}
    metrics = data_metrics(**batch)
    assert metrics["response/aborted_ratio"] == 1.0
    assert not [name for name in metrics if name.startswith("critic/")]


def test_throughput_counts_response_tokens_for_generation_and_all_tokens_elsewhere():
    lengths = {"prompt_lengths": np.array([10, 20]), "response_lengths": np.array([30, 40])}
    seconds = {"step": 5.0, "gen": 0.7, "update_actor": 2.0, "reward": 1.0}
    assert throughput_metrics(**lengths, seconds=seconds, num_devices=4) == pytest.approx(
        {
            "perf/total_num_tokens": 100,
            "perf/time_per_step": 5.0,
            "perf/throughput": 5.0,
            "timing_per_token_ms/gen": 10.0,
            "timing_per_token_ms/update_actor": 20.0,
        }
    )


def naive_validation(groups: dict[str, list[tuple[float, str]]], n: int, seed: int) -> dict[str, float]:
    """verl's definition read literally: re-seed for each prompt and metric, draw one subset after the other."""

    def majority(subset: list[tuple[float, str]]) -> float:
        answers = [answer for _, answer in subset]
        commonest = max(dict.fromkeys(answers), key=answers.count)
        return next(value for value, answer in subset if answer == commonest)

    reductions = {
        "best": lambda subset: max(value for value, _ in subset),
        "worst": lambda subset: min(value for value, _ in subset),
        "maj": majority,
    }
    result = {}
    for name, reduction in reductions.items():
        means, deviations = [], []
        for samples in groups.values():
            np.random.seed(seed)
            draws = [np.random.choice(len(samples), size=n, replace=True) for _ in range(1000)]
            values = [reduction([samples[i] for i in draw]) for draw in draws]
            means.append(np.mean(values))
            deviations.append(np.std(values))
        result[f"{name}@{n}/mean"], result[f"{name}@{n}/std"] = np.mean(means), np.mean(deviations)
    return result


def test_validation_metrics_equal_verls_bootstrap():
    groups = {
        "p0": [(1.0, "7"), (0.0, "3"), (0.0, "3"), (1.0, "7"), (0.25, "5")],
        "p1": [(0.0, "1"), (0.0, "2"), (0.0, "1"), (1.0, "9"), (0.5, "4")],
    }
    samples = [(prompt, *groups[prompt][i]) for i in range(5) for prompt in groups]  # prompts interleaved
    prompt_ids, scores, answers = zip(*samples, strict=True)
    metrics = validation_metrics(["gsm8k"] * 10, prompt_ids, scores, {"pred": answers}, seed=7)
    assert metrics.pop("val-core/gsm8k/reward/mean@5") == pytest.approx(0.375)
    deviations = [np.std([value for value, _ in group]) for group in groups.values()]
    assert metrics.pop("val-aux/gsm8k/reward/std@5") == pytest.approx(np.mean(deviations))
    expected = {}
    for n in (2, 4, 5):
        for metric, value in naive_validation(groups, n, seed=7).items():
            core = n == 5 and not metric.startswith("worst")
            expected[f"val-{'core' if core else 'aux'}/gsm8k/reward/{metric}"] = value
    assert metrics == pytest.approx(expected, abs=1e-12)


def test_one_sample_a_prompt_gives_only_the_mean_and_acc_is_core_where_there_is_one():
    metrics = validation_metrics(
        ["math", "math", "qa"],
        [0, 1, 2],
        [-1.0, 1.0, 0.5],
        {"acc": [0.0, 1.0, None], "length": [10.0, None, None], "pred": ["a", "b", "c"]},
    )
    assert metrics == {
        "val-core/math/acc/mean@1": 0.5,
        "val-aux/math/reward/mean@1": 0.0,
        "val-aux/math/length/mean@1": 10.0,  # of the sample that has one
        "val-core/qa/reward/mean@1": 0.5,
    }


def test_timer_adds_up_the_stages_it_enters_again_also_when_one_fails():
    timer = Timer()
    for _ in range(2):
        with timer("gen"):
            time.sleep(0.01)
    with pytest.raises(KeyError), timer("reward"):
        raise KeyError
    assert timer.metrics()["timing_s/gen"] == timer.seconds["gen"] >= 0.02
    assert set(timer.seconds) == {"gen", "reward"}


def test_memory_metrics_are_positive_gigabytes():
    metrics = memory_metrics()
    assert metrics["perf/cpu_memory_used_gb"] > 0
    assert all(0 < value < 1e5 for value in metrics.values())
