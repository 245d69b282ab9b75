"""The FID network: its pools by loops, and all of it against numbers of torch-fidelity on made-up weights."""

import math

import hashed
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert import files
from maskrl_jax.convert.inception import params_of
from maskrl_jax.models.inception import FORKED, SIZE, InceptionV3, Mixed, pooled
from maskrl_jax.models.resize import resize


@pytest.fixture(scope="module")
def features():
    """The features of two images of 64 x 80 on the hashed weights."""
    model = jax.jit(InceptionV3().apply)
    batch = resize(hashed.images(2, 64, 80), "bilinear_tf1", SIZE)
    return jax.tree.map(np.asarray, model(params_of(hashed.inception_state()), batch))


def test_features_are_those_that_torch_fidelity_computed(features):
    """torch-fidelity 0.4.0, torch 2.13, the same weights and images; `spatial` from a hook on Mixed_6d.branch1x1."""
    found = {
        "pool": features.pool[:, [0, 700, 1500, 2047]],
        "spatial": features.spatial[:1, [0, 1, 300, 1000, 2022]],
        "logits": features.logits[:1, [0, 500, 1007]],
    }
    expected = {
        "pool": [
            [1.2490946054458618, 0.9063093662261963, 0.028626717627048492, 0.0012349043972790241],
            [1.374111294746399, 0.8589164018630981, 0.03050895221531391, 0.0],
        ],
        "spatial": [[0.0, 2.915574073791504, 0.2747659981250763, 0.012510579079389572, 0.19425435364246368]],
        "logits": [[0.8688774108886719, -1.421939492225647, -3.6811747550964355]],
    }
    for name, numbers in expected.items():
        np.testing.assert_allclose(found[name], numbers, rtol=0, atol=1e-4, err_msg=name)


def test_whole_outputs_have_the_moments_of_torch_fidelity_s(features):
    means = ([1.2790904229899573, 1.2748662498215424], [1.1280414141376225, 1.1263977670188103])
    means += ([-0.18732096614050014, -0.18202399050018617],)
    deviations = ([1.7332055352931968, 1.727598602421862], [1.2931064984015453, 1.3035424718947606])
    deviations += ([3.0985317066042124, 3.0866137099304267],)
    for found, mean, deviation in zip(features, means, deviations, strict=True):
        np.testing.assert_allclose(found.mean(axis=1, dtype=float), mean, atol=1e-5)
        np.testing.assert_allclose(found.std(axis=1, ddof=1, dtype=float), deviation, atol=1e-5)


def test_outputs_are_float32_of_the_published_sizes(features):
    assert [(x.shape, x.dtype) for x in features] == [((2, n), np.float32) for n in (2048, 2023, 1008)]


@pytest.mark.parity
def test_features_are_torch_fidelity_s(features, tmp_path):
    torch = pytest.importorskip("torch", reason="no torch (extra parity)")
    fidelity = pytest.importorskip("torch_fidelity", reason="no torch-fidelity (extra parity)")
    file = tmp_path / "weights.pth"
    torch.save({name: torch.tensor(value) for name, value in hashed.inception_state().items()}, file)
    theirs = fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    )
    kept = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: kept.append(output[:, :7]))
    with torch.no_grad():
        pool, logits = theirs(torch.tensor(hashed.images(2, 64, 80)).permute(0, 3, 1, 2))
    spatial = kept[0].permute(0, 2, 3, 1).flatten(1)
    for found, expected in zip(features, (pool, spatial, logits), strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4 * float(expected.abs().max()))
    again = params_of(files.read(file))
    jax.tree.map(np.testing.assert_array_equal, again, params_of(hashed.inception_state()))


def test_full_size_has_the_published_number_of_parameters():
    """23,850,960 parameters and 34,432 stored moments in torch; the 1008 biases of the logits are not ours."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == 23_850_960 + 34_432 - 1008


@pytest.mark.parametrize(("kind", "reduce"), [("average", np.mean), ("max", np.max)])
def test_pools_leave_the_padding_out(kind, reduce):
    x = hashed.hashed((1, 4, 5, 2), 0) - 2  # all below 0: a padded zero would win the maximum
    expected = np.zeros_like(x)
    for row in range(4):
        for column in range(5):
            window = x[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            expected[:, row, column] = reduce(window, axis=(1, 2))
    np.testing.assert_allclose(pooled(jnp.asarray(x), kind), expected, atol=1e-6)


def test_last_block_pools_the_maximum_and_the_one_before_the_average():
    x = jnp.asarray(hashed.hashed((1, 3, 3, 4), 1))
    params = jax.jit(Mixed(FORKED, "max").init)(jax.random.key(0), x)
    last, before = (jax.jit(Mixed(FORKED, pool).apply)(params, x) for pool in ("max", "average"))
    assert last.shape == (1, 3, 3, 2048)
    np.testing.assert_array_equal(last[..., :1856], before[..., :1856])
    assert np.abs(last[..., 1856:] - before[..., 1856:]).max() > 0.1


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"^images must be \[B,299,299,3\], not \[2, 256, 299, 3\]"):
        jax.eval_shape(InceptionV3().init, jax.random.key(0), jax.ShapeDtypeStruct((2, 256, 299, 3), jnp.float32))
