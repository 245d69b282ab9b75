"""MIGM-Shortcut: the base runs now and then, a light network moves its feature between (arXiv 2602.23996).

python -m maskrl_jax.main --config=configs/shortcut.py           # embedded task
python -m maskrl_jax.main --config=configs/shortcut.py:speed_rl  # the same on a policy of configs/speed_rl.py
python -m maskrl_jax.main --config=configs/shortcut.py:smoke     # a few updates of everything: does it run?
python -m maskrl_jax.main --config=configs/shortcut.py:maskgit512 --dry_run=v5e:4x4   # published scale, compile only
python -m maskrl_jax.main --config=configs/shortcut.py:dimoo --dry_run=v5p:2x2x1   # Lumina-DiMOO
python -m maskrl_jax.main --config=configs/shortcut.py:maskgit512-official --dry_run=v5e:2x2   # with its optimiser

The default trains for three to four minutes on two cores and should come to a quarter of the frozen feature's error
(benchmarks/shortcut.md). specs/shortcut.md says which numbers are published; those of the embedded task are our choice.
"""

from configs import maskgit, sizes, speed_rl

STEPS = {"": 50, "speed_rl": 50, "smoke": 3, "maskgit512": 780, "maskgit512-official": 12_500, "dimoo": 125}


def get_config(arg: str = ""):
    """Sizes: default, `speed_rl` (on a tuned policy), `smoke`; `maskgit512[-official]` and `dimoo` have the published scale."""
    sizes.check(arg, tuple(STEPS))
    if arg == "dimoo":
        return dimoo()
    if not arg.startswith("maskgit512"):
        return embedded(arg)
    config = published_scale()
    return official(config) if arg.endswith("official") else config


def embedded(arg: str):
    """The embedded task."""
    smoke = arg == "smoke"
    base = maskgit.get_config("smoke" if smoke else "")
    parents = {"tokenizer": base.parents.tokenizer, "judge": base.parents.judge, "maskgit": base}
    if arg == "speed_rl":
        parents["speed_rl"] = speed_rl.get_config()
    return sizes.run(
        "shortcut",
        "configs/shortcut.py" + (f":{arg}" if arg else ""),
        num_steps=STEPS[arg],  # buffers of rollouts
        batch_size=8 if smoke else 32,  # rollouts of a buffer
        log_every=1 if smoke else 2,
        save_every=20,
        parents=parents,
        init=dict.fromkeys(parents, ""),
        data=sizes.data("shapes"),
        model={
            "ratio": 2.0,
            "n_block": 1,
            "heads": 2 if smoke else 4,
            "embed_t": True,
            "controls": True,  # False: the ablation without the revealed tokens
            "kv_prenorm": True,  # published: False, which learns less here
            "zero_init_out": True,
            "local_mixing": True,  # the base mixes neighbours too; without it a shortcut learns little here
            "dtype": "float32",
            "remat": False,
        },
        teacher={"num_steps": (4 if smoke else 24,), "pairs": 2, "epochs": 2},
        loss={
            "positions": "masked",
            "kl": 0.1,  # published: 0; with it five full steps of 24 do better here (benchmarks/shortcut_arms.md)
            "kl_temperature": 1.0,
            "chain": 1,
            "through": True,
            "student_tokens": False,
        },
        optimizer=optimizer(smoke),
        curve={
            "num_steps": 4 if smoke else 32,  # light steps are cheap, and more of them commit fewer tokens at once
            "budgets": (2, 3) if smoke else (4, 7, 9),
            "beside": ("frozen",),
            "calibration": 8 if smoke else 32,
            "longest": 6,
            "timing_runs": 3 if smoke else 20,
        },
        evaluation=evaluation(arg),
    )


def optimizer(smoke: bool = False) -> dict:
    """Muon, as for the base; the moving average is what is sampled with."""
    return {
        "name": "muon",
        "learning_rate": 1e-3,
        "muon_learning_rate": 0.02,
        "clip_norm": 1.0,
        "b1": 0.9,
        "b2": 0.99,
        "weight_decay": 0.01,
        "warmup_steps": 1 if smoke else 2,  # buffers
        "decay": "cosine",
        "decay_steps": 0,  # over the whole run
        "ema_decay": 0.99,
    }


def evaluation(arg: str) -> dict:
    """How much the report measures; small batches, as fast on two cores as large ones, are timed sooner."""
    own = maskgit.evaluation("smoke" if arg == "smoke" else "")
    return {**own, "seed": 17, "batch_size": 16, "goal": 1.67, "timing_repeats": 0 if arg == "smoke" else 5}


def published_scale():
    """MaskGIT at 512 pixels (form A), its sampler and the published network; serves --dry_run until weights load.

    The published training draws 50,000 images once; here 780 buffers of 64 are as many. The optimiser and minibatches
    of 64 pairs are our choice.
    """
    config = embedded("")
    config.name = "configs/shortcut.py:maskgit512"
    config.num_steps, config.batch_size, config.log_every, config.save_every = STEPS["maskgit512"], 64, 1, 50
    base = maskgit.get_config("port512")
    config.parents = {"tokenizer": base.parents.tokenizer, "judge": base.parents.judge, "maskgit": base}
    config.data.name = base.data.name
    config.model.update({"heads": 16, "zero_init_out": False, "local_mixing": False, "kv_prenorm": False})
    config.model.update({"dtype": "bfloat16", "remat": True})
    config.teacher.update({"num_steps": (15,), "pairs": 1, "epochs": 1})
    config.loss.kl = 0.0
    config.optimizer.update({"name": "adamw", "learning_rate": 3e-4, "warmup_steps": 18, "b2": 0.999})
    config.optimizer.ema_decay = 0.999
    config.curve.update({"num_steps": 15, "budgets": (7, 8), "calibration": 8})  # samples of 94 MB each
    config.evaluation.update({"steps": (8, 9, 11, 13, 15), "batch_size": 128})
    return config


def official(config):
    """The published optimiser on minibatches of four pairs, for one to four devices.

    Its length is not published, 50,000 images are. AdamW at 1e-4, a tenth of that after 1,000 updates (36 buffers of
    28), average 0.9999. Not as published: the average warms up, biases and norms do not decay, bfloat16 in place of
    float16, and Flax's initialisation.
    """
    config.name, config.batch_size = "configs/shortcut.py:maskgit512-official", 4
    config.num_steps, config.log_every, config.save_every = STEPS["maskgit512-official"], 10, 500
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 0, "clip_norm": 0.0, "ema_decay": 0.9999})
    config.optimizer.update({"decay": "tenth", "decay_steps": 36})
    return config


def dimoo():
    """Lumina-DiMOO at 1024 pixels, its sampler and the published network (docs/published_weights.md).

    As many prompts as published, 2,000, once each; a buffer holds 4.5 GB of features a prompt. The optimiser is that of
    `maskgit512`, our choice.
    """
    config, base = published_scale(), maskgit.get_config("dimoo")
    config.name, config.num_steps, config.batch_size = "configs/shortcut.py:dimoo", STEPS["dimoo"], 16
    config.parents = {"tokenizer": base.parents.tokenizer, "judge": base.parents.judge, "maskgit": base}
    config.data = base.data
    config.model = {"ratio": 2.0, "n_block": 1, "heads": 32, "mlp_width": 12288, "embed_t": True, "controls": True}
    config.model.update({"prompt_controls": True, "zero_init_out": False, "dtype": "bfloat16"})
    config.teacher.update({"num_steps": (64,), "pairs": 1, "epochs": 1})
    config.loss.positions = "all"
    config.curve.update({"num_steps": 64, "budgets": (9, 11, 14), "calibration": 4})
    config.evaluation.update({"steps": (9, 14, 16, 32, 64), "batch_size": 16})
    return config
