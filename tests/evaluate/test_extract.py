"""From images to features with a network of three means, and with the real one over eight devices."""

import hashed
import numpy as np
import pytest

from maskrl_jax.convert.inception import params_of
from maskrl_jax.evaluate.extract import extract, generated, network
from maskrl_jax.evaluate.measure import Generated, System
from maskrl_jax.evaluate.protocols import PROTOCOLS
from maskrl_jax.models.inception import SIZE, Features
from maskrl_jax.parallel import Parallel

PROTOCOL = PROTOCOLS["torch_fidelity"]
IMAGES = hashed.images(7, 6, 8)
SAMPLES = [(str(i), image) for i, image in enumerate(IMAGES)]


@pytest.fixture
def means():
    """A network whose features are means of channels; it counts the batches that it saw."""

    def apply(images):
        assert images.shape[1:] == (SIZE, SIZE, 3) and images.dtype == np.float32
        apply.batches.append(len(images))
        colours = images.mean((1, 2))
        return Features(colours, colours[:, :2], -colours)

    apply.batches = []
    return apply


def test_every_image_counts_once_and_every_batch_has_one_size(means):
    found = extract(SAMPLES, means, PROTOCOL, batch_size=4, keep=("pool", "logits"), groups=2)
    assert means.batches == [4, 4] and found.count == 7
    np.testing.assert_array_equal(found.logits, -found.pool)
    pool, spatial = found.moments
    assert (pool.count, spatial.count, [g.count for g in found.pool_groups]) == (7, 7, [4, 3])
    np.testing.assert_allclose(pool.mean, found.pool.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.pool_groups[1].mean, found.pool[1::2].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_do_not_matter(means, batch_size):
    expected, found = (extract(SAMPLES, means, PROTOCOL, size) for size in (4, batch_size))
    np.testing.assert_allclose(found.moments[0].scatter, expected.moments[0].scatter, rtol=1e-5)
    assert found.sha256 == expected.sha256 and found.pool is None and found.logits is None


def test_images_of_several_sizes_share_a_batch(means):
    mixed = [("small", IMAGES[0, :3]), ("wide", IMAGES[1]), ("wider", hashed.images(1, 6, 40)[0])]
    whole = extract(mixed, means, PROTOCOL, 4, keep=("pool",)).pool
    alone = [extract([sample], means, PROTOCOL, 4, keep=("pool",)).pool[0] for sample in mixed]
    np.testing.assert_allclose(whole, alone, rtol=1e-5)
    assert means.batches == [4] * 4


def test_floats_are_measured_as_their_bytes(means):
    floats = [(key, image / np.float32(255)) for key, image in SAMPLES]
    rounded, whole = extract(floats, means, PROTOCOL, 4), extract(SAMPLES, means, PROTOCOL, 4)
    assert rounded.sha256 == whole.sha256
    assert (rounded.rounded, whole.rounded, extract(SAMPLES, means, PROTOCOLS["stretch"], 4).rounded) == (
        True,
        False,
        True,
    )


def test_limit_takes_the_first(means):
    assert extract(SAMPLES, means, PROTOCOL, 4, limit=3).sha256 == extract(SAMPLES[:3], means, PROTOCOL, 2).sha256


def test_sum_tells_images_keys_and_order_apart(means):
    sets = [SAMPLES, SAMPLES[::-1], [("x", SAMPLES[0][1]), *SAMPLES[1:]], [("0", IMAGES[6]), *SAMPLES[1:]]]
    assert len({extract(samples, means, PROTOCOL, 8).sha256 for samples in sets}) == 4


def test_a_key_that_comes_twice_is_refused(means):
    with pytest.raises(ValueError, match="^the sample 2 comes twice: every sample counts once$"):
        extract([*SAMPLES, SAMPLES[2]], means, PROTOCOL, 4)
    with pytest.raises(ValueError, match="^there are no samples to measure$"):
        extract([], means, PROTOCOL, 4)


def test_samples_of_a_generator_depend_on_their_index_alone(means):
    def generate(setting, cond, ids, seed):
        draws = [np.random.default_rng([seed, i]).random((4, 4, 3), np.float32) for i in ids]
        return Generated(np.stack(draws) * cond[:, None, None, None], np.ones(len(ids)), np.zeros((len(ids), 1)))

    system, cond = System("s", "S", generate), np.linspace(0.5, 1, 10, dtype=np.float32)
    one = dict(generated(system, 8, cond, seed=3, ids=range(10), batch_size=4))
    parts = [dict(generated(system, 8, cond, 3, ids, 3)) for ids in ([9, 0, 4], [1, 2, 3, 5, 6, 7, 8])]
    assert list(one) == [str(i) for i in range(10)]
    for key, image in (parts[0] | parts[1]).items():
        np.testing.assert_array_equal(image, one[key])
    other = dict(generated(system, 8, cond, seed=4, ids=[0], batch_size=1))
    assert np.abs(other["0"] - one["0"]).max() > 0.1
    with pytest.raises(ValueError, match="the sample 1 comes twice"):
        extract(generated(system, 8, cond, 3, [1, 1], 2), means, PROTOCOL, 2)


def test_network_runs_over_all_devices():
    """Two images on eight devices; the numbers are torch-fidelity's, see tests/models/test_inception.py."""
    samples = list(zip("ab", hashed.images(2, 64, 80), strict=True))
    apply = network(Parallel("pmap"), params_of(hashed.inception_state()))
    found = extract(samples, apply, PROTOCOL, 8, keep=("pool", "logits"))
    assert found.pool.shape == (2, 2048) and found.moments[1].mean.shape == (2023,)
    np.testing.assert_allclose(found.pool[:, 700], [0.9063093662261963, 0.8589164018630981], atol=1e-4)
    np.testing.assert_allclose(found.logits[0, 500], -1.421939492225647, atol=1e-4)
