"""MIGM-Shortcut (arXiv 2602.23996) for Lumina-DiMOO: the same idea in LLaMA blocks with absolute positions."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.dimoo import cut_normal, rotary_angles, rotated
from maskrl_jax.models.shortcut import (
    TimeModulation,
    attend,
    check_sizes,
    dense,
    expanded,
    resized,
    split_heads,
    starts_without_out,
    where_controlled,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DimooShortcutConfig:
    """Static sizes and options; the defaults are the published network's except for `zero_init_out`."""

    width: int = 4096  # D, that of the base model's features
    ratio: float = 2.0  # bottleneck D/h; at 1 the three projections are identities
    n_block: int = 1
    heads: int = 32
    mlp_width: int = 12288  # does not shrink with the bottleneck
    rope_theta: float = 5e5
    rms_eps: float = 1e-5
    embed_t: bool = True  # scale and shift by the masked fraction rho
    controls: bool = True  # False: the ablation no_ca
    zero_init_out: bool = True  # start as the frozen feature (our choice; official False)
    dtype: str = "float32"

    def __post_init__(self):
        check_sizes(self, "width", "n_block", "heads", "mlp_width")
        if self.head_width % 2:
            raise ValueError(f"inner width {self.inner} over heads {self.heads} is odd: no pairs to rotate")

    @property
    def inner(self) -> int:
        """Bottleneck width h."""
        return round(self.width / self.ratio)

    @property
    def head_width(self) -> int:
        return self.inner // self.heads


class DimooShortcut(nn.Module):
    """DiMOO's network (shortcut spec, section 3): fhat = f + S(f, controls, rho).

    no_ca (`controls=False`) replaces each cross block by a second self block.
    """

    config: DimooShortcutConfig

    @nn.compact
    def __call__(
        self,
        features_BLD: Array,
        controls_BnD: Array,
        positions_Bn: Array,
        valid_Bn: Array,
        rho_B: Array,
        padding_BL: Array | None = None,
        query_positions_BL: Array | None = None,
    ) -> Array:
        """Predict the next features.

        Args:
          features_BLD: f, output of the final norm at all positions [B,L,D], of any float type.
          controls_BnD: word embeddings of the controls [B,n,D]: revealed image tokens, in the conditional
            branch the prompt too. Not read without `controls`, nor are the next two.
          positions_Bn: their absolute positions in this branch, int32.
          valid_Bn: False marks padding among the controls, bool. Cross-attention adds nothing to a row that
            has no control at all.
          rho_B: masked fraction that the predicted step sees, [B] in [0,1], float32.
          padding_BL: True marks positions that are no keys in self-attention; None = there are none.
          query_positions_BL: position ids of the sequence, int32; None = 0..L-1.

        Returns:
          fhat [B,L,D] float32.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        batch, length = features_BLD.shape[:2]
        if query_positions_BL is None:
            query_positions_BL = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
        real_BL = None if padding_BL is None else ~padding_BL
        features_BLD = features_BLD.astype(jnp.float32)
        y_BLh = resized(features_BLD, c, dtype, "features_in")
        u_Bnh = resized(controls_BnD, c, dtype, "controls_in") if c.controls else None
        angles_BLc = rotary_angles(query_positions_BL, c.head_width, c.rope_theta)
        for index in range(c.n_block):
            first = LlamaBlock(c, name=f"block_{index}_first")
            if c.controls:
                key_angles = rotary_angles(positions_Bn, c.head_width, c.rope_theta)
                y_BLh = first(y_BLh, u_Bnh, angles_BLc, key_angles, valid_Bn)
            else:
                y_BLh = first(y_BLh, y_BLh, angles_BLc, angles_BLc, real_BL)
            y_BLh = LlamaBlock(c, name=f"block_{index}_second")(y_BLh, y_BLh, angles_BLc, angles_BLc, real_BL)
        start = nn.initializers.zeros if starts_without_out(c) else nn.initializers.ones
        y_BLh = nn.RMSNorm(c.rms_eps, jnp.float32, scale_init=start, name="norm_out")(y_BLh)
        if c.embed_t:
            y_BLh = TimeModulation(starts_without_out(c), name="time")(y_BLh, rho_B)
        return features_BLD + expanded(y_BLh, c, dtype)


class LlamaBlock(nn.Module):
    """Pre-norm attention with rotary positions, then a gated MLP, without biases, on a float32 residual stream.

    Queries come from y [B,L,h], keys and values from source [B,n,h] (y itself in a self block); one norm
    serves both.
    """

    config: DimooShortcutConfig

    @nn.compact
    def __call__(self, y_BLh: Array, source_Bnh: Array, query_angles: Array, key_angles: Array, valid_Bn) -> Array:
        c = self.config
        norm = nn.RMSNorm(c.rms_eps, jnp.float32, name="norm")
        normed, source_Bnh = norm(y_BLh), norm(source_Bnh)
        query = rotated(split_heads(self._linear(normed, c.inner, "query"), c.heads), query_angles)
        key = rotated(split_heads(self._linear(source_Bnh, c.inner, "key"), c.heads), key_angles)
        value = split_heads(self._linear(source_Bnh, c.inner, "value"), c.heads)
        mixed = attend(query, key, value, valid_Bn).reshape(y_BLh.shape)
        y_BLh = y_BLh + where_controlled(self._linear(mixed, c.inner, "out"), valid_Bn)
        normed = nn.RMSNorm(c.rms_eps, jnp.float32, name="mlp_norm")(y_BLh)
        hidden = nn.silu(self._linear(normed, c.mlp_width, "mlp_gate")) * self._linear(normed, c.mlp_width, "mlp_up")
        return y_BLh + self._linear(hidden, c.inner, "mlp_out")

    def _linear(self, x, width, name):
        return dense(x, width, jnp.dtype(self.config.dtype), name, use_bias=False, kernel_init=cut_normal)
