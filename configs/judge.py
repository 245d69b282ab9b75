"""Judge of the embedded sets: reads what a picture shows; reward in training, features for distances.

python -m maskrl_jax.main --config=configs/judge.py          # shapes, under a minute on two cores
python -m maskrl_jax.main --config=configs/judge.py:digits   # ten classes
python -m maskrl_jax.main --config=configs/judge.py:tfds-cifar10   # or any other TFDS set of labelled images

Expected of shapes: every held-out picture read exactly, and 99.6 % of those stitched from two.
"""

from configs import sizes
from maskrl_jax.data.dataset import conditioning_of

STEPS = {"": 1500, "digits": 1000, "smoke": 60, "digits-smoke": 60}


def get_config(arg: str = ""):
    """Sizes: default, `smoke`; `digits` and `tfds-<set>` for other sets."""
    steps = STEPS.get(sizes.check(arg, tuple(STEPS), tfds=True), 10_000)
    name = sizes.data_set(arg)
    return sizes.run(
        "judge",
        "configs/judge.py" + (f":{arg}" if arg else ""),
        num_steps=steps,
        batch_size=32,
        eval_samples=64 if arg.endswith("smoke") else 512,
        data={"name": name, "image_size": 32},
        model={
            "kind": "cells" if name == "shapes" else "class",
            "num_classes": 17 if name == "shapes" else int(conditioning_of(name).null),
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
