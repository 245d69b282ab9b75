"""MaskFocus: better images from the same number of calls, by tuning on critical steps (arXiv 2512.18766).

python -m maskrl_jax.main --config=configs/maskfocus.py            # embedded task, 14 minutes on two cores, parents 8
python -m maskrl_jax.main --config=configs/maskfocus.py:faithful   # the official algorithm, at the scale of this task
python -m maskrl_jax.main --config=configs/maskfocus.py:smoke      # a few updates of everything: does it run?
python -m maskrl_jax.main --config=configs/maskfocus.py:meissonic --dry_run=v5e:4x4   # published scale, compile only

specs/maskfocus.md section 7 says which numbers are published; those of the embedded task are our choice.
"""

from configs import maskgit, sizes

STEPS = {"": 100, "faithful": 100, "smoke": 3, "meissonic": 1200}
BASE_STEPS = {"": 2200, "faithful": 2200}  # of the base's own 2,400: it leaves a gap to close
SAMPLING_STEPS = {"": 8, "faithful": 8, "smoke": 6, "meissonic": 64}


def get_config(arg: str = ""):
    """Sizes: default, `faithful`, `smoke`; `meissonic` holds the published-scale settings."""
    sizes.check(arg, tuple(STEPS))
    return published_scale() if arg == "meissonic" else embedded(arg)


def base(arg: str):
    """The base generator and its parents."""
    config = maskgit.get_config("smoke" if arg == "smoke" else "")
    config.num_steps = BASE_STEPS.get(arg, config.num_steps)
    steps = SAMPLING_STEPS[arg]
    config.evaluation.steps = (steps // 2, steps)
    config.evaluation.glance_steps = steps
    config.evaluation.tune_prompts = 8 if arg == "smoke" else 256
    return config


def embedded(arg: str):
    """The embedded task."""
    smoke, faithful, generator = arg == "smoke", arg == "faithful", base(arg)
    return sizes.run(
        "maskfocus",
        "configs/maskfocus.py" + (f":{arg}" if arg else ""),
        num_steps=STEPS[arg],
        batch_size=16 if smoke else 128,  # rollouts of an update
        group=2 if smoke else 8,
        micro_batch=8 if smoke else 32,  # images that a device scores at a time
        rollout_rows=0,  # rollouts that a device samples at a time, whole groups; 0: all
        log_every=1 if smoke else 2,
        save_every=20,
        parents={"tokenizer": generator.parents.tokenizer, "judge": generator.parents.judge, "maskgit": generator},
        init={"tokenizer": "", "judge": "", "maskgit": ""},
        data=sizes.data("shapes"),
        model={},
        **sizes.rewards(
            **{"judge": 0.5, "compositional": 1.0},
            energy_distance=0.0 if faithful else 6.0,
            scope="all" if faithful else "prompt",
        ),
        zero_spread="kl_only" if faithful else "drop",
        rollout_noise="fresh",
        negative_weight=1.0 if faithful else 0.4,  # of advantages below zero, but for the first call's
        rollout={
            "num_steps": SAMPLING_STEPS[arg],
            "routing": "on",
            "noise": 0.5,
            "guidance": 1.3,
            "temperature": 0.7,
            # The official 2.5 tears most pictures here: rollouts score .55 where plain sampling scores .75.
            "amplitude": 2.5 if faithful else 0.6,
            "decay": 3.0,
            "floor": 0.7,
            "timesteps": "clock",  # as of the base's sampler; published: countdown, the same at 64 steps
        },
        steps={
            "count": 4 if arg == "" else 2,  # the spec: 0.09 T, at least 2
            "first_call": not faithful,  # no critical step is that of masks only, whose drift costs variety
            "select": "critical",
            "scope": "group",
            "timestep_offset": 0 if faithful else 1,  # this base reads no timestep, Meissonic does
        },
        loss=loss(arg),
        optimizer={
            "name": "adamw",
            "learning_rate": 2e-4,
            "b1": 0.9,
            "b2": 0.99,
            "warmup_steps": 0 if smoke else 6,
            "decay": "linear",
            "decay_steps": 0,  # over the whole run
            "ema_decay": 0.97,
        },
        aim={"closed": 0.40, "closed_low": 0.20, "diversity": 0.85},
        evaluation=evaluation(arg),
    )


def loss(arg: str) -> dict:
    """Masks, clipping, KL and how a rollout's steps are updated."""
    faithful = arg == "faithful"
    return {
        "remask": "random_group" if faithful else "random_per_sample",
        "update_mode": "sequential",
        "norm": "step_mean",
        "clip_eps": 0.0 if faithful else 0.2,  # 0: none
        "kl": "k3" if faithful else "forward",  # full, reversed: it keeps what the reference can do; k3 here spikes
        "kl_coefficient": 0.01,
        "chunk": 512,
    }


def evaluation(arg: str) -> dict:
    """How much the report measures: as of the base, whose curve is then measured once."""
    steps = SAMPLING_STEPS[arg]
    return {**maskgit.evaluation("smoke" if arg == "smoke" else ""), "steps": (steps // 2, steps)}


def published_scale():
    """Meissonic (docs/published_weights.md) with the published settings; rewards are our choice, HPSv2.1 and CLIPScore."""
    config, generator = embedded(""), maskgit.get_config("meissonic")
    config.name = "configs/maskfocus.py:meissonic"
    config.num_steps = STEPS["meissonic"]
    generator.sampler.num_steps, generator.evaluation.steps = 64, (16, 32, 64)
    config.parents = {"tokenizer": generator.parents.tokenizer, "judge": generator.parents.judge, "maskgit": generator}
    config.data = generator.data
    config.rewards, config.reward_scale = {"hps": 1.0, "clip_score": 0.5}, "group"
    config.rewards_heldout = {"pick_score": 1.0, "aesthetic": 0.0}
    config.batch_size, config.group, config.micro_batch, config.rollout_rows = 128, 8, 1, 8
    config.parallel = "sharded"
    config.log_every, config.save_every = 1, 50
    config.rollout.update({"num_steps": 64, "noise": 2.0, "guidance": 5.0, "temperature": 1.0, "amplitude": 2.5})
    config.energy_distance, config.negative_weight = 0.0, 1.0
    config.loss.update({"remask": "random_group", "kl": "k3", "kl_coefficient": 0.01})
    config.steps.update({"count": 6, "first_call": False})
    config.optimizer.update({"name": "adamw", "learning_rate": 2e-6, "b2": 0.999, "warmup_steps": 0})
    config.optimizer.ema_decay = 0.995
    config.evaluation.update({"steps": (16, 32, 64), "batch_size": 32})
    return config
