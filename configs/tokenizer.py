"""VQ tokenizer of the embedded sets: 32 x 32 pixels to 8 x 8 codes.

python -m maskrl_jax.main --config=configs/tokenizer.py          # shapes, about half a minute on two cores
python -m maskrl_jax.main --config=configs/tokenizer.py:digits   # scikit-learn's handwritten digits
python -m maskrl_jax.main --config=configs/tokenizer.py:tfds-cifar10   # or any other TFDS set of labelled images

Expected of shapes: 35.7 dB, and the exact verifier finds every reconstruction right.
"""

from configs import sizes

STEPS = {"": 1000, "digits": 1500, "smoke": 60, "digits-smoke": 60}


def get_config(arg: str = ""):
    """Sizes: default, `smoke`; `digits` and `tfds-<set>` for other sets."""
    steps = STEPS.get(sizes.check(arg, tuple(STEPS), tfds=True), 20_000)
    name = sizes.data_set(arg)
    return sizes.run(
        "tokenizer",
        "configs/tokenizer.py" + (f":{arg}" if arg else ""),
        num_steps=steps,
        batch_size=16,
        eval_samples=512,
        data={"name": name},
        model={
            "image_size": 32,
            "patch": 4,
            "codebook_size": {"shapes": 64, "digits": 96}.get(name, 512),
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
