"""Several turns with the real engine on a tiny model: what a user's function appends, and that nobody trains on it."""

import dataclasses
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest
from test_trainer import model, run, settings  # noqa: F401 (fixtures)
from transformers import AutoTokenizer
from vllm_stub import stub_python

from jaxrl.batch import Prompt
from jaxrl.config import Optim, from_dict
from jaxrl.metrics import Timer
from jaxrl.models.config import ModelConfig
from jaxrl.packing import Sequences, pack
from jaxrl.parallel import make_mesh
from jaxrl.rewards import Score
from jaxrl.roles import abstract_variables, load_base, optimizer_of
from jaxrl.rollout.engine import Sampling
from jaxrl.rollout.jax_engine import JaxEngine
from jaxrl.rollout.turns import Turn, Turns
from jaxrl.trainer import Trainer
from jaxrl.update import Policy, PolicyLoss
from jaxrl.user_code import import_function
from jaxrl.weights.folder import load_hf_config
from jaxrl.weights.pretrained import open_pretrained

ROOT = Path(__file__).parents[1]
FUNCTIONS = """
import asyncio, time

def never(turn):
    return None

def append(turn, text="12"):
    return text

async def append_soon(turn, text="12"):
    await asyncio.sleep(0.01)
    return text

def spell(turn):
    assert turn.response.endswith(turn.text) and turn.number >= 1
    return f"{turn.number}{turn.ground_truth}"

def naughty(turn):
    if turn.ground_truth == "0":
        raise KeyError("no tool of this name")
    if turn.ground_truth == "1":
        return 7
    if turn.ground_truth == "2":
        time.sleep(60)
    return "12"

def hand_over(turn):
    return turn.ground_truth + "="
"""
STOPS = tuple(range(1, 40))  # most of what a random model says, so that its turns are short
MANY = Sampling(max_tokens=24, n=4, stop_ids=STOPS)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "tools.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture(scope="module")
def tokenizer(model):  # noqa: F811
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def weights(model):  # noqa: F811
    mesh, config = make_mesh(1, 1, 1), ModelConfig.from_hf(load_hf_config(model), compute_dtype="float32")
    return config, {"params": load_base(open_pretrained(model), config, abstract_variables(mesh, config, "lm"))}


@pytest.fixture(scope="module")
def engine(weights):
    engine = JaxEngine(weights[0])
    engine.update_weights(weights[1], 3)
    return engine


@pytest.fixture
def turns(engine, tokenizer, file):
    made = []

    def make(function: str, *, most: int | None = 4, timeout_s: float = 10.0, **kwargs) -> Turns:
        made.append(Turns(engine, tokenizer, f"{file}:{function}", kwargs=kwargs, max_assistant_turns=most,
                          timeout_s=timeout_s, template_kwargs={}))  # fmt: skip
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def prompts(tokenizer):
    texts = [f"{n}+1=" for n in range(4)]
    return [Prompt(tokenizer(t)["input_ids"], t, "sums", t[0], {}, None, n) for n, t in enumerate(texts)]


def same(ours, theirs) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, theirs, strict=True)
        for name in ("group", "token_ids", "logprobs", "finished", "response_mask", "num_turns")
    )


def test_a_function_that_asks_for_no_more_changes_nothing(engine, turns, prompts):
    assert same(turns("never").generate(prompts, MANY, seed=5), engine.generate(prompts, MANY, seed=5))


def test_appended_text_stands_untrained_between_turns_that_are_conditioned_on_it(turns, prompts, tokenizer, weights):
    rollouts = turns("append").generate(prompts, MANY, seed=5)
    assert max(r.num_turns for r in rollouts) == 4
    assert [r.group for r in rollouts] == np.repeat(range(4), 4).tolist()
    appended = tokenizer("12")["input_ids"]
    for r in rollouts:
        assert len(r.token_ids) == len(r.logprobs) == len(r.response_mask) <= MANY.max_tokens
        assert r.token_ids[~r.response_mask].tolist() == appended * (r.num_turns - 1)
        for place in np.flatnonzero(~r.response_mask)[::2]:  # behind the end of a turn
            assert r.token_ids[place - 1] in STOPS and r.response_mask[place - 1]
    config, variables = weights
    policy = Policy(make_mesh(1, 1, 1), config, optimizer_of(Optim()), PolicyLoss())
    sequences = Sequences.of(prompts, rollouts, MANY.max_tokens)
    layout = pack(sequences, range(16), row_length=128, rows_per_micro_batch=4, max_micro_batches=1)
    logprobs = np.asarray(policy.logprobs(variables, layout)[0])
    for r, of_trainer in zip(rollouts, logprobs, strict=True):
        # float32: 1e-5 would do; a turn that does not see the text before it is off by 0.1 and more
        spoken = np.flatnonzero(r.response_mask)
        np.testing.assert_allclose(r.logprobs[spoken], of_trainer[spoken], atol=1e-4)


def test_the_budget_holds_for_all_turns_together(turns, prompts):
    sampling = dataclasses.replace(MANY, max_tokens=9)
    rollouts = turns("append", most=None, text="1234").generate(prompts, sampling, seed=1)
    assert max(r.num_turns for r in rollouts) >= 2
    for r in rollouts:
        assert len(r.token_ids) <= 9 and r.response_mask[-1]
        # A turn that ended in time was to go on, and ends the response only where there was no room for more.
        assert not r.finished and (len(r.token_ids) == 9 or len(r.token_ids) + 4 >= 9)
    one = turns("append", most=1).generate(prompts, sampling, seed=1)
    assert {r.num_turns for r in one} == {1} and all(r.response_mask.all() for r in one)


def test_the_function_sees_the_response_so_far_and_its_turn(turns, prompts, tokenizer):
    for r in turns("spell", most=3).generate(prompts, MANY, seed=2):
        said = [f"{n}{prompts[r.group].ground_truth}" for n in range(1, r.num_turns)]
        assert r.token_ids[~r.response_mask].tolist() == [i for text in said for i in tokenizer(text)["input_ids"]]


def test_async_functions_give_the_same(turns, prompts):
    ours, theirs = (turns(name).generate(prompts, MANY, seed=5) for name in ("append", "append_soon"))
    assert same(ours, theirs)


def test_a_function_that_fails_ends_its_response_and_no_other(turns, prompts, caplog):
    tool = turns("naughty", most=2, timeout_s=1.0)
    rollouts = tool.generate(prompts, dataclasses.replace(MANY, n=1), seed=4)
    assert [r.num_turns for r in rollouts] == [1, 1, 1, 2]
    assert tool.errors == 3
    for reason in ("KeyError: 'no tool of this name'", "it returned 7, which is neither None", "no answer within 1 s"):
        assert reason in caplog.text


def test_a_function_that_cannot_be_used_is_refused(turns, file):
    with pytest.raises(ValueError, match="rollout.multi_turn.function .*has no function apend; did you mean append"):
        turns("apend")
    with pytest.raises(ValueError, match="unexpected keyword argument 'words'"):
        turns("append", words=3)


def processes_that_name(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            found.append(path.read_text())
    return [line for line in found if text in line]


def test_a_run_that_cannot_begin_leaves_no_server(settings, tmp_path):  # noqa: F811
    served = {"rollout__engine": "vllm", "rollout__vllm": {"python": stub_python(tmp_path)}}
    tree = settings("none", **served, rollout__multi_turn={"function": f"{tmp_path}/nowhere.py:reply"})
    with pytest.raises(ValueError, match="rollout.multi_turn.function .*nowhere.py"):
        Trainer(from_dict(tree), trains=False)
    assert not processes_that_name(str(tmp_path))


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_messages_are_appended_in_the_words_of_the_chat_template(turns, tokenizer):
    asked = [{"role": "user", "content": "3+4="}]
    answers = [{"role": "tool", "content": "7"}, {"role": "user", "content": "so"}]
    tool = turns("never")
    tool.tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tool.tokenizer.chat_template = CHATML
    render = tool.tokenizer.apply_chat_template
    prompt = render(asked, tokenize=False, add_generation_prompt=True)
    whole = render(
        [*asked, {"role": "assistant", "content": "abc"}, *answers], tokenize=False, add_generation_prompt=True
    )
    assert prompt + "abc<eos>" + tool._rendered(answers, tool.tokenizer.eos_token_id) == whole
    tool.tokenizer.chat_template = CHATML.replace("{% for", "{{ raise_exception('no tools') }}{% for", 1)
    with pytest.raises(ValueError, match=r"returned messages \(tool, user\) that the chat template .* does not take"):
        tool._rendered(answers, tool.tokenizer.eos_token_id)


def test_the_calculator_of_the_examples():
    calculator = import_function(f"{ROOT}/examples/calculator.py:calculator", "example")

    def ask(text, **kwargs):
        return calculator(Turn(1, text, text, [], "", None, None, "", {}), **kwargs)

    assert ask("so <calc>12 * (3 + 4)</calc>") == {"role": "tool", "content": "84"}
    assert ask("<calc>1/8</calc>", role=None) == " = 0.125\n"
    assert ask("The answer is 7.") is None
    assert "is not arithmetic" in ask("<calc>__import__('os')</calc>")["content"]
    assert "division by zero" in ask("<calc>1/0</calc>")["content"]


def test_no_number_of_a_step_depends_on_what_is_known_of_appended_tokens(settings, file):  # noqa: F811
    """Rollout logprobs that are nonsense outside the mask give the same advantages, losses and metrics."""
    tree = settings(
        "masked", data__val_files=None, algorithm__use_kl_in_reward=True, data__max_response_length=12,
        algorithm__rollout_correction={"rollout_is": "token", "rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.5_2"},
        rollout__multi_turn={"function": f"{file}:append", "max_assistant_turns": 3}, trainer__row_length=64,
    )  # fmt: skip
    trainer = Trainer(from_dict(tree))
    trainer.engine.update_weights(trainer.roles.actor_variables(), 0)
    prompts = next(trainer.loader)
    sampling = Sampling(max_tokens=12, n=4, stop_ids=STOPS)
    rollouts = trainer.turns.generate(prompts, sampling, seed=3)
    assert max(r.num_turns for r in rollouts) > 1
    rng = np.random.default_rng(0)
    scores = [Score(float(x)) for x in rng.normal(size=len(rollouts))]
    begun = jax.tree.map(np.asarray, trainer.roles.state())
    shardings = jax.tree.map(lambda x: x.sharding, trainer.roles.state())
    results = []
    for nonsense in (0.0, -37.0):
        trainer.roles.restore(jax.device_put(begun, shardings))
        given = [
            dataclasses.replace(r, logprobs=np.where(r.response_mask, r.logprobs, np.float32(nonsense)))
            for r in rollouts
        ]
        results.append(trainer.learner.step(1, prompts, given, scores, None, Timer()))
    assert results[0] == results[1]
    assert results[0]["training/rollout_probs_diff_max"] < 1e-4  # of trained tokens alone


def test_a_model_learns_to_call_a_tool_whose_text_earns_the_reward(settings, file):  # noqa: F811
    """Only a turn that the model ends is answered with the right number, and only that number is rewarded."""
    tree = settings(
        "tool", data__val_files=None, data__ground_truth_key="answer", data__max_response_length=8, rollout__n=16,
        rollout__multi_turn={"function": f"{file}:hand_over", "max_assistant_turns": 2},
        algorithm__adv_estimator="grpo", actor__optim={"lr": 1e-2}, trainer__total_training_steps=16,
    )  # fmt: skip
    data = Path(tree["data"]["train_files"])
    data.write_text("\n".join(f'{{"prompt": "{n % 6}+1=", "answer": "9"}}' for n in range(16)))
    tree["reward"] = {"functions": [{"name": f"{data.parent}/nine.py:nine"}]}
    (data.parent / "nine.py").write_text(
        "def nine(solution_str):\n    return float('9=' in solution_str.replace(' ', ''))\n"
    )
    rows = run(tree)
    reward, calls = ([row[name] for row in rows] for name in ("critic/score/mean", "num_turns/mean"))
    assert reward[0] < 0.4 and np.mean(reward[-3:]) > 0.8, reward
    assert calls[-1] > calls[0] + 0.4 and rows[-1]["num_turns/errors"] == 0


def test_a_limit_of_its_own_ends_each_response_and_changes_no_token(engine, prompts):
    whole = engine.generate(prompts, Sampling(max_tokens=20, n=2), seed=3)
    limits = (1, 20, 7, 17)
    cut = engine.generate(prompts, Sampling(max_tokens=20, n=2, max_tokens_each=limits), seed=3)
    for ours, theirs in zip(cut, whole, strict=True):
        limit = limits[ours.group]
        assert len(ours.token_ids) == limit
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids[:limit])
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs[:limit])
    with pytest.raises(ValueError, match=r"max_tokens_each \(0, 3\): each lies between 1 and max_tokens 3"):
        Sampling(max_tokens=3, max_tokens_each=(0, 3))
