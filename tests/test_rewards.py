"""Rewards: the built-ins against worked cases, their weighted sums, and configs that cannot work."""

import json
import subprocess
import sys

import pytest

from jaxrl.rewards import REWARDS, Sample, Score, combine, make_scorer


def sample(response="", ground_truth="", *, extra_info=None, response_length=10, finished=True, data_source="test"):
    return Sample(
        prompt="a question",
        response=response,
        ground_truth=ground_truth,
        data_source=data_source,
        extra_info=extra_info or {},
        response_length=response_length,
        finished=finished,
    )


def reward_of(name, one, **kwargs):
    """The reward of one sample by an in-process built-in."""
    with make_scorer([(name, 1.0, kwargs)]) as scorer:
        [score] = scorer([one])
    assert score.error is None, score.error
    assert type(score.reward) is float
    return score.reward


# ---------------------------------------------------------------- built-ins


@pytest.mark.parametrize(
    ("response", "ground_truth", "strict", "flexible"),
    [
        # verl's gsm8k.compute_score gives these numbers
        ("6 * 7 is\n#### 42", "42", 1.0, 1.0),
        ("#### 41\nno:\n#### 42", "42", 1.0, 1.0),
        ("#### 1,234", "1234", 1.0, 0.0),  # flexible leaves the comma in
        ("#### -5", "-5", 1.0, 1.0),
        ("#### 3.50", "3.5", 0.0, 0.0),  # the texts are compared, not the values
        ("#### 72.", "72", 0.0, 0.0),
        ("#### $1,234", "1234", 0.0, 0.0),  # strict sees no number behind the dollar
        ("#### $72", "72", 0.0, 1.0),
        ("####72", "72", 0.0, 1.0),
        ("The answer is 72", "72", 0.0, 1.0),
        ("72 . ", "72", 0.0, 1.0),  # a lone full stop is passed over
        ("72, ", "72", 0.0, 0.0),
        ("no number", "72", 0.0, 0.0),
        ("#### 72" + " " * 300, "72", 0.0, 0.0),  # only the last 300 characters are read
        ("x" * 500 + "#### 72", "72", 1.0, 1.0),
    ],
)
def test_gsm8k_scores_as_verl_does(response, ground_truth, strict, flexible):
    assert reward_of("gsm8k", sample(response, ground_truth)) == strict
    assert reward_of("gsm8k", sample(response, ground_truth), method="flexible") == flexible


def test_gsm8k_pays_the_format_score_for_a_wrong_number_and_nothing_for_none():
    assert reward_of("gsm8k", sample("#### 7", "8"), format_score=0.1) == 0.1
    assert reward_of("gsm8k", sample("7", "8"), format_score=0.1) == 0.0
    assert reward_of("gsm8k", sample(".", "8"), method="flexible", format_score=0.1) == 0.1  # as in verl
    assert reward_of("gsm8k", sample("#### 8", 8), score=2) == 2.0


@pytest.mark.parametrize(
    ("response", "ground_truth", "first", "last"),
    [
        ("7", "7", 1.0, 1.0),
        ("7.0", 7, 1.0, 1.0),
        ("The sum of 3 and 4 is 7.", "7", 0.0, 1.0),
        ("7, because 3 + 4 = 7", "7", 1.0, 1.0),
        ("1,234 apples", "1234", 1.0, 1.0),
        ("1,2", "12", 0.0, 0.0),
        ("1,2", "1", 1.0, 0.0),
        ("10-3", "3", 0.0, 1.0),  # a difference, no sign
        ("x=-3", "-3", 1.0, 1.0),
        ("\u22123", "-3", 1.0, 1.0),
        (".5", "0.5", 1.0, 1.0),
        ("seven", "7", 0.0, 0.0),
        ("", "7", 0.0, 0.0),
    ],
)
def test_exact_number_compares_the_first_or_last_number_by_value(response, ground_truth, first, last):
    assert reward_of("exact_number", sample(response, ground_truth)) == first
    assert reward_of("exact_number", sample(response, ground_truth), pick="last") == last


def test_exact_number_reports_a_ground_truth_that_is_no_number():
    with make_scorer([("exact_number", 1.0, {})], error_reward=-1.0) as scorer:
        [score] = scorer([sample("7", "seven")])
    assert score.reward == -1.0
    assert score.error is not None and "the ground truth 'seven' is not a number" in score.error


def test_exact_match_compares_stripped_texts_and_its_options_widen_that():
    assert reward_of("exact_match", sample(" Paris\n", "Paris")) == 1.0
    assert reward_of("exact_match", sample("paris", "Paris")) == 0.0
    assert reward_of("exact_match", sample("paris", "Paris"), ignore_case=True) == 1.0
    assert reward_of("exact_match", sample("4 2", "42"), ignore_whitespace=True) == 1.0
    assert reward_of("exact_match", sample("b", ["a", "b"])) == 1.0
    tagged = "<answer>a</answer> no, <answer> b </answer>"
    assert reward_of("exact_match", sample(tagged, "b"), pattern="<answer>(.*?)</answer>") == 1.0
    assert reward_of("exact_match", sample("b", "b"), pattern="<answer>(.*?)</answer>") == 0.0


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (130, -1.0)])
def test_length_gives_the_soft_overlong_punishment_of_dapo(tokens, expected):
    one = sample(response_length=tokens)
    assert reward_of("length", one, max_tokens=100, buffer_tokens=20) == expected
    assert reward_of("length", one, max_tokens=100, buffer_tokens=20, penalty=0.5) == 0.5 * expected


def test_length_counts_tokens_or_punishes_unfinished_responses():
    assert reward_of("length", sample(response_length=30), mode="linear", per_token=-0.5, free_tokens=20) == -5.0
    assert reward_of("length", sample(finished=False), mode="unfinished", penalty=0.25) == -0.25
    assert reward_of("length", sample(finished=True), mode="unfinished") == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>two\nlines</think>\n<answer>7</answer>", 1.0),
        (" <think></think><answer></answer>\n", 1.0),
        ("<answer>7</answer>", 0.0),
        ("Well, <think>a</think><answer>7</answer>", 0.0),
        ("<think>a</think><answer>7</answer><answer>8</answer>", 0.0),
    ],
)
def test_format_wants_the_whole_response_in_the_form(response, expected):
    assert reward_of("format", sample(response)) == expected


def test_format_takes_a_pattern_of_the_user():
    assert reward_of("format", sample("A.\nB."), pattern=r"A.*B\.", score=0.5) == 0.5
    assert reward_of("format", sample("B."), pattern=r"A.*B\.", format_score=-0.5) == -0.5


def test_math_verify_finds_equal_mathematics_equal_and_outlives_a_stuck_expression():
    cases = [
        ("#### 72", "72", 1.0),
        ("so \\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("$\\boxed{\\frac12}$", "1/2", 1.0),
        ("$\\{2, 1\\}$", "\\{1, 2\\}", 1.0),
        ("1.41421356", "\\sqrt{2}", 1.0),
        ("$[1,2]$", "(1,2)", 0.0),
        ("I think 2 or 3", "3", 1.0),  # the last number counts
        ("I do not know", "3", 0.0),
        ("$10^{10^{10}}$", "2", None),  # an integer of ten thousand million digits: C code that no signal interrupts
        ("$x + x$", "2x", 1.0),
    ]
    with make_scorer([("math_verify", 1.0, {})], timeout_s=3.0, error_reward=-0.5, num_workers=2) as scorer:
        scores = scorer([sample(response, truth) for response, truth, _ in cases])
        for (response, truth, expected), score in zip(cases, scores, strict=True):
            if expected is None:
                assert score == Score(-0.5, {}, "math_verify: no answer within 3 s")
            else:
                assert score == Score(expected), (response, truth)
        assert scorer.error_counts == {"math_verify": 1}
        assert scorer([sample("2", "2")] * 5) == [Score(1.0)] * 5  # the killed worker was replaced


def test_reasoning_gym_scores_with_the_data_set_that_extra_info_names():
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("gsm_symbolic", size=1, seed=1)[0]
    extra_info = {"metadata": json.dumps(entry["metadata"])}
    answer = entry["answer"]
    tagged = f"<answer>{answer}</answer>"
    with make_scorer([("reasoning_gym", 1.0, {})], num_workers=1) as scorer:
        right, wrong, lost = scorer(
            [
                sample(answer, answer, extra_info=extra_info),
                sample("no idea", answer, extra_info={"metadata": entry["metadata"]}),
                sample(answer, answer, extra_info={"metadata": {"source_dataset": "no_such_set"}}),
            ]
        )
    assert right.reward == 1.0 and wrong.reward < 0.1
    assert lost.error is not None and "'no_such_set', which is no data set of reasoning-gym" in lost.error
    with make_scorer([("reasoning_gym", 1.0, {"answer_tag": "answer"})], num_workers=1) as scorer:
        scores = scorer([sample(text, answer, extra_info=extra_info) for text in (f"hm {tagged}", answer)])
    assert [score.reward for score in scores] == [1.0, 0.0]


# ---------------------------------------------------------------- sums


def test_several_rewards_are_weighted_and_each_becomes_a_metric():
    specs = [("exact_number", 1.0, {}), ("length", 0.5, {"mode": "linear", "per_token": -0.1}), ("format", 2.0, {})]
    with make_scorer(specs) as scorer:
        [score] = scorer([sample("7", "7", response_length=5)])
    assert score.reward == 1.0 - 0.25 + 0.0
    assert score.metrics == {"exact_number": 1.0, "length": -0.5, "format": 0.0}


def test_the_same_reward_may_be_named_twice():
    with make_scorer([("exact_number", 1.0, {}), ("exact_number", 0.5, {"pick": "last"})]) as scorer:
        [score] = scorer([sample("3 + 4 = 7", "7")])
    assert score == Score(0.5, {"exact_number": 0.0, "exact_number_2": 1.0})


def test_combine_adds_scores_from_elsewhere_and_keeps_fractions():
    scored = [Score(1, {"accuracy": 1.0}), Score(0.0, error="broken")]
    from_model = [Score(0.3), Score(0.9)]
    first, second = combine(
        {"function": scored, "model": from_model}, {"function": 1.0, "model": 0.5}, error_reward=-1.0
    )
    assert first == Score(1.15, {"function": 1.0, "model": 0.3, "function/accuracy": 1.0})
    assert second == Score(-1.0, {"model": 0.9}, "function: broken")
    assert type(scored[0].reward) is float
    with pytest.raises(ValueError, match="each score needs one weight"):
        combine({"function": scored}, {"model": 1.0})
    with pytest.raises(ValueError, match="their numbers differ"):
        combine({"function": scored, "model": from_model[:1]}, {"function": 1.0, "model": 0.5})


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        ([], "there is no reward to score with"),
        ([("gsm8", 1.0, {})], "there is no reward gsm8; did you mean gsm8k?"),
        ([("accuracy", 1.0, {})], "the built-in ones are gsm8k, exact_number"),
        ([("no_such_file.py:f", 1.0, {})], "there is no file .*no_such_file.py"),
        ([("gsm8k", float("nan"), {})], "the weight of reward gsm8k must be a finite number"),
        ([("gsm8k", 1.0, {"methd": "strict"})], "unexpected keyword argument 'methd' .its arguments: method, score"),
        ([("gsm8k", 1.0, {"method": "lax"})], "gsm8k knows the methods strict and flexible, not 'lax'"),
        ([("exact_number", 1.0, {"pick": "any"})], "first or the last"),
        ([("exact_match", 1.0, {"pattern": "x"})], "exactly one group"),
        ([("format", 1.0, {"pattern": "("})], "cannot read the regular expression '\\('"),
        ([("length", 1.0, {"max_tokens": 10, "buffer_tokens": 20})], "0 < buffer_tokens <= max_tokens, got 20 and 10"),
        ([("length", 1.0, {"mode": "log"})], "modes soft_overlong, linear, unfinished, not 'log'"),
        ([("length", 1.0, {"mode": "linear"})], "missing a required (keyword-only )?argument: 'per_token'"),
        ([("math_verify", 1.0, {"strict": True})], "unexpected keyword argument 'strict' .its arguments: none"),
        ([("remote", 1.0, {})], "missing a required (keyword-only )?argument: 'url'"),
    ],
)
def test_a_wrong_reward_config_is_refused_in_one_sentence(specs, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_scorer(specs)


def test_wrong_scorer_options_are_refused():
    for options in ({"timeout_s": 0}, {"error_reward": float("inf")}, {"num_workers": 0}, {"on_error": "ignore"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_scorer([("gsm8k", 1.0, {})], **options)


def test_rewards_import_neither_jax_nor_the_verifiers():
    code = "import sys, jaxrl.rewards; print({'jax', 'torch', 'httpx', 'math_verify', 'sympy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
    assert set(REWARDS) >= {"gsm8k", "exact_number", "math_verify", "remote"}
