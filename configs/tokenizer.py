"""VQ tokenizer of the embedded sets: 32 x 32 pixels to 8 x 8 codes.

python -m maskrl_jax.main --config=configs/tokenizer.py          # shapes, about half a minute on two cores
python -m maskrl_jax.main --config=configs/tokenizer.py:digits   # scikit-learn's handwritten digits
"""

from configs import sizes

STEPS = {"": 1000, "digits": 1500, "smoke": 60, "digits-smoke": 60}


def get_config(arg: str = ""):
    """Sizes: default, `smoke`; `digits` for the other set."""
    steps = STEPS[sizes.check(arg, tuple(STEPS))]
    digits = arg.startswith("digits")
    return sizes.run(
        "tokenizer",
        "configs/tokenizer.py" + (f":{arg}" if arg else ""),
        num_steps=steps,
        batch_size=16,
        eval_samples=512,
        data={"name": "digits" if digits else "shapes"},
        model={
            "image_size": 32,
            "patch": 4,
            "codebook_size": 96 if digits else 64,
            "code_width": 16,
            "hidden": 128,
            "decoder_width": 64,
        },
        optimizer={
            "name": "adamw",
            "learning_rate": 3e-3,
            "warmup_steps": 20,
            "decay": "cosine",
            "decay_steps": 0,  # over the whole run
            "ema_decay": 0.98,
        },
    )
