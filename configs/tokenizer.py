"""VQ tokenizer of the embedded sets: 32 x 32 pixels to 8 x 8 codes.

python -m maskrl_jax.main --config=configs/tokenizer.py          # shapes, about half a minute on two cores
python -m maskrl_jax.main --config=configs/tokenizer.py:digits   # scikit-learn's handwritten digits
python -m maskrl_jax.main --config=configs/tokenizer.py:tfds-cifar10   # or any other TFDS set of labelled images

python -m maskrl_jax.convert --from=taming last.ckpt --out=runs/published/taming256   # published weights; taming512, google256, google512
python -m maskrl_jax.convert --from=meissonic-tokenizer <folder> --out=runs/published/meissonic-tokenizer   # with its text encoder

Expected of shapes: 35.7 dB, and the exact verifier finds every reconstruction right.
"""

from configs import sizes

STEPS = {"": 1000, "digits": 1500, "smoke": 60, "digits-smoke": 60}
# Networks whose weights are published, at the sizes of picture that MaskGIT uses them for; they are not trained here.
PUBLISHED = {f"{form}{size}": (form, size) for form in ("taming", "google") for size in (256, 512)}
# Those of text-to-image models: amused1024 is Lumina-DiMOO's, and Meissonic has its text encoder beside the same network.
PUBLISHED |= {"amused512": ("amused", 512), "amused1024": ("amused", 1024), "meissonic": ("amused", 1024)}


def get_config(arg: str = ""):
    """Sizes: default, `smoke`; `digits` and `tfds-<set>` for other sets; published ones by name (`PUBLISHED`)."""
    steps = STEPS.get(sizes.check(arg, (*STEPS, *PUBLISHED), tfds=True), 20_000)
    name = "imagenet2012" if arg in PUBLISHED else sizes.data_set(arg)
    config = embedded(arg, steps, name)
    if arg in PUBLISHED:
        form, size = PUBLISHED[arg]
        config.model = {"form": form, "image_size": size, "codebook_size": 1024, "code_width": 256}
        if form == "amused":
            config.model.update({"codebook_size": 8192, "code_width": 64})
        if arg == "meissonic":
            config.model["text"] = {"dtype": "bfloat16"}  # CLIP ViT-H/14's text tower
    return config


def embedded(arg: str, steps: int, name: str):
    """Our own network."""
    return sizes.run(
        "tokenizer",
        "configs/tokenizer.py" + (f":{arg}" if arg else ""),
        num_steps=steps,
        batch_size=16,
        eval_samples=512,
        data={"name": name, "workers": 0},
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
