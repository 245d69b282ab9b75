"""Exact gradients on a task small enough to enumerate (speed_rl spec 9, oracles 7 and 8).

Three positions, two codes, at most three calls; tabular token logits and heads, one row per grid; ordering by
frozen confidences, tau = 0, float64. Finite differences of the enumerated expected reward must equal the mean
of reward times score: the score is the gradient of what `position_likelihood` and `stride` give.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from maskrl_jax.rl import stride
from maskrl_jax.rl.speed_reward import speed_reward
from maskrl_jax.rl.step_likelihood import position_likelihood
from maskrl_jax.sampling.clock import Clock, next_masked
from maskrl_jax.sampling.draws import frontier_commit as commit_on_frontier
from maskrl_jax.sampling.draws import threshold_commit as commit_by_threshold

MASK, CALLS = 2, 3
threshold_commit, frontier_commit = jax.jit(commit_by_threshold), jax.jit(commit_on_frontier)
GRIDS = list(itertools.product((0, 1, MASK), repeat=3))
CLOCK = Clock(num_tokens=3, ticks=6)
DIVISORS = (3, 2, 1)
JUMPS = stride.jumps(DIVISORS, CLOCK.ticks)
STILL_MASKED = {
    (tick, m): int(next_masked(CLOCK, np.int32(tick), np.int32(m))) for tick in range(7) for m in range(1, 4)
}
IDLE = {"grid": 0, "ids": (0, 0, 0), "committed": (False,) * 3, "remasked": (False,) * 3, "z_star": 0.0}
IDLE |= {"decision": 0, "previous": 0, "first": False, "decides": False, "interval": (-1.0, 1.0)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def parameters(seed=0):
    """Make generic tables: no two confidences tie."""
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.normal(size=(27, 3, 2)),
        "net": rng.normal(size=(27, 3)),
        "eta": np.array(0.7),
        "mean": rng.normal(size=27),
        "log_std": 0.3 * rng.normal(size=27),
    }


def confidences(theta):
    logits = theta["tokens"]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def masked_positions(grid):
    return [i for i in range(3) if grid[i] == MASK]


def commit(grid, draws, chosen):
    return tuple(draws[i] if i in chosen else grid[i] for i in range(3))


def record(grid, draws, chosen, z_star, **decision):
    """Write down one call; `draws` holds a code for every masked position."""
    masked = masked_positions(grid)
    return {
        **IDLE,
        "grid": GRIDS.index(grid),
        "ids": tuple(draws.get(i, 0) for i in range(3)),
        "committed": tuple(i in chosen for i in range(3)),
        "remasked": tuple(i in masked and i not in chosen for i in range(3)),
        "z_star": z_star,
        **decision,
    }


def all_draws(grid):
    masked = masked_positions(grid)
    return [dict(zip(masked, codes, strict=True)) for codes in itertools.product((0, 1), repeat=len(masked))]


def stride_rollouts(logp_old, allowed, grid=(MASK,) * 3, tick=0, calls=()):
    """Enumerate (calls, final grid); `allowed(calls)` lists the decisions open at that point."""
    masked = masked_positions(grid)
    if not masked:
        yield calls, grid
        return
    for d, draws in itertools.product(allowed(calls), all_draws(grid)):
        after = min(tick + int(JUMPS[d]), CLOCK.ticks)
        ranked = sorted(masked, key=lambda i: -logp_old[GRIDS.index(grid), i, draws[i]])
        chosen = ranked[: len(masked) - STILL_MASKED[after, len(masked)]]
        z_star = logp_old[GRIDS.index(grid), chosen[-1], draws[chosen[-1]]]
        previous = calls[-1]["decision"] if calls else 0
        made = {"decision": d, "previous": previous, "first": not calls, "decides": True}
        call = record(grid, draws, chosen, z_star, **made)
        yield from stride_rollouts(logp_old, allowed, commit(grid, draws, chosen), after, (*calls, call))


@functools.cache
def threshold_choice(logp, masked, action, call, priority):
    """Ask the library which positions an action commits, and for its log c*; by priority where one is given."""
    rule = (
        np.array([[i in masked for i in range(3)]]),
        np.log([1 / (1 + np.exp(-action))]),
        np.array([1]),  # of three positions in three calls
        np.array([call == CALLS - 1]),
    )
    if priority is None:
        committed, log_c = threshold_commit(np.array([logp]), *rule)
    else:
        committed, log_c = frontier_commit(np.array([logp]), np.array([priority]), *rule)
    return [i for i in range(3) if committed[0, i]], float(log_c[0])


def threshold_rollouts(logp_old, order, grid=(MASK,) * 3, calls=()):
    """Enumerate rollouts of the `threshold` action; between two confidences every action does the same."""
    masked = masked_positions(grid)
    if not masked:
        yield calls, grid
        return
    last = len(calls) == CALLS - 1
    table = logp_old[GRIDS.index(grid)]
    probabilities = np.exp(table[masked].ravel())
    edges = np.concatenate([[-40.0], np.sort(np.log(probabilities / (1 - probabilities))), [40.0]])
    intervals = [(-40.0, 40.0)] if last else list(itertools.pairwise(edges))
    priority = tuple(-(np.exp(table) * table).sum(-1)) if order == "uncertain" else None
    for interval, draws in itertools.product(intervals, all_draws(grid)):
        logp = tuple(float(table[i, draws.get(i, 0)]) for i in range(3))
        chosen, log_c = threshold_choice(logp, tuple(masked), float(np.mean(interval)), len(calls), priority)
        call = record(grid, draws, chosen, log_c, decides=not last, interval=interval)
        yield from threshold_rollouts(logp_old, order, commit(grid, draws, chosen), (*calls, call))


def tabulate(rollouts, reward):
    """Stack rollouts, padded to three calls, into arrays [R, 3, ...] and their rewards [R]."""
    rollouts = list(rollouts)
    padded = [[*calls, *[IDLE] * (CALLS - len(calls))] for calls, _ in rollouts]
    table = {name: np.array([[call[name] for call in row] for row in padded]) for name in IDLE}
    return table, np.array([reward(grid, len(calls)) for calls, grid in rollouts])


@functools.cache
def speed(calls):
    return float(speed_reward(calls, CALLS, 1))


@functools.cache
def mixed_reward(grid, calls):
    """Value the final grid at random and add the speed reward."""
    return np.random.default_rng(7).normal(size=8)[4 * grid[0] + 2 * grid[1] + grid[2]] + 0.7 * speed(calls)


def token_score(kind, theta, old, table):
    """Sum our per-position terms over a rollout, [R]."""
    shape = table["ids"].shape
    flat = {name: np.broadcast_to(table[name][..., None], shape).ravel() for name in ("grid", "z_star")}
    position = np.broadcast_to(np.arange(3), shape).ravel()
    new_MK, old_MK = (jax.nn.log_softmax(t["tokens"])[flat["grid"], position] for t in (theta, old))
    ids, committed, remasked = (table[name].ravel() for name in ("ids", "committed", "remasked"))
    logp, _, _ = position_likelihood(
        kind, new_MK, old_MK, ids, committed, remasked, flat["z_star"], np.zeros(ids.shape)
    )
    return logp.reshape(len(table["grid"]), -1).sum(-1)


def drawn_logp(theta, table):
    """Log-probability of all that was drawn, kept or not, [R]: the behaviour, written independently."""
    logp = jax.nn.log_softmax(theta["tokens"])[table["grid"]]
    chosen = jnp.where(table["ids"] == 1, logp[..., 1], logp[..., 0])
    return jnp.where(table["committed"] | table["remasked"], chosen, 0.0).sum((1, 2))


def stride_score(theta, table):
    """Sum our decision log-probs over a rollout, [R]."""
    grid, previous, first, decision, decides = (
        table[name].ravel() for name in ("grid", "previous", "first", "decision", "decides")
    )
    logits = stride.decision_logits(theta["net"][grid], previous, theta["eta"], first)
    logp = jnp.where(decides, stride.decision_logp(logits, decision), 0.0)
    return logp.reshape(-1, CALLS).sum(-1)


def interval_logp(theta, table):
    """Log-probability of the action's intervals from the normal distribution function, [R]."""
    mean, std = theta["mean"][table["grid"]], jnp.exp(theta["log_std"])[table["grid"]]
    low, high = ((table["interval"][..., side] - mean) / std for side in (0, 1))
    mass = jax.scipy.stats.norm.cdf(high) - jax.scipy.stats.norm.cdf(low)
    return jnp.where(table["decides"], jnp.log(jnp.maximum(mass, 1e-30)), 0.0).sum(-1)


def threshold_score(theta, old, table):
    """Average our log-density over the actions of the interval, under the behaviour, by quadrature; [R]."""
    node, weight = np.polynomial.legendre.leggauss(64)
    mean, std = old["mean"][table["grid"]], np.exp(old["log_std"])[table["grid"]]
    low, high = (np.clip(table["interval"][..., side], mean - 9 * std, mean + 9 * std) for side in (0, 1))
    action = (low + high)[..., None] / 2 + (high - low)[..., None] / 2 * node
    density = np.exp(-0.5 * ((action - mean[..., None]) / std[..., None]) ** 2) * weight
    share = density / np.maximum(density.sum(-1, keepdims=True), 1e-30)
    grid = np.broadcast_to(table["grid"][..., None], action.shape).ravel()
    logp = stride.threshold_logp(action.ravel(), theta["mean"][grid], jnp.exp(theta["log_std"])[grid])
    share = share * table["decides"][..., None]
    return (share * logp.reshape(action.shape)).sum((1, 2))


def finite_differences(objective, theta, step=1e-3):
    """Differentiate by the five-point central rule, error O(step^4)."""
    flat, unravel = ravel_pytree(theta)
    offsets = step * np.array([[2.0], [1.0], [-1.0], [-2.0]])[..., None] * np.eye(flat.size)[None]
    points = flat[None] + offsets.reshape(-1, flat.size)
    value = jax.lax.map(lambda p: objective(unravel(p)), points, batch_size=32).reshape(4, -1)
    return unravel((-value[0] + 8 * value[1] - 8 * value[2] + value[3]) / (12 * step))


def expected_score(probability, reward, score, theta):
    """Enumerate E[R grad score]."""
    return jax.jit(jax.grad(lambda t: (probability * reward * score(t)).sum()))(theta)


def check_gradients(table, reward, decision_logp, decision_score, unbiased):
    """Compare finite differences with E[R score] for the unbiased likelihoods, the head, and `kept`."""
    theta = jax.tree.map(jnp.asarray, parameters())

    @jax.jit
    def logp(t):
        return drawn_logp(t, table) + decision_logp(t)

    probability = jnp.exp(logp(theta))
    np.testing.assert_allclose(probability.sum(), 1.0, atol=1e-12)
    exact = jax.jit(lambda t: finite_differences(lambda u: (jnp.exp(logp(u)) * reward).sum(), t))(theta)
    head = expected_score(probability, reward, decision_score, theta)
    for name in set(theta) - {"tokens"}:
        np.testing.assert_allclose(head[name], exact[name], atol=1e-9, err_msg=name)
    for kind in unbiased:
        ours = expected_score(probability, reward, lambda t, k=kind: token_score(k, t, theta, table), theta)
        np.testing.assert_allclose(ours["tokens"], exact["tokens"], atol=1e-9, err_msg=kind)
    kept = expected_score(probability, reward, lambda t: token_score("kept", t, theta, table), theta)
    assert np.abs(kept["tokens"] - exact["tokens"]).max() > 1e-2
    return exact


def test_stride_gradients_are_exact_and_kept_is_biased():
    table, reward = tabulate(stride_rollouts(confidences(parameters()), lambda _: range(3)), mixed_reward)
    exact = check_gradients(
        table,
        reward,
        lambda t: stride_score(t, table),
        lambda t: stride_score(t, table),
        ("transition", "hard", "all"),
    )
    assert all(np.abs(exact[name]).max() > 1e-3 for name in ("tokens", "net", "eta"))


@pytest.mark.parametrize("order", ["confident", "uncertain"])
def test_threshold_gradients_are_exact_and_kept_is_biased(order):
    old = parameters()
    table, reward = tabulate(threshold_rollouts(confidences(old), order), mixed_reward)
    exact = check_gradients(
        table,
        reward,
        lambda t: interval_logp(t, table),
        lambda t: threshold_score(t, old, table),
        ("hard", "all"),
    )
    assert all(np.abs(exact[name]).max() > 1e-3 for name in ("tokens", "mean", "log_std"))


def exogenous_rollouts():
    """Draw T uniformly from {1, 2, 3}, a constant stride each; reward is speed alone."""
    theta = parameters()
    parts = [stride_rollouts(confidences(theta), lambda _, d=d: [d]) for d in range(3)]
    table, reward = tabulate(itertools.chain(*parts), lambda _, calls: speed(calls))
    return jax.tree.map(jnp.asarray, theta), table, reward


@pytest.mark.parametrize(("kind", "biased"), [("transition", False), ("all", False), ("kept", True)])
def test_speed_reward_of_exogenous_calls_has_no_gradient(kind, biased):
    theta, table, reward = exogenous_rollouts()
    probability = jnp.exp(drawn_logp(theta, table)) / 3
    mean = expected_score(probability, reward, lambda t: token_score(kind, t, theta, table), theta)["tokens"]
    assert np.abs(mean).max() > 1e-2 if biased else np.abs(mean).max() <= 1e-12


def test_speed_reward_of_exogenous_calls_moves_the_budget_surrogate():
    theta, table, reward = exogenous_rollouts()
    probability = jnp.exp(drawn_logp(theta, table)) / 3
    final = np.where(table["committed"], table["ids"], 0).sum(1)

    def surrogate(t):
        total = 0.0
        for hidden in itertools.product((False, True), repeat=3):
            grid = np.where(np.array(hidden)[None], MASK, final) @ np.array([9, 3, 1])
            one = {
                "grid": grid[:, None],
                "ids": final[:, None],
                "remasked": np.zeros_like(final[:, None], bool),
                "committed": np.broadcast_to(hidden, final[:, None].shape),
                "z_star": np.zeros((len(final), 1)),
            }
            total = total + token_score("all", t, theta, one) / 7
        return total

    assert np.abs(expected_score(probability, reward, surrogate, theta)["tokens"]).max() > 1e-2
