"""Schedules as host tables: how many tokens stay masked, in which order, with how much guidance."""

import math

import numpy as np

_SHARES = {
    "cosine": lambda r: math.cos(math.pi / 2 * r),
    "arccos": lambda r: 2 / math.pi * math.acos(r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r * r,
}
_OF_STEPS = _SHARES | {"root": lambda r: 1 - math.sqrt(r)}
# Meissonic's scheduler rounds to float32 on its way; the cosine itself is taken exactly, on every platform alike.
_FLOAT32_SHARES = {
    "float32-cosine": lambda r: np.float32(math.cos(r * np.float32(np.pi) / np.float32(2))),
    "float32-linear": lambda r: np.float32(1) - r,
}
# Shares left; the same in float32; shares of each step (`increments`); the published Halton sampler's (`halton_left`).
SCHEDULES = (*_SHARES, *_FLOAT32_SHARES, *(f"steps-{mode}" for mode in _OF_STEPS), "halton")
IDLE = ("floored-cosine",)  # schedules besides whose steps may reveal nothing: Lumina-DiMOO's (`floored_cosine`)
_PUBLISHED = ("cosine", "uniform", "pow<exponent>", "log", "exp")  # of sampler B, as `shares-<name>`
GUIDANCE_SCHEDULES = ("constant", "linear", "cosine")
TIMESTEPS = ("clock", "countdown", "mask_ratio", "const")


def masked_after(schedule: str, num_tokens: int, num_steps: int) -> np.ndarray:
    """Tokens still masked after each of T steps, int32 [T]; strictly decreasing but for IDLE, 0 at the end.

    Cumulative rule (specs/maskgit.md section 4): floor(N * gamma((s+1)/T)), at least one token is
    committed a step and at least one stays masked before the last. gamma: cosine cos(pi r/2),
    arccos 2/pi*arccos(r), linear 1-r, square 1-r^2. Cosine and Halton's arccos are published; here arccos is the
    share left, not the share of each step as in the sampler of that name in section 3. Linear, square: our choice.
    A whole N * gamma stays whole, as on the clock (specs/speed_rl.md 4.1); the official float32 loses one token
    there (cosine, r = 2/3). As published instead: `float32-cosine` and `float32-linear` are Meissonic's scheduler,
    `steps-<mode>` sampler A's increments, `halton` sampler C's counts, `floored-cosine` Lumina-DiMOO's
    (`floored_cosine`), and `shares-<method>` sampler B's float32 shares (`shares_left`), which may end with steps that
    leave one token.
    """
    if schedule not in SCHEDULES + IDLE and not schedule.startswith("shares-"):
        raise ValueError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES + IDLE)}, shares-<method>")
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(f"num_steps {num_steps} must lie in 1..{num_tokens}, the number of image tokens")
    if schedule.startswith("steps-"):
        return num_tokens - np.cumsum(
            increments(schedule.removeprefix("steps-"), num_tokens, num_steps), dtype=np.int32
        )
    if schedule == "halton":
        return halton_left(num_tokens, num_steps)
    if schedule == "floored-cosine":
        return floored_cosine(num_tokens, num_steps)
    if schedule.startswith("shares-"):
        table = shares_left(schedule.removeprefix("shares-"), num_tokens, num_steps)[:, num_tokens]
        return np.minimum(table, np.maximum(num_tokens - np.arange(1, num_steps + 1), 1)).astype(np.int32)
    masked, table = num_tokens, []
    for step in range(1, num_steps):
        # The later steps need a token each, so that T steps are always T network calls.
        masked = min(max(_left(schedule, num_tokens, step, num_steps), num_steps - step), masked - 1)
        table.append(masked)
    return np.asarray([*table, 0], np.int32)


def _left(schedule: str, num_tokens: int, step: int, num_steps: int) -> int:
    """Whole part of the share that stays masked after `step` steps."""
    if schedule in _FLOAT32_SHARES:
        share = _FLOAT32_SHARES[schedule](np.float32(step) / np.float32(num_steps))
        return math.floor(np.float32(num_tokens) * share)
    return math.floor(num_tokens * _SHARES[schedule](step / num_steps) + 1e-6)


def floored_cosine(num_tokens: int, num_steps: int) -> np.ndarray:
    """Tokens still masked after each of T steps by Lumina-DiMOO's rule, int32 [T]: max(1, floor(N cos(pi/2 (s+1)/T))), last 0.

    In float32 as published, which loses a whole N * cos (specs/lumina_dimoo.md section 4, step 5). Unlike
    `masked_after` a step may reveal nothing, where T is close to N.
    """
    progress = (np.arange(1, num_steps + 1) / num_steps).astype(np.float32)
    share = np.cos(progress * np.float32(np.pi) * np.float32(0.5))
    left = np.maximum(np.floor(np.float32(num_tokens) * share), 1).astype(np.int32)
    left[-1] = 0
    return left


def increments(mode: str, num_tokens: int, num_steps: int) -> np.ndarray:
    """Tokens that each of T steps reveals by the published sampler A, int32 [T] (specs/maskgit.md section 3).

    Weights of single steps at r = linspace(1, 0, T), not shares left as in `masked_after`: cosine cos(pi r/2), arccos
    2/pi*arccos(r), linear 1-r, square 1-r^2, root 1-sqrt(r); round half to even, at least 1, and what rounding leaves
    goes to the last step. ValueError where that step would have none left.
    """
    if mode not in _OF_STEPS:
        raise ValueError(f"schedule {mode!r} is not one of {', '.join(_OF_STEPS)}")
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1")
    if num_steps == 1:
        return np.asarray([num_tokens], np.int32)  # r is 1 there, where most weights are 0
    # float32, as published: a rounding away from one half decides some counts.
    weights = np.asarray([_OF_STEPS[mode](r) for r in np.linspace(1, 0, num_steps, dtype=np.float32)], np.float32)
    counts = np.maximum(np.round(weights / weights.sum() * num_tokens), 1).astype(np.int32)
    counts[-1] += num_tokens - counts.sum()
    if counts[-1] < 1:
        raise ValueError(f"{num_steps} steps are too many for {num_tokens} tokens by schedule {mode!r} in increments")
    return counts


def share_left(method: str, ratio: np.ndarray, total: float | np.ndarray) -> np.ndarray:
    """Share of `total` tokens that stays masked at a ratio in (0,1] of all steps, float32, clipped to [1e-6, 1].

    The published sampler B's (specs/maskgit.md section 4): cosine cos(pi r/2), uniform 1-r, pow<a> 1-r^a,
    log -log2(r)/log2(total), exp 1-2^(-log2(total)(1-r)). `ratio` and `total` broadcast. float32 as published: a
    rounding away from a whole number decides some counts.
    """
    r, bits = np.float32(ratio), np.log2(np.maximum(np.float32(total), 1))
    if method == "cosine":
        share = np.cos(r * np.float32(np.pi) * np.float32(0.5))
    elif method == "uniform":
        share = 1 - r
    elif method.startswith("pow") and _is_number(method[3:]):
        share = 1 - r ** np.float32(method[3:])
    elif method == "log":
        share = -np.log2(r) / np.maximum(bits, np.float32(1e-30))
    elif method == "exp":
        share = 1 - np.float32(2) ** (-bits * (1 - r))
    else:
        raise ValueError(f"schedule {method!r} of shares is not one of {', '.join(_PUBLISHED)}")
    return np.clip(share, np.float32(1e-6), np.float32(1))


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def shares_left(method: str, num_tokens: int, num_steps: int) -> np.ndarray:
    """Tokens that the published sampler B masks again after each of T steps, of 0..N at the start: int32 [T,N+1].

    floor(U share_left(r)) at r = (s+1)/T, at least 1 (at most what is masked less 1, which the loop sees to); 0 after
    the last step, whose tokens are all kept.
    """
    total = np.arange(num_tokens + 1, dtype=np.float32)[None]
    ratio = np.arange(1, num_steps + 1, dtype=np.float32)[:, None] / np.float32(num_steps)
    left = np.maximum(np.floor(total * share_left(method, ratio, total)), 1).astype(np.int32)
    return np.where(ratio < 1, left, 0)


def halton_left(num_tokens: int, num_steps: int) -> np.ndarray:
    """Tokens still masked after each of T steps of the published sampler C, int32 [T] (specs/maskgit.md section 5).

    N - max(s+1, floor(N (1 - 2/pi arccos((s+1)/T)))), in float32: most tokens come in the last steps.
    """
    ratio = np.arange(1, num_steps + 1, dtype=np.float32) / np.float32(num_steps)
    share = 1 - np.arccos(ratio) / np.float32(np.pi / 2)
    return num_tokens - np.maximum(np.arange(1, num_steps + 1), np.floor(share * num_tokens)).astype(np.int32)


def factor_table(ends: tuple[float, float], power: float, warmup: int, num_steps: int) -> np.ndarray:
    """Factor on the logits at each of T steps, float32 [T], of the published sampler C (specs/maskgit.md section 5).

    Linear between its ends, to a power, and half of that at the first `warmup` steps.
    """
    table = np.linspace(*ends, num_steps, dtype=np.float32) ** np.float32(power)
    return np.where(np.arange(num_steps) < warmup, table / 2, table).astype(np.float32)


def timesteps(convention: str, done: np.ndarray, whole: int, calls: int = 0) -> np.ndarray:
    """What the network is told when `done` of `whole` even parts of a decoding are over (specs/meissonic.md section 6).

    With r = done / whole: `clock` ceil(64 (1 - r)) - 1, whatever the number of calls (our choice); `countdown` the same
    of T = `calls`, T-1 down to 0 as in the official inference; `mask_ratio` 1000 cos(pi r/2), as in training, float32;
    `const` 0, what Di[M]O's code comes to. int32 otherwise, of the shape of `done`; 0 at the end. ValueError for a
    countdown without a number of calls.
    """
    if convention not in TIMESTEPS:
        raise ValueError(f"timesteps {convention!r} is not one of {', '.join(TIMESTEPS)}")
    if convention == "countdown" and calls < 1:
        raise ValueError(
            "timesteps 'countdown' counts the calls of a fixed plan, which this policy decides as it goes; "
            "use clock, mask_ratio or const"
        )
    if convention == "mask_ratio":
        return (1000 * np.cos(np.pi / 2 * (done / whole))).astype(np.float32)
    most = {"clock": 64, "countdown": calls, "const": 1}[convention]
    return np.maximum(-(-most * (whole - done) // whole) - 1, 0).astype(np.int32)


def guidance_table(schedule: str, scale: float, progress: np.ndarray) -> np.ndarray:
    """Guidance scale s at progress in [0,1] (float32, same shape); s = 1 is no guidance.

    constant: s; linear: 1 + (s-1) q; cosine: 1 + (s-1)(1 - cos(pi q))/2. Our choice of names; the
    linear ramp is sampler A's of specs/maskgit.md section 3 with w = s - 1.
    """
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance schedule {schedule!r} is not one of {', '.join(GUIDANCE_SCHEDULES)}")
    q = np.asarray(progress, np.float64)
    ramp = {"constant": np.ones_like(q), "linear": q, "cosine": (1 - np.cos(np.pi * q)) / 2}[schedule]
    return (1 + (scale - 1) * ramp).astype(np.float32)


def halton_order(side: int) -> np.ndarray:
    """Flat cell indices of an S x S grid in Halton order, int32 [S*S] (specs/maskgit.md section 5).

    Points are generated until every cell is covered; the first visit of a cell counts.
    """
    order, seen, index = [], set(), 0
    while len(order) < side * side:
        index += 1
        cell = int(side * _radical_inverse(index, 2)) * side + int(side * _radical_inverse(index, 3))
        if cell not in seen:
            seen.add(cell)
            order.append(cell)
    return np.asarray(order, np.int32)


def _radical_inverse(index: int, base: int) -> float:
    """Digits of `index` in `base`, mirrored behind the point (exact up to float64)."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator / denominator
