"""A user's own functions by path: how they are found, and that they stand in for entries of the tables of algorithms."""

import sys
import textwrap

import jax
import numpy as np
import pytest

from jaxrl.algorithms.advantages import ADVANTAGES
from jaxrl.algorithms.choose import bind, choose
from jaxrl.algorithms.kl import KL_ESTIMATORS
from jaxrl.algorithms.losses import POLICY_LOSSES
from jaxrl.config import Algorithm
from jaxrl.prepare import Inputs, make_prepare
from jaxrl.user_code import import_function, is_user_function


@pytest.fixture
def write(tmp_path):
    def write_file(code, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(code))
        return path

    return write_file


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("a/b.py:f", True), ("~/b.py:make_rows", True), ("b.py", False), ("b.py:", False), ("b.py:f()", False),
        ("task:arithmetic", False), ("grpo", False), (None, False), (["a.py:f"], False), (len, False),
    ],
)  # fmt: skip
def test_a_users_function_is_told_from_a_name(name, is_one):
    assert is_user_function(name) is is_one


def test_a_path_may_be_relative_or_begin_at_home(write, tmp_path, monkeypatch):
    write("def f(): return 3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert import_function("mine.py:f", "reward")() == import_function("~/mine.py:f", "reward")() == 3


def test_a_file_that_is_not_there_is_named_with_what_asked_for_it(tmp_path):
    with pytest.raises(ValueError, match=r"policy loss .*no\.py:f: there is no file .*no\.py"):
        import_function(f"{tmp_path}/no.py:f", "policy loss")


def test_a_file_without_functions_says_so(write):
    with pytest.raises(ValueError, match="has no function f; its functions are: none"):
        import_function(f"{write('X = 1')}:f", "reward")


def test_a_class_of_the_file_is_found_by_dataclasses_and_pickle(write):
    path = write("""
        import dataclasses, pickle
        @dataclasses.dataclass
        class Pair:
            a: "int"
        def f(): return pickle.loads(pickle.dumps(Pair(2))).a
    """)
    assert import_function(f"{path}:f", "reward")() == 2
    assert "jaxrl_user_mine" in sys.modules


MINE = """
    import jax.numpy as jnp

    def sign(rewards, mask, *, group, scale=2.0):
        scores = rewards.sum(axis=1)
        advantages = jnp.where(mask, scale * jnp.sign(scores)[:, None], 0.0)
        return advantages, advantages

    def hungry(rewards, mask, *, hints):
        return rewards, rewards

    def plain(logprobs, old_logprobs, advantages, mask, *, clip_low):
        token_loss = jnp.where(mask, -advantages * jnp.exp(logprobs - old_logprobs), 0.0)
        return token_loss, {"my_clip": jnp.sum(mask) * clip_low}

    def squared(logprobs, ref_logprobs):
        return (logprobs - ref_logprobs) ** 2
"""


def test_a_users_advantage_function_is_used_by_the_stage(write):
    p = Algorithm(adv_estimator=f"{write(MINE)}:sign", use_kl_in_reward=True, kl_penalty=f"{write(MINE)}:squared")
    mask = np.array([[1, 1], [1, 0]], bool)
    logprobs = np.full((2, 2), -1.0, np.float32)
    prepared, metrics = make_prepare(p)(Inputs(
        scores=np.array([1.0, -1.0], np.float32), group=np.array([0, 0], np.int32), mask=mask,
        rollout_logprobs=logprobs, old_logprobs=logprobs, ref_logprobs=logprobs - 0.5, values=None, baselines=None,
        kl_coef=np.float32(0.1),
    ))  # fmt: skip
    np.testing.assert_array_equal(prepared.advantages, [[2.0, 2.0], [-2.0, 0.0]])
    assert metrics["actor/reward_kl_penalty"] == pytest.approx(0.25)


def test_a_users_policy_loss_is_given_what_it_names_and_has_a_gradient(write):
    loss = choose(POLICY_LOSSES, f"{write(MINE)}:plain", "actor.policy_loss.loss_mode")
    assert choose(POLICY_LOSSES, f"{write(MINE)}:plain", "actor.policy_loss.loss_mode") is loss  # imported once
    bound = bind(loss, clip_low=0.2, clip_high=0.3, tau_pos=1.0, rollout_weights=None)
    x = np.array([[0.0, 0.5]], np.float32)
    advantages, mask = np.array([[2.0, 1.0]], np.float32), np.array([[True, False]])
    gradient, sums = jax.grad(lambda y: (lambda t, s: (t.sum(), s))(*bound(y, x, advantages, mask)), has_aux=True)(x)
    np.testing.assert_allclose(gradient, [[-2.0, 0.0]])
    assert float(sums["my_clip"]) == pytest.approx(0.2)


def test_a_users_kl_estimator_is_chosen_by_path(write):
    assert choose(KL_ESTIMATORS, f"{write(MINE)}:squared", "kl")(3.0, 1.0) == 4.0


def test_a_users_function_that_needs_what_there_is_not_says_so(write):
    estimate = choose(ADVANTAGES, f"{write(MINE)}:hungry", "algorithm.adv_estimator")
    with pytest.raises(ValueError, match="'hungry' needs `hints`"):
        bind(estimate, group=None, values=None)


def test_a_misspelt_function_of_a_users_file_is_answered_with_a_suggestion(write):
    with pytest.raises(ValueError, match=r"algorithm\.adv_estimator .*has no function sing; did you mean sign\?"):
        choose(ADVANTAGES, f"{write(MINE)}:sing", "algorithm.adv_estimator")
