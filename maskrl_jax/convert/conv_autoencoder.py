"""Names of the convolutional encoder and decoder in taming-transformers and LDM, for `models.conv_autoencoder`."""

from maskrl_jax.convert.keys import Keys
from maskrl_jax.models.conv_autoencoder import ConvSizes

ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "proj_out"}


def encoder_params(keys: Keys, sizes: ConvSizes, out: int) -> dict:
    """Describe a `ConvEncoder(sizes, out)`, whose names begin with `encoder`."""
    channels = sizes.width
    params = {"conv_in": keys.conv("encoder.conv_in", 3, channels)}
    for level in range(len(sizes.multipliers)):
        attended = level in sizes.encoder_attention
        blocks, channels = _level(keys, "encoder.down", sizes, level, sizes.blocks, channels, attended)
        params |= blocks
        if level < len(sizes.multipliers) - 1:
            params[f"level_{level}_down"] = keys.conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    params["middle"] = _middle(keys, "encoder.mid", channels)
    params["norm_out"] = keys.norm("encoder.norm_out", channels)
    params["conv_out"] = keys.conv("encoder.conv_out", channels, out)
    return params


def decoder_params(keys: Keys, sizes: ConvSizes, inputs: int) -> dict:
    """Describe a `ConvDecoder(sizes)` of latents of `inputs` channels, whose names begin with `decoder`."""
    channels = sizes.width * sizes.multipliers[-1]
    params = {"conv_in": keys.conv("decoder.conv_in", inputs, channels)}
    params["middle"] = _middle(keys, "decoder.mid", channels)
    for level in reversed(range(len(sizes.multipliers))):
        attended = level in sizes.decoder_attention
        blocks, channels = _level(keys, "decoder.up", sizes, level, sizes.blocks + 1, channels, attended)
        params |= blocks
        if level:
            params[f"level_{level}_up"] = keys.conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    params["norm_out"] = keys.norm("decoder.norm_out", channels)
    params["conv_out"] = keys.conv("decoder.conv_out", channels, 3)
    return params


def _level(
    keys: Keys, name: str, sizes: ConvSizes, level: int, count: int, channels: int, attended: bool
) -> tuple[dict, int]:
    """Take the blocks of a level, and its attentions: (parameters, channels after it)."""
    params, wide = {}, sizes.width * sizes.multipliers[level]
    for index in range(count):
        params[f"level_{level}_block_{index}"] = _block(keys, f"{name}.{level}.block.{index}", channels, wide)
        channels = wide
        if attended:
            params[f"level_{level}_attention_{index}"] = _attention(keys, f"{name}.{level}.attn.{index}", wide)
    return params, wide


def _middle(keys: Keys, name: str, channels: int) -> dict:
    return {
        "block_1": _block(keys, f"{name}.block_1", channels, channels),
        "attention": _attention(keys, f"{name}.attn_1", channels),
        "block_2": _block(keys, f"{name}.block_2", channels, channels),
    }


def _block(keys: Keys, name: str, inputs: int, outputs: int) -> dict:
    block = {
        "norm1": keys.norm(f"{name}.norm1", inputs),
        "conv1": keys.conv(f"{name}.conv1", inputs, outputs),
        "norm2": keys.norm(f"{name}.norm2", outputs),
        "conv2": keys.conv(f"{name}.conv2", outputs, outputs),
    }
    if inputs != outputs:
        block["shortcut"] = keys.conv(f"{name}.nin_shortcut", inputs, outputs, 1)
    return block


def _attention(keys: Keys, name: str, channels: int) -> dict:
    parts = {ours: keys.conv(f"{name}.{theirs}", channels, channels, 1) for ours, theirs in ATTENTION.items()}
    return {"norm": keys.norm(f"{name}.norm", channels), **parts}
