"""Reference inputs and outputs of other implementations; `shared/fixtures/README.md` tells their layout.

The root is the environment variable MASKRL_FIXTURES, by default ../shared/fixtures beside the repository.
"""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from maskrl_jax.convert.mar import params_of
from maskrl_jax.models.dimoo_shortcut import DimooShortcutConfig
from maskrl_jax.models.google_maskgit import GoogleMaskGITConfig
from maskrl_jax.models.halton import HaltonConfig
from maskrl_jax.models.mar import Mar, MarConfig
from maskrl_jax.models.maskgit_port import PortConfig
from maskrl_jax.sampling.dimoo_sequence import Layout

BESIDE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "fixtures"
ROOT = pathlib.Path(os.environ.get("MASKRL_FIXTURES") or BESIDE)


def configurations(family: str) -> list[pathlib.Path]:
    """Return the configuration folders of a family, sorted; none where the family is absent."""
    return sorted(path.parent for path in ROOT.glob(f"{family}/*/config.json"))


def every_configuration(family: str) -> pytest.MarkDecorator:
    """Give a parity test the argument `folder`, once a configuration; one skipped case where there is none."""
    cases = [pytest.param(folder, id=folder.name, marks=pytest.mark.parity) for folder in configurations(family)]
    absent = pytest.mark.skip(reason=f"no configuration of {family} in {ROOT} (MASKRL_FIXTURES)")
    return pytest.mark.parametrize(
        "folder", cases or [pytest.param(None, id="absent", marks=[pytest.mark.parity, absent])]
    )


def load(folder: pathlib.Path) -> tuple[dict, dict, dict, dict]:
    """Return (config, state, inputs, outputs); a file that a family does not have is an empty dict."""
    config = json.loads((folder / "config.json").read_text())
    return config, *(_arrays(folder / name) for name in ("state", "inputs", "outputs"))


def _arrays(stem: pathlib.Path) -> dict:
    """Read `<stem>.safetensors` or `<stem>.npz`."""
    packed, zipped = (stem.with_name(f"{stem.name}.{kind}") for kind in ("safetensors", "npz"))
    if packed.exists():
        return load_file(packed)
    return dict(np.load(zipped)) if zipped.exists() else {}


def close(found, wanted, config: dict, name: str) -> None:
    """Compare within 1e-4 of the output's scale, or 5 times the reference's own rounding error where that is known."""
    wanted = np.asarray(wanted)
    known = config.get("fp32_vs_fp64", {}).get(name, {}).get("max_abs_err_fp32_vs_fp64", np.inf)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=min(5 * known, 1e-4 * scale), err_msg=name)


def round_trip(params_of, state_of, state: dict, config) -> dict:
    """Parameters of a state dict, which must come back from them byte for byte."""
    params = params_of(state, config)
    back = state_of(params, config)
    assert back.keys() == state.keys()
    for name, array in back.items():
        assert (array.dtype, array.shape) == (state[name].dtype, state[name].shape), name
        assert array.tobytes() == state[name].tobytes(), name
    return params


def port_sizes(ctor: dict) -> PortConfig:
    """Return the sizes of a reference transformer from its constructor's arguments."""
    return PortConfig(
        num_tokens=ctor["f_factor"] ** 2,
        codebook_size=ctor["codebook_size"],
        num_classes=ctor["nclass"],
        width=ctor["hidden_dim"],
        depth=ctor["depth"],
        heads=ctor["heads"],
        mlp_width=ctor["mlp_dim"],
    )


def mar_sizes(config: dict) -> MarConfig:
    """Return the sizes of a reference MAR from its constructor's arguments."""
    made = config["ctor"]
    return MarConfig(
        num_tokens=config["seq_len"],
        channels=config["token_dim"],
        cond_vocab=made["class_num"] + 1,
        buffer=made["buffer_size"],
        width=made["encoder_embed_dim"],
        depth=made["encoder_depth"],
        heads=made["encoder_num_heads"],
        mlp_ratio=made["mlp_ratio"],
        head_width=made["diffloss_w"],
        head_depth=made["diffloss_d"],
    )


def mar_head(config: dict, state: dict, condition: np.ndarray):
    """A reference head at fixed conditions: (state [R,C], timestep [R] or []) -> output [R,2C]."""
    sizes = mar_sizes(config)
    model, params = Mar(sizes), params_of(state, sizes)
    known = model.apply(params, condition, method="head_condition")
    return lambda x, timestep: model.apply(params, x, timestep, known, method="denoise")


def random_params(model, *arguments, scale: float = 0.3) -> dict:
    """Normal parameters of a model, norms' gains about 1; nothing is compiled."""
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), *arguments), np.random.default_rng(0)

    def draw(path, x):
        return np.float32((path[-1].key == "scale") + scale * rng.normal(size=x.shape))

    return jax.tree.map_with_path(draw, shapes)


def google_sizes(config: dict) -> GoogleMaskGITConfig:
    """Return the sizes of a Flax original from its constructor's arguments."""
    made = config["ctor"]
    assert made["vocab_size"] == config["codebook_size"] + config["num_class"] + 1
    return GoogleMaskGITConfig(
        num_tokens=made["max_position_embeddings"] - 1,
        codebook_size=config["codebook_size"],
        num_classes=config["num_class"],
        width=made["hidden_size"],
        depth=made["num_hidden_layers"],
        heads=made["num_attention_heads"],
        mlp_width=made["intermediate_size"],
    )


def google_inputs(rows: np.ndarray, sizes: GoogleMaskGITConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids [B,N], classes [B]) of a Flax original's sequences, whose MASK is the last row or -1."""
    image, cond = np.int32(rows[..., 1:]), np.int32(rows[..., 0]) - sizes.codebook_size
    return np.where((image == sizes.vocab - 1) | (image == -1), sizes.mask_id, image), cond


def halton_sizes(made: dict) -> HaltonConfig:
    """Return the sizes of a reference Halton transformer from its constructor's arguments."""
    assert made["proj"] == 1
    return HaltonConfig(
        num_tokens=made["input_size"] ** 2,
        codebook_size=made["codebook_size"],
        num_classes=made["nclass"],
        width=made["hidden_dim"],
        depth=made["depth"],
        heads=made["heads"],
        mlp_width=made["mlp_dim"],
        registers=made["register"],
    )


def dimoo_layout(config: dict) -> Layout:
    """Return the layout of a reference text-to-image run."""
    return Layout(*config["grid"], **config["token_ids"])


def dimoo_shortcut_sizes(made: dict, options: dict) -> DimooShortcutConfig:
    """Return the sizes of a reference DiMOO shortcut from those of its base and its own options."""
    return DimooShortcutConfig(
        width=made["d_model"],
        ratio=options["bottleneck_ratio"],
        n_block=options["n_block"],
        heads=made["n_heads"],
        mlp_width=made["mlp_hidden_size"],
        rope_theta=made["rope_theta"],
        rms_eps=made["rms_norm_eps"],
        embed_t=options["embed_t"],
        controls=not options.get("no_ca", False),
    )
