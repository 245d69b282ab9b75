"""Weights and settings of a published Meissonic, both ways (specs/meissonic.md sections 2.1 and 5).

Strict: a ValueError of one line names the key that is missing, left over or misshapen.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskrl_jax.convert import diffusers_folder, files
from maskrl_jax.convert.keys import Keys
from maskrl_jax.convert.keys import read as read_state
from maskrl_jax.convert.keys import write as write_state
from maskrl_jax.models.layers import SINUSOID_WIDTH
from maskrl_jax.models.meissonic import MICRO_CONDITIONS, MeissonicConfig
from maskrl_jax.sampling.maskgit import SamplerConfig

SIZES = {
    "codebook_size": "codebook_size",
    "vocab_size": "vocab_size",
    "depth": "num_layers",
    "single_depth": "num_single_layers",
    "heads": "num_attention_heads",
    "head_width": "attention_head_dim",
    "text_width": "joint_attention_dim",
    "rope_axes": "axes_dims_rope",
}
# Names of a two-stream block, whose text half is an addition to the image's.
IMAGE = {
    "qkv": ("to_q", "to_k", "to_v"),
    "norms": ("norm_q", "norm_k"),
    "out": "to_out.0",
    "norm": "norm1",
    "mlp": "ff",
}
TEXT = {
    "qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "norms": ("norm_added_q", "norm_added_k"),
    "out": "to_add_out",
    "norm": "norm1_context",
    "mlp": "ff_context",
}


def config_of(settings: Mapping[str, Any], grid: tuple[int, int] = (64, 64), **options: Any) -> MeissonicConfig:
    """Sizes from a transformer's config.json; `options` are our own fields (remat, dtype).

    Raises:
      ValueError: a size is missing, or the settings ask for what no published model has.
    """
    missing = [name for name in (*SIZES.values(), "pooled_projection_dim") if name not in settings]
    if missing:
        raise ValueError(f"the transformer's settings lack {missing[0]}")
    if settings.get("guidance_embeds"):
        raise ValueError("guidance_embeds is not supported: no published Meissonic has it")
    resampled = bool(settings.get("downsample"))
    if resampled != bool(settings.get("upsample")):
        raise ValueError("downsample and upsample must be both true or both false")
    sizes = {ours: settings[theirs] for ours, theirs in SIZES.items()}
    config = MeissonicConfig(grid=grid, resampled=resampled, **sizes, **options)
    if settings["pooled_projection_dim"] != config.width:
        raise ValueError(f"pooled_projection_dim {settings['pooled_projection_dim']} is not the width {config.width}")
    return config


def settings_of(folder: str | pathlib.Path) -> dict[str, Any]:
    """Sizes of a published folder's transformer as settings of a generator's stage; the codebook is the tokenizer's."""
    found = config_of(diffusers_folder.read_settings(pathlib.Path(folder, "transformer")))
    return {name: getattr(found, name) for name in (*SIZES, "resampled") if name != "codebook_size"}


def tokens_of(folder: str | pathlib.Path) -> dict[str, Any]:
    """The tokenizer of a published folder, and what it pads with: padding is attended (specs/meissonic.md section 4)."""
    place = pathlib.Path(folder, "tokenizer")
    found, vocabulary = {"tokenizer": str(place)}, place / "vocab.json"
    if not ((place / "tokenizer_config.json").is_file() and vocabulary.is_file()):
        return found
    said = files.json_object(place / "tokenizer_config.json").get("pad_token")
    pad, entries = said.get("content") if isinstance(said, dict) else said, files.json_object(vocabulary)
    return found | ({"pad": entries[pad]} if pad in entries else {})


def sampler_of(
    settings: Mapping[str, Any],
    num_steps: int = 48,
    guidance: float = 9.0,
    temperature: float | tuple[float, float] = (2.0, 0.0),
    entropy_filtering: bool = False,
) -> SamplerConfig:
    """The published sampler, from a scheduler's scheduler_config.json and the pipeline's arguments.

    temperature: of the confidence's noise at the first and the last step, linear between; one number ends at 0.01.
    """
    first, last = temperature if isinstance(temperature, tuple | list) else (temperature, 0.01)
    return SamplerConfig(
        num_steps=num_steps,
        max_steps=num_steps,
        schedule=f"float32-{settings.get('masking_schedule', 'cosine')}",
        gumbel=first,
        last_gumbel=last,
        noise_ends="at",
        timesteps="countdown",
        entropy_filtering=entropy_filtering,
        guidance=max(guidance, 1.0),  # the pipeline runs one branch up to 1
    )


def read_transformer(
    folder: str | pathlib.Path, grid: tuple[int, int] = (64, 64), **options: Any
) -> tuple[MeissonicConfig, dict]:
    """Sizes and variables of the transformer of a published folder; arguments as in `config_of`."""
    component = pathlib.Path(folder, "transformer")
    config = config_of(diffusers_folder.read_settings(component), grid, **options)
    return config, params_of(diffusers_folder.read_state(component), config)


def read_sampler(folder: str | pathlib.Path, **arguments: Any) -> SamplerConfig:
    """The sampler of a published folder; arguments as in `sampler_of`."""
    return sampler_of(diffusers_folder.read_settings(pathlib.Path(folder, "scheduler")), **arguments)


def write(source: str | pathlib.Path, target: str | pathlib.Path, params: Any) -> None:
    """Copy a published folder with a tuned transformer, float32; the other components stay as they are.

    Raises:
      UserError: the target exists, or the source is missing or damaged.
      ValueError: the parameters are not of the source's sizes.
    """
    config = config_of(diffusers_folder.read_settings(pathlib.Path(source, "transformer")))
    diffusers_folder.write_folder(source, target, {"transformer": state_of(params, config)})


def params_of(state: Mapping[str, np.ndarray], config: MeissonicConfig) -> dict:
    """Map a state dict to the variables of `Meissonic(config)`, float32."""
    return read_state(_params, state, config)


def state_of(params: Mapping, config: MeissonicConfig) -> dict[str, np.ndarray]:
    """Map them back, byte for byte."""
    return write_state(_params, params, config)


def _params(keys: Keys, config: MeissonicConfig) -> dict:
    c, d = config, config.width
    params = {
        "tokens": keys.take("embed.embeddings.weight", c.vocab_size, d),
        "token_norm": keys.scale("embed.layer_norm", d),
        "token_out": keys.patch_conv("embed.conv", d, d),
        "in_norm": keys.scale("project_to_hidden_norm", d),
        "in_out": keys.linear("project_to_hidden", d, d, bias=False),
        "text_in": keys.linear("context_embedder", c.text_width, d),
        "text_norm": keys.scale("encoder_proj_layer_norm", d),
        "condition": _condition(keys, d),
        "dual_blocks": keys.stack([_dual(keys, f"transformer_blocks.{i}", c) for i in range(c.depth)]),
        "single_blocks": keys.stack(
            [_single(keys, f"single_transformer_blocks.{i}", c) for i in range(c.single_depth)]
        ),
        "out_norm": keys.scale("project_from_hidden_norm", d),
        "out": keys.linear("project_from_hidden", d, d, bias=False),
        "head_in": keys.patch_conv("mlm_layer.conv1", d, d),
        "head_norm": keys.scale("mlm_layer.layer_norm", d),
        "head_out": keys.patch_conv("mlm_layer.conv2", d, c.codebook_size),
    }
    if c.resampled:
        params |= {
            "down_norm": keys.scale("down_block.downsample.norm", d),
            "down": keys.patch_conv("down_block.downsample.conv", d, d, 2),
            "up_norm": keys.scale("up_block.upsample.norm", d),
            "up": keys.transposed_patch_conv("up_block.upsample.conv", d, d, 2),
        }
    return params


def _condition(keys: Keys, width: int) -> dict:
    def mlp(name: str, inputs: int, bias: bool = True) -> dict:
        return {
            "in": keys.linear(f"{name}.linear_1", inputs, width, bias=bias),
            "out": keys.linear(f"{name}.linear_2", width, width, bias=bias),
        }

    return {
        "said": mlp("cond_embed", width + MICRO_CONDITIONS * SINUSOID_WIDTH, bias=False),
        "time": mlp("time_text_embed.timestep_embedder", SINUSOID_WIDTH),
        "pooled": mlp("time_text_embed.text_embedder", width),
    }


def _dual(keys: Keys, name: str, config: MeissonicConfig) -> dict:
    return {"image": _stream(keys, name, IMAGE, config), "text": _stream(keys, name, TEXT, config)}


def _stream(keys: Keys, name: str, names: Mapping[str, Any], config: MeissonicConfig) -> dict:
    d = config.width
    return {
        "modulation": keys.linear(f"{name}.{names['norm']}.linear", d, 6 * d),
        "qkv": _heads(keys, f"{name}.attn", names["qkv"], names["norms"], config),
        "out": keys.linear(f"{name}.attn.{names['out']}", d, d),
        "mlp_in": keys.linear(f"{name}.{names['mlp']}.net.0.proj", d, 4 * d),
        "mlp_out": keys.linear(f"{name}.{names['mlp']}.net.2", 4 * d, d),
    }


def _single(keys: Keys, name: str, config: MeissonicConfig) -> dict:
    d = config.width
    return {
        "modulation": keys.linear(f"{name}.norm.linear", d, 3 * d),
        "qkv": _heads(keys, f"{name}.attn", IMAGE["qkv"], IMAGE["norms"], config),
        "mlp_in": keys.linear(f"{name}.proj_mlp", d, 4 * d),
        "out": keys.linear(f"{name}.proj_out", 5 * d, d),
    }


def _heads(keys: Keys, name: str, qkv: tuple[str, ...], norms: tuple[str, str], config: MeissonicConfig) -> dict:
    return {
        "linear": keys.linears([f"{name}.{part}" for part in qkv], config.width, config.width),
        "query_norm": keys.scale(f"{name}.{norms[0]}", config.head_width),
        "key_norm": keys.scale(f"{name}.{norms[1]}", config.head_width),
    }
