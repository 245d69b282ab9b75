"""Reference inputs and outputs of other implementations; `shared/fixtures/README.md` tells their layout.

The root is the environment variable MASKRL_FIXTURES, by default ../shared/fixtures beside the repository.
"""

import json
import os
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from maskrl_jax.convert.mar import params_of
from maskrl_jax.models.mar import Mar, MarConfig
from maskrl_jax.models.maskgit_port import PortConfig

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
    files = (folder / f"{name}.safetensors" for name in ("state", "inputs", "outputs"))
    state, inputs, outputs = (load_file(file) if file.exists() else {} for file in files)
    return json.loads((folder / "config.json").read_text()), state, inputs, outputs


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
