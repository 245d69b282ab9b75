"""What all stages' configs share: the keys of a run, and the check of a config's argument."""

from ml_collections import ConfigDict


def check(arg: str, known: tuple[str, ...]) -> str:
    """Return the argument; ValueError with the known ones where it is another."""
    if arg not in known:
        raise ValueError(f"unknown config argument {arg!r}; choose one of: {', '.join(a or '(none)' for a in known)}")
    return arg


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
            "parallel": "pmap",
            "max_bad_steps": 20,
            "parents": {},
            "init": {},
            **keys,
        }
    )
