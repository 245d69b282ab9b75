"""Stage `marval_rl`: a one-call student tuned by a reward of whole pictures (MARVAL-RL).

arXiv 2511.15190; specs/marval.md section 10 says what of it is published and what is our choice. Published is to
back-propagate a differentiable reward through decoder and iterations; here that is the judge, and the exact verifier is
held out. The policy gradient for rewards without one, and what anchors the student, are ours.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from maskrl_jax import state as train_state
from maskrl_jax.axis import Axis, mean_gradients
from maskrl_jax.data.batches import positions_at
from maskrl_jax.data.dataset import Conditioning, conditioning_of
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.evaluate import gain
from maskrl_jax.evaluate.bench import Evaluation
from maskrl_jax.keys import ROLLOUT, STEPS, sample_keys, step_key
from maskrl_jax.phase import Phase
from maskrl_jax.rewards import mix
from maskrl_jax.rewards.judges import judge_of
from maskrl_jax.rl import reward_gradient
from maskrl_jax.rl.action_noise import ActionNoise
from maskrl_jax.rl.reward_gradient import Truncation
from maskrl_jax.sampling import mar as sampling
from maskrl_jax.sampling.mar import MarPlan
from maskrl_jax.tasks import checks, continuous, encoding, generators, marval
from maskrl_jax.tasks import judge as judge_task
from maskrl_jax.tasks import kl_vae as kl_vae_task
from maskrl_jax.tasks import mar as mar_task
from maskrl_jax.tasks.continuous import MarSampler, row_noise
from maskrl_jax.tasks.marval_gallery import MarvalRlGallery, one_step_draw, student_studio
from maskrl_jax.tasks.marval_policy import Policy
from maskrl_jax.tasks.task import Context, Task

Array = jax.Array
GRADIENTS = ("reward", "policy")
ANCHORS = ("none", "gsim", "l2_ref")
MEASURES = ("loss", "gradient")
SMOOTHING = 1  # what a token's key is folded with for the noise under its score; with 0 it is drawn


@dataclasses.dataclass(frozen=True)
class Anchor:
    """What holds the student where its distillation left it (ours; published: nothing).

    kind: `gsim`: the distillation's loss on training pictures, its auxiliary network trained along; `l2_ref`: squared
      distance of the tokens to those of the student as it was, same noise; `none`.
    weight: of that loss beside the reward; or with `by` gradient what its gradient's norm is of that of the reward's,
      in every update (specs/marval.md section 10: to be set by this ratio, 0.1 to 1).
    """

    kind: str = "none"
    weight: float = 0.0
    by: str = "loss"

    def __post_init__(self):
        if self.kind not in ANCHORS:
            raise unknown("anchor.kind", self.kind, ANCHORS)
        if self.weight < 0 or (self.kind == "none") != (self.weight == 0):
            raise ValueError(f"anchor.weight {self.weight} must be above 0 with an anchor, and 0 without one")
        if self.by not in MEASURES:
            raise unknown("anchor.by", self.by, MEASURES)


class Wiring:
    """The stage's pure functions, closed over its static configuration."""

    def __init__(self, config: Any, conditioning: Conditioning):
        self.config = config
        checks.same_tokenizer(config.parents.tokenizer, config.parents.marval.parents.tokenizer)
        self.marval = marval.Wiring(config.parents.marval, conditioning)
        self.base, self.network = self.marval.base, self.marval.network
        self.judge, self.rewards = judge_of(config.parents.judge.model), dict(config.rewards)
        mix.check(self.rewards, self.judge.names)
        by_policy = self._by_policy()
        steps = sorted(set(self.rewards) & set(self.judge.without_gradient))
        if steps and not by_policy:
            raise UserError(f"reward {steps[0]!r} has no gradient; take it from rewards, or set gradient=policy")
        self.plan = MarPlan(self.base.sizes.num_tokens, **config.rollout)
        self.truncation, self.anchor = Truncation(**config.truncation), Anchor(**config.anchor)
        self.smoothing = float(config.smoothing)
        if self.smoothing < 0:
            raise ValueError(f"smoothing {self.smoothing} must be at least 0")
        self.truncation.first(self.plan.num_steps)
        if self.anchor.kind != "none" and self.marval.settings.student != "full":
            raise UserError(
                "an anchor needs a student with a backbone of its own, distilled with distillation.student=full; set anchor.kind=none"
            )
        sampler = MarSampler(**config.sampler)
        self.dials = sampler.dials(self.plan)  # rollouts are made as the student is measured
        noise = ActionNoise(**config.policy)  # refused whether it is used or not
        parts = (noise, self.marval, self.plan, self.score, config.seed, self.dials)
        self.policy = Policy(*parts) if by_policy else None
        if by_policy and self.truncation != Truncation():
            raise UserError("truncation is of gradient=reward; a policy gradient has policy.iterations")
        if by_policy and self.smoothing:
            raise UserError("smoothing is of gradient=reward; a policy gradient has policy.deviation")
        # Rollouts of a prompt, and updates on each batch of them.
        self.group, self.updates = (noise.group, noise.updates) if by_policy else (1, 1)
        if by_policy:
            checks.groups(config.batch_size, self.group)
            if noise.iterations > self.plan.num_steps:
                raise ValueError(f"policy.iterations {noise.iterations} exceeds the {self.plan.num_steps} of a rollout")
        num_tokens = self.base.sizes.num_tokens
        continuous.check_steps(Evaluation(**config.evaluation), sampler, num_tokens)
        gain.Goal(**config.aim)  # refused here rather than when training is over
        self.optimizer = train_state.optimizer_of(config.optimizer, config.num_steps, self.updates)
        self.tx = train_state.make_optimizer(self.optimizer)

    def _by_policy(self) -> bool:
        if self.config.gradient not in GRADIENTS:
            raise unknown("gradient", self.config.gradient, GRADIENTS)
        return self.config.gradient == "policy"

    def init(self, student: Any, auxiliary: Any) -> train_state.TrainState:
        """The student as it was distilled; with the distillation as an anchor, its auxiliary network goes on too."""
        extra = {}
        if self.anchor.kind == "gsim":
            extra["auxiliary"] = train_state.create(jax.tree.map(jnp.copy, auxiliary), self.marval.auxiliary_tx)
        return train_state.create(jax.tree.map(jnp.copy, student), self.tx, extra=extra)

    # Rewards

    def score(self, frozen: Any, tokens: Array, target: Array) -> tuple[Array, dict[str, Array]]:
        """Weighted sum of the judge's scores of tokens in raster order [B], and each of them; differentiable."""
        images = jax.checkpoint(self.base.codec.decode)(frozen["tokenizer"], tokens)
        scores = self.judge.score(frozen["judge"], images, target)
        total = mix.weighted_sum(scores, self.rewards)
        return total, scores | {"quality": total}

    def by_reward(self, params: Any, frozen: Any, batch: dict) -> tuple[Array, tuple[dict, Array]]:
        """Minus the sum of rewards of fresh rollouts, through them; the scores' sums, and the number of rollouts."""
        keys_B = sample_keys(self.config.seed, ROLLOUT, batch["round"][0], batch["index"])
        draw = one_step_draw(self.marval, params)
        model, channels = self.network.backbone(params), self.base.sizes.channels
        tokens = reward_gradient.rollout(
            model, draw, keys_B, [batch["cond"]], self.dials, self.plan, channels, self.truncation
        )
        if self.smoothing:
            _, keys_BL = sampling.randomness(keys_B, self.plan.num_tokens)
            tokens += self.smoothing * row_noise(keys_BL, SMOOTHING, channels)
        total, scores = self.score(frozen, tokens, batch["target"])
        sums = {f"reward/{name}": score.sum() for name, score in scores.items()}
        return -total.sum(), (sums, jnp.float32(len(keys_B)))

    # Updates

    def anchor_loss(self, params: Any, frozen: Any, auxiliary: Any, ready: dict) -> Array:
        """The anchor's loss, a sum over the masked rows of training pictures."""
        draws, mode = self.marval.draws(ready["keys"], marval.STUDENT_DRAW), self.marval.settings.student
        z = self.marval.conditions(params, mode, ready)
        if self.anchor.kind == "gsim":
            own = self.marval.conditions(auxiliary.params, self.marval.settings.auxiliary, ready)
            others = (auxiliary.params, frozen["teacher"], z, own, ready["teacher"])
            return self.marval.student_loss(params, *others, draws, ready["counted"])[0]
        was = self.marval.conditions(frozen["student"], mode, ready)
        now, then = (
            self.marval.tokens(p, self.network.condition(p, z)[None], draws[0])
            for p, z in ((params, z), (frozen["student"], was))
        )
        each = jnp.square(now - jax.lax.stop_gradient(then)).mean(-1)
        return jnp.where(ready["counted"], each, 0).sum()

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """One batch: an optimizer step through its rewards, or `policy.updates` on rollouts that are scored already."""
        key, first = step_key(self.config.seed, STEPS, batch["round"][0]), state
        batch = self.policy.scored(batch) if self.policy else batch
        ready = self.marval.prepared(frozen, batch["pictures"]) if self.anchor.kind != "none" else None
        turns = []
        for turn in range(self.updates):
            state, found = self._step(state, frozen, batch | {"choice": jax.random.fold_in(key, turn)}, ready, axis)
            turns.append(found)
            if ready is not None:  # other noise and times in the next
                ready = ready | {"keys": jax.vmap(jax.random.fold_in, (0, None))(ready["keys"], turn)}
        metrics = jax.tree.map(lambda *values: sum(values), *turns)
        if self.policy:
            scores = {name: batch[name] for name in (*self.judge.names, "quality")}
            weight = jnp.float32(len(batch["quality"]))
            metrics |= {f"reward/{name}": axis.all_reduce((x.sum(), weight)) for name, x in scores.items()}
        return state.replace(step=first.step + 1), metrics

    def _step(self, state, frozen, batch, ready, axis):
        """One optimizer step: (state, metrics as (sum, weight)); ready: what the anchor's pictures give."""
        objective = self.policy.objective if self.policy else self.by_reward
        (_, (sums, count)), grads = jax.value_and_grad(objective, has_aux=True)(state.params, frozen, batch)
        grads = mean_gradients(grads, count, axis)
        metrics = {name: axis.all_reduce((value, count)) for name, value in sums.items()}
        extra, auxiliary = state.extra, None
        if ready is not None:
            if self.anchor.kind == "gsim":
                auxiliary, seen = self.marval.follow(state, ready, axis)
                metrics, extra = metrics | seen, extra | {"auxiliary": auxiliary}
            loss, anchored = jax.value_and_grad(self.anchor_loss)(state.params, frozen, auxiliary, ready)
            anchored = mean_gradients(anchored, ready["weight"], axis)
            weight, ratio = self.anchor.weight, optax.tree.norm(grads) / (optax.tree.norm(anchored) + 1e-12)
            weight *= ratio if self.anchor.by == "gradient" else 1.0
            grads = jax.tree.map(lambda a, b: a + weight * b, grads, anchored)
            metrics["train/anchor"] = axis.all_reduce((loss, ready["weight"]))
            metrics["train/anchor_grad_share"] = (weight / (ratio + 1e-12), jnp.float32(1))
        state, info = train_state.apply_gradients(state, grads, self.tx, ema_decay=self.optimizer.ema_decay)
        metrics |= {f"train/{name}": (value, jnp.float32(1)) for name, value in info.items()}
        return state.replace(extra=extra), metrics


def _frozen_names(wiring: Wiring) -> tuple[str, ...]:
    """Networks beside tokenizer and judge that an update reads."""
    read = set()
    if wiring.anchor.kind != "none":
        read |= {"teacher"}  # a picture's conditions are prepared with it
    if wiring.anchor.kind == "l2_ref" or (wiring.policy and wiring.policy.settings.kl):
        read |= {"student"}
    return tuple(sorted(read))


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    conditioning = conditioning_of(config.data)
    wiring = Wiring(config, conditioning)
    parallel.rows(config.evaluation.batch_size)  # refused here rather than when training is over
    latents, struct = wiring.base.codec.config, jax.ShapeDtypeStruct
    side = latents.image_size
    whole = struct((config.batch_size,), jnp.int32)
    cond = struct((config.batch_size, *conditioning.null.shape), jnp.int32)
    target = struct((config.batch_size, *wiring.judge.target_shape), jnp.int32)
    request = {"cond": cond, "target": target, "index": whole, "round": whole}
    network = jax.eval_shape(wiring.base.init, jax.random.key(0)).params
    frozen = {
        "tokenizer": kl_vae_task.abstract_codec(config.parents.tokenizer),
        "judge": wiring.judge.abstract(side),
    }
    found, learn = [], request
    if wiring.policy:
        checks.whole_groups(config.batch_size, wiring.group, parallel)
        rollout = wiring.policy.rollout
        made = jax.eval_shape(functools.partial(rollout, axis=Axis(1)), network, frozen, request)
        found, learn = [Phase("rollout", rollout, (network, frozen, request), kind="map")], request | made
    if wiring.anchor.kind != "none":
        shown = encoding.example(config, latents, latents.channels)
        learn = learn | {"pictures": {**shown, "cond": cond, "index": whole, "round": whole}}
    frozen |= dict.fromkeys(_frozen_names(wiring), network)
    state = jax.eval_shape(wiring.init, network, network)
    return [*found, Phase("update", wiring.update, (state, frozen, learn), kind="update")]


def studio(context: Context, params: Any) -> continuous.Studio:
    """The tuned student as a user samples from it."""
    config = context.config
    wiring = Wiring(config, conditioning_of(config.data))
    engine = mar_task.engine_of(context, wiring.base)
    return student_studio(context, wiring.marval, engine, params, "tuned student, one call")


def build(context: Context) -> Task:
    """Wire the stage."""
    config, parallel, parents = context.config, context.parallel, context.parents
    train = generators.training_set(context)
    wiring = Wiring(config, train.conditioning)
    checks.same_codes({name: parent.workdir for name, parent in parents.items()}, "marval")
    checks.same_base(parents["marval"].workdir, parents["mar"].workdir, "mar")
    engine = mar_task.engine_of(context, wiring.base)
    networks = {"teacher": parallel.replicate(parents["mar"].params)}
    networks["student"] = parallel.replicate(parents["marval"].params)
    frozen = {"tokenizer": engine.tokenizer, "judge": parallel.replicate(parents["judge"].params)}
    frozen |= {name: networks[name] for name in _frozen_names(wiring)}
    rows, pool = parallel.rows(config.batch_size), encoding.pool(train, config)
    judge = judge_task.load(parents["judge"])
    update = parallel.update(wiring.update)
    roll_out = parallel.map(wiring.policy.rollout) if wiring.policy else None
    read = encoding.examples(train, config, rows) if wiring.anchor.kind != "none" else None
    gallery = MarvalRlGallery(context, wiring, engine, networks)

    def batch(step):
        count = config.batch_size // wiring.group
        positions, _ = positions_at(len(pool), step, count, slice(0, count), config.seed)
        cond = np.repeat(pool[positions], wiring.group, axis=0)[rows]
        number = np.full(len(cond), step, np.int32)
        samples = (step * config.batch_size + np.arange(config.batch_size)) % 2**31
        target = judge.targets(cond, train.describe(cond))
        found = {"cond": cond, "target": target, "index": samples.astype(np.int32)[rows], "round": number}
        if read:
            found["pictures"] = read(step) | {"round": number}
        return found

    def step(state, batch):
        if roll_out:
            batch = batch | roll_out(state.params, frozen, batch)
        return update(state, frozen, batch)

    def init(key):
        auxiliary = serialization.to_state_dict(parents["marval"].extra)["auxiliary"]["params"]
        return parallel.init(wiring.init, parents["marval"].params, auxiliary)

    return Task(init=init, batch=batch, step=step, evaluate=gallery.evaluate, report=gallery.report)
