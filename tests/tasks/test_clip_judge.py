"""Rewards of a CLIP inside training programs: tuned by, measured by, differentiated, and compiled without weights."""

import json
import os

import clip_weights
import jax
import numpy as np
import pytest
import tiny

from configs import judge as judge_config
from configs import marval_rl as marval_rl_config
from maskrl_jax import checkpoint, published, runner, stored
from maskrl_jax.data.dataset import conditioning_of, open_dataset
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.systems import judge_scorer
from maskrl_jax.parallel import Parallel
from maskrl_jax.rewards import clip, judges
from maskrl_jax.tasks import judge, marval_rl
from maskrl_jax.tasks.task import Context, Parent
from tests.continuous import random_networks

pytest.importorskip("tokenizers", reason="needs the package tokenizers")
REWARDS = {"hps": 1.0, "clip_score": 0.01}


@pytest.fixture(scope="module")
def clip_judge(tmp_path_factory):
    """A converted stage of three rewards at sizes of a test."""
    root = tmp_path_factory.mktemp("clip")
    for seed, name in enumerate(("clip_score", "pick_score", "hps")):
        clip_weights.write_reward(root / "weights" / name, seed)
    out = str(root / "stage")
    published.read("clip-rewards", str(root / "weights"), out, below={}, store=str(root / "store"))
    params, extra = checkpoint.load_params(out)
    return Parent(stored.read_config(out), params, extra, out)


def tuned(**changes):
    """Tiny speed_rl by rewards of a CLIP, in their own units, with another one held out."""
    config = tiny.changed("speed_rl", {"rewards": REWARDS, "rewards_heldout": {"pick_score": 1.0, "graded": 1.0}})
    config.update({"num_steps": 2, "reward_scale": "group", **changes})
    config.credit.update({"gate": "off", "low_quality": "off", "percentile": 0.0})
    config.resample.rounds = 0
    config.evaluation.update({"steps": (4,), "timing_repeats": 0})
    return config


def test_two_updates_and_a_report(trained, clip_judge, tmp_path):
    config = tuned()
    config.parents.judge = clip_judge.config
    parents = trained.parents | {"judge": clip_judge}
    context = Context(config, parents, Parallel("pmap", jax.local_devices()[:1]), trained.store, str(tmp_path))
    task = runner.build(context)
    state = task.init(jax.random.key(0))
    batch = task.batch(0)
    assert batch["target"].shape == (16, 9) and (batch["target"][:, 0] == 519).all()
    for step in range(2):
        with jax.transfer_guard("allow" if step == 0 else "disallow"):
            state, metrics = task.step(state, task.batch(step))
    values = {name: x for name, x in jax.device_get(metrics).items() if not isinstance(x, tuple)}
    assert all(np.isfinite(x) for x in values.values()) and int(state.bad_total) == 0
    assert {"reward/hps", "reward/clip_score", "reward/hps_std", "reward_heldout/pick_score"} <= set(values)
    assert "reward/pick_score" not in values and values["reward/hps_std"] > 0
    expected = sum(weight * values[f"reward/{name}"] for name, weight in REWARDS.items())
    np.testing.assert_allclose(values["reward/quality"], expected, rtol=1e-5)
    task.report(context.parallel.whole(state.ema))
    points = json.loads((tmp_path / "results.json").read_text())["points"]
    assert all({"graded", "clip_score", "pick_score", "hps"} <= set(point["metrics"]) for point in points)
    text = (tmp_path / "report.md").read_text()
    assert "| CLIPScore | PickScore | HPSv2.1 |" in text
    assert "Held out: the exact verifier, pick_score, the prompts" in text and "clip_score x 0.01, hps x 1" in text


def test_the_scores_of_a_rollout_are_those_of_the_library(clip_judge):
    """Of a set of classes, whose prompts are their names."""
    digits = open_dataset("digits", "validation", "", 32)
    found = judge_scorer(judge.load(clip_judge), clip_judge.params, digits)
    examples = digits.take(np.arange(4))
    prompts = digits.describe(examples["cond"])
    images = np.float32(examples["image"]) / 255
    scores = found(images, prompts)
    folder = os.path.join(os.path.dirname(clip_judge.workdir), "weights", "hps")
    expected = clip.open_reward("hps", folder).score(images, prompts)
    np.testing.assert_allclose(scores["hps"], expected, atol=1e-5)
    assert found.verify is None and scores["features"].shape == (4, 6)


def test_a_gradient_goes_through_the_reward_into_the_tokens(clip_judge):
    """Of marval_rl, with the tokens' decoder between."""
    config = marval_rl_config.get_config("smoke")
    config.anchor.update({"kind": "none", "weight": 0.0})
    conditioning = conditioning_of(config.data)
    _, frozen = random_networks(marval_rl.Wiring(config, conditioning))
    config.parents.judge, config.rewards = clip_judge.config, REWARDS
    wiring = marval_rl.Wiring(config, conditioning)
    target = judge.load(clip_judge).targets(np.zeros(2), ["a red circle", "a yellow cross"])
    frozen = frozen | {"judge": clip_judge.params}
    sizes = wiring.base.sizes
    tokens = jax.random.normal(jax.random.key(0), (2, sizes.num_tokens, sizes.channels))
    slope, scores = jax.jit(
        jax.grad(lambda t: (wiring.score(frozen, t, target)[0].sum(), wiring.score(frozen, t, target)[1]), has_aux=True)
    )(tokens)
    assert np.isfinite(slope).all() and (np.abs(slope).max(axis=(1, 2)) > 0).all()
    assert set(scores) == {"clip_score", "pick_score", "hps", "quality"}


def test_a_stage_is_compiled_without_weights_or_tokenizer():
    """Published sizes; a program of each: rollout and update."""
    config = tuned(batch_size=8)
    config.parents.judge = judge_config.get_config("clip")
    assert set(judges.judge_of(config.parents.judge.model).names) == set(clip.KINDS)
    parallel = Parallel(config.parallel)
    for phase in runner.phases(config, parallel):
        state, frozen, batch = phase.args
        program = (parallel.update if phase.kind == "update" else parallel.map)(phase.fn)
        arguments = (parallel.abstract(state), parallel.abstract(frozen), parallel.abstract_batch(batch))
        assert program.jaxpr(*arguments).eqns


def test_a_converted_judge_is_known_before_anything_is_trained(clip_judge):
    config = tuned()
    with pytest.raises(UserError, match="unknown reward 'clip_score'; this judge gives: judge, judge_shown"):
        runner.check(config)
    config.init.judge = clip_judge.workdir
    runner.check(config)
    config.rewards = {"aesthetic": 1.0}
    with pytest.raises(UserError, match="unknown reward 'aesthetic'; this judge gives: clip_score, pick_score, hps"):
        runner.check(config)
    config.rewards, config.rewards_heldout = {"hps": 1.0}, {"hps": 1.0}
    with pytest.raises(UserError, match="trained on and held out"):
        runner.check(config)


@pytest.mark.parametrize("argument", judge_config.PUBLISHED)
def test_a_clip_is_not_trained_here(argument):
    config = judge_config.get_config(argument)
    assert config.name == f"configs/judge.py:{argument}"
    with pytest.raises(UserError, match="not trained here; convert its published weights .*--from=clip-rewards"):
        runner.check(config)


def test_names_of_the_verifier_are_watched_only_where_there_is_one(clip_judge):
    """Of captions that no verifier reads there are the judge's scores alone."""
    config = tuned()
    config.parents.judge = clip_judge.config
    wiring = runner.task_module(config).Wiring(config, conditioning_of("shapes"))
    assert wiring.base.held_out == {"pick_score": 1.0, "graded": 1.0}
    for data in (config.data, config.parents.maskgit.data):
        data.name = "prompts.jsonl"
    wiring = runner.task_module(config).Wiring(config, conditioning_of("shapes"))
    assert wiring.base.held_out == {"pick_score": 1.0}
