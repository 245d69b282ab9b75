"""Small text-to-image models in their published layouts: a Meissonic folder, and stages of it and of a DiMOO."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from clip_weights import write_tokenizer
from safetensors.numpy import save_file

from configs import judge as judge_config
from configs import maskgit as maskgit_config
from configs import tokenizer as tokenizer_config
from maskrl_jax.convert import clip, meissonic, vq_model
from maskrl_jax.models.clip import TextConfig, TextTower
from maskrl_jax.models.conv_autoencoder import ConvSizes
from maskrl_jax.models.meissonic import Meissonic, Prompt
from maskrl_jax.models.vq_model import VQModel, VQModelConfig

SIZE, SIDE, K = 32, 8, 6
CONV = {"width": 4, "multipliers": (1, 1, 1), "blocks": 1, "encoder_attention": (), "groups": 2}
VQ = VQModelConfig(ConvSizes(**CONV, middle_attention=False), channels=4, code_width=4, codebook_size=K)
TEXT = TextConfig(
    width=8, depth=2, heads=2, mlp_width=12, projection=16, activation="gelu", vocabulary=49408, length=9, end=49407
)
TRANSFORMER = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 16,
    "axes_dims_rope": [2, 4, 2],
    "vocab_size": 9,
    "codebook_size": K,
    "downsample": True,
    "upsample": True,
}
PROMPTS = [f"{colour} {animal}" for colour in ("red", "tan", "blu", "sky") for animal in ("cat", "dog", "owl", "hen")]


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes)


def write_prompts(folder):
    """Sixteen prompts, and a tokenizer of as many ids as CLIP's."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    place = folder / "tokenizer"
    place.mkdir()
    write_tokenizer(place)
    entries = json.loads((place / "vocab.json").read_text())
    known = [entry for entry in entries if not entry.startswith(("unused", "<|"))]
    known += [f"unused{i}" for i in range(49406 - len(known))] + ["<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(known)}))
    return {
        "name": str(folder / "prompts.txt"),
        "text_length": 9,
        "tokens": "clip",
        "tokenizer": str(place),
        "pad": 49407,
    }


def write_meissonic(folder):
    """A published folder: transformer, vqvae, text_encoder and scheduler."""
    sizes = meissonic.config_of(TRANSFORMER, (SIDE, SIDE))
    text = Prompt(jnp.zeros((1, 9, 8)), jnp.zeros((1, 16)), jnp.zeros((1, 5)))
    empty = jnp.zeros((1, sizes.num_tokens), jnp.int32)
    states = {
        "transformer": meissonic.state_of(drawn(_shapes(Meissonic(sizes), empty, jnp.zeros(1), text)), sizes),
        "vqvae": vq_model.state_of(drawn(_shapes(VQModel(VQ), jnp.zeros((1, SIZE, SIZE, 3))), 1), VQ),
        "text_encoder": clip.text_state_of(drawn(_shapes(TextTower(TEXT), jnp.zeros((1, 9), jnp.int32)), 2), TEXT),
    }
    settings = {
        "transformer": TRANSFORMER,
        "vqvae": {
            "block_out_channels": [4, 4, 4],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "latent_channels": 4,
            "num_vq_embeddings": K,
            "norm_num_groups": 2,
            "mid_block_add_attention": False,
        },
        "text_encoder": {
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "projection_dim": 16,
            "hidden_act": "gelu",
            "vocab_size": 49408,
            "max_position_embeddings": 9,
            "eos_token_id": 49407,
        },
    }
    for name, state in states.items():
        (folder / name).mkdir(parents=True)
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_file(state, folder / name / f"{stem}.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(settings[name]))
    (folder / "model_index.json").write_text("{}")
    return folder


def _shapes(model, *arguments):
    return jax.eval_shape(model.init, jax.random.key(0), *arguments)


def tokenizer(text=True):
    """The config of such a tokenizer, with its text encoder or without."""
    config = tokenizer_config.get_config("meissonic" if text else "amused1024")
    sizes = {name: getattr(VQ, name) for name in ("channels", "code_width", "codebook_size")}
    config.model = {"form": "amused", "image_size": SIZE, "conv": dataclasses.asdict(VQ.conv), **sizes}
    if text:
        own = dataclasses.asdict(TEXT)
        config.model.text = {name: x for name, x in own.items() if name not in ("remat", "dtype")}
    return config


def base(form, data):
    """The config of a generator at this size."""
    config = maskgit_config.get_config(form)
    config.parents.tokenizer, config.parents.judge = tokenizer(form == "meissonic"), judge_config.get_config("clip-b32")
    config.data = data
    if form == "meissonic":
        sizes = meissonic.config_of(TRANSFORMER)
        own = {name: getattr(sizes, name) for name in (*meissonic.SIZES, "resampled") if name != "codebook_size"}
        config.model.update(own | {"dtype": "float32", "remat": False})
    else:
        config.model.update({"vocab_size": 126_356 + K, "width": 8, "depth": 1, "heads": 2, "kv_heads": 2})
        config.model.update({"mlp_width": 12, "dtype": "float32", "remat": False, "weights": "float32"})
    config.sampler.update({"num_steps": 4, "max_steps": 4})
    config.evaluation.update({"prompts": 4, "group": 2, "batch_size": 8, "steps": (2, 4), "glance_steps": 4})
    config.evaluation.update({"glance_prompts": 4, "tune_prompts": 4, "keep": 2})
    config.parallel = "pmap"
    return config
