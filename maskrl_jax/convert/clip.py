"""Weights of CLIP as parameters of ours, and back: the layouts of Hugging Face and of open_clip.

Strict as in `maskgit_port`: a ValueError of one line names the key that is missing, left over or misshapen.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from maskrl_jax.convert.keys import Keys, read, write
from maskrl_jax.models.clip import AestheticHead, ClipConfig, PictureConfig, TextConfig, TowerConfig

# Constants that some checkpoints carry beside their weights.
CONSTANTS = ("embeddings.position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")
HEAD_LAYERS = (0, 2, 4, 6, 7)  # of the aesthetic predictor; those between are dropout


def config_of(found: Mapping[str, Any]) -> ClipConfig:
    """Sizes from the config.json of a Hugging Face `CLIPModel`; what it leaves out is as in CLIP B/32."""
    projection = found.get("projection_dim", 512)
    picture = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, **found["vision_config"]}
    return ClipConfig(
        text=text_config_of(found["text_config"] | {"projection_dim": projection}),
        picture=PictureConfig(
            **_tower(picture | {"projection_dim": projection}),
            image_size=picture.get("image_size", 224),
            patch=picture.get("patch_size", 32),
        ),
    )


def text_config_of(found: Mapping[str, Any]) -> TextConfig:
    """Sizes from the config.json of a `CLIPTextModelWithProjection`.

    An end token of 2 stands in configs of old for the largest id of the vocabulary, at which those models pool.
    """
    vocabulary, end = found.get("vocab_size", 49408), found.get("eos_token_id", 49407)
    return TextConfig(
        **_tower(found),
        vocabulary=vocabulary,
        length=found.get("max_position_embeddings", 77),
        end=vocabulary - 1 if end == 2 else end,
    )


def _tower(found: Mapping[str, Any]) -> dict:
    return {
        "width": found.get("hidden_size", 512),
        "depth": found.get("num_hidden_layers", 12),
        "heads": found.get("num_attention_heads", 8),
        "mlp_width": found.get("intermediate_size", 2048),
        "projection": found.get("projection_dim", 512),
        "activation": found.get("hidden_act", "quick_gelu"),
    }


def params_of(state: Mapping[str, np.ndarray], config: ClipConfig) -> dict:
    """Map a state dict to the variables of `Clip(config)`, float32; its keys tell which of the two layouts it has."""
    return read(_open_clip if "visual.conv1.weight" in state else _clip, _weights(state), config)


def state_of(params: Mapping[str, Any], config: ClipConfig) -> dict[str, np.ndarray]:
    """Undo `params_of`: the state dict of a Hugging Face `CLIPModel`, float32, equal byte for byte."""
    return write(_clip, params, config)


def text_params_of(state: Mapping[str, np.ndarray], config: TextConfig) -> dict:
    """Map the state dict of a `CLIPTextModelWithProjection` to the variables of `TextTower(config)`, float32."""
    return read(_text, _weights(state), config)


def text_state_of(params: Mapping[str, Any], config: TextConfig) -> dict[str, np.ndarray]:
    """Undo `text_params_of`: the state dict of a `CLIPTextModelWithProjection`."""
    return write(_text, params, config)


def aesthetic_params_of(state: Mapping[str, np.ndarray], features: int) -> dict:
    """Map the state dict of LAION's predictor over so many features to the variables of `AestheticHead`, float32."""
    return read(_aesthetic, state, features)


def _weights(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in state.items() if not name.endswith(CONSTANTS)}


def _aesthetic(keys: Keys, features: int) -> dict:
    widths = (features, *AestheticHead.widths)
    layers = zip(HEAD_LAYERS, widths[:-1], widths[1:], strict=True)
    return {f"layers_{i}": keys.linear(f"layers.{layer}", *sizes) for i, (layer, *sizes) in enumerate(layers)}


def _clip(keys: Keys, c: ClipConfig) -> dict:
    return {
        "text": _text(keys, c.text),
        "picture": _picture(keys, c.picture),
        "logit_scale": keys.take("logit_scale"),
    }


def _open_clip(keys: Keys, c: ClipConfig) -> dict:
    return {
        "text": _open_text(keys, c.text),
        "picture": _open_picture(keys, c.picture),
        "logit_scale": keys.take("logit_scale"),
    }


def _text(keys: Keys, c: TextConfig) -> dict:
    return {
        "tokens": {"embedding": keys.take("text_model.embeddings.token_embedding.weight", c.vocabulary, c.width)},
        "places": keys.take("text_model.embeddings.position_embedding.weight", c.length, c.width),
        "stack": _blocks(keys, "text_model.encoder.layers", c, _block),
        "norm_out": keys.norm("text_model.final_layer_norm", c.width),
        "projection": keys.linear("text_projection", c.width, c.projection, bias=False),
    }


def _picture(keys: Keys, c: PictureConfig) -> dict:
    return {
        "whole": keys.take("vision_model.embeddings.class_embedding", c.width),
        "patches": keys.patch_conv("vision_model.embeddings.patch_embedding", 3, c.width, c.patch),
        "places": keys.take("vision_model.embeddings.position_embedding.weight", _tokens(c), c.width),
        "norm_in": keys.norm("vision_model.pre_layrnorm", c.width),
        "stack": _blocks(keys, "vision_model.encoder.layers", c, _block),
        "norm_out": keys.norm("vision_model.post_layernorm", c.width),
        "projection": keys.linear("visual_projection", c.width, c.projection, bias=False),
    }


def _open_text(keys: Keys, c: TextConfig) -> dict:
    return {
        "tokens": {"embedding": keys.take("token_embedding.weight", c.vocabulary, c.width)},
        "places": keys.take("positional_embedding", c.length, c.width),
        "stack": _blocks(keys, "transformer.resblocks", c, _open_block),
        "norm_out": keys.norm("ln_final", c.width),
        "projection": {"kernel": keys.take("text_projection", c.width, c.projection)},
    }


def _open_picture(keys: Keys, c: PictureConfig) -> dict:
    return {
        "whole": keys.take("visual.class_embedding", c.width),
        "patches": keys.patch_conv("visual.conv1", 3, c.width, c.patch),
        "places": keys.take("visual.positional_embedding", _tokens(c), c.width),
        "norm_in": keys.norm("visual.ln_pre", c.width),
        "stack": _blocks(keys, "visual.transformer.resblocks", c, _open_block),
        "norm_out": keys.norm("visual.ln_post", c.width),
        "projection": {"kernel": keys.take("visual.proj", c.width, c.projection)},
    }


def _tokens(c: PictureConfig) -> int:
    return (c.image_size // c.patch) ** 2 + 1


def _blocks(keys: Keys, name: str, c: TowerConfig, block: Callable[[Keys, str, TowerConfig], dict]) -> dict:
    """Take a stack of blocks: parameters with a leading axis of blocks."""
    return {"blocks": keys.stack([block(keys, f"{name}.{index}", c) for index in range(c.depth)])}


def _block(keys: Keys, name: str, c: TowerConfig) -> dict:
    return {
        "norm_attention": keys.norm(f"{name}.layer_norm1", c.width),
        "qkv": keys.linears([f"{name}.self_attn.{part}_proj" for part in "qkv"], c.width, c.width),
        "out": keys.linear(f"{name}.self_attn.out_proj", c.width, c.width),
        "norm_mlp": keys.norm(f"{name}.layer_norm2", c.width),
        "mlp_in": keys.linear(f"{name}.mlp.fc1", c.width, c.mlp_width),
        "mlp_out": keys.linear(f"{name}.mlp.fc2", c.mlp_width, c.width),
    }


def _open_block(keys: Keys, name: str, c: TowerConfig) -> dict:
    return {
        "norm_attention": keys.norm(f"{name}.ln_1", c.width),
        "qkv": keys.linear(f"{name}.attn.in_proj", c.width, 3 * c.width, separator="_"),
        "out": keys.linear(f"{name}.attn.out_proj", c.width, c.width),
        "norm_mlp": keys.norm(f"{name}.ln_2", c.width),
        "mlp_in": keys.linear(f"{name}.mlp.c_fc", c.width, c.mlp_width),
        "mlp_out": keys.linear(f"{name}.mlp.c_proj", c.mlp_width, c.width),
    }
