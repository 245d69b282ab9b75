"""MIGM-Shortcut (arXiv 2602.23996) for MaskGIT: predict the next feature of a masked image generator from the last."""

import dataclasses
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.layers import SparseConv3, filtered, layer_norm, sinusoid

Array = jax.Array
TIME_WIDTH = 256  # width of the sinusoidal time embedding
NO_KEY = -1e9  # attention bias of an invalid key; finite, so that a row of nothing but invalid keys has no NaN


@dataclasses.dataclass(frozen=True)
class ShortcutConfig:
    """Static sizes and options; the defaults are the published network's except for `zero_init_out`."""

    width: int  # D, that of the base model's features
    ratio: float = 2.0  # bottleneck D/h; at 1 the three projections are identities
    n_block: int = 1
    heads: int = 16
    embed_t: bool = True  # scale and shift by the masked fraction rho
    controls: bool = True  # False: the ablation no_ca
    kv_prenorm: bool = False  # normalise keys and values as the queries are; published weights need False
    zero_init_out: bool = True  # start as the frozen feature (our choice; official False)
    local_mixing: bool = False  # neighbours see each other by 3x3 filters (our choice; none is published)
    num_tokens: int = 0  # N, a square number, where there is local mixing
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        check_sizes(self, "width", "n_block", "heads")
        if self.local_mixing and (self.num_tokens < 1 or self.side**2 != self.num_tokens):
            raise ValueError(f"local_mixing needs a square grid; num_tokens {self.num_tokens} is none")

    @property
    def side(self) -> int:
        """Side of the token grid."""
        return math.isqrt(self.num_tokens)

    @property
    def inner(self) -> int:
        """Bottleneck width h."""
        return round(self.width / self.ratio)


def check_sizes(config, *names: str) -> None:
    """Raise a one-line ValueError where a named size is below 1, or the bottleneck does not suit the heads."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)} must be at least 1")
    if not config.ratio >= 1:
        raise ValueError(f"ratio {config.ratio} must be at least 1")
    if config.inner < 1 or config.inner % config.heads:
        raise ValueError(f"inner width {config.inner} is not divisible by heads {config.heads}")


class Shortcut(nn.Module):
    """Form A's network (shortcut spec, section 2): fhat = f + S(f, controls, rho).

    Our choices: Flax's default initialisation; no_ca (`controls=False`, published for the DiMOO form only)
    leaves out the cross-attention with its norm and its MLP and the projection of the controls; `local_mixing`, for
    bases that have such filters themselves: a revealed token also enters the stream at the 3x3 cells about it, and
    every block begins with a depthwise filter, which together tell the network what its base's stem and filters do.
    """

    config: ShortcutConfig

    @nn.compact
    def __call__(
        self, features_BTD: Array, controls_BnD: Array, positions_Bn: Array, valid_Bn: Array, rho_B: Array
    ) -> Array:
        """Predict the next features.

        Args:
          features_BTD: f, features before the head [B,T,D] float32, class slot included where the base keeps it (form
            A; our own base leaves its condition tokens out, so that T = N).
          controls_BnD: E[v] + P[p] of the frozen base for the tokens just revealed, [B,n,D]; their order is
            irrelevant. Not read without `controls`.
          positions_Bn: their places in the grid, int32, row-major; read with `local_mixing` alone.
          valid_Bn: False marks padding among the controls, bool. Cross-attention adds nothing to a row that
            has no control at all.
          rho_B: masked fraction that the predicted step sees, [B] in [0,1], float32.

        Returns:
          fhat [B,T,D] float32.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        features_BTD = features_BTD.astype(jnp.float32)
        y_BTh = resized(features_BTD, c, dtype, "features_in")
        u_Bnh = resized(controls_BnD, c, dtype, "controls_in") if c.controls else None
        side = c.side * c.local_mixing
        if side and c.controls:
            sent = SparseConv3(side, dtype, name="stem")(u_Bnh, positions_Bn, valid_Bn)
            y_BTh = y_BTh + jnp.pad(sent, ((0, 0), (0, y_BTh.shape[1] - c.num_tokens), (0, 0)))
        block = nn.remat(ShortcutBlock) if c.remat else ShortcutBlock
        for index in range(c.n_block):
            y_BTh = block(c.heads, c.kv_prenorm, side, dtype, name=f"block_{index}")(y_BTh, u_Bnh, valid_Bn)
        y_BTh = nn.gelu(dense(layer_norm("norm_tail", 1e-12)(y_BTh), c.inner, dtype, "tail"), approximate=False)
        start = nn.initializers.zeros if starts_without_out(c) else nn.initializers.ones
        y_BTh = nn.LayerNorm(1e-12, jnp.float32, scale_init=start, name="norm_out")(y_BTh.astype(jnp.float32))
        if c.embed_t:
            y_BTh = TimeModulation(starts_without_out(c), name="time")(y_BTh, rho_B)
        return features_BTD + expanded(y_BTh, c, dtype)


class ShortcutBlock(nn.Module):
    """Cross-attention to the controls u, MLP, self-attention, MLP; pre-norm, on a float32 residual stream.

    As published, queries alone are normalised: keys and values are u, and in self-attention the stream itself.
    With `kv_prenorm` they pass the norm of the queries. Without controls (None) the first half is left out.
    """

    heads: int
    kv_prenorm: bool
    side: int  # of the grid whose neighbours a filter mixes first; 0 = none
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y_BTh: Array, u_Bnh: Array | None, valid_Bn: Array) -> Array:
        if self.side:
            y_BTh = y_BTh + filtered(y_BTh, self.side, "local")
        if u_Bnh is not None:
            y_BTh = self._mlp(self._attention(y_BTh, u_Bnh, valid_Bn, "cross"), "cross")
        return self._mlp(self._attention(y_BTh, y_BTh, None, "self"), "self")

    def _attention(self, y_BTh, source_Bnh, valid_Bn, name):
        width = y_BTh.shape[-1]
        norm = layer_norm(f"{name}_norm", 1e-5)
        source_Bnh = norm(source_Bnh) if self.kv_prenorm else source_Bnh
        query = dense(norm(y_BTh), width, self.dtype, f"{name}_query")
        key, value = jnp.split(dense(source_Bnh, 2 * width, self.dtype, f"{name}_key_value"), 2, axis=-1)
        mixed = attend(*(split_heads(x, self.heads) for x in (query, key, value)), valid_Bn)
        return y_BTh + where_controlled(dense(mixed.reshape(y_BTh.shape), width, self.dtype, f"{name}_out"), valid_Bn)

    def _mlp(self, y_BTh, name):
        width = y_BTh.shape[-1]
        hidden = dense(layer_norm(f"{name}_mlp_norm", 1e-5)(y_BTh), 4 * width, self.dtype, f"{name}_mlp_in")
        return y_BTh + dense(nn.gelu(hidden, approximate=False), width, self.dtype, f"{name}_mlp_out")


class TimeModulation(nn.Module):
    """Scale and shift y [B,T,h] by the masked fraction rho [B], in float32: bfloat16 would round rho away."""

    zero_init: bool  # start as the identity

    @nn.compact
    def __call__(self, y_BTh: Array, rho_B: Array) -> Array:
        chex.assert_shape(rho_B, y_BTh.shape[:1])
        inner = y_BTh.shape[-1]
        hidden = nn.Dense(round((TIME_WIDTH * inner) ** 0.5), name="embed_in")(time_embedding(rho_B))
        embedded = nn.Dense(inner, name="embed_out")(nn.silu(hidden))
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        scale, shift = jnp.split(nn.Dense(2 * inner, kernel_init=init, name="modulation")(embedded), 2, axis=-1)
        return y_BTh * (1 + scale[:, None]) + shift[:, None]


def time_embedding(rho_B: Array) -> Array:
    """Sinusoids of 1000 rho, float32 [B,256]."""
    return sinusoid(1000 * rho_B.astype(jnp.float32), TIME_WIDTH)


def attend(query: Array, key: Array, value: Array, valid_Bn: Array | None) -> Array:
    """Attend with query [B,T,H,C], key and value [B,n,H,C]; softmax in float32, invalid keys weigh nothing."""
    bias = None if valid_Bn is None else jnp.where(valid_Bn, 0.0, NO_KEY)[:, None, None]
    return jax.nn.dot_product_attention(query, key, value, bias)


def where_controlled(added_BTh: Array, valid_Bn: Array | None) -> Array:
    """Zero what attention adds to the rows that have no valid key: its weights there are spread over padding."""
    if valid_Bn is None:
        return added_BTh
    return jnp.where(valid_Bn.any(axis=1)[:, None, None], added_BTh, 0)


def split_heads(x_BTh: Array, heads: int) -> Array:
    """[B,T,h] -> [B,T,H,C]."""
    return x_BTh.reshape(*x_BTh.shape[:2], heads, -1)


def dense(x: Array, width: int, dtype, name: str, **options) -> Array:
    """Apply a Dense layer [..., D] -> [..., width] as one matmul over rows (see `layers`: a second axis costs on CPU)."""
    rows = nn.Dense(width, dtype=dtype, name=name, **options)(x.reshape(-1, x.shape[-1]))
    return rows.reshape(*x.shape[:-1], width)


def resized(x: Array, config, dtype, name: str) -> Array:
    """Project [..., D] to the bottleneck [..., h] float32; the identity, without parameters, at ratio 1."""
    x = x if config.ratio == 1 else dense(x, config.inner, dtype, name)
    return x.astype(jnp.float32)


def expanded(y: Array, config, dtype) -> Array:
    """Project the bottleneck [..., h] back to [..., D] float32; the identity, without parameters, at ratio 1."""
    if config.ratio == 1:
        return y
    init = nn.initializers.zeros if config.zero_init_out else nn.initializers.lecun_normal()
    return dense(y, config.width, dtype, "features_out", kernel_init=init).astype(jnp.float32)


def starts_without_out(config) -> bool:
    """Whether the last norm and the modulation start at zero: `zero_init_out` at ratio 1, without a projection."""
    return config.zero_init_out and config.ratio == 1
