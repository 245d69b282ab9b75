"""Speed-RL-like tuning of the embedded base: fewer network calls at equal quality.

python -m maskrl_jax.main --config=configs/speed_rl.py         # README says how long, parents included
python -m maskrl_jax.main --config=configs/speed_rl.py:full    # carries the claims
python -m maskrl_jax.main --config=configs/speed_rl.py:smoke   # a few updates of everything: does it run?
python -m maskrl_jax.main --config=configs/speed_rl.py:meissonic --dry_run=v5e:4x4   # published scale, compile only

The numbers are our choice; the paper's are not public (specs: "not published").
"""

from configs import maskgit, sizes

STEPS = {"": 14, "full": 150, "smoke": 3, "meissonic": 1200}


def get_config(arg: str = ""):
    """Sizes: default, `full`, `smoke`; `meissonic` holds the published-scale settings."""
    sizes.check(arg, tuple(STEPS))
    return published_scale() if arg == "meissonic" else embedded(arg)


def embedded(arg: str):
    """The embedded task: T_ref 24, at most 24 calls."""
    smoke, steps = arg == "smoke", STEPS[arg]
    base = maskgit.get_config(arg)
    return sizes.run(
        "speed_rl",
        "configs/speed_rl.py" + (f":{arg}" if arg else ""),
        num_steps=steps,
        batch_size={"": 96, "smoke": 8}.get(arg, 192),  # rollouts of an update
        group=4 if smoke else 16,  # rollouts of a prompt
        micro_batch=8 if smoke else 32,
        rollout_rows=0,  # rollouts that a device samples at a time; 0: all, which large grids have no room for
        inner_updates=1,
        reference_samples=1,
        log_every=1 if smoke else 2,
        save_every=20,
        parents={"tokenizer": base.parents.tokenizer, "judge": base.parents.judge, "maskgit": base},
        init={"tokenizer": "", "judge": "", "maskgit": ""},
        data=sizes.data("shapes"),
        model={},
        **sizes.rewards(judge=1.0, energy_distance=2.0),
        policy=policy(arg),
        credit=credit(arg),
        resample={"rounds": 1, "groups": 1},
        loss=loss(),
        optimizer=optimizer(arg, steps),
        evaluation=evaluation(arg),
    )


def policy(arg: str) -> dict:
    """How many calls, and when.

    A call commits the place that the model is least sure of, and with it whatever is surer than the head's kappa:
    what that alone gives is the report's system `untrained`, and the rest is learned.
    """
    return {
        "kind": "adaptive",
        "action": "threshold",
        "order": "uncertain",
        "kappa": 0.96 if arg == "full" else 0.99998,
        "kappa_std": 0.5,
        "ticks": 960,
        "max_calls": 24,
        "noise": 0.5 if arg == "full" else 3.0,
        # What follows up to `opening` is for --config.policy.action=stride; it, `fixed` and `budget`, which commit
        # the surest first, want --config.policy.noise=0.5.
        "divisors": (24, 16, 12, 10, 8, 6, 5, 4, 3, 2, 1),
        "centre": 7.0,
        "width": 0.2,
        "stickiness": 3.0,
        "opening": 1,  # the first token alone settles the background, which all others must agree with
        "target_calls": 8,
        "step_set": (6, 8, 12, 16),
        "levels": 4,
        "temperature": 0.7 if arg == "full" else 0.35,
        "guidance": 1.0 if arg == "full" else 1.15,  # what is trained for minutes only needs a little
        "guidance_schedule": "constant",
        "timesteps": "clock",  # or mask_ratio, const; kind fixed: countdown. Meissonic alone reads them
    }


def credit(arg: str) -> dict:
    """From rewards to advantages."""
    return {
        "min_calls": 2,
        "speed": "schedule",
        "lambda_value": 0.4 if arg == "full" else 0.2,
        "lambda_zero_until": 0,
        "lambda_full_at": 0,
        "gate": "off",  # the speed reward has a true gradient here, and a gate would outweigh quality
        "gate_margin": 1.5,
        # Nothing else reads the base's quality on the training prompts, which takes a minute to measure.
        "low_quality": "drop" if arg == "full" else "off",
        "low_quality_factor": 3.0,
        "percentile": 10.0,
        "history": 1000,
        "history_min": 64,
        "down_sample": 2 if arg == "smoke" else 4,
    }


def loss() -> dict:
    """Likelihood, KL and entropy."""
    return {
        "tokens": {
            "likelihood": "transition",
            "distribution": "guided_sg",
            "kl": "forward",
            "clip_low": 0.1,
            "clip_high": 0.2,
            "chunk": 512,
        },
        "kl_coefficient": 0.01,
        # The first token decides what the prompt leaves open (here the tone). Whatever is a little likelier there
        # clashes less, earns more and takes over (measured); so that call is held to the base.
        "first_call_tokens": 0.0,
        "first_call_kl": 20.0,
        "head_entropy": (3e-3, 3e-4),
        "per_rollout_mean": False,
    }


def optimizer(arg: str, steps: int) -> dict:
    """Muon for matrices, Adam for the rest."""
    full = arg == "full"
    return {
        "name": "muon",
        # Small: the tokens' gradient of one batch is mostly noise; the fewer the updates, the larger they may be. The
        # head has few parameters and a clearer one.
        "learning_rate": 5e-5 if full else 1e-4,
        "muon_learning_rate": 3e-4 if full else 1e-3,
        "b1": 0.9,
        "b2": 0.95,
        "warmup_steps": min(10, steps // 3),
        "decay": "linear",
        "decay_steps": 0,  # over the whole run
        "ema_decay": 0.95,
        "rates": (("^head", 40.0 if full else 20.0),),
    }


def evaluation(arg: str) -> dict:
    """How much the report measures: as of the base, whose curve is then measured once."""
    full, smoke = arg == "full", arg == "smoke"
    dials = {"smoke": (0.0,), "full": (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0)}
    return {
        **maskgit.evaluation(arg),
        "dials": dials.get(arg, (0.0, 0.5)),
        "goal": 3.0 if full else 2.0,
        "timing_repeats": 0 if smoke else 5 if full else 3,
    }


def published_scale():
    """Meissonic (docs/published_weights.md) and the specification's starting points; rewards are HPSv2.1 and CLIPScore."""
    config, base = embedded("full"), maskgit.get_config("meissonic")
    config.name = "configs/speed_rl.py:meissonic"
    config.num_steps = STEPS["meissonic"]
    config.batch_size, config.group, config.micro_batch, config.rollout_rows = 128, 8, 1, 1
    config.parallel = "sharded"
    config.log_every, config.save_every = 1, 50
    config.reference_samples = 2
    config.data = base.data
    config.parents = {"tokenizer": base.parents.tokenizer, "judge": base.parents.judge, "maskgit": base}
    # HPSv2.1 lies about .3 and CLIPScore about 30; the gate compares qualities with the base's, so they stay raw.
    config.rewards = {"hps": 1.0, "clip_score": 0.005}
    config.rewards_heldout = {"pick_score": 1.0, "aesthetic": 0.0}
    config.policy.update(
        {
            "action": "stride",
            "order": "confident",
            "max_calls": 24,
            "noise": 2.0,
            "divisors": (24, 20, 16, 12, 10, 8, 6, 4, 3, 2, 1),
            "centre": 16.0,
            "width": 0.4,
            "stickiness": 4.0,
            "opening": 0,
            "target_calls": 8,
            "step_set": (6, 8, 12, 16),
            "guidance": 5.0,
            "temperature": 1.0,
        }
    )
    config.credit.update(
        {
            "min_calls": 4,
            "lambda_value": 1.0,
            "gate": "hard",
            "gate_margin": 0.5,
            "lambda_zero_until": 50,
            "lambda_full_at": 250,
        }
    )
    config.resample.rounds, config.resample.groups = 2, 16
    # What the embedded task needs and nobody has tried at this scale.
    config.loss.first_call_tokens, config.loss.first_call_kl = 1.0, 1.0
    config.credit.down_sample, config.energy_distance = 0, 0.0
    config.optimizer.update(
        {"name": "adamw", "learning_rate": 2e-6, "warmup_steps": 50, "decay": "constant", "ema_decay": 0.995}
    )
    config.optimizer.rates = (("^head", 150.0),)  # 3e-4 for the head
    base.evaluation.update({"steps": (4, 6, 8, 12, 16, 24, 32, 48)})
    config.evaluation.update({"steps": (4, 6, 8, 12, 16, 24, 32, 48), "batch_size": 32})
    return config
