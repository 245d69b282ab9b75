"""Measure one system at one setting: generate, score, summarise, keep every sample's numbers."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from maskrl_jax import paths
from maskrl_jax.evaluate import bootstrap, diversity, frechet
from maskrl_jax.evaluate.bootstrap import Interval


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a system returns for n samples."""

    images: np.ndarray  # float32 [n, H, W, 3] in [0, 1]
    calls: np.ndarray  # [n], network calls that each sample needed (guidance branches count once); a light step a share
    commit_step: np.ndarray  # uint8 [n, N], the step at which each token was committed, from 0
    steps: np.ndarray | None = None  # int32 [n], where not every step is a call

    def first(self, count: int) -> "Generated":
        """The first samples alone."""
        steps = None if self.steps is None else self.steps[:count]
        return Generated(self.images[:count], self.calls[:count], self.commit_step[:count], steps)

    @property
    def taken(self) -> np.ndarray:
        """Steps that each sample took, [n]."""
        return self.calls if self.steps is None else self.steps


@dataclasses.dataclass(frozen=True)
class System:
    """A generator to be measured.

    `generate(setting, cond [n, ...], sample_ids int32 [n], seed)`: the setting is the number of steps of a
    fixed sampler or the speed dial of an adaptive one. Randomness may depend on (seed, sample id) only, never
    on the position in the batch, so that two systems measured with the same seed share their noise.
    """

    name: str  # key in tables and results.json
    label: str  # what figures call it
    generate: Callable[[float, np.ndarray, np.ndarray, int], Generated]
    identity: str = ""  # of all that its samples depend on, where its measurements shall be kept; "" where not


@dataclasses.dataclass(frozen=True)
class Scorer:
    """What judges images [n, H, W, 3] of prompts (n strings).

    `judge` returns name -> [n], among them "features" [n, D], which feed distance and diversity and are no
    metric. `verify` (None where a set has no exact verifier) returns name -> [n] only.
    """

    judge: Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]]
    verify: Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]] | None = None
    identity: str = ""  # of what its scores depend on

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        scores = dict(self.judge(images, prompts))
        if self.verify is not None:
            scores.update(self.verify(images, prompts))
        return {name: np.asarray(value) for name, value in scores.items()}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is held equal for all systems: prompts, samples a prompt, noise, real features."""

    prompts: tuple[str, ...]  # P
    cond: np.ndarray  # [P, ...]
    group: int  # G samples a prompt
    batch_size: int  # of every call of `generate`; the last batch is filled up, so nothing recompiles
    seed: int
    real_features: np.ndarray | None = None  # [M, D] of held-out real images; None where no distance is asked for
    keep: int = 0  # first samples of the first `keep` prompts, whose pictures stay in the point


@dataclasses.dataclass(frozen=True)
class Point:
    """One system at one setting. `per_sample` and `kept` stay out of the JSON form."""

    system: str
    label: str
    setting: float
    seed: int
    num_prompts: int
    group: int
    calls_mean: float
    calls_sd: float
    calls_histogram: dict[float, int]
    metrics: dict[str, Interval]
    frechet: float | None  # this and the next two: None where no distance was asked for
    precision: float | None
    recall: float | None
    diversity: Interval | None  # None with one sample a prompt
    per_sample: dict[str, np.ndarray] = dataclasses.field(repr=False)  # [n] or [n, D], prompt-major
    kept: dict[str, np.ndarray] = dataclasses.field(
        repr=False
    )  # images uint8 [keep, H, W, 3], commit_step, steps taken as `calls`

    def per_prompt(self, metric: str) -> np.ndarray:
        """Return the mean over a prompt's samples, float64 [P]; "diversity" is known per prompt only."""
        if metric == "diversity":
            return diversity.within_prompt_diversity(self._grouped("features"))
        return self._grouped(metric).mean(axis=1)

    def _grouped(self, name: str) -> np.ndarray:
        values = np.asarray(self.per_sample[name], np.float64)
        return values.reshape(self.num_prompts, self.group, *values.shape[1:])

    def to_json(self) -> dict:
        """Return plain numbers, lists and dicts."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("per_sample", "kept")]
        plain = {name: getattr(self, name) for name in names}
        plain["calls_histogram"] = {f"{calls:g}": count for calls, count in self.calls_histogram.items()}
        plain["metrics"] = {name: dataclasses.asdict(value) for name, value in self.metrics.items()}
        plain["diversity"] = None if self.diversity is None else dataclasses.asdict(self.diversity)
        return plain


def collect(system: System, setting: float, protocol: Protocol, scorer: Scorer) -> tuple[dict, dict]:
    """Generate and score all samples in batches of one size; returns ([n, ...] numbers, kept pictures).

    Sample i belongs to prompt i // G.
    """
    total = len(protocol.prompts) * protocol.group
    wanted = np.arange(protocol.keep) * protocol.group
    numbers, kept = [], []
    for start in range(0, total, protocol.batch_size):
        ids = np.arange(start, start + protocol.batch_size, dtype=np.int32)
        real = ids < total
        rows = np.minimum(ids, total - 1) // protocol.group
        made = system.generate(setting, protocol.cond[rows], ids, protocol.seed)
        images = np.asarray(made.images, np.float32)
        scores = scorer(images, [protocol.prompts[row] for row in rows])
        numbers.append({name: value[real] for name, value in {**scores, "calls": np.asarray(made.calls)}.items()})
        picked = real & np.isin(ids, wanted)
        kept.append(_pictures(images[picked], np.asarray(made.commit_step)[picked], np.asarray(made.taken)[picked]))
    return _concatenate(numbers), _concatenate(kept)


def _pictures(images: np.ndarray, commit_step: np.ndarray, calls: np.ndarray) -> dict[str, np.ndarray]:
    quantised = np.round(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)
    return {"images": quantised, "commit_step": commit_step, "calls": calls}


def _concatenate(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def measure(system: System, setting: float, protocol: Protocol, scorer: Scorer) -> Point:
    """Return the point of one system at one setting: calls, scores with bounds, distance, diversity.

    Sample i belongs to prompt i // G. Bounds are 95 % percentile bootstrap bounds over prompts.

    Raises:
      ValueError: if prompts and conditions differ in number, or a score is not finite or not [n].
    """
    num_prompts, group = len(protocol.prompts), protocol.group
    if num_prompts != len(protocol.cond) or not 0 <= protocol.keep <= num_prompts:
        raise ValueError(f"{num_prompts} prompts, {len(protocol.cond)} conditions, {protocol.keep} to keep")
    numbers, kept = collect(system, setting, protocol, scorer)
    scores = {name: value for name, value in numbers.items() if name not in ("features", "calls")}
    for name, value in scores.items():
        if value.shape != (num_prompts * group,) or not np.isfinite(value).all():
            raise ValueError(f"score {name!r} must be finite [{num_prompts * group}], got shape {value.shape}")
    calls, features = numbers["calls"], numbers["features"]
    real, distance, precision, recall = protocol.real_features, None, None, None
    if real is not None:
        distance = frechet.frechet_distance(real, features)
        precision, recall = frechet.precision_recall(real, features)
    spread = None
    if group > 1:
        grouped = features.reshape(num_prompts, group, -1)
        spread = bootstrap.mean_interval(diversity.within_prompt_diversity(grouped))
    return Point(
        system=system.name,
        label=system.label,
        setting=setting,
        seed=protocol.seed,
        num_prompts=num_prompts,
        group=group,
        calls_mean=float(calls.mean()),
        calls_sd=float(calls.std()),
        calls_histogram=dict(
            zip(*(x.tolist() for x in np.unique(np.round(calls, 3), return_counts=True)), strict=True)
        ),
        metrics={
            name: bootstrap.mean_interval(value.reshape(num_prompts, group).mean(axis=1))
            for name, value in scores.items()
        },
        frechet=distance,
        precision=precision,
        recall=recall,
        diversity=spread,
        per_sample=numbers,
        kept=kept,
    )


def pack(point: Point) -> dict[str, np.ndarray]:
    """Return all of a point as arrays."""
    arrays = {f"per_sample/{name}": value for name, value in point.per_sample.items()}
    arrays |= {f"kept/{name}": value for name, value in point.kept.items()}
    return arrays | {"plain": np.array(json.dumps(point.to_json()))}


def unpack(arrays: dict[str, np.ndarray]) -> Point:
    """Return the point that `pack` took apart."""
    parts = {"per_sample": {}, "kept": {}}
    for name, value in arrays.items():
        part, _, own = name.partition("/")
        if own:
            parts[part][own] = value
    return _point(json.loads(str(arrays["plain"])), **parts)


def save_samples(folder: str | os.PathLike, point: Point) -> epath.Path:
    """Write the per-sample arrays of a point as npz, for paired tests made later; returns the path."""
    path = epath.Path(folder) / f"{point.system}-{point.setting:g}-seed{point.seed}.npz"
    paths.write_arrays(path, point.per_sample)
    return path


def load_point(folder: str | os.PathLike, plain: dict) -> Point:
    """Return the point that `to_json` and `save_samples` wrote, without its pictures."""
    path = epath.Path(folder) / f"{plain['system']}-{plain['setting']:g}-seed{plain['seed']}.npz"
    return _point(plain, per_sample=paths.read_arrays(path), kept={})


def _point(plain: dict, per_sample: dict[str, np.ndarray], kept: dict[str, np.ndarray]) -> Point:
    fields = dict(plain)
    fields["calls_histogram"] = {float(calls): count for calls, count in plain["calls_histogram"].items()}
    fields["metrics"] = {name: Interval(**value) for name, value in plain["metrics"].items()}
    fields["diversity"] = None if plain["diversity"] is None else Interval(**plain["diversity"])
    return Point(**fields, per_sample=per_sample, kept=kept)
