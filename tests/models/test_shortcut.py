"""Both shortcut networks: the reference's numbers, the published parameter counts, and what padding may change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import dimoo_shortcut_sizes, every_configuration, load

from maskrl_jax.convert.shortcut import dimoo_params_of, params_of
from maskrl_jax.distill.feature_shortcut import Buffer, ShortcutLoss, Student, loss
from maskrl_jax.models.dimoo_shortcut import DimooShortcut, DimooShortcutConfig
from maskrl_jax.models.shortcut import Shortcut, ShortcutConfig, time_embedding

SMALL = {
    "maskgit": ShortcutConfig(width=16, heads=2, zero_init_out=False),
    "local": ShortcutConfig(width=16, heads=2, zero_init_out=False, local_mixing=True, num_tokens=4),
    "dimoo": DimooShortcutConfig(width=16, heads=2, mlp_width=12, zero_init_out=False),
}
ARGUMENTS = ("features", "controls", "positions", "valid", "rho")
MODELS = {"maskgit": Shortcut, "local": Shortcut, "dimoo": DimooShortcut}
every_form = pytest.mark.parametrize("form", SMALL)
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


def configured(form, **changes):
    return dataclasses.replace(SMALL[form], **changes)


def applied(form, config, params, batch):
    """Call a form with a batch by name; padding is the DiMOO form's alone."""
    extra = {f"{name}_BL": batch[name] for name in batch.keys() & {"padding", "query_positions"}}
    return MODELS[form](config).apply(params, *(batch[name] for name in ARGUMENTS), **extra)


def batch_of(controls=4):
    """Three samples of 7 positions; the last has one control, the others all of them."""
    keys = jax.random.split(jax.random.key(3), 3)
    return {
        "features": 2 * jax.random.normal(keys[0], (3, 7, 16)),
        "controls": jax.random.normal(keys[1], (3, controls, 16)),
        "positions": jax.random.permutation(keys[2], jnp.tile(jnp.arange(7)[None], (3, 1)), axis=1)[:, :controls],
        "valid": jnp.ones((3, controls), bool).at[2, 1:].set(False),
        "rho": jnp.array([0.9, 0.5, 0.1]),
    }


def started(form, **changes):
    """Initialise the parameters; trace it with jit or eval_shape."""
    batch = batch_of()
    return MODELS[form](configured(form, **changes)).init(jax.random.key(0), *(batch[name] for name in ARGUMENTS))


@functools.cache
def initial(form, **changes):
    return jax.jit(functools.partial(started, form, **changes))()


@functools.cache
def moved(form, **changes):
    """Parameters that are all different from their start: kernels of unit gain, scales about 1, biases about 0."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        noise = rng.normal(size=x.shape).astype(np.float32)
        return noise * len(x) ** -0.5 if x.ndim == 2 else 0.2 * noise + (path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(functools.partial(started, form, **changes)))


@functools.cache
def compiled(form, **changes):
    return jax.jit(functools.partial(applied, form, configured(form, **changes)))


def predicted(form, batch=None, params=None, **changes):
    params = moved(form, **changes) if params is None else params
    return compiled(form, **changes)(params, batch_of() if batch is None else batch)


def positions_of(inputs):
    return np.stack([np.flatnonzero(row) for row in inputs["new_token_map"]])


def maskgit_config(ctor):
    return ShortcutConfig(
        ctor["hidden_dim"], ctor["bottleneck_ratio"], ctor["n_block"], ctor["num_heads"], ctor["embed_t"]
    )


def maskgit_controls(inputs, embedded):
    """E[v] + P[p] in the order of the positions."""
    positions = positions_of(inputs)
    return embedded + inputs["pos_emb"][0][positions], np.ones(positions.shape, bool)


@every_configuration("maskgit_pt_shortcut")
def test_feature_equals_the_reference(folder):
    described, state, inputs, outputs = load(folder)
    config = maskgit_config(described["ctor"])
    controls, valid = maskgit_controls(inputs, inputs["tok_emb_weight"][inputs["new_token_ids"]])
    with jax.default_matmul_precision("highest"):
        found = jax.jit(Shortcut(config).apply)(
            params_of(state, config), inputs["prev_feat"], controls, positions_of(inputs), valid, inputs["mask_ratio"]
        )
    np.testing.assert_allclose(found, outputs["feat"], rtol=0, atol=1e-4)


@every_configuration("maskgit_pt_shortcut_train")
def test_loss_and_gradients_equal_the_reference(folder):
    """Our loss of a rollout that holds the pair as its last; gradients pass the same map as the weights.

    The reference was told a masked share that its tokens do not have, so the network is told it as well.
    """
    described, state, inputs, outputs = load(folder)
    config, masked = maskgit_config(described["ctor"]), outputs["mask_map"].astype(bool)
    count, fresh = masked.shape[1] - 1, inputs["new_token_map"].astype(bool)  # the class is the last position
    table = np.zeros((1 + inputs["cur_token_ids"].max(), config.width), np.float32)
    table[inputs["new_token_ids"][0]] = inputs["tok_emb_weight_rows"]
    features = np.stack([np.zeros_like(inputs["prev_feat"]), inputs["prev_feat"], inputs["tgt_feat"]], axis=1)
    buffer = Buffer(
        features=features[:, None],
        cond=np.zeros(1, np.int32),
        ids=np.where(masked, 0, inputs["cur_token_ids"]).astype(np.int32)[:, :count],
        commit_step=np.where(masked, 2, fresh).astype(np.uint8)[:, :count],
    )
    seen = {}

    def advance(params, features, controls, *_):
        embedded = jnp.asarray(table)[controls.ids] + jnp.asarray(inputs["pos_emb"][0])[controls.positions]
        places, share = controls.positions, jnp.asarray(inputs["mask_ratio"])
        seen["features"] = Shortcut(config).apply(params, features, embedded, places, controls.valid, share)
        return seen["features"]

    def loss_of(params):
        student = Student(advance, head=None, null=np.int32(0), num_tokens=count, most=int(fresh.sum()))
        keys, last = jax.random.split(jax.random.key(0), 1), jnp.ones((1, 1), jnp.int32)
        total, _ = loss(ShortcutLoss(), student, params, jax.tree.map(jnp.asarray, buffer), 0 * last, last, keys)
        return total, seen["features"]

    with jax.default_matmul_precision("highest"):
        (total, features), found = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params_of(state, config))
    expected = params_of({k.removeprefix("grad."): v for k, v in outputs.items() if k.startswith("grad.")}, config)
    assert len(jax.tree.leaves(found)) > 0
    np.testing.assert_allclose(total, outputs["loss"], rtol=1e-4)
    np.testing.assert_allclose(features[masked], outputs["est_feat_masked"].reshape(-1, config.width), atol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(y).max()), found, expected)


@every_configuration("dimoo_shortcut")
def test_dimoo_feature_equals_the_reference(folder):
    described, state, inputs, outputs = load(folder)
    config = dimoo_shortcut_sizes(described["model"], described)
    positions = positions_of(inputs)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(DimooShortcut(config).apply)(
            dimoo_params_of(state, config),
            inputs["prev_feat"],
            inputs["new_token"],
            positions,
            np.ones(positions.shape, bool),
            inputs["mask_ratio"],
        )
    np.testing.assert_allclose(found, outputs["feat"], rtol=0, atol=1e-4)


def shapes_of(form, config):
    """Parameter shapes without computing anything."""
    rows = jax.ShapeDtypeStruct((1, 2, config.width), jnp.float32)
    kinds = [((1, 2), jnp.int32), ((1, 2), bool), ((1,), jnp.float32)]
    rest = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    return jax.eval_shape(MODELS[form](config).init, jax.random.key(0), rows, rows, *rest)["params"]


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("form", "options", "expected"),
    [
        ("maskgit", {}, 5_081_914),
        ("maskgit", {"n_block": 2}, 8_630_842),
        ("maskgit", {"embed_t": False}, 4_584_576),
        ("maskgit", {"ratio": 1}, 16_405_435),
        ("maskgit", {"ratio": 1, "n_block": 2}, 30_581_179),
        ("maskgit", {"ratio": 1.5}, 8_555_114),
        ("maskgit", {"ratio": 1.5, "n_block": 2}, 14_859_882),
        ("maskgit", {"ratio": 4}, 1_545_054),
        ("maskgit", {"ratio": 4, "n_block": 2}, 2_434_782),
        ("maskgit", {"controls": False}, 5_081_914 - 295_296 - 592_128 - 1_182_336),
        ("dimoo", {}, 219_797_204),
        ("dimoo", {"ratio": 1}, 474_252_288),
        ("dimoo", {"ratio": 4}, 99_236_352),
        ("dimoo", {"controls": False}, 211_406_548),
    ],
)
def test_parameter_counts_are_the_published_ones(form, options, expected):
    config = ShortcutConfig(768, **options) if form == "maskgit" else DimooShortcutConfig(**options)
    assert size(shapes_of(form, config)) == expected


def test_parts_have_the_published_counts():
    params = shapes_of("maskgit", ShortcutConfig(768))
    block, time = params["block_0"], params["time"]
    attention = ("norm", "query", "key_value", "out")
    mlp = ("mlp_norm", "mlp_in", "mlp_out")
    found = {
        "input": size(params["features_in"]),
        "control": size(params["controls_in"]),
        **{f"{name} attention": size([block[f"{name}_{part}"] for part in attention]) for name in ("cross", "self")},
        **{f"{name} mlp": size([block[f"{name}_{part}"] for part in mlp]) for name in ("cross", "self")},
        "block": size(block),
        "tail": size([params[name] for name in ("norm_tail", "tail", "norm_out")]),
        "time": size([time["embed_in"], time["embed_out"]]),
        "modulation": size(time["modulation"]),
        "output": size(params["features_out"]),
    }
    assert found == {
        "input": 295_296,
        "control": 295_296,
        "cross attention": 592_128,
        "self attention": 592_128,
        "cross mlp": 1_182_336,
        "self mlp": 1_182_336,
        "block": 3_548_928,
        "tail": 149_376,
        "time": 201_658,
        "modulation": 295_680,
        "output": 295_680,
    }


@every_form
def test_padded_controls_equal_unpadded(form):
    """The last sample has one control and padding with numbers of its own, far larger than the real ones."""
    batch = batch_of()
    controls = jnp.where(batch["valid"][..., None], batch["controls"], 30.0)
    single = {name: x[2:, :1] if name in ("controls", "positions", "valid") else x[2:] for name, x in batch.items()}
    close(predicted(form, batch | {"controls": controls})[2:], predicted(form, single))


@every_form
def test_order_of_controls_is_irrelevant(form):
    batch, order = batch_of(), jnp.array([2, 0, 3, 1])
    turned = {name: batch[name][:, order] for name in ("controls", "positions", "valid")}
    close(predicted(form, batch | turned), predicted(form))
    wrong = batch | {"controls": batch["controls"].at[0].multiply(-1)}
    assert np.abs(predicted(form, wrong) - predicted(form))[0].max() > 1e-2


@every_form
def test_row_without_controls_gets_nothing_from_cross_attention(form):
    """The same number as a cross-attention whose output projection is 0, bias included; other rows keep theirs.

    Nor does such a row get anything from a stem.
    """
    batch, params = batch_of(), moved(form)
    empty = batch | {"valid": batch["valid"].at[1].set(False)}
    module, out = ("block_0_first", "out") if form == "dimoo" else ("block_0", "cross_out")
    layers = params["params"] | {
        module: params["params"][module] | {out: jax.tree.map(jnp.zeros_like, params["params"][module][out])}
    }
    if form == "local":
        layers["stem"] = jax.tree.map(jnp.zeros_like, layers["stem"])
    found = predicted(form, empty)
    close(found[1], predicted(form, params={"params": layers})[1])
    close(found[::2], predicted(form)[::2])
    assert np.abs(found - predicted(form))[1].max() > 1e-2
    gradient = jax.jit(jax.grad(lambda params: applied(form, configured(form), params, empty).sum()))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@every_form
def test_batch_equals_singles(form):
    batch = batch_of()
    singles = [predicted(form, jax.tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in range(3)]
    close(jnp.concatenate(singles), predicted(form))


@every_form
@pytest.mark.parametrize(("ratio", "embed_t"), [(2, True), (1, True), (1, False)])
def test_start_is_the_frozen_feature_and_can_move(form, ratio, embed_t):
    """Bit for bit; at ratio 1, without a projection, the last norm and the modulation start at zero instead."""
    options = {"zero_init_out": True, "ratio": ratio, "embed_t": embed_t}
    batch, params = batch_of(), initial(form, **options)
    np.testing.assert_array_equal(predicted(form, batch, params, **options), batch["features"])

    def error(params):
        return (applied(form, configured(form, **options), params, batch) ** 2).sum()

    assert max(np.abs(x).max() for x in jax.tree.leaves(jax.jit(jax.grad(error))(params))) > 1e-2


@every_form
def test_zero_output_projection_equals_the_frozen_feature(form):
    params = moved(form)["params"]
    still = {"params": params | {"features_out": jax.tree.map(jnp.zeros_like, params["features_out"])}}
    np.testing.assert_array_equal(predicted(form, params=still), batch_of()["features"])


@every_form
def test_official_start_is_not_the_frozen_feature(form):
    assert np.abs(predicted(form, params=initial(form)) - batch_of()["features"]).max() > 1e-1


@every_form
def test_rho_is_per_sample(form):
    batch = batch_of()
    changed = predicted(form, batch | {"rho": batch["rho"].at[0].set(0.2)})
    assert np.abs(changed - predicted(form))[0].max() > 1e-2
    close(changed[1:], predicted(form)[1:])
    with pytest.raises(AssertionError, match="shape"):
        predicted(form, batch | {"rho": batch["rho"][:1]})


def test_time_embedding_is_cosines_then_sines_of_a_thousand_rho():
    """Frequencies fall from 1 to 10000^(-127/128)."""
    found = time_embedding(jnp.array([0.0, 1.0, 0.001]))
    assert (found.shape, found.dtype) == ((3, 256), jnp.float32)
    np.testing.assert_array_equal(found[0], np.repeat([1.0, 0.0], 128))
    close(found[2, [0, 128, 127, 255]], [0.540302, 0.841471, 1.0, 1.0746e-4])
    close(found[1, [0, 128, 64, 192]], [np.cos(1000), np.sin(1000), np.cos(10), np.sin(10)], atol=1e-4)


@pytest.mark.parametrize(
    ("form", "change", "same_tree"),
    [
        ("maskgit", {"kv_prenorm": True}, True),
        ("maskgit", {"embed_t": False}, False),
        ("maskgit", {"controls": False}, False),
        ("maskgit", {"n_block": 2}, False),
        ("maskgit", {"local_mixing": True, "num_tokens": 4}, False),
        ("local", {"controls": False}, False),
        ("dimoo", {"embed_t": False}, False),
        ("dimoo", {"controls": False}, False),
        ("dimoo", {"n_block": 2}, False),
        ("dimoo", {"rope_theta": 100.0}, True),
        ("dimoo", {"rms_eps": 0.1}, True),
    ],
)
def test_every_option_changes_the_result(form, change, same_tree):
    assert (jax.tree.structure(moved(form, **change)) == jax.tree.structure(moved(form))) is same_tree
    found = predicted(form, params=moved(form) if same_tree else None, **change)
    assert np.isfinite(found).all()
    assert np.abs(found - predicted(form)).max() > 1e-3


def test_prenorm_of_keys_makes_the_scale_of_the_controls_irrelevant():
    batch = batch_of()
    params = moved("maskgit", kv_prenorm=True)["params"]
    still = params | {"controls_in": params["controls_in"] | {"bias": jnp.zeros(8)}}
    found = [
        predicted("maskgit", batch | {"controls": scale * batch["controls"]}, {"params": still}, kv_prenorm=True)
        for scale in (4, 8)
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


@every_form
def test_without_controls_nothing_of_them_is_read(form):
    other = batch_of() | {"controls": jnp.full((3, 4, 16), jnp.nan), "valid": jnp.zeros((3, 4), bool)}
    np.testing.assert_array_equal(predicted(form, other, controls=False), predicted(form, controls=False))


def test_neighbours_alone_see_a_token_through_the_stem():
    """In a grid of 3 x 3 with attention switched off, a token at a corner reaches 4 cells."""
    changes = {"num_tokens": 9}
    batch = batch_of() | {"features": jnp.ones((3, 10, 16)), "positions": jnp.zeros((3, 4), jnp.int32)}
    params = moved("local")["params"]
    silent = {name: jax.tree.map(jnp.zeros_like, params["block_0"][name]) for name in ("cross_out", "self_out")}
    silent |= {"local": jax.tree.map(jnp.zeros_like, params["block_0"]["local"])}
    params = {"params": params | {"block_0": params["block_0"] | silent}}
    other = batch | {"controls": -batch["controls"]}
    moves = predicted("local", batch, params, **changes) - predicted("local", other, params, **changes)
    assert np.flatnonzero(np.abs(moves[0]).max(-1) > 1e-4).tolist() == [0, 1, 3, 4]


@every_form
def test_bfloat16_computes_near_float32_and_keeps_float32_outside(form):
    found = predicted(form, params=moved(form), dtype="bfloat16")
    assert found.dtype == jnp.float32
    params = jax.eval_shape(functools.partial(started, form, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    difference = np.abs(found - predicted(form))
    assert 0 < difference.max() < 0.3


def test_remat_changes_nothing():
    def total(params, remat):
        return jnp.sin(applied("maskgit", configured("maskgit", remat=remat), params, batch_of())).sum()

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    jax.tree.map(
        functools.partial(close, atol=1e-4), gradient(moved("maskgit"), False), gradient(moved("maskgit"), True)
    )


def test_dimoo_sees_only_relative_positions():
    batch = batch_of()
    shifted = batch | {
        "positions": batch["positions"] + 9,
        "query_positions": jnp.tile(jnp.arange(9, 16)[None], (3, 1)),
    }
    close(predicted("dimoo", shifted), predicted("dimoo"), atol=1e-4)
    elsewhere = batch | {"positions": batch["positions"] + 9}
    assert np.abs(predicted("dimoo", elsewhere) - predicted("dimoo")).max() > 1e-2


@pytest.mark.parametrize("controls", [True, False])
def test_dimoo_left_padding_equals_unpadded(controls):
    batch = batch_of()
    padded = batch | {
        "features": jnp.concatenate([jnp.full((3, 2, 16), 5.0), batch["features"]], axis=1),
        "padding": jnp.tile(jnp.arange(9)[None] < 2, (3, 1)),
        "query_positions": jnp.tile(jnp.maximum(jnp.arange(9) - 2, 0)[None], (3, 1)),
    }
    close(predicted("dimoo", padded, controls=controls)[:, 2:], predicted("dimoo", controls=controls))
    seen = predicted("dimoo", padded | {"padding": jnp.zeros((3, 9), bool)}, controls=controls)[:, 2:]
    assert np.abs(seen - predicted("dimoo", controls=controls)).max() > 1e-2


def test_dimoo_block_weights_start_as_a_normal_cut_at_three_deviations():
    kernel = initial("dimoo", mlp_width=512)["params"]["block_0_first"]["mlp_out"]["kernel"] * 512**0.5
    assert 2.5 < np.abs(kernel).max() <= 3
    np.testing.assert_allclose(kernel.std(), 0.9866, atol=0.03)


@pytest.mark.parametrize(
    ("form", "wrong", "message"),
    [
        *(
            (form, {name: 0}, f"^{name} 0 must be at least 1$")
            for form in SMALL
            for name in ("width", "heads", "n_block")
        ),
        ("maskgit", {"ratio": 0.5}, "^ratio 0.5 must be at least 1$"),
        ("maskgit", {"ratio": float("nan")}, "^ratio nan must be at least 1$"),
        ("maskgit", {"heads": 3}, "^inner width 8 is not divisible by heads 3$"),
        ("local", {"num_tokens": 6}, "^local_mixing needs a square grid; num_tokens 6 is none$"),
        ("local", {"num_tokens": 0}, "^local_mixing needs a square grid; num_tokens 0 is none$"),
        ("maskgit", {"ratio": 64}, "^inner width 0 is not divisible by heads 2$"),
        ("dimoo", {"ratio": 0}, "^ratio 0 must be at least 1$"),
        ("dimoo", {"mlp_width": 0}, "^mlp_width 0 must be at least 1$"),
        ("dimoo", {"heads": 8}, "^inner width 8 over heads 8 is odd: no pairs to rotate$"),
    ],
)
def test_impossible_sizes_are_refused(form, wrong, message):
    with pytest.raises(ValueError, match=message):
        configured(form, **wrong)
