"""Convert a model: python scripts/convert_checkpoint.py SOURCE OUT [--to hf|orbax|peft] [--merge-lora] [--verify] ...

SOURCE is a folder, a file or an id on the Hugging Face Hub: safetensors, PyTorch .bin, HF Flax msgpack, GGUF,
bitsandbytes 4-bit, a PEFT adapter, or an orbax checkpoint of this project. The kind is found from the content.
"""

import argparse
import logging
import math
import os
import re
import sys
from contextlib import contextmanager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder, a file, or an id on the Hugging Face Hub")
    parser.add_argument("out", nargs="?", help="a folder that does not exist yet")
    parser.add_argument("--to", default="hf", choices=["hf", "orbax", "peft"], help="what to write (default: hf)")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="of all tensors (default: their own)"
    )
    parser.add_argument("--merge-lora", action="store_true", help="add an adapter to its base")
    parser.add_argument("--dequantize", action="store_true", help="write 4-bit weights as numbers")
    parser.add_argument("--base", help="the model that an adapter adapts, instead of the one that it names")
    parser.add_argument("--head", choices=["lm", "score"], help="which head, where a checkpoint holds both")
    parser.add_argument("--head-path", help="the module of a head that is under none of the usual names")
    parser.add_argument("--role", default="actor", choices=["actor", "critic"], help="of the checkpoint of a run")
    parser.add_argument(
        "--mesh", default="1x1x1", metavar="DxFxT", help="how an orbax checkpoint is cut: data x fsdp x tensor"
    )
    parser.add_argument("--max-shard-size", type=float, default=5e9, metavar="BYTES", help="of a safetensors file")
    parser.add_argument(
        "--verify", action="store_true", help="read the result again and compare; logits too, with torch"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the map of all names and write nothing")
    args = parser.parse_args()
    if args.out is None and not args.dry_run:
        parser.error("OUT is missing: name the folder to write")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("jaxrl").setLevel(logging.INFO)
    mesh = re.fullmatch(r"([1-9]\d*)[x,]([1-9]\d*)[x,]([1-9]\d*)", args.mesh)
    if mesh is None:
        sys.exit(f"error: --mesh {args.mesh!r} is not data x fsdp x tensor, such as 1x8x1")
    if not args.max_shard_size > 0:
        sys.exit(f"error: --max-shard-size {args.max_shard_size:g} must be above 0, in bytes")
    data, fsdp, tensor = (int(size) for size in mesh.groups())
    # A conversion needs no accelerator; the devices of the mesh are parts of this host.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flag = f"--xla_force_host_platform_device_count={math.prod((data, fsdp, tensor))}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    from jaxrl.weights.convert import convert, name_map
    from jaxrl.weights.source import Options

    options = Options(
        merge_lora=args.merge_lora, dequantize=args.dequantize, head=args.head, head_path=args.head_path,
        role=args.role, base=args.base,
    )  # fmt: skip
    try:
        if args.dry_run:
            for line in name_map(args.source, to=args.to, options=options, dtype=args.dtype):
                print(line)
            return
        assert args.out is not None  # the parser has looked
        with progress_bar() as progress:
            convert(
                args.source, args.out, to=args.to, options=options, dtype=args.dtype, mesh=(data, fsdp, tensor),
                verify=args.verify, max_shard_bytes=args.max_shard_size, progress=progress,
            )  # fmt: skip
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out} is complete{' and verified' if args.verify else ''}")


@contextmanager
def progress_bar():
    """A function (name, bytes done, bytes in all) that draws how far a conversion is."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, completed=done, total=total, description=name)


if __name__ == "__main__":
    main()
