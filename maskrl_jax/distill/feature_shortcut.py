"""Train a feature shortcut on its teacher's own rollouts: the loss, and the updates that one buffer gives.

specs/shortcut.md sections 1, 4 and 5. Axes: B samples, S steps, b pairs of a minibatch, T positions, D width, N tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from maskrl_jax.sampling.maskgit import Rollout
from maskrl_jax.sampling.shortcut import Controls, step_pairs

Array = jax.Array
POSITIONS = ("masked", "all")


class Buffer(flax.struct.PyTreeNode):
    """Teacher rollouts from empty grids."""

    features: Array  # float32 [B, branches, S, T, D], of every step
    ids: Array  # int32 [B, N]
    commit_step: Array  # uint8 [B, N]

    def rollout(self) -> Rollout:
        """The tokens alone."""
        return Rollout(self.ids, self.commit_step, jnp.zeros(len(self.ids), jnp.int32))


@dataclasses.dataclass(frozen=True)
class ShortcutLoss:
    """What is minimised.

    positions: `masked`: those still masked at the step that is predicted, as published for MaskGIT; `all`, as for
      Lumina-DiMOO.
    kl: weight of T^2 KL(softmax(Head(f) / T) || softmax(Head(fhat) / T)) over image codes; 0 in the release.
    chain: K steps in a row on the teacher's tokens, each with weight 1 / K (extension 1, our choice); 1 as published.
    through: whether gradients run through the chain, or stop between its steps.
    """

    positions: str = "masked"
    kl: float = 0.0
    kl_temperature: float = 1.0
    chain: int = 1
    through: bool = True

    def __post_init__(self):
        if self.positions not in POSITIONS:
            raise ValueError(f"loss.positions {self.positions!r} is not one of {', '.join(POSITIONS)}")
        if self.chain < 1:
            raise ValueError(f"loss.chain {self.chain} must be at least 1")
        if self.kl < 0 or self.kl_temperature <= 0:
            raise ValueError(f"loss.kl {self.kl} must be at least 0 and kl_temperature {self.kl_temperature} above 0")


@dataclasses.dataclass(frozen=True)
class Student:
    """The network that is trained, with what it takes from its base.

    Attributes:
      advance: (params, features [b,T,D], Controls, masked share [b]) -> the next step's features [b,T,D].
      head: features [..., D] at image positions first -> logits [..., N, K] of image codes.
      num_tokens: N.
      most: places for controls.
    """

    advance: Callable[[Any, Array, Controls, Array], Array]
    head: Callable[[Array], Array]
    num_tokens: int
    most: int


def pair_slots(keys_B: Array, pairs: int, count: int, epochs: int) -> Array:
    """Deal the pairs of a buffer into minibatches: slots int32 [M, B, pairs] for `branch_and_step`.

    Every sample shuffles its own branches x (S - 1) = `count` pairs and gives `pairs` to each minibatch, so that the
    minibatches do not depend on how samples are spread over devices (our choice). With fewer steps than the buffer
    holds, some pairs come twice. What is left over of an epoch is dropped.
    """
    batches = count // pairs
    shuffled = [
        jax.vmap(lambda key, e=e: jax.random.permutation(jax.random.fold_in(key, e), count))(keys_B)
        for e in range(epochs)
    ]
    slots = jnp.concatenate([x[:, : batches * pairs].reshape(-1, batches, pairs) for x in shuffled], axis=1)
    return jnp.swapaxes(slots, 0, 1)


def branch_and_step(slots: Array, branches: int, num_steps: Array) -> tuple[Array, Array]:
    """Which branch a slot stands for, and from which step s it leads to s + 1 <= T - 1."""
    return slots % branches, (slots // branches) % jnp.maximum(num_steps - 1, 1)


def loss(
    settings: ShortcutLoss, student: Student, params: Any, buffer: Buffer, branch: Array, step: Array, num_steps: Array
) -> tuple[Array, dict]:
    """Sum over pairs of the loss, and {name: (sum, weight)}; branch and step int32 [B, pairs].

    Per pair: squared error of the predicted feature, mean over its positions and width. `frozen` is the same error of
    the feature left as it was: what the network has to beat.
    """
    rows, pairs = step.shape
    step_b, branch_b = step.reshape(-1), branch.reshape(-1)
    sample_b = jnp.repeat(jnp.arange(rows), pairs)
    rollout = jax.tree.map(lambda x: x[sample_b], buffer.rollout())

    def known(at_b):
        return buffer.features[sample_b, branch_b, jnp.minimum(at_b, num_steps - 1)]

    features = start = known(step_b)
    total, frozen, divergence = jnp.float32(0), jnp.float32(0), jnp.float32(0)
    for k in range(settings.chain):
        exists_b = step_b + k + 1 < num_steps
        masked_bN, controls, share_b = step_pairs(rollout, step_b + k, student.most)
        features = features if settings.through or k == 0 else jax.lax.stop_gradient(features)
        features = student.advance(params, features, controls, share_b)
        wanted = known(step_b + k + 1)
        weight_bT = _positions(settings, masked_bN, features.shape[1]) * exists_b[:, None]
        per_pair = _mean((jnp.square(features - wanted)).mean(-1), weight_bT)
        total += per_pair.sum() / settings.chain
        if k == 0:
            frozen = _mean(jnp.square(start - wanted).mean(-1), weight_bT).sum()
            first = per_pair.sum()
        if settings.kl:
            parts = (student.head(x) / settings.kl_temperature for x in (wanted, features))
            teacher, own = (jax.nn.log_softmax(logits) for logits in parts)
            each_bN = (jnp.exp(teacher) * (teacher - own)).sum(-1) * settings.kl_temperature**2
            divergence += _mean(each_bN, weight_bT[:, : student.num_tokens]).sum() / settings.chain
    count = jnp.float32(len(step_b))
    metrics = {"loss": (total + settings.kl * divergence, count), "mse": (first, count), "mse_frozen": (frozen, count)}
    if settings.kl:
        metrics["kl"] = (divergence, count)
    return total + settings.kl * divergence, metrics


def _positions(settings: ShortcutLoss, masked_bN: Array, length: int) -> Array:
    """Weights float32 [b, T] of the positions that count."""
    if settings.positions == "all":
        return jnp.ones((len(masked_bN), length))
    return jnp.pad(masked_bN.astype(jnp.float32), ((0, 0), (0, length - masked_bN.shape[1])))


def _mean(values: Array, weights: Array) -> Array:
    """Weighted mean of each row; 0 where no weight is."""
    return (values * weights).sum(-1) / jnp.maximum(weights.sum(-1), 1.0)


def open_loop(
    student: Student, params: Any, buffer: Buffer, guidance_S: Array, num_steps: Array, frozen: bool = False
) -> dict[str, Array]:
    """How far a feature has drifted k steps after the last full one, on the teacher's tokens.

    Args:
      guidance_S: float32 [S], scale at each step (1 with one branch).
      frozen: leave the feature as it was instead of moving it.
    Returns:
      name -> [S, S] at (a, k), from a full step at a and after k steps, at the positions masked at step a + k: `mse`,
      `cosine` (mean over branches), `kl` (of the guided logits, nats, teacher || student); 0 where a + k >= T.
      Sums over samples; divide by their number.
    """
    batch, branches, steps = buffer.features.shape[:3]
    rollout = jax.tree.map(lambda x: jnp.tile(x, (branches, *[1] * (x.ndim - 1))), buffer.rollout())
    teacher_SbTD = jnp.moveaxis(jnp.swapaxes(buffer.features, 0, 1), 2, 0).reshape(
        steps, branches * batch, *buffer.features.shape[3:]
    )

    def logp(features, step):
        logits = jnp.split(student.head(features), branches)
        mixed = logits[0] if branches == 1 else logits[1] + guidance_S[step] * (logits[0] - logits[1])
        return jax.nn.log_softmax(mixed)

    def after(start):
        def move(features, k):
            step = jnp.minimum(start + k, steps - 1)
            before_b = jnp.full((branches * batch,), step - 1)
            masked_bN, controls, share_b = step_pairs(rollout, before_b, student.most)
            if not frozen:
                features = student.advance(params, features, controls, share_b)
            wanted = teacher_SbTD[step]
            exists = (start + k < num_steps).astype(jnp.float32)
            both = (features[:, : student.num_tokens], wanted[:, : student.num_tokens])
            square = _mean(jnp.square(both[0] - both[1]).mean(-1), masked_bN)
            length = jnp.linalg.norm(both[0], axis=-1) * jnp.linalg.norm(both[1], axis=-1)
            cosine = _mean((both[0] * both[1]).sum(-1) / jnp.maximum(length, 1e-9), masked_bN)
            teacher, own = logp(wanted, step), logp(features, step)
            kl = _mean((jnp.exp(teacher) * (teacher - own)).sum(-1), masked_bN[:batch])
            sums = {"mse": square.sum() / branches, "cosine": cosine.sum() / branches, "kl": kl.sum()}
            return features, {name: value * exists for name, value in sums.items()}

        _, errors = jax.lax.scan(move, teacher_SbTD[start], jnp.arange(1, steps))
        return {name: jnp.concatenate([jnp.zeros(1), value]) for name, value in errors.items()}

    return jax.lax.map(after, jnp.arange(steps))
