"""The engine that generates and the model that trains never agree exactly; this measures the gap and corrects for it.

On padded [B, T] arrays, once a step, before advantages and packing: `importance_weights` go to the losses as their
`rollout_weights`, `rejection_mask` replaces the response mask from then on, the metrics bear verl's names.
`rollout_logprobs` are the engine's own, `old_logprobs` the trainer's, of the same tokens under the same weights.
Source: verl's rollout correction; Yao et al., "Your efficient RL framework secretly brings you off-policy training".
"""

import math
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl.algorithms.masked import as_float, masked_mean, masked_sum, masked_var, sequence_lengths, sequence_sum

Logprobs = Float[Array, "B T"]
Mask = Bool[Array, "B T"]
Metrics = dict[str, Float[Array, ""]]

IMPORTANCE_LEVELS = ("token", "sequence")
REJECTION_CRITERIA = tuple(
    f"{scope}_{divergence}"
    for scope in ("token", "seq_sum", "seq_mean", "seq_max")
    for divergence in ("k1", "k2", "k3")
    if (scope, divergence) != ("seq_max", "k1")  # k1 has a sign: its largest value says nothing of its smallest
)

# Log-ratios are kept to +- this before they are exponentiated: e^20 is about 5e8.
LOG_RATIO_LIMIT = 20.0


def importance_weights(
    old_logprobs: Logprobs,
    rollout_logprobs: Logprobs,
    mask: Mask,
    *,
    level: str = "token",
    threshold: int | float | str = 2.0,
    batch_normalize: bool = False,
) -> tuple[Float[Array, "B T"], Metrics]:
    """The weight of every token, w = p_old / p_rollout, made safe; zero where the mask is false; no gradient.

    Args:
        level: "token", or "sequence" for the product over the sequence's trained tokens, given to each of them.
        threshold: a number truncates, min(w, threshold) (TIS); "low_high" zeroes weights outside the band (IcePop).
        batch_normalize: divide by the mean weight of the batch (over tokens, or over sequences).

    Raises:
        ValueError: unknown level, or a threshold that is neither a positive number nor a band.
    """
    if level not in IMPORTANCE_LEVELS:
        raise ValueError(f"Unknown rollout correction level '{level}'. Known: {', '.join(IMPORTANCE_LEVELS)}.")
    low, high = parse_band(threshold)
    log_ratio = _log_ratio(old_logprobs, rollout_logprobs, mask)
    if level == "sequence":
        log_ratio = sequence_sum(log_ratio, mask)
    raw = jnp.where(mask, jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)), 0.0)
    weights = jnp.minimum(raw, high) if low is None else jnp.where((raw >= low) & (raw <= high), raw, 0.0)
    metrics = _importance_metrics(weights, raw, mask, level, low, high)
    if batch_normalize:
        # At sequence level every sequence counts the same, however many tokens bear its weight.
        share = mask / jnp.maximum(sequence_lengths(mask), 1.0) if level == "sequence" else mask.astype(raw.dtype)
        mean = jnp.sum(weights * share) / jnp.maximum(jnp.sum(share), 1.0)
        mean = jnp.where(mean > 1e-8, mean, 1.0)
        weights = weights / mean
        metrics["rollout_corr/rollout_is_batch_norm_factor"] = mean
    return jax.lax.stop_gradient(weights), metrics


def rejection_mask(
    old_logprobs: Logprobs,
    rollout_logprobs: Logprobs,
    mask: Mask,
    *,
    criteria: str,
    thresholds: int | float | str,
) -> tuple[Mask, Metrics]:
    """The mask without the tokens, or whole sequences, on which trainer and engine differ too much.

    A criterion is "<scope>_<divergence>", with x = log(p_old / p_rollout) kept to +-20. The scope "token" judges
    tokens; "seq_sum", "seq_mean" and "seq_max" judge sequences by that statistic of their trained tokens.

        k1 = -x, kept while log(low) <= k1 <= log(high): a band on p_rollout / p_old; "high" alone means low = 1 / high
        k2 = x^2 / 2, kept while at most the threshold
        k3 = e^x - 1 - x, likewise

    Args:
        criteria: one of `REJECTION_CRITERIA`, or several with commas between; a token must pass all of them.
        thresholds: one for all, or one for each criterion, with commas between.

    Raises:
        ValueError: unknown criterion, or thresholds that do not fit the criteria.
    """
    x = jnp.clip(_log_ratio(old_logprobs, rollout_logprobs, mask), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    divergences = {"k1": -x, "k2": 0.5 * jnp.square(x), "k3": jnp.exp(x) - 1.0 - x}
    kept, metrics = mask, {}
    for criterion, (low, high) in parse_rejection(criteria, thresholds).items():
        scope, divergence = criterion.rsplit("_", 1)
        statistic = _STATISTICS[scope](divergences[divergence], mask)
        passes = (statistic <= high) if low is None else (statistic >= low) & (statistic <= high)
        kept = kept & passes
        name = f"rollout_corr/rollout_rs_{criterion}"
        metrics |= {
            f"{name}_mean": masked_mean(statistic, mask),
            f"{name}_max": _masked_max(statistic, mask),
            f"{name}_min": -_masked_max(-statistic, mask),
            f"{name}_masked_fraction": masked_mean(1.0 - passes, mask),
            f"{name}_seq_masked_fraction": _sequence_fraction(~passes, mask),
        }
    metrics["rollout_corr/rollout_rs_masked_fraction"] = masked_mean(1.0 - kept, mask)
    metrics["rollout_corr/rollout_rs_seq_masked_fraction"] = _sequence_fraction(~kept, mask)
    return kept, metrics


def mismatch_metrics(old_logprobs: Logprobs, rollout_logprobs: Logprobs, mask: Mask) -> Metrics:
    """How far engine and trainer are apart: `rollout_corr/*` and `training/rollout_probs_diff_*`, scalars.

    Sequence statistics leave out sequences without a trained token. kl is the k1 estimate of KL(rollout || old).
    """
    trained = jnp.any(mask, axis=1)
    log_ratio = _log_ratio(old_logprobs, rollout_logprobs, mask)
    safe = jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_ppl, rollout_log_ppl = -_row_mean(old_logprobs, mask), -_row_mean(rollout_logprobs, mask)
    difference = log_ppl - rollout_log_ppl
    sequence_ratio = jnp.clip(jnp.sum(log_ratio, axis=1), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    over_sequences = {
        "training_ppl": jnp.exp(log_ppl),
        "training_log_ppl": log_ppl,
        "rollout_ppl": jnp.exp(rollout_log_ppl),
        "rollout_log_ppl": rollout_log_ppl,
        "log_ppl_diff": difference,
        "log_ppl_abs_diff": jnp.abs(difference),
        "ppl_ratio": jnp.exp(difference),
        "chi2_seq": jnp.exp(2.0 * sequence_ratio) - 1.0,
    }
    over_tokens = {
        "kl": -log_ratio,
        "k3_kl": jnp.exp(safe) - safe - 1.0,
        "chi2_token": jnp.exp(2.0 * safe) - 1.0,
    }
    metrics = {name: masked_mean(x, trained) for name, x in over_sequences.items()}
    metrics |= {name: masked_mean(x, mask) for name, x in over_tokens.items()}
    metrics["log_ppl_diff_max"] = _masked_max(difference, trained)
    metrics["log_ppl_diff_min"] = -_masked_max(-difference, trained)
    metrics = {f"rollout_corr/{name}": value for name, value in metrics.items()}

    probs, rollout_probs = jnp.exp(as_float(old_logprobs)), jnp.exp(as_float(rollout_logprobs))
    gap = jnp.abs(probs - rollout_probs)
    return metrics | {
        "training/rollout_probs_diff_mean": masked_mean(gap, mask),
        "training/rollout_probs_diff_max": _masked_max(gap, mask),
        "training/rollout_probs_diff_std": jnp.sqrt(masked_var(gap, mask)),
        "training/rollout_actor_probs_pearson_corr": pearson_correlation(probs, rollout_probs, mask),
    }


def pearson_correlation(
    x: Float[Array, "*shape"], y: Float[Array, "*shape"], mask: Bool[Array, "*shape"]
) -> Float[Array, ""]:
    """cov(x, y) / (std(x) * std(y)) over trained tokens; zero when one of them does not vary."""
    x, y = as_float(x) - masked_mean(x, mask), as_float(y) - masked_mean(y, mask)
    scale = jnp.sqrt(masked_sum(jnp.square(x), mask) * masked_sum(jnp.square(y), mask))
    return jnp.where(scale > 0, masked_sum(x * y, mask) / jnp.where(scale > 0, scale, 1.0), 0.0)


def parse_band(threshold: int | float | str) -> tuple[float | None, float]:
    """2.0 or "2.0" -> (None, 2.0); "0.5_2.0" -> (0.5, 2.0).

    Raises:
        ValueError: not a positive number and not two positive numbers in order.
    """
    try:
        bounds = [float(part) for part in str(threshold).split("_")]
    except ValueError:
        bounds = []
    if len(bounds) == 1 and bounds[0] > 0:
        return None, bounds[0]
    if len(bounds) == 2 and 0 < bounds[0] <= bounds[1]:
        return bounds[0], bounds[1]
    raise ValueError(f"Threshold {threshold!r} must be a positive number or a band such as '0.5_2.0'.")


def parse_rejection(criteria: str, thresholds: int | float | str) -> dict[str, tuple[float | None, float]]:
    """Criterion -> (low, high) in the units of its statistic, in the order given; low is None where there is none.

    Raises:
        ValueError: unknown criterion, a wrong number of thresholds, or a band for a criterion that takes none.
    """
    names = _split(criteria)
    specs = _split(str(thresholds))
    if not names:
        raise ValueError(f"No rejection criterion in {criteria!r}. Known: {', '.join(REJECTION_CRITERIA)}.")
    if len(specs) not in (1, len(names)):
        raise ValueError(f"{len(specs)} rejection thresholds for {len(names)} criteria: give one, or one for each.")
    if len(specs) == 1:
        specs = specs * len(names)
    bounds = {}
    for name, spec in zip(names, specs, strict=True):
        if name not in REJECTION_CRITERIA:
            raise ValueError(f"Unknown rejection criterion '{name}'. Known: {', '.join(REJECTION_CRITERIA)}.")
        low, high = parse_band(spec)
        if name.endswith("_k1"):
            bounds[name] = (math.log(low if low is not None else 1.0 / high), math.log(high))
        elif low is None:
            bounds[name] = (None, high)
        else:
            raise ValueError(f"Rejection criterion '{name}' takes one upper bound, not the band '{spec}'.")
    return bounds


def _importance_metrics(
    weights: Float[Array, "B T"],
    raw: Float[Array, "B T"],
    mask: Mask,
    level: str,
    low: float | None,
    high: float,
) -> Metrics:
    """`rollout_corr/rollout_is_*`: of the weights as applied, and how many of the raw ones lay outside the bounds."""
    lower = 1.0 / high if low is None else low
    trained = jnp.any(mask, axis=1)
    mean = masked_mean(weights, mask)
    square = masked_mean(jnp.square(weights), mask)
    per_sequence = _row_mean(weights, mask)
    extremes = raw if level == "sequence" else weights
    is_high, is_low = raw > high, raw < lower
    metrics = {
        "mean": mean,
        "max": _masked_max(extremes, mask),
        "min": -_masked_max(-extremes, mask),
        "std": jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0.0)),
        "eff_sample_size": jnp.square(mean) / jnp.maximum(square, 1e-8),
        "seq_mean": masked_mean(per_sequence, trained),
        "seq_std": jnp.sqrt(masked_var(per_sequence, trained)),
        "seq_max": _masked_max(per_sequence, trained),
        "seq_min": -_masked_max(-per_sequence, trained),
        "seq_max_deviation": _masked_max(jnp.abs(per_sequence - 1.0), trained),
        "seq_fraction_high": masked_mean(per_sequence > high, trained),
        "seq_fraction_low": masked_mean(per_sequence < lower, trained),
    }
    if level == "sequence":
        metrics["ratio_fraction_high"] = _sequence_fraction(is_high, mask)
        metrics["ratio_fraction_low"] = _sequence_fraction(is_low, mask)
    else:
        metrics["ratio_fraction_high"] = masked_mean(is_high, mask)
        metrics["ratio_fraction_low"] = masked_mean(is_low, mask)
    if low is not None:
        metrics["oob_ratio"] = masked_mean(is_high | is_low, mask)
    return {f"rollout_corr/rollout_is_{name}": value for name, value in metrics.items()}


def _log_ratio(old_logprobs: Logprobs, rollout_logprobs: Logprobs, mask: Mask) -> Logprobs:
    """log(p_old / p_rollout), zero where untrained."""
    return jnp.where(mask, as_float(old_logprobs) - as_float(rollout_logprobs), 0.0)


def _row_mean(x: Float[Array, "B T"], mask: Mask) -> Float[Array, " B"]:
    return jnp.sum(as_float(x), axis=1, where=mask) / jnp.maximum(jnp.sum(mask, axis=1), 1)


def _row_max(x: Float[Array, "B T"], mask: Mask) -> Float[Array, "B T"]:
    return jnp.broadcast_to(jnp.max(jnp.where(mask, x, -jnp.inf), axis=1, keepdims=True), x.shape)


def _masked_max(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.max(jnp.where(mask, x, -jnp.inf))


def _sequence_fraction(condition: Mask, mask: Mask) -> Float[Array, ""]:
    """The part of the trained sequences in which a trained token meets the condition."""
    return masked_mean(jnp.any(condition & mask, axis=1), jnp.any(mask, axis=1))


def _split(text: str) -> list[str]:
    return [part for part in re.split(r"[,\s]+", text) if part]


_STATISTICS = {
    "token": lambda x, mask: x,
    "seq_sum": sequence_sum,
    "seq_mean": lambda x, mask: jnp.broadcast_to(_row_mean(x, mask)[:, None], x.shape),
    "seq_max": _row_max,
}
