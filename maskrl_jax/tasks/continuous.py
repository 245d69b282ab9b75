"""What all stages of the continuous-token family share: MAR's network as functions, and its systems."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.axis import gathered
from maskrl_jax.data.dataset import Conditioning
from maskrl_jax.distill import diffusion
from maskrl_jax.distill.diffusion import Process
from maskrl_jax.distill.gsim import guided
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import studio
from maskrl_jax.evaluate.bench import Evaluation
from maskrl_jax.evaluate.measure import Generated, System
from maskrl_jax.keys import EVALUATE, sample_keys
from maskrl_jax.models.kl_vae import KLVAEConfig
from maskrl_jax.models.mar import Mar, MarConfig
from maskrl_jax.parallel import Parallel
from maskrl_jax.sampling import mar
from maskrl_jax.sampling.mar import Dials, MarPlan
from maskrl_jax.tasks.kl_vae import LatentCodec

Array = jax.Array
DIFFUSION_STEPS = 1000  # T, published


@dataclasses.dataclass(frozen=True)
class MarSampler:
    """How MAR is sampled.

    num_steps: N iterations. inner_steps: of the chain in each. method: `ddpm` (published) or `ddim`.
    guidance, guidance_schedule: w of eps_null + w (eps - eps_null), 1 is none; `linear` or `constant`.
    temperature: of the noise: the chain's, or what the one call of a student turns into a token.
    full_noise: iterations that see fewer tokens than this keep temperature 1 (ours).
    bucket: see `MarPlan`.
    """

    num_steps: int = 16
    inner_steps: int = 100
    method: str = "ddpm"
    guidance: float = 3.0
    guidance_schedule: str = "linear"
    temperature: float = 1.0
    full_noise: int = 0
    bucket: int = 8

    def __post_init__(self):
        if self.method not in diffusion.METHODS:
            raise ValueError(f"sampler.method {self.method!r} is not one of {', '.join(diffusion.METHODS)}")
        if self.temperature <= 0:
            raise ValueError(f"sampler.temperature {self.temperature} must be above 0")
        if self.full_noise < 0:
            raise ValueError(f"sampler.full_noise {self.full_noise} must be at least 0")
        diffusion.respaced(DIFFUSION_STEPS, self.inner_steps)
        self.dials(MarPlan(max(self.num_steps, 1), self.num_steps, self.bucket))

    def in_words(self) -> str:
        return (
            f"{self.method}, {self.inner_steps} steps of the chain, guidance {self.guidance:g} "
            f"({self.guidance_schedule}), {self.noise_in_words()}"
        )

    def noise_in_words(self) -> str:
        first = f", 1 of iterations that see fewer than {self.full_noise} tokens" if self.full_noise else ""
        return f"temperature {self.temperature:g}{first}"

    def dials(self, plan: MarPlan) -> Dials:
        return plan.dials(self.guidance, self.guidance_schedule, self.temperature, self.full_noise)

    def plan(self, num_tokens: int) -> MarPlan:
        return MarPlan(num_tokens, self.num_steps, self.bucket)


def check_steps(settings: Evaluation, sampler: MarSampler, num_tokens: int) -> None:
    """Raise ValueError for a number of iterations that the grid does not hold: a report asks when training is over."""
    for steps in (settings.glance_steps, *settings.steps):
        dataclasses.replace(sampler, num_steps=steps).plan(num_tokens)


def model_config(config: Any, latents: KLVAEConfig, conditioning: Conditioning) -> MarConfig:
    """Sizes that follow from the tokenizer and the data, and those that the config names."""
    grid = {"num_tokens": latents.num_tokens, "channels": latents.channels}
    length = max(conditioning.length, 1)
    return MarConfig(**grid, cond_vocab=conditioning.vocab_size, cond_length=length, **config.model)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """MAR's module as functions of its parameters."""

    model: Mar

    def backbone(self, params: Any) -> mar.Backbone:
        return functools.partial(self.model.apply, params, method="backbone")

    def condition(self, params: Any, z: Array) -> Array:
        """What the head reads of z, once for all its calls."""
        return self.model.apply(_with_whole_head(params), z, method="head_condition")

    def outputs(self, params: Any, state: Array, timestep: Array, condition: Array) -> Array:
        """What the head says of x_t, [..., 2C], as it is trained to."""
        return self.model.apply(_with_whole_head(params), state, timestep, condition, method="denoise")

    def head(self, params: Any, state: Array, timestep: Array, condition: Array) -> Array:
        """Noise of x_t, whatever the head predicts, and the share of its variance; [..., 2C]."""
        out = self.outputs(params, state, timestep, condition)
        if self.model.config.prediction == "noise":
            return out
        guess, share = diffusion.split(out)
        places = jnp.broadcast_to(timestep, state.shape[:-1])
        noise = diffusion.noise_of_velocity(diffusion.make_process(DIFFUSION_STEPS), state, places, guess)
        return jnp.concatenate([noise, share], axis=-1)


def _with_whole_head(params: Any) -> Any:
    """Parameters whose head is whole on every device: split over them, it would split its rows by features instead."""
    return {**params, "params": {**params["params"], "denoiser": gathered(params["params"]["denoiser"])}}


def row_noise(keys_BR: Array, place: Array | int, channels: int) -> Array:
    """Normal noise [B,R,C], a row from its own key; another at every place."""
    one = lambda key: jax.random.normal(jax.random.fold_in(key, place), (channels,))  # noqa: E731
    return jax.vmap(jax.vmap(one))(keys_BR)


def guided_head(network: Network, params: Any, known: Array, scale: Array | float) -> Callable:
    """(x_t [...,C], timestep) -> (noise, v) at the head's conditions [1 or 2,...,W]; a second is the null's."""

    def head(state, timestep):
        states = jnp.broadcast_to(state[None], (len(known), *state.shape))
        guess, share = diffusion.split(network.head(params, states, timestep, known))
        return (guess[0] if len(known) == 1 else guided(guess[1], guess[0], scale)), share[0]

    return head


def chain_draw(network: Network, params: Any, process: Process, method: str) -> mar.Draw:
    """Draw rows by the teacher's chain; with a null condition every step is one doubled call of the head."""

    def draw(z: Array, null: Array | None, dials: Dials, keys_BR: Array) -> Array:
        both = z[None] if null is None else jnp.stack([z, null])
        head = guided_head(network, params, network.condition(params, both), dials.guidance)
        noise = functools.partial(row_noise, keys_BR, channels=network.model.config.channels)
        return diffusion.run_chain(process, head, noise(len(process)), noise, dials.temperature, method)

    return draw


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """What generation needs beside the parameters that are compared.

    tokenizer: parameters of the VAE. null: null condition of one sample.
    """

    parallel: Parallel
    network: Network
    codec: LatentCodec
    tokenizer: Any
    null: np.ndarray

    @functools.cache  # noqa: B019 - as many entries as programs, for the life of the engine
    def program(self, plan: MarPlan, is_guided: bool, draw_of: Callable[[Any], mar.Draw], pictures: bool):
        """Compile one plan; `draw_of(params)` draws rows. Without `pictures` it ends with the tokens."""

        def program(p, frozen, batch, axis):
            keys_B = sample_keys(0, EVALUATE, batch["seed"][0], batch["index"])
            cond = batch["cond"]
            null = jnp.broadcast_to(jnp.asarray(self.null)[None], cond.shape)
            conds, channels = [cond, null] if is_guided else [cond], self.network.model.config.channels
            draw, backbone = draw_of(p), self.network.backbone(p)
            made = mar.generate(backbone, draw, keys_B, conds, frozen["dials"], plan, channels)
            if not pictures:
                return {"tokens": made.tokens}
            images = self.codec.decode(frozen["tokenizer"], made.tokens)
            calls = jnp.full(len(cond), plan.num_steps, jnp.float32)
            return {"images": images, "calls": calls, "commit_step": made.commit_step}

        return self.parallel.map(program)

    def run(self, program: Callable, params: Any, frozen: Mapping[str, Any], cond, sample_ids, seed) -> dict:
        """Run a program over a batch that every process holds; rows of all processes as numpy."""
        batch = {"cond": cond, "index": sample_ids, "seed": np.full(len(sample_ids), seed, np.int32)}
        rows = self.parallel.rows(len(sample_ids))
        return self.parallel.gather(program(params, frozen, {name: x[rows] for name, x in batch.items()}))


def system(
    engine: Engine, params: Any, sampler: MarSampler, draw_of: Callable, is_guided: bool, name: str, label: str
) -> System:
    """A network whose rows are drawn by `draw_of(params)`; the setting is the number of iterations."""

    def generate(setting, cond, sample_ids, seed):
        plan = dataclasses.replace(sampler, num_steps=int(setting)).plan(engine.codec.config.num_tokens)
        program = engine.program(plan, is_guided, draw_of, True)
        frozen = {"tokenizer": engine.tokenizer, "dials": sampler.dials(plan)}
        return Generated(**engine.run(program, params, frozen, cond, sample_ids, seed))

    return System(name, label, generate)


def chain_system(engine: Engine, params: Any, sampler: MarSampler, name: str, label: str) -> System:
    """MAR with its chain."""
    draw_of = chain_draws(engine.network, sampler.inner_steps, sampler.method)
    return system(engine, params, sampler, draw_of, sampler.guidance != 1, name, label)


@functools.cache
def chain_draws(network: Network, inner_steps: int, method: str) -> Callable:
    """One function for all systems of a chain, so that they share their programs."""
    process = diffusion.make_process(DIFFUSION_STEPS, inner_steps)
    return lambda params: chain_draw(network, params, process, method)


@dataclasses.dataclass(frozen=True)
class Studio:
    """A trained network of the family as a user samples from it (`evaluate.studio` for discrete tokens).

    Attributes:
      engine: generation around the model.
      dataset: held-out split; encodes prompts.
      sampler: the one that was chosen for the network.
      system: a sampler -> the network under it.
      takes: names of the sampler's settings that mean something to it.
    """

    engine: Engine
    dataset: Any
    sampler: MarSampler
    system: Callable[[MarSampler], System]
    takes: tuple[str, ...] = (
        "num_steps",
        "inner_steps",
        "method",
        "guidance",
        "guidance_schedule",
        "temperature",
        "full_noise",
    )

    def asked(self, flags: Mapping[str, Any], given: None) -> tuple[System, int, str]:
        """The system that flags of `sample` ask for, its iterations, and what it is in words."""
        for name in flags:
            if name not in self.takes:
                known = ", ".join(f"--{one}" for one in self.takes)
                raise UserError(f"--{name} changes nothing of this run; it takes {known}")
        sampler = dataclasses.replace(self.sampler, **flags)
        studio.check_steps(sampler.num_steps, self.engine.codec.config.num_tokens)
        made = self.system(sampler)
        words = sampler.in_words() if "inner_steps" in self.takes else sampler.noise_in_words()
        return made, sampler.num_steps, f"{made.label}: {sampler.num_steps} iterations, {words}"

    def inpainting(self, picture: np.ndarray, box: list[int]) -> None:
        raise UserError("--image is for discrete tokens; this run's are continuous, and it makes whole pictures")
