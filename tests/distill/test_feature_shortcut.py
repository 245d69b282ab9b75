"""The loss of a feature shortcut, on numbers whose answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.distill import feature_shortcut
from maskrl_jax.distill.feature_shortcut import Buffer, ShortcutLoss, Student

B, BRANCHES, S, N, D, K = 3, 2, 4, 5, 2, 3
KEYS = jax.vmap(jax.random.key)(jnp.arange(B))


@pytest.fixture
def buffer():
    """Features that count: f_s = s at every place, one more in the second branch; one or two tokens a step."""
    level = np.arange(S, dtype=np.float32)[None, None, :, None, None] + np.arange(BRANCHES)[None, :, None, None, None]
    features = np.broadcast_to(level, (B, BRANCHES, S, N, D)).astype(np.float32)
    commit = np.array([0, 1, 1, 2, 3], np.uint8)
    cond, ids = jnp.arange(B), jnp.zeros((B, N), jnp.int32)
    return Buffer(jnp.asarray(features), cond, ids, jnp.asarray(np.tile(commit, (B, 1))))


def student(step=0.0):
    """Move every feature by a parameter."""
    head = jnp.asarray(np.random.default_rng(0).normal(size=(D, K)), jnp.float32)
    return Student(lambda p, f, *_: f + p + step, lambda f: f[:, :N] @ head, np.int32(B), N, most=2)


def every_pair():
    """All pairs of each sample: (branch, step) int32 [B, branches * (S - 1)]."""
    slots = jnp.tile(jnp.arange(BRANCHES * (S - 1))[None], (B, 1))
    return feature_shortcut.branch_and_step(slots, BRANCHES, jnp.full(B, S), S)


def value(settings, params, buffer, who=None):
    branch, step = every_pair()
    total, metrics = feature_shortcut.loss(settings, who or student(), params, buffer, branch, step, KEYS)
    return float(total), {name: float(s / w) for name, (s, w) in metrics.items()}


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_the_loss_is_the_mean_square_of_what_is_left(buffer, positions):
    """The true step is 1: a frozen feature is off by 1, half a step by a quarter."""
    count = B * BRANCHES * (S - 1)
    total, metrics = value(ShortcutLoss(positions=positions), jnp.float32(0.5), buffer)
    assert total == pytest.approx(0.25 * count)
    assert metrics == {"loss": pytest.approx(0.25), "mse": pytest.approx(0.25), "mse_frozen": pytest.approx(1.0)}


def test_masked_positions_are_those_of_the_predicted_step(buffer):
    """An error at the last committed place alone counts fully at the last step, by a third at the first."""
    features = buffer.features.at[..., 4, :].add(jnp.asarray([0.0, 1.0, 0.0, 0.0])[None, None, :, None])
    branch, step = (jnp.asarray(x)[None].repeat(B, 0) for x in ([0], [0]))
    settings, other = ShortcutLoss(), dataclasses.replace(buffer, features=features)
    total, _ = feature_shortcut.loss(settings, student(), jnp.float32(1.0), other, branch, step, KEYS)
    assert float(total) == pytest.approx(B * 1 / 4)  # f_1 is off by 1 at one of the four places masked at step 1


def test_a_chain_weighs_its_steps_alike_and_ends_with_the_rollout(buffer):
    """With step p the error after k is k (1 - p); windows that leave the rollout count what is in it."""
    p = 0.5
    total, metrics = value(ShortcutLoss(chain=3), jnp.float32(p), buffer)
    errors = [(k * (1 - p)) ** 2 for k in (1, 2, 3)]
    by_start = [sum(errors[: S - 1 - s]) / 3 for s in range(S - 1)]
    assert total == pytest.approx(B * BRANCHES * sum(by_start), rel=1e-5)
    assert metrics["mse"] == pytest.approx(0.25)


def test_a_stopped_gradient_ends_at_the_last_step(buffer):
    grads = {}
    for through in (True, False):
        settings = ShortcutLoss(chain=2, through=through)
        grads[through] = jax.grad(lambda p, s=settings: value_of(s, p, buffer))(jnp.float32(0.5))
    # d/dp of ((1-p)^2 + (2 - 2p)^2) / 2: through -(1-p) - 4 (1-p); stopped -(1-p) - 2 (1-p).
    pairs_two, pairs_one = B * BRANCHES * (S - 2), B * BRANCHES
    assert float(grads[True]) == pytest.approx(-0.5 * (pairs_two + pairs_one) - 2.0 * pairs_two, rel=1e-5)
    assert float(grads[False]) == pytest.approx(-0.5 * (pairs_two + pairs_one) - 1.0 * pairs_two, rel=1e-5)


def value_of(settings, params, buffer):
    branch, step = every_pair()
    return feature_shortcut.loss(settings, student(), params, buffer, branch, step, KEYS)[0]


def test_own_tokens_are_drawn_from_the_second_step_on_and_set_its_target(buffer):
    """A redraw that asks for 10, sees the features that were moved once, and forgets the teacher's later tokens."""
    seen = []

    def redraw(keys, cond, rollout, step, features):
        seen.append((cond, step, features, keys))
        return dataclasses.replace(rollout, commit_step=jnp.full((len(step), N), 200, jnp.uint8)), 0 * features + 10.0

    p, who = 0.5, dataclasses.replace(student(), redraw=redraw)
    steps = jnp.tile(jnp.arange(2)[None], (B, 1))
    settings = ShortcutLoss(chain=2, student_tokens=True)
    total, metrics = feature_shortcut.loss(settings, who, jnp.float32(p), buffer, 0 * steps, steps, KEYS)
    start = np.array([s + branch for branch in range(BRANCHES) for _ in range(B) for s in range(2)])
    ((cond, step, features, keys),) = seen
    np.testing.assert_array_equal(cond, np.repeat(np.arange(B), 2))
    np.testing.assert_array_equal(step, np.tile([1, 2], B))
    np.testing.assert_allclose(features[:, 0, 0], start + p)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == B * 2
    assert float(total) == pytest.approx((((1 - p) ** 2 + (10 - start - 2 * p) ** 2) / 2).sum(), rel=1e-5)
    assert int(metrics["mse"][1]) == len(start)


def test_the_kl_is_that_of_the_logits(buffer):
    settings = ShortcutLoss(kl=2.0, kl_temperature=3.0)
    total, metrics = value(settings, jnp.float32(0.5), buffer)
    branch, step = (np.asarray(x)[0] for x in every_pair())
    wanted = []
    for b, s in zip(branch, step, strict=True):
        teacher, own = (
            jax.nn.log_softmax(student().head(jnp.full((1, N, D), level)) / 3.0)[0, 0]
            for level in (s + 1.0 + b, s + 0.5 + b)
        )
        wanted.append(9.0 * float((jnp.exp(teacher) * (teacher - own)).sum()))
    assert metrics["kl"] == pytest.approx(np.mean(wanted), rel=1e-4)
    assert total == pytest.approx(B * len(step) * (0.25 + 2.0 * np.mean(wanted)), rel=1e-4)


def test_every_pair_is_dealt_once_an_epoch():
    keys = jax.vmap(jax.random.key)(jnp.arange(B))
    slots = np.asarray(feature_shortcut.pair_slots(keys, pairs=2, count=6, epochs=2))
    assert slots.shape == (6, B, 2)
    for epoch in (slots[:3], slots[3:]):
        np.testing.assert_array_equal(np.sort(epoch.transpose(1, 0, 2).reshape(B, 6)), np.tile(np.arange(6), (B, 1)))
    assert (slots[:3] != slots[3:]).any() and (slots[:, 0] != slots[:, 1]).any()


def test_a_sample_s_pairs_do_not_depend_on_the_others():
    keys = jax.vmap(jax.random.key)(jnp.arange(B))
    whole = feature_shortcut.pair_slots(keys, 2, 6, 1)
    np.testing.assert_array_equal(feature_shortcut.pair_slots(keys[1:], 2, 6, 1), whole[:, 1:])


def test_pairs_of_a_shorter_rollout_exist_and_are_spread_evenly():
    """23 steps of the buffer on 15, 11 and none: each comes once or twice, early ones no more often than late ones."""
    slots = jnp.arange(BRANCHES * 23)[None].repeat(3, 0)
    branch, step = feature_shortcut.branch_and_step(slots, BRANCHES, jnp.asarray([16, 12, 1]), 24)
    for row, pairs in enumerate((15, 11)):
        counts = np.bincount(np.asarray(step[row]), minlength=pairs) // BRANCHES
        assert len(counts) == pairs and 23 // pairs <= counts.min() and counts.max() <= -(-23 // pairs)
        early, late = counts[: pairs // 2].sum(), counts[-(pairs // 2) :].sum()
        assert abs(int(early) - int(late)) <= 1
        assert set(zip(*np.asarray((branch[row], step[row])), strict=True)) == {
            (b, s) for b in range(BRANCHES) for s in range(pairs)
        }
    assert set(np.asarray(step[2])) == {0}  # done in one step: there is no pair, and the loss is 0


def test_a_sample_that_was_done_at_once_teaches_nothing(buffer):
    done = dataclasses.replace(buffer, commit_step=jnp.zeros((B, N), jnp.uint8))
    slots = jnp.zeros((B, 1), jnp.int32)
    branch, step = feature_shortcut.branch_and_step(slots, BRANCHES, done.lengths(), S)
    for positions in ("masked", "all"):
        settings = ShortcutLoss(positions=positions)
        assert float(feature_shortcut.loss(settings, student(), jnp.float32(0.5), done, branch, step, KEYS)[0]) == 0


def test_open_loop_errors_grow_as_the_steps_do(buffer):
    guidance = jnp.ones(S)
    found = feature_shortcut.open_loop(student(), jnp.float32(0.75), buffer, guidance)
    frozen = feature_shortcut.open_loop(student(), jnp.float32(0.75), buffer, guidance, frozen=True)
    for start in range(S):
        for k in range(1, S):
            if start + k < S:
                assert float(found["mse"][start, k]) == pytest.approx((k * 0.25) ** 2, abs=1e-5)
                assert float(frozen["mse"][start, k]) == pytest.approx(k**2, abs=1e-4)
            else:
                assert all(np.isnan(value[start, k]) for value in (found["mse"], found["cosine"], frozen["kl"]))
    np.testing.assert_array_equal(found["cosine"][:, 0], 1.0)
    one = feature_shortcut.open_loop(student(), jnp.float32(0.75), buffer, guidance, longest=1)
    np.testing.assert_array_equal(one["mse"], found["mse"][:, :2])
    perfect = feature_shortcut.open_loop(student(), jnp.float32(1.0), buffer, guidance)
    np.testing.assert_allclose(np.nan_to_num(perfect["kl"]), 0, atol=1e-5)
    assert (np.asarray(frozen["kl"])[0, 1:] > 0).all()


def test_drift_mixes_the_branches_as_the_sampler_does(buffer):
    """One step on, moved along the first axis alone: cosine by hand, and the KL of logits under guidance 3."""
    p, head = 0.5, student().head
    who = dataclasses.replace(student(), advance=lambda p, f, *_: f + p * jnp.asarray([[[1.0, 0.0]]]))
    found = feature_shortcut.open_loop(
        who,
        jnp.float32(p),
        buffer,
        jnp.full(S, 3.0),
    )
    own, true = ([np.array(x) for x in pair] for pair in ([[p, 0.0], [1 + p, 1.0]], [[1.0, 1.0], [2.0, 2.0]]))
    cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(own, true, strict=True)])
    assert float(found["cosine"][0, 1]) == pytest.approx(cosine, rel=1e-5)

    def guided(pair):
        conditional, unconditional = (head(jnp.tile(jnp.float32(x), (1, N, 1)))[0, 0] for x in pair)
        return jax.nn.log_softmax(unconditional + 3.0 * (conditional - unconditional))

    teacher, ours = guided(true), guided(own)
    assert float(found["kl"][0, 1]) == pytest.approx(float((jnp.exp(teacher) * (teacher - ours)).sum()), rel=1e-4)


@pytest.mark.parametrize(
    "bad", [{"positions": "none"}, {"chain": 0}, {"student_tokens": True}, {"kl": -1.0}, {"kl_temperature": 0.0}]
)
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="loss"):
        ShortcutLoss(**bad)
