"""Fresh weights against a forward pass of the package that they were published for (extra `parity`).

The package's network is built from the folder's own config.json, takes the tensors of the same files strictly and sees
the same random inputs; both compute in float32. Errors are the largest ones, as parts of the reference's largest number.
"""

import contextlib
import dataclasses
import functools
import importlib
import pathlib
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from maskrl_jax.convert import clip as clip_weights
from maskrl_jax.convert import diffusers_folder, files, meissonic_tokenizer
from maskrl_jax.errors import UserError
from maskrl_jax.models.clip import Clip, ClipConfig, TextConfig, TextTower, unit
from maskrl_jax.models.vq_model import VQModel, VQModelConfig
from maskrl_jax.rewards import clip

PACKAGES = {
    "amused": ("torch", "diffusers"),
    "clip-rewards": ("torch", "transformers"),
    "meissonic-tokenizer": ("torch", "diffusers", "transformers"),
}
TOLERANCE = 1e-4  # of an output's scale
ROUNDING = 32 * np.finfo(np.float32).eps  # of a squared distance, as part of the squares that it is made of
SIDE, ROWS = 8, 2  # cells a side of the pictures that a tokenizer sees, and how many inputs there are

State, Outputs = Mapping[str, np.ndarray], Mapping[str, np.ndarray]


def require(family: str) -> None:
    """Raise UserError for a family without a reference, and where a package of the reference is missing."""
    if family not in PACKAGES:
        raise UserError(
            f"weights of {family!r} have no reference in a package; --verify is for {', '.join(sorted(PACKAGES))}"
        )
    for name in PACKAGES[family]:
        _package(name)


def tokenizer(family: str, folder: str, state: State, params: Mapping[str, Any], sizes: Any) -> None:
    """Compare a converted tokenizer, and the text encoder beside it, with its folder; UserError where they differ."""
    if family == "amused":
        return _codes(folder, state, params, sizes)
    inner = {name: pathlib.Path(folder, name) for name in (meissonic_tokenizer.VQ, meissonic_tokenizer.TEXT)}
    parts = {name: meissonic_tokenizer.part(state, name) for name in inner}
    _codes(inner[meissonic_tokenizer.VQ], parts[meissonic_tokenizer.VQ], {"params": params["params"]}, sizes[0])
    _text(inner[meissonic_tokenizer.TEXT], parts[meissonic_tokenizer.TEXT], params["text"], sizes[1])


def reward(kind: str, folder: pathlib.Path, params: Mapping[str, Any], config: ClipConfig) -> None:
    """Compare both towers of a reward with its folder; UserError where they differ."""
    state, draw = files.read(str(folder / clip.WEIGHTS)), np.random.RandomState(0)
    size = config.picture.image_size
    images, ids = np.float32(draw.standard_normal((ROWS, size, size, 3))), texts(config.text, draw)
    theirs = (_open_clip if "visual.conv1.weight" in state else _hugging_face)(folder, state, config, images, ids)
    apply = _ours(Clip(config), params["clip"])
    found = {
        "picture": unit(apply("picture_features", images)),
        "text": unit(apply("text_features", ids)),
        "logits": apply("__call__", images, ids),
    }
    say(kind, errors(kind, found, theirs))


def texts(config: TextConfig, draw: np.random.RandomState) -> np.ndarray:
    """Token ids int32 [2,L]: a row that the end token ends, and one with padding by it."""
    ids = draw.randint(1, config.end, (ROWS, config.length)).astype(np.int32)
    ids[0, -1], ids[1, config.length // 2 :] = config.end, config.end
    return ids


def errors(what: str, ours: Outputs, theirs: Outputs) -> dict[str, float]:
    """Largest error of each output, as part of its scale; UserError beyond `TOLERANCE` and for what is not finite."""
    found = {}
    for name, wanted in theirs.items():
        found[name] = float(np.abs(np.asarray(ours[name], np.float64) - wanted).max() / np.abs(wanted).max())
        if not found[name] <= TOLERANCE:
            raise UserError(
                f"{what}: {name} differ from the reference's by {found[name]:.1e} of their scale, more than "
                f"{TOLERANCE:.0e}; nothing was kept"
            )
    return found


def equal_codes(what: str, ours: Outputs, theirs: Outputs, codebook: np.ndarray) -> str:
    """Say how many codes are equal; UserError where one differs by more than rounding explains.

    Args:
      ours, theirs: `latents` [...,E] and `codes` [...], of the same cells.
    """
    width, codebook = codebook.shape[-1], np.asarray(codebook, np.float64)
    (mine, own), (wanted, other) = ((np.asarray(x["latents"]), np.asarray(x["codes"])) for x in (ours, theirs))
    mine, wanted = (np.float64(x).reshape(-1, width) for x in (mine, wanted))
    found, right = codebook[own.ravel()], codebook[other.ravel()]
    excess = np.square(wanted - found).sum(-1) - np.square(wanted - right).sum(-1)
    moved = 2 * np.linalg.norm(mine - wanted, axis=-1) * np.linalg.norm(found - right, axis=-1)
    squares = np.square(wanted).sum(-1) + np.square(found).sum(-1)
    if wrong := np.count_nonzero(~(excess <= moved + ROUNDING * squares)):
        raise UserError(f"{what}: {wrong} of {own.size} codes are not the reference's; nothing was kept")
    return f"{(own == other).mean():.2%} of {own.size} codes equal"


def say(what: str, found: Mapping[str, float], more: str = "") -> None:
    """Print what was compared."""
    listed = ", ".join(f"{name} {error:.1e}" for name, error in found.items())
    print(f"verified: {what} {listed} of their scale" + (f"; {more}" if more else ""))


def _codes(folder: str | pathlib.Path, state: State, params: Mapping[str, Any], sizes: VQModelConfig) -> None:
    torch, diffusers = _package("torch"), _package("diffusers")
    draw, side = np.random.RandomState(0), SIDE * sizes.patch
    images = np.float32(draw.uniform(size=(ROWS, side, side, 3)))
    codes = draw.randint(0, sizes.codebook_size, (ROWS, SIDE, SIDE)).astype(np.int32)
    with _quiet(), torch.no_grad():
        theirs = _filled(diffusers.VQModel.from_config(diffusers_folder.read_settings(folder)), state)
        latents = theirs.encode(_first(torch, images)).latents
        indices = theirs.quantize(latents)[2][2].reshape(codes.shape).numpy()
        quantised = theirs.quantize.embedding(_tensor(torch, codes)).permute(0, 3, 1, 2)
        decoded = theirs.decoder(theirs.post_quant_conv(quantised))
        wanted = {"latents": _last(latents), "images": _last(decoded)}
    apply = _ours(VQModel(sizes), params)
    found = {"latents": apply("latents", images), "images": apply("decode", codes)}
    size = errors("vqvae", found, wanted)
    pair = found | {"codes": apply("encode", images)}, wanted | {"codes": indices}
    say("vqvae", size, equal_codes("vqvae", *pair, params["params"]["codebook"]))


def _text(folder: pathlib.Path, state: State, params: Mapping[str, Any], sizes: TextConfig) -> None:
    torch, transformers = _package("torch"), _package("transformers")
    ids = texts(sizes, np.random.RandomState(0))
    with _quiet(), torch.no_grad():
        settings = transformers.CLIPTextConfig.from_dict(diffusers_folder.read_settings(folder))
        theirs = _filled(transformers.CLIPTextModelWithProjection(settings), state)
        out = theirs(input_ids=_tensor(torch, ids), output_hidden_states=True)
        wanted = {"penultimate states": out.hidden_states[-2].numpy(), "pooled": out.text_embeds.numpy()}
    found = _ours(TextTower(dataclasses.replace(sizes, dtype="float32")), params)("__call__", ids)
    say("text_encoder", errors("text_encoder", dict(zip(wanted, found, strict=True)), wanted))


def _hugging_face(
    folder: pathlib.Path, state: State, config: ClipConfig, images: np.ndarray, ids: np.ndarray
) -> dict[str, np.ndarray]:
    torch, transformers = _package("torch"), _package("transformers")
    sizes = folder / clip.SIZES
    with _quiet(), torch.no_grad():
        known = files.json_object(sizes) if sizes.exists() else _settings(config)
        theirs = _filled(transformers.CLIPModel(transformers.CLIPConfig.from_dict(known)), state)
        out = theirs(input_ids=_tensor(torch, ids), pixel_values=_first(torch, images))
        outputs = {"picture": out.image_embeds, "text": out.text_embeds, "logits": out.logits_per_image}
        return {name: x.numpy() for name, x in outputs.items()}


def _open_clip(
    folder: pathlib.Path, state: State, config: ClipConfig, images: np.ndarray, ids: np.ndarray
) -> dict[str, np.ndarray]:
    torch = _package("torch")
    with _quiet(), torch.no_grad():
        theirs = _filled(_open_network(config), state)
        pictures, words, scale = theirs(_first(torch, images), _tensor(torch, ids))[:3]
        outputs = {"picture": pictures, "text": words, "logits": scale * pictures @ words.T}
        return {name: x.numpy() for name, x in outputs.items()}


def _open_network(config: ClipConfig) -> Any:
    """open_clip's module of such sizes; its weights have no config.json."""
    text, picture = config.text, config.picture
    own = {
        name: {"layers": x.depth, "width": x.width, "mlp_ratio": x.mlp_width / x.width}
        for name, x in vars(config).items()
    }
    own["text"] |= {"context_length": text.length, "vocab_size": text.vocabulary, "heads": text.heads}
    own["picture"] |= {"image_size": picture.image_size, "patch_size": picture.patch}
    own["picture"] |= {"head_width": picture.width // picture.heads}
    quick = text.activation == "quick_gelu"
    return _package("open_clip").model.CLIP(text.projection, own["picture"], own["text"], quick_gelu=quick)


def _settings(config: ClipConfig) -> dict[str, Any]:
    """What a config.json of Hugging Face would say of published sizes, of which there need be none."""

    def tower(c):
        sizes = {"hidden_size": c.width, "num_hidden_layers": c.depth, "num_attention_heads": c.heads}
        return sizes | {"intermediate_size": c.mlp_width, "hidden_act": c.activation, "projection_dim": c.projection}

    text, picture = config.text, config.picture
    places = {"vocab_size": text.vocabulary, "max_position_embeddings": text.length, "eos_token_id": text.end}
    return {
        "projection_dim": text.projection,
        "text_config": tower(text) | places,
        "vision_config": tower(picture) | {"image_size": picture.image_size, "patch_size": picture.patch},
    }


def _filled(network: Any, state: State) -> Any:
    """A PyTorch network with the weights of a file in it, all of them, in float32."""
    torch = _package("torch")
    own = {name: x for name, x in state.items() if not name.endswith(clip_weights.CONSTANTS)}
    try:
        network.load_state_dict({name: torch.tensor(np.asarray(x, np.float32)) for name, x in own.items()}, strict=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise UserError(f"the reference {type(network).__name__} does not take these weights: {reason}") from error
    return network.float().eval()


def _ours(model: Any, params: Any) -> Any:
    """Our network as a function of a method's name and its inputs."""

    def apply(method, *inputs):
        with jax.default_matmul_precision("highest"):
            return jax.jit(functools.partial(model.apply, method=method))(params, *inputs)

    return apply


def _tensor(torch: Any, ids: np.ndarray) -> Any:
    return torch.from_numpy(ids.astype(np.int64))


def _first(torch: Any, images: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _last(images: Any) -> np.ndarray:
    return images.numpy().transpose(0, 2, 3, 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the packages warn of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _package(name: str) -> Any:
    try:
        with _quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--verify compares with {name}, which is missing: pip install '.[parity]'") from error
