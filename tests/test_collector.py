"""Dynamic sampling in a real run: groups that teach nothing are replaced by others."""

import json
from pathlib import Path

import pytest
from test_trainer import model, run, settings  # noqa: F401 (fixtures)
from vllm_stub import Stub

from jaxrl import collector
from jaxrl.config import from_dict
from jaxrl.rollout.vllm_adapter import GENERATE
from jaxrl.trainer import Trainer

# Whatever is said to a prompt of the first kind earns the same.
REWARD = """
def varied(solution_str, ground_truth):
    share = solution_str.count("a") / 6 + len(solution_str) / 100
    return {"score": 0.5 if ground_truth == "flat" else share, "acc": 0.0}
"""


@pytest.fixture
def filtered(settings, tmp_path):  # noqa: F811
    (tmp_path / "varied.py").write_text(REWARD)

    def make(name: str, num_flat: int, **overrides) -> dict:
        tree = settings(
            name, data__val_files=None, data__ground_truth_key="kind", data__shuffle=False,
            reward={"functions": [{"name": f"{tmp_path}/varied.py:varied"}]}, algorithm__adv_estimator="grpo",
            algorithm__filter_groups={"enable": True, **overrides}, trainer__total_training_steps=2,
        )  # fmt: skip
        rows = [{"prompt": f"{i % 7}+1=", "kind": "flat" if i < num_flat else "varied"} for i in range(16)]
        Path(tree["data"]["train_files"]).write_text("\n".join(map(json.dumps, rows)))
        return tree

    return make


def test_groups_that_earned_the_same_are_left_out_and_others_sampled_for_them(filtered, tmp_path):
    rows = run(filtered("filtered", 4))
    # Prompts in order: 4 flat and 4 varied, then 8 varied, of which 4 fill the step up; then the same again.
    assert [row["train/num_gen_batches"] for row in rows] == [2, 2]
    assert [row["train/num_prompts_sampled"] for row in rows] == [16, 16]
    samples = [json.loads(line) for line in (tmp_path / "filtered" / "samples.jsonl").open()]
    assert {sample["ground_truth"] for sample in samples} == {"varied"}
    assert [sum(sample["step"] == step for sample in samples) for step in (1, 2)] == [32, 32]
    assert all(row["actor/grad_norm"] > 0 for row in rows)


def test_what_never_fills_a_step_is_said(filtered, monkeypatch):
    with pytest.raises(ValueError, match="after 3 batches of prompts only 0 of 8 groups .* differ in score.* too easy"):
        Trainer(from_dict(filtered("flat", 16, max_num_gen_batches=3))).fit()
    with pytest.raises(ValueError, match="after 1 batches of prompts only 0 of 8 groups .* differ in acc"):
        Trainer(from_dict(filtered("acc", 0, max_num_gen_batches=1, metric="acc"))).fit()
    monkeypatch.setattr(collector, "MAX_FRUITLESS", 24)
    with pytest.raises(ValueError, match="of 24 prompts in a row all responses to each had the same reward"):
        Trainer(from_dict(filtered("for ever", 16, metric="reward"))).fit()
    with pytest.raises(ValueError, match="filter_groups.metric 'ac' is not among what the reward returns: score, acc"):
        Trainer(from_dict(filtered("unknown", 0, metric="ac"))).fit()
    with pytest.raises(ValueError, match="filter_groups compares the responses of a group: set rollout.n above 1"):
        from_dict(filtered("alone", 0) | {"rollout": {"n": 1}})


def test_the_texts_of_the_config_that_end_a_response_or_must_not_come_reach_vllm(settings):  # noqa: F811
    stub, asked = Stub(), []

    def generate(message):
        asked.append(message["sampling_params"])
        return stub.usual(GENERATE, message)

    stub.answers[GENERATE] = generate
    tree = settings("texts", data__val_files=None, algorithm__adv_estimator="remax", trainer__total_training_steps=1)
    vllm = {"engine": "vllm", "vllm": {"urls": [stub.url], "probe_tolerance": 1e3}}
    tree["rollout"] |= {"stop": ["12", "="], "bad_words": ["7"], "guided": {"choice": ["1", "2"]}, **vllm}
    try:
        Trainer(from_dict(tree)).fit()
    finally:
        stub.close()
    asked = [params for params in asked if "prompt_logprobs" not in params]
    assert {params["temperature"] for params in asked} == {0.0, 1.0}  # the baselines end in the same way
    for params in asked:
        assert (params["stop"], params["bad_words"]) == (["12", "="], ["7"])
        assert params["structured_outputs"] == {"choice": ["1", "2"]}
        assert params["include_stop_str_in_output"] and params["detokenize"]


def test_texts_that_the_jax_engine_does_not_know_are_refused(settings):  # noqa: F811
    for name, value in (("stop", ["x"]), ("bad_words", ["x"]), ("guided", {"regex": "x"})):
        tree = settings("texts")
        tree["rollout"][name] = value
        with pytest.raises(ValueError, match=rf"rollout.{name} .*'x'.: the jax engine knows tokens and no texts, set"):
            from_dict(tree)


def test_two_grammars_at_a_time_are_refused(settings):  # noqa: F811
    tree = settings("texts", rollout__guided={"regex": "x", "choice": ["y"]}, rollout__engine="vllm")
    tree["rollout"]["vllm"] = {"urls": ["http://host:8000"]}
    with pytest.raises(ValueError, match="rollout.guided has regex, choice: one grammar at a time"):
        from_dict(tree)
