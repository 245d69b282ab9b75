"""The base that a tuning stage starts from, and the rewards of what it makes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maskrl_jax.axis import Axis
from maskrl_jax.data.dataset import Conditioning
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.bench import Evaluation
from maskrl_jax.evaluate.systems import Engine
from maskrl_jax.rewards import energy_distance, mix
from maskrl_jax.rewards.alarm import AlarmConfig
from maskrl_jax.rewards.judges import judge_of
from maskrl_jax.rewards.remote import RemoteConfig, RemoteReward, read_probe
from maskrl_jax.rl.token_terms import Model
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks import checks, codecs, forms, generators
from maskrl_jax.tasks import maskgit as maskgit_task
from maskrl_jax.tasks.task import Context

Array = jax.Array
VERIFIED_SETS = ("shapes",)  # that have an exact verifier
VERIFIED = ("graded", "strict", "presence", "shape", "colour", "binding", "position", "coherence")
SCALES = ("raw", "group")
# What the logs have beside the rewards, under reward/.
LOGGED = ("total", "quality", "energy_distance", "failed", "sigma", "speed", "gate", "surplus")


@dataclasses.dataclass(frozen=True)
class Service:
    """A reward that another process gives: its name in the logs, its weight, how it is reached, what tests it."""

    name: str
    weight: float
    probe: str  # file of pictures with known scores (`remote.read_probe`)
    remote: RemoteConfig


def service_of(settings: Mapping[str, Any], judged: Sequence[str]) -> Service | None:
    """The service that a config asks for by its `url`, if any. UserError for a name that is taken, or no weight."""
    settings = dict(settings)
    if not settings["url"]:
        return None
    name, weight, probe = (settings.pop(key) for key in ("name", "weight", "probe"))
    if name in (*judged, *VERIFIED):
        raise UserError(f"service.name {name!r} is that of another reward; choose one of its own")
    if not name or "/" in name or name in (*LOGGED, *(f"{other}_std" for other in judged)):
        raise UserError(f"service.name {name!r} cannot be told from what else is logged; choose another")
    if not math.isfinite(weight) or weight == 0:
        raise UserError(f"service.weight {weight} must be a number other than 0; for no service leave its url empty")
    return Service(name, weight, probe, RemoteConfig(**settings))


def opened_service(known: Service) -> RemoteReward:
    """The service, tested on its probe. UserError where it is not there or not the right one."""
    if not known.probe:
        raise UserError("service.probe is empty; name a file of pictures with known scores, see docs/remote_rewards.md")
    service = RemoteReward(known.remote)
    service.self_test(read_probe(known.probe))
    return service


class Base:
    """The pure functions that tuning stages share, closed over a stage's static configuration."""

    def __init__(self, config: Any, conditioning: Conditioning):
        base = config.parents.maskgit
        self.config, self.trained_with, self.null = config, base, conditioning.null
        checks.same_tokenizer(config.parents.tokenizer, base.parents.tokenizer)
        checks.kept_exactly(base)
        self.sizes = forms.model_config(base, base.parents.tokenizer, conditioning)
        self.generator = forms.generator(self.sizes)
        self.model = Model(self.generator.row_features, self.generator.row_head, self.null)
        self.codec = codecs.codec(codecs.sizes(base.parents.tokenizer.model), None)
        self.judge = judge_of(config.parents.judge.model)
        checks.same_data(config)
        self.groups = checks.groups(config.batch_size, config.group)
        settings = Evaluation(**config.evaluation)
        generators.check_steps(SamplerConfig(**base.sampler), self.sizes.num_tokens, steps=settings.steps)
        # Runs of before there were alarms have none of these keys.
        self.judged, held_out = dict(config.rewards), dict(config.get("rewards_heldout", {}))
        names = self.judge.names
        mix.check(self.judged, names)
        # Stages of before there were services have no such key.
        self.service = service_of(config.get("service", {"url": ""}), names)
        self.rewards = self.judged | ({self.service.name: self.service.weight} if self.service else {})
        mix.check_held_out(tuple(held_out), self.rewards, (*names, *VERIFIED))
        known = (*names, *VERIFIED) if config.data.name in VERIFIED_SETS else names
        self.held_out = {name: weight for name, weight in held_out.items() if name in known}
        self.reward_scale = config.get("reward_scale", "raw")
        if self.reward_scale not in SCALES:
            raise UserError(f"reward_scale {self.reward_scale!r} is not one of {', '.join(SCALES)}")
        self.distance_scope = config.get("energy_distance_scope", "all")  # stages of before there was a scope lack it
        if self.distance_scope not in energy_distance.SCOPES:
            raise UserError(
                f"energy_distance_scope {self.distance_scope!r} is not one of {', '.join(energy_distance.SCOPES)}"
            )
        self.alarm = AlarmConfig(**config.get("alarm", {}))
        size = config.parents.tokenizer.model.image_size
        if size % energy_distance.SIDE:
            raise UserError(
                f"pictures of {size} pixels do not divide into {energy_distance.SIDE} x {energy_distance.SIDE} blocks"
            )

    def frozen(self, engine: Engine, context: Context) -> dict:
        """Constants of the stage's programs: tokenizer, judge and the base itself as the reference."""
        judge, base = (context.parallel.replicate(context.parents[name].params) for name in ("judge", "maskgit"))
        return {"tokenizer": engine.tokenizer, "judge": judge, "reference": base}

    def trained_on(self) -> tuple[str, ...]:
        """All that enters the reward, in words."""
        rewards = tuple(f"{name} x {weight:g}" for name, weight in self.rewards.items())
        weight = self.config.energy_distance
        size = f"{energy_distance.SIDE} x {energy_distance.SIDE}"
        whole = (
            "pictures of the training set" if self.distance_scope == "all" else "training pictures of the same prompt"
        )
        match = f"energy distance to {whole}, {size} block means, x {weight:g} (against collapse)"
        return (*rewards, match) if weight else rewards

    def conditions(self, frozen: Any, cond: Array) -> tuple[Any, Any]:
        """What the network reads of conditions [B,...] and of the null one."""
        return self.codec.told(frozen["tokenizer"], cond, self.null)

    def learnt(self, frozen: Any, batch: dict) -> tuple[Model, dict]:
        """The network of an update's losses, and the batch, with conditions as the network reads them."""
        cond, null = self.conditions(frozen, batch["cond"])
        return self.model._replace(null=null), batch | {"cond": cond}

    def score(self, frozen: Any, ids_BN: Array, target: Array, axis: Axis) -> dict[str, Array]:
        """Decode and score token grids: images, every score of the judge, and their weighted sum `quality`.

        What a service gives is added on the host (`rollouts.Rollouts`).
        """

        def shown(rows):
            images = self.codec.decode(frozen["tokenizer"], rows["ids"])
            return images, self.judge.score(frozen["judge"], images, rows["target"])

        most = [self.codec.at_once, self.judge.at_once and max(self.judge.at_once // axis.size, 1)]
        at_once = min([count for count in most if count], default=None)
        images, scores = axis.in_parts(shown, {"ids": ids_BN, "target": target}, at_once)
        parts = {f"reward/{name}": score for name, score in scores.items()}
        return parts | {"quality": mix.weighted_sum(scores, self.judged), "images": images}

    def abstract(self, conditioning: Conditioning) -> tuple[Any, Any, dict]:
        """Shapes of (base parameters, frozen, a request), without training anything."""
        config, base = self.config, maskgit_task.abstract_params(self.trained_with, conditioning)
        size, rows = config.parents.tokenizer.model.image_size, config.batch_size
        frozen = {
            "tokenizer": codecs.abstract(config.parents.tokenizer.model),
            "judge": self.judge.abstract(size),
            "reference": base,
        }
        whole = jax.ShapeDtypeStruct((rows,), jnp.int32)
        request = {
            "cond": jax.ShapeDtypeStruct((rows, *conditioning.null.shape), jnp.int32),
            "target": jax.ShapeDtypeStruct((rows, *self.judge.target_shape), jnp.int32),
            "index": whole,
            "round": whole,
        }
        return base, frozen, request
