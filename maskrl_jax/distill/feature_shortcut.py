"""Train a feature shortcut on its teacher's own rollouts: the loss, and the updates that one buffer gives.

specs/shortcut.md sections 1, 4 and 5. Axes: B samples, S steps, b pairs of a minibatch, T positions, D width, N tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.sampling.draws import mixed, with_null
from maskrl_jax.sampling.maskgit import Rollout
from maskrl_jax.sampling.shortcut import Controls, tiled
from maskrl_jax.sampling.shortcut_teacher import step_pairs

Array = jax.Array
POSITIONS = ("masked", "all")


class Buffer(flax.struct.PyTreeNode):
    """Teacher rollouts from empty grids."""

    features: Array  # float32 [B, branches, S, T, D], of every step
    cond: Any  # [B, ...]
    ids: Array  # int32 [B, N]
    commit_step: Array  # uint8 [B, N]

    def rollout(self) -> Rollout:
        """The tokens alone."""
        return Rollout(self.ids, self.commit_step, jnp.zeros(len(self.ids), jnp.int32))

    def lengths(self) -> Array:
        """Steps that each sample took, int32 [B]: fewer than the plan's where a mode commits more than its counts."""
        return self.commit_step.astype(jnp.int32).max(-1) + 1


@dataclasses.dataclass(frozen=True)
class ShortcutLoss:
    """What is minimised.

    positions: `masked`: those still masked at the step that is predicted, as published for MaskGIT; `all`, as for
      Lumina-DiMOO.
    kl: weight of T^2 KL(softmax(Head(f) / T) || softmax(Head(fhat) / T)) over image codes; 0 in the release.
    chain: K steps in a row on the teacher's tokens, each with weight 1 / K (extension 1, our choice); 1 as published.
      Steps beyond the end of a rollout count as 0.
    through: whether gradients run through the chain, or stop between its steps.
    student_tokens: from the second step on a chain runs over tokens drawn from its own features with the sampler's
      guidance, and its targets are a new pass of the teacher (our variant of an official option, which draws without
      guidance); both branches of a pair are then moved together.
    """

    positions: str = "masked"
    kl: float = 0.0
    kl_temperature: float = 1.0
    chain: int = 1
    through: bool = True
    student_tokens: bool = False

    def __post_init__(self):
        if self.positions not in POSITIONS:
            raise ValueError(f"loss.positions {self.positions!r} is not one of {', '.join(POSITIONS)}")
        if self.chain < 1:
            raise ValueError(f"loss.chain {self.chain} must be at least 1")
        if self.student_tokens and self.chain < 2:
            raise ValueError("loss.student_tokens needs a loss.chain of at least 2: the first step has the teacher's")
        if self.kl < 0 or self.kl_temperature <= 0:
            raise ValueError(f"loss.kl {self.kl} must be at least 0 and kl_temperature {self.kl_temperature} above 0")


@dataclasses.dataclass(frozen=True)
class Student:
    """The network that is trained, with what it takes from its base.

    Attributes:
      advance: (params, features [b,T,D], Controls, masked share [b], cond [b, ...]) -> the next step's features.
      head: features [..., D] at image positions first -> logits [..., N, K] of image codes.
      null: condition of one sample of the unconditional branch.
      num_tokens: N.
      most: places for controls.
      redraw: (keys [b], cond [b, ...], Rollout, step [b], features [branches * b,T,D]) -> the rollout with that step
        drawn anew and the teacher's features at the next; for `student_tokens` alone.
    """

    advance: Callable[[Any, Array, Controls, Array, Any], Array]
    head: Callable[[Array], Array]
    null: Any
    num_tokens: int
    most: int
    redraw: Callable[[Array, Array, Rollout, Array, Array], tuple[Rollout, Array]] | None = None


def pair_slots(keys_B: Array, pairs: int, count: int, epochs: int) -> Array:
    """Deal the pairs of a buffer into minibatches: slots int32 [M, B, pairs] for `branch_and_step`.

    Every sample shuffles its own branches x (S - 1) = `count` pairs and gives `pairs` to each minibatch, so that the
    minibatches do not depend on how samples are spread over devices (our choice). What is left over of an epoch is
    dropped.
    """
    batches = count // pairs
    shuffled = [
        jax.vmap(lambda key, e=e: jax.random.permutation(jax.random.fold_in(key, e), count))(keys_B)
        for e in range(epochs)
    ]
    slots = jnp.concatenate([x[:, : batches * pairs].reshape(-1, batches, pairs) for x in shuffled], axis=1)
    return jnp.swapaxes(slots, 0, 1)


def branch_and_step(slots: Array, branches: int, lengths: Array, longest: int) -> tuple[Array, Array]:
    """Which branch a slot [B, pairs] stands for, and from which step s of the sample it leads to s + 1.

    A sample of fewer steps than the `longest` has some pairs twice, spread evenly over its steps.
    """
    return slots % branches, (slots // branches) * jnp.maximum(lengths - 1, 1)[:, None] // (longest - 1)


def loss(
    settings: ShortcutLoss, student: Student, params: Any, buffer: Buffer, branch: Array, step: Array, keys_B: Array
) -> tuple[Array, dict]:
    """Sum over pairs of the loss, and {name: (sum, weight)}.

    Args:
      branch, step: int32 [B, pairs]; with `student_tokens` a pair stands for all branches and `branch` is not read.
      keys_B: keys of the samples' own tokens, read with `student_tokens` alone.

    Per pair: squared error of the predicted feature, mean over its positions and width; 0 for a sample that was done
    in one step. `mse_frozen` is the same error of the feature left as it was: what the network has to beat.
    """
    pairs, step_b = step.shape[1], step.reshape(-1)
    repeated = lambda x: jnp.repeat(x, pairs, axis=0)  # noqa: E731
    rollout, cond_b, lengths = *jax.tree.map(repeated, (buffer.rollout(), buffer.cond)), buffer.lengths()
    length_b = repeated(lengths)
    keys_b = jax.vmap(jax.random.fold_in)(repeated(keys_B), jnp.tile(jnp.arange(pairs), len(keys_B)))
    branches = buffer.features.shape[1] if settings.student_tokens else 1
    spread = lambda x: tiled(x, branches * len(x))  # noqa: E731 - to the rows that are moved

    def known(ahead):
        # Sample by sample: they lie on their devices.
        at = jnp.minimum(step + ahead, lengths[:, None] - 1)
        if settings.student_tokens:
            found = jnp.moveaxis(jax.vmap(lambda features, at: features[:, at])(buffer.features, at), 1, 0)
        else:
            found = jax.vmap(lambda features, branch, at: features[branch, at])(buffer.features, branch, at)
        return found.reshape(-1, *buffer.features.shape[3:])

    own = _of_branch(cond_b, student.null, None if settings.student_tokens else branch.reshape(-1), branches)
    # Of a chain, every step is computed again on the way back.
    advance = jax.checkpoint(student.advance) if settings.chain > 1 else student.advance
    features = start = known(0)
    errors, divergences, frozen = [], [], None
    for k in range(settings.chain):
        if settings.student_tokens and k:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_b, k)
            rollout, wanted = student.redraw(keys, cond_b, rollout, step_b + k, jax.lax.stop_gradient(features))
        else:
            wanted = known(k + 1)
        masked_bN, controls, share_b = jax.tree.map(spread, step_pairs(rollout, step_b + k, student.most))
        features = features if settings.through or k == 0 else jax.lax.stop_gradient(features)
        features = advance(params, features, controls, share_b, own)
        exists_b = spread(step_b + k + 1 < length_b).astype(jnp.float32)
        weight_bT = _positions(settings, masked_bN, features.shape[1]) * exists_b[:, None]
        errors.append(_mean(jnp.square(features - wanted).mean(-1), weight_bT).sum())
        if frozen is None:
            frozen = _mean(jnp.square(start - wanted).mean(-1), weight_bT).sum()
        if settings.kl:
            parts = (student.head(x) / settings.kl_temperature for x in (wanted, features))
            each_bN = _kl(*(jax.nn.log_softmax(logits) for logits in parts)) * settings.kl_temperature**2
            divergences.append(_mean(each_bN, weight_bT[:, : student.num_tokens]).sum())
    count = np.float32(len(features))
    metrics = {"mse": (errors[0], count), "mse_frozen": (frozen, count)}
    total = sum(errors) / settings.chain
    if settings.kl:
        divergence = sum(divergences) / settings.chain
        metrics["kl"], total = (divergence, count), total + settings.kl * divergence
    return total, metrics | {"loss": (total, count)}


def _of_branch(cond_b: Any, null: Any, branch_b: Array | None, branches: int) -> Any:
    """Conditions of rows: of the branch of each, 0 that of the condition; None: all conditional ones, then null ones."""
    if branch_b is None:
        return with_null(cond_b, null) if branches > 1 else cond_b

    def one(cond, null):
        conditional = (branch_b == 0).reshape(-1, *[1] * (cond.ndim - 1))
        return jnp.where(conditional, cond, jnp.asarray(null)[None].astype(cond.dtype))

    return jax.tree.map(one, cond_b, null)


def _kl(teacher: Array, own: Array) -> Array:
    """KL(teacher || own) of log-probabilities [..., K], nats."""
    return (jnp.exp(teacher) * (teacher - own)).sum(-1)


def _positions(settings: ShortcutLoss, masked_bN: Array, length: int) -> Array:
    """Weights float32 [b, T] of the positions that count."""
    if settings.positions == "all":
        return jnp.ones((len(masked_bN), length))
    return jnp.pad(masked_bN.astype(jnp.float32), ((0, 0), (0, length - masked_bN.shape[1])))


def _mean(values: Array, weights: Array) -> Array:
    """Weighted mean of each row; 0 where no weight is."""
    return (values * weights).sum(-1) / jnp.maximum(weights.sum(-1), 1.0)


def open_loop(
    student: Student, params: Any, buffer: Buffer, guidance_S: Array, frozen: bool = False, longest: int = 0
) -> dict[str, Array]:
    """How far a feature has drifted k steps after the last full one, on the teacher's tokens.

    Args:
      guidance_S: float32 [S], scale at each step (1 with one branch).
      frozen: leave the feature as it was instead of moving it.
      longest: most steps since a full one, static; 0 for all.
    Returns:
      name -> [S, longest + 1] or [S, S] at (a, k), from a full step at a and after k steps, at the positions masked at
      step a + k, mean over the samples that come so far (NaN where none does): `mse` and `cosine`, mean over branches,
      and `kl` of the guided logits (nats, teacher || student).
    """
    batch, branches, steps = buffer.features.shape[:3]
    longest = longest or steps - 1
    whole = (buffer.rollout(), buffer.lengths())
    rollout, length_b = jax.tree.map(lambda x: tiled(x, branches * batch), whole)
    conds = with_null(buffer.cond, student.null) if branches > 1 else buffer.cond
    # Branch by branch, as `advance` sees them.
    teacher_SbTD = jnp.transpose(buffer.features, (2, 1, 0, 3, 4)).reshape(steps, -1, *buffer.features.shape[3:])

    def logp(features, step):
        logits = student.head(features)
        return jax.nn.log_softmax(logits if branches == 1 else mixed(*jnp.split(logits, 2), guidance_S[step]))

    def after(start):
        def move(features, k):
            step = jnp.minimum(start + k, steps - 1)
            masked_bN, controls, share_b = step_pairs(rollout, jnp.full(length_b.shape, step - 1), student.most)
            if not frozen:
                features = student.advance(params, features, controls, share_b, conds).astype(features.dtype)
            wanted = teacher_SbTD[step]
            exists_b = (start + k < length_b).astype(jnp.float32)
            own, true = (x[:, : student.num_tokens] for x in (features, wanted))
            length = jnp.linalg.norm(own, axis=-1) * jnp.linalg.norm(true, axis=-1)
            found = {
                "mse": _mean(jnp.square(own - true).mean(-1), masked_bN),
                "cosine": _mean((own * true).sum(-1) / jnp.maximum(length, 1e-9), masked_bN),
                "kl": jnp.tile(_mean(_kl(logp(wanted, step), logp(features, step)), masked_bN[:batch]), branches),
            }
            count = exists_b.sum()
            return features, {name: (value_b * exists_b).sum() / count for name, value_b in found.items()}

        _, errors = jax.lax.scan(move, teacher_SbTD[start], jnp.arange(1, longest + 1))
        none = {"mse": 0.0, "cosine": 1.0, "kl": 0.0}
        return {name: jnp.concatenate([jnp.full(1, none[name]), value]) for name, value in errors.items()}

    return jax.lax.map(after, jnp.arange(steps))
