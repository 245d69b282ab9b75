"""The learned judge as a reward: how well an image shows its caption (our choice; differentiable)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.data import captions

Array = jax.Array
WITHOUT_GRADIENT = ("compositional",)  # a thing is detected or it is not
WHOLE_SCALE = 8.0  # nats of "looks torn", summed over cells, that cost a factor e


def targets(kind: str, cond: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """What an image must show, as numbers: class ids int32 [B], or int32 [B,3] from captions.

    The columns of a caption are first object, second object (0 = none; else 1 + 4 shape + colour) and
    relation (index into `captions.RELATIONS`).
    """
    if kind == "class":
        return np.asarray(cond, np.int32)
    rows = []
    for prompt in prompts:
        caption = captions.parse(prompt)
        kinds = [1 + len(captions.COLOURS) * t.shape + t.colour for t in caption.things]
        rows.append([kinds[0], kinds[1] if len(kinds) > 1 else 0, caption.relation or 0])
    return np.asarray(rows, np.int32)


def score(kind: str, outputs: dict[str, Array], target: Array) -> dict[str, Array]:
    """Score images from the judge's outputs: {"judge": [B] in [0,1], ...parts}, float32.

    class: the probability of the class. cells: the mean of presence, relation and both at once, times how whole
    the picture looks, times 1 - |objects too many or too few|. Nothing makes up for an object too many or a torn
    one: a mean in which they only cost their share is hacked by doubling objects until the relation holds
    (measured). The mean of the rest keeps groups from having no spread. Beside it two of its parts, and
    `compositional`, whether all is right.
    """
    if kind == "class":
        chance = jax.nn.softmax(outputs["class"])
        return {"judge": jnp.take_along_axis(chance, target[:, None], axis=-1)[:, 0]}
    chance = jax.nn.softmax(outputs["cells"])  # [B,S,S,1+kinds]
    first, second, relation = target[:, 0], target[:, 1], target[:, 2]
    pair = second > 0
    wanted = 1.0 + pair
    found = chance[..., 1:].sum((1, 2, 3))
    exact = jnp.clip(1 - jnp.abs(found - wanted), 0, 1)
    map_a, map_b = _map_of(chance, first), _map_of(chance, second)
    there_a, there_b = 1 - (1 - map_a).prod((1, 2)), jnp.where(pair, 1 - (1 - map_b).prod((1, 2)), 1.0)
    presence = jnp.where(pair, (there_a + there_b) / 2, there_a)
    holds = jnp.where(pair, _relation(map_a, map_b, relation), there_a)
    whole = jnp.exp(jax.nn.log_sigmoid(-outputs["mixed"]).sum((1, 2)) / WHOLE_SCALE)
    shown = (presence + holds + there_a * there_b * holds) / 3
    correct = _correct(outputs["cells"], first, second, relation)
    return {"judge": whole * exact * shown, "judge_shown": shown, "judge_whole": whole, "compositional": correct}


def _correct(cells: Array, first: Array, second: Array, relation: Array) -> Array:
    """Whether exactly the caption's objects are detected, and as it relates them; 0 or 1, [B].

    The reward of GenEval (arXiv 2310.11513) with the judge as detector: a cell shows what is likeliest there.
    """
    seen = jax.nn.one_hot(cells.argmax(-1), cells.shape[-1])  # [B,S,S,1+kinds]
    pair = second > 0
    found = seen[..., 1:].sum((1, 2, 3))
    map_a, map_b = _map_of(seen, first), _map_of(seen, second)
    holds = _relation(map_a, map_b, relation) > 0
    both = map_a.any((1, 2)) & map_b.any((1, 2)) & holds & (found == 2)
    return jnp.where(pair, both, map_a.any((1, 2)) & (found == 1)).astype(jnp.float32)


def _map_of(chance: Array, kind: Array) -> Array:
    """Probability map [B,S,S] of each sample's own kind."""
    return jnp.take_along_axis(chance, kind[:, None, None, None], axis=-1)[..., 0]


def _relation(map_a: Array, map_b: Array, relation: Array) -> Array:
    """Expected number of pairs of cells for which the relation holds, at most 1, [B]."""
    batch, side = map_a.shape[:2]
    table = jnp.asarray(_relation_table(side))[relation]  # [B, S*S, S*S]
    pairs = jnp.einsum("bi,bij,bj->b", map_a.reshape(batch, -1), table, map_b.reshape(batch, -1))
    return jnp.clip(pairs, 0, 1)


@functools.lru_cache(maxsize=4)
def _relation_table(side: int) -> np.ndarray:
    """For every relation, whether it holds from cell i to cell j: float32 [4, S*S, S*S]."""
    rows, cols = np.divmod(np.arange(side * side), side)
    down, right = rows[None] - rows[:, None], cols[None] - cols[:, None]
    tables = []
    for step_row, step_col in captions.RELATION_STEPS:
        along = down * step_row + right * step_col
        across = np.abs(down * step_col + right * step_row)
        tables.append((along > 0) & (along > across))
    return np.stack(tables).astype(np.float32)


def names(kind: str) -> tuple[str, ...]:
    """Scores that a judge of this kind gives."""
    return ("judge",) if kind == "class" else ("judge", "judge_shown", "judge_whole", "compositional")
