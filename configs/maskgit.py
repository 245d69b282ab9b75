"""Base generator: MaskGIT on the embedded sets.

python -m maskrl_jax.main --config=configs/maskgit.py          # shapes with captions, minutes on two cores
python -m maskrl_jax.main --config=configs/maskgit.py:full     # trained longer, about half an hour
python -m maskrl_jax.main --config=configs/maskgit.py:digits   # handwritten digits by class
python -m maskrl_jax.main --config=configs/maskgit.py:tfds-cifar10   # any TFDS set of labelled images, by class
"""

from configs import judge, sizes, tokenizer

STEPS = {"": 2400, "full": 5000, "smoke": 40, "digits": 2500, "digits-smoke": 40}


def get_config(arg: str = ""):
    """Sizes: default, `full`, `smoke`; `digits` and `tfds-<set>` for class-conditioned sets."""
    steps = STEPS.get(sizes.check(arg, tuple(STEPS), tfds=True), 50_000)
    parent = sizes.parent(arg)
    return sizes.run(
        "maskgit",
        "configs/maskgit.py" + (f":{arg}" if arg else ""),
        num_steps=steps,
        batch_size=16 if arg == "" else 32,  # for a short training more steps are worth more than larger ones
        cond_drop=0.1,
        parents={"tokenizer": tokenizer.get_config(parent), "judge": judge.get_config(parent)},
        init={"tokenizer": "", "judge": ""},
        data={"name": sizes.data_set(arg), "text_length": 8},
        model=model(small=arg.endswith("smoke")),
        optimizer={
            "name": "muon",
            "learning_rate": 3e-3,
            "muon_learning_rate": 0.02,
            "muon_steps": 3 if arg == "" else 5,  # a third of a step of batch 16 goes into five
            "warmup_steps": min(50, steps // 4),
            "decay": "linear",
            "decay_steps": 0,  # over the whole run
            "ema_decay": 0.998,
        },
        sampler={
            "mode": "confidence",
            "num_steps": 24,
            "max_steps": 24,
            "schedule": "cosine",
            "gumbel": 1.0,
            "temperature": 1.0,
            "guidance": 1.7,
            "guidance_schedule": "constant",
        },
        evaluation={**evaluation(arg), **tuning(arg)},
    )


def model(small: bool = False) -> dict:
    """The transformer; the small one compiles quickly."""
    if small:
        return {"width": 64, "depth": 1, "heads": 2, "mlp_width": 256}
    return {"width": 128, "depth": 4, "heads": 4, "mlp_width": 512}


def evaluation(arg: str = "") -> dict:
    """How much a report measures, of a base model and of what is tuned on it."""
    if arg.endswith("smoke"):
        return {"prompts": 8, "group": 2, "batch_size": 16, "steps": (2, 4), "glance_prompts": 8, "keep": 4}
    return {
        "prompts": 192,  # of shapes about all that are held out
        "group": 4,  # with 2 the bounds of the default's base are wider than the margin of equal quality
        "batch_size": 64,
        "steps": (4, 6, 8, 12, 16, 24) if arg == "full" else (6, 8, 12, 24),
        "glance_prompts": 32,
        "keep": 8,
    }


def tuning(arg: str = "") -> dict:
    """How the base's own sampler is searched, and the steps of a glance while it trains."""
    if arg.endswith("smoke"):
        return {
            "glance_steps": 4,
            "tune_prompts": 8,
            "tune_gumbel": (4.0,),
            "tune_guidance": (1.0,),
            "tune_temperature": (1.0,),
        }
    return {
        "glance_steps": 24,
        "tune_prompts": 64,
        "tune_gumbel": (0.25, 0.5, 1.0, 2.0),
        "tune_guidance": (1.0, 1.3, 1.7, 2.2),
        "tune_temperature": (1.0, 0.7, 0.5, 0.35),
    }
