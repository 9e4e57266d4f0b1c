"""Rewards: the built-ins against worked cases, a user's own functions in each of their forms, and what may go wrong."""

import json
import logging
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jaxrl.rewards import REWARDS, RewardError, Sample, Score, combine, make_scorer


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


@pytest.fixture
def write(tmp_path):
    """Writes a user's reward file and gives the name of its function `f`."""

    def write_file(code, function="f"):
        path = tmp_path / "my_rewards.py"
        path.write_text(textwrap.dedent(code))
        return f"{path}:{function}"

    return write_file


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


def test_no_samples_have_no_scores(write):
    with make_scorer([("gsm8k", 1.0, {}), (write("def f(samples): return []"), 1.0, {})]) as scorer:
        assert scorer([]) == []


# ---------------------------------------------------------------- a user's own functions

FORMS = {
    "verl's form of one sample": """
        def f(data_source, solution_str, ground_truth, extra_info=None):
            return {"score": len(solution_str) / 4, "seen": extra_info["n"], "text": "no metric", "odd": len("x") == 1}
    """,
    "verl's form, of which only some parameters are used": """
        def f(solution_str, **kwargs):
            return {"score": len(solution_str) / 4, "seen": kwargs["extra_info"]["n"], "odd": True}
    """,
    "verl's form of a batch": """
        def f(data_sources, solution_strs, ground_truths, extra_infos):
            return [{"score": len(s) / 4, "seen": e["n"], "odd": True} for s, e in zip(solution_strs, extra_infos)]
    """,
    "one sample": """
        def f(sample):
            return {"score": len(sample.response) / 4, "seen": sample.extra_info["n"], "odd": True}
    """,
    "a batch of samples": """
        def f(samples):
            return ({"score": len(s.response) / 4, "seen": s.extra_info["n"], "odd": True} for s in samples)
    """,
    "async, one sample": """
        import asyncio
        async def f(sample):
            await asyncio.sleep(0.05 / (1 + sample.extra_info["n"]))  # later samples are ready earlier
            return {"score": len(sample.response) / 4, "seen": sample.extra_info["n"], "odd": True}
    """,
    "async, a batch in verl's form": """
        import asyncio
        async def f(solution_strs, extra_infos):
            await asyncio.sleep(0.01)
            return [{"score": len(s) / 4, "seen": e["n"], "odd": True} for s, e in zip(solution_strs, extra_infos)]
    """,
    "an object with an async call": """
        class Judge:
            async def __call__(self, sample):
                return {"score": len(sample.response) / 4, "seen": sample.extra_info["n"], "odd": True}
        f = Judge()
    """,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_custom_function_may_have_the_form_of(form, write):
    samples = [sample("x" * n, extra_info={"n": n}) for n in range(6)]
    with make_scorer([(write(FORMS[form]), 1.0, {})], num_workers=2) as scorer:
        assert scorer(samples) == [Score(n / 4, {"seen": float(n), "odd": 1.0}) for n in range(6)]


def test_a_custom_function_gets_its_arguments_and_may_import_its_neighbours(write, tmp_path):
    (tmp_path / "neighbour.py").write_text("FACTOR = 10\n")
    name = write("from neighbour import FACTOR\ndef f(sample, bonus): return FACTOR + bonus")
    with make_scorer([(name, 0.5, {"bonus": 1})], num_workers=1) as scorer:
        assert scorer([sample()]) == [Score(5.5)]


def test_async_functions_run_at_the_same_time_up_to_the_limit(write):
    name = write(
        """
        import asyncio
        running = 0
        async def f(sample):
            global running
            running += 1
            at_once = running
            await asyncio.sleep(0.1)
            running -= 1
            return at_once
        """
    )
    with make_scorer([(name, 1.0, {})], max_concurrent=4) as scorer:
        assert max(score.reward for score in scorer([sample()] * 12)) == 4.0


@pytest.mark.parametrize(
    ("code", "kwargs", "sentence"),
    [
        ("def g(sample): return 1", {}, "has no function f"),
        ("def ff(sample): return 1", {}, "did you mean ff?"),
        ("f = 3", {}, "f in .* is not a function but a int"),
        ("import no_such_module\ndef f(sample): return 1", {}, "importing .*No module named 'no_such_module'"),
        ("def f(sample) return 1", {}, "importing .*SyntaxError"),
        ("raise SystemExit(3)", {}, "importing .*SystemExit"),
        ("def f(text): return 1", {}, r"f\(text\) must take either `sample` or verl's"),
        ("def f(sample, samples): return 1", {}, "must take either"),
        ("def f(sample, bonus): return 1", {}, "missing a required argument: 'bonus'"),
        ("def f(sample): return 1", {"bonus": 1}, "got an unexpected keyword argument 'bonus'"),
    ],
)
def test_a_custom_function_that_cannot_work_is_refused_before_training(code, kwargs, sentence, write):
    with pytest.raises(ValueError, match=sentence):
        make_scorer([(write(code), 1.0, kwargs)])


def test_the_traceback_of_a_failed_import_comes_with_the_error(write):
    with pytest.raises(ValueError) as caught:
        make_scorer([(write("def helper():\n    1 / 0\nhelper()\n"), 1.0, {})])
    assert "ZeroDivisionError: division by zero (my_rewards.py, line 2)" in str(caught.value)
    assert "in helper" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("returns", "reason"),
    [
        ("None", "it returned None (NoneType) as the score, which is not a finite number"),
        ("'1.0'", "it returned '1.0' (str) as the score"),
        ("float('nan')", "it returned nan (float) as the score"),
        ("{'score': 1e999}", "it returned inf (float) as the score"),
        ("{'reward': 1.0}", "it returned a dict without the key \"score\" (its keys: ['reward'])"),
        ("[1.0, 2.0]", "it returned [1.0, 2.0] (list) as the score"),
        ("sample.extra_info['missing']", "KeyError: 'missing' (my_rewards.py, line 2)"),
    ],
)
def test_a_result_that_is_no_score_is_an_error_of_its_sample(returns, reason, write):
    name = write(f"def f(sample):\n    return {returns} if sample.response == 'bad' else 0.5\n")
    with make_scorer([(name, 1.0, {})], error_reward=-1.0, num_workers=1) as scorer:
        good, bad = scorer([sample("good"), sample("bad")])
    assert good == Score(0.5)
    assert bad.reward == -1.0 and bad.error is not None and bad.error.startswith(f"f: {reason}")


def test_metrics_that_are_no_finite_numbers_are_left_out(write):
    name = write("def f(sample): return {'score': True, 'a': float('nan'), 'b': 'text', 'c': None, 'd': 2}")
    with make_scorer([(name, 1.0, {})], num_workers=1) as scorer:
        assert scorer([sample()]) == [Score(1.0, {"d": 2.0})]


def test_a_batch_function_must_return_one_result_for_each_sample(write):
    with make_scorer([(write("def f(samples): return [1.0]"), 1.0, {})]) as scorer:
        assert {score.error for score in scorer([sample()] * 3)} == {"f: it returned 1 results for 3 samples"}


def test_failures_are_logged_with_their_sample_and_counted(write, caplog):
    name = write("def f(sample):\n    if int(sample.response) % 2: raise RuntimeError('odd')\n    return 1\n")
    samples = [sample(str(n), f"truth {n}", data_source="my_data") for n in range(16)]
    with make_scorer([(name, 1.0, {})], num_workers=1) as scorer, caplog.at_level(logging.WARNING):
        scorer(samples)
        assert scorer.error_counts == {"f": 8}
    assert len(caplog.messages) == 6  # five with their samples, one with the number
    assert caplog.messages[0] == (
        "reward f failed on sample 1 (data_source 'my_data', ground truth 'truth 1', response '1'): "
        "RuntimeError: odd (my_rewards.py, line 2)"
    )
    assert caplog.messages[-1] == "reward f failed on 8 of these 16 samples"


def test_a_failure_ends_the_run_if_the_config_says_so(write):
    name = write("def f(sample): raise RuntimeError('odd')")
    with (
        make_scorer([(name, 1.0, {})], on_error="raise", num_workers=1) as scorer,
        pytest.raises(RewardError, match=r"reward f failed on sample 0 .*RuntimeError: odd"),
    ):
        scorer([sample()])


def test_one_sleeping_sample_times_out_and_leaves_the_others_their_scores(write):
    name = write(
        """
        import time
        def f(sample):
            if sample.response == "slow":
                time.sleep(60)
            return 1
        """
    )
    samples = [sample("slow" if n == 3 else "quick") for n in range(8)]
    with make_scorer([(name, 1.0, {})], timeout_s=1.5, num_workers=2) as scorer:
        start = time.monotonic()
        scores = scorer(samples)
        assert time.monotonic() - start < 20.0
    assert scores.pop(3) == Score(0.0, {}, "f: no answer within 1.5 s")
    assert scores == [Score(1.0)] * 7


def test_a_slow_async_sample_times_out_and_a_blocked_event_loop_is_killed(write):
    name = write(
        """
        import asyncio, time
        async def f(sample):
            if sample.response == "waits":
                await asyncio.sleep(60)
            if sample.response == "blocks":
                time.sleep(60)
            return 1
        """
    )
    with make_scorer([(name, 1.0, {})], timeout_s=1.0) as scorer:
        slow = Score(0.0, {}, "f: no answer within 1 s")
        assert scorer([sample("quick"), sample("waits"), sample("quick")]) == [Score(1.0), slow, Score(1.0)]
        assert scorer([sample("quick"), sample("blocks")]) == [Score(1.0), slow]
        assert scorer([sample("quick")]) == [Score(1.0)]


def test_a_worker_that_dies_costs_its_sample_only(write):
    name = write("import os\ndef f(sample): return os._exit(7) if sample.response == 'dies' else 1")
    with make_scorer([(name, 1.0, {})], num_workers=1) as scorer:
        scores = scorer([sample("lives"), sample("dies"), sample("lives")])
    assert scores == [Score(1.0), Score(0.0, {}, "f: its worker process died (exit code 7)"), Score(1.0)]


def test_a_sample_that_cannot_be_sent_to_a_worker_is_an_error_of_its_own(write):
    with make_scorer([(write("def f(sample): return 1"), 1.0, {})], num_workers=1) as scorer:
        good, bad = scorer([sample(), sample(ground_truth=lambda: None)])
    assert good == Score(1.0)
    assert bad.error is not None and "cannot be sent to a worker process" in bad.error


def test_close_leaves_no_process_behind(write, tmp_path):
    name = write(
        f"""
        import os, subprocess, time
        helper = subprocess.Popen(["sleep", "60"])
        with open({str(tmp_path / "pids")!r}, "a") as file:
            print(os.getpid(), helper.pid, file=file)
        def f(sample): return 1
        """
    )
    scorer = make_scorer([(name, 1.0, {})], num_workers=2)
    scorer([sample()] * 50)
    scorer.close()
    scorer.close()
    time.sleep(0.2)
    for pid in (tmp_path / "pids").read_text().split():
        status = Path(f"/proc/{pid}/status")
        assert not status.exists() or "State:\tZ" in status.read_text(), f"process {pid} is still there"


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
        ([("length", 1.0, {"mode": "linear"})], "missing a required argument: 'per_token'"),
        ([("math_verify", 1.0, {"strict": True})], "unexpected keyword argument 'strict' .its arguments: none"),
        ([("remote", 1.0, {})], "missing a required argument: 'url'"),
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
