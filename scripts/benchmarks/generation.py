"""Generation: jaxrl's engine against transformers' `generate`."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from functools import partial

import numpy as np

from benchmarks.sides import (
    SEED,
    Call,
    OnJax,
    OnTorch,
    Setup,
    bare_prompt,
    check_equal,
    is_exact,
    load_jaxrl,
    load_torch,
    make_lengths,
    peak_flops,
    print_case,
    print_heading,
    print_memory,
    start_sides,
    take_turns,
)
from jaxrl.batch import Rollout

CASES = ("equal", "ragged")


def run(args: argparse.Namespace, setup: Setup) -> None:
    from jaxrl.models.flops import generate_flops

    with ExitStack() as stack:
        config, device, ours, theirs = start_sides(stack, setup, JaxrlGenerate, TorchGenerate)
        print_heading(args, setup, device)
        rng = np.random.default_rng(SEED)
        prompts = rng.integers(0, config.vocab_size, (args.sequences, args.prompt_tokens))
        T = args.response_tokens
        responses, logprobs = ours(JaxrlGenerate.sample, prompts, T)
        if theirs:
            pair = float(logprobs.mean()), theirs(TorchGenerate.mean_logprob, prompts, responses)
            print(f"mean logprob of what jaxrl drew: {pair[0]:.6f} by its engine, {pair[1]:.6f} by transformers")
            check_equal("mean logprob", *pair, tolerance=1e-3 if is_exact(setup, device) else 5e-2)
        for case in args.cases:
            wanted = make_lengths(rng, len(prompts), T, ragged=case == "ragged")
            stop_ids, lengths = stops_for(responses, wanted)
            runs = {"jaxrl": partial(ours, JaxrlGenerate.generate, prompts, T, stop_ids)}
            if theirs:
                runs["torch"] = partial(theirs, TorchGenerate.generate, prompts, lengths)
            print_case(
                case, take_turns(runs, args.rounds), what="tokens", tolerance=0, num_tokens=int(lengths.sum()),
                flops=generate_flops(config, np.full(len(prompts), args.prompt_tokens), lengths),
                peak=peak_flops(device, setup.dtype),
            )  # fmt: skip
        print_memory(device, ours, theirs)


def stops_for(responses: np.ndarray, wanted: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Stop ids that cut the responses [B, T] close to the lengths wanted [B], and the lengths that they give.

    For each response the first token, from the wanted length on, that occurs in no response before its own wanted
    length. With the same seed the engine draws the same tokens again, so it ends in the same places.
    """
    T = responses.shape[1]
    early = {int(token) for ids, length in zip(responses, wanted, strict=True) for token in ids[: length - 1]}
    stops = set()
    for ids, length in zip(responses, wanted, strict=True):
        if length < T:
            stops.update([int(token) for token in ids[length - 1 :] if int(token) not in early][:1])
    ends = np.isin(responses, list(stops))
    return tuple(sorted(stops)), np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, T)


class JaxrlGenerate(OnJax):
    """jaxrl's engine at temperature 1, with the logprob of every token, as RL needs it."""

    def __init__(self, setup: Setup):
        config, mesh, params = load_jaxrl(setup)
        from jaxrl.rollout.jax_engine import JaxEngine

        self.engine = JaxEngine(config, mesh)
        self.engine.update_weights({"params": params}, 0)

    def sample(self, prompts: np.ndarray, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and logprobs [B, T] of responses that nothing stops."""
        rollouts = self._rollouts(prompts, max_tokens, ())
        return np.stack([r.token_ids for r in rollouts]), np.stack([r.logprobs for r in rollouts])

    def generate(self, prompts: np.ndarray, max_tokens: int, stop_ids: tuple[int, ...]) -> Call:
        start = time.perf_counter()
        rollouts = self._rollouts(prompts, max_tokens, stop_ids)
        return Call(time.perf_counter() - start, sum(len(r.token_ids) for r in rollouts))

    def _rollouts(self, prompts: np.ndarray, max_tokens: int, stop_ids: tuple[int, ...]) -> list[Rollout]:
        from jaxrl.rollout.engine import Sampling

        sampling = Sampling(max_tokens=max_tokens, stop_ids=stop_ids)
        return self.engine.generate([bare_prompt(ids) for ids in prompts.tolist()], sampling, seed=SEED)


class TorchGenerate(OnTorch):
    """transformers' `generate` at temperature 1 with its own cache; each sequence ends at the length it is given."""

    def __init__(self, setup: Setup, device: str):
        import torch
        import transformers

        self.model, self.device_name = load_torch(setup, device), device
        self.model.eval().to(torch.bfloat16 if setup.dtype == "bfloat16" else torch.float32)
        # In place of the model's own, whose stop ids and top-k would be taken where ours say nothing.
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
        )

    def generate(self, prompts: np.ndarray, lengths: np.ndarray) -> Call:
        import torch

        start = time.perf_counter()
        ids = torch.from_numpy(prompts).to(self.device_name)
        ends = torch.from_numpy(prompts.shape[1] + lengths).to(self.device_name)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(lengths.max()),
            stopping_criteria=[lambda drawn, scores: drawn.shape[1] >= ends],
        )  # fmt: skip
        if self.device_name == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return Call(seconds, int(np.minimum(lengths, out.shape[1] - prompts.shape[1]).sum()))

    def mean_logprob(self, prompts: np.ndarray, responses: np.ndarray) -> float:
        import torch

        ids = torch.from_numpy(np.concatenate([prompts, responses], axis=1)).to(self.device_name)
        T = responses.shape[1]
        with torch.inference_mode():
            logits = self.model(input_ids=ids, logits_to_keep=T + 1, use_cache=False).logits[:, :-1].float()
        return -torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -T:].flatten()).item()
