"""Published text-to-image models, small: converted, sampled, tuned by rewards of a CLIP, given back."""

import dataclasses
import json
import shutil

import clip_weights
import jax
import numpy as np
import pytest
import tiny
import tiny_text
from safetensors.numpy import load_file

from configs import mask_grpo as mask_grpo_config
from configs import maskfocus as maskfocus_config
from configs import shortcut as shortcut_config
from configs import speed_rl as speed_rl_config
from maskrl_jax import published, runner
from maskrl_jax.convert import dimoo as dimoo_weights
from maskrl_jax.errors import UserError
from maskrl_jax.families import FAMILIES
from maskrl_jax.models.dimoo import Dimoo
from maskrl_jax.tasks import checks

TURNS = 6
SGD = tiny.SGD | {"learning_rate": 0.01, "ema_decay": 0.5}


@pytest.fixture
def one_device(monkeypatch):
    """The runner sees one device: eight virtual ones wait for each other on two cores."""
    alone = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: alone)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Meissonic folder, its stages, a judge of two CLIPs, and prompts."""
    root = tmp_path_factory.mktemp("text")
    data = tiny_text.write_prompts(root)
    folder = tiny_text.write_meissonic(root / "Meissonic")
    for seed, name in enumerate(("hps", "clip_score")):
        clip_weights.write_reward(root / "weights" / name, seed)
    (root / "config.py").write_text(
        "import tiny_text\n\n"
        "def get_config(arg):\n"
        f"    data = {data!r}\n"
        "    return tiny_text.tokenizer(arg != 'plain') if arg in ('text', 'plain') else tiny_text.base(arg, data)\n"
    )
    places = {name: str(root / "stages" / name) for name in ("judge", "tokenizer", "maskgit")}
    store = str(root / "store")
    published.read("clip-rewards", str(root / "weights"), places["judge"], below={}, store=store)
    own = {"store": store, "config": f"{root}/config.py:text"}
    published.read("meissonic-tokenizer", str(folder), places["tokenizer"], below={}, **own)
    below = {"tokenizer": places["tokenizer"], "judge": places["judge"]}
    own["config"] = f"{root}/config.py:meissonic"
    published.read("meissonic", str(folder), places["maskgit"], below=below, **own)
    return root, folder, data, places, store


def run(made, config, name):
    root, _, data, places, store = made
    base = tiny_text.base("meissonic", data)
    config.parents = {"tokenizer": base.parents.tokenizer, "judge": base.parents.judge, "maskgit": base}
    config.init.update(places)
    config.data, config.parallel, config.optimizer = base.data, "pmap", SGD
    config.update({"num_steps": 2, "batch_size": 8, "group": 4, "micro_batch": 8, "log_every": 1})
    config.rewards, config.rewards_heldout = {"hps": 1.0}, {"clip_score": 1.0}
    config.evaluation.update({"prompts": 4, "group": 2, "batch_size": 8, "steps": (2, 4), "keep": 2})
    config.evaluation.update({"glance_prompts": 4})
    workdir = str(root / name)
    runner.run(config, workdir, store)
    return workdir


def test_a_converted_meissonic_samples_what_is_asked(made, one_device):
    context, params = runner.open_workdir(made[3]["maskgit"])
    studio = runner.task_module(context.config).studio(context, params)
    system, setting, _ = studio.asked({"num_steps": 4}, None)
    cond = studio.dataset.encode(["red cat", "tan owl"])
    images = system.generate(setting, cond, np.zeros(2, np.int32), 0).images  # the same noise
    assert images.shape == (2, tiny_text.SIZE, tiny_text.SIZE, 3) and np.isfinite(images).all()
    assert (images[0] != images[1]).any()


def test_prompts_alone_are_enough_to_measure_a_stage_and_not_to_train_it(made, one_device):
    context, _ = runner.open_workdir(made[3]["maskgit"])
    task = runner.build(context)
    with pytest.raises(UserError, match="has no pictures"):
        task.init(jax.random.key(0))


def test_it_is_tuned_by_rewards_and_goes_back_into_a_folder_of_every_key(made, one_device, tmp_path):
    config = speed_rl_config.get_config("meissonic")
    config.policy.update({"max_calls": 4, "divisors": (4, 2, 1), "centre": 2.0, "target_calls": 2, "ticks": 16})
    config.policy.step_set = (2, 4)
    config.credit.update({"min_calls": 1, "history_min": 4, "lambda_zero_until": 0, "lambda_full_at": 0})
    config.resample.groups = 2
    config.evaluation.dials = (0.0,)
    workdir = run(made, config, "speed_rl")
    report = (made[0] / "speed_rl" / "report.md").read_text()
    assert "clip_score" in report and "hps" in report
    published.write("meissonic", workdir, str(tmp_path / "tuned"), like=str(made[1]))
    with pytest.raises(UserError, match="--like is for the folder of a meissonic"):
        published.write("maskgit-port", workdir, str(tmp_path / "other"), like=str(made[1]))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(made[1] / weights), load_file(tmp_path / "tuned" / weights)
    assert {name: x.shape for name, x in after.items()} == {name: x.shape for name, x in before.items()}
    moved = [name for name, x in after.items() if (x != before[name]).any()]
    assert "mlm_layer.conv2.weight" in moved and "transformer_blocks.0.attn.to_q.weight" in moved
    text = "text_encoder/model.safetensors"
    assert (tmp_path / "tuned" / text).read_bytes() == (made[1] / text).read_bytes()


def test_maskfocus_tunes_it(made, one_device):
    config = maskfocus_config.get_config("meissonic")
    config.rollout.num_steps, config.steps.count, config.group = 4, 2, 2
    run(made, config, "maskfocus")


def test_mask_grpo_tunes_it(made, one_device):
    config = mask_grpo_config.get_config("smoke")
    config.rollout.update({"num_steps": 4, "guidance": 2.0})
    config.energy_distance = 0.0
    run(made, config, "mask_grpo")


def test_weights_come_back_byte_for_byte(made, one_device, tmp_path):
    _, folder, _, places, _ = made
    for name, stage in (("meissonic", "maskgit"), ("meissonic-tokenizer", "tokenizer")):
        published.write(name, places[stage], str(tmp_path / f"{name}.safetensors"))
    found = load_file(tmp_path / "meissonic.safetensors")
    wanted = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {n: x.tobytes() for n, x in found.items()} == {n: x.tobytes() for n, x in wanted.items()}
    found = load_file(tmp_path / "meissonic-tokenizer.safetensors")
    for part, stem in (("vqvae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        for key, x in load_file(folder / part / f"{stem}.safetensors").items():
            assert found[f"{part}.{key}"].tobytes() == x.tobytes()


def test_what_a_folder_says_of_itself_are_settings_of_the_stage(made):
    folder = str(made[1])
    assert FAMILIES["meissonic"].told(f"{folder}")["depth"] == 1
    told = FAMILIES["meissonic-tokenizer"].told(folder)
    assert told["text"]["width"] == 8 and told["codebook_size"] == tiny_text.K and told["conv"]["width"] == 4
    assert "text" not in FAMILIES["amused"].told(f"{folder}/vqvae")


def test_a_folder_that_does_not_fit_is_told(made, tmp_path):
    root, folder, _, places, store = made
    out, below = str(tmp_path / "out"), {"tokenizer": places["tokenizer"]}
    with pytest.raises(UserError, match=f"is the folder of a whole model; give that of its tokenizer, {folder}/vqvae"):
        published.read("amused", str(folder), out, below={}, store=store)
    (root / "wide.py").write_text(
        "from configs import tokenizer\n\nget_config = lambda arg: tokenizer.get_config('meissonic')"
    )
    with pytest.raises(UserError, match="has shape .*; with --config its config.json is not read"):
        published.read("meissonic-tokenizer", str(folder), out, below={}, store=store, config=str(root / "wide.py"))
    other = shutil.copytree(folder, tmp_path / "other")
    told = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(told | {"codebook_size": tiny_text.K + 1}))
    with pytest.raises(
        UserError, match=f"transformer/config.json says codebook_size 7, and the tokenizer has {tiny_text.K}"
    ):
        published.read("meissonic", str(other), out, below=below, store=store)


def test_a_folder_says_what_its_tokenizer_pads_with(tmp_path):
    tell = FAMILIES["meissonic"].tokens
    place = tmp_path / "tokenizer"
    assert tell(str(tmp_path)) == {"tokenizer": str(place)}
    place.mkdir()
    (place / "vocab.json").write_text('{"!": 0, "<|endoftext|>": 49407}')
    for said, pad in (('"!"', 0), ('{"content": "<|endoftext|>"}', 49407)):
        (place / "tokenizer_config.json").write_text(f'{{"pad_token": {said}}}')
        assert tell(str(tmp_path)) == {"tokenizer": str(place), "pad": pad}


def test_a_config_of_one_s_own_pads_as_the_folder_does(made, tmp_path, monkeypatch):
    """Padding is attended: with another one the pictures are others."""
    _, folder, _, places, store = made
    family = dataclasses.replace(FAMILIES["meissonic"], tokens=lambda path: {"pad": 5})
    monkeypatch.setitem(FAMILIES, "meissonic", family)
    below = {"tokenizer": places["tokenizer"]}
    with pytest.raises(
        UserError, match="its tokenizer pads with 5; set data.pad of configs/maskgit.py:meissonic to that"
    ):
        own = "configs/maskgit.py:meissonic"
        published.read("meissonic", str(folder), str(tmp_path / "out"), config=own, below=below, store=store)


def test_prompts_of_a_policy_are_its_own_and_their_tokens_are_the_base_s(made):
    config = speed_rl_config.get_config("meissonic")
    checks.same_data(config)
    config.data = config.data.to_dict() | {"name": "others.txt", "tokenizer": "elsewhere"}
    checks.same_data(config)
    config.data.pad = 0
    with pytest.raises(
        UserError, match="data.pad of speed_rl is 0, its base was trained with 49407; set --config.data.pad to that"
    ):
        checks.same_data(config)


def test_a_meissonic_needs_its_text_encoder_and_tokens_of_clip(made, tmp_path):
    root, folder, _, places, store = made
    plain = tiny_text.base("meissonic", made[2])
    plain.parents.tokenizer = tiny_text.tokenizer(text=False)
    with pytest.raises(UserError, match="needs a tokenizer of form=amused with a text encoder"):
        FAMILIES["meissonic"].sizes(plain)
    plain = tiny_text.base("meissonic", {"name": "prompts.txt", "text_length": 8})
    with pytest.raises(UserError, match="set data.tokens=clip and data.text_length=9"):
        FAMILIES["meissonic"].sizes(plain)


def test_a_dimoo_needs_its_template(made):
    with pytest.raises(UserError, match="set data.tokens=dimoo"):
        FAMILIES["dimoo"].sizes(tiny_text.base("dimoo", made[2]))
    with pytest.raises(UserError, match="is conditioned on captions, and digits has classes"):
        FAMILIES["dimoo"].sizes(tiny_text.base("dimoo", {"name": "digits", "text_length": 16}))


def test_a_dimoo_is_streamed_in_and_its_shortcut_trained(made, one_device, tmp_path, monkeypatch):
    root, folder, _, places, store = made
    data = {"name": "prompts.txt", "text_length": 16, "tokens": "dimoo", "tokenizer": "nowhere", "pad": 49407}
    config = tiny_text.base("dimoo", data)
    sizes = FAMILIES["dimoo"].sizes(config)
    params = tiny_text.drawn(jax.eval_shape(Dimoo(sizes).init, jax.random.key(0), np.zeros((1, 1), np.int32)))
    from maskrl_jax.convert import files

    files.write(tmp_path / "dimoo" / "model.safetensors", dimoo_weights.state_of(params, sizes))
    found = FAMILIES["dimoo"].params(str(tmp_path / "dimoo"), config)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    half = tiny_text.base("dimoo", data)
    half.model.weights = "bfloat16"
    assert FAMILIES["dimoo"].params(str(tmp_path / "dimoo"), half)["params"]["head"].dtype == "bfloat16"

    light = shortcut_config.get_config("dimoo")
    light.parents = {"tokenizer": config.parents.tokenizer, "judge": config.parents.judge, "maskgit": config}
    light.data, light.parallel, light.optimizer = config.data, "pmap", SGD
    light.model.update({"heads": 2, "mlp_width": 12, "dtype": "float32"})
    light.update({"num_steps": 2, "batch_size": 2})
    light.teacher.num_steps = (4,)
    light.curve.update({"num_steps": 4, "budgets": (2,), "calibration": 2})
    updates(light, params, made)


def updates(config, params, made):
    """Two buffers of the stage's programs, on prompts written out: the error falls below that of the frozen feature."""
    from maskrl_jax.checkpoint import load_params
    from maskrl_jax.data.dataset import conditioning_of
    from maskrl_jax.parallel import Parallel
    from maskrl_jax.sampling.maskgit import SamplerConfig
    from maskrl_jax.tasks import shortcut

    conditioning = conditioning_of(config.data)
    wiring = shortcut.Wiring(config, conditioning, SamplerConfig(**config.parents.maskgit.sampler))
    parallel = Parallel("pmap", jax.devices()[:1])
    network, tokenizer = parallel.replicate(params), load_params(made[3]["tokenizer"])[0]
    frozen = {
        "plan": parallel.replicate(wiring.plans[0]),
        "tokenizer": parallel.replicate({"params": tokenizer["params"]}),
    }
    roll_out, update = parallel.map(wiring.rollout), parallel.update(wiring.update)
    state = parallel.init(wiring.init, jax.random.key(0))
    cond = np.tile(conditioning.null, (2, 1))
    cond[:, -2] = (7, 12)
    errors = []
    for _ in range(TURNS):
        batch = {"cond": cond, "index": np.arange(2, dtype=np.int32), "round": np.zeros(2, np.int32)}
        made = roll_out(network, frozen, batch)
        learn = made | {name: batch[name] for name in ("index", "round")}
        state, metrics = update(state, {"base": network} | frozen, learn)
        total, weight = jax.device_get(metrics["train/mse"])
        errors.append(np.ravel(total)[0] / np.ravel(weight)[0])
    assert np.isfinite(errors).all() and errors[-1] < errors[0]
