"""The light heads that decide how much a call commits (speed_rl spec 4.4; our choice)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class StrideHead(nn.Module):
    """Map the features of a state to decision logits without stickiness, and hold the learned stickiness.

    At the start the logits are `bias` for every state: the output weights are zero.

    Args:
      bias: one initial logit per decision (`rl.stride.prior_bias`).
      stickiness: initial eta.
      opening: initial logits that the opening calls add to these, one per decision; () for none.
      hidden: widths of the MLP.
    """

    bias: tuple[float, ...]
    stickiness: float = 4.0
    opening: tuple[float, ...] = ()
    hidden: tuple[int, ...] = (128, 128)

    @nn.compact
    def __call__(self, features_BF: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Give (logits float32 [B,D], logits of the opening float32 [D], eta float32 scalar)."""
        x = _trunk(features_BF, self.hidden)
        weights = nn.Dense(
            len(self.bias),
            kernel_init=nn.initializers.zeros,
            bias_init=lambda key, shape, dtype: jnp.asarray(self.bias, dtype),
            name="out",
        )
        eta = self.param("eta", nn.initializers.constant(self.stickiness), (), jnp.float32)
        if not self.opening:
            return weights(x), jnp.zeros(len(self.bias)), eta
        return weights(x), self.param("opening", lambda key: jnp.asarray(self.opening, jnp.float32)), eta


class ThresholdHead(nn.Module):
    """Map the features of a state to the normal law of the confidence threshold's logit.

    Args:
      mean: initial mu, for every state.
      std: initial sigma.
      hidden: widths of the MLP.
    """

    mean: float = 2.0
    std: float = 1.0
    hidden: tuple[int, ...] = (128, 128)

    @nn.compact
    def __call__(self, features_BF: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Give (mu float32 [B], sigma float32 [B] > 0)."""
        x = _trunk(features_BF, self.hidden)
        initial = jnp.array([self.mean, 0.0], jnp.float32)
        out = nn.Dense(2, kernel_init=nn.initializers.zeros, bias_init=lambda *_: initial, name="out")(x)
        return out[:, 0], self.std * jnp.exp(out[:, 1])


def _trunk(features_BF, hidden):
    """Run the SiLU MLP in float32; gradients stop at its input: the head trains by decision terms only."""
    x = jax.lax.stop_gradient(features_BF.astype(jnp.float32))
    for index, width in enumerate(hidden):
        x = nn.silu(nn.Dense(width, name=f"hidden_{index}")(x))
    return x
