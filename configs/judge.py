"""Judge of the embedded sets: reads what a picture shows; reward in training, features for distances.

python -m maskrl_jax.main --config=configs/judge.py          # shapes, under a minute on two cores
python -m maskrl_jax.main --config=configs/judge.py:digits   # ten classes
python -m maskrl_jax.main --config=configs/judge.py:tfds-cifar10   # or any other TFDS set of labelled images

python -m maskrl_jax.convert --from=clip-rewards weights --out=runs/published/clip-rewards   # rewards that are a CLIP

Expected of shapes: every held-out picture read exactly, and 99.6 % of those stitched from two.
"""

from configs import sizes
from maskrl_jax.data.dataset import conditioning_of

STEPS = {"": 1500, "digits": 1000, "smoke": 60, "digits-smoke": 60}
# Rewards that are a CLIP, by size: all of them as published, or CLIPScore alone. They are converted, not trained here.
PUBLISHED = {
    "clip": {"clip_score": "l14", "pick_score": "h14", "hps": "h14", "aesthetic": "l14"},
    **{f"clip-{size}": {"clip_score": size} for size in ("b32", "l14", "h14")},
}


def get_config(arg: str = ""):
    """Sizes: default, `smoke`; `digits` and `tfds-<set>` for other sets; `clip`, `clip-<size>` for rewards of a CLIP."""
    steps = STEPS.get(sizes.check(arg, (*STEPS, *PUBLISHED), tfds=True), 10_000)
    if arg in PUBLISHED:
        return clip_rewards(arg)
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


def clip_rewards(arg: str):
    """Judge of any set whose prompts are texts. Keys of training say nothing here."""
    return sizes.run(
        "judge",
        f"configs/judge.py:{arg}",
        num_steps=1,
        batch_size=32,
        data={},
        model={
            "kind": "clip",
            "rewards": PUBLISHED[arg],
            "dtype": "float32",  # of the blocks' arithmetic; bfloat16 is faster
            "remat": False,  # in a gradient, compute blocks again rather than keep their values
            "batch_size": 32,  # pictures that go through a network at once
        },
        optimizer={},
    )
