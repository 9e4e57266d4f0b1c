"""Train: python scripts/train.py --config configs/quickstart.yaml [a.b=c ...]

One process a host on several hosts (scripts/launch/ starts them): each finds its place from SLURM, Kubernetes or a TPU
slice on GKE, or is told it by --coordinator, --num-processes and --process-id.
"""

import argparse
import logging
import sys

from jaxrl import cluster, config, gpu_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; tpu: ask the Cloud TPU VM")
    parser.add_argument("--num-processes", type=int, metavar="N")
    parser.add_argument("--process-id", type=int, metavar="I", help="from 0 to N - 1")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")
    args = parser.parse_args()
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s", handlers=[console])
    try:
        c = config.load(args.config, args.overrides)
        place = cluster.find(args.coordinator, args.num_processes, args.process_id)
        if place is not None and place.process_id > 0:
            console.setLevel(logging.ERROR)  # the first says it for all; each has its log file
        gpu_memory.prepare_environment(c)
        from jaxrl import distributed  # JAX starts only once the config holds together

        link = distributed.start(place, c)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with link:
        import jax

        from jaxrl.host_memory import keep_freed_memory
        from jaxrl.rewards import RewardError
        from jaxrl.rollout.engine import EngineLost
        from jaxrl.trainer import Trainer

        if jax.default_backend() == "cpu":
            keep_freed_memory()
        try:
            trainer = Trainer(c, link)
        except (ValueError, EngineLost) as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            sys.exit(f"error: {type(error).__name__}: {error}")
        try:
            trainer.fit()
        except (ValueError, OSError, RewardError, EngineLost) as error:
            log = trainer.folder / "logs" / f"process_{link.process_id}.log"
            kind = f"{type(error).__name__}: " if isinstance(error, OSError) else ""
            sys.exit(f"error: {kind}{error}" + (f" ({log} holds the traceback)" if log.exists() else ""))


if __name__ == "__main__":
    main()
