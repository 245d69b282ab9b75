"""What tuning stages refuse: settings that do not go together, and a base of another tokenizer."""

from typing import Any

import jax

from maskrl_jax import stored
from maskrl_jax.data import settings
from maskrl_jax.errors import UserError
from maskrl_jax.rl.credit import CreditConfig
from maskrl_jax.rl.policy import Policy
from maskrl_jax.rl.token_terms import TokenLoss


def speed(config: Any, policy: Policy, credit: CreditConfig, tokens: TokenLoss) -> None:
    """Raise UserError for settings that do not go together."""
    for name in ("micro_batch", "inner_updates", "reference_samples"):
        if config[name] < 1:
            raise UserError(f"{name} {config[name]} must be at least 1")
    if len(config.loss.head_entropy) != 2:
        raise UserError("loss.head_entropy needs two numbers, its weight at the start and at the end of the run")
    if config.credit.down_sample > config.group:
        raise UserError(
            f"credit.down_sample {config.credit.down_sample} exceeds the {config.group} rollouts of a group; "
            "lower it, or 0 for all"
        )
    if credit.reads_reference and config.get("reward_scale", "raw") != "raw":
        raise UserError(
            "gate, low_quality and the dual rule compare qualities with the base's: reward_scale must be raw"
        )
    if credit.reads_reference and config.get("service", {"url": ""})["url"]:
        raise UserError(
            "gate, low_quality and the dual rule compare qualities with the base's, for which a service is not asked; "
            "set credit.gate=off and credit.low_quality=off, and credit.speed to schedule or off"
        )
    groups = config.batch_size // config.group
    if groups > config.credit.history:
        raise UserError(f"credit.history {config.credit.history} does not hold the {groups} groups of an update")
    if policy.kind == "budget" and credit.gate == "off" and credit.speed != "off":
        raise UserError(
            "policy budget learns whatever is made in few calls unless a gate asks for quality; set credit.gate=hard"
        )
    if policy.kind == "budget" and tokens.kl == "k3":
        raise UserError("kl k3 needs tokens that the policy drew, budget scores others; set loss.tokens.kl=forward")
    if tokens.kl == "k3" and (policy.temperature != 1 or policy.guidance != 1):
        raise UserError(
            "kl k3 is unbiased only for tokens drawn from the model's own law; set loss.tokens.kl=forward, or "
            "policy.temperature=1 and policy.guidance=1"
        )
    if policy.kind == "budget" and config.group % len(policy.step_set):
        raise UserError(
            f"group {config.group} is not divisible by the {len(policy.step_set)} step counts of "
            "policy.step_set; every group holds each of them equally often"
        )


def groups(batch_size: int, group: int) -> int:
    """Prompts of an update; UserError where rollouts do not fill whole groups."""
    if group < 2 or batch_size % group:
        raise UserError(
            f"batch_size {batch_size} rollouts do not fill groups of {group}; make it a multiple of group (at least 2)"
        )
    if batch_size % (group * jax.process_count()):
        raise UserError(
            f"batch_size {batch_size} does not give each of {jax.process_count()} processes whole groups of {group}; "
            f"make it a multiple of {group * jax.process_count()}"
        )
    return batch_size // group


def whole_groups(batch_size: int, group: int, parallel: Any) -> None:
    """Raise UserError where a device would see a part of a group, whose samples belong together."""
    if batch_size % (group * parallel.num_devices):
        raise UserError(
            f"batch_size {batch_size} does not give each of {parallel.num_devices} devices whole groups of "
            f"{group}; make it a multiple of {group * parallel.num_devices}"
        )


def parts(config: Any) -> int | None:
    """Rollouts that a device samples at a time, None for all; stages of before there was such a key lack it."""
    rows = config.get("rollout_rows", 0)
    if rows < 0:
        raise UserError(f"rollout_rows {rows} must be at least 0; 0: all at once")
    return rows or None


def kept_exactly(config: Any) -> None:
    """Raise UserError where a generator that is to be trained is kept in less than float32: small steps would vanish."""
    weights = config.model.get("weights", "float32")
    if weights != "float32":
        raise UserError(f"model.weights={weights} of {config.task} is for sampling; set float32 to train or tune it")


def timesteps_notes(rollouts: str, sampler: str) -> tuple[str, ...]:
    """What a report must say where rollouts and the base's sampler tell timesteps by two conventions."""
    if rollouts == sampler:
        return ()
    return (
        f"Rollouts tell the network its timesteps by `{rollouts}`, the base's sampler by `{sampler}`: a network that "
        "reads them (Meissonic; others read none) is trained and measured under two conventions.",
    )


def same_data(config: Any) -> None:
    """Raise UserError where a tuning stage would prompt its base with other data than it was trained on."""
    data, base_data = stored.data_of(config), stored.data_of(config.parents.maskgit)
    own, base = settings.filled(data), settings.filled(base_data)
    if settings.settings_of(data).is_prompts and settings.settings_of(base_data).is_prompts:
        # Which prompts a policy is asked for is its own affair; how they become tokens is not.
        own, base = ({key: x for key, x in one.items() if key not in ("name", "tokenizer")} for one in (own, base))
    for key in sorted(own.keys() | base.keys()):
        if own.get(key) != base.get(key):
            anew = f", or train the base anew with --config.parents.maskgit.data.{key}"
            raise UserError(
                f"data.{key} of {config.task} is {own.get(key)!r}, its base was trained with {base.get(key)!r}; "
                f"set --config.data.{key} to that{'' if config.init.get('maskgit', '') else anew}"
            )


def judge_reads(config: Any, kind: str) -> None:
    """Raise UserError, before it is trained, where a judge cannot read what a generator of this kind is asked for."""
    if "judge" not in config.parents or config.init.get("judge", "") or config.parents.judge.model.kind == "clip":
        return
    wanted, tokens = "class" if kind == "class" else "cells", settings.filled(config.data)["tokens"]
    if config.parents.judge.model.kind != wanted or tokens:
        can = "classes" if config.parents.judge.model.kind == "class" else "the captions of shapes"
        raise UserError(
            f"parents.judge reads {can}, and nothing else, but data.name is {config.data.name}"
            + (f" with data.tokens={tokens}" if tokens else "")
        )


def same_tokenizer(ours: Any, theirs: Any) -> None:
    """Raise UserError where the base was trained on the codes of another tokenizer: its images would be noise."""
    # Configs differ by being locked, too.
    ours, theirs = (stored.plain(one) | {"data": stored.data_of(one)} for one in (ours, theirs))
    for key in ("seed", "num_steps", "batch_size", "data", "model", "optimizer"):
        if ours[key] != theirs[key]:
            raise UserError(
                f"the tokenizer is not the one that the base was trained with (another {key}); "
                "point init.tokenizer to that one"
            )


def same_codes(workdirs: dict[str, str], base: str = "maskgit") -> None:
    """Raise UserError where the base was trained on codes of other parameters than the tokenizer at hand has."""
    places = stored.read_places(workdirs[base])
    if places is None:
        return
    ours, theirs = (stored.trained_id(path) for path in (workdirs["tokenizer"], places[0]["tokenizer"]))
    if ours and theirs and ours != theirs:
        raise UserError(
            f"the tokenizer in {workdirs['tokenizer']} is not the one that the base was trained with; "
            f"set init.tokenizer={places[0]['tokenizer']}"
        )


def same_base(tuned: str, base: str, name: str = "maskgit") -> None:
    """Raise UserError where the network in a workdir was tuned on another base than that in the other workdir.

    Its network would not fit, or be compared with a base that it does not come from.
    """
    places = stored.read_places(tuned)
    if places is None:
        return
    ours, theirs = (stored.trained_id(path) for path in (base, places[0][name]))
    if ours and theirs and ours != theirs:
        raise UserError(
            f"the network in {tuned} was tuned on another base than {base}; set init.{name}={places[0][name]} and "
            f"init.tokenizer={places[0]['tokenizer']}"
        )
