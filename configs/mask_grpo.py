"""Mask-GRPO, the baseline of MaskFocus: every sampling step is optimised (arXiv 2510.13418).

python -m maskrl_jax.main --config=configs/mask_grpo.py           # embedded task, the base of maskfocus.py
python -m maskrl_jax.main --config=configs/mask_grpo.py:smoke     # a few updates of everything: does it run?
python -m maskrl_jax.main --config=configs/mask_grpo.py:meissonic --dry_run=v5e:4x4   # published scale, compile only

specs/speed_rl.md section 8 says which numbers are published; those of the embedded task are our choice.
"""

from configs import maskfocus, sizes

STEPS = {"": 60, "smoke": 3, "meissonic": 1200}


def get_config(arg: str = ""):
    """Sizes: default, `smoke`; `meissonic` holds the published-scale settings."""
    sizes.check(arg, tuple(STEPS))
    return published_scale() if arg == "meissonic" else embedded(arg)


def embedded(arg: str):
    """The embedded task: the base, rewards and measures of maskfocus.py."""
    other = maskfocus.embedded(arg)
    keys = (
        "batch_size",
        "group",
        "micro_batch",
        "rollout_rows",
        "log_every",
        "save_every",
        "parents",
        "init",
        "data",
        "model",
    )
    keys += ("rewards", "rewards_heldout", "reward_scale", "energy_distance", "energy_distance_scope", "alarm")
    keys += ("service", "optimizer", "aim", "evaluation")
    return sizes.run(
        "mask_grpo",
        "configs/mask_grpo.py" + (f":{arg}" if arg else ""),
        **{name: other[name] for name in keys},
        num_steps=STEPS[arg],
        inner_updates=1,
        rollout={
            "num_steps": other.rollout.num_steps,
            "noise": other.rollout.noise,
            "noise_schedule": "linear",  # "compounded": the released sampler's
            "guidance": 1.0,  # as published: trained without, measured with
            "temperature": 1.0,
            "timesteps": "clock",  # or countdown, mask_ratio, const
        },
        filter={"percentile": 10.0, "history": 1000, "history_min": 64, "down_sample": 0},
        resample={"rounds": 1, "groups": 1},
        loss={
            "likelihood": "transition",  # published: hard, which its noise makes biased
            "distribution": "guided_sg",
            "kl": "forward",
            "kl_coefficient": 0.01,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "chunk": 512,
            "reduction": "none",  # first, last: only reduced_calls of a rollout are optimised
            "reduced_calls": 1,
        },
    )


def published_scale():
    """Meissonic's sizes with Mask-GRPO's published settings (of Show-o)."""
    other = maskfocus.published_scale()
    config = embedded("")
    config.name = "configs/mask_grpo.py:meissonic"
    config.num_steps = STEPS["meissonic"]
    same = ("parents", "data", "rewards", "rewards_heldout", "reward_scale")
    for name in (*same, "micro_batch", "rollout_rows", "parallel", "log_every", "save_every"):
        config[name] = other[name]
    config.evaluation, config.energy_distance = other.evaluation, 0.0
    config.batch_size, config.group = 96, 6
    config.optimizer.update(
        {
            **{"name": "adamw", "learning_rate": 3e-6, "b1": 0.9, "b2": 0.95, "weight_decay": 0.02},
            **{"clip_norm": 0.0, "warmup_steps": 0, "decay": "cosine", "ema_decay": 0.995},
        }
    )
    config.rollout.update({"num_steps": 20, "noise": 1.0, "noise_schedule": "compounded"})  # "unmasking reduction"
    config.loss.update({"likelihood": "hard", "kl_coefficient": 0.0, "clip_low": 0.1, "clip_high": 0.1})
    return config
