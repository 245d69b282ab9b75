"""The real stages at sizes that train in seconds; a config file too, for tests that need a process of their own.

Eight devices divide every batch. Plain gradient descent: Adam turns the rounding of a gradient near zero into a
full step, which no two splits of a batch share.
"""

from configs import judge as judge_config
from configs import kl_vae as kl_vae_config
from configs import mar as mar_config
from configs import marval as marval_config
from configs import marval_rl as marval_rl_config
from configs import mask_grpo as mask_grpo_config
from configs import maskfocus as maskfocus_config
from configs import maskgit as maskgit_config
from configs import shortcut as shortcut_config
from configs import speed_rl as speed_rl_config
from configs import tokenizer as tokenizer_config

SGD = {
    "name": "sgd",
    "learning_rate": 0.1,
    "muon_learning_rate": 0.02,
    "b1": 0.9,
    "warmup_steps": 0,
    "decay": "constant",
}
SPLIT_SIZES = {"train": 96, "validation": 64}  # of shapes; see tests/tasks/conftest.py


def get_config(stage: str = "speed_rl"):
    """Return the config of a stage; `digits` is a maskgit of another set."""
    stages = (tokenizer, judge, maskgit, digits, speed_rl, mask_grpo, maskfocus, shortcut)
    stages += (kl_vae, mar, marval, marval_rl)
    return {make.__name__: make for make in stages}[stage]()


def tokenizer(argument: str = "smoke"):
    """A 4 x 4 grid of 16 codes."""
    config = tokenizer_config.get_config(argument)
    config.update({"num_steps": 4, "eval_samples": 16, "save_every": 2})
    config.model.update({"patch": 8, "codebook_size": 16, "code_width": 4, "hidden": 16, "decoder_width": 8})
    config.optimizer = SGD | {"ema_decay": 0.5}
    return config


def judge(argument: str = "smoke"):
    """The cells of shapes, or the classes of digits; trained for long enough to tell pictures apart."""
    config = judge_config.get_config(argument)
    config.update({"num_steps": 60, "eval_samples": 16})
    config.model.width = 8
    config.optimizer.learning_rate = 3e-3
    return config


def maskgit(argument: str = "smoke"):
    """One plain block of width 16 on 16 tokens."""
    config = maskgit_config.get_config(argument)
    config.parents = {"tokenizer": tokenizer(argument), "judge": judge(argument)}
    config.update({"num_steps": 4, "save_every": 2, "batch_size": 16})
    config.model.update({"width": 16, "depth": 1, "heads": 2, "mlp_width": 32})
    config.model.update({"conv_stem": False, "pooled_width": 0, "relative_bias": False, "local_mixing": False})
    config.optimizer = SGD | {"ema_decay": 0.5}
    config.sampler.update({"num_steps": 4, "max_steps": 4})
    config.evaluation.update({"prompts": 8, "steps": (2, 4), "glance_steps": 4, "keep": 2})
    return config


def digits():
    """Class conditioned, on the other set."""
    return maskgit("digits-smoke")


def speed_rl():
    """Four calls at most, four groups of four, filters that have a history from the first update on."""
    config, base = speed_rl_config.get_config("smoke"), maskgit()
    config.parents = {"tokenizer": base.parents.tokenizer, "judge": base.parents.judge, "maskgit": base}
    config.update({"num_steps": 6, "batch_size": 16, "group": 4, "micro_batch": 4, "save_every": 2})
    config.policy.update({"action": "stride", "order": "confident", "noise": 1.0})
    config.policy.update({"max_calls": 4, "divisors": (4, 3, 2, 1), "centre": 2.0, "target_calls": 2, "levels": 2})
    config.policy.step_set = (2, 4)
    config.credit.update(
        {
            "min_calls": 1,
            "lambda_zero_until": 1,
            "lambda_full_at": 3,
            "history": 16,
            "history_min": 4,
            "gate": "hard",
            "low_quality": "drop",
        }
    )
    config.credit.percentile = 50.0
    config.resample.groups = 2
    config.loss.tokens.chunk = 32
    # Slow: untrained pictures are about equally bad, so that advantages multiply the rounding of their scores.
    config.optimizer = SGD | {"learning_rate": 0.02, "ema_decay": 0.5, "rates": (("^head", 3.0),)}
    config.evaluation.update({"prompts": 8, "steps": (2, 4), "keep": 2, "batch_size": 16})
    return config


def _on_tiny_base(config):
    """Eight groups of two, four sampling steps."""
    base = maskgit()
    config.parents = {"tokenizer": base.parents.tokenizer, "judge": base.parents.judge, "maskgit": base}
    config.update({"num_steps": 4, "batch_size": 16, "group": 2, "micro_batch": 4, "save_every": 2})
    config.loss.chunk = 32
    # A tiny base shows nothing that was asked for.
    config.rewards = {"judge": 1.0, "judge_whole": 1.0}
    config.optimizer = SGD | {"learning_rate": 0.02, "ema_decay": 0.5}
    config.evaluation.update({"prompts": 8, "steps": (2, 4), "keep": 2, "batch_size": 16})
    return config


def maskfocus():
    """Two of four candidate steps."""
    return _on_tiny_base(maskfocus_config.get_config("smoke"))


def mask_grpo():
    """A filter that has a history from the first update on."""
    config = _on_tiny_base(mask_grpo_config.get_config("smoke"))
    config.filter.update({"percentile": 50.0, "history": 16, "history_min": 4})
    return config


def shortcut():
    """Four sampling steps, three pairs a branch, three minibatches a buffer."""
    config, base = shortcut_config.get_config("smoke"), maskgit()
    config.parents = {"tokenizer": base.parents.tokenizer, "judge": base.parents.judge, "maskgit": base}
    config.update({"num_steps": 4, "batch_size": 8, "save_every": 2})
    config.optimizer = SGD | {"learning_rate": 0.02, "ema_decay": 0.5}
    config.teacher.epochs = 1
    config.curve.update({"calibration": 8, "timing_runs": 2})
    config.evaluation.update({"prompts": 8, "steps": (2, 4), "keep": 2, "batch_size": 16})
    return config


def kl_vae():
    """A 4 x 4 grid of 4 channels."""
    config = kl_vae_config.get_config("smoke")
    config.update({"num_steps": 4, "eval_samples": 16, "save_every": 2})
    config.model.update({"patch": 8, "hidden": 16, "decoder_width": 8})
    config.optimizer = SGD | {"ema_decay": 0.5}
    return config


def mar():
    """One block of width 16."""
    config = mar_config.get_config("smoke")
    config.parents = {"tokenizer": kl_vae(), "judge": judge()}
    config.update({"num_steps": 4, "save_every": 2})
    config.model.update({"width": 16, "head_width": 16})
    config.optimizer = SGD | {"learning_rate": 0.02, "ema_decay": 0.5}
    config.sampler.update({"num_steps": 2, "inner_steps": 4})
    config.evaluation.update({"prompts": 8})
    return config


def marval():
    """One update of each of its three kinds, one more of the last."""
    config, teacher = marval_config.get_config("smoke"), mar()
    config.parents = {**teacher.parents, "mar": teacher}
    config.update({"num_steps": 4, "save_every": 2})
    config.distillation.repeats = 2
    config.regression.chain_steps = 4
    for name in ("optimizer", "auxiliary_optimizer", "regression_optimizer"):
        config[name] = SGD | {"learning_rate": 0.02} | ({"ema_decay": 0.5} if "ema_decay" in config[name] else {})
    config.evaluation.update({"prompts": 8})
    return config


def marval_rl():
    """Two iterations; whole pictures are asked for, since a tiny student shows nothing that was asked for."""
    config, student = marval_rl_config.get_config("smoke"), marval()
    config.parents = {**student.parents, "marval": student}
    config.rollout.update({"num_steps": 2})
    config.rewards = {"judge": 1.0, "judge_whole": 1.0}
    config.optimizer = SGD | {"learning_rate": 0.02, "ema_decay": 0.5}
    config.evaluation.update({"prompts": 8})
    return config


def changed(stage: str, changes: dict):
    """The config of a stage with other values at dotted paths; rewards are replaced whole."""
    config = get_config(stage)
    for path, value in changes.items():
        if path in ("rewards", "rewards_heldout"):
            config[path] = value
            continue
        place, _, key = path.rpartition(".")
        owner = config
        for name in filter(None, place.split(".")):
            owner = owner[name]
        with owner.ignore_type():
            owner[key] = value
    return config
