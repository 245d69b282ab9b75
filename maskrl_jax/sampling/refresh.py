"""Which steps of a shortcut's sampling run the full model: even sets, sets of least expected error, and drift."""

from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

Array = jax.Array
NEVER = np.float32(np.inf)


class Refresh(flax.struct.PyTreeNode):
    """When the full model runs; leaves are traced, so another budget compiles nothing.

    A step is full where the table says so, and besides, while fewer than `budget` steps were full, where the drift
    since the last full step exceeds `threshold` or `longest` shortcut steps have followed it.
    """

    full: Array  # bool [S]
    threshold: Array  # float32 []
    longest: Array  # int32 []
    budget: Array  # int32 []
    by_drift: bool = flax.struct.field(pytree_node=False)  # whether the drift is asked for at all: it costs time


def scheduled(steps: Sequence[int], max_steps: int) -> Refresh:
    """Full at the given steps alone, 0 among them, tables padded to `max_steps`; ValueError without step 0."""
    if 0 not in steps:
        raise ValueError(f"full steps {tuple(steps)} must hold step 0: there is no feature before it")
    full = np.zeros(max_steps, bool)
    full[list(steps)] = True
    return Refresh(full, NEVER, np.int32(max_steps), np.int32(0), by_drift=False)


def adaptive(threshold: float, longest: int, budget: int, max_steps: int) -> Refresh:
    """Full at step 0 and where the drift asks for it (specs/shortcut.md, extension 4; our choice).

    Raises ValueError for a bound that would never let a shortcut step run, or never a full one.
    """
    if threshold < 0 or longest < 1 or budget < 1:
        raise ValueError(
            f"adaptive refresh: threshold {threshold}, longest {longest} and budget {budget} must be at least 0, 1 and 1"
        )
    return scheduled([0], max_steps).replace(
        threshold=np.float32(threshold), longest=np.int32(longest), budget=np.int32(budget), by_drift=True
    )


def even_steps(num_steps: int, budget: int) -> tuple[int, ...]:
    """The official set F(N, B): step 0 and max(previous + 1, round(N k / B)), half to even (specs/shortcut.md 1).

    B = 1 is our addition.
    """
    _check(num_steps, budget)
    steps = [0]
    for k in range(1, budget):
        steps.append(max(steps[-1] + 1, round(num_steps * (k / budget))))
    return tuple(steps)


def calibrated_steps(error_AK: np.ndarray, counts_S: np.ndarray, budget: int) -> tuple[int, ...]:
    """The set F of `budget` steps, 0 among them, of least expected error (extension 3; our choice).

    Args:
      error_AK: float [S, S]; entry (a, k): error after k open-loop steps from a full step at a, k >= 1, as the mean
        guided-logit KL on masked positions; what no step or no sample reaches is not read or counts as 0.
      counts_S: int [S], tokens committed at each step, which weigh its error.
      budget: |F|.
    A segment from a to the next full step b costs sum_k counts[a + k] * error[a, k] for k < b - a; the least total
    is found by dynamic programming over (last full step, number of full steps). Ties go to the earlier step.
    """
    num_steps = len(counts_S)
    _check(num_steps, budget)
    error_AK, cost = np.nan_to_num(error_AK), np.zeros((num_steps, num_steps + 1))
    for start in range(num_steps):
        open_loop = [counts_S[start + k] * error_AK[start, k] for k in range(1, num_steps - start)]
        cost[start, start + 1 :] = np.concatenate([[0.0], np.cumsum(open_loop)])
    # least[b, a]: of the best set of b full steps whose last is a, over the steps before a.
    least = np.full((budget + 1, num_steps), np.inf)
    before = np.zeros((budget + 1, num_steps), int)
    least[1, 0] = 0.0
    for count in range(2, budget + 1):
        for step in range(1, num_steps):
            through = least[count - 1, :step] + cost[:step, step]
            before[count, step] = int(np.argmin(through))
            least[count, step] = through.min()
    last = int(np.argmin(least[budget] + cost[:, num_steps]))
    steps = [last]
    for count in range(budget, 1, -1):
        steps.append(int(before[count, steps[-1]]))
    return tuple(reversed(steps))


def _check(num_steps: int, budget: int) -> None:
    if not 1 <= budget <= num_steps:
        raise ValueError(f"{budget} full steps must lie in 1..{num_steps}, the number of steps")
