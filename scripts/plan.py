"""Plan: python scripts/plan.py --config configs/quickstart.yaml --topology h100:2x8 [--sweep] [--json] [a.b=c ...]

Compiles every program of the run for a topology that need not be here, with shapes only, and prints memory, work and
traffic a device. `pip install -e '.[plan-gpu]'` or `'.[plan-tpu]'` brings the compiler; no accelerator is needed.
"""

import argparse
import json
import math
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument(
        "--topology",
        required=True,
        help="h100:2x8 (nodes x devices), a100:1x8, v5e:4x4, v5e:2:4x4 (slices:chips), cpu:8",
    )
    parser.add_argument("--sweep", action="store_true", help="try meshes, remat and micro-batches; propose what fits")
    parser.add_argument("--programs", help="compile these alone, for example update_actor,gen/decode")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")
    args = parser.parse_intermixed_args()
    # What is compiled for is described, not looked for: JAX itself starts on the CPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sizes = args.topology.removeprefix("cpu:").split("x")
    if all(size.isdigit() for size in sizes):  # else it is no topology of CPUs, or none at all
        flags, number = os.environ.get("XLA_FLAGS", ""), math.prod(map(int, sizes))
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={number}"
    try:
        from jaxrl.config import load

        config = load(args.config, args.overrides)
        from jaxrl.plan.report import make_plan, table
        from jaxrl.plan.sweep import sweep, sweep_table
        from jaxrl.topology import described

        topology = described(args.topology)
        if args.sweep:
            found = sweep(config, topology, say=lambda line: print(line, file=sys.stderr))
            print(json.dumps([choice.to_dict() for choice in found], indent=2) if args.json else sweep_table(found))
        else:
            plan = make_plan(config, topology, only=args.programs.split(",") if args.programs else None)
            print(json.dumps(plan.to_dict(), indent=2) if args.json else table(plan))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
