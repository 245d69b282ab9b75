"""Stage `mask_grpo`: group-relative policy optimisation of every sampling step (Mask-GRPO, arXiv 2510.13418).

The baseline of MaskFocus, without the defects of the released trainer (specs/speed_rl.md section 8): a float
threshold, a reference that is not the policy itself, the sample filter, gradients all-reduced, ratios of tokens
instead of joint ones. With one update of a rollout the ratio is 1 and the clip idle, as published; `inner_updates`
above 1 uses both. Its maths is Speed-RL's with a fixed number of calls.
"""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import gain
from maskrl_jax.evaluate.bench import read_sampler
from maskrl_jax.evaluate.studio import Studio
from maskrl_jax.phase import Phase
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks import checks, generators, maskfocus, speed_rl
from maskrl_jax.tasks.rollouts import Rollouts
from maskrl_jax.tasks.showcase import Showcase
from maskrl_jax.tasks.task import Context, Task

REDUCTIONS = ("none", "first", "last")
LIKELIHOODS = {
    "transition": "Likelihood `transition` is exact for every noise; our choice.",
    "hard": "Likelihood `hard` is the published one (eq. 14); it is biased where noise decides what is committed.",
    "kept": "Likelihood `kept` (eq. 15) is biased to lower entropy.",
    "all": "Likelihood `all` (eq. 13) is exact and very noisy.",
}


def speed_config(config: Any) -> ConfigDict:
    """The same stage in the terms of `speed_rl`: policy `fixed`, no speed reward, no gate."""
    rollout, loss = config.rollout, config.loss
    gain.Goal(**config.aim)  # refused here rather than when training is over
    if loss.reduction not in REDUCTIONS:
        raise UserError(f"loss.reduction {loss.reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if loss.reduction != "none" and not 1 <= loss.reduced_calls <= rollout.num_steps:
        raise UserError(f"loss.reduced_calls {loss.reduced_calls} must lie in 1..{rollout.num_steps}, the rollout's")
    own = ConfigDict({name: config[name] for name in config if name not in ("rollout", "loss", "filter", "aim")})
    own.policy = {
        "kind": "fixed",
        "target_calls": rollout.num_steps,
        "max_calls": rollout.num_steps,
        "ticks": rollout.num_steps,
        "divisors": (rollout.num_steps, 1),
        **{name: rollout[name] for name in ("noise", "noise_schedule", "temperature", "guidance")},
        "timesteps": rollout.get("timesteps", "clock"),  # runs of before there was the choice lack it
    }
    own.credit = {"min_calls": 1, "speed": "off", "gate": "off", "low_quality": "off", **config.filter}
    own.loss = {
        "tokens": {name: loss[name] for name in ("likelihood", "distribution", "kl", "clip_low", "clip_high", "chunk")},
        "kl_coefficient": loss.kl_coefficient,
        "first_call_tokens": 1.0,
        "first_call_kl": 1.0,
        "head_entropy": (0.0, 0.0),
        "per_rollout_mean": False,  # the number of calls is given
        "scored_calls": scored_calls(loss.reduction, loss.reduced_calls, rollout.num_steps),
    }
    own.reference_samples = 1
    return own


def scored_calls(reduction: str, reduced_calls: int, num_steps: int) -> tuple[int, int]:
    """Calls that the loss reads: all, or the first or last few ("computational reduction", published)."""
    if reduction == "none":
        return 0, num_steps
    return (0, reduced_calls) if reduction == "first" else (num_steps - reduced_calls, num_steps)


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    return speed_rl.phases(speed_config(config), parallel)


def studio(context: Context, params: Any) -> Studio:
    """The tuned model as a user samples from it: with the base's own best sampler."""
    return maskfocus.studio(context, params["model"])


def build(context: Context) -> Task:
    """Wire the stage: roll out, score and filter on the host, update on every step."""
    config, parallel = context.config, context.parallel
    train = generators.dataset_of(context, "train")
    wiring = speed_rl.Wiring(speed_config(config), train.conditioning)
    checks.same_codes({name: parent.workdir for name, parent in context.parents.items()})
    base = context.parents["maskgit"]
    engine = generators.engine_of(context, wiring.base.sizes, wiring.base.null)
    frozen = wiring.base.frozen(engine, context)
    rollouts = Rollouts(context, wiring, train, frozen, np.zeros(len(train.pool(held_out=False)), np.float32))
    rollout, loss = config.rollout, config.loss
    sampler = read_sampler(base.workdir, SamplerConfig(**base.config.sampler))
    show = Showcase(
        context,
        wiring.base,
        engine,
        sampler,
        frozen["reference"],
        title=f"Mask-GRPO on {config.data.name}: likelihood {loss.likelihood}",
        facts={
            "rollouts": f"{rollout.num_steps} steps, guidance {rollout.guidance:g}, Gumbel {rollout.noise:g} "
            f"({rollout.noise_schedule}), temperature {rollout.temperature:g}",
            "optimised": f"{config.inner_updates} updates of a rollout, reduction {loss.reduction}, calls "
            f"{wiring.speed.scored_calls}, KL {loss.kl_coefficient:g}",
        },
        notes=(
            "The published results are of Show-o with CLIP as reward; no parity is claimed.",
            LIKELIHOODS[loss.likelihood],
            *checks.timesteps_notes(wiring.policy.timesteps, sampler.timesteps),
        ),
        model_of=lambda params: params["model"],
    )
    return Task(
        init=lambda key: parallel.init(wiring.init, key, base.params),
        batch=rollouts.batch,
        step=speed_rl.stepper(dataclasses.replace(context, config=wiring.config), wiring, rollouts, frozen),
        evaluate=show.evaluate,
        report=show.report,
    )
