"""MAR: masked autoregression over continuous tokens with a diffusion head (arXiv 2406.11838).

python -m maskrl_jax.main --config=configs/mar.py          # shapes with captions; 35 to 80 minutes on one core: graded .88 to .92
python -m maskrl_jax.main --config=configs/mar.py:smoke    # a few updates of everything: does it run?
python -m maskrl_jax.main --config=configs/mar.py:base --dry_run=v5e:4x4   # published sizes, compile only:
python -m maskrl_jax.main --config=configs/mar.py:large --dry_run=v5e:4x4
python -m maskrl_jax.main --config=configs/mar.py:huge --dry_run=v5e:8x8

specs/mar.md says which numbers are published; those of the embedded task are our choice.
"""

from configs import judge, kl_vae, sizes

PUBLISHED = {
    "base": {"width": 768, "depth": 12, "heads": 12, "head_width": 1024, "head_depth": 6},
    "large": {"width": 1024, "depth": 16, "heads": 16, "head_width": 1280, "head_depth": 8},
    "huge": {"width": 1280, "depth": 20, "heads": 16, "head_width": 1536, "head_depth": 12},
}
STEPS = {"": 4000, "smoke": 20, **dict.fromkeys(PUBLISHED, 500_400)}
GUIDANCE = {"base": 2.9, "large": 3.0, "huge": 3.2}


def get_config(arg: str = ""):
    """Sizes: default, `smoke`; `base`, `large`, `huge` as published."""
    sizes.check(arg, tuple(STEPS))
    return published_scale(arg) if arg in PUBLISHED else embedded(arg)


def embedded(arg: str):
    """The embedded task."""
    smoke = arg == "smoke"
    return sizes.run(
        "mar",
        "configs/mar.py" + (f":{arg}" if arg else ""),
        num_steps=STEPS[arg],
        batch_size=16 if smoke else 32,
        cond_drop=0.1,
        repeats=2,  # fresh times and noise of every token in an update
        parents={"tokenizer": kl_vae.get_config(arg), "judge": judge.get_config(arg)},
        init={"tokenizer": "", "judge": ""},
        data=sizes.data("shapes", **sizes.READING),
        model=model(smoke),
        masking={"least": 0.15, "deviation": 0.5},  # more tokens are visible than as published
        optimizer={
            "name": "muon",
            "learning_rate": 1e-3,
            "muon_learning_rate": 0.006,  # a third of MaskGIT's: with that it learns less here
            "muon_steps": 3,
            "muon_skip": "embedding|places|mask|modulation|last|time|maps|pool_out|table",
            "warmup_steps": 5 if smoke else 50,
            "decay": "linear",
            "decay_steps": 0,  # over the whole run
            "ema_decay": 0.99,
        },
        sampler={
            "num_steps": 4 if smoke else 16,
            "inner_steps": 10 if smoke else 100,
            "method": "ddpm",
            "guidance": 2.0,
            "guidance_schedule": "constant",
            "temperature": 1.0,
            "bucket": 1,
        },
        evaluation=evaluation(smoke),
    )


def model(smoke: bool = False) -> dict:
    """The network; the small one compiles quickly."""
    # A velocity needs less training than noise, whose errors late times divide by alpha.
    shared = {"buffer": 8, "dropout": 0.0, "prediction": "velocity"}
    if smoke:
        return {"width": 32, "depth": 1, "heads": 2, "head_width": 32, "head_depth": 1, **shared}
    shared |= {"pooled_width": 256, "conv_stem": True, "relative_bias": True, "local_mixing": True}  # as MaskGIT here
    return {"width": 128, "depth": 2, "heads": 4, "head_width": 128, "head_depth": 3, "unroll": 2, **shared}


def evaluation(smoke: bool = False) -> dict:
    """How much a report measures; times and sampler as for the discrete base."""
    if smoke:
        return {
            "prompts": 8,
            "group": 2,
            "seed": 17,
            "batch_size": 16,
            "steps": (2, 4),
            "glance_prompts": 8,
            "glance_steps": 4,
            "keep": 4,
            "tune_prompts": 8,
            "tune_guidance": (1.0,),
            "tune_temperature": (1.0,),
        }
    return {
        "prompts": 192,
        "group": 4,
        "seed": 17,
        "batch_size": 64,
        "steps": (4, 8, 16),
        "glance_prompts": 32,
        "glance_steps": 16,
        "keep": 8,
        "tune_prompts": 64,
        "tune_guidance": (1.0, 1.5, 2.0, 3.0),
        "tune_temperature": (1.0, 0.85, 0.7, 0.55),
    }


def published_scale(arg: str):
    """ImageNet at 256 pixels (specs/mar.md sections 3, 6 and 7): 800 epochs of 1.28 M images in batches of 2,048.

    bfloat16 in place of float16; the learning rate's warm-up is linear in steps from 1/(n + 1), not from 0.
    """
    config = embedded("")
    config.name = f"configs/mar.py:{arg}"
    config.num_steps, config.batch_size, config.save_every, config.repeats = STEPS[arg], 2048, 2000, 4
    config.parents.tokenizer = kl_vae.get_config("kl16")
    config.data.name = "imagenet2012"
    config.parents.judge.data.name, config.parents.judge.data.image_size = "imagenet2012", 256
    config.parents.judge.model.update({"kind": "class", "num_classes": 1000, "patch": 32})
    config.model = {**PUBLISHED[arg], "buffer": 64, "dropout": 0.1, "dtype": "bfloat16", "remat": True}
    config.masking = {"least": 0.7, "deviation": 0.25}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 8e-4,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 0.02,
        "clip_norm": 3.0,
        "warmup_steps": 62_550,  # 100 epochs
        "decay": "constant",
        "ema_decay": 0.9999,
    }
    config.sampler.update({"num_steps": 64, "inner_steps": 100, "guidance": GUIDANCE[arg]})
    config.sampler.update({"guidance_schedule": "linear", "bucket": 32})
    config.evaluation.update({"steps": (16, 32, 64), "glance_steps": 64, "batch_size": 256})
    return config
