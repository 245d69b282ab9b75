"""Layers that several model families share."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.axis import gathered

Array = jax.Array
SINUSOID_WIDTH = 256
# Of a transformer of classes and codes.
SIZES = ("num_tokens", "codebook_size", "num_classes", "width", "depth", "heads", "mlp_width")


def check_sizes(config: Any, names: Sequence[str], square: bool = True) -> None:
    """Raise a one-line ValueError for a size below 1, heads that do not divide the width, or tokens of no square grid."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)} must be at least 1")
    if square and round(config.num_tokens**0.5) ** 2 != config.num_tokens:
        raise ValueError(f"num_tokens {config.num_tokens} is not a square grid")
    if config.width % config.heads:
        raise ValueError(f"width {config.width} is not divisible by heads {config.heads}")


def layer_norm(name: str, epsilon: float = 1e-6) -> nn.LayerNorm:
    """Layer norm that computes in float32 whatever the compute dtype (DESIGN, contracts: Model)."""
    return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, name=name)


def stack(block: type[nn.Module], length: int, *, remat: bool, static: Sequence[int] = (), **scan: Any) -> Callable:
    """A loop over `length` blocks, a class or partial to build where the blocks' own would be.

    Parameters have a leading axis of blocks. With `remat`, and where they are split over devices in an update (FSDP), a
    block's are gathered when its turn comes and again in the backward pass: left to itself the compiler splits
    activations instead. Without, all that was gathered would be kept.

    Args:
      block: a module whose call is a step of `nn.scan`.
      remat: keep the inputs of blocks alone for the backward pass.
      static: places of arguments that are not arrays, the module being 0.
      scan: further arguments of `nn.scan`; `split_rngs` beside that of parameters.
    """
    if remat:
        block = nn.map_variables(block, "params", trans_in_fn=gathered, init=True)
        block = nn.remat(block, prevent_cse=False, static_argnums=tuple(static))
    rngs = {"params": True} | scan.pop("split_rngs", {})
    return nn.scan(block, variable_axes={"params": 0}, split_rngs=rngs, length=length, **scan)


def sinusoid(x: Array, width: int = SINUSOID_WIDTH) -> Array:
    """Give [cos(x w_i), sin(x w_i)], w_i = 10000^(-2i/width), of x [...] as float32 [..., width].

    Where x reaches 1000, one unit in the last place of a frequency moves the result by up to 6e-5: the frequencies are
    a host table, their exponents rounded to float32 as in the references (float64 throughout is twice as far from them).
    """
    half = width // 2
    exponents = np.float32(-np.log(1e4)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = x.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * x.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def neighbourhood(x_BHWD: Array) -> Array:
    """Stack every cell's 3x3 neighbourhood: [B,H,W,D] -> [B,H,W,9D], zeros outside the grid.

    A 3x3 convolution as a gather and a matmul: `lax.conv` inside a scanned loop runs on XLA's slow
    path on CPU (four times slower, measured).
    """
    height, width = x_BHWD.shape[1:3]
    padded = jnp.pad(x_BHWD, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, axis=-1)


class Conv3(nn.Module):
    """3x3 convolution with zero padding on [B,H,W,C], as one matmul."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        return nn.Dense(self.features, dtype=self.dtype, name="kernel")(neighbourhood(x_BHWC))


class SparseConv3(nn.Module):
    """3x3 convolution, zero padding, of a grid that is 0 but in a few cells; without a bias.

    Costs by those cells, not by the grid.
    """

    side: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BnC: Array, positions_Bn: Array, valid_Bn: Array) -> Array:
        """Values [B,n,C] at row-major positions int32 [B,n], all of them other ones -> float32 [B,side^2,C].

        Those that are not valid send nothing.
        """
        batch, cells, channels = x_BnC.shape
        wide = self.side + 2
        sent = nn.Dense(9 * channels, use_bias=False, dtype=self.dtype, name="kernel")(_rows(x_BnC))
        sent = jnp.where(valid_Bn[..., None, None], sent.reshape(batch, cells, 9, channels), 0).astype(jnp.float32)
        rows_Bn, cols_Bn = jnp.divmod(positions_Bn, self.side)
        corner_Bn, grid = rows_Bn * wide + cols_Bn, jnp.zeros((batch, wide**2, channels))
        for shift in range(9):  # one at a time no cell is hit twice: the sum has one order on every device
            to_Bn = corner_Bn + shift // 3 * wide + shift % 3
            grid = grid.at[jnp.arange(batch)[:, None], to_Bn].add(sent[:, :, shift], unique_indices=True)
        inside = grid.reshape(batch, wide, wide, channels)[:, 1:-1, 1:-1]
        return inside.reshape(batch, self.side**2, channels)


class DepthwiseConv3(nn.Module):
    """One 3x3 filter a channel on [B,H,W,D], zero padding; starts at 0, so that a residual of it starts as identity."""

    @nn.compact
    def __call__(self, x_BHWD: Array) -> Array:
        height, width, channels = x_BHWD.shape[1:]
        kernel = self.param("kernel", nn.initializers.zeros, (3, 3, channels))
        padded = jnp.pad(x_BHWD, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return sum(
            padded[:, i : i + height, j : j + width] * kernel[i, j][None, None, None].astype(x_BHWD.dtype)
            for i in range(3)
            for j in range(3)
        )


def filtered(x_BSD: Array, side: int, name: str) -> Array:
    """A depthwise 3x3 filter over the first side^2 tokens, which are a grid; 0 at the others."""
    cells = side**2
    grid = x_BSD[:, :cells].reshape(-1, side, side, x_BSD.shape[-1])
    local = DepthwiseConv3(name=name)(grid).reshape(-1, cells, x_BSD.shape[-1])
    return jnp.pad(local, ((0, 0), (0, x_BSD.shape[1] - cells), (0, 0)))


def placed_condition(
    norm: nn.Module, hidden: Sequence[nn.Module], out: nn.Module, maps_NR: Array, text_BLD: Array
) -> Array:
    """What the whole condition says of every place, [B,N,D]: "left of" must reach the left cells (our choice).

    An MLP over all condition tokens [B,L,D] at once, whose output is addressed through R learned maps of the grid [N,R].
    """
    pooled = norm(text_BLD.reshape(len(text_BLD), -1))
    for layer in hidden:
        pooled = nn.gelu(layer(pooled))
    content = out(pooled).reshape(-1, maps_NR.shape[1], text_BLD.shape[-1])
    return jnp.einsum("nr,brd->bnd", maps_NR, content)


class RelativeBias(nn.Module):
    """Attention bias [1,H,S,S] by the offset between grid cells (Swin's table); 0 to and from other tokens."""

    heads: int
    side: int
    length: int

    @nn.compact
    def __call__(self) -> Array:
        span = 2 * self.side - 1
        table = self.param("table", nn.initializers.zeros, (self.heads, span * span))
        rows, cols = np.divmod(np.arange(self.side**2), self.side)
        index = (rows[:, None] - rows[None] + self.side - 1) * span + cols[:, None] - cols[None] + self.side - 1
        rest = self.length - self.side**2
        return jnp.pad(table[:, index], ((0, 0), (0, rest), (0, rest)))[None]


class Attention(nn.Module):
    """Bidirectional multi-head self-attention on [B,S,D]; softmax in float32."""

    heads: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x_BSD: Array, bias: Array | None = None) -> Array:
        batch, length, width = x_BSD.shape
        qkv = nn.Dense(3 * width, dtype=self.dtype, kernel_init=self.kernel_init, name="qkv")(_rows(x_BSD))
        query, key, value = jnp.split(qkv.reshape(batch, length, 3 * self.heads, -1), 3, axis=2)
        mixed = jax.nn.dot_product_attention(query, key, value, bias)
        out = nn.Dense(width, dtype=self.dtype, kernel_init=self.kernel_init, name="out")
        return out(_rows(mixed.reshape(x_BSD.shape))).reshape(x_BSD.shape)


class Block(nn.Module):
    """Pre-norm transformer block (MaskGIT form A): x += attention(norm x); x += mlp(norm x)."""

    heads: int
    mlp_width: int
    side: int = 0  # grid side: a depthwise 3x3 filter mixes neighbours before the attention; 0 = none
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BSD: Array, bias: Array | None = None) -> Array:
        if self.side:
            x_BSD = x_BSD + filtered(x_BSD, self.side, "local")
        mixed = Attention(self.heads, self.dtype, name="attention")(layer_norm("norm_attention")(x_BSD), bias)
        x_BSD = x_BSD + mixed
        hidden = nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(_rows(layer_norm("norm_mlp")(x_BSD)))
        out = nn.Dense(x_BSD.shape[-1], dtype=self.dtype, name="mlp_out")(nn.gelu(hidden))
        return x_BSD + out.reshape(x_BSD.shape)


def _rows(x: Array) -> Array:
    """[..., D] -> [M, D]: the weight gradient of a matmul over two leading axes costs a transpose on CPU."""
    return x.reshape(-1, x.shape[-1])
