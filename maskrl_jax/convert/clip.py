"""Weights of CLIP as parameters of ours, and back: the layouts of Hugging Face and of open_clip.

Strict as in `maskgit_port`: a ValueError of one line names the key that is missing, left over or misshapen.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from maskrl_jax.convert.keys import Keys
from maskrl_jax.models.clip import AestheticHead, ClipConfig, PictureConfig, TextConfig, TowerConfig

# Constants that some checkpoints carry beside their weights.
CONSTANTS = ("embeddings.position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")
NORMS = {"norm_attention": "layer_norm1", "norm_mlp": "layer_norm2"}
LINEARS = {"out": "self_attn.out_proj", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}
QKV = [f"self_attn.{part}_proj" for part in "qkv"]
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
    keys = _keys(state)
    if "visual.conv1.weight" in state:
        params = {"text": _open_text(keys, config.text), "picture": _open_picture(keys, config.picture)}
    else:
        params = {"text": _text(keys, config.text), "picture": _picture(keys, config.picture)}
    params["logit_scale"] = keys.take("logit_scale")
    keys.finish()
    return {"params": params}


def text_params_of(state: Mapping[str, np.ndarray], config: TextConfig) -> dict:
    """Map the state dict of a `CLIPTextModelWithProjection` to the variables of `TextTower(config)`, float32."""
    keys = _keys(state)
    params = _text(keys, config)
    keys.finish()
    return {"params": params}


def aesthetic_params_of(state: Mapping[str, np.ndarray], features: int) -> dict:
    """Map the state dict of LAION's predictor over so many features to the variables of `AestheticHead`, float32."""
    keys, params, width = Keys(state), {}, features
    for index, (layer, out) in enumerate(zip(HEAD_LAYERS, AestheticHead.widths, strict=True)):
        params[f"layers_{index}"] = keys.linear(f"layers.{layer}", width, out)
        width = out
    keys.finish()
    return {"params": params}


def state_of(params: Mapping[str, Any], config: ClipConfig) -> dict[str, np.ndarray]:
    """Undo `params_of`: the state dict of a Hugging Face `CLIPModel`, float32, equal byte for byte."""
    own = params["params"]
    state = _text_state(own["text"], config.text) | {"logit_scale": np.asarray(own["logit_scale"])}
    picture, c = own["picture"], config.picture
    patches = np.asarray(picture["patches"]["kernel"]).reshape(c.patch, c.patch, 3, c.width)
    state |= {
        "vision_model.embeddings.class_embedding": np.asarray(picture["whole"]),
        "vision_model.embeddings.patch_embedding.weight": np.ascontiguousarray(patches.transpose(3, 2, 0, 1)),
        "vision_model.embeddings.position_embedding.weight": np.asarray(picture["places"]),
        "visual_projection.weight": _transposed(picture["projection"]["kernel"]),
    }
    state |= _norm_state("vision_model.pre_layrnorm", picture["norm_in"])
    state |= _norm_state("vision_model.post_layernorm", picture["norm_out"])
    return state | _blocks_state("vision_model", picture["stack"]["blocks"], c)


def text_state_of(params: Mapping[str, Any], config: TextConfig) -> dict[str, np.ndarray]:
    """Undo `text_params_of`: the state dict of a `CLIPTextModelWithProjection`."""
    return _text_state(params["params"], config)


def _keys(state: Mapping[str, np.ndarray]) -> Keys:
    return Keys({name: value for name, value in state.items() if not name.endswith(CONSTANTS)})


def _text(keys: Keys, c: TextConfig) -> dict:
    return {
        "tokens": {"embedding": keys.take("text_model.embeddings.token_embedding.weight", c.vocabulary, c.width)},
        "places": keys.take("text_model.embeddings.position_embedding.weight", c.length, c.width),
        "stack": {"blocks": _blocks(keys, "text_model.encoder.layers", c, _block)},
        "norm_out": keys.norm("text_model.final_layer_norm", c.width),
        "projection": {"kernel": keys.take("text_projection.weight", c.projection, c.width).T},
    }


def _picture(keys: Keys, c: PictureConfig) -> dict:
    return {
        "whole": keys.take("vision_model.embeddings.class_embedding", c.width),
        "patches": _patches(keys, "vision_model.embeddings.patch_embedding.weight", c),
        "places": keys.take("vision_model.embeddings.position_embedding.weight", _tokens(c), c.width),
        "norm_in": keys.norm("vision_model.pre_layrnorm", c.width),
        "stack": {"blocks": _blocks(keys, "vision_model.encoder.layers", c, _block)},
        "norm_out": keys.norm("vision_model.post_layernorm", c.width),
        "projection": {"kernel": keys.take("visual_projection.weight", c.projection, c.width).T},
    }


def _open_text(keys: Keys, c: TextConfig) -> dict:
    return {
        "tokens": {"embedding": keys.take("token_embedding.weight", c.vocabulary, c.width)},
        "places": keys.take("positional_embedding", c.length, c.width),
        "stack": {"blocks": _blocks(keys, "transformer.resblocks", c, _open_block)},
        "norm_out": keys.norm("ln_final", c.width),
        "projection": {"kernel": keys.take("text_projection", c.width, c.projection)},
    }


def _open_picture(keys: Keys, c: PictureConfig) -> dict:
    return {
        "whole": keys.take("visual.class_embedding", c.width),
        "patches": _patches(keys, "visual.conv1.weight", c),
        "places": keys.take("visual.positional_embedding", _tokens(c), c.width),
        "norm_in": keys.norm("visual.ln_pre", c.width),
        "stack": {"blocks": _blocks(keys, "visual.transformer.resblocks", c, _open_block)},
        "norm_out": keys.norm("visual.ln_post", c.width),
        "projection": {"kernel": keys.take("visual.proj", c.width, c.projection)},
    }


def _tokens(c: PictureConfig) -> int:
    return (c.image_size // c.patch) ** 2 + 1


def _patches(keys: Keys, name: str, c: PictureConfig) -> dict:
    """Read a convolution over whole patches as a Dense layer of their pixels in our order: row, column, channel."""
    weight = keys.take(name, c.width, 3, c.patch, c.patch)
    return {"kernel": weight.transpose(2, 3, 1, 0).reshape(-1, c.width)}


def _blocks(keys: Keys, name: str, c: TowerConfig, block) -> dict:
    """Take a stack of blocks: parameters with a leading axis of blocks."""
    blocks = [block(keys, f"{name}.{index}", c) for index in range(c.depth)]
    return {part: {x: np.stack([b[part][x] for b in blocks]) for x in blocks[0][part]} for part in blocks[0]}


def _block(keys: Keys, name: str, c: TowerConfig) -> dict:
    parts = [keys.linear(f"{name}.{part}", c.width, c.width) for part in QKV]
    qkv = {"kernel": np.concatenate([p["kernel"] for p in parts], axis=1)}
    norms = {ours: keys.norm(f"{name}.{theirs}", c.width) for ours, theirs in NORMS.items()}
    return norms | {
        "qkv": qkv | {"bias": np.concatenate([p["bias"] for p in parts])},
        "out": keys.linear(f"{name}.self_attn.out_proj", c.width, c.width),
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


def _text_state(text: Mapping[str, Any], c: TextConfig) -> dict[str, np.ndarray]:
    return {
        "text_model.embeddings.token_embedding.weight": np.asarray(text["tokens"]["embedding"]),
        "text_model.embeddings.position_embedding.weight": np.asarray(text["places"]),
        **_norm_state("text_model.final_layer_norm", text["norm_out"]),
        "text_projection.weight": _transposed(text["projection"]["kernel"]),
        **_blocks_state("text_model", text["stack"]["blocks"], c),
    }


def _blocks_state(name: str, blocks: Mapping[str, Any], c: TowerConfig) -> dict[str, np.ndarray]:
    state = {}
    for index in range(c.depth):
        stem = f"{name}.encoder.layers.{index}"
        own = {part: {x: np.asarray(value[index]) for x, value in layer.items()} for part, layer in blocks.items()}
        kernels, biases = np.split(own["qkv"]["kernel"], 3, axis=1), np.split(own["qkv"]["bias"], 3)
        for part, kernel, bias in zip(QKV, kernels, biases, strict=True):
            state |= {f"{stem}.{part}.weight": _transposed(kernel), f"{stem}.{part}.bias": bias}
        for ours, theirs in NORMS.items():
            state |= _norm_state(f"{stem}.{theirs}", own[ours])
        for ours, theirs in LINEARS.items():
            layer = own[ours]
            state |= {f"{stem}.{theirs}.weight": _transposed(layer["kernel"]), f"{stem}.{theirs}.bias": layer["bias"]}
    return state


def _norm_state(name: str, norm: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {f"{name}.weight": np.asarray(norm["scale"]), f"{name}.bias": np.asarray(norm["bias"])}


def _transposed(kernel: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(kernel).T)
