"""Plan: python scripts/plan.py --config configs/quickstart.yaml --topology h100:2x8 [--sweep] [--json] [a.b=c ...]

Compiles every program of the run for a topology that need not be here, with shapes only, and prints memory, work and
traffic a device. `pip install -e '.[plan-gpu]'` or `'.[plan-tpu]'` brings the compiler; no accelerator is needed.
"""

import argparse
import json
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--topology", required=True, help="h100:2x8 (nodes x devices), a100:1x8, v5e:4x4, cpu:8 ...")
    parser.add_argument(
        "--sweep", action="store_true", help="try other meshes, remat and micro-batches; propose what fits"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")
    args = parser.parse_args()
    if args.topology.startswith("cpu:"):
        number = args.topology.removeprefix("cpu:")
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={number}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is compiled for is described, not looked for
    try:
        import jax

        from jaxrl.config import load

        config = load(args.config, args.overrides)
        from jaxrl.plan.report import make_plan, table
        from jaxrl.topology import described

        topology = described(args.topology)
        if (
            topology.hardware.platform != "cpu"
        ):  # what is compiled for absent devices cannot be read back from the cache
            jax.config.update("jax_enable_compilation_cache", False)
        if args.sweep:
            from jaxrl.plan.sweep import sweep, sweep_table

            found = sweep(config, topology)
            print(json.dumps([f.to_dict() for f in found], indent=2) if args.json else sweep_table(found))
        else:
            plan = make_plan(config, topology)
            print(json.dumps(plan.to_dict(), indent=2) if args.json else table(plan))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
