"""What all stages' configs share: the keys of a run, and the check of a config's argument."""

from ml_collections import ConfigDict

TFDS = "tfds-"  # an argument that starts so names a TFDS set of labelled images


def check(arg: str, known: tuple[str, ...], tfds: bool = False) -> str:
    """Return the argument; ValueError with the known ones where it is another."""
    if arg not in known and not (tfds and arg.startswith(TFDS)):
        choice = [a or "(none)" for a in known] + [f"{TFDS}<set>"] * tfds
        raise ValueError(f"unknown config argument {arg!r}; choose one of: {', '.join(choice)}")
    return arg


def data_set(arg: str) -> str:
    """Name the image set of an argument: shapes, digits, or the TFDS set after `tfds-`."""
    if arg.startswith(TFDS):
        return arg.removeprefix(TFDS)
    return "digits" if arg.startswith("digits") else "shapes"


def data(name: str, **more) -> dict:
    """The set that a generator is trained or tuned on, and how its texts become token ids (docs/own_data.md)."""
    return {
        "name": name,  # shapes, digits, a TFDS set, a .txt or .jsonl file of prompts, a folder of images
        "text_length": 8,  # ids of a text; CLIP's 77
        "tokens": "",  # words of shapes; clip; dimoo: Lumina-DiMOO's template
        "tokenizer": "",  # folder with the files of clip's or dimoo's tokenizer
        "pad": 49407,  # clip: id behind the end token, by default that token itself
        **more,
    }


def parent(arg: str) -> str:
    """Argument of the tokenizer and the judge below a generator's: they have no `full` size."""
    return "" if arg == "full" else arg


def run(task: str, name: str, **keys) -> ConfigDict:
    """The keys that every stage has, with those given here in their place."""
    return ConfigDict(
        {
            "task": task,
            "name": name,  # as reports call it
            "seed": 0,
            "log_every": 20,
            "eval_every": 0,  # 0: only at the end
            "save_every": 500,
            "keep": 1,
            "profile_at": 0,  # first of the three steps that <workdir>/profile traces; 0: none
            "parallel": "pmap",
            "max_bad_steps": 20,
            "parents": {},
            "init": {},
            **keys,
        }
    )


# How a generator's training pictures are read (docs/input.md).
READING = {
    "encoded": "",  # folder of tokens or latents that python -m maskrl_jax.encode made; "": pictures
    "workers": 0,  # processes that decode pictures of a set on disk; 0: threads of this one
}

# A reward of another process (docs/remote_rewards.md); without a url there is none.
SERVICE = {
    "url": "",
    "name": "service",
    "weight": 1.0,
    "probe": "",  # file of pictures with known scores
    "timeout": 60.0,  # seconds of a try
    "retries": 2,
    "pause": 1.0,  # seconds, doubled with every try
    "batch_size": 16,  # pictures of a request
    "patience": 3,  # batches of rollouts without any score, after which the run stops
}


def rewards(energy_distance: float = 0.0, scope: str = "all", **trained: float) -> dict:
    """What a tuning stage is trained on, by weight, what it only watches, and when it is alarmed."""
    return {
        "rewards": trained,
        "service": dict(SERVICE),
        "reward_scale": "raw",  # group: each reward in units of its spread within a group
        "energy_distance": energy_distance,  # against collapse: pictures distributed like those of the training set
        "energy_distance_scope": scope,  # prompt: like those of the same prompt
        "rewards_heldout": {"graded": 1.0, "strict": 1.0, "coherence": 0.0},  # weights of the alarm
        "alarm": {"fast": 0.8, "slow": 0.95, "trend": 1.0, "drift": 0.5},
    }
