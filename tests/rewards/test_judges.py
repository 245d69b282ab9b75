"""One interface to judges: what it says is what the networks and formulas behind it say."""

import functools
import json

import clip_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import judge as judge_config
from maskrl_jax.errors import UserError
from maskrl_jax.models.clip import LAION_H14, PUBLISHED
from maskrl_jax.models.judge import Judge, JudgeConfig
from maskrl_jax.rewards import clip, judge, judges

pytest.importorskip("tokenizers", reason="needs the package tokenizers")
PROMPTS = ("a cat", "red dog", "a cat", "cat cat")
SIZES = judges.settings_of(clip_weights.SMALL)


def images(side=15):
    return np.random.RandomState(5).uniform(0, 1, (4, side, side, 3)).astype(np.float32)


def model(*names, **changes):
    return {
        "kind": "clip",
        "rewards": dict.fromkeys(names, SIZES),
        "dtype": "float32",
        "remat": False,
        "batch_size": 32,
        **changes,
    }


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Folders of every reward, each with weights of its own, and the tokenizer where a stage keeps it."""
    root = tmp_path_factory.mktemp("stage")
    for seed, name in enumerate(clip.KINDS):
        clip_weights.write_reward(root / name, seed)
    (root / judges.TOKENIZER).mkdir()
    clip_weights.write_tokenizer(root / judges.TOKENIZER)
    return root


@pytest.fixture(scope="module")
def weights(stage):
    """Variables of every reward."""
    return {name: clip.read_reward(name, str(stage / name))[1] for name in clip.KINDS}


@functools.cache
def scored(**changes):
    """A program of all four rewards."""
    return jax.jit(judges.judge_of(model(*clip.KINDS, **changes)).measured)


@pytest.mark.parametrize("kind", ["cells", "class"])
def test_a_trained_judge_scores_by_its_network_bit_for_bit(kind):
    sizes = JudgeConfig(kind, num_classes=17, patch=4, width=6)
    found, cond, texts = judges.TrainedJudge(sizes), np.int32([3, 1]), ["a red circle", "a yellow cross"]
    params = Judge(sizes).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    target = found.targets(cond, texts)
    np.testing.assert_array_equal(target, judge.targets(kind, cond, texts))
    assert target.shape == (2, *found.target_shape) and found.names == judge.names(kind)
    x = images(16)[:2]

    @jax.jit
    def directly(params, x, target):
        outputs = Judge(sizes).apply(params, x)
        return judge.score(kind, outputs, target) | {"features": outputs["features"]}

    expected, measured = directly(params, x, target), jax.jit(found.measured)(params, x, target)
    jax.tree.map(np.testing.assert_array_equal, measured, expected)
    np.testing.assert_array_equal(jax.jit(found.features)(params, x), expected.pop("features"))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(found.score)(params, x, target), expected)
    alike(found.abstract(16), params)


def alike(shapes, params):
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_rewards_of_a_clip_are_those_of_the_library(stage, weights):
    found = judges.judge_of(model(*reversed(clip.KINDS)), str(stage))
    assert found.names == tuple(clip.KINDS) and found.without_gradient == () and found.target_shape == (9,)
    target = found.targets(np.zeros((4, 3)), PROMPTS)
    assert target.dtype == np.int32 and target.shape == (4, 9)
    measured = scored()(weights, images(), target)
    for name in clip.KINDS:
        expected = clip.open_reward(name, str(stage / name)).score(images(), PROMPTS)
        np.testing.assert_allclose(measured[name], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(measured["features"], axis=1), 1, rtol=1e-5)
    features = jax.jit(found.features)(weights, images())
    np.testing.assert_allclose(features, measured["features"], atol=1e-6)
    assert found.rewards[0].kind == "clip_score" and set(measured) == {*found.names, "features"}


def test_no_text_tower_is_kept_that_nothing_reads(weights):
    found = judges.judge_of(model(*clip.KINDS))
    needed = {reward.kind: reward.needed(weights[reward.kind]) for reward in found.rewards}
    alike(found.abstract(32), needed)
    assert set(needed["aesthetic"]["clip"]["params"]) == {"picture", "logit_scale"}
    target = np.full((4, 9), 520, np.int32)
    np.testing.assert_array_equal(
        scored()(needed, images(), target)["aesthetic"], scored()(weights, images(), target)["aesthetic"]
    )


def test_what_reads_no_prompt_needs_no_tokenizer():
    found = judges.judge_of(model("aesthetic"))
    assert found.targets(np.zeros(2), ["a cat", ""]).tolist() == [[0], [0]] and found.target_shape == (1,)
    with pytest.raises(UserError, match="no vocab.json with merges.txt"):
        judges.judge_of(model("hps"), "nowhere").targets(np.zeros(1), ["a cat"])


def test_the_gradient_reaches_every_picture_and_is_the_same_however_it_is_computed(stage, weights):
    target = judges.judge_of(model("hps"), str(stage)).targets(np.zeros(4), PROMPTS)

    def slope(**changes):
        found = judges.judge_of(model("pick_score", "hps", **changes))
        return jax.jit(jax.grad(lambda x: sum(v.sum() for v in found.score(weights, x, target).values())))(images())

    found = np.asarray(slope())
    assert np.isfinite(found).all() and (np.abs(found).max(axis=(1, 2, 3)) > 1e-6).all()
    np.testing.assert_allclose(slope(remat=True, batch_size=3), found, atol=2e-6 * np.abs(found).max())


def test_half_precision_is_near_and_gives_float32(weights):
    target = np.full((4, 9), 520, np.int32)
    rough, exact = scored(dtype="bfloat16")(weights, images(), target), scored()(weights, images(), target)
    for name in clip.KINDS:
        assert rough[name].dtype == np.float32
        np.testing.assert_allclose(rough[name], exact[name], atol=0.05 * np.abs(exact[name]).max() + 0.05)


@pytest.mark.parametrize("argument", judge_config.PUBLISHED)
def test_published_sizes_have_their_parameters(argument):
    found = judges.judge_of(judge_config.get_config(argument).model)
    whole = {"b32": 151_277_313, "l14": 427_616_513, "h14": 986_109_441}
    wanted = judge_config.PUBLISHED[argument]
    counts = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in found.abstract(256).items()}
    for name in set(wanted) - {"aesthetic"}:
        assert counts[name] == whole[wanted[name]]
    if "aesthetic" in wanted:  # the picture tower with its projection, the scale, and the predictor's five layers
        assert counts["aesthetic"] == 303_966_208 + 1 + 927_969
    assert found.target_shape == (77,)


def test_sizes_go_into_a_config_and_come_back():
    assert judges.settings_of(LAION_H14) == "h14" and judges.sizes_of("b32") is PUBLISHED["b32"]
    assert judges.sizes_of(json.loads(json.dumps(SIZES))) == clip_weights.SMALL


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (model(), "has no rewards"),
        (model("beauty"), "unknown reward of a judge of model.kind=clip 'beauty'"),
        (model(rewards={"hps": "h15"}), "unknown CLIP 'h15'; did you mean 'h14'"),
        (model(rewards={"hps": {"text": {}}}), "sizes of a CLIP are one of b32"),
        (model(rewards={"hps": "h14", "clip_score": SIZES}), "texts of other sizes"),
        (model("hps", batch_size=0), "batch_size 0 must be at least 1"),
        ({"kind": "cell"}, "'cell' is not one of cells, class"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings, message):
    with pytest.raises((UserError, ValueError), match=message) as found:
        judges.judge_of(settings)
    assert "\n" not in str(found.value)
