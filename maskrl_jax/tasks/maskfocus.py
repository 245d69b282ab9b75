"""Stage `maskfocus`: better images from the same number of calls, by tuning on critical steps (arXiv 2512.18766).

specs/maskfocus.md says what of it is published, what is read from the official code and what is our choice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maskrl_jax import state as train_state
from maskrl_jax.axis import Axis
from maskrl_jax.data.dataset import Conditioning, conditioning_of
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import figures, gain, pictures, step_figures
from maskrl_jax.evaluate.bench import read_sampler
from maskrl_jax.evaluate.illustrate import Illustration
from maskrl_jax.evaluate.studio import Studio
from maskrl_jax.evaluate.systems import fixed_system
from maskrl_jax.keys import ROLLOUT, sample_keys
from maskrl_jax.phase import Phase
from maskrl_jax.rl import credit, critical_steps
from maskrl_jax.rl.critical_steps import StepChoice
from maskrl_jax.rl.focus_update import FocusUpdate
from maskrl_jax.rl.token_terms import TokenLoss
from maskrl_jax.sampling import routing
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks import checks, generators
from maskrl_jax.tasks import maskgit as maskgit_task
from maskrl_jax.tasks.base import Base
from maskrl_jax.tasks.rollouts import Rollouts, memory_of
from maskrl_jax.tasks.showcase import Showcase
from maskrl_jax.tasks.task import Context, Task
from maskrl_jax.writers import read_metrics

Array = jax.Array
LEARN = ("ids", "commit_step")  # of a rollout, what an update reads
NOISES = ("fresh", "frozen")
ZERO_SPREAD = ("drop", "kl_only")
CAPTIONS = {
    "chosen_steps": "Share of samples that had a sampling step, from 1, among their optimised ones, over training.",
    "information_gain": "How alike the prediction of a step and the final image are, and how much a step moves that.",
    "exploring": "Routed rollouts of the tuned model on training prompts: of a group what explored most and least.",
}
NOTES = (
    "The published results are of Meissonic with other rewards; no parity is claimed.",
    "By design the likelihood is of the final image, masked anew, not of what the sampler did.",
)


class Wiring:
    """The stage's pure functions, closed over its static configuration."""

    def __init__(self, config: Any, conditioning: Conditioning):
        self.config, self.base = config, Base(config, conditioning)
        self.routing = routing.RoutingConfig(**config.rollout)
        self.choice = StepChoice(
            num_steps=self.routing.num_steps,
            num_tokens=self.base.sizes.num_tokens,
            timesteps=self.routing.timesteps,
            **config.steps,
        )
        loss = config.loss
        if not 0 <= loss.clip_eps < 1:
            raise UserError(f"loss.clip_eps {loss.clip_eps} must lie in [0, 1); 0 clips nothing")
        self.focus = FocusUpdate(
            choice=self.choice,
            tokens=TokenLoss(
                likelihood="kept",
                distribution="cond",
                kl={"full": "reverse"}.get(loss.kl, loss.kl),
                guided=False,
                chunk=loss.chunk,
                clip_low=loss.clip_eps,
                clip_high=loss.clip_eps,
                clipped=loss.clip_eps > 0,
            ),
            model=self.base.model,
            mask_id=self.base.sizes.mask_id,
            group=config.group,
            seed=config.seed,
            micro_batch=config.micro_batch,
            remask=loss.remask,
            mode=loss.update_mode,
            norm=loss.norm,
            kl_coefficient=loss.kl_coefficient,
            negative_weight=config.get("negative_weight", 1.0),  # runs of before there was the weight lack it
        )
        # Quality alone: neither speed reward nor gate, and no filter but that of groups that teach nothing.
        self.credit = credit.CreditConfig(
            max_calls=self.routing.num_steps, min_calls=1, speed="off", gate="off", low_quality="off", percentile=0.0
        )
        self.optimizer = train_state.optimizer_of(
            config.optimizer, config.num_steps, updates_per_step=self.focus.updates
        )
        self.tx = train_state.make_optimizer(self.optimizer)
        for name, value, allowed in (
            ("rollout_noise", config.rollout_noise, NOISES),
            ("zero_spread", config.zero_spread, ZERO_SPREAD),
        ):
            if value not in allowed:
                raise UserError(f"{name} {value!r} is not one of {', '.join(allowed)}")
        gain.Goal(**config.aim)  # refused here rather than when training is over
        if self.base.sizes.codebook_size > 2**16:
            raise UserError(f"predictions are kept as uint16; {self.base.sizes.codebook_size} codes are too many")
        if config.micro_batch < 1:
            raise UserError(f"micro_batch {config.micro_batch} must be at least 1")

    def init(self, key: Array, params: Any) -> train_state.TrainState:
        """State that starts from the base model's parameters."""
        return train_state.create(params, self.tx, extra=memory_of(self.credit))

    def settings(self, place: np.ndarray) -> dict[str, np.ndarray]:
        """What a request asks of the sampler beyond its prompt: nothing."""
        return {}

    def rollout(self, params: Any, frozen: Any, batch: dict, axis: Any) -> dict:
        """Sample, decode and score a batch of routed rollouts, whole groups at a time; per-sample outputs."""
        rollout = lambda rows: self._rollout(params, frozen, rows, axis)  # noqa: E731
        return axis.in_parts(rollout, batch, checks.parts(self.config), self.config.group)

    def _rollout(self, params: Any, frozen: Any, batch: dict, axis: Any) -> dict:
        round_, index = batch["round"][0], batch["index"]
        if self.config.rollout_noise == "frozen":  # as the official code: the same noise at every iteration
            round_, index = 0, index % self.config.group
        base = self.base
        cond, null = base.conditions(frozen, batch["cond"])
        made = routing.rollout(
            base.generator.logits(params),
            sample_keys(self.config.seed, ROLLOUT, round_, index),
            cond,
            null,
            self.routing,
            base.sizes.num_tokens,
            base.sizes.mask_id,
            self.config.group,
        )
        fields = {
            "ids": made.ids,
            "commit_step": made.commit_step,
            "similarity": critical_steps.similarity(
                base.codec.codebook(frozen["tokenizer"]), made.predictions, made.ids
            ),
            "explored": made.explore.mean(0, dtype=jnp.float32),
            "calls": jnp.full(made.ids.shape[:1], self.routing.num_steps, jnp.int32),
        }
        return fields | base.score(frozen, made.ids, batch["target"], axis)

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """One optimizer update a chosen step (sequential), or one of all; the state's step counts rollouts."""
        model, batch = self.base.learnt(frozen, batch)
        focus, first = dataclasses.replace(self.focus, model=model), state
        old = state.params if focus.mode == "sequential" else None
        reference = frozen["reference"] if focus.kl_coefficient else None

        def one(state, slots):
            grads, metrics, error = focus.gradients(state.params, old, reference, batch, slots, axis)
            state, info = train_state.apply_gradients(state, grads, self.tx, ema_decay=self.optimizer.ema_decay)
            metrics |= {f"train/{name}": (value, jnp.float32(1)) for name, value in info.items()}
            return state.replace(step=first.step), (metrics, error)

        slots = jnp.arange(self.choice.slots, dtype=jnp.int32).reshape(focus.updates, -1)
        state, (metrics, error) = jax.lax.scan(one, state, slots)
        metrics = jax.tree.map(lambda x: x.sum(0), metrics)
        metrics["rl/ratio_max_err"] = (error[0], jnp.float32(1))  # before the first update: only rounding
        metrics["rl/ratio_drift"] = (error[-1], jnp.float32(1))
        return state.replace(step=first.step + 1), metrics


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    conditioning = conditioning_of(config.data)
    wiring = Wiring(config, conditioning)
    parallel.rows(config.evaluation.batch_size)  # refused here rather than when training is over
    checks.whole_groups(config.batch_size, config.group, parallel)
    base, frozen, request = wiring.base.abstract(conditioning)
    state = jax.eval_shape(wiring.init, jax.random.key(0), base)
    made = jax.eval_shape(functools.partial(wiring.rollout, axis=Axis(1)), state.params, frozen, request)
    whole, rows = request["index"], config.batch_size
    learn = {name: made[name] for name in LEARN} | {name: request[name] for name in ("cond", "index", "round")}
    learn |= dict.fromkeys(("advantage", "keep"), jax.ShapeDtypeStruct(whole.shape, jnp.float32))
    learn["steps"] = jax.ShapeDtypeStruct((rows, wiring.choice.slots), jnp.int32)
    slots = wiring.choice.slots // wiring.focus.updates
    passes = -(-rows // parallel.num_devices * slots // config.micro_batch)
    return [
        Phase("rollout", wiring.rollout, (state.params, frozen, request), kind="map"),
        Phase("update", wiring.update, (state, frozen, learn), kind="update", loop_trips=passes),
    ]


def studio(context: Context, params: Any) -> Studio:
    """The tuned model as a user samples from it: with the base's own best sampler."""
    as_base = dataclasses.replace(context, config=context.config.parents.maskgit)
    base = maskgit_task.studio(as_base, params)
    sampler = read_sampler(context.parents["maskgit"].workdir, base.sampler)
    tuned = fixed_system(base.engine, base.program, base.params, sampler, "tuned", "tuned")
    return dataclasses.replace(base, sampler=sampler, tuned=tuned, tuned_setting=sampler.num_steps)


def build(context: Context) -> Task:
    """Wire the stage: roll out, score, choose steps on the host, update."""
    config, parallel = context.config, context.parallel
    train = generators.dataset_of(context, "train")
    wiring = Wiring(config, train.conditioning)
    checks.same_codes({name: parent.workdir for name, parent in context.parents.items()})
    base = context.parents["maskgit"]
    engine = generators.engine_of(context, wiring.base.sizes, wiring.base.null)
    frozen = wiring.base.frozen(engine, context)
    rollouts = Rollouts(context, wiring, train, frozen, np.zeros(len(train.pool(held_out=False)), np.float32))
    sampler = read_sampler(base.workdir, SamplerConfig(**base.config.sampler))
    show = Showcase(
        context,
        wiring.base,
        engine,
        sampler,
        frozen["reference"],
        title=f"MaskFocus on {config.data.name}: {wiring.choice.select} steps, routing {wiring.routing.routing}",
        facts=_facts(wiring),
        notes=(*NOTES, *checks.timesteps_notes(wiring.routing.timesteps, sampler.timesteps)),
        draw=functools.partial(_figures, context, wiring, rollouts),
    )
    update, choose = parallel.update(wiring.update), jax.jit(wiring.focus.steps)
    rows = parallel.rows(config.batch_size)

    def step(state, batch):
        number = int(batch["index"][0]) // config.batch_size
        out, result, memory, filtered = rollouts.collect(state, batch, number)
        round_ = np.full(config.batch_size, number, np.int32)
        seen = {"similarity": out["similarity"], "index": batch["index"], "round": round_}
        steps = jax.device_get(choose(jax.device_put(seen)))
        advantage, keep, scored = (jax.device_get(x) for x in (result.advantage, result.keep, result.scored))
        if config.zero_spread == "kl_only":
            keep = np.broadcast_to(scored[:, None], keep.shape).astype(np.float32)
        learn = {name: out[name] for name in LEARN} | {"cond": batch["cond"], "index": batch["index"]}
        learn |= {"advantage": advantage.reshape(-1), "keep": keep.reshape(-1), "steps": steps, "round": round_}
        learn = parallel.put({name: value[rows] for name, value in learn.items()})
        values, alarm = rollouts.statistics(state, out, result, memory, filtered, batch)  # the update takes the memory
        values |= _focus_statistics(wiring, out, steps)
        state = state.replace(extra=parallel.replicate({"credit": memory, "alarm": alarm}))
        state, metrics = update(state, frozen, learn)
        return state, metrics | values

    return Task(
        init=lambda key: parallel.init(wiring.init, key, base.params),
        batch=rollouts.batch,
        step=step,
        evaluate=show.evaluate,
        report=show.report,
    )


def _facts(wiring: Wiring) -> dict[str, str]:
    """What the report's protocol adds."""
    routed, choice, focus = wiring.routing, wiring.choice, wiring.focus
    return {
        "rollouts": f"{routed.num_steps} steps, routing {routed.routing}, guidance {routed.guidance:g}, Gumbel "
        f"{routed.noise:g}, temperature {routed.temperature:g}",
        "optimised": f"{choice.slots - choice.first_call} of {choice.candidates} steps, {choice.select} (scope "
        f"{choice.scope}){', and the first call' if choice.first_call else ''}, masks "
        f"{focus.remask}, {focus.mode} ({focus.updates} optimizer updates a round), advantages below zero x "
        f"{focus.negative_weight:g}",
    }


def _figures(context: Context, wiring: Wiring, rollouts: Rollouts, params: Any) -> Callable[[str], list]:
    """What draws chosen steps, information gain and exploring samples into a folder; all processes roll out."""
    out, captions = rollouts.shown(params)
    explored = out["explored"].reshape(-1, wiring.config.group)
    images = np.round(255 * out["images"]).astype(np.uint8).reshape(*explored.shape, *out["images"].shape[1:])
    first = np.arange(min(8, len(explored)))
    rows = {
        "explored\nmost": images[first, explored.argmax(1)[first]],
        "explored\nleast": images[first, explored.argmin(1)[first]],
    }
    counts = routing.mask_counts(wiring.choice.num_tokens, wiring.choice.num_steps)

    def draw(folder: str) -> list[Illustration]:
        series = figures.logged_series(read_metrics(context.workdir))
        place, steps = epath.Path(folder, "figures"), wiring.choice.num_steps - 1
        drawn = {
            "chosen_steps": step_figures.chosen_steps(place / "chosen_steps.png", series, steps),
            "information_gain": step_figures.information_gain(
                place / "information_gain.png", series, counts / counts[0]
            ),
        }
        if wiring.routing.routing == "on":  # else all samples explore alike
            names = [captions[i * wiring.config.group] for i in first]
            drawn["exploring"] = pictures.sample_grid(place / "exploring.png", rows, names)
        return [
            Illustration(f"figures/{name}.png", CAPTIONS[name], image)
            for name, image in drawn.items()
            if image is not None
        ]

    return draw


def _focus_statistics(wiring: Wiring, out: dict, steps: np.ndarray) -> dict[str, float]:
    """Which steps were chosen, how similarity rises, and what exploring samples earn beside the others."""
    share = np.bincount(steps[steps >= 0], minlength=wiring.routing.num_steps - 1) / len(steps)
    similarity = out["similarity"].mean(0)
    values = {f"critical/chosen@{step:03d}": x for step, x in enumerate(share)}
    values |= {f"critical/similarity@{step:03d}": x for step, x in enumerate(similarity)}
    explored, quality = (out[name].reshape(-1, wiring.config.group) for name in ("explored", "quality"))
    most = explored > np.median(explored, axis=1, keepdims=True)
    if most.any() and not most.all() and np.isfinite(quality).all():
        values |= {"reward/mostly_exploring": quality[most].mean(), "reward/mostly_exploiting": quality[~most].mean()}
    return {name: float(value) for name, value in values.items()}
