"""Stage `marval` on random weights: which network learns from what (specs/marval.md sections 5 and 15)."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import marval as marval_config
from maskrl_jax import state as train_state
from maskrl_jax.axis import Axis
from maskrl_jax.data.dataset import conditioning_of
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel
from maskrl_jax.tasks.marval import STUDENT_DRAW, Wiring
from tests.continuous import images, moved, random_networks

ROWS = 4
ALONE = Axis(1, Parallel("sharded", jax.local_devices()[:1]))


def wiring_of(prediction="noise", **changes):
    """Of a smoke run, whose head would predict a velocity: runs of that are in test_smoke.py."""
    config = marval_config.get_config("smoke")
    config.parents.mar.model.prediction = prediction
    config.batch_size, config.distillation.repeats = ROWS, 2
    config.update(changes)
    return Wiring(config, conditioning_of(config.data))


def batch_of(wiring):
    rows = np.arange(ROWS, dtype=np.int32)
    cond = np.tile(np.int32(wiring.base.null), (ROWS, 1))
    return {"image": images(wiring, ROWS), "cond": cond, "index": rows, "round": np.zeros(ROWS, np.int32)}


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def begun():
    """(wiring, student, auxiliary, teacher, frozen), three different networks."""
    wiring = wiring_of()
    teacher, frozen = random_networks(wiring)
    return wiring, moved(teacher, 5), moved(teacher, 6), teacher, frozen


@pytest.fixture(scope="module")
def objective(begun):
    """What the student minimises, with everything that it needs computed inside, and the gradients to all three."""
    wiring, *_, frozen = begun
    return jax.jit(jax.value_and_grad(functools.partial(loss, wiring, frozen), argnums=(0, 1, 2)))


def loss(wiring, frozen, student, auxiliary, teacher):
    ready = wiring.prepared(frozen | {"teacher": teacher}, batch_of(wiring))
    z, z_auxiliary = (wiring.conditions(p, "full", ready) for p in (student, auxiliary))
    networks = (student, auxiliary, teacher, z, z_auxiliary, ready["teacher"])
    return wiring.student_loss(*networks, wiring.draws(ready["keys"], STUDENT_DRAW), ready["counted"])[0]


def test_the_student_alone_learns_from_its_loss(begun, objective):
    _, student, auxiliary, teacher, _ = begun
    _, found = objective(student, auxiliary, teacher)
    assert largest(found[0]) > 1e-3
    assert largest(found[1:]) == 0


def test_the_gradient_of_the_loss_is_whole(begun, objective):
    """No path from the student to its loss is cut: along the gradient the loss moves as the gradient says."""
    _, student, auxiliary, teacher, _ = begun
    slope = objective(student, auxiliary, teacher)[1][0]
    norm = float(jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(slope))))

    def along(step):
        moved_on = jax.tree.map(lambda x, d: x + step * d / norm, student, slope)
        return float(objective(moved_on, auxiliary, teacher)[0])

    np.testing.assert_allclose((along(1e-3) - along(-1e-3)) / 2e-3, norm, rtol=2e-2)


def test_the_auxiliary_network_does_not_teach_the_student(begun):
    wiring, student, auxiliary, _, frozen = begun

    def after(student):
        state = wiring.init(auxiliary).replace(params=student)
        ready = wiring.prepared(frozen, batch_of(wiring))
        followed = wiring.follow(state, ready, ALONE)[0]
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(followed.params))

    assert largest(jax.jit(jax.grad(after))(student)) == 0


def test_a_bad_gradient_of_the_auxiliary_network_counts_once(begun):
    """In the warm-up, where the student does not learn, and after it, where the student's own is bad with it."""
    wiring, _, _, teacher, frozen = begun
    state = jax.jit(wiring.init)(teacher)
    dead = state.extra["auxiliary"].replace(params=jax.tree.map(lambda x: jnp.nan * x, teacher))
    state = state.replace(extra={"auxiliary": dead})
    for step in (wiring.warm_up, wiring.update):
        after, _ = jax.jit(functools.partial(step, axis=ALONE))(state, frozen, batch_of(wiring))
        assert (int(after.bad_steps), int(after.bad_total)) == (1, 1)


def test_rates_fall_over_the_updates_that_each_network_makes():
    """The student's to 0 at the end of either phase that it learns in; the auxiliary network's with all of its updates."""
    falls = {"decay": "linear", "warmup_steps": 0}
    changes = {"distillation": {"warm_up": 4, "auxiliary_steps": 3}, "regression": {"updates": 2}}
    optimizers = dict.fromkeys(("optimizer", "auxiliary_optimizer", "regression_optimizer"), falls)
    wiring = wiring_of(num_steps=12, **changes, **optimizers)
    found = (wiring.regressor.optimizer, 2), (wiring.optimizer, 6), (wiring.auxiliary_optimizer, 30)
    for optimizer, updates in found:
        rate = train_state.learning_rate(optimizer, 1.0)
        assert float(rate(updates - 1)) > 0 and float(rate(updates)) == 0


@pytest.mark.parametrize("over", ["token", "image"])
def test_times_are_spread_over_the_repetitions(over):
    wiring = wiring_of(distillation={"repeats": 4}, loss={"over": over, "first": 100, "last": 499})
    times = np.asarray(wiring.draws(jax.random.split(jax.random.key(0), 3), STUDENT_DRAW)[2])
    spans = np.broadcast_to(np.arange(4)[:, None, None], times.shape)
    np.testing.assert_array_equal((times - 100) // 100, spans)
    assert (times.min(-1) == times.max(-1)).all() == (over == "image")


def test_a_velocity_is_turned_into_the_token_that_it_says():
    """With a head that says v = alpha noise - sigma x_0 of a known token, one call gives that token."""
    wiring = wiring_of(model={"form": "x0", "time": 700, "scale": "sigma"})
    sizes = dataclasses.replace(wiring.base.sizes, prediction="velocity")
    wiring.base = types.SimpleNamespace(sizes=sizes)
    alpha, sigma = wiring.process.alpha[700], wiring.process.sigma[700]
    zeta, token = (jax.random.normal(jax.random.key(i), (5, sizes.channels)) for i in range(2))
    noise = (sigma * zeta - alpha * token) / sigma  # so that sigma zeta is the token with this noise
    said = jnp.concatenate([alpha * noise - sigma * token, noise], -1)
    wiring.network = types.SimpleNamespace(outputs=lambda *_: said)
    np.testing.assert_allclose(wiring.tokens(None, None, zeta), token, atol=1e-5)


def test_the_regression_teaches_the_student_alone_what_the_chain_ends_in(begun):
    """One batch again and again: tokens come nearer to the chain's ends, and nothing but the student moves."""
    _, _, _, teacher, frozen = begun
    wiring = wiring_of("velocity", num_steps=20, regression={"updates": 8})
    state = first = jax.jit(wiring.init)(teacher)
    update, distances = jax.jit(functools.partial(wiring.regressor.update, axis=ALONE)), []
    for _ in range(8):
        state, metrics = update(state, frozen, batch_of(wiring))
        distances.append(float(metrics["train/regression"][0] / metrics["train/regression"][1]))
    assert distances[-1] < 0.8 * distances[0]
    assert int(state.step) == 8
    for kept in (lambda s: s.extra["auxiliary"], lambda s: s.opt_state):
        jax.tree.map(np.testing.assert_array_equal, kept(first), kept(state))


def test_the_chain_that_is_regressed_is_the_guided_teacher_s(begun):
    """Step by step: x_0 of the guided noise, put back at the next earlier time with that noise."""
    wiring, _, _, teacher, frozen = begun
    wiring = wiring_of("velocity", loss={"guidance": 1.7}, regression={"updates": 1, "chain_steps": 3})
    ready = jax.jit(wiring.prepared)(frozen, batch_of(wiring))
    zeta = wiring.draws(ready["keys"], STUDENT_DRAW)[0]
    found = jax.jit(wiring.regressor.ends)(teacher, ready["teacher"], zeta)

    @jax.jit
    def noise_at(x, time):
        known = [wiring.network.condition(teacher, z)[None] for z in ready["teacher"]]
        own, null = (jnp.split(wiring.network.head(teacher, x, time, z), 2, -1)[0] for z in known)
        return null + 1.7 * (own - null)

    x = zeta
    alphas, sigmas = wiring.process.alpha, wiring.process.sigma
    for time, before in ((999, 500), (500, 0), (0, None)):
        noise = noise_at(x, jnp.int32(time))
        start = (x - sigmas[time] * noise) / alphas[time]
        x = start if before is None else alphas[before] * start + sigmas[before] * noise
    np.testing.assert_allclose(found, x, atol=2e-3)


def test_a_regression_of_the_head_alone_moves_nothing_else(begun):
    _, _, _, teacher, frozen = begun
    wiring = wiring_of("velocity", distillation={"student": "head_only"})
    state = jax.jit(wiring.init)(teacher)
    after, _ = jax.jit(functools.partial(wiring.regressor.update, axis=ALONE))(state, frozen, batch_of(wiring))
    for old, new in ((state.params, after.params), (state.ema, after.ema)):
        change = jax.tree.map(lambda a, b: b - a, old, new)["params"]
        assert largest(change.pop("denoiser")) > 0
        assert largest(change) == 0


@pytest.mark.parametrize("mode", ["full", "head_only"])
def test_an_update_moves_what_its_mode_says(begun, mode):
    _, _, _, teacher, frozen = begun
    wiring = wiring_of(distillation={"student": mode, "auxiliary": mode}, loss={"guidance": 2.0})
    state = jax.jit(wiring.init)(teacher)
    after, metrics = jax.jit(functools.partial(wiring.update, axis=ALONE))(state, frozen, batch_of(wiring))
    assert float(metrics["train/gap"][0]) > 0 and float(metrics["train/lag"][1]) > 0
    for old, new in ((state, after), (state.extra["auxiliary"], after.extra["auxiliary"])):
        change = jax.tree.map(lambda a, b: b - a, old.params, new.params)["params"]
        assert largest(change["denoiser"]) > 0
        assert (largest({name: x for name, x in change.items() if name != "denoiser"}) > 0) == (mode == "full")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"distillation": {"student": "half"}}, "distillation.student"),
        ({"distillation": {"warm_up": -1}}, "warm_up"),
        ({"distillation": {"warm_up": 11}}, "num_steps"),
        ({"regression": {"updates": -1}}, "regression.updates"),
        ({"regression": {"chain_steps": 1}}, "regression.chain_steps"),
        ({"regression": {"radius": 0.0}}, "regression.radius"),
        ({"regression": {"updates": 11}}, "num_steps"),
        ({"model": {"form": "x0", "time": 1000}}, "model.time"),
        ({"loss": {"last": 1000}}, "loss.last"),
        ({"loss": {"norm": "cubic"}}, "loss.norm"),
        ({"model": {"time": 999}}, "999"),
        ({"evaluation": {"steps": (4, 128)}}, "128"),
    ],
)
def test_bad_settings_are_refused(changes, named):
    with pytest.raises((ValueError, UserError), match=named):
        wiring_of(**changes)


def test_a_run_of_before_regression_could_come_first_is_still_read():
    config = marval_config.get_config("smoke")
    for name in ("regression", "regression_optimizer"):
        del config[name]
    wiring = Wiring(config, conditioning_of(config.data))
    assert wiring.regressor is None and wiring.update_from == config.distillation.warm_up
