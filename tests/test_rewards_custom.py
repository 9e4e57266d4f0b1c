"""A user's own reward functions: each of their forms, and all that may go wrong with them, while the run goes on."""

import logging
import textwrap
import time
from pathlib import Path

import pytest

from jaxrl.rewards import RewardError, Sample, Score, make_scorer


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


@pytest.fixture
def write(tmp_path):
    """Writes a user's reward file and gives the name of its function `f`."""

    def write_file(code, function="f"):
        path = tmp_path / "my_rewards.py"
        path.write_text(textwrap.dedent(code))
        return f"{path}:{function}"

    return write_file


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


def test_no_samples_have_no_scores(write):
    with make_scorer([("gsm8k", 1.0, {}), (write("def f(samples): return []"), 1.0, {})]) as scorer:
        assert scorer([]) == []
