"""Published weights become a stage that samples and is tuned from, and go back byte for byte."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax import published, runner, stored
from maskrl_jax.convert import files
from maskrl_jax.errors import UserError
from maskrl_jax.published import FAMILIES

CONFIG = """
from configs import kl_vae, mar, maskgit, tokenizer

CONV = {"width": 32, "multipliers": (1, 1, 1), "blocks": 1, "encoder_attention": (2,), "decoder_attention": (2,)}

def get_config(arg):
    return {"tokenizer": vq, "maskgit": port, "kl_vae": vae, "mar": small_mar, "vq": patches, "long": long, "asked": asked,
            "long_mar": long_mar}[arg]()

def vq():
    config = tokenizer.get_config("digits-smoke")
    config.model = {"form": "taming", "image_size": 32, "codebook_size": 16, "code_width": 8, "channels": 8, "conv": CONV}
    return config

def port():
    config = maskgit.get_config("digits-smoke")
    config.parents.tokenizer = vq()
    config.model = {"form": "port", "width": 16, "depth": 2, "heads": 2, "mlp_width": 32}
    config.sampler.update({"num_steps": 2, "max_steps": 2})
    config.evaluation.update({"steps": (1, 2), "glance_steps": 2})
    return config

def long():
    config = port()
    config.sampler.update({"num_steps": 65, "max_steps": 65})
    return config

def asked():
    config = port()
    config.sampler.max_steps = 99
    config.evaluation.steps = (2, 66)
    return config

def long_mar():
    config = small_mar()
    config.evaluation.steps = (2, 67)
    return config

def vae():
    config = kl_vae.get_config("digits-smoke")
    config.model = {"form": "conv", "image_size": 32, "patch": 4, "channels": 4, "conv": CONV}
    return config

def patches():
    return kl_vae.get_config("digits-smoke")

def small_mar():
    config = mar.get_config("smoke")
    config.data.name = "digits"
    config.parents.tokenizer = vae()
    return config
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the config file and the weights of four tiny networks, in the layouts of others."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "config.py").write_text(CONFIG)
    for name, family in (("tokenizer", "taming"), ("maskgit", "maskgit-port"), ("kl_vae", "kl16"), ("mar", "mar")):
        config = published._config(f"{folder}/config.py:{name}", name)
        params = _random(jax.eval_shape(_network(config).init, jax.random.key(0), *_inputs(config)))
        files.write(f"{folder}/{name}.safetensors", FAMILIES[family].state(params, config))
    return folder


def _network(config):
    from maskrl_jax.models.kl_vae import KLVAE
    from maskrl_jax.models.mar import Mar
    from maskrl_jax.models.maskgit_port import MaskGITPort
    from maskrl_jax.tasks import codecs

    if config.task == "tokenizer":
        return codecs.sizes(config.model).network
    if config.task == "maskgit":
        return MaskGITPort(FAMILIES["maskgit-port"].sizes(config))
    return KLVAE(FAMILIES["kl16"].sizes(config)) if config.task == "kl_vae" else Mar(FAMILIES["mar"].sizes(config))


def _inputs(config):
    if config.task in ("tokenizer", "kl_vae"):
        return jnp.zeros((1, 32, 32, 3)), *([jnp.zeros((1, 64, 4))] if config.task == "kl_vae" else [])
    if config.task == "maskgit":
        return jnp.zeros((1, 64), jnp.int32), jnp.zeros(1, jnp.int32)
    return jnp.zeros((1, 64, 4)), jnp.arange(64)[None], jnp.zeros(1, jnp.int32)


def _random(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def stages(work):
    """The four stages, converted."""
    made = {name: work / "stages" / name for name in ("tokenizer", "maskgit", "kl_vae", "mar")}
    families = {"tokenizer": "taming", "maskgit": "maskgit-port", "kl_vae": "kl16", "mar": "mar"}
    below = {"maskgit": {"tokenizer": made["tokenizer"]}, "mar": {"tokenizer": made["kl_vae"]}}
    for name, out in made.items():
        published.read(
            families[name],
            f"{work}/{name}.safetensors",
            str(out),
            config=f"{work}/config.py:{name}",
            below={parent: str(workdir) for parent, workdir in below.get(name, {}).items()},
            store=f"{work}/store",
        )
    return {name: str(out) for name, out in made.items()}


@pytest.mark.parametrize(
    ("name", "family"), [("tokenizer", "taming"), ("maskgit", "maskgit-port"), ("kl_vae", "kl16"), ("mar", "mar")]
)
def test_weights_come_back_byte_for_byte(work, stages, name, family):
    out = work / f"{name}-back.safetensors"
    published.write(family, stages[name], str(out))
    assert out.read_bytes() == (work / f"{name}.safetensors").read_bytes()


def test_a_converted_stage_is_a_finished_one(stages):
    for name, workdir in stages.items():
        assert stored.is_finished(workdir), name
        assert stored.trained_id(workdir) == runner._trained_id(workdir)


@pytest.mark.parametrize("name", ["maskgit", "mar"])
def test_a_converted_generator_samples(stages, name):
    context, params = runner.open_workdir(stages[name])
    studio = runner.task_module(context.config).studio(context, params)
    system, setting, _ = studio.asked({"num_steps": 2}, None)
    cond = studio.dataset.encode(["3"] * context.parallel.num_devices)
    made = system.generate(setting, cond, np.arange(len(cond), dtype=np.int32), 0)
    assert made.images.shape == (len(cond), 32, 32, 3)
    assert len(np.unique(made.images)) > 8


def test_mistakes_are_one_line(work, stages, tmp_path):
    out, weights = str(tmp_path / "out"), f"{work}/maskgit.safetensors"
    vq, vae = {"tokenizer": stages["tokenizer"]}, {"tokenizer": stages["kl_vae"]}
    wrong = [
        (("tamming", weights, out, "tokenizer", {}), "did you mean 'taming'"),
        (("taming", weights, str(work), "tokenizer", {}), "exists already"),
        (("maskgit-port", weights, out, "maskgit", {}), "need a tokenizer: convert it first, give --tokenizer="),
        (("shortcut", weights, out, "maskgit", vq), "need a maskgit: convert it first, give --base="),
        (("taming", weights, out, "tokenizer", vq), "stand on no tokenizer"),
        (
            ("maskgit-port", weights, out, "maskgit", {"tokenizer": stages["mar"]}),
            "holds no finished 'tokenizer' stage",
        ),
        (("maskgit-port", weights, out, "mar", vae), "become a 'maskgit' stage, not 'mar'"),
        (("google-maskgit", weights, out, "maskgit", vq), "model.form=google"),
        (("taming", weights, out, "kl_vae", {}), "become a 'tokenizer' stage, not 'kl_vae'"),
        (("google-vqgan", weights, out, "tokenizer", {}), "model.form=google"),
        (("mar", weights, out, "mar", vae), "does not fit family 'mar' .*: the state lacks class_emb.weight"),
        (("maskgit-port", weights, out, "long", vq), "does not fit .*: num_steps 65 must lie in 1..64"),
        (("maskgit-port", weights, out, "asked", vq), "does not fit .*: num_steps 66 must lie in 1..64"),
        (("mar", f"{work}/mar.safetensors", out, "long_mar", vae), "does not fit .*: .*67"),
        (("kl16", weights, out, "vq", {}), "a VAE of model.form=conv"),
        (("mar", weights, out, "mar", vae | {"judge": stages["mar"]}), "holds no finished 'judge' stage"),
        (("taming", weights, out, "tokenizer", {"judge": stages["mar"]}), "a 'tokenizer' stage stands on no judge"),
        (("taming", weights, out, "broken", {}), "is no config .KeyError"),
        (("taming", str(work / "nothing"), out, "tokenizer", {}), "there is no"),
        (
            ("dimoo", weights, out, "maskgit", vq),
            "is no folder; weights of 'dimoo' are one, give the folder that holds",
        ),
        (("meissonic-tokenizer", weights, out, "tokenizer", {}), "is no folder; .*vqvae and text_encoder"),
        (("amused", weights, out, "tokenizer", {}), "is no folder; .*diffusion_pytorch_model.safetensors"),
    ]
    for (family, path, to, config, below), message in wrong:
        with pytest.raises(UserError, match=message):
            published.read(family, path, to, config=f"{work}/config.py:{config}", below=below, store=f"{work}/store")
    with pytest.raises(UserError, match="nothing.py is no config"):
        published.read("taming", weights, out, config=f"{work}/nothing.py", below={}, store=f"{work}/store")
    for config, message in (
        ("configs/maskgit.py:nonsense", "^configs/maskgit.py:nonsense gives no config: unknown config argument"),
        (f"{work}/vain.py", "^.*vain.py gives no config: 'NoneType' object has no attribute 'task'"),
    ):
        (work / "vain.py").write_text("def get_config(arg):\n    return None\n")
        with pytest.raises(UserError, match=message):
            published.read("maskgit-port", weights, out, config=config, below=vq, store=f"{work}/store")
    with pytest.raises(
        UserError, match="the weights are of 64 tokens, 128 pixels; published are 256 and 512: say in a --conf"
    ):
        published.read("maskgit-port", weights, out, below=vq, store=f"{work}/store")
    with pytest.raises(UserError, match="holds a 'tokenizer' stage, which has no network of 'mar'"):
        published.write("mar", stages["tokenizer"], str(tmp_path / "x.safetensors"))
    assert not list(tmp_path.iterdir())


def test_published_sizes_are_told_from_the_weights():
    sizes = {
        "maskgit-port": ({"pos_emb": np.empty((1, 1025, 768))}, "configs/maskgit.py:port512"),
        "google-maskgit": (
            {"params/Embed_0/position_embeddings/embedding": np.empty((257, 768))},
            "configs/maskgit.py:google256",
        ),
        "mar": ({"mask_token": np.empty((1, 1, 1280))}, "configs/mar.py:huge"),
    }
    for name, (state, config) in sizes.items():
        assert FAMILIES[name].config(state) == config
    for family in FAMILIES.values():
        weights = sizes["mar"][0] | sizes["maskgit-port"][0] | sizes["google-maskgit"][0]
        config = published._config(family.config(weights), family.task)
        family.sizes(config)
    with pytest.raises(UserError, match="no published MAR has width 5"):
        FAMILIES["mar"].config({"mask_token": np.empty((1, 1, 5))})
    with pytest.raises(ValueError, match=r"pos_emb has shape \[1024\]"):
        FAMILIES["maskgit-port"].config({"pos_emb": np.empty(1024)})


def test_what_was_never_given_a_judge_says_so_when_it_is_measured(stages):
    context, params = runner.open_workdir(stages["maskgit"])
    with pytest.raises(UserError, match="has no judge to be measured by; convert its weights again with --judge"):
        runner.build(context).report(params)


def test_a_model_without_a_null_class_is_not_guided(stages):
    context, params = runner.open_workdir(stages["maskgit"])
    studio = dataclasses.replace(runner.task_module(context.config).studio(context, params), guided=False)
    with pytest.raises(UserError, match="--guidance is not for this model"):
        studio.asked({"guidance": 3.0, "num_steps": 2}, None)


def test_the_help_names_every_family():
    text = pathlib.Path(published.__file__).with_name("convert").joinpath("__main__.py").read_text()
    assert all(f" {name}," in text or f" {name};" in text for name in FAMILIES)


def test_the_command_takes_one_path():
    def told(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "maskrl_jax.convert", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        return done.stderr.strip().splitlines()

    assert told("--out=x", "--from=mar") == ["error: expected 1 argument beside the flags, got ''; see --help"]
    assert told("--out=x", "a.pth") == ["error: expected --from=<family> or --to=<family>; see --help"]
    assert told("--out=x", "--to=mar", "--entry=model", "a") == ["error: --entry is for --from"]
