"""The training-free cache of DiMOO: against a loop without padding, and at the ends of its dials."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_dimoo import EMPTY, LAYOUT, NULL, PROMPTS, RATIO, STEPS, K, N, cached, conditions, freeze, keys, plain, small

from maskrl_jax.sampling import dimoo, maskgit
from maskrl_jax.sampling.dimoo import CacheConfig, make_plan
from maskrl_jax.sampling.dimoo_sequence import left_padded

FULL = CacheConfig(RATIO, warmup_ratio=0.2, refresh_interval=3).full_steps(STEPS)
PLAN = make_plan(N, STEPS)


@pytest.fixture(autouse=True, scope="module")
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def test_published_cache_has_28_full_steps_of_64():
    full = CacheConfig().full_steps(64)
    assert full[:20].all() and np.flatnonzero(full[20:]).tolist() == [4, 9, 14, 19, 24, 29, 34, 39]
    assert full.sum() == 28
    assert FULL.tolist() == [True, True, False, False, True, False]


def test_a_cache_that_keeps_nothing_is_the_plain_sampler():
    expected = plain(PLAN, *conditions(), keys(0, 1)).ids
    np.testing.assert_array_equal(cached(PLAN, FULL, *conditions(), keys(0, 1), ratio=0.0).ids, expected)
    found = cached(PLAN, np.ones(STEPS, bool), *conditions(), keys(0, 1))
    np.testing.assert_array_equal(found.ids, expected)
    assert found.calls.tolist() == [STEPS] * 2


def test_batches_equal_single_samples_however_padded():
    whole = cached(PLAN, FULL, *conditions(), keys(0, 1))
    for row in (0, 1):
        alone = cached(PLAN, FULL, *conditions(PROMPTS[row : row + 1], multiple=16), keys(row))
        np.testing.assert_array_equal(alone.ids[0], whole.ids[row])


def test_given_tokens_stay_and_the_rest_is_filled():
    rollout = cached(PLAN, FULL, *conditions(), keys(0, 1), EMPTY.at[:, 2:7].set(3))
    assert (rollout.ids[:, 2:7] == 3).all() and (rollout.ids < K).all()
    assert (rollout.commit_step[:, 2:7] == maskgit.GIVEN).all()


def test_the_cache_equals_a_loop_without_padding(monkeypatch):
    """Both branches by themselves, of their own lengths, with numpy's quantile; three of six steps are partial."""
    rng = np.random.default_rng(2)
    drawn, order = rng.gumbel(size=(STEPS, N, K)).astype(np.float32), rng.gumbel(size=(STEPS, N)).astype(np.float32)
    base, codes, caches = small()[0], np.full((1, N), K), [None, None]
    full_pass = jax.jit(lambda ids: base(ids, method="cached"))
    partial_pass = jax.jit(lambda ids, cache, places: base(ids, cache, places, method="recomputed"))
    for step in range(STEPS):
        for branch, prompt in enumerate((PROMPTS[0], NULL)):
            ids = LAYOUT.sequence(jnp.asarray(codes), left_padded([prompt], 1))[0]
            if FULL[step]:
                caches[branch] = full_pass(ids)
                continue
            best = np.asarray(caches[branch].logits).max(-1)[0]
            places = np.flatnonzero(best <= np.quantile(best, np.float32(1 - RATIO)))
            caches[branch] = partial_pass(ids, caches[branch], jnp.asarray(places)[None])
        conditional, unconditional = (np.asarray(LAYOUT.image(cache.logits))[0] for cache in caches)
        logp = np.asarray(jax.nn.log_softmax(5 * conditional - 4 * unconditional))
        chosen = (logp + drawn[step]).argmax(-1)
        confidence = np.where(codes[0] == K, logp[np.arange(N), chosen] + order[step], np.inf)
        codes = np.where(codes == K, chosen[None], codes)
        codes[0, np.argsort(confidence)[: PLAN.masked_after[step]]] = K
    freeze(monkeypatch, drawn, order)
    both = conditions(PROMPTS[:1], multiple=4)  # a length of its own, so that the program is compiled with this noise
    found = cached(PLAN, FULL, *both, keys(0))
    np.testing.assert_array_equal(found.ids, codes)
    assert found.calls.tolist() == [3]
    assert (cached(PLAN, np.ones(STEPS, bool), *both, keys(0)).ids != found.ids).any()


def test_the_least_certain_positions_of_rows_of_different_length():
    """Rows of 7 and 4 real positions: floor(.5 x 6) + 1 = 4 and floor(.5 x 3) + 1 = 2 lie at or below the median."""
    best = jnp.asarray([[3.0, 1, 6, 0, 4, 5, 2], [-9, -8, -7, 2, 1, 4, 3]])
    real = jnp.asarray([[True] * 7, [False] * 3 + [True] * 4])
    logits = jnp.stack([best, best - 1], axis=-1)
    assert dimoo.least_certain(logits, real, 0.5).tolist() == [[3, 1, 6, 0], [4, 3, 7, 7]]
    assert dimoo.least_certain(logits, real, 1.0).shape == (2, 7)
    assert dimoo.least_certain(logits, real, 0.0).tolist() == [[3], [4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_ratio": 1.5}, "^cache_ratio 1.5 must lie in"),
        ({"warmup_ratio": -0.1}, "^warmup_ratio -0.1 must lie in"),
        ({"refresh_interval": 0}, "^refresh_interval 0 must be at least 1$"),
    ],
)
def test_impossible_caches_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**change)
