"""Stage `marval_rl` on random weights: policy gradient, anchors, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import marval_rl as marval_rl_config
from maskrl_jax.axis import Axis
from maskrl_jax.data.dataset import conditioning_of
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel
from maskrl_jax.tasks.marval_rl import Wiring
from tests.continuous import images, random_networks

ROWS = 4
RATE = 30.0  # random networks feel little of a reward, and a step is seen through the rounding of the parameters
ALONE = Axis(1, Parallel("sharded", jax.local_devices()[:1]))


def wiring_of(**changes):
    config = marval_rl_config.get_config("smoke")
    config.batch_size, config.policy.group, config.truncation.detach_context = ROWS, 2, False
    config.anchor.update({"kind": "none", "weight": 0.0, "by": "loss"})
    config.update(changes)
    return Wiring(config, conditioning_of(config.data))


def networks():
    return random_networks(wiring_of())


def request(wiring):
    rows = np.arange(ROWS, dtype=np.int32)
    cond = np.tile(np.int32(wiring.base.null), (ROWS, 1))
    target = np.tile(np.int32([1, 0, 0]), (ROWS, 1))
    return {"cond": cond, "target": target, "index": rows, "round": np.zeros(ROWS, np.int32)}


def pictures(wiring):
    return {name: value for name, value in request(wiring).items() if name != "target"} | {
        "image": images(wiring, ROWS)
    }


def one_update(wiring, batch):
    network, frozen = networks()

    state = jax.jit(wiring.init)(network, network)
    return state, *jax.jit(functools.partial(wiring.update, axis=ALONE))(state, frozen, batch)


@pytest.mark.parametrize("iterations", [0, 2])
def test_fresh_rollouts_have_a_likelihood_ratio_of_one(iterations):
    """What an update computes anew of a rollout, one iteration at a time, is what the rollout drew."""
    wiring = wiring_of(gradient="policy", policy={"iterations": iterations})
    network, frozen = networks()
    batch = request(wiring)
    made = jax.jit(functools.partial(wiring.policy.rollout, axis=ALONE))(network, frozen, batch)
    state, after, metrics = one_update(wiring, batch | made)
    assert float(metrics["rl/approximate_kl"][0]) < 1e-3
    assert float(metrics["rl/kl"][0]) < 1e-5
    assert int(after.step) == 1 and int(after.bad_total) == 0
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, after.params)))


def test_the_distillation_as_an_anchor_trains_its_auxiliary_network_along():
    wiring = wiring_of(anchor={"kind": "gsim", "weight": 0.5})
    before, after, metrics = one_update(wiring, request(wiring) | {"pictures": pictures(wiring)})
    assert float(metrics["train/anchor_grad_share"][0]) > 0
    assert int(after.bad_total) == 0
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), *(s.extra["auxiliary"].params for s in (before, after)))
    assert any(jax.tree.leaves(moved))


@functools.cache
def descended(kind, weight, by="loss"):
    """(wiring, batch, parameters after one step of plain descent, through the last iteration) of a moved student."""
    anchor = {"kind": kind, "weight": weight, "by": by}
    plain = {"name": "sgd", "learning_rate": RATE, "b1": 0.0, "clip_norm": 0.0, "decay": "constant", "ema_decay": 0.0}
    wiring = wiring_of(anchor=anchor, optimizer=plain, truncation={"iterations": 1})
    network, frozen = networks()
    left = jax.tree.map(lambda x: 1.05 * x, network)
    batch = request(wiring) | ({"pictures": pictures(wiring)} if weight else {})
    update = jax.jit(functools.partial(wiring.update, axis=ALONE))
    return wiring, batch, update(jax.jit(wiring.init)(left, network), frozen, batch)[0].params


@pytest.mark.parametrize(("by", "weight", "rtol"), [("loss", 0.5, 1e-7), ("gradient", 50.0, 1e-2)])
def test_an_anchor_s_gradient_is_added(by, weight, rtol):
    """Plain descent from a student that has left its place: the anchor's share of the step is weight x its gradient.

    By gradient, that gradient is first made as long as the reward's.
    """
    network, frozen = networks()
    left = jax.tree.map(lambda x: 1.05 * x, network)
    _, _, alone = descended("none", 0.0)
    wiring, batch, both = descended("l2_ref", weight, by)

    def held(params):
        ready = wiring.marval.prepared(frozen, batch["pictures"])
        return wiring.anchor_loss(params, frozen, None, ready) / ready["weight"]

    pull = jax.jit(jax.grad(held))(left)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(pull)) > 1e-3
    found = jax.tree.map(lambda x, y: (x - y) / RATE, alone, both)
    if by == "gradient":
        moved = optax.tree.norm(jax.tree.map(lambda start, end: start - end, left, alone))
        assert moved > 1e-3  # small even at this rate, so the weight is large
        weight *= moved / RATE / optax.tree.norm(pull)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, weight * b, rtol=rtol, atol=2e-6), found, pull)


def test_smoothing_is_noise_on_the_tokens_that_are_scored():
    """Of the standard deviation that was asked for, each sample with its own; the rollout stays the same."""

    def noise(params, frozen, batch):
        seen = []
        for smoothing in (0.0, 0.3):
            wiring = wiring_of(smoothing=smoothing)
            wiring.score = lambda frozen, tokens, target: (seen.append(tokens) or tokens.mean((1, 2)), {})
            wiring.by_reward(params, frozen, batch)
        return seen[1] - seen[0]

    found = jax.jit(noise)(*networks(), request(wiring_of())).reshape(ROWS, -1)
    np.testing.assert_allclose(found.std(1), 0.3, rtol=0.15)
    assert np.abs(np.corrcoef(found) - np.eye(ROWS)).max() < 0.3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gradient": "both"}, "gradient"),
        ({"anchor": {"kind": "elastic", "weight": 1.0}}, "anchor.kind"),
        ({"anchor": {"weight": 1.0}}, "anchor.weight"),
        ({"anchor": {"kind": "gsim", "weight": 1.0, "by": "length"}}, "anchor.by"),
        ({"truncation": {"iterations": 9}}, "exceeds"),
        ({"gradient": "policy", "truncation": {"iterations": 2}}, "truncation"),
        ({"gradient": "policy", "smoothing": 0.1}, "smoothing"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"rewards": {"compositional": 1.0}}, "no gradient"),
        ({"policy": {"deviation": -1.0}}, "deviation"),
        ({"evaluation": {"steps": (4, 128)}}, "128"),
        ({"gradient": "policy", "policy": {"iterations": 9}}, "exceeds"),
        ({"gradient": "policy", "policy": {"group": 3}}, "groups of 3"),
    ],
)
def test_bad_settings_are_refused(changes, named):
    with pytest.raises((ValueError, UserError), match=named):
        wiring_of(**changes)
