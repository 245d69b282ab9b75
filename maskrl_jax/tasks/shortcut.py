"""Stage `shortcut`: a light network learns to move a frozen base's feature from one sampling step to the next.

MIGM-Shortcut (arXiv 2602.23996); specs/shortcut.md says what of it is published, what is read from the official code
and what is our choice. The base rolls out on the device while the shortcut trains: nothing is written but checkpoints.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax import state as train_state
from maskrl_jax.axis import Axis, mean_gradients
from maskrl_jax.data.batches import positions_at
from maskrl_jax.data.dataset import Conditioning, conditioning_of
from maskrl_jax.distill.feature_shortcut import Buffer, ShortcutLoss, Student, branch_and_step, loss, pair_slots
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.bench import Evaluation, read_sampler
from maskrl_jax.evaluate.studio import Studio
from maskrl_jax.evaluate.systems import Costs, shortcut_program, shortcut_system
from maskrl_jax.keys import ROLLOUT, STUDENT, TRAIN, sample_keys
from maskrl_jax.phase import Phase
from maskrl_jax.sampling import maskgit, refresh
from maskrl_jax.sampling.maskgit import Plan, SamplerConfig, make_plan
from maskrl_jax.sampling.shortcut import Parts, branches, most_controls
from maskrl_jax.sampling.shortcut_teacher import predict_fully, redraw
from maskrl_jax.tasks import checks, codecs, forms, generators, shortcut_network, speed_rl
from maskrl_jax.tasks import maskgit as maskgit_task
from maskrl_jax.tasks.shortcut_gallery import ShortcutGallery
from maskrl_jax.tasks.shortcut_systems import Curve, ShortcutSystems
from maskrl_jax.tasks.task import Context, Task

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The rollouts that a shortcut learns from.

    num_steps: N; several, and a rollout takes one after the other (mixed N, extension 2, our choice).
    pairs: of each sample in a minibatch.
    epochs: times that a buffer is gone through before it is filled anew.
    """

    num_steps: tuple[int, ...] = (24,)
    pairs: int = 2
    epochs: int = 1

    def __post_init__(self):
        object.__setattr__(self, "num_steps", tuple(self.num_steps))
        if not self.num_steps or min(self.num_steps) < 2:
            raise ValueError(f"teacher.num_steps {self.num_steps} needs numbers of steps of at least 2")
        if self.pairs < 1 or self.epochs < 1:
            raise ValueError(f"teacher.pairs {self.pairs} and epochs {self.epochs} must be at least 1")

    @property
    def longest(self) -> int:
        return max(self.num_steps)


class Wiring:
    """The stage's pure functions, closed over its static configuration and the base's sampler."""

    def __init__(self, config: Any, conditioning: Conditioning, sampler: SamplerConfig):
        base = config.parents.maskgit
        self.config, self.null, self.sampler = config, conditioning.null, sampler
        checks.same_tokenizer(config.parents.tokenizer, base.parents.tokenizer)
        checks.same_data(config)
        self.sizes = forms.model_config(base, base.parents.tokenizer, conditioning)
        self.base = forms.generator(self.sizes)
        self.teacher, self.loss = Teacher(**config.teacher), ShortcutLoss(**config.loss)
        self.codec = codecs.codec(codecs.sizes(base.parents.tokenizer.model), None)
        self.network = shortcut_network.mover(self.sizes, config.model, self.null)
        if self.loss.chain >= self.teacher.longest:
            raise UserError(f"loss.chain {self.loss.chain} exceeds the {self.teacher.longest - 1} pairs of a rollout")
        if self.loss.student_tokens and sampler.mode in maskgit.ORDERED:
            raise UserError(
                f"loss.student_tokens does not know the order that a rollout of sampler mode {sampler.mode!r} has drawn; "
                "choose another mode or leave it False"
            )
        self.plans = [self.plan(steps) for steps in self.teacher.num_steps]
        self.branches = branches(self.plans[0])
        # A pair is of one branch, or of both.
        self.pair_branches = 1 if self.loss.student_tokens else self.branches
        self.count = self.pair_branches * (self.teacher.longest - 1)
        if self.teacher.pairs > self.count:
            raise UserError(f"teacher.pairs {self.teacher.pairs} exceeds the {self.count} pairs of a sample")
        self.batches = self.teacher.epochs * (self.count // self.teacher.pairs)
        self.most = max(most_controls(plan, self.sizes.num_tokens) for plan in self.plans)
        self.optimizer = train_state.optimizer_of(config.optimizer, config.num_steps, self.batches)
        self.tx = train_state.make_optimizer(self.optimizer)

    def plan(self, num_steps: int) -> Plan:
        """The base's sampler at a number of steps; all plans share their shapes with the longest of training."""
        longest = max(self.teacher.longest, num_steps)
        return make_plan(
            dataclasses.replace(self.sampler, num_steps=num_steps, max_steps=longest), self.sizes.num_tokens
        )

    def init(self, key: Array) -> train_state.TrainState:
        """Fresh weights; with `zero_init_out` a network that leaves the feature as it is."""
        return train_state.create(self.network.init(key), self.tx)

    def parts(self, params: Any, base_params: Any) -> Parts:
        """What sampling with the shortcut needs."""
        advance = self.network.advance(params, base_params)

        def kept(features, *seen):  # in the base's type
            return advance(features, *seen).astype(features.dtype)

        return Parts(self.base.features(base_params), self.base.head(base_params), kept)

    def student(self, base_params: Any, null: Any, plan: Plan | None = None) -> Student:
        """The network as what is trained, for a null condition as the base reads it; with a plan it can draw tokens."""

        def drawn(keys_b, cond, rollout, step_b, features):
            parts = self.parts(None, base_params)
            return redraw(parts, keys_b, cond, null, plan, rollout, step_b, features, self.sizes.mask_id)

        return Student(
            advance=lambda params, *state: self.network.advance(params, base_params)(*state),
            head=self.base.head(base_params),
            null=null,
            num_tokens=self.sizes.num_tokens,
            most=self.most,
            redraw=None if plan is None else drawn,
        )

    def rollout(self, base_params: Any, frozen: Any, batch: dict, axis: Any) -> dict:
        """Sample with the base alone and keep the feature of every step; per-sample outputs."""
        keys_B = sample_keys(self.config.seed, ROLLOUT, batch["round"][0], batch["index"])
        return self.teach(base_params, frozen, keys_B, batch["cond"])

    def teach(self, base_params: Any, frozen: Any, keys_B: Array, cond_B: Array) -> dict:
        """A rollout of the base from empty grids: features [B,branches,S,T,D] of every step, ids, commit steps.

        `frozen` are the plan and the tokenizer, whose text encoder, if it has one, reads the conditions.
        """
        rows, plan = len(keys_B), frozen["plan"]
        cond, null = self.codec.told(frozen["tokenizer"], cond_B, self.null)
        empty = jnp.full((rows, self.sizes.num_tokens), self.sizes.mask_id, jnp.int32)
        parts = Parts(self.base.features(base_params), self.base.head(base_params), None)
        predict, kept = predict_fully(parts, cond, null, plan, empty)
        rollout, features_SbTD = maskgit.fill(predict, kept, keys_B, plan, empty, self.sizes.mask_id)
        steps, _, *rest = features_SbTD.shape
        by_branch = features_SbTD.reshape(steps, branches(plan), rows, *rest)
        return {
            "features": jnp.transpose(by_branch, (2, 1, 0, 3, 4)),
            "cond": cond_B,
            "ids": rollout.ids,
            "commit_step": rollout.commit_step,
        }

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """All minibatches of a buffer, one optimizer step each; the state's step counts buffers."""
        first = state
        cond, null = self.codec.told(frozen["tokenizer"], batch["cond"], self.null)
        buffer = Buffer(batch["features"], cond, batch["ids"], batch["commit_step"])
        student = self.student(frozen["base"], null, frozen["plan"])
        keys_B, student_keys_B = (
            sample_keys(self.config.seed, purpose, batch["round"][0], batch["index"]) for purpose in (TRAIN, STUDENT)
        )
        slots_MBp = pair_slots(keys_B, self.teacher.pairs, self.count, self.teacher.epochs)

        def minibatch(state, slots):
            branch, step = branch_and_step(slots, self.pair_branches, buffer.lengths(), self.teacher.longest)
            own_keys_B = jax.vmap(jax.random.fold_in, (0, None))(student_keys_B, state.step)

            def objective(params):
                return loss(self.loss, student, params, buffer, branch, step, own_keys_B)

            (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
            grads = mean_gradients(grads, metrics["loss"][1], axis)
            metrics = axis.all_reduce(metrics)  # here, where it travels with the gradients
            state, info = train_state.apply_gradients(state, grads, self.tx, ema_decay=self.optimizer.ema_decay)
            return state, (metrics, info)

        # The moving average counts minibatches; the loop, and what stops a run gone bad, count buffers.
        state, (metrics, infos) = jax.lax.scan(minibatch, state.replace(step=state.step * len(slots_MBp)), slots_MBp)
        values = {f"train/{name}": jax.tree.map(lambda x: x.sum(0), pair) for name, pair in metrics.items()}
        values |= {f"train/{name}": (x.sum(), jnp.float32(len(x))) for name, x in infos.items()}
        all_bad = state.bad_total - first.bad_total == len(slots_MBp)
        bad = jnp.where(all_bad, first.bad_steps + 1, 0)
        return state.replace(step=first.step + 1, bad_steps=bad), values


def teacher_of(context: Context) -> tuple[Any, SamplerConfig]:
    """Parameters and sampler of the network that rolls out: the base at its best, or a policy tuned on it.

    A policy's head is left out: its order is kept, its kappa does not move.
    """
    if "speed_rl" in context.parents:
        tuned = context.parents["speed_rl"]
        return tuned.params["model"], speed_rl.without_head(tuned.config)
    base = context.parents["maskgit"]
    return base.params, read_sampler(base.workdir, SamplerConfig(**base.config.sampler))


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    conditioning = conditioning_of(config.data)
    sampler = SamplerConfig(**config.parents.maskgit.sampler)
    if "speed_rl" in config.parents:
        sampler = speed_rl.without_head(config.parents.speed_rl)
    wiring = Wiring(config, conditioning, sampler)
    settings, curve = Evaluation(**config.evaluation), Curve(**config.curve)  # refused here rather than in the end
    of_base = SamplerConfig(**config.parents.maskgit.sampler)
    generators.check_steps(of_base, wiring.sizes.num_tokens, steps=settings.steps)
    wiring.plan(curve.num_steps)
    parallel.rows(config.evaluation.batch_size)  # refused here rather than when training is over
    base = maskgit_task.abstract_params(config.parents.maskgit, conditioning)
    whole = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    request = {"cond": jax.ShapeDtypeStruct((config.batch_size, *conditioning.null.shape), jnp.int32)}
    request |= {"index": whole, "round": whole}
    frozen = {
        "plan": jax.eval_shape(lambda: jax.tree.map(jnp.asarray, wiring.plans[0])),
        "tokenizer": codecs.abstract(config.parents.tokenizer.model),
    }
    made = jax.eval_shape(functools.partial(wiring.rollout, axis=Axis(1)), base, frozen, request)
    state = jax.eval_shape(wiring.init, jax.random.key(0))
    learn = made | {"index": whole, "round": whole}
    return [
        Phase("rollout", wiring.rollout, (base, frozen, request), kind="map", loop_trips=wiring.teacher.longest),
        Phase("update", wiring.update, (state, {"base": base} | frozen, learn), kind="update"),
    ]


def studio(context: Context, params: Any) -> Studio:
    """The base with its shortcut as a user samples from it, under any fixed sampler."""
    network, sampler = teacher_of(context)
    as_base = dataclasses.replace(context, config=context.config.parents.maskgit)
    base = maskgit_task.studio(as_base, network)
    curve = Curve(**context.config.curve)
    sampler = dataclasses.replace(sampler, num_steps=curve.num_steps, max_steps=max(curve.num_steps, sampler.max_steps))
    wiring = Wiring(context.config, base.dataset.conditioning, sampler)
    both = context.parallel.replicate({"base": network, "shortcut": params})
    program = shortcut_program(base.engine, lambda p: wiring.parts(p["shortcut"], p["base"]), base.engine.num_tokens)

    def shortened(chosen, given):
        plan = make_plan(chosen, base.engine.num_tokens)

        def asks(full):
            return refresh.scheduled(refresh.even_steps(chosen.num_steps, int(full)), chosen.max_steps)

        # Calls are full steps: what a shortcut step costs is not known here.
        costs = Costs(full=1.0, light=0.0)
        return shortcut_system(base.engine, program, both, plan, asks, costs, "shortcut", "shortcut", given)

    return dataclasses.replace(base, sampler=sampler, shortcut=shortened, full_steps=curve.usual)


def build(context: Context) -> Task:
    """Wire the stage: the base rolls out, the shortcut learns from it."""
    config, parallel = context.config, context.parallel
    train = generators.dataset_of(context, "train")
    checks.same_codes({name: parent.workdir for name, parent in context.parents.items()})
    if "speed_rl" in context.parents:
        checks.same_base(context.parents["speed_rl"].workdir, context.parents["maskgit"].workdir)
    params, sampler = teacher_of(context)
    wiring = Wiring(config, train.conditioning, sampler)
    pool, rows = train.pool(held_out=False), parallel.rows(config.batch_size)
    network = parallel.replicate(params)
    plans = [parallel.replicate(plan) for plan in wiring.plans]
    roll_out, update = parallel.map(wiring.rollout), parallel.update(wiring.update)
    engine = generators.engine_of(context, wiring.sizes, wiring.null)
    gallery = ShortcutGallery(config, ShortcutSystems(context, wiring, engine, network))

    def batch(step):
        positions, samples = positions_at(len(pool), step, config.batch_size, slice(0, config.batch_size), config.seed)
        return {
            "cond": pool[positions][rows],
            "index": (samples % 2**31).astype(np.int32)[rows],
            "round": np.full(config.batch_size, step, np.int32)[rows],
        }

    def step(state, batch):
        frozen = {"plan": plans[int(batch["round"][0]) % len(plans)], "tokenizer": engine.tokenizer}
        made = roll_out(network, frozen, batch)
        learn = made | {name: batch[name] for name in ("index", "round")}
        return update(state, {"base": network} | frozen, learn)

    return Task(
        init=lambda key: parallel.init(wiring.init, key),
        batch=batch,
        step=step,
        evaluate=gallery.evaluate,
        report=gallery.report,
    )
