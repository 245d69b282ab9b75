"""Base generator: MaskGIT on the embedded sets.

python -m maskrl_jax.main --config=configs/maskgit.py          # shapes with captions, minutes on two cores
python -m maskrl_jax.main --config=configs/maskgit.py:full     # trained longer, about half an hour
python -m maskrl_jax.main --config=configs/maskgit.py:digits   # handwritten digits by class
python -m maskrl_jax.main --config=configs/maskgit.py:tfds-cifar10   # any TFDS set of labelled images, by class
python -m maskrl_jax.main --config=configs/maskgit.py:port512 --dry_run=v5e:4x4   # ImageNet at published sizes, compile
    # only: port256, port512 (form A of specs/maskgit.md), google256, google512 (form B). Their weights are published:
    # docs/published_weights.md. Text to image: meissonic, dimoo, whose prompts are a file (docs/own_data.md).
"""

from configs import judge, sizes, tokenizer

STEPS = {"": 2400, "full": 5000, "smoke": 40, "digits": 2500, "digits-smoke": 40}
PUBLISHED = {f"{form}{size}": (form, size) for form in ("port", "google") for size in (256, 512)}
TEXT = ("meissonic", "dimoo")


def get_config(arg: str = ""):
    """Sizes: default, `full`, `smoke`; `digits` and `tfds-<set>` for sets with classes; published ones: see above."""
    steps = STEPS.get(sizes.check(arg, (*STEPS, *PUBLISHED, *TEXT), tfds=True), 50_000)
    if arg in TEXT:
        return text_to_image(arg)
    return published(arg) if arg in PUBLISHED else embedded(arg, steps)


def embedded(arg: str, steps: int):
    """Our own network."""
    parent = sizes.parent(arg)
    return sizes.run(
        "maskgit",
        "configs/maskgit.py" + (f":{arg}" if arg else ""),
        num_steps=steps,
        batch_size=16 if arg == "" else 32,  # for a short training more steps are worth more than larger ones
        cond_drop=0.1,
        parents={"tokenizer": tokenizer.get_config(parent), "judge": judge.get_config(parent)},
        init={"tokenizer": "", "judge": ""},
        data=sizes.data(sizes.data_set(arg), **sizes.READING),
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


def published(arg: str):
    """ImageNet (specs/maskgit.md sections 1, 3, 4 and 6): networks, samplers and optimisers as published.

    Batches and lengths are those of 256 pixels; our trainer's law of masking (exact counts) is that of form A.
    """
    form, size = PUBLISHED[arg]
    config = embedded("", 755_200 if form == "port" else 1_500_000)
    config.name, config.save_every = f"configs/maskgit.py:{arg}", 5000
    config.data.name = "imagenet2012"
    config.parents.tokenizer = tokenizer.get_config(("taming" if form == "port" else "google") + str(size))
    config.parents.judge.data.update({"name": "imagenet2012", "image_size": size})
    config.parents.judge.model.update({"kind": "class", "num_classes": 1000, "patch": size // 8})
    config.model = {"form": form, "width": 768, "depth": 24, "heads": 16, "mlp_width": 3072}
    config.model.update({"remat": True, "dtype": "bfloat16"})
    config.optimizer = {"name": "adamw", "learning_rate": 1e-4, "b1": 0.9, "b2": 0.96, "decay": "constant"}
    config.optimizer.update({"weight_decay": 1e-5 if form == "port" else 0.045, "ema_decay": 0.9999})
    config.optimizer.update({"warmup_steps": 2500 if form == "port" else 5000})
    if form == "port":
        config.batch_size, config.optimizer.clip_norm = 512, 1.0
        config.sampler.update({"num_steps": 8 if size == 256 else 15, "max_steps": 32, "schedule": "steps-arccos"})
        config.sampler.update({"gumbel": 4.5 if size == 256 else 7.0, "guidance": 4.0 if size == 256 else 3.8})
        config.sampler.update({"guidance_schedule": "linear", "noise_ends": "at"})
        config.evaluation.update({"steps": (8, 9, 11, 13, 15, 32), "glance_steps": 15})
    else:
        config.batch_size, config.cond_drop = 256, 0.0
        config.sampler.update({"num_steps": 8 if size == 256 else 12, "max_steps": 16, "schedule": "shares-cosine"})
        config.sampler.update({"gumbel": 4.5, "guidance": 1.0, "noise_ends": "ahead"})
        config.evaluation.update({"steps": (8, 12, 16), "glance_steps": 8})
    # The report keeps to the published sampler.
    config.evaluation.update(
        {f"tune_{name}": (config.sampler[name],) for name in ("gumbel", "guidance", "temperature")}
    )
    return config


def text_to_image(arg: str):
    """Meissonic or Lumina-DiMOO at 1024 pixels: network and sampler as published (specs/meissonic.md, lumina_dimoo.md).

    Timesteps are told by `clock`, in rollouts and in training too: equal to the published countdown at 64 steps, and
    the same for fewer. Trained on, with pictures, they follow their published fine-tuning recipes but for our trainer's law of masking.
    """
    config, dimoo = embedded("", 42_000), arg == "dimoo"
    config.name, config.save_every, config.parallel = f"configs/maskgit.py:{arg}", 1000, "sharded"
    tokens = {"tokens": arg, "text_length": 128} if dimoo else {"tokens": "clip", "text_length": 77}
    config.data = sizes.data("prompts.jsonl", tokenizer=f"published/{arg}/tokenizer", **tokens)
    config.parents = {
        "tokenizer": tokenizer.get_config("amused1024" if dimoo else "meissonic"),
        "judge": judge.get_config("clip"),
    }
    # `weights` is what parameters are kept in; a network that is trained or tuned wants float32.
    config.model = {"form": arg, "remat": True, "dtype": "bfloat16", "weights": "bfloat16" if dimoo else "float32"}
    config.batch_size, config.cond_drop = (512, 0.1) if dimoo else (256, 0.0)
    config.optimizer = {"name": "adamw", "decay": "constant", "warmup_steps": 0, "ema_decay": 0.9999}
    if dimoo:
        config.optimizer.update({"learning_rate": 2e-5, "b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 4.0})
        config.sampler.update({"schedule": "floored-cosine", "plain_confidence": True, "guidance": 5.0})
        config.sampler.update({"gumbel": 1.0, "last_gumbel": 1.0, "num_steps": 64, "max_steps": 64})
    else:
        config.optimizer.update({"learning_rate": 1e-4, "clip_norm": 10.0})
        config.sampler.update({"schedule": "float32-cosine", "timesteps": "clock", "noise_ends": "at"})
        config.sampler.update({"gumbel": 2.0, "last_gumbel": 0.0, "guidance": 9.0, "num_steps": 48, "max_steps": 64})
    config.evaluation.update({"steps": (16, 32, 64) if dimoo else (8, 16, 24, 32, 48, 64), "batch_size": 32})
    config.evaluation.update({"glance_steps": 32, "glance_prompts": 32})
    config.evaluation.update(
        {f"tune_{name}": (config.sampler[name],) for name in ("gumbel", "guidance", "temperature")}
    )
    return config
