"""Token terms of the policy loss for a micro-batch of network calls (specs/speed_rl.md sections 5.2-5.4)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maskrl_jax.rl import kl, step_likelihood, surrogate
from maskrl_jax.sampling import draws

Array = jax.Array
DISTRIBUTIONS = ("guided_sg", "guided_full", "cond")
KLS = ("forward", "reverse", "k3")


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """Static settings of the token terms."""

    likelihood: str = "transition"
    distribution: str = "guided_sg"  # guided_sg: no gradient through the unconditional branch
    kl: str = "forward"
    clip_low: float = 0.1
    clip_high: float = 0.2
    clipped: bool = True  # False: the plain ratio times the advantage
    temperature: float = 1.0
    guided: bool = True
    chunk: int = 512  # positions whose [chunk, K] arrays exist at a time on a device

    @property
    def reads_draws(self) -> bool:
        """Whether the terms of a position that was masked again read what had been drawn there."""
        return self.likelihood == "all" or self.kl == "k3"

    def __post_init__(self):
        for name, value, allowed in (
            ("likelihood", self.likelihood, step_likelihood.KINDS),
            ("distribution", self.distribution, DISTRIBUTIONS),
            ("kl", self.kl, KLS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            raise ValueError(f"clip_low {self.clip_low} must lie in [0, 1), clip_high {self.clip_high} be at least 0")
        if self.chunk < 1:
            raise ValueError(f"chunk {self.chunk} must be at least 1")


class Calls(NamedTuple):
    """A micro-batch of M network calls, rebuilt from records."""

    inputs: Array  # int32 [M,N], what the network saw
    timestep: Array  # int32 [M]
    cond: Any  # [M, ...]
    ids: Array  # int32 [M,N], what was drawn
    committed: Array  # bool [M,N]
    remasked: Array  # bool [M,N]
    z_star: Array  # float32 [M]
    tau: Array  # float32 [M]
    scale: Array  # float32 [M], guidance
    advantage: Array  # float32 [M]
    token_weight: Array  # float32 [M,N]
    kl_weight: Array  # float32 [M,N], of the mean that is logged
    penalty_weight: Array  # float32 [M,N], the same in the loss


def masked_images(ids_MN, masked_MN, mask_id: int, timestep_M, cond, advantage_M, token_weight, kl_weight) -> Calls:
    """Calls on images of which some tokens are masked anew, scored there on the conditional branch as it is."""
    zero_M = jnp.zeros(timestep_M.shape)
    return Calls(
        inputs=jnp.where(masked_MN, mask_id, ids_MN),
        timestep=timestep_M,
        cond=cond,
        ids=ids_MN,
        committed=masked_MN,
        remasked=jnp.zeros(masked_MN.shape, bool),
        z_star=zero_M,
        tau=zero_M,
        scale=zero_M + 1,
        advantage=advantage_M,
        token_weight=token_weight,
        kl_weight=kl_weight,
        penalty_weight=kl_weight,
    )


class Model(NamedTuple):
    """The network, split so that the head runs inside a rematerialised chunk."""

    features: Callable[[Any], Callable]  # params -> (ids, timestep, cond) -> [M,N,D]
    head: Callable[[Any], Callable]  # params -> [..., D] -> [..., K]
    null: Any  # null condition of one sample


class Sums(NamedTuple):
    """Sums over all positions; pairs are (sum, weight)."""

    token: Array
    penalty: Array  # KL as the loss weighs it
    kl: Array
    clip: tuple[Array, Array]
    moved: tuple[Array, Array]  # approximate KL from the behaviour
    entropy: tuple[Array, Array]


def token_terms(loss: TokenLoss, model: Model, params: Any, old: Any, reference: Any, calls: Calls, axis: Any):
    """Return (Sums, largest |ratio - 1|, log pi(y) of every position [M,N]).

    `old` holds the behaviour parameters, or None where they are the current ones (one update a rollout):
    then the ratio is exactly 1. `reference` None leaves the KL out, and its forward. Log-probabilities and ratios
    are float32. `axis.size` divides M.
    """
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape).astype(c.dtype), model.null, calls.cond)
    guided = loss.guided and loss.distribution != "cond"

    def features(p):
        conditional = model.features(p)(calls.inputs, calls.timestep, calls.cond)
        if not guided:
            return {"c": conditional}
        frozen = p if loss.distribution == "guided_full" else jax.lax.stop_gradient(p)
        return {"c": conditional, "u": model.features(frozen)(calls.inputs, calls.timestep, null)}

    per_row = {"z_star": calls.z_star, "tau": calls.tau, "scale": calls.scale, "advantage": calls.advantage}
    positions = {
        "new": features(params),
        "old": None if old is None else features(old),
        "reference": None if reference is None else model.features(reference)(calls.inputs, calls.timestep, calls.cond),
        "ids": calls.ids,
        "committed": calls.committed,
        "remasked": calls.remasked,
        "token_weight": calls.token_weight,
        "kl_weight": calls.kl_weight,
        "penalty_weight": calls.penalty_weight,
        **{name: jnp.broadcast_to(row[:, None], calls.ids.shape) for name, row in per_row.items()},
    }
    shape = calls.ids.shape
    chunk = min(loss.chunk, calls.ids.size // axis.size)
    sums, error, drawn = jax.lax.map(
        jax.checkpoint(lambda x: _chunk(loss, model, guided, params, old, reference, axis.split(x))),
        jax.tree.map(lambda x: _chunked(x, chunk, axis), positions),
    )
    # [chunks, shards * chunk] -> [M, N]
    drawn = drawn.reshape(len(drawn), axis.size, -1).swapaxes(0, 1).reshape(axis.size, -1)
    drawn = drawn[:, : calls.ids.size // axis.size].reshape(shape)
    return jax.tree.map(lambda x: x.sum(0), sums), error.max(), drawn


def _chunked(x: Array, chunk: int, axis: Any) -> Array:
    """[M, N, ...] -> [chunks, shards * chunk, ...], filled up with zeros, whose weights are zero too.

    A chunk holds positions of every shard: were the chunks themselves spread over the devices, each device would
    have to compute all of them.
    """
    x = axis.split(x.reshape(axis.size, -1, *x.shape[2:]))
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *[(0, 0)] * (x.ndim - 2)))
    x = x.reshape(axis.size, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(len(x), axis.size * chunk, *x.shape[3:])


def _chunk(loss, model, guided, params, old, reference, x):
    """Terms of one chunk of positions; everything of size [chunk, K] lives and dies here."""
    logp_cond, logp = _log_probs(loss, model, guided, params, x["new"], x["scale"])
    if old is None:
        logp_old = jax.lax.stop_gradient(logp)
    else:
        logp_old = jax.lax.stop_gradient(_log_probs(loss, model, guided, old, x["old"], x["scale"])[1])
    new, before, scored = step_likelihood.position_likelihood(
        loss.likelihood, logp, logp_old, x["ids"], x["committed"], x["remasked"], x["z_star"], x["tau"]
    )
    weight = scored * x["token_weight"]
    bounds = {"low": loss.clip_low, "high": loss.clip_high} if loss.clipped else {"low": 1.0, "high": jnp.inf}
    token = surrogate.clipped_surrogate(new, before, x["advantage"], weight, **bounds)
    clip = surrogate.clip_fraction(new, before, x["advantage"], weight, **bounds)
    divergence = jnp.zeros(weight.shape)
    if reference is not None:
        logp_ref = jax.nn.log_softmax(model.head(reference)(x["reference"]))
        divergence = _divergence(loss, logp_cond, logp_ref, x["ids"])
    masked = (x["committed"] | x["remasked"]).astype(jnp.float32) * (x["kl_weight"] > 0)
    entropy = jax.lax.stop_gradient((draws.entropy(logp) * masked).sum())
    drawn = jnp.take_along_axis(logp, jnp.minimum(x["ids"], logp.shape[-1] - 1)[:, None], axis=-1)[:, 0]
    penalty, mean = ((divergence * x[name]).sum() for name in ("penalty_weight", "kl_weight"))
    moved = jax.lax.stop_gradient(surrogate.approximate_kl(new, before, weight))
    sums = Sums(token, penalty, jax.lax.stop_gradient(mean), clip, moved, (entropy, masked.sum()))
    return sums, surrogate.ratio_error(new, before, weight), jax.lax.stop_gradient(drawn)


def _log_probs(loss, model, guided, params, features, scale):
    """Log-probabilities of the conditional branch and of what tokens are drawn from, [chunk, K] each."""
    conditional = model.head(params)(features["c"])
    logits = conditional
    if guided:
        frozen = params if loss.distribution == "guided_full" else jax.lax.stop_gradient(params)
        unconditional = model.head(frozen)(features["u"])
        logits = unconditional + scale[:, None] * (conditional - unconditional)
    return jax.nn.log_softmax(conditional), jax.nn.log_softmax(logits / loss.temperature)


def _divergence(loss, logp, logp_ref, ids):
    if loss.kl == "k3":
        return kl.k3(logp, logp_ref, jnp.minimum(ids, logp.shape[-1] - 1))
    return {"forward": kl.forward_kl, "reverse": kl.reverse_kl}[loss.kl](logp, logp_ref)
