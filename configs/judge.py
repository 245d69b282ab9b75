"""Judge of the embedded sets: reads what a picture shows; reward in training, features for distances.

python -m maskrl_jax.main --config=configs/judge.py          # shapes, under a minute on two cores
python -m maskrl_jax.main --config=configs/judge.py:digits   # ten classes
"""

from configs import sizes

STEPS = {"": 1000, "digits": 1000, "smoke": 60, "digits-smoke": 60}


def get_config(arg: str = ""):
    """Sizes: default, `smoke`; `digits` for the other set."""
    steps = STEPS[sizes.check(arg, tuple(STEPS))]
    digits = arg.startswith("digits")
    return sizes.run(
        "judge",
        "configs/judge.py" + (f":{arg}" if arg else ""),
        num_steps=steps,
        batch_size=32,
        eval_samples=512,
        data={"name": "digits" if digits else "shapes", "image_size": 32},
        model={
            "kind": "class" if digits else "cells",
            "num_classes": 10 if digits else 17,
            "patch": 4,
            "width": 64,
        },
        optimizer={
            "name": "adamw",
            "learning_rate": 2e-3,
            "warmup_steps": 20,
            "decay": "linear",
            "decay_steps": 0,  # over the whole run
            "ema_decay": 0.98,
        },
    )
