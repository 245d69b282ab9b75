"""Sampling with a feature shortcut, on a three-line model whose feature shows whatever it was made of."""

import dataclasses

import chex
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert import maskgit_port as convert_port
from maskrl_jax.convert import shortcut as convert_shortcut
from maskrl_jax.models.maskgit_port import MaskGITPort
from maskrl_jax.models.shortcut import Shortcut, ShortcutConfig
from maskrl_jax.sampling import draws, maskgit, refresh, schedules, shortcut, shortcut_teacher
from maskrl_jax.sampling.maskgit import SamplerConfig, make_plan

N, K, D, STEPS = 16, 6, 5, 8
MASK = K


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """Compile as a user does: without, programs of one feature differ in their last bits."""
    earlier = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", earlier)


def _tables():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"ids": make(K + 1, D), "places": make(N + 1, D), "cond": make(4, D), "mix": make(D, D), "head": make(D, K)}


def _parts(advance=None):
    """A base whose features have a slot more than there are tokens, and a shortcut that reads all it is given."""
    t = _tables()

    def features(ids, timestep, cond):
        x = jnp.pad(t["ids"][ids], ((0, 0), (0, 1), (0, 0))) + t["places"][None] + t["cond"][cond][:, None]
        return jnp.tanh(x + x.mean(1, keepdims=True) @ t["mix"]) + timestep[:, None, None] / 64

    def move(f, controls, share, _):
        told = (t["ids"][controls.ids] + t["places"][controls.positions]) * controls.valid[..., None]
        return f + 0.3 * jnp.tanh(f @ t["mix"] + told.sum(1, keepdims=True) + share[:, None, None])

    return shortcut.Parts(features, lambda f: 2 * f[:, :N] @ t["head"], advance or move)


def _config(**changes):
    return SamplerConfig(**{"num_steps": STEPS, "max_steps": STEPS, "gumbel": 2.0, "guidance": 1.5} | changes)


def _keys(index):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.asarray(index))


COND = jnp.asarray([0, 1, 2, 1, 0, 2])
NULL = jnp.asarray(3)
EMPTY = jnp.full((len(COND), N), MASK)


def _decode(plan, asks, parts=None, cond=COND, index=None, **options):
    keys_B = _keys(np.arange(len(cond)) if index is None else index)
    options = {"most": shortcut.most_controls(plan, N), **options}

    @jax.jit
    def run(plan, asks):
        return shortcut.decode(parts or _parts(), keys_B, cond, NULL, plan, asks, EMPTY[: len(cond)], MASK, **options)

    return run(plan, asks)


def _even(budget, steps=STEPS):
    return refresh.scheduled(refresh.even_steps(steps, budget), STEPS)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_all_steps_full_is_the_plain_sampler(guidance):
    plan, parts = make_plan(_config(guidance=guidance), N), _parts()

    def logits(ids, timestep, cond):
        return parts.head(parts.features(ids, timestep, cond))

    plain = maskgit.decode(logits, _keys(np.arange(6)), COND, NULL, plan, EMPTY, MASK)
    ours, memory = _decode(plan, _even(STEPS))
    chex.assert_trees_all_equal(ours, plain)
    assert memory.full.all()


@pytest.mark.parametrize("budget", [1, 3, 5])
def test_only_the_full_steps_are_calls(budget):
    rollout, memory = _decode(make_plan(_config(), N), _even(budget))
    assert (rollout.calls == budget).all()
    assert tuple(np.flatnonzero(memory.full)) == refresh.even_steps(STEPS, budget)
    assert (rollout.ids < MASK).all()


def test_every_step_reveals_the_plans_count():
    plan = make_plan(_config(), N)
    rollout, _ = _decode(plan, _even(3))
    left = np.concatenate([[N], np.asarray(plan.masked_after)])
    counts = np.stack([(np.asarray(rollout.commit_step) == step).sum(1) for step in range(STEPS)], axis=1)
    np.testing.assert_array_equal(counts, np.tile(left[:-1] - left[1:], (len(COND), 1)))


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("cached", [False, True])
def test_unrolled_equals_the_loop(guidance, cached):
    plan, parts = make_plan(_config(guidance=guidance), N), _parts()
    first = shortcut.empty_features(parts, COND, NULL, plan, N, MASK) if cached else None
    steps = refresh.even_steps(STEPS, 3)
    unrolled = jax.jit(
        lambda keys: shortcut.decode_unrolled(parts, keys, COND, NULL, plan, steps, N, MASK, first=first)
    )(_keys(np.arange(6)))
    looped, _ = _decode(plan, _even(3))
    np.testing.assert_array_equal(unrolled.ids, looped.ids)
    np.testing.assert_array_equal(unrolled.commit_step, looped.commit_step)
    np.testing.assert_array_equal(unrolled.calls, looped.calls - cached)


def test_there_is_no_feature_before_the_first_full_step():
    with pytest.raises(ValueError, match="must hold step 0"):
        refresh.scheduled((1, 2), STEPS)
    with pytest.raises(ValueError, match="must hold step 0"):
        shortcut.decode_unrolled(_parts(), _keys([0]), COND[:1], NULL, make_plan(_config(), N), (1,), N, MASK)


def test_unrolled_refuses_modes_without_counts():
    plan = make_plan(_config(mode="threshold"), N)
    with pytest.raises(ValueError, match="does not know its counts"):
        shortcut.decode_unrolled(_parts(), _keys([0]), COND[:1], NULL, plan, (0,), N, MASK)


def test_a_kept_first_step_is_the_computed_one():
    plan, parts = make_plan(_config(), N), _parts()
    first = shortcut.empty_features(parts, COND, NULL, plan, N, MASK)
    kept, computed = _decode(plan, _even(3), first=first)[0], _decode(plan, _even(3))[0]
    chex.assert_trees_all_equal(kept.replace(calls=kept.calls + 1), computed)


def test_batches_equal_single_samples():
    plan = make_plan(_config(), N)
    whole, _ = _decode(plan, _even(3))
    for row in (0, 4):
        alone, _ = _decode(plan, _even(3), cond=COND[row : row + 1], index=[row])
        np.testing.assert_array_equal(alone.ids[0], whole.ids[row])


def test_the_unconditional_feature_does_not_touch_the_conditional_one():
    plan = make_plan(_config(guidance=1.5), N)
    # Guidance 1 with both branches: the tokens follow the conditional branch alone.
    plan = plan.replace(guidance=np.ones_like(plan.guidance))
    parts = _parts()
    other = dataclasses.replace(
        parts, features=lambda ids, t, cond: jnp.where((cond == 3)[:, None, None], 9.0, parts.features(ids, t, cond))
    )
    ours, theirs = (_decode(plan, _even(3), parts=p) for p in (parts, other))
    np.testing.assert_array_equal(ours[0].ids, theirs[0].ids)
    ours, theirs = (memory.features for _, memory in (ours, theirs))
    np.testing.assert_array_equal(ours[:6], theirs[:6])
    assert (ours[6:] != theirs[6:]).any()


@pytest.mark.parametrize("mode", ["confidence", "uncertain"])
def test_training_reads_what_sampling_read(mode):
    plan, parts = make_plan(_config(mode=mode, threshold=0.9), N), _parts()
    most = shortcut.most_controls(plan, N)
    rollout, memory = _decode(plan, _even(1))
    steps = int(np.asarray(rollout.commit_step).max()) + 1
    features = shortcut.empty_features(parts, COND, NULL, plan, N, MASK)
    twice = jax.tree.map(lambda x: jnp.tile(x, (2, *[1] * (x.ndim - 1))), rollout)
    for step in range(steps - 1):
        masked, controls, share = shortcut_teacher.step_pairs(twice, jnp.full(12, step), most)
        np.testing.assert_allclose(share, masked.mean(-1))
        features = parts.advance(features, controls, share, None)
    np.testing.assert_allclose(features, memory.features, atol=2e-5)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_step_redrawn_from_the_teachers_features_is_the_teachers_step(guidance):
    """Rows at steps of their own, with their rollouts' keys; what comes out is what the teacher saw next."""
    plan, parts, steps = make_plan(_config(guidance=guidance), N), _parts(), np.array([0, 3, 6, 1, 5, 2])
    predict, kept = shortcut_teacher.predict_fully(parts, COND, NULL, plan, EMPTY)
    rollout, features_SbTD = maskgit.fill(predict, kept, _keys(np.arange(6)), plan, EMPTY, MASK)
    rows = np.arange(features_SbTD.shape[1])
    at = jnp.asarray(np.tile(steps, len(rows) // 6))

    @jax.jit
    def redrawn(features):
        return shortcut_teacher.redraw(
            parts, _keys(np.arange(6)), COND, NULL, plan, rollout, jnp.asarray(steps), features, MASK
        )

    found, wanted = redrawn(features_SbTD[at, rows])
    commit = np.asarray(rollout.commit_step)
    drawn = commit <= steps[:, None]
    np.testing.assert_array_equal(found.commit_step, np.where(drawn, commit, shortcut_teacher.LATER))
    np.testing.assert_array_equal(found.ids, np.where(drawn, rollout.ids, MASK))
    np.testing.assert_allclose(wanted, features_SbTD[at + 1, rows], atol=1e-6)
    other, _ = redrawn(features_SbTD[at, rows][::-1])
    assert (other.ids != found.ids).any()
    assert ((other.ids == MASK).sum(1) == (found.ids == MASK).sum(1)).all()


def test_controls_are_the_revealed_tokens():
    ids, revealed = jnp.asarray([[4, 5, 6, 7]]), jnp.asarray([[False, True, False, True]])
    found = shortcut.controls_of(ids, revealed, 3)
    assert found.positions[0, :2].tolist() == [1, 3]
    assert found.ids[0, :2].tolist() == [5, 7]
    assert found.valid[0].tolist() == [True, True, False]


def test_places_for_controls():
    plan = make_plan(_config(), N)
    left = np.concatenate([[N], np.asarray(plan.masked_after)])
    assert shortcut.most_controls(plan, N) == (left[:-1] - left[1:])[:-1].max()  # the last step has no next
    assert shortcut.most_controls(make_plan(_config(mode="uncertain"), N), N) == N
    assert shortcut.most_controls(make_plan(_config(num_steps=1), N), N) == 1


def test_a_frozen_feature_stays_and_a_linear_one_goes_on():
    plan = make_plan(_config(), N)
    frozen = _parts(advance=lambda f, *_: f)
    _, memory = _decode(plan, _even(1), parts=frozen)
    np.testing.assert_array_equal(memory.features, shortcut.empty_features(_parts(), COND, NULL, plan, N, MASK))
    rollout, memory = _decode(plan, refresh.scheduled((0, 1), STEPS), extrapolate=True)
    parts, first = _parts(), shortcut.empty_features(_parts(), COND, NULL, plan, N, MASK)
    after = jnp.where(jnp.asarray(rollout.commit_step) == 0, rollout.ids, MASK)
    second = parts.features(
        jnp.tile(after, (2, 1)), jnp.full(12, plan.timestep[1]), jnp.concatenate([COND, jnp.full(6, 3)])
    )
    np.testing.assert_allclose(memory.features, first + (STEPS - 1) * (second - first), rtol=1e-4, atol=1e-3)


def test_adaptive_refresh_follows_drift_length_and_budget():
    plan = make_plan(_config(), N)

    def full(threshold, longest, budget):
        return np.asarray(_decode(plan, refresh.adaptive(threshold, longest, budget, STEPS))[1].full)

    assert full(0.0, STEPS, STEPS).tolist() == [True] + [False, True] * 3 + [False]  # drift is 0 after a full step
    assert full(1e9, 2, STEPS).tolist() == [True, False, False] * 2 + [True, False]
    assert full(1e9, 2, 2).sum() == 2
    assert full(1e9, STEPS, STEPS).sum() == 1


def test_other_budgets_and_steps_compile_nothing():
    parts, keys_B, most = _parts(), _keys(np.arange(6)), N

    @jax.jit
    @chex.assert_max_traces(1)
    def run(plan, asks):
        return shortcut.decode(parts, keys_B, COND, NULL, plan, asks, EMPTY, MASK, most=most)

    for steps, budget in ((8, 3), (6, 2), (8, 8)):
        rollout, _ = run(make_plan(_config(num_steps=steps), N), _even(budget, steps))
        assert (rollout.calls == budget).all()


def test_other_thresholds_compile_nothing():
    @jax.jit
    @chex.assert_max_traces(1)
    def run(asks):
        plan = make_plan(_config(), N)
        return shortcut.decode(_parts(), _keys(np.arange(6)), COND, NULL, plan, asks, EMPTY, MASK, most=N)[1].full.sum()

    found = [int(run(refresh.adaptive(threshold, 4, 8, STEPS))) for threshold in (0.01, 0.3, 100.0)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]


def _published_plan(sampler, num_tokens):
    """Sampler A (specs/maskgit.md section 3)."""
    config = SamplerConfig(
        num_steps=sampler["steps"],
        max_steps=sampler["steps"],
        schedule=f"steps-{sampler['sched_mode']}",
        gumbel=sampler["r_temp"],
        noise_ends="at",
        guidance=1 + sampler["cfg_w"],
        guidance_schedule="linear",
        temperature=1 / sampler["sm_temp"],
    )
    return make_plan(config, num_tokens)


@fixtures.every_configuration("maskgit_pt_sampler")
def test_parity_with_the_official_sampler(folder, monkeypatch):
    config, state, inputs, outputs = fixtures.load(folder)
    ctor, sampler = config["ctor"], config["sampler"]
    sizes = fixtures.port_sizes(ctor)
    own = {name.removeprefix("vit."): x for name, x in state.items() if name.startswith("vit.")}
    base, params = MaskGITPort(sizes), convert_port.params_of(own, sizes)
    counts = schedules.increments(sampler["sched_mode"], sizes.num_tokens, sampler["steps"])
    np.testing.assert_array_equal(counts, outputs["schedule"])
    plan = _published_plan(sampler, sizes.num_tokens)
    steps, advance = tuple(range(sampler["steps"])), lambda f, *_: f
    if sampler.get("budget"):
        s = config["shortcut"]
        network = ShortcutConfig(sizes.width, s["bottleneck_ratio"], s["n_block"], s["num_heads"], s["embed_t"])
        light = {name.removeprefix("shortcut."): x for name, x in state.items() if name.startswith("shortcut.")}
        moved = convert_shortcut.params_of(light, network)
        steps = refresh.even_steps(sampler["steps"], sampler["budget"])

        def advance(f, controls, share, _):
            told = base.apply(params, controls.ids, controls.positions, method="controls")
            return Shortcut(network).apply(moved, f, told, controls.positions, controls.valid, share)

        np.testing.assert_array_equal(np.flatnonzero(outputs["full_step_flags"]), steps)
    parts = shortcut.Parts(
        lambda ids, _, cond: base.apply(params, ids, cond, method="features"),
        lambda f: base.apply(params, f, method="logits"),
        advance,
    )
    # The fixture's frozen noise in the place of ours; "keys" are step numbers then.
    drawn, order = (jnp.asarray(inputs[f"{name}_gumbel"], jnp.float32) for name in ("categorical", "confidence"))

    def draw(steps_B, logp):
        ids = (logp + drawn[steps_B[0]]).argmax(-1).astype(jnp.int32)
        return ids, jnp.take_along_axis(logp, ids[..., None], axis=-1)[..., 0]

    monkeypatch.setattr(draws, "step_keys", lambda keys, step, _: jnp.full(len(keys), step))
    monkeypatch.setattr(draws, "draw_tokens", draw)
    monkeypatch.setattr(draws, "gumbel", lambda steps_B, _: order[steps_B[0]])
    labels = jnp.asarray(inputs["labels"], jnp.int32)
    empty = jnp.full((len(labels), sizes.num_tokens), sizes.mask_id, jnp.int32)
    with jax.default_matmul_precision("highest"):
        rollout, _ = shortcut.decode(
            parts,
            _keys(np.arange(len(labels))),
            labels,
            jnp.int32(ctor["nclass"]),
            plan,
            refresh.scheduled(steps, sampler["steps"]),
            empty,
            sizes.mask_id,
            most=shortcut.most_controls(plan, sizes.num_tokens),
        )
    np.testing.assert_array_equal(rollout.ids, outputs["final_code"].reshape(len(labels), -1))
    after = outputs["mask_after_step"].reshape(sampler["steps"], len(labels), -1)
    commit = np.asarray(rollout.commit_step)[None]
    np.testing.assert_array_equal(after, commit > np.arange(sampler["steps"])[:, None, None])
