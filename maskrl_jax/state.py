"""What a stage trains: parameters, optimizer, moving average, and one guarded update of them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from maskrl_jax.errors import UserError, unknown

OPTIMIZERS = ("adamw", "muon", "sgd")
DECAYS = ("constant", "linear", "cosine", "tenth")


class TrainState(flax.struct.PyTreeNode):
    """Hold everything that a checkpoint needs.

    step, bad_steps (skipped updates in a row) and bad_total are int32 scalars; ema has the tree of params;
    extra is state without gradients (codebook statistics, filter history), {} if there is none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    extra: Any
    bad_steps: jax.Array
    bad_total: jax.Array


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Describe an optimizer; `rates` are (regex on the "/"-joined path, factor), the first match counts.

    The learning rate rises linearly over `warmup_steps` updates and, unless `decay` is "constant", falls to 0 at
    update `decay_steps` (counted from 0); "tenth": to a tenth, at that update at once. `b1` and `b2` are Adam's (`b1` also sgd's momentum); Muon's momentum is
    optax's 0.95. Factor 0 freezes a parameter. Weight decay is decoupled and applies to arrays of two or more axes.
    `clip_norm` 0 means no clipping. The rate moves once in `updates_per_step` updates (those made, a skipped one is
    none), and both counts above are of such steps.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup_steps: int = 0
    decay: str = "constant"
    decay_steps: int = 0
    muon_learning_rate: float = 0.02
    muon_steps: int = 5  # Newton-Schulz iterations
    muon_stacks: str = "_blocks/"  # arrays of three axes that are a stack of matrices
    muon_skip: str = "embedding|position|head|table|maps|pool_out"  # matrices that are tables or outputs, not maps
    ema_decay: float = 0.999
    rates: tuple[tuple[str, float], ...] = ()
    updates_per_step: int = 1

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise unknown("optimizer.name", self.name, OPTIMIZERS)
        if self.decay not in DECAYS:
            raise unknown("optimizer.decay", self.decay, DECAYS)
        if self.decay != "constant" and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"optimizer.decay_steps={self.decay_steps} does not exceed warmup_steps={self.warmup_steps}; "
                "set it to the step at which the rate shall reach 0"
            )
        if self.muon_steps < 1:
            raise UserError(f"optimizer.muon_steps={self.muon_steps} must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"optimizer.ema_decay={self.ema_decay} is not in [0, 1); use 0 for no average")


def optimizer_of(settings: Mapping[str, Any], num_steps: int, updates_per_step: int = 1) -> OptimizerConfig:
    """Read a config's optimizer; `decay_steps` 0 stands for the length of the run."""
    settings = dict(settings)
    if settings.get("decay", "constant") != "constant":
        settings["decay_steps"] = settings.get("decay_steps") or num_steps
    return OptimizerConfig(**settings, updates_per_step=updates_per_step)


def learning_rate(cfg: OptimizerConfig, peak: float) -> optax.Schedule:
    """Return the schedule step -> rate with the given peak."""
    span = cfg.decay_steps - cfg.warmup_steps
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, span),
        "cosine": lambda: optax.cosine_decay_schedule(peak, span),
        "tenth": lambda: optax.piecewise_constant_schedule(peak, {span: 0.1}),
    }[cfg.decay]()
    # From 1/(warmup+1) on, not from 0: an update with rate 0 would be lost.
    warmup = optax.linear_schedule(peak / (cfg.warmup_steps + 1), peak, cfg.warmup_steps)
    schedule = optax.join_schedules([warmup, after], [cfg.warmup_steps]) if cfg.warmup_steps else after
    return lambda count: schedule(count // cfg.updates_per_step)


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Build the optimizer; parameters are grouped by rule and rate factor when it first sees them."""
    patterns = [(re.compile(pattern), float(factor)) for pattern, factor in cfg.rates]

    tables, stacks = re.compile(cfg.muon_skip), re.compile(cfg.muon_stacks)

    def name_of(path):
        return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)

    def factor_of(path):
        return next((factor for pattern, factor in patterns if pattern.search(name_of(path))), 1.0)

    def labels(params):
        names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern, _ in patterns:
            if not any(pattern.search(name) for name in names):
                raise UserError(f"optimizer.rates: no parameter matches {pattern.pattern!r}; there are {_some(names)}")

        def label(path, leaf):
            factor = factor_of(path)
            if factor == 0.0:
                return "frozen"
            matrices = leaf.ndim == 2 or (leaf.ndim == 3 and stacks.search(name_of(path)))
            maps = cfg.name == "muon" and matrices and not tables.search(name_of(path))
            return f"{'muon' if maps else 'rest'}*{factor}"

        return jax.tree_util.tree_map_with_path(label, params)

    groups = {"frozen": optax.set_to_zero()}
    for factor in {1.0, *(factor for _, factor in patterns)} - {0.0}:
        groups[f"rest*{factor}"] = optax.chain(_rule(cfg), optax.scale(factor))
        if cfg.name == "muon":
            groups[f"muon*{factor}"] = optax.chain(_muon(cfg), optax.scale(factor))
    rules = optax.partition(groups, labels)
    if not cfg.clip_norm:
        return rules
    # The gradients of frozen parameters must not use up the norm of the others.
    trained = {"frozen": optax.set_to_zero(), "trained": optax.identity()}
    frozen_out = optax.partition(
        trained,
        lambda params: jax.tree.map(lambda name: "frozen" if name == "frozen" else "trained", labels(params)),
    )
    return optax.chain(frozen_out, optax.clip_by_global_norm(cfg.clip_norm), rules)


def _some(names):
    """Name the first two levels of some parameters."""
    return ", ".join(sorted({"/".join(name.split("/")[:2]) for name in names})[:8])


def _rule(cfg):
    """Return the rule for all parameters but Muon's matrices."""
    rate = learning_rate(cfg, cfg.learning_rate)
    scale = optax.trace(cfg.b1) if cfg.name == "sgd" else optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    return optax.chain(scale, _decay(cfg), optax.scale_by_learning_rate(rate))


def _muon(cfg):
    """Return Muon's orthogonalised momentum for matrices [..., in, out], scaled by sqrt(max(1, out / in))."""
    rate = learning_rate(cfg, cfg.muon_learning_rate)

    def dimensions(params):
        # As a function: the tree that arrives has holes where other rules apply.
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)

    return optax.chain(
        optax.contrib.scale_by_muon(ns_steps=cfg.muon_steps, weight_dimension_numbers=dimensions),
        optax.stateless_with_tree_map(lambda u, _: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5),
        _decay(cfg),
        optax.scale_by_learning_rate(rate),
    )


def _decay(cfg):
    def matrices(params):
        return jax.tree.map(lambda p: p.ndim >= 2, params)

    return optax.add_decayed_weights(cfg.weight_decay, matrices)


def create(params: Any, tx: optax.GradientTransformation, extra: Any = None) -> TrainState:
    """Return the state at step 0, its moving average equal to the parameters."""
    # Distinct zeros: a buffer that occurs twice in a donated tree is an error.
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(
        step=zeros[0],
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params),
        extra={} if extra is None else extra,
        bad_steps=zeros[1],
        bad_total=zeros[2],
    )


def apply_gradients(
    state: TrainState,
    grads: Any,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float,
    extra: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Update once, or skip the update where the gradient is not finite or is zero throughout.

    grads: tree of params, already averaged over the devices. A skipped update leaves params, opt_state, ema
    and extra as they were and still advances step; one that is not finite counts in bad_steps and bad_total. A
    gradient of zero means that nothing was to be learned (every group rejected), but momentum would move the
    parameters all the same, and Muon by a full step. The average is
    ema = d ema + (1 - d) params with d = min(ema_decay, (1 + step) / (10 + step)), so that a short run is
    not dominated by the initial parameters (our choice). Returns the state and
    {"grad_norm", "skipped"} as float32 scalars.
    """
    grad_norm = optax.tree.norm(grads)
    finite, usable = jnp.isfinite(grad_norm), jnp.isfinite(grad_norm) & (grad_norm > 0)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
    # In this form a parameter that is frozen leaves its average exactly where it was.
    ema = jax.tree.map(lambda a, p: (p + decay * (a - p)).astype(a.dtype), state.ema, params)
    new = (params, opt_state, ema, state.extra if extra is None else extra)
    old = (state.params, state.opt_state, state.ema, state.extra)
    params, opt_state, ema, extra = jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, old)
    bad = (~finite).astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=ema,
        extra=extra,
        bad_steps=(state.bad_steps + 1) * bad,
        bad_total=state.bad_total + bad,
    )
    return state, {"grad_norm": grad_norm, "skipped": 1 - usable.astype(jnp.float32)}
