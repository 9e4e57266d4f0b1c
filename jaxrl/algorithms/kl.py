"""The distance of the policy to its reference: estimators from two log-probabilities a token, and the coefficient.

`actor` adds `kl_loss_coef` * aggregate(estimate) to the loss; "KL in reward" subtracts coef * estimate from every
token reward instead (`penalise_rewards`). Source of the estimators: J. Schulman, http://joschu.net/blog/kl-approx.html.

Entries of `KL_ESTIMATORS`: f(logprobs, ref_logprobs) -> estimate, elementwise and of any shape; a user's function
likewise. Entries of `KL_CONTROLLERS`, called through `choose.bind`: f(coef, mean_kl, **those it names of:
num_sequences, target_kl, horizon) -> coef. The coefficient is all the state there is: save it and a resume is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from jaxrl.algorithms.masked import Scalar, as_float, count_sequences, sequence_mean

Tokens = Float[Array, "*shape"]


def k1(logprobs: Tokens, ref_logprobs: Tokens) -> Tokens:
    """log p - log q: unbiased, may be negative, and its gradient has expectation zero."""
    return as_float(logprobs) - as_float(ref_logprobs)


def absolute(logprobs: Tokens, ref_logprobs: Tokens) -> Tokens:
    """|log p - log q|."""
    return jnp.abs(k1(logprobs, ref_logprobs))


def k2(logprobs: Tokens, ref_logprobs: Tokens) -> Tokens:
    """(log p - log q)^2 / 2: biased, but its gradient is that of the KL divergence in expectation."""
    return 0.5 * jnp.square(k1(logprobs, ref_logprobs))


def k3(logprobs: Tokens, ref_logprobs: Tokens) -> Tokens:
    """e^x - x - 1 with x = log q - log p: unbiased, never negative, low variance; x kept to +-20, the result to 10."""
    x = jnp.clip(-k1(logprobs, ref_logprobs), -20.0, 20.0)
    return jnp.minimum(jnp.exp(x) - x - 1.0, 10.0)


def straight_through(estimator: Callable[[Tokens, Tokens], Tokens]) -> Callable[[Tokens, Tokens], Tokens]:
    """The value of `estimator` with the gradient of `k2` (the names that end in "+")."""

    def estimate(logprobs: Tokens, ref_logprobs: Tokens) -> Tokens:
        backward = k2(logprobs, ref_logprobs)
        return jax.lax.stop_gradient(estimator(logprobs, ref_logprobs)) + (backward - jax.lax.stop_gradient(backward))

    return estimate


def mean_kl(kl: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """`actor/reward_kl_penalty`: the mean over sequences of the mean over their trained tokens; feeds the controller.

    Sequences without a trained token are left out.
    """
    per_sequence = jnp.where(jnp.any(mask, axis=1), sequence_mean(kl, mask)[:, 0], 0.0)
    return jnp.sum(per_sequence) / jnp.maximum(count_sequences(mask), 1)


def penalise_rewards(
    rewards: Real[Array, "B T"], kl: Float[Array, "B T"], mask: Bool[Array, "B T"], *, coef: Scalar
) -> Float[Array, "B T"]:
    """KL in the reward (InstructGPT, arXiv:2203.02155): r_t - coef * kl_t on trained tokens.

    `coef` is the coefficient before this step's controller update.
    """
    return as_float(rewards) - coef * jnp.where(mask, kl, 0.0)


def fixed(coef: Scalar, mean_kl: Scalar) -> Scalar:
    """A coefficient that stays."""
    return coef


def adaptive(
    coef: Scalar, mean_kl: Scalar, *, num_sequences: Scalar, target_kl: Scalar = 0.1, horizon: Scalar = 10_000
) -> Float[Array, ""]:
    """The coefficient that steers the KL to a target (Ziegler et al., arXiv:1909.08593, section 2.2).

    coef * (1 + clip(mean_kl / target_kl - 1, -0.2, 0.2) * num_sequences / horizon)
    """
    error = jnp.clip(jnp.asarray(mean_kl) / target_kl - 1.0, -0.2, 0.2)
    return coef * (1.0 + error * num_sequences / horizon)


_PLAIN_ESTIMATORS = {"k1": k1, "kl": k1, "abs": absolute, "k2": k2, "mse": k2, "k3": k3, "low_var_kl": k3}

KL_ESTIMATORS = _PLAIN_ESTIMATORS | {f"{name}+": straight_through(f) for name, f in _PLAIN_ESTIMATORS.items()}

KL_CONTROLLERS = {"fixed": fixed, "adaptive": adaptive}
