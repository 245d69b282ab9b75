"""Weights and settings of Meissonic's VQ tokenizer, both ways (specs/meissonic.md section 3).

Strict: a ValueError of one line names the key that is missing, left over or misshapen.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskrl_jax.convert import diffusers_folder
from maskrl_jax.convert.keys import Keys
from maskrl_jax.convert.keys import read as read_state
from maskrl_jax.convert.keys import write as write_state
from maskrl_jax.models.conv_autoencoder import ConvSizes
from maskrl_jax.models.vq_model import VQModelConfig

ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
FIXED = {"norm_type": "group", "act_fn": "silu", "in_channels": 3, "out_channels": 3}


def config_of(settings: Mapping[str, Any]) -> VQModelConfig:
    """Sizes from a vqvae's config.json.

    Raises:
      ValueError: a size is missing, or the settings ask for what this model has not.
    """
    missing = [name for name in ("block_out_channels", "latent_channels", "num_vq_embeddings") if name not in settings]
    if missing:
        raise ValueError(f"the tokenizer's settings lack {missing[0]}")
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name} {settings[name]!r} is not supported, only {value!r}")
    plain = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    for name in ("down_block_types", "up_block_types"):
        if other := set(settings.get(name, ())) - plain:
            raise ValueError(f"{name} holds {min(other)}, which is not supported")
    widths = settings["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels {list(widths)} are not multiples of the first")
    sizes = ConvSizes(
        width=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=settings.get("layers_per_block", 1),
        encoder_attention=(),
        middle_attention=settings.get("mid_block_add_attention", True),
        groups=settings.get("norm_num_groups", 32),
    )
    channels = settings["latent_channels"]
    return VQModelConfig(sizes, channels, settings.get("vq_embed_dim") or channels, settings["num_vq_embeddings"])


def settings_of(folder: str | pathlib.Path) -> dict[str, Any]:
    """Sizes from the config.json of a tokenizer's folder, as settings of a tokenizer's stage."""
    return model_settings(config_of(diffusers_folder.read_settings(folder)))


def model_settings(config: VQModelConfig) -> dict[str, Any]:
    """Sizes as plain settings."""
    own = {name: getattr(config, name) for name in ("channels", "code_width", "codebook_size")}
    return own | {"conv": dataclasses.asdict(config.conv)}


def read(folder: str | pathlib.Path) -> tuple[VQModelConfig, dict]:
    """Sizes and variables of the tokenizer of a published folder."""
    component = pathlib.Path(folder, "vqvae")
    config = config_of(diffusers_folder.read_settings(component))
    return config, params_of(diffusers_folder.read_state(component), config)


def params_of(state: Mapping[str, np.ndarray], config: VQModelConfig) -> dict:
    """Map a state dict to the variables of `VQModel(config)`, float32."""
    return read_state(_params, state, config)


def state_of(params: Mapping, config: VQModelConfig) -> dict[str, np.ndarray]:
    """Map them back, byte for byte."""
    return write_state(_params, params, config)


def _params(keys: Keys, config: VQModelConfig) -> dict:
    c = config
    return {
        "encoder": _encoder(keys, c.conv, c.channels),
        "decoder": _decoder(keys, c.conv, c.channels),
        "quant": keys.conv("quant_conv", c.channels, c.code_width, 1),
        "post_quant": keys.conv("post_quant_conv", c.code_width, c.channels, 1),
        "codebook": keys.take("quantize.embedding.weight", c.codebook_size, c.code_width),
    }


def _encoder(keys: Keys, sizes: ConvSizes, out: int) -> dict:
    channels, last = sizes.width, len(sizes.multipliers) - 1
    params = {"conv_in": keys.conv("encoder.conv_in", 3, channels)}
    for level in range(last + 1):
        name, wide = f"encoder.down_blocks.{level}", sizes.width * sizes.multipliers[level]
        params |= _level(keys, name, level, sizes.blocks, channels, wide)
        channels = wide
        if level < last:
            params[f"level_{level}_down"] = keys.conv(f"{name}.downsamplers.0.conv", wide, wide)
    return params | _ends(keys, "encoder", sizes, channels, channels, out)


def _decoder(keys: Keys, sizes: ConvSizes, inputs: int) -> dict:
    coarsest, last = sizes.width * sizes.multipliers[-1], len(sizes.multipliers) - 1
    params, channels = {"conv_in": keys.conv("decoder.conv_in", inputs, coarsest)}, coarsest
    for level in range(last, -1, -1):
        name, wide = f"decoder.up_blocks.{last - level}", sizes.width * sizes.multipliers[level]
        params |= _level(keys, name, level, sizes.blocks + 1, channels, wide)
        channels = wide
        if level:
            params[f"level_{level}_up"] = keys.conv(f"{name}.upsamplers.0.conv", wide, wide)
    return params | _ends(keys, "decoder", sizes, coarsest, channels, 3)


def _level(keys: Keys, name: str, level: int, blocks: int, channels: int, wide: int) -> dict:
    return {
        f"level_{level}_block_{i}": _block(keys, f"{name}.resnets.{i}", wide if i else channels, wide)
        for i in range(blocks)
    }


def _ends(keys: Keys, name: str, sizes: ConvSizes, middle: int, channels: int, out: int) -> dict:
    """Take the middle, at the coarsest level, and the last layers."""
    params = {f"block_{i + 1}": _block(keys, f"{name}.mid_block.resnets.{i}", middle, middle) for i in (0, 1)}
    if sizes.middle_attention:
        params["attention"] = _attention(keys, f"{name}.mid_block.attentions.0", middle)
    return {
        "middle": params,
        "norm_out": keys.norm(f"{name}.conv_norm_out", channels),
        "conv_out": keys.conv(f"{name}.conv_out", channels, out),
    }


def _block(keys: Keys, name: str, inputs: int, outputs: int) -> dict:
    block = {
        "norm1": keys.norm(f"{name}.norm1", inputs),
        "conv1": keys.conv(f"{name}.conv1", inputs, outputs),
        "norm2": keys.norm(f"{name}.norm2", outputs),
        "conv2": keys.conv(f"{name}.conv2", outputs, outputs),
    }
    return block if inputs == outputs else block | {"shortcut": keys.conv(f"{name}.conv_shortcut", inputs, outputs, 1)}


def _attention(keys: Keys, name: str, channels: int) -> dict:
    """Linear layers there, convolutions of one cell here."""
    params = {"norm": keys.norm(f"{name}.group_norm", channels)}
    for ours, theirs in ATTENTION.items():
        layer = keys.linear(f"{name}.{theirs}", channels, channels)
        params[ours] = layer | {"kernel": layer["kernel"][None, None]}
    return params
