"""Stage `speed_rl`: reinforcement learning on quality and on the number of network calls (Speed-RL-like).

Everything quantitative here is our choice (specs/speed_rl.md section 2): the paper's algorithm is not public.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax import state as train_state
from maskrl_jax.axis import Axis
from maskrl_jax.data.dataset import Conditioning, conditioning_of
from maskrl_jax.evaluate.bench import read_sampler
from maskrl_jax.evaluate.studio import Studio
from maskrl_jax.evaluate.systems import clocked_program, clocked_system, judge_scorer
from maskrl_jax.keys import ROLLOUT, sample_keys
from maskrl_jax.phase import Phase
from maskrl_jax.rl import credit
from maskrl_jax.rl.policy import Head, Policy
from maskrl_jax.rl.speed_update import RECORD, SpeedUpdate
from maskrl_jax.rl.token_terms import TokenLoss
from maskrl_jax.sampling import adaptive
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks import checks, generators
from maskrl_jax.tasks import judge as judge_task
from maskrl_jax.tasks import maskgit as maskgit_task
from maskrl_jax.tasks.base import Base
from maskrl_jax.tasks.gallery import Gallery
from maskrl_jax.tasks.rollouts import Rollouts, memory_of, reference_quality
from maskrl_jax.tasks.task import Context, Task

Array = jax.Array
CREDIT = ("advantage", "keep", "decision_advantage", "decision_keep")


class Wiring:
    """The stage's pure functions, closed over its static configuration."""

    def __init__(self, config: Any, conditioning: Conditioning):
        self.config, self.base = config, Base(config, conditioning)
        self.policy = Policy(**config.policy)
        self.head = Head(self.policy)
        self.speed = SpeedUpdate(
            policy=self.policy,
            head=self.head,
            tokens=TokenLoss(
                **config.loss.tokens,
                # `budget` scores the conditional branch as it is (specs/speed_rl.md 4.3).
                temperature=1.0 if self.policy.kind == "budget" else self.policy.temperature,
                guided=self.policy.guidance != 1.0 and self.policy.kind != "budget",
            ),
            model=self.base.model,
            num_tokens=self.base.sizes.num_tokens,
            mask_id=self.base.sizes.mask_id,
            seed=config.seed,
            micro_batch=config.micro_batch,
            kl_coefficient=config.loss.kl_coefficient,
            first_call_tokens=config.loss.first_call_tokens,
            first_call_kl=config.loss.first_call_kl,
            per_rollout_mean=config.loss.per_rollout_mean,
            scored_calls=tuple(config.loss.scored_calls) if "scored_calls" in config.loss else None,
        )
        self.sampler = self.speed.sampler
        # Policy `fixed` has no speed reward (specs/speed_rl.md 4.2).
        rewards_speed = {"speed": "off"} if self.policy.kind == "fixed" else {}
        self.credit = credit.CreditConfig(
            **{**config.credit, **rewards_speed},
            max_calls=self.policy.max_calls,
            std_of_quality=self.policy.kind == "budget",
        )
        self.optimizer = train_state.optimizer_of(config.optimizer, config.num_steps * config.inner_updates)
        self.tx = train_state.make_optimizer(self.optimizer)
        checks.speed(config, self.policy, self.credit, self.speed.tokens)

    def init(self, key: Array, params: Any) -> train_state.TrainState:
        """State that starts from the base model's parameters."""
        params = {"model": params, "head": self.head.init(key)}
        return train_state.create(params, self.tx, extra=memory_of(self.credit))

    # Rollout

    def rollout(self, params: Any, frozen: Any, batch: dict, axis: Any) -> dict:
        """Sample, decode and score a batch of rollouts, `rollout_rows` of a device at a time; per-sample outputs."""
        return axis.in_parts(lambda rows: self._rollout(params, frozen, rows, axis), batch, checks.parts(self.config))

    def _rollout(self, params: Any, frozen: Any, batch: dict, axis: Any) -> dict:
        keys_B = sample_keys(self.config.seed, ROLLOUT, batch["round"][0], batch["index"])
        logits = self.base.generator.logits(params["model"])
        cond, null = self.base.conditions(frozen, batch["cond"])
        setting = jnp.zeros(len(keys_B)) if self.policy.kind == "adaptive" else self.policy.ticks / batch["jump"]
        record = adaptive.rollout(
            logits,
            self.decide(params, setting),
            keys_B,
            cond,
            null,
            self.sampler,
            self.base.sizes.num_tokens,
            self.base.sizes.mask_id,
        )
        fields = {name: getattr(record, name) for name in RECORD}
        return fields | self.base.score(frozen, record.ids, batch["target"], axis)

    def settings(self, place: np.ndarray) -> dict[str, np.ndarray]:
        """What a request asks of the sampler, by a rollout's place in the batch."""
        steps = self.policy.steps() if self.policy.kind != "adaptive" else (1,)
        return {"jump": (self.policy.ticks // np.asarray(steps, np.int32))[place % len(steps)]}

    def decide(self, params: Any, setting_B: Array):
        """Decision function of the policy at a setting: speed dial of the head, or number of steps."""
        if self.policy.kind == "adaptive":
            return self.head.decide(params["head"], setting_B)
        return adaptive.given_strides(jnp.round(self.policy.ticks / setting_B).astype(jnp.int32))

    def passes(self, parallel: Any) -> int:
        """Most micro-batches of an update on one device."""
        calls = self.policy.levels if self.policy.kind == "budget" else self.policy.max_calls
        rows = self.config.batch_size // parallel.num_devices
        return -(-rows * calls // self.config.micro_batch)

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """`inner_updates` optimizer steps on recorded rollouts; the state's step counts batches of rollouts."""
        first, old, infos = state, state.params if self.config.inner_updates > 1 else None, []
        reference = frozen["reference"] if self.config.loss.kl_coefficient else None  # whose forward costs a quarter
        model, batch = self.base.learnt(frozen, batch)
        speed = dataclasses.replace(self.speed, model=model)
        entropy = _linear(self.config.loss.head_entropy, state.step, self.config.num_steps)
        for _ in range(self.config.inner_updates):
            grads, metrics = speed.gradients(state.params, old, reference, batch, entropy, axis)
            state, info = train_state.apply_gradients(state, grads, self.tx, ema_decay=self.optimizer.ema_decay)
            infos.append(info)
        weight = jnp.float32(len(infos))
        metrics |= {f"train/{name}": (sum(info[name] for info in infos), weight) for name in infos[0]}
        return state.replace(step=first.step + 1), metrics


def _linear(ends: tuple[float, float], step: Array, num_steps: int) -> Array:
    """Value that moves linearly from the first to the second number over the run."""
    return ends[0] + (ends[1] - ends[0]) * jnp.minimum(step / num_steps, 1.0)


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    conditioning = conditioning_of(config.data)
    wiring = Wiring(config, conditioning)
    parallel.rows(config.evaluation.batch_size)  # refused here rather than when training is over
    base, frozen, request = wiring.base.abstract(conditioning)
    state = jax.eval_shape(wiring.init, jax.random.key(0), base)
    whole = request["index"]
    request["jump"] = whole
    axis = Axis(1)
    made = jax.eval_shape(functools.partial(wiring.rollout, axis=axis), state.params, frozen, request)
    share = jax.ShapeDtypeStruct(whole.shape, jnp.float32)
    learn = {name: made[name] for name in RECORD} | dict.fromkeys(CREDIT, share)
    learn |= {"cond": request["cond"], "prompt": whole, "round": whole}
    calls = config.policy.max_calls
    return [
        Phase("rollout", wiring.rollout, (state.params, frozen, request), kind="map", loop_trips=calls),
        Phase("update", wiring.update, (state, frozen, learn), kind="update", loop_trips=wiring.passes(parallel)),
    ]


def without_head(config: Any) -> SamplerConfig:
    """The fixed sampler nearest to a policy: its order, noise and temperature, and a kappa that does not move."""
    policy = Policy(**config.policy)
    sampler, mode = SamplerConfig(**config.parents.maskgit.sampler), "confidence"
    if policy.kind == "adaptive" and policy.action == "threshold":
        mode = "uncertain" if policy.order == "uncertain" else "threshold"
        sampler = dataclasses.replace(sampler, threshold=policy.kappa)
    return dataclasses.replace(
        sampler,
        mode=mode,
        schedule="cosine",
        gumbel=policy.noise,
        temperature=policy.temperature,
        guidance=policy.guidance,
        guidance_schedule=policy.guidance_schedule,
        timesteps=policy.timesteps,
    )


def studio(context: Context, params: Any) -> Studio:
    """The trained policy as a user samples from it: by its head, or with a fixed number of steps."""
    # The base's own config names the sizes of the network.
    as_base = dataclasses.replace(context, config=context.config.parents.maskgit)
    base = maskgit_task.studio(as_base, params["model"])
    wiring = Wiring(context.config, base.dataset.conditioning)
    policy = wiring.policy
    sampler = without_head(context.config)
    program = clocked_program(base.engine, wiring.sampler, wiring.decide)
    tuned = clocked_system(base.engine, program, context.parallel.replicate(params), "tuned", "tuned policy")
    return dataclasses.replace(base, sampler=sampler, tuned=tuned, tuned_setting=policy.usual_setting)


def build(context: Context) -> Task:
    """Wire the stage: roll out, score and filter on the host, update."""
    config, parallel = context.config, context.parallel
    train = generators.dataset_of(context, "train")
    wiring = Wiring(config, train.conditioning)
    base = context.parents["maskgit"]
    checks.same_codes({name: parent.workdir for name, parent in context.parents.items()})
    engine = generators.engine_of(context, wiring.base.sizes, wiring.base.null)
    sampler = read_sampler(base.workdir, SamplerConfig(**base.config.sampler))
    frozen = wiring.base.frozen(engine, context)
    gallery = Gallery(context, wiring, engine, sampler, frozen["reference"])
    if wiring.credit.reads_reference:
        judge, judged_by = judge_task.load(context.parents["judge"]), jax.device_put(context.parents["judge"].params)
        scorer = dataclasses.replace(judge_scorer(judge, judged_by, train), verify=None)
        reference = reference_quality(context, train, gallery.base, sampler.num_steps, scorer, wiring.base.rewards)
    else:
        reference = np.zeros(len(train.pool(held_out=False)), np.float32)
    rollouts = Rollouts(context, wiring, train, frozen, reference)
    step = stepper(context, wiring, rollouts, frozen)
    return Task(
        init=lambda key: parallel.init(wiring.init, key, base.params),
        batch=rollouts.batch,
        step=step,
        evaluate=gallery.evaluate,
        report=gallery.report,
    )


def stepper(context: Context, wiring: Wiring, rollouts: Rollouts, frozen: Any):
    """Return the stage's step: roll out, score and filter on the host, update."""
    config, parallel = context.config, context.parallel
    update = parallel.update(wiring.update)

    def step(state, batch):
        number = int(batch["index"][0]) // config.batch_size
        out, result, memory, filtered = rollouts.collect(state, batch, number)
        rows = parallel.rows(config.batch_size)
        per_rollout = jax.device_get({name: getattr(result, name) for name in CREDIT})
        learn = {name: out[name] for name in RECORD} | {n: v.reshape(-1) for n, v in per_rollout.items()}
        learn |= {name: batch[name] for name in ("cond", "prompt")}
        learn |= {"round": np.full(config.batch_size, number, np.int32)}
        learn = parallel.put({name: value[rows] for name, value in learn.items()})
        values, alarm = rollouts.statistics(state, out, result, memory, filtered, batch)  # the update takes the memory
        state = state.replace(extra=parallel.replicate({"credit": memory, "alarm": alarm}))
        state, metrics = update(state, frozen, learn)
        return state, metrics | values

    return step
