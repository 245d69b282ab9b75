"""Training on shards is training on the pictures they were made of; shards of anything else are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_tokenizers
import tiny
from PIL import Image

from configs import kl_vae as kl_vae_config
from configs import mar as mar_config
from configs import marval as marval_config
from maskrl_jax import runner, shards
from maskrl_jax.axis import Axis
from maskrl_jax.data import encoded
from maskrl_jax.data.dataset import Conditioning, Dataset, conditioning_of, open_dataset
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel
from maskrl_jax.tasks import encoding, kl_vae, mar, marval, maskgit
from maskrl_jax.tasks.task import Context, Parent
from tests.continuous import images, random_networks

STEPS = 3


def encode(parent, store, folder, dtype="float32", batch_size=40, devices=1):
    """Write all shards of tiny shapes; a batch does not fill a shard, and a shard no batch."""
    made, train = encoding.encoding_of(parent, dtype), open_dataset("shapes", "train", f"{store}/data", 32)
    manifest = shards.manifest_of(made, encoding.identity(parent), train, "train", shard_size=36)
    encoded.begin(folder, manifest)
    parallel = Parallel("pmap", jax.local_devices()[:devices])
    shards.write(made, train, manifest, folder, manifest.missing(folder), parallel, batch_size)
    found = encoded.Shards(folder, manifest)
    found.check()
    return found, train


@pytest.fixture(scope="module")
def tokens(trained, tmp_path_factory):
    """Folder of the tiny tokenizer's codes."""
    folder = str(tmp_path_factory.mktemp("tokens"))
    encode(trained.parents["tokenizer"], trained.store, folder)
    return folder


@pytest.fixture(scope="module")
def vae(trained):
    """A KL-VAE that nobody trained."""
    config = kl_vae_config.get_config("smoke")
    state = jax.jit(kl_vae.Wiring(config).init)(jax.random.key(3))
    latents = {"mean": np.linspace(-0.1, 0.1, 4, dtype=np.float32), "square": np.full(4, 0.7, np.float32)}
    return Parent(config, jax.device_get(state.params), {"latents": latents}, "vae")


@pytest.fixture(scope="module")
def moments(trained, vae, tmp_path_factory):
    """Folder of its moments."""
    folder = str(tmp_path_factory.mktemp("moments"))
    encode(vae, trained.store, folder)
    return folder


def trained_on(task):
    state = task.init(jax.random.key(0))
    for step in range(STEPS):
        state, _ = task.step(state, task.batch(step))
    return jax.device_get(state.params)


def close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def test_codes_are_those_that_an_update_would_make(trained, tokens, tmp_path):
    found, train = encode(trained.parents["tokenizer"], trained.store, str(tmp_path), batch_size=8, devices=8)
    wiring = maskgit.Wiring(tiny.get_config("maskgit"), conditioning_of("shapes"))
    frozen = {"tokenizer": encoding.encoding_of(trained.parents["tokenizer"]).params}
    expected = jax.jit(lambda frozen, batch: wiring.codes(frozen, batch, Axis(1)))(
        frozen, {"image": train.columns["image"]}
    )
    assert found.columns()["tokens"][0].dtype == np.uint16 and len(found) == tiny.SPLIT_SIZES["train"]
    np.testing.assert_array_equal(np.asarray(found.columns()["tokens"]), expected)
    for name in ("cond", "label"):
        np.testing.assert_array_equal(np.asarray(found.columns()[name]), train.columns[name])
    other = encoded.Shards(tokens, encoded.read_manifest(tokens, "train"))
    np.testing.assert_array_equal(np.asarray(other.columns()["tokens"]), expected)


@pytest.mark.parametrize(("strategy", "devices"), [("pmap", 1), ("sharded", 8)])
def test_maskgit_on_codes_ends_where_it_does_on_pictures(build, tokens, strategy, devices):
    plain, on_codes = (build(config, strategy, devices) for config in configs_of("maskgit", tokens))
    batch = on_codes.batch(0)
    assert set(batch) == {"tokens", "cond", "index"}
    assert set(plain.batch(0)) == {"image", "cond", "index"}
    close(trained_on(on_codes), trained_on(plain))


def configs_of(stage, folder):
    config = tiny.get_config(stage)
    yield config
    other = tiny.get_config(stage)
    other.data.encoded = folder
    yield other


def test_mar_on_moments_ends_where_it_does_on_pictures(trained, vae, moments, tmp_path):
    ends = []
    for folder in ("", moments):
        config = mar_config.get_config("smoke")
        config.data.encoded, config.optimizer = folder, tiny.SGD | {"ema_decay": 0.5}
        parallel = Parallel("pmap", jax.local_devices()[:1])
        task = runner.build(Context(config, {"tokenizer": vae}, parallel, trained.store, str(tmp_path)))
        assert ("moments" in task.batch(0)) == bool(folder)
        ends.append(trained_on(task))
    close(*ends)


def test_half_moments_move_tokens_by_their_rounding_alone(trained, vae, tmp_path):
    found, train = encode(vae, trained.store, str(tmp_path), "float16")
    half = np.asarray(found.columns()["moments"])
    assert half.dtype == np.float16
    wiring = mar.Wiring(mar_config.get_config("smoke"), conditioning_of("shapes"))
    frozen = {"tokenizer": encoding.encoding_of(vae).params}
    keys = jax.random.split(jax.random.key(0), len(train))
    examples = jax.jit(wiring.examples)
    whole, order, _ = examples(keys, frozen, {"image": train.columns["image"]})
    read = encoding.read_by(config_with("x"), frozen["tokenizer"])
    assert set(read) == {"latents"}
    rounded, same, _ = examples(keys, {"tokenizer": read}, {"moments": half})
    np.testing.assert_array_equal(order, same)
    assert 0 < float(jnp.abs(rounded - whole).max()) < 2e-3 * float(jnp.abs(whole).max())


def config_with(folder):
    config = mar_config.get_config("smoke")
    config.data.encoded = folder
    return config


def test_marval_sees_the_same_tokens_of_moments(vae):
    config = marval_config.get_config("smoke")
    config.batch_size = 4
    wiring = marval.Wiring(config, conditioning_of("shapes"))
    _, frozen = random_networks(wiring)
    pictures = images(wiring, 4)
    batch = {"cond": np.tile(np.int32(wiring.null), (4, 1)), "index": np.arange(4, dtype=np.int32)}
    batch |= {"round": np.zeros(4, np.int32)}
    stored = jax.jit(wiring.base.codec.moments)(frozen["tokenizer"], pictures.astype(np.float32) / 255)
    on_moments = batch | {"moments": jnp.concatenate(stored, -1)}
    statistics = frozen | {"tokenizer": encoding.read_by(config_with("x"), frozen["tokenizer"])}
    jax.eval_shape(wiring.prepared, statistics, on_moments)
    examples = jax.jit(lambda frozen, batch: wiring.base.examples(keys, frozen, batch, wiring.masking))
    keys = jax.random.split(jax.random.key(0), 4)
    close(examples(frozen, batch | {"image": pictures}), examples(statistics, on_moments))


@pytest.mark.parametrize("stage", ["maskgit", "mar", "marval"])
def test_the_update_of_a_dry_run_has_no_encoder(stage):
    module, operations = {"maskgit": maskgit, "mar": mar, "marval": marval}[stage], []
    for folder in ("", "anywhere"):
        config = {"mar": mar_config, "marval": marval_config}.get(stage, tiny).get_config(
            "maskgit" if stage == "maskgit" else "smoke"
        )
        config.data.encoded = folder
        phase = module.phases(config, Parallel("pmap", jax.local_devices()[:1]))[-1]
        operations.append((len(jax.tree.leaves(phase.args[1]["tokenizer"])), set(phase.args[2])))
    (all_of_it, pictures), (rest, stored) = operations
    assert rest == (0 if stage == "maskgit" else 2) < all_of_it
    assert pictures - stored == {"image"} and len(stored - pictures) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [({"tokenizer": "other"}, "tokenizer"), ({"data": "digits"}, "set"), ({"image_size": 64}, "image size")],
)
def test_shards_of_others_are_refused(build, tokens, tmp_path, change, named):
    manifest = encoded.read_manifest(tokens, "train")
    encoded.begin(str(tmp_path), encoded.dataclasses.replace(manifest, **change))
    (_, config) = configs_of("maskgit", str(tmp_path))
    with pytest.raises(UserError, match=f"was made of another {named}; encode into a new folder"):
        build(config)


def test_texts_that_became_ids_in_another_way_are_refused(trained, tokens, tmp_path):
    manifest = dataclasses.replace(encoded.read_manifest(tokens, "train"), texts="clip, 8 ids")
    encoded.begin(str(tmp_path), manifest)
    _, config = configs_of("maskgit", str(tmp_path))
    held_out = open_dataset("shapes", "validation", f"{trained.store}/data", 32)
    with pytest.raises(UserError, match=r"was made of another way from texts to ids \(data.tokens"):
        encoding.encoded_set(config.data, trained.parents["tokenizer"], held_out)


def test_classes_of_shards_are_known_without_reading_a_record(tmp_path):
    fields = (("index", "<i8", ()), ("cond", "<i4", ()), ("tokens", "<u2", (4,)))
    encoded.begin(str(tmp_path), encoded.Manifest("", "digits", "train", 32, 1, 1, fields))
    told = Conditioning("class", 4, 0, np.array(3, np.int32))
    kept = Dataset("toy", {"cond": np.array([2, 0, 1, 1], np.int32)}, told, None, None)
    plain, config = configs_of("maskgit", str(tmp_path))
    found = encoding.pool(dataclasses.replace(kept, columns={}), config)
    np.testing.assert_array_equal(found, encoding.pool(kept, plain), strict=True)


def test_a_folder_that_is_not_there_or_not_complete_is_told(build, tokens, tmp_path):
    (_, config) = configs_of("maskgit", str(tmp_path))
    with pytest.raises(UserError, match="has no train.json; make it with python -m maskrl_jax.encode"):
        build(config)
    encoded.begin(str(tmp_path), encoded.read_manifest(tokens, "train"))
    with pytest.raises(UserError, match="lacks 3 of 3 shards"):
        build(config)


def test_prompts_with_pictures_have_no_label(trained, tmp_path):
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"prompt": f"cat {number}", "image": f"{number}.png"} for number in range(3)]
    (tmp_path / "my.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = text_tokenizers.write_clip(tmp_path / "clip")
    data = {"name": str(tmp_path / "my.jsonl"), "text_length": 12, "tokens": "clip", "tokenizer": str(files)}
    parent, train = trained.parents["tokenizer"], open_dataset(data, "train", "unused", 32)
    made, folder = encoding.encoding_of(parent), str(tmp_path / "shards")
    manifest = shards.manifest_of(made, encoding.identity(parent), train, "train", shard_size=2)
    encoded.begin(folder, manifest)
    shards.write(made, train, manifest, folder, [0, 1], Parallel("pmap", jax.local_devices()[:1]), 2)
    columns = encoded.Shards(folder, manifest).columns()
    assert set(columns) == {"cond", "tokens"}
    np.testing.assert_array_equal(np.asarray(columns["cond"]), train.columns["cond"])


def test_a_stage_that_is_no_tokenizer_encodes_nothing(trained):
    with pytest.raises(UserError, match="holds a 'judge' stage; give a tokenizer or kl_vae"):
        encoding.encoding_of(trained.parents["judge"])
