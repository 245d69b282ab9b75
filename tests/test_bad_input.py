"""What a user can get wrong on the real stages: one line that says what is wrong, before anything is trained."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from configs import judge, maskgit, speed_rl, tokenizer
from maskrl_jax import loop, runner, stored
from maskrl_jax.checkpoint import Checkpoints, load_arrays
from maskrl_jax.data import shapes
from maskrl_jax.data.dataset import conditioning_of, open_dataset
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel
from maskrl_jax.writers import read_metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(shapes, "SPLIT_SIZES", tiny.SPLIT_SIZES)


@pytest.fixture
def nothing_trains(monkeypatch):
    def train(*_):
        raise AssertionError("trained before the mistake was found")

    monkeypatch.setattr(loop, "train", train)


def refused(config, tmp_path):
    with pytest.raises(UserError) as error:
        runner.run(config, str(tmp_path / "run"), str(tmp_path / "store"))
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(config, changes):
    for path, value in changes.items():
        owner, (*places, key) = config, path.split(".")
        for place in places:
            owner = owner[place]
        owner[key] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # impossible sizes
        ({"batch_size": 20}, "batch of 20 does not divide by 8 devices"),
        ({"batch_size": 24, "group": 16}, "batch_size 24 rollouts do not fill groups of 16"),
        ({"evaluation.batch_size": 12}, "batch of 12 does not divide by 8 devices"),
        ({"parents.maskgit.sampler.num_steps": 65, "parents.maskgit.sampler.max_steps": 65}, "must lie in 1..64"),
        ({"evaluation.steps": (4, 32)}, "evaluation.steps: num_steps 32 must lie in 1..max_steps (24)"),
        ({"evaluation.steps": (16, 4)}, "must rise"),
        ({"policy.max_calls": 96, "policy.divisors": (96, 4)}, "96 exceeds the 64 image tokens"),
        ({"policy.max_calls": 7, "policy.divisors": (7, 1)}, "7 does not divide the clock of 960"),
        ({"policy.action": "stride", "policy.max_calls": 12}, "must be max_calls (12)"),
        ({"parents.maskgit.model.heads": 3}, "width 64 is not divisible by heads 3"),
        ({"parents.tokenizer.model.patch": 5}, "image_size 32 is not divisible by patch 5"),
        ({"credit.min_calls": 24}, "min_calls 24 must lie between 0 and max_calls 24"),
        ({"credit.lambda_zero_until": 9, "credit.lambda_full_at": 3}, "lambda_full_at 3 is before"),
        ({"credit.history": 1}, "credit.history 1 does not hold"),
        # unknown names
        ({"task": "speed_lr"}, "unknown task 'speed_lr'; did you mean 'speed_rl'?"),
        ({"policy.kind": "adaptiv"}, "'adaptiv' is not one of adaptive, fixed, budget"),
        ({"policy.action": "jump"}, "'jump' is not one of stride, threshold"),
        ({"loss.tokens.likelihood": "soft"}, "'soft' is not one of"),
        (
            {"policy.kind": "budget", "credit.gate": "hard", "loss.tokens.kl": "k3"},
            "kl k3 needs tokens that the policy",
        ),
        ({"policy.kind": "budget"}, "set credit.gate=hard"),
        ({"credit.down_sample": 5}, "credit.down_sample 5 exceeds the 4 rollouts of a group"),
        ({"loss.tokens.kl": "k3"}, "kl k3 is unbiased only for tokens drawn from the model's own law"),
        ({"optimizer.rates": (("^modle", 0.0),)}, "no parameter matches '^modle'; there are head/"),
        ({"profile_at": 3}, "profile_at=3 is not a step of 3"),
        ({"policy.temperature": 0.0}, "policy.temperature 0.0 must be above 0"),
        ({"policy.noise": -1.0}, "noise -1.0 at least 0"),
        ({"loss.tokens.kl": "both"}, "'both' is not one of forward, reverse, k3"),
        ({"credit.gate": "none"}, "'none' is not one of hard, soft, off"),
        ({"credit.speed": "fast"}, "'fast' is not one of schedule, dual, off"),
        ({"policy.guidance_schedule": "flat"}, "'flat' is not one of constant, linear, cosine"),
        ({"parents.maskgit.sampler.schedule": "cubic"}, "'cubic' is not one of cosine"),
        ({"parents.judge.model.kind": "cell"}, "'cell' is not one of cells, class"),
        ({"rewards.judge_whol": 1.0}, "unknown reward 'judge_whol'"),
        ({"optimizer.name": "adam"}, "unknown optimizer.name 'adam'; did you mean 'adamw'?"),
        ({"parallel": "shard"}, "unknown parallel strategy 'shard'; did you mean 'sharded'?"),
        ({"init.tokenizer": "nowhere"}, "init.tokenizer=nowhere has no config.json; point it to a 'tokenizer' stage"),
        ({"init.tokeniser": "x"}, "unknown parent in init 'tokeniser'; did you mean 'tokenizer'?"),
    ],
)
def test_an_impossible_setting_is_refused_before_any_training(nothing_trains, tmp_path, changes, message):
    config = changed(speed_rl.get_config("smoke"), changes)
    assert message in refused(config, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed_rl.py:smok"], "unknown config argument 'smok'; choose one of: (none), full, smoke, meissonic"),
        (["speed_rl.py:smoke", "--config.policy.max_cals=8"], 'Did you mean "max_calls"'),
        (["speed_rl.py:smoke", "--config.polcy.kind=fixed"], 'Did you mean "policy"'),
        (["speed_rl.py:smoke", "--config.policy.kind=adaptiv"], "'adaptiv' is not one of adaptive, fixed, budget"),
    ],
)
def test_the_command_line_answers_in_one_line_with_exit_code_1(tmp_path, arguments, message):
    config, *rest = arguments
    command = [sys.executable, "-m", "maskrl_jax.main", f"--config=configs/{config}", *rest]
    command += [f"--workdir={tmp_path / 'run'}", f"--store={tmp_path / 'store'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_judge_that_cannot_read_the_labels_is_refused(nothing_trains, tmp_path):
    config = changed(judge.get_config("smoke"), {"data.name": "digits"})
    assert "a judge of 'digits' has model.kind=class and model.num_classes=10, not cells" in refused(config, tmp_path)


def test_a_picture_size_that_the_set_does_not_have_is_named(nothing_trains, tmp_path):
    config = changed(tokenizer.get_config("smoke"), {"model.image_size": 64})
    assert "shapes has pictures of 32 pixels, not 64" in refused(config, tmp_path)


@pytest.fixture
def stage(tmp_path):
    """Return stage(config, tree) -> a workdir with that config and a checkpoint of that tree (None: no checkpoint)."""

    def stage(config, tree):
        workdir = tmp_path / f"parent-{config.task}"
        workdir.mkdir()
        (workdir / stored.CONFIG).write_text(json.dumps(stored.plain(config)))
        if tree is not None:
            checkpoints = Checkpoints(str(workdir), Parallel("pmap"))
            checkpoints.save(1, tree)
            checkpoints.close()
        stored.finish(str(workdir), config.num_steps, "made up")
        return str(workdir)

    return stage


def with_tokenizer(workdir):
    return changed(maskgit.get_config("smoke"), {"init.tokenizer": workdir})


@pytest.fixture
def trained_judges(monkeypatch):
    """Let the stages beside the tokenizer count as trained."""
    parent = runner._parent
    monkeypatch.setattr(runner, "_parent", lambda name, *args: parent(name, *args) if name == "tokenizer" else None)


def test_a_parent_of_another_stage_is_named(nothing_trains, trained_judges, stage, tmp_path):
    workdir = stage(maskgit.get_config("smoke").parents.judge, None)
    message = refused(with_tokenizer(workdir), tmp_path)
    assert f"init.tokenizer={workdir} holds a 'judge' stage; point it to a 'tokenizer' stage" in message


def test_a_parent_without_config_or_checkpoint_is_named(nothing_trains, trained_judges, stage, tmp_path):
    assert "init.tokenizer=/nowhere has no config.json" in refused(with_tokenizer("/nowhere"), tmp_path)
    assert "no checkpoint under" in refused(with_tokenizer(stage(tokenizer.get_config("smoke"), None)), tmp_path)


def test_a_checkpoint_that_is_not_one_of_a_stage_is_named(nothing_trains, trained_judges, stage, tmp_path):
    workdir = stage(tokenizer.get_config("smoke"), {"weights": jax.numpy.ones(3)})
    assert "is damaged or not one of a stage" in refused(with_tokenizer(workdir), tmp_path)


def test_prompts_are_checked_word_by_word(tmp_path):
    dataset = open_dataset("shapes", "validation", str(tmp_path), 32)
    with pytest.raises(UserError, match="unknown word 'purple' in prompt 'a purple circle'; known words: a "):
        dataset.encode(["a purple circle"])
    with pytest.raises(UserError, match="empty prompt"):
        dataset.encode([""])
    text = "a red circle left of a blue square"
    with pytest.warns(UserWarning, match="cut to 8"):
        ids = dataset.encode([text + " above above above above"])
    np.testing.assert_array_equal(ids[:, :7], dataset.encode([text])[:, :7])
    assert ids.shape == (1, conditioning_of("shapes").length)


def test_gradients_that_are_not_finite_are_skipped_counted_and_at_last_stop_the_run(monkeypatch, tmp_path):
    alone = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: alone)
    config = tiny.get_config("tokenizer")
    config.update({"num_steps": 9, "max_bad_steps": 3, "log_every": 1, "save_every": 1})
    config.optimizer.learning_rate = 1e38  # the first update throws the parameters out of reach
    message = refused(config, tmp_path)
    assert "3 updates in a row had a gradient that is not finite" in message
    assert "lower optimizer.learning_rate" in message
    skipped = [line["train/skipped"] for line in read_metrics(str(tmp_path / "run")) if "train/skipped" in line]
    assert skipped[0] == 0 and skipped[-3:] == [1, 1, 1]
    saved = load_arrays(str(tmp_path / "run"), ("params", "step", "bad_total"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved["params"]))
    assert int(saved["bad_total"]) >= 1 and int(saved["step"]) < 9
