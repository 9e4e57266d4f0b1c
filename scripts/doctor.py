"""Does the engine answer with the trainer's weights and distribution? python scripts/doctor.py --config C [a.b=c ...]

Samples a few prompts as the config says, trains nothing, and compares logprobs token by token: once with the weights as
loaded, once after an update that nobody can overlook. Where engine and trainer differ, it names the cause. The exit code
is 0 where they agree.
"""

import argparse
import shutil
import sys
import tempfile

from jaxrl import config
from jaxrl.rollout.engine import EngineLost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")
    args = parser.parse_args()
    folder, named = tempfile.mkdtemp(prefix="jaxrl-doctor-"), False
    try:
        overrides = [f"trainer.run_dir={folder}/run", "rollout.max_probs_diff=null"]
        overrides += ["trainer.resume_mode=disable", "trainer.resume_from_path=null"]
        overrides.append("rollout.free_cache_engine=false")  # it computes while the engine is awake
        c = config.load(args.config, [*args.overrides, *overrides])
        from jaxrl.trainer import Trainer  # JAX starts only once the config holds together

        agree = examine(Trainer(c, trains=False))
    except (ValueError, EngineLost) as error:
        named = folder in str(error)  # the log of a server, which is then left for who reads this
        sys.exit(f"error: {error}")
    finally:
        if not named:
            shutil.rmtree(folder)
    sys.exit(0 if agree else 1)


def examine(trainer) -> bool:
    from jaxrl.doctor import perturbed
    from jaxrl.update import merge

    roles, engine = trainer.roles, trainer.engine
    try:
        doctor, before = trainer.doctor(), roles.actor_variables()
        engine.update_weights(before, 0)
        as_loaded = doctor.examine(before)
        print(f"\nWith the weights as loaded\n{as_loaded}")
        after = merge(perturbed(roles.actor.trained), roles.actor_frozen)
        engine.update_weights(after, 1)
        updated = doctor.examine(after, before=before)
        print(f"\nAfter an update\n{updated}")
    finally:
        engine.close()
        trainer.scorer.close()
    return not as_loaded.trials and not updated.trials


if __name__ == "__main__":
    main()
