"""The policy update: jaxrl's on packed rows against plain transformers and torch AdamW on a padded batch."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.sides import (
    SEED,
    Call,
    OnJax,
    OnTorch,
    Setup,
    bare_prompt,
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
from jaxrl.batch import PolicyTargets, Rollout
from jaxrl.packing import Sequences, max_micro_batches, pack

LR, CLIP, MAX_GRAD_NORM, WEIGHT_DECAY = 1e-6, 0.2, 1.0, 0.01
CASES: dict[str, dict[str, Any]] = {
    "equal": {"ragged": False, "group_size": 1},
    "ragged": {"ragged": True, "group_size": 1},
    "grouped": {"ragged": True, "group_size": 4},  # as in GRPO: jaxrl lays a prompt down once for all its responses
}


@dataclass(frozen=True)
class Batch:
    """One mini-batch: sequences and, as [B, T], what the loss compares them with."""

    sequences: Sequences
    old_logprobs: np.ndarray
    advantages: np.ndarray


def run(args: argparse.Namespace, setup: Setup) -> None:
    from jaxrl.models.flops import update_flops

    with ExitStack() as stack:
        config, device, ours, theirs = start_sides(stack, setup, JaxrlUpdate, TorchUpdate)
        print_heading(args, setup, device)
        for case in args.cases:
            rng = np.random.default_rng(SEED)
            sequences = make_sequences(
                rng, config.vocab_size, args.sequences, args.prompt_tokens, args.response_tokens, **CASES[case]
            )
            # Near the policy's own, as in training. Made-up ones give ratios near 0, whose gradients are denormal
            # numbers: those take torch several times as long.
            noise, advantages = rng.normal(size=(2, *sequences.tokens.shape)).astype(np.float32)
            batch = Batch(sequences, ours(JaxrlUpdate.logprobs, sequences) + 0.1 * noise, advantages)
            runs = {side.name: partial(side, side.kind.step, batch) for side in (ours, theirs) if side}
            prompt_lengths = np.array([len(sequences.prompts[p]) for p in sequences.group])
            print_case(
                case, take_turns(runs, args.rounds), what="loss", tolerance=1e-4 if is_exact(setup, device) else 2e-2,
                num_tokens=int(prompt_lengths.sum() + sequences.lengths.sum()),
                flops=update_flops(config, prompt_lengths, sequences.lengths), peak=peak_flops(device, setup.dtype),
            )  # fmt: skip
        print_memory(device, ours, theirs)


def make_sequences(
    rng: np.random.Generator, vocab_size: int, num: int, longest_prompt: int, longest_response: int,
    *, ragged: bool, group_size: int,
) -> Sequences:  # fmt: skip
    """Random token ids. `group_size` responses share a prompt; 1: each has its own."""
    prompts = [
        rng.integers(0, vocab_size, length).tolist()
        for length in make_lengths(rng, -(-num // group_size), longest_prompt, ragged=ragged)
    ]
    responses = [
        rng.integers(0, vocab_size, length).astype(np.int32)
        for length in make_lengths(rng, num, longest_response, ragged=ragged)
    ]
    rollouts = [
        Rollout(b // group_size, ids, np.zeros(len(ids), np.float32), True, 0) for b, ids in enumerate(responses)
    ]
    return Sequences.of([bare_prompt(ids) for ids in prompts], rollouts, longest_response)


class JaxrlUpdate(OnJax):
    """jaxrl's actor: `Policy.step` on packed rows. The time includes packing."""

    def __init__(self, setup: Setup):
        config, mesh, params = load_jaxrl(setup)
        from jaxrl.config import Optim
        from jaxrl.roles import new_train_state, optimizer_of
        from jaxrl.update import Policy, PolicyLoss

        self.setup = setup
        optimizer = optimizer_of(Optim(weight_decay=WEIGHT_DECAY, clip_grad=MAX_GRAD_NORM))
        self.policy = Policy(mesh, config, optimizer, PolicyLoss(clip_low=CLIP, clip_high=CLIP))
        self.state = new_train_state(mesh, optimizer, {"params": params})

    def logprobs(self, sequences: Sequences) -> np.ndarray:
        return self.policy.logprobs(self.state.trained, self._pack(sequences))[0]

    def step(self, batch: Batch) -> Call:
        import jax

        start = time.perf_counter()
        layout = self._pack(batch.sequences)
        mask = batch.sequences.mask
        ones = np.ones(mask.shape, np.float32)
        columns = PolicyTargets(batch.old_logprobs, batch.advantages, 0 * ones, ones, *2 * (ones / mask.sum(),))
        targets = PolicyTargets(*map(layout.to_slots, columns))
        self.state, out = self.policy.step(self.state, {}, layout, targets, LR)
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - start
        return Call(seconds, float(out["losses"]["pg_loss"]))

    def _pack(self, sequences: Sequences):
        """As the trainer packs: shapes follow from the longest that there may be, so that all cases share a program."""
        num = len(sequences.group)
        longest = max(map(len, sequences.prompts)) + sequences.tokens.shape[1]
        rows = min(
            max(1, self.setup.micro_batch_tokens // self.setup.row_length),
            max_micro_batches(num, longest, self.setup.row_length, 1),
        )
        return pack(
            sequences, range(num), row_length=self.setup.row_length, rows_per_micro_batch=rows,
            max_micro_batches=max_micro_batches(num, longest, self.setup.row_length, rows),
        )  # fmt: skip


class TorchUpdate(OnTorch):
    """Plain transformers and torch: one padded batch, SDPA, fused AdamW, logits of the response slots alone."""

    def __init__(self, setup: Setup, device: str):
        import torch

        self.model, self.device_name = load_torch(setup, device), device
        self.model.train()
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=setup.dtype == "bfloat16")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def step(self, batch: Batch) -> Call:
        import torch

        start = time.perf_counter()
        tokens, columns = padded(batch.sequences)

        def put(x: np.ndarray) -> Any:
            return torch.from_numpy(x).to(self.device_name)

        mask, targets = put(batch.sequences.mask), put(batch.sequences.tokens.astype(np.int64))
        old_logprobs, advantages = put(batch.old_logprobs), put(batch.advantages)
        with self.autocast:
            # Padding stands on the right, where causal attention never looks: no mask, and so SDPA's fastest kernel.
            hidden = self.model.model(input_ids=put(tokens), use_cache=False).last_hidden_state
            rows = torch.arange(len(tokens), device=self.device_name)[:, None]
            logits = self.model.lm_head(hidden[rows, put(columns)])
        cross_entropy = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        ratio = torch.exp(-cross_entropy.view(mask.shape) - old_logprobs)
        clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
        token_loss = torch.maximum(-advantages * ratio, -advantages * clipped)
        loss = torch.where(mask, token_loss, 0.0).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        result = loss.item()
        if self.device_name == "cuda":
            torch.cuda.synchronize()
        return Call(time.perf_counter() - start, result)


def padded(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, longest], zeros on the right, and the column [B, T] that predicts each response token."""
    starts = np.array([len(sequences.prompts[p]) for p in sequences.group])
    width = int((starts + sequences.lengths).max())
    tokens = np.zeros((len(starts), width), np.int64)
    for row, p, start, response, length in zip(
        tokens, sequences.group, starts, sequences.tokens, sequences.lengths, strict=True
    ):
        row[:start] = sequences.prompts[p]
        row[start : start + length] = response[:length]
    columns = starts[:, None] - 1 + np.arange(sequences.tokens.shape[1])
    return tokens, np.minimum(columns, width - 1)
