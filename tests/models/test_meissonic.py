"""Meissonic's transformer: parity with the reference, parameter counts, and what it may depend on."""

import dataclasses
import functools
import math

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.meissonic import config_of, params_of
from maskrl_jax.models import mmdit
from maskrl_jax.models.layers import sinusoid
from maskrl_jax.models.meissonic import Meissonic, MeissonicConfig, Prompt

SMALL = MeissonicConfig(
    grid=(4, 6), codebook_size=6, vocab_size=9, depth=2, single_depth=2, heads=2, head_width=8, text_width=5,
    rope_axes=(2, 4, 2),
)  # fmt: skip
# The taps that are whole modules' outputs.
TAPS = {
    "cond_embed_out": ("condition", "said"),
    "embed_out": ("token_out",),
    "text_tokens_in": ("text_norm",),
    "down_block_out": ("down",),
    "image_tokens_in": ("in_out",),
    "temb": ("condition",),
    "project_from_hidden_out": ("out",),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def prompt(batch=2, config=SMALL, length=3):
    micro = np.tile(np.float32([[1024, 1024, 0, 0, 6]]), (batch, 1))
    return Prompt(normal(0, batch, length, config.text_width), normal(1, batch, config.width), micro)


def reference(folder):
    """Return (model, params, arguments, expected outputs)."""
    config, state, inputs, outputs = fixtures.load(folder)
    ids = np.int32(inputs["hidden_states"])
    model = Meissonic(config_of(config["ctor"], ids.shape[1:]))
    cond = Prompt(inputs["encoder_hidden_states"], inputs["pooled_projections"], inputs["micro_conds"])
    timestep = np.broadcast_to(inputs["timestep"], len(ids))
    return model, params_of(state, model.config), (ids.reshape(len(ids), -1), timestep, cond), outputs


def close(found, wanted, timestep):
    """At timestep t an angle is 1000 t times a frequency, of which the reference's exp rounds one in 128 otherwise."""
    tolerance = max(5e-5, 4e-6 * np.max(timestep))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@fixtures.every_configuration("meissonic_transformer")
def test_logits_are_the_reference_s(folder):
    net, weights, arguments, outputs = reference(folder)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(net.apply)(weights, *arguments)
    wanted = outputs["logits"].reshape(*outputs["logits"].shape[:2], -1).swapaxes(1, 2)
    close(found, wanted, arguments[1])


def looped(block, sizes, params, x, *rest):
    """Blocks one by one, where the model scans."""
    for index in range(len(jax.tree.leaves(params)[0])):
        x, _ = block(sizes).apply({"params": jax.tree.map(lambda p: p[index], params)}, x, *rest)  # noqa: B023
    return x


def stages(model, params, ids, timestep, cond):
    """The reference's taps."""
    c, b = model.config, model.config.blocks
    keep = lambda module, method: method == "__call__"  # noqa: E731
    features, kept = model.apply(
        params, ids, timestep, cond, capture_intermediates=keep, mutable=["intermediates"], method="features"
    )
    found = {
        name: functools.reduce(lambda tree, part: tree.get(part, {}), path, kept["intermediates"])
        for name, path in TAPS.items()
    }
    found = {name: x["__call__"][0] for name, x in found.items() if x}
    turns = mmdit.rotations(c.rope_axes, c.inner_grid, cond.states.shape[1])
    rest = found["temb"], turns
    streams = found["text_tokens_in"], found["image_tokens_in"].astype(jnp.float32)
    text, image = looped(mmdit.DualBlock, b, params["params"]["dual_blocks"], streams, *rest)
    x = jnp.concatenate([text, image], axis=1)
    x = looped(mmdit.SingleBlock, b, params["params"]["single_blocks"], x, *rest)
    cos, sin = (x.repeat(2, axis=1) for x in turns)
    blocks = {"dual_text": text, "dual_image": image, "single_out": x, "rope_cos": cos, "rope_sin": sin}
    return {"down_block_out": found["embed_out"]} | found | blocks | {"up_block_out": features}


@fixtures.every_configuration("meissonic_transformer")
def test_every_stage_is_the_reference_s(folder):
    net, weights, arguments, outputs = reference(folder)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(functools.partial(stages, net))(weights, *arguments)
    assert found.keys() == outputs.keys() - {"logits"}
    for name, x in found.items():
        wanted = outputs[name]
        if wanted.ndim == 4:
            wanted = wanted.transpose(0, 2, 3, 1)
        close(np.reshape(x, wanted.shape), wanted, arguments[1])


@fixtures.every_configuration("meissonic_transformer")
def test_places_are_the_reference_s(folder):
    config, _, inputs, _ = fixtures.load(folder)
    c = config_of(config["ctor"], inputs["hidden_states"].shape[1:])
    rows, columns = np.indices(c.inner_grid).reshape(2, -1)
    np.testing.assert_array_equal(inputs["img_ids"], np.stack([0 * rows, rows, columns], axis=-1))
    np.testing.assert_array_equal(inputs["txt_ids"], np.zeros_like(inputs["txt_ids"]))
    assert c.mask_id == config["mask_token_id"]


# specs/meissonic.md section 1.
PUBLISHED = {
    ("tokens", "token_norm", "token_out"): 9_503_744,
    ("down_norm", "down"): 4_195_328,
    ("up_norm", "up"): 4_195_328,
    ("in_norm", "in_out"): 1_049_600,
    ("out_norm", "out"): 1_049_600,
    ("text_in", "text_norm"): 1_050_624,
    ("condition",): 3_407_872 + 3_411_968,
    ("dual_blocks",): 14 * 37_779_968,
    ("single_blocks",): 28 * 15_740_160,
    ("head_in", "head_norm", "head_out"): 9_438_208,
}


def test_full_size_has_the_published_number_of_parameters():
    config = MeissonicConfig()
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    cond = prompt(1, config, 77)
    shapes = jax.eval_shape(Meissonic(config).init, jax.random.key(0), ids, jnp.zeros(1), cond)
    counts = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in shapes["params"].items()}
    assert {names: sum(counts.pop(name) for name in names) for names in PUBLISHED} == PUBLISHED
    assert not counts and sum(PUBLISHED.values()) == 1_006_946_304
    logits, _ = jax.eval_shape(
        lambda p, *x: Meissonic(config).apply(p, *x, mutable=[]), shapes, ids, jnp.zeros(1), cond
    )
    assert (logits.shape, logits.dtype) == ((1, 4096, 8192), jnp.float32)


IDS = np.int32([np.arange(24) % 6, np.full(24, SMALL.mask_id)])
TIMES = np.int32([3, 0])


@functools.cache
def params():
    """Parameters all away from their start, made without a program."""
    shapes = jax.eval_shape(Meissonic(SMALL).init, jax.random.key(0), IDS, TIMES, prompt())
    leaves, tree = jax.tree.flatten(shapes)
    scale = lambda x: 0.3 * normal(x.size, *x.shape) + (len(x.shape) == 1 or x.shape[-1] == SMALL.head_width)  # noqa: E731
    return jax.tree.unflatten(tree, [scale(x) for x in leaves])


@functools.cache
def model(**changes):
    return Meissonic(dataclasses.replace(SMALL, **changes))


@functools.cache
def program(method="__call__", **changes):
    return jax.jit(functools.partial(model(**changes).apply, method=method))


def logits(ids=IDS, timestep=TIMES, cond=None, **changes):
    return program(**changes)(params(), ids, timestep, prompt() if cond is None else cond)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_float32_and_hold_no_mask(dtype):
    """K = 6 columns: MASK = 8 can be an input, never an output."""
    found = logits(dtype=dtype)
    assert (found.shape, found.dtype) == ((2, 24, 6), jnp.float32)
    spread = float(jnp.std(logits()))
    assert float(jnp.abs(found - logits()).max()) <= {"float32": 0, "bfloat16": 0.3}[dtype] * spread
    features = program("features", dtype=dtype)(params(), IDS, TIMES, prompt())
    assert (features.shape, features.dtype) == ((2, 24, 16), jnp.float32)
    shapes = jax.eval_shape(model(dtype=dtype).init, jax.random.key(0), IDS, TIMES, prompt())
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}


def test_the_head_takes_each_position_by_itself():
    features = program("features")(params(), IDS, TIMES, prompt())
    head = program("logits")
    np.testing.assert_allclose(head(params(), features), logits(), atol=1e-5)
    np.testing.assert_allclose(head(params(), features[:, 5:8]), logits()[:, 5:8], atol=1e-5)


def changed(x, value):
    """The first sample's first entry replaced."""
    x = x.copy()
    x[(0,) * x.ndim] = value
    return x


def test_samples_do_not_see_each_other_and_each_has_its_timestep():
    swapped = jax.tree.map(lambda x: x[::-1], prompt())
    np.testing.assert_allclose(logits(IDS[::-1], TIMES[::-1], swapped)[::-1], logits(), atol=1e-4)
    moved = np.abs(logits(timestep=np.int32([4, 0])) - logits()).max((1, 2))
    assert moved[0] > 1e-3 and moved[1] == 0


@pytest.mark.parametrize("part", Prompt._fields)
def test_every_token_sees_the_whole_condition(part):
    other = prompt()._replace(**{part: changed(getattr(prompt(), part), 1.0)})
    moved = np.abs(logits(cond=other) - logits()).max(-1)
    assert (moved[0] > 1e-5).all() and (moved[1] == 0).all()


@pytest.mark.parametrize("wrong", [-1, 6, 7, 9])
def test_an_id_that_is_no_token_gives_nan_and_no_other_row(wrong):
    """Codes are 0..5 and MASK is 8; rows 6 and 7 of the table belong to nobody."""
    found = logits(changed(IDS, wrong))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def gradient(**changes):
    apply = model(**changes).apply
    return jax.device_get(jax.jit(jax.grad(lambda p: jnp.sin(apply(p, IDS, TIMES, prompt())).sum()))(params()))


def test_gradients_reach_every_parameter_and_remat_changes_nothing():
    plain = gradient()
    stacked = jax.tree.leaves(plain["params"]["single_blocks"])
    assert all(np.abs(x).max((*range(1, x.ndim),)).min() > 0 for x in stacked)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(plain))
    for one, two in zip(*map(jax.tree.leaves, (plain, gradient(remat=True))), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize("block", [mmdit.DualBlock, mmdit.SingleBlock])
def test_every_block_starts_as_the_identity(block):
    """Modulations start at 0, and with them the gates."""
    x = (normal(0, 2, 3, 16), normal(1, 2, 6, 16)) if block is mmdit.DualBlock else normal(0, 2, 9, 16)
    rest = normal(2, 2, 16), mmdit.rotations(SMALL.rope_axes, SMALL.inner_grid, 3)
    (after, _), _ = jax.jit(block(SMALL.blocks).init_with_output)(jax.random.key(3), x, *rest)
    jax.tree.map(np.testing.assert_array_equal, after, x)


def test_rotations_keep_the_text_and_lengths_and_know_distances_alone():
    axes, grid = (2, 4, 2), (5, 6)
    cos, sin = turns = mmdit.rotations(axes, grid, 3)
    np.testing.assert_array_equal(cos[:4], 1)  # three words, and the cell at the origin
    np.testing.assert_array_equal(sin[:4], 0)
    # Row 1, column 0: the first pair of the rows' axis turns by 1, the second by 1e4^(-1/2), the others stay.
    np.testing.assert_allclose(np.arctan2(sin, cos)[3 + 6], [0, 1, 0.01, 0], rtol=1e-6)
    query, key = (jnp.broadcast_to(normal(i, 8), (1, 33, 1, 8)) for i in (0, 1))
    turned, other = (mmdit.rotated(x, turns)[0, 3:, 0].reshape(5, 6, 8) for x in (query, key))
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.full((5, 6), jnp.linalg.norm(query[0, 0])), rtol=1e-6
    )
    products = jnp.einsum("rci,rci->rc", turned[1:, 2:], other[:-1, :-2])  # one row and two columns apart
    np.testing.assert_allclose(products, jnp.full((4, 4), products[0, 0]), atol=1e-5)


def test_sinusoids():
    found = sinusoid(jnp.array([[0.0, 1.0], [63_000.0, 1.0]]))
    np.testing.assert_array_equal(found[0, 0], [1.0] * 128 + [0.0] * 128)
    np.testing.assert_allclose(found[0, 1, [0, 128]], [0.540302, 0.841471], atol=1e-6)
    assert found.shape == (2, 2, 256)
    np.testing.assert_allclose(found[1, 0, [0, 128]], [np.cos(63_000.0), np.sin(63_000.0)], atol=1e-6)


def test_bfloat16_does_not_round_the_timestep():
    """A thousand times 63 would be 62,976 there."""

    @functools.partial(jax.jit, static_argnums=1)
    def condition(timestep, dtype):
        ask = lambda module, *rest: module.condition(*rest)  # noqa: E731
        return model(dtype=dtype).apply(params(), jnp.full(2, timestep), *prompt()[1:], method=ask)

    np.testing.assert_array_equal(condition(63.0, "bfloat16"), condition(63.0, "float32"))
    assert np.abs(condition(63.0, "bfloat16") - condition(62.976, "bfloat16")).max() > 1e-2


def test_without_resampling_the_blocks_see_the_whole_grid():
    config = dataclasses.replace(SMALL, grid=(3, 5), resampled=False)
    shapes = jax.eval_shape(Meissonic(config).init, jax.random.key(0), jnp.zeros((2, 15), jnp.int32), TIMES, prompt())
    assert config.inner_grid == (3, 5) and not {"down", "up"} & shapes["params"].keys()


def test_tokens_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"^ids \(2, 23\) are not \[batch, 24\], the tokens of grid \(4, 6\)"):
        logits(IDS[:, :23])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 0}, "^heads 0 must be at least 1$"),
        ({"single_depth": -1}, "^single_depth -1 must be at least 1$"),
        ({"grid": (4, 0)}, "is not a number of rows and of columns$"),
        ({"grid": (4, 5)}, r"^grid \(4, 5\) has an odd side, which cannot be halved$"),
        ({"vocab_size": 6}, "^vocab_size 6 leaves no row for MASK beside 6 codes$"),
        ({"rope_axes": (2, 3, 3)}, "are not three even widths$"),
        ({"rope_axes": (2, 2, 2)}, "do not add up to head_width 8$"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **wrong)
