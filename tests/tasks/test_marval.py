"""Stage `marval` on random weights: which network learns from what (specs/marval.md sections 5 and 15)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import marval as marval_config
from maskrl_jax.data.dataset import conditioning_of
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Axis, Parallel
from maskrl_jax.tasks.marval import STUDENT_DRAW, Wiring
from tests.continuous import images, moved, random_networks

ROWS = 4
ALONE = Axis(1, Parallel("sharded", jax.local_devices()[:1]))


def wiring_of(**changes):
    config = marval_config.get_config("smoke")
    config.batch_size, config.distillation.repeats = ROWS, 2
    for name, value in changes.items():
        config[name].update(value)
    return Wiring(config, conditioning_of(config.data.name, config.data.text_length))


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


@pytest.mark.parametrize("mode", ["full", "head_only"])
def test_an_update_moves_what_its_mode_says(begun, mode):
    _, _, _, teacher, frozen = begun
    wiring = wiring_of(distillation={"student": mode, "auxiliary": mode}, loss={"guidance": 2.0})
    state = jax.jit(wiring.init)(teacher)
    after, metrics = jax.jit(functools.partial(wiring.update, axis=ALONE))(state, frozen, batch_of(wiring))
    assert float(metrics["train/gap"][0]) > 0
    errors = [float(metrics[f"train/error_of_{who}"][0]) for who in ("auxiliary", "teacher")]
    assert errors[0] != errors[1] and min(errors) > 0
    for old, new in ((state, after), (state.extra["auxiliary"], after.extra["auxiliary"])):
        change = jax.tree.map(lambda a, b: b - a, old.params, new.params)["params"]
        assert largest(change["denoiser"]) > 0
        assert (largest({name: x for name, x in change.items() if name != "denoiser"}) > 0) == (mode == "full")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"distillation": {"student": "half"}}, "distillation.student"),
        ({"distillation": {"warm_up": -1}}, "warm_up"),
        ({"loss": {"last": 1000}}, "loss.last"),
        ({"loss": {"norm": "cubic"}}, "loss.norm"),
        ({"model": {"time": 999}}, "999"),
        ({"evaluation": {"steps": (4, 128)}}, "128"),
    ],
)
def test_bad_settings_are_refused(changes, named):
    with pytest.raises((ValueError, UserError), match=named):
        wiring_of(**changes)
