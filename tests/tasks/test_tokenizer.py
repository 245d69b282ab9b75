"""The tokenizer's codebook by hand, and the stage around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskrl_jax.axis import Axis
from maskrl_jax.models.vqgan import TokenizerConfig
from maskrl_jax.parallel import Parallel
from maskrl_jax.tasks import codecs, tokenizer
from maskrl_jax.tasks.tokenizer import DECAY, update_codebook
from maskrl_jax.writers import read_metrics

ALONE = Axis(1, Parallel("sharded", jax.local_devices()[:1]))


def book(counts, codes):
    counts, codes = jnp.asarray(counts, jnp.float32), jnp.asarray(codes, jnp.float32)
    return {"codes": codes, "counts": counts, "sums": codes * counts[:, None]}


def test_codes_move_to_the_mean_of_their_members():
    # Two pictures of one cell: both belong to code 0, of which 3 were there before.
    before = book([3.0, 3.0], [[1.0], [5.0]])
    codes = jnp.array([2.0, 4.0]).reshape(2, 1, 1, 1)
    after = update_codebook(before, codes, jnp.zeros((2, 1, 1), int), jnp.arange(2), 2, jax.random.key(0), ALONE)
    counts = [DECAY * 3 + (1 - DECAY) * 2, DECAY * 3]
    np.testing.assert_allclose(after["counts"], counts, rtol=1e-6)
    np.testing.assert_allclose(after["codes"][0, 0], (DECAY * 3 + (1 - DECAY) * 6) / counts[0], rtol=1e-6)
    np.testing.assert_allclose(after["codes"][1, 0], 5.0, rtol=1e-6)


def test_a_dead_code_jumps_to_a_code_vector_of_the_batch():
    before = book([3.0, 1e-4], [[1.0], [5.0]])
    codes = jnp.array([2.0, 4.0, 6.0, 8.0]).reshape(2, 1, 2, 1)
    after = update_codebook(before, codes, jnp.zeros((2, 1, 2), int), jnp.arange(2), 2, jax.random.key(0), ALONE)
    assert float(after["counts"][1]) == 2.0  # an even share of the 4 members
    assert float(after["codes"][1, 0]) in (2.0, 4.0, 6.0, 8.0)


@pytest.mark.parametrize("strategy", ["pmap", "sharded"])
def test_all_devices_pick_the_same_restarts(strategy):
    rng = np.random.default_rng(0)
    codes, ids = rng.random((8, 2, 2, 3), np.float32), rng.integers(0, 4, (8, 2, 2))
    before = book([1e-4] * 16, rng.random((16, 3)))

    def update(state, frozen, batch, axis):
        key = jax.random.key(0)
        return update_codebook(state, batch["codes"], batch["ids"], batch["row"], 8, key, axis), {}

    found = []
    for devices in (1, 8):
        parallel = Parallel(strategy, jax.local_devices()[:devices])
        state = parallel.replicate(jax.tree.map(jnp.copy, before))
        batch = {"codes": codes, "ids": ids, "row": np.arange(8, dtype=np.int32)}
        found.append(jax.device_get(parallel.update(update)(state, {}, batch)[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


def test_encode_names_the_nearest_code_and_decode_looks_it_up(trained):
    codec = codecs.load(trained.parents["tokenizer"])
    images = jnp.asarray(np.random.default_rng(0).random((3, 32, 32, 3), np.float32))
    ids = codec.encode(codec.params, images)
    assert ids.shape == (3, 16) and ids.dtype == jnp.int32
    vectors = (
        tokenizer.Tokenizer(codec.config).apply(codec.params["model"], images, method="encode").reshape(3, 16, 1, -1)
    )
    distance = ((vectors - codec.params["codebook"][None, None]) ** 2).sum(-1)
    np.testing.assert_array_equal(ids, distance.argmin(-1))
    decoded = codec.decode(codec.params, ids)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1


def test_the_loss_sums_over_samples_and_adds_a_quarter_of_the_commitment(monkeypatch):
    class Fixed:
        """Reconstructs 0, with codes of 2 next to a codebook of 1."""

        def apply(self, params, images, codebook):
            return images * 0, jnp.full((len(images), 1, 1, 4), 2.0), jnp.zeros((len(images), 1, 1), int)

    total, aux = tokenizer.loss_sums(Fixed(), {}, jnp.ones((8, 4)), jnp.full((3, 4, 4, 3), 0.5))
    assert float(total) == 3 * (0.25 + 0.25 * 1.0) and float(aux["mse"]) == 0.75


def test_phases_name_the_shapes_that_batches_have(build):
    config = tiny.get_config("tokenizer")
    (update,) = tokenizer.phases(config, None)
    batch = build(config).batch(0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype), update.args[2]
    )


def test_a_run_leaves_its_measures(trained):
    (last,) = [line for line in read_metrics(trained.parents["tokenizer"].workdir) if "eval/psnr" in line]
    assert last["step"] == 4 and last["eval/psnr"] > 0 and 1 <= last["eval/codes_used"] <= 16
    assert {"eval/verifier_graded", "eval/verifier_strict", "perf/eval_time"} <= set(last)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="32 is not divisible by patch 5"):
        TokenizerConfig(patch=5)
