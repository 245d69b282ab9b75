"""Stage `marval`: MAR's chain distilled into one call of its head by guided score implicit matching.

MARVAL (arXiv 2511.15190); specs/marval.md says what of it is published and what is our choice. Three networks: the
frozen teacher, the student, and an auxiliary one that predicts the noise of the student's samples.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax import state as train_state
from maskrl_jax.axis import mean_gradients
from maskrl_jax.data.dataset import Conditioning, conditioning_of
from maskrl_jax.distill import diffusion, gsim
from maskrl_jax.distill.gsim import Gsim, OneStep
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.bench import Evaluation
from maskrl_jax.keys import TRAIN, sample_keys
from maskrl_jax.phase import Phase
from maskrl_jax.tasks import checks, continuous, encoding, generators
from maskrl_jax.tasks import kl_vae as kl_vae_task
from maskrl_jax.tasks import mar as mar_task
from maskrl_jax.tasks.continuous import MarSampler
from maskrl_jax.tasks.marval_gallery import MarvalGallery, student_studio
from maskrl_jax.tasks.marval_regression import Regression, Regressor
from maskrl_jax.tasks.task import Context, Task

Array = jax.Array
MODES = ("full", "head_only")
HEAD = (("denoiser", 1.0), ("", 0.0))  # rates of a network whose head alone is trained
STUDENT_DRAW, AUXILIARY = 9, 10  # what a sample's key is folded with; each auxiliary step has the next


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How the two networks are trained; published: alternating updates, nothing else.

    student, auxiliary: `full`, a backbone and a head of its own, or `head_only`, on the teacher's backbone.
    repeats: M, noise draws of a token. auxiliary_steps: updates of the auxiliary network before each of the student.
    warm_up: steps of the auxiliary network alone, on samples of the student as it is after any regression.
    """

    student: str = "full"
    auxiliary: str = "full"
    repeats: int = 4
    auxiliary_steps: int = 1
    warm_up: int = 200

    def __post_init__(self):
        for name in ("student", "auxiliary"):
            if getattr(self, name) not in MODES:
                raise ValueError(f"distillation.{name} {getattr(self, name)!r} is not one of {', '.join(MODES)}")
        if self.repeats < 1 or self.auxiliary_steps < 1 or self.warm_up < 0:
            raise ValueError("distillation.repeats and auxiliary_steps must be at least 1 and warm_up at least 0")


class Wiring:
    """The stage's pure functions, closed over its static configuration."""

    def __init__(self, config: Any, conditioning: Conditioning):
        self.config, teacher = config, config.parents.mar
        checks.same_tokenizer(config.parents.tokenizer, teacher.parents.tokenizer)
        self.base = mar_task.Wiring(teacher, conditioning)
        self.network, self.process, self.null = self.base.network, self.base.process, self.base.null
        self.masking = mar_task.Masking(**config.masking)
        self.settings, self.gsim = Distillation(**config.distillation), Gsim(**config.loss)
        self.one_step = OneStep(**config.model)
        if self.gsim.last >= len(self.process):
            raise UserError(f"loss.last {self.gsim.last} is beyond the {len(self.process)} times of the process")
        num_tokens = self.base.sizes.num_tokens
        continuous.check_steps(Evaluation(**config.evaluation), MarSampler(**config.sampler), num_tokens)
        if self.one_step.time >= len(self.process):
            raise UserError(f"model.time {self.one_step.time} is beyond the {len(self.process)} times of the process")
        # Runs of before regression could come first lack it.
        settings, regression = self.settings, Regression(**config.get("regression", {}))
        self.warm_up_from, self.update_from = regression.updates, regression.updates + settings.warm_up
        if config.num_steps <= self.update_from:
            raise UserError(
                f"num_steps {config.num_steps} must exceed regression.updates {regression.updates} "
                f"and distillation.warm_up {settings.warm_up} together"
            )
        # Rates fall over a network's own updates.
        self.optimizer = self._optimizer(config.optimizer, settings.student, config.num_steps - self.update_from)
        self.auxiliary_optimizer = self._optimizer(
            config.auxiliary_optimizer,
            settings.auxiliary,
            config.num_steps - self.warm_up_from,
            settings.auxiliary_steps,
        )
        self.regressor = None
        if regression.updates:
            by = self._optimizer(config.regression_optimizer, settings.student, regression.updates)
            self.regressor = Regressor(regression, by, self)
        self.tx, self.auxiliary_tx = (
            train_state.make_optimizer(one) for one in (self.optimizer, self.auxiliary_optimizer)
        )

    def _optimizer(self, settings, mode, num_steps, updates_per_step=1):
        rates = HEAD if mode == "head_only" else ()
        return train_state.optimizer_of({**settings, "rates": rates}, num_steps, updates_per_step)

    def init(self, teacher: Any) -> train_state.TrainState:
        """Student and auxiliary network start as copies of the teacher."""
        auxiliary = train_state.create(jax.tree.map(jnp.copy, teacher), self.auxiliary_tx)
        extra = {"auxiliary": auxiliary}
        if self.regressor:
            extra["regression"] = self.regressor.tx.init(teacher)
        return train_state.create(jax.tree.map(jnp.copy, teacher), self.tx, extra=extra)

    def tokens(self, params: Any, condition: Array, zeta: Array) -> Array:
        """The student's tokens [..., C] of noise, at `head_condition` [..., W]."""
        direct = self.one_step.form == "x0"
        said = self.network.outputs if direct else self.network.head

        def head(state, time):
            out = diffusion.split(said(params, state, time, condition))[0]
            if direct and self.base.sizes.prediction == "velocity":
                times = jnp.full(state.shape[:-1], self.one_step.time)
                return diffusion.start_of_velocity(self.process, state, times, out)
            return out

        return self.one_step.draw(self.process, head, zeta)

    def draws(self, keys_B: Array, purpose: int) -> tuple[Array, Array, Array]:
        """zeta and noise [M,B,L,C] and times int32 [M,B,L] of every repetition; an image's tokens may share a time."""
        c, s = self.base.sizes, self.gsim
        shape = (self.settings.repeats, c.num_tokens)

        def one(key):
            key = jax.random.fold_in(key, purpose)
            zeta, noise = (jax.random.normal(jax.random.fold_in(key, i), (*shape, c.channels)) for i in range(2))
            times = (shape[0], 1) if s.over == "image" else shape
            step = diffusion.spread_times(jax.random.fold_in(key, 2), times, s.first, s.last)
            return zeta, noise, jnp.broadcast_to(step, shape)

        return jax.vmap(one, out_axes=1)(keys_B)

    def auxiliary_loss(self, params: Any, z: Array, tokens: Array, step: Array, noise: Array, counted: Array):
        """Squared error, summed, of what the head predicts of the student's noised samples (section 8; there, noise).

        Of a velocity that of the noise would be too little at late times, where the head would not follow the student.
        """
        state = diffusion.noised(self.process, tokens, step, noise)
        guess, _ = diffusion.split(self.network.head(params, state, step, self.network.condition(params, z)[None]))
        each = jnp.square(guess - noise).mean(-1)
        if self.base.sizes.prediction == "velocity":
            each = diffusion.velocity_error(self.process, step, each)
        return jnp.where(counted, each, 0).sum()

    def student_loss(self, params, auxiliary, teacher, z, z_auxiliary, z_teacher, draws, counted):
        """Loss of the student's own rows, and sums for the log; gradients reach the tokens through both heads.

        Neither the other networks nor what they see has a gradient of its own.

        z: of the student; z_auxiliary; z_teacher [2,B,L,D], the null condition's second. Logged are the length of the
        heads' gap, the part of its square that is the auxiliary network's own error (mean 0 under exact scores, so it
        tells how far that network lags), and the square.
        """
        zeta, noise, step = draws
        fixed = (auxiliary, teacher, z_auxiliary, z_teacher)
        auxiliary, teacher, z_auxiliary, z_teacher = jax.lax.stop_gradient(fixed)
        condition = lambda own, z: self.network.condition(own, z)[..., None, :, :, :]  # noqa: E731 - a place for M
        tokens = self.tokens(params, condition(params, z), zeta)
        state = diffusion.noised(self.process, tokens, step, noise)
        own, _ = diffusion.split(self.network.head(auxiliary, state, step, condition(auxiliary, z_auxiliary)))
        both = jnp.broadcast_to(state[None], (2, *state.shape)), jnp.broadcast_to(step[None], (2, *step.shape))
        guesses, _ = diffusion.split(self.network.head(teacher, *both, condition(teacher, z_teacher)))
        wanted = gsim.guided(guesses[1], guesses[0], self.gsim.guidance)
        own = jnp.where(counted[..., None], own, wanted)  # what is not counted adds nothing to an image's norm
        rows = gsim.row_losses(self.gsim, self.process, step, noise, own, wanted, tokens)
        gap = jnp.where(counted[..., None], own - wanted, 0)
        implicit = jnp.where(counted, ((own - wanted) * (noise - own)).sum(-1), 0)
        loss = jnp.where(counted if self.gsim.over == "token" else True, rows, 0).sum()
        return loss, (jnp.linalg.norm(gap, axis=-1).sum(), -implicit.sum(), jnp.square(gap).sum())

    def prepared(self, frozen: Any, batch: dict) -> dict:
        """Tokens of a batch in generation order, what is masked, and the teacher's conditions."""
        keys_B = sample_keys(self.config.seed, TRAIN, batch["round"][0], batch["index"])
        tokens, order_BL, masked_B = self.base.examples(keys_B, frozen, batch, self.masking)
        conds = [batch["cond"], jnp.broadcast_to(jnp.asarray(self.null)[None], batch["cond"].shape)]
        spread = lambda x: jnp.concatenate([x] * 2)  # noqa: E731
        inputs = (spread(tokens), spread(order_BL), jnp.concatenate(conds), spread(masked_B))
        z = self.base.conditions(frozen["teacher"], *inputs, self.masking)
        counted = (jnp.arange(self.base.sizes.num_tokens)[None] < masked_B[:, None])[None]
        return {
            "keys": keys_B,
            "inputs": (tokens, order_BL, batch["cond"], masked_B),
            "teacher": z.reshape(2, len(tokens), *z.shape[1:]),
            "counted": counted,
            "weight": (counted.sum() * self.settings.repeats).astype(jnp.float32),
        }

    def conditions(self, params: Any, mode: str, ready: dict) -> Array:
        """z of a network: of its own backbone, or the teacher's."""
        if mode == "head_only":
            return ready["teacher"][0]
        return self.base.conditions(params, *ready["inputs"], self.masking)

    def follow(self, state: Any, ready: dict, axis: Any) -> tuple[Any, dict]:
        """Updates of the auxiliary network on fresh samples of the student as it is."""
        auxiliary, sums = state.extra["auxiliary"], {}
        z = jax.lax.stop_gradient(self.conditions(state.params, self.settings.student, ready))
        condition = self.network.condition(state.params, z)[None]
        for number in range(self.settings.auxiliary_steps):
            zeta, noise, step = self.draws(ready["keys"], AUXILIARY + number)
            tokens = jax.lax.stop_gradient(self.tokens(state.params, condition, zeta))

            def loss(params, tokens=tokens, step=step, noise=noise):
                z = self.conditions(params, self.settings.auxiliary, ready)
                return self.auxiliary_loss(params, z, tokens, step, noise, ready["counted"])

            total, grads = jax.value_and_grad(loss)(auxiliary.params)
            grads = mean_gradients(grads, ready["weight"], axis)
            auxiliary, info = train_state.apply_gradients(auxiliary, grads, self.auxiliary_tx, ema_decay=0.0)
            sums = {"train/auxiliary": axis.all_reduce((total, ready["weight"]))}
            sums["train/auxiliary_grad_norm"] = (info["grad_norm"], jnp.float32(1))
        return auxiliary, sums

    def warm_up(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """A step of the auxiliary network alone."""
        auxiliary, metrics = self.follow(state, self.prepared(frozen, batch), axis)
        still = state.replace(step=state.step + 1, bad_steps=jnp.zeros_like(state.bad_steps))
        return _with(still, auxiliary), metrics

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """The auxiliary network first, then the student against it."""
        ready = self.prepared(frozen, batch)
        auxiliary, metrics = self.follow(state, ready, axis)
        z_auxiliary = self.conditions(auxiliary.params, self.settings.auxiliary, ready)
        draws = self.draws(ready["keys"], STUDENT_DRAW)

        def loss(params):
            z = self.conditions(params, self.settings.student, ready)
            others = (auxiliary.params, frozen["teacher"], z, z_auxiliary, ready["teacher"])
            return self.student_loss(params, *others, draws, ready["counted"])

        (total, (gap, lag, square)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        grads = mean_gradients(grads, ready["weight"], axis)
        state, info = train_state.apply_gradients(state, grads, self.tx, ema_decay=self.optimizer.ema_decay)
        sums = {"loss": (total, ready["weight"]), "gap": (gap, ready["weight"]), "lag": (lag, square)}
        metrics |= {f"train/{name}": axis.all_reduce(pair) for name, pair in sums.items()}
        metrics |= {f"train/{name}": (value, jnp.float32(1)) for name, value in info.items()}
        return _with(state, auxiliary), metrics


def _with(state: Any, auxiliary: Any) -> Any:
    """The state with its auxiliary network; a bad gradient of either, or of both, counts once."""
    total = state.bad_total + ((auxiliary.bad_steps > 0) & (state.bad_steps == 0))
    bad = {"bad_steps": jnp.maximum(state.bad_steps, auxiliary.bad_steps), "bad_total": total}
    return state.replace(extra=state.extra | {"auxiliary": auxiliary}, **bad)


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    conditioning = conditioning_of(config.data)
    wiring = Wiring(config, conditioning)
    parallel.rows(config.evaluation.batch_size)  # refused here rather than when training is over
    struct, latents = jax.ShapeDtypeStruct, wiring.base.codec.config
    whole = struct((config.batch_size,), jnp.int32)
    batch = {
        **encoding.example(config, latents, latents.channels),
        "cond": struct((config.batch_size, *conditioning.null.shape), jnp.int32),
        "index": whole,
        "round": whole,
    }
    teacher = jax.eval_shape(wiring.base.init, jax.random.key(0)).params
    tokenizer = encoding.read_by(config, kl_vae_task.abstract_codec(config.parents.tokenizer))
    frozen = {"tokenizer": tokenizer, "teacher": teacher}
    state = jax.eval_shape(wiring.init, teacher)
    programs = {"regression": wiring.regressor and wiring.regressor.update}
    programs |= {"warm-up": wiring.warm_up if wiring.settings.warm_up else None, "update": wiring.update}
    return [Phase(name, one, (state, frozen, batch), kind="update") for name, one in programs.items() if one]


def studio(context: Context, params: Any) -> continuous.Studio:
    """The student as a user samples from it."""
    config = context.config
    wiring = Wiring(config, conditioning_of(config.data))
    return student_studio(context, wiring, mar_task.engine_of(context, wiring.base), params, "student, one call")


def build(context: Context) -> Task:
    """Wire the stage."""
    config, parallel = context.config, context.parallel
    train = generators.training_set(context)
    wiring = Wiring(config, train.conditioning)
    checks.same_codes({name: parent.workdir for name, parent in context.parents.items()}, "mar")
    engine = mar_task.engine_of(context, wiring.base)
    teacher = parallel.replicate(context.parents["mar"].params)
    frozen = {"tokenizer": encoding.read_by(config, engine.tokenizer), "teacher": teacher}
    rows = parallel.rows(config.batch_size)
    warm_up, update = parallel.update(wiring.warm_up), parallel.update(wiring.update)
    regress = parallel.update(wiring.regressor.update) if wiring.regressor else None
    gallery = MarvalGallery(context, wiring, engine, teacher)
    read = encoding.examples(train, config, rows)

    def batch(step):
        shown = read(step)
        return shown | {"round": np.full(len(shown["index"]), step, np.int32)}

    def step(state, batch):
        number = int(batch["round"][0])
        if number < wiring.warm_up_from:
            return regress(state, frozen, batch)
        return (warm_up if number < wiring.update_from else update)(state, frozen, batch)

    return Task(
        init=lambda key: parallel.init(wiring.init, context.parents["mar"].params),
        batch=batch,
        step=step,
        evaluate=gallery.evaluate,
        report=gallery.report,
    )
