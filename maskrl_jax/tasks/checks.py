"""What tuning stages refuse: settings that do not go together, and a base of another tokenizer."""

from typing import Any

import jax

from maskrl_jax import stored
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


def same_data(config: Any) -> None:
    """Raise UserError where a tuning stage would prompt its base with other data than it was trained on."""
    if config.data.to_dict() != config.parents.maskgit.data.to_dict():
        raise UserError(
            f"data of {config.task} and of its base differ; change both, as in --config.parents.maskgit.data"
        )


def same_tokenizer(ours: Any, theirs: Any) -> None:
    """Raise UserError where the base was trained on the codes of another tokenizer: its images would be noise."""
    ours, theirs = stored.plain(ours), stored.plain(theirs)  # configs differ by being locked, too
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
