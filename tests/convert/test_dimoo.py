"""DiMOO's weights there and back, and from shards without a second copy; tests/models/test_dimoo.py has the numbers."""

import functools
import json
import math
import tracemalloc

import fixtures
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskrl_jax.convert import files
from maskrl_jax.convert.dimoo import config_of, load, params_of, places, state_of
from maskrl_jax.errors import UserError
from maskrl_jax.models.dimoo import Dimoo, DimooConfig

CONFIG = DimooConfig(vocab_size=9, codebook_size=4, width=8, depth=2, heads=4, kv_heads=2, mlp_width=6)
QUERY = "model.transformer.blocks.1.q_proj.weight"
PUBLISHED = {"embedding_size": 9, "d_model": 8, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 6,
             "rope_theta": 1e4, "rms_norm_eps": 1e-6}  # fmt: skip


def shapes():
    """The published names and shapes, written out; keys and values have half the width."""
    found = {f"model.transformer.{name}.weight": (9, 8) for name in ("wte", "ff_out")}
    found["model.transformer.ln_f.weight"] = (8,)
    parts = {"attn_norm": (8,), "ff_norm": (8,), "q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8),
             "attn_out": (8, 8), "ff_proj": (6, 8), "up_proj": (6, 8), "ff_out": (8, 6)}  # fmt: skip
    for layer in range(2):
        found |= {f"model.transformer.blocks.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return found


def state(dtype=np.float32):
    """A state dict with different numbers everywhere."""
    return {
        name: np.arange(math.prod(shape)).reshape(shape).astype(dtype) + i
        for i, (name, shape) in enumerate(shapes().items())
    }


def sharded(folder, states, index=True):
    """Write one file for each state, and an index."""
    files = [f"model-{i + 1:05}-of-{len(states):05}.safetensors" for i in range(len(states))]
    for file, part in zip(files, states, strict=True):
        save_file(part, folder / file, {"format": "pt"})
    if index:
        names = {name: file for file, part in zip(files, states, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def split(whole, count=3):
    """Deal a state to some files, so that the layers of one parameter lie in different ones."""
    names = list(whole)
    return [{name: whole[name] for name in names[i::count]} for i in range(count)]


def same_bytes(found, expected):
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        assert found[name].tobytes() == x.tobytes() and found[name].flags.c_contiguous


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_places_are_the_published_names_and_shapes():
    assert {name: place.shape for name, place in places(CONFIG).items()} == shapes()


def test_parameters_fit_the_model():
    expected = jax.eval_shape(Dimoo(CONFIG).init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    found = params_of(state(), CONFIG)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def test_linear_weights_are_transposed_into_their_layer():
    whole = state()
    kernel = params_of(whole, CONFIG)["params"]["blocks"]["query"]["kernel"]
    np.testing.assert_array_equal(kernel[1], whole[QUERY].T)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_is_equal_to_the_byte(dtype):
    whole = {name: state(dtype)[name] for name in places(CONFIG)}
    params = params_of(whole, CONFIG)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(dtype)}
    same_bytes(state_of(params, CONFIG), whole)
    same_bytes(state_of(jax.tree.map(jnp.asarray, params), CONFIG), whole)


@pytest.mark.parametrize("family", ["dimoo_llada", "dimoo_generate"])
def test_states_of_the_reference_come_back_to_the_byte(family):
    folders = [folder for folder in fixtures.configurations(family) if (folder / "state.safetensors").exists()]
    if not folders:
        pytest.skip(f"no configuration of {family}")
    for folder in folders:
        described, whole, _, _ = fixtures.load(folder)
        own = {name.removeprefix("model_lm."): x for name, x in whole.items() if not name.startswith("shortcut.")}
        config = config_of(described["model"], codebook_size=1)
        same_bytes(state_of(params_of(own, config), config), {name: own[name] for name in places(config)})


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("index", [True, False])
def test_shards_give_the_parameters_of_the_whole(tmp_path, count, index):
    sharded(tmp_path, split(state(), count), index)
    equal(load(tmp_path, CONFIG), params_of(state(), CONFIG))


def test_shards_keep_bfloat16_or_take_the_dtype_asked_for(tmp_path):
    whole = state(ml_dtypes.bfloat16)
    sharded(tmp_path, split(whole))
    kept, cast = load(tmp_path, CONFIG), load(tmp_path, CONFIG, "float32")
    equal(kept, params_of(whole, CONFIG))
    assert {x.dtype for x in jax.tree.leaves(kept)} == {np.dtype(ml_dtypes.bfloat16)}
    equal(cast, jax.tree.map(lambda x: x.astype(np.float32), kept))
    assert all(x.flags.owndata and x.flags.writeable for x in jax.tree.leaves(kept))


def test_layers_of_different_dtypes_are_refused_unless_one_is_asked_for():
    mixed = state() | {QUERY: state(np.float16)[QUERY]}
    with pytest.raises(ValueError, match=f"^{QUERY} is float16, other layers are float32; ask for one dtype$"):
        params_of(mixed, CONFIG)
    assert params_of(mixed, CONFIG, "float32")["params"]["blocks"]["query"]["kernel"].dtype == np.float32


def refusal(run):
    with pytest.raises(ValueError) as caught:
        run()
    return str(caught.value)


def wrong_state():
    """One tensor missing, one too many, one of another shape; in three files."""
    parts = split({name: x for name, x in state().items() if name != "model.transformer.ln_f.weight"})
    parts[0] |= {"model.transformer.ff_out.bias": np.zeros(9, np.float32)}
    next(part for part in parts if QUERY in part)[QUERY] = np.zeros((8, 7), np.float32)
    return parts


def test_all_misfits_are_named_over_all_shards_before_anything_is_read(tmp_path, monkeypatch):
    sharded(tmp_path, wrong_state())
    monkeypatch.setattr(files, "stream", lambda _: pytest.fail("a tensor was read"))
    expected = (
        "the state lacks model.transformer.ln_f.weight; it holds model.transformer.ff_out.bias without a place; "
        f"it holds {QUERY} of shape [8, 7], not [8, 8]"
    )
    assert refusal(lambda: load(tmp_path, CONFIG)) == expected
    whole = functools.reduce(lambda a, b: a | b, wrong_state())
    assert refusal(lambda: params_of(whole, CONFIG)) == expected


def test_long_lists_of_names_are_cut():
    message = refusal(lambda: params_of({}, CONFIG))
    assert message.startswith("the state lacks model.transformer.wte.weight, ") and message.endswith(" and 13 more")


def test_every_tensor_is_read_once(tmp_path, monkeypatch):
    sharded(tmp_path, split(state()))
    seen, stream = [], files.stream
    monkeypatch.setattr(files, "stream", lambda found: (seen.append(x[0]) or x for x in stream(found)))
    load(tmp_path, CONFIG)
    assert sorted(seen) == sorted(shapes())


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_no_second_copy_is_made(tmp_path, dtype):
    """A model of some MB in bfloat16: at the peak less than 1.06 of the result is allocated."""
    config = DimooConfig(vocab_size=500, codebook_size=64, width=192, depth=6, heads=4, kv_heads=4, mlp_width=512)
    whole = {name: np.ones(place.shape, ml_dtypes.bfloat16) for name, place in places(config).items()}
    sharded(tmp_path, split(whole, 4))
    del whole
    tracemalloc.start()
    params = load(tmp_path, config, dtype)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert size > 5e6 and size < peak < 1.06 * size


def test_broken_folders_are_refused(tmp_path):
    sharded(tmp_path, split(state()))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="^there is no .*model-00002-of-00003.safetensors$"):
        load(tmp_path, CONFIG)
    sharded(tmp_path, [*split(state()), {QUERY: state()[QUERY]}])
    with pytest.raises(UserError, match=f"^{QUERY} is both in "):
        load(tmp_path, CONFIG)


def test_sizes_of_a_published_config():
    found = config_of(PUBLISHED, codebook_size=4, dtype="bfloat16")
    assert found == DimooConfig(9, 4, 8, 2, 4, 2, 6, 1e4, 1e-6, dtype="bfloat16")
    plain = {name: x for name, x in PUBLISHED.items() if name not in ("n_kv_heads", "embedding_size")}
    assert config_of(plain | {"vocab_size": 9, "include_qkv_bias": None}, codebook_size=4).kv_heads == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_tying": True}, "weight_tying True is not supported, only False"),
        ({"block_type": "sequential"}, "block_type 'sequential' is not supported, only 'llama'"),
        ({"mlp_hidden_size": None, "n_layers": None}, "the model's config lacks n_layers, mlp_hidden_size"),
    ],
)
def test_other_models_are_refused(change, message):
    assert refusal(lambda: config_of(PUBLISHED | change, codebook_size=4)) == message
