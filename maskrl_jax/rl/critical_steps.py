"""Which steps of a rollout to optimise (MaskFocus, arXiv 2512.18766; specs/maskfocus.md section 4).

A step counts as critical where the predicted image moves most towards the final one. Published: the gain of the
similarity between tokenizer embeddings, its mean over the group, the top K. From the official code: what V_i
covers, ties, the pairing of count and timestep (`timestep_offset` 0). K here is the number of steps, C of codes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.sampling import schedules
from maskrl_jax.sampling.routing import mask_counts

Array = jax.Array
SELECTS = ("critical", "random", "random_early", "first", "first_20", "all")
SCOPES = ("group", "batch", "sample")
TINY = 1e-20  # of a norm, squared twice


@dataclasses.dataclass(frozen=True)
class StepChoice:
    """Static settings of the choice among T steps of N tokens."""

    num_steps: int  # T
    num_tokens: int  # N
    count: int  # K; not read by `all`, which takes T - 1
    select: str = "critical"
    scope: str = "group"
    timestep_offset: int = 1  # 0: the official pairing, one step off
    timesteps: str = "countdown"  # of the rollout, whose convention the loss keeps; see `schedules.timesteps`
    first_call: bool = False  # besides these, optimise the first call, of masks only (our choice); it is step -1

    def __post_init__(self):
        if self.select not in SELECTS:
            raise ValueError(f"select {self.select!r} is not one of {', '.join(SELECTS)}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope {self.scope!r} is not one of {', '.join(SCOPES)}")
        if self.timestep_offset not in (0, 1):
            raise ValueError(f"timestep_offset {self.timestep_offset} must be 0 (as published code) or 1")
        if self.select != "all" and not 1 <= self.count <= self.candidates:
            raise ValueError(
                f"{self.count} steps of select={self.select} do not fit: {self.num_steps} sampling steps leave "
                f"{self.candidates} to choose from"
            )

    @property
    def candidates(self) -> int:
        """Steps 0, 1, ... that are chosen among."""
        early = {"critical": self.num_steps - 2, "random_early": 4 * self.num_steps // 10}
        early["first_20"] = self.num_steps // 5
        return early.get(self.select, self.num_steps - 1)

    @property
    def slots(self) -> int:
        """Steps that are optimised of every sample: K, and the first call where it is asked for."""
        return (self.num_steps - 1 if self.select == "all" else self.count) + self.first_call


def similarity(codebook_CD: Array, predictions_TBN: Array, final_BN: Array) -> Array:
    """Cosine S_i of the embeddings of every prediction but the last and of the final tokens, float32 [B, T-1].

    Embeddings of an image are its codebook rows, flattened, not centred. One step at a time: those of all steps
    would be T times as large.
    """
    book = codebook_CD.astype(jnp.float32)
    square_C = (book**2).sum(-1)
    final_BND = book[final_BN]
    final_B = square_C[final_BN].sum(-1)

    def one(ids_BN):
        ids_BN = ids_BN.astype(jnp.int32)
        dot_B = (book[ids_BN] * final_BND).sum((-1, -2))
        return dot_B / jnp.sqrt(jnp.maximum(square_C[ids_BN].sum(-1) * final_B, TINY))

    return jax.lax.map(one, predictions_TBN[:-1]).T


def scoped_mean(similarity_BS: Array, scope: str, group: int) -> Array:
    """Mean of S over the scope of every sample, float32 [B, T-1]; groups are neighbours, B = P * G."""
    size = {"group": group, "batch": len(similarity_BS), "sample": 1}[scope]
    rows = similarity_BS.reshape(-1, size, similarity_BS.shape[-1])
    return jnp.broadcast_to(rows.mean(1, keepdims=True), rows.shape).reshape(similarity_BS.shape)


def information_gain(similarity_BS: Array) -> Array:
    """V_i = |S_{i+1} - S_i|, float32 [B, T-2]. Of S averaged over the scope: the mean comes before the modulus."""
    return jnp.abs(jnp.diff(similarity_BS, axis=-1))


def choose(choice: StepChoice, keys_B: Array, similarity_BS: Array, group: int) -> Array:
    """Steps to optimise of every sample, rising, int32 [B, slots].

    Args:
      choice: the settings.
      keys_B: typed keys [B], equal within what shall share its steps; read by the random choices alone.
      similarity_BS: S of every sample, float32 [B, T-1]; read by `critical` alone.
      group: G.
    """
    batch, slots = len(keys_B), choice.slots - choice.first_call
    if choice.select == "critical":
        gain = information_gain(scoped_mean(similarity_BS, choice.scope, group))
        steps = jax.lax.top_k(gain, slots)[1]  # of equal gains the earlier
    elif choice.select in ("random", "random_early"):
        noise = jax.vmap(lambda key: jax.random.uniform(key, (choice.candidates,)))(keys_B)
        steps = jax.lax.top_k(noise, slots)[1]
    else:
        steps = np.arange(slots)
        if choice.select == "first_20":
            steps = np.round(steps * (choice.candidates - 1) / max(slots - 1, 1))
        steps = jnp.broadcast_to(jnp.asarray(steps, jnp.int32), (batch, slots))
    steps = jnp.sort(steps, axis=-1).astype(jnp.int32)
    return jnp.pad(steps, ((0, 0), (int(choice.first_call), 0)), constant_values=-1)


def count_and_timestep(choice: StepChoice, steps: Array) -> tuple[Array, Array]:
    """Masked tokens n_{i+1} and timestep of call i + offset for chosen steps i, of the same shape; counts int32.

    V_i is produced by the call after step i, whose input has n_{i+1} masked tokens: the offset 1. The official code
    pairs that count with the timestep of call i. Step -1 is the first call: all masked, the first timestep.
    """
    counts = jnp.asarray(mask_counts(choice.num_tokens, choice.num_steps))
    whole = choice.num_steps
    timestep = jnp.asarray(schedules.timesteps(choice.timesteps, np.arange(whole), whole, whole))
    return counts[steps + 1], timestep[jnp.maximum(steps + choice.timestep_offset, 0)]
