"""Measure a finished run again, into a folder of its own: `python -m maskrl_jax.evaluate --workdir=<dir>`."""

import dataclasses
import os

from absl import flags

from maskrl_jax import command
from maskrl_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "finished run of a stage that makes images", required=True)
PROMPTS = flags.DEFINE_integer("prompts", None, "held-out prompts", lower_bound=2)
GROUP = flags.DEFINE_integer("group", None, "samples of each prompt", lower_bound=1)
SEED = flags.DEFINE_integer("seed", None, "seed of prompts and noise", lower_bound=0, upper_bound=2**31 - 1)
STEPS = flags.DEFINE_list("steps", None, "steps of the base's curve, rising; the last is the reference")
OUT = flags.DEFINE_string("out", None, "new folder for the report; by default the next <workdir>/evaluations/<number>")
BUDGETS = flags.DEFINE_list("budgets", None, "numbers of full steps of a shortcut's curve, rising")
DIALS = flags.DEFINE_list("dials", None, "speed dials of the tuned curve")


def main() -> None:
    """Evaluate as the flags say."""
    from maskrl_jax import runner, stored
    from maskrl_jax.evaluate.bench import Evaluation
    from maskrl_jax.tasks.shortcut_systems import Curve

    overrides = {flag.name: flag.value for flag in (PROMPTS, GROUP, SEED) if flag.value is not None}
    overrides |= {
        flag.name: _numbers(flag, kind) for flag, kind in ((STEPS, int), (DIALS, float)) if flag.value is not None
    }
    context, params = runner.open_workdir(WORKDIR.value)
    if "evaluation" not in context.config:
        raise UserError(f"{WORKDIR.value} holds a {context.config.task!r} stage, which makes no images")
    if DIALS.value is not None and "dials" not in context.config.evaluation:
        raise UserError(f"--dials is for a tuned policy, and {WORKDIR.value} holds a {context.config.task!r} stage")
    if BUDGETS.value is not None:
        if context.config.task != "shortcut":
            raise UserError(f"--budgets is for a shortcut, and {WORKDIR.value} holds a {context.config.task!r} stage")
        context.config.curve.budgets = _numbers(BUDGETS, int)
        Curve(**context.config.curve)
    if not stored.is_finished(WORKDIR.value):
        raise UserError(f"{WORKDIR.value} is not trained to its end; run its training command again")
    context.config.evaluation.update(overrides)
    Evaluation(**context.config.evaluation)  # refused before there is a folder
    if OUT.value and os.path.exists(OUT.value):
        raise UserError(f"--out {OUT.value} exists already; name a new folder")
    out = OUT.value or stored.new_evaluation(WORKDIR.value)
    runner.build(dataclasses.replace(context, out=out)).report(params)


def _numbers(flag, kind):
    try:
        return tuple(kind(number) for number in flag.value)
    except ValueError:
        raise UserError(f"--{flag.name}={','.join(flag.value)} must be numbers, such as 4,8,16") from None


if __name__ == "__main__":
    command.run(main, mistakes=(ValueError,))
