"""Do sampler and trainer agree, token by token? If not, why: each suspect is tried out, and who explains the gap is named.

`examine` samples a few prompts and compares the engine's logprobs with the trainer's of the same tokens. Where they
differ, the trainer's are computed again under each suspicion (another temperature, no truncation, other prompt tokens,
older weights ...), and the one that leaves the least of the gap is the cause. `trainer.py` asks before the first step
where `rollout.max_probs_diff` is set; `scripts/doctor.py` also asks after an update of the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from .batch import Prompt, Rollout
from .config import Config
from .packing import Sequences, max_micro_batches, pack
from .parallel import num_row_shards
from .rollout.engine import Engine, Sampling
from .update import Policy

Tree = Any
Rule = tuple[float, int, float]  # temperature, top_k, top_p

AGREE = 1e-3  # mean difference of logprobs that float32 stays under, sums in another order included
EXPLAINED = 0.25  # a suspect that leaves at most this share of the gap is the cause
ROUNDING = 3.0  # a gap up to so many times what the dtype does to the trainer itself is the dtype's
NUM_PROMPTS, NUM_WORST = 16, 5
FIXES = {
    "weights": "the engine does not have the weights of the trainer: look at how they are published",
    "head": "the engine kept an older copy of the output head, as vLLM on a CPU does of a tied one: refresh it",
    "cache": "the engine answers from a cache that older weights filled: reset its prefix cache after an update",
    "temperature": "set rollout.temperature to what the engine uses, or let the engine use it and report logprobs after it",
    "truncation": "set rollout.top_k and rollout.top_p to what the engine does, and let it report logprobs of what it keeps",
    "generation_config": "the engine applies the model's generation_config.json: tell it not to, or set the same here",
    "tokens": "the engine must be given token ids, not text: look at special tokens and at the chat template",
    "dtype": "the engine computes in another precision: accept it and correct for it (rollout_correction), or use float32",
}


@dataclass(frozen=True)
class Trial:
    """What the trainer finds under one suspicion."""

    cause: str
    words: str
    left: float  # of the gap: mean difference of logprobs that remains


@dataclass(frozen=True)
class Diagnosis:
    mean: float  # of the differences of logprobs, each by its size
    max: float
    correlation: float  # of the logprobs
    probs_mean: float  # of the differences of probabilities: training/rollout_probs_diff_mean
    worst: list[tuple[str, str, float, float]]  # text before, token, the engine's logprob, the trainer's
    trials: list[Trial]  # best first; empty where the two agree
    cause: str | None  # a key of FIXES; None: they agree, or nobody knows

    @property
    def sentence(self) -> str:
        if not self.trials:
            return "The engine and the trainer agree."
        if self.cause is None:
            return f"No suspect explains the gap. The nearest: {self.trials[0].words}."
        words = next(trial.words for trial in self.trials if trial.cause == self.cause)
        return f"The cause: {words}. {FIXES[self.cause][0].upper()}{FIXES[self.cause][1:]}."

    def __str__(self) -> str:
        lines = [
            f"difference of logprobs: mean {self.mean:.2e}, max {self.max:.2e}, correlation {self.correlation:.4f}",
            f"difference of probabilities: mean {self.probs_mean:.2e}",
            *(f"  {before!r} {token!r}: engine {e:.3f}, trainer {t:.3f}" for before, token, e, t in self.worst),
            *(f"  {trial.left:.2e} left of the gap: {trial.words}" for trial in self.trials),
        ]
        return "\n".join([*lines, self.sentence])


class Doctor:
    """Asks an engine, and the `policy` program with `variables`, about the same tokens."""

    def __init__(
        self, c: Config, policy: Policy, engine: Engine, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt],
        *, generation_config: Mapping[str, Any], sampling: Sampling,
    ):  # fmt: skip
        self.c, self.policy, self.engine, self.tokenizer, self.prompts = c, policy, engine, tokenizer, list(prompts)
        self.generation_config, self.sampling = generation_config, sampling
        self.rule: Rule = (sampling.temperature, sampling.top_k, sampling.top_p)

    def examine(self, variables: Tree, *, before: Tree | None = None) -> Diagnosis:
        """Of the weights `variables`, which the engine is to have. `before`: those that it had until then, which is tried
        out on an engine that stays awake; without, it sleeps from here on where it does so in training.
        """
        rollouts = self.engine.generate(self.prompts, self.sampling, seed=0)
        if before is None and self.c.engine_sleeps:
            self.engine.sleep()  # whether the trainer's programs fit was planned without it
        case = _Case(self, self.prompts, rollouts, variables)
        gap = case.engine - case.trainer
        mean = float(np.abs(gap).mean())
        numbers = {
            "mean": mean, "max": float(np.abs(gap).max()), "correlation": _correlation(case.engine, case.trainer),
            "probs_mean": float(np.abs(np.exp(case.engine) - np.exp(case.trainer)).mean()), "worst": case.worst(),
        }  # fmt: skip
        if mean <= AGREE:
            return Diagnosis(**numbers, trials=[], cause=None)
        trials = sorted(self._trials(case, before), key=lambda trial: trial.left)
        rounding, dtype = self._dtype_trial(case)
        cause = None
        if trials[0].left <= EXPLAINED * mean:
            cause = trials[0].cause
        elif mean <= ROUNDING * rounding:
            cause = "dtype"
        return Diagnosis(**numbers, trials=sorted([*trials, dtype], key=lambda t: t.cause != cause), cause=cause)

    def _trials(self, case: _Case, before: Tree | None) -> Iterator[Trial]:
        temperature, top_k, top_p = self.rule
        if before is not None:
            yield case.trial("weights", "the engine has the weights from before the update", variables=before)
            yield case.head_trial("head", "the engine's output head is from before the update", before)
            yield self._cache_trial(case)
        yield self._temperature_trial(case)
        for k, p in _truncations(top_k, top_p):
            words = (
                "the engine does not truncate"
                if (k, p) == (-1, 1.0)
                else f"the engine truncates with top_k {k}, top_p {p}"
            )
            yield case.trial("truncation", words, rule=(temperature, k, p))
        theirs = self.generation_config
        rule = (
            theirs.get("temperature") or temperature, theirs.get("top_k") or top_k, theirs.get("top_p") or top_p
        )  # fmt: skip
        if rule != self.rule:
            words = "the engine samples with temperature {}, top_k {}, top_p {} of generation_config.json".format(*rule)
            yield case.trial("generation_config", words, rule=rule)
        for words, prompts in self._other_prompts():
            yield case.trial("tokens", words, prompts=prompts)

    def _temperature_trial(self, case: _Case) -> Trial:
        """The temperature that fits best, by golden section on its logarithm around the best of a coarse grid."""
        _, top_k, top_p = self.rule

        def at(log_t: float) -> Trial:
            t = float(np.exp(log_t))
            return case.trial(
                "temperature", f"the engine's logprobs are of temperature {t:.3g}", rule=(t, top_k, top_p)
            )

        grid = np.log(np.array([0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0]))
        tried = [at(x) for x in grid]
        best = int(np.argmin([trial.left for trial in tried]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        ratio = (5**0.5 - 1) / 2
        inner = {x: at(x) for x in (high - ratio * (high - low), low + ratio * (high - low))}
        for _ in range(10):
            left, right = sorted(inner)
            if inner[left].left < inner[right].left:
                high = right
                inner = {left: inner[left], (x := high - ratio * (high - low)): at(x)}
            else:
                low = left
                inner = {right: inner[right], (x := low + ratio * (high - low)): at(x)}
        return min([*tried, *inner.values()], key=lambda trial: trial.left)

    def _other_prompts(self) -> Iterator[tuple[str, list[Prompt]]]:
        """What an engine that is given text, or adds special tokens, may have read instead of our prompts."""
        bos, tokenizer = self.tokenizer.bos_token_id, self.tokenizer
        ours = [prompt.token_ids for prompt in self.prompts]
        variants: dict[str, Any] = {
            "the engine read the prompt's text, tokenised with special tokens": [
                list(tokenizer(prompt.text)["input_ids"]) for prompt in self.prompts  # type: ignore[arg-type]
            ],
            "the engine read the prompt's text, tokenised without special tokens": [
                list(tokenizer(prompt.text, add_special_tokens=False)["input_ids"]) for prompt in self.prompts  # type: ignore[arg-type]
            ],
        }  # fmt: skip
        if bos is not None:
            variants["the engine put one more BOS before the prompt"] = [[bos, *ids] for ids in ours]
            variants["the engine left out the prompt's BOS"] = [ids[1:] if ids[0] == bos else ids for ids in ours]
        variants["the engine left out the prompt's first token"] = [ids[1:] or ids for ids in ours]
        for words, token_ids in variants.items():
            if token_ids != ours and all(token_ids):
                yield words, [dataclasses.replace(p, token_ids=i) for p, i in zip(self.prompts, token_ids, strict=True)]

    def _cache_trial(self, case: _Case) -> Trial:
        """Prompts that begin with a token of which no cache can know: what they leave of the gap is not a cache's."""
        words, first = self.policy.config.vocab_size, [prompt.token_ids[0] for prompt in self.prompts]
        new = next(i for i in range(words // 2, words) if i not in first and i not in self.sampling.stop_ids)
        prompts = [dataclasses.replace(p, token_ids=[new, *p.token_ids[1:]]) for p in self.prompts]
        rollouts = self.engine.generate(prompts, self.sampling, seed=0)
        fresh = _Case(self, prompts, rollouts, case.variables)
        left = float(np.abs(fresh.engine - fresh.trainer).mean())
        return Trial("cache", "prompts that the engine has never seen are answered right", left)

    def _dtype_trial(self, case: _Case) -> tuple[float, Trial]:
        """What another dtype does to the trainer's own logprobs, and what is left of the gap in it."""
        ours = self.policy.config.compute_dtype
        other = "float32" if str(jnp.dtype(ours)) == "bfloat16" else "bfloat16"
        config = dataclasses.replace(self.policy.config, compute_dtype=other)
        theirs = case.logprobs(policy=Policy(self.policy.mesh, config, None, self.policy.loss))
        rounding = float(np.abs(theirs - case.trainer).mean())
        words = f"the engine computes in {other}, which alone moves the trainer's logprobs by {rounding:.1e}"
        return rounding, Trial("dtype", words, float(np.abs(case.engine - theirs).mean()))


class _Case:
    """Responses with their logprobs by the engine and by the trainer, [tokens of all responses]."""

    def __init__(self, doctor: Doctor, prompts: list[Prompt], rollouts: list[Rollout], variables: Tree):
        self.doctor, self.prompts, self.rollouts, self.variables = doctor, prompts, rollouts, variables
        self.engine = np.concatenate([rollout.logprobs for rollout in rollouts])
        self.trainer = self.logprobs()

    def logprobs(
        self, *, variables: Tree = None, prompts: list[Prompt] | None = None, rule: Rule | None = None,
        policy: Policy | None = None,
    ) -> np.ndarray:  # fmt: skip
        """The trainer's, with what is given in place of what should be."""
        c, policy = self.doctor.c, policy or self.doctor.policy
        most = c.data.max_response_length
        sequences = Sequences.of(prompts or self.prompts, self.rollouts, most)
        longest = most + max(c.data.max_prompt_length, *(len(ids) for ids in sequences.prompts))
        row, ways, num = -(-longest // 128) * 128, num_row_shards(policy.mesh), len(self.rollouts)
        layout = pack(
            sequences, range(num), row_length=row, rows_per_micro_batch=ways, ways=ways, share_prompt=c.trainer.share_prompt,
            max_micro_batches=max_micro_batches(num, longest, row, ways),
        )  # fmt: skip
        found = policy.logprobs(self.variables if variables is None else variables, layout, rule or self.doctor.rule)
        return found.sampled[sequences.present]

    def trial(self, cause: str, words: str, **suspicion: Any) -> Trial:
        return Trial(cause, words, float(np.abs(self.engine - self.logprobs(**suspicion)).mean()))

    def head_trial(self, cause: str, words: str, before: Tree) -> Trial:
        policy = self.doctor.policy
        params, old = self.variables["params"], before["params"]
        table = old["embed_tokens"]["embedding"] if policy.config.tie_embeddings else old["lm_head"]["kernel"]
        config = dataclasses.replace(policy.config, tie_embeddings=False)
        variables = {**self.variables, "params": {**params, "lm_head": {"kernel": table}}}
        return self.trial(cause, words, variables=variables, policy=Policy(policy.mesh, config, None, policy.loss))

    def worst(self) -> list[tuple[str, str, float, float]]:
        ids = np.concatenate([rollout.token_ids for rollout in self.rollouts])
        starts = np.repeat(
            np.cumsum([0, *(len(r.token_ids) for r in self.rollouts[:-1])]), [len(r.token_ids) for r in self.rollouts]
        )
        rows = []
        for place in np.argsort(-np.abs(self.engine - self.trainer))[:NUM_WORST]:
            before = ids[max(starts[place], place - 8) : place]
            decode = self.doctor.tokenizer.decode
            words = str(decode(before)), str(decode(ids[place : place + 1]))
            rows.append((*words, float(self.engine[place]), float(self.trainer[place])))
        return rows


def perturbed(trained: Tree, *, share: float = 0.05, seed: int = 0) -> Tree:
    """`trained` with noise of `share` of each array's own size, as an update that nobody can overlook."""

    def one(key, x):
        size = jnp.maximum(jnp.std(x.astype(jnp.float32)), 0.02)  # adapters begin at zero
        return (x + share * size * jax.random.normal(key, x.shape)).astype(x.dtype)

    leaves, structure = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.device_put(one(k, x), x.sharding) for k, x in zip(keys, leaves, strict=True)]
    )


def _truncations(top_k: int, top_p: float) -> list[tuple[int, float]]:
    """What an engine may keep instead of what it is told to."""
    known = [
        (-1, 1.0),
        *((-1, p) for p in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)),
        *((k, 1.0) for k in (1, 5, 10, 20, 40, 50, 100)),
    ]
    return [pair for pair in known if pair != (top_k, top_p)]


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0
