"""Train: python scripts/train.py --config configs/quickstart.yaml [a.b=c ...]"""

import argparse
import sys

from jaxrl.config import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")
    args = parser.parse_args()
    try:
        config = load(args.config, args.overrides)
        from jaxrl.host_memory import keep_freed_memory
        from jaxrl.trainer import Trainer  # JAX starts only once the config holds together

        keep_freed_memory()
        trainer = Trainer(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    trainer.fit()


if __name__ == "__main__":
    main()
