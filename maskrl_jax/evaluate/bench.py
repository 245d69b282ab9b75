"""What every generator stage measures: a glance while it trains, a curve and a report at its end."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from maskrl_jax import paths, writers
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import curve, illustrate, measure, measured, report, timing
from maskrl_jax.evaluate.grid import image_grid
from maskrl_jax.evaluate.measure import Point, Protocol, Scorer, System
from maskrl_jax.sampling.maskgit import SamplerConfig

SAMPLER = "sampler.json"
TUNED = ("gumbel", "guidance", "temperature")
TIMED_SAMPLES = 32  # at least so many of each system
CHOICE = (  # what `tune` does, in words
    "one setting after another, on training captions: the best by the deciding measure, and among those within half "
    "the margin of it the one of the least Fréchet distance"
)
CHOICE_WITHOUT_PICTURES = (
    "one setting after another, on training captions: the best by the deciding measure; the set has no pictures, so "
    "nothing speaks for variety"
)
NO_PICTURES = (
    "The set has no pictures: there is no Fréchet distance, precision or recall, and no measure here would see that all "
    "pictures of a prompt are alike but the diversity."
)
NATURAL_ENDS = {"guidance": 1.0, "temperature": 1.0}  # none at all; the model's own law


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How much a stage measures; the same for every system of a report."""

    prompts: int = 128
    group: int = 4  # samples a prompt
    batch_size: int = 128  # of every generation program
    seed: int = 17
    steps: tuple[int, ...] = (2, 4, 8, 16)  # of the base's curve; the last is T_ref
    dials: tuple[float, ...] = (0.0,)  # speed dials of a tuned policy with a head
    glance_prompts: int = 32  # while training
    glance_steps: int = 16
    tune_prompts: int = 64
    tune_gumbel: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    tune_guidance: tuple[float, ...] = (1.0, 2.0)
    tune_temperature: tuple[float, ...] = (1.0, 0.7)
    timing_repeats: int = 5  # 0: no timing
    goal: float = 3.0  # times fewer calls that a tuned policy is to reach
    margin: float = 0.02  # equal quality: lower bound of the difference at least -margin
    keep: int = 8  # prompts whose pictures a report shows

    def __post_init__(self):
        for name in ("steps", "dials", *(f"tune_{name}" for name in TUNED)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise UserError(f"evaluation.{name} is empty; it needs at least one entry")
        if list(self.steps) != sorted(set(self.steps)):
            raise UserError(f"evaluation.steps {self.steps} must rise; its last entry is the reference T")
        # Two samples of each; precision and recall need more than three points.
        for name, least in {"group": 1, "batch_size": 1, "glance_prompts": 2, "tune_prompts": 2, "keep": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"evaluation.{name} {getattr(self, name)} must be at least {least}")
        if self.prompts < 2 or self.prompts * self.group < 4:
            raise UserError(
                f"evaluation.prompts {self.prompts} x group {self.group} is too little; take 2 prompts and 4 samples"
            )
        if self.goal <= 0:
            raise UserError(f"evaluation.goal {self.goal} must be above 0, how many times fewer calls")
        if self.timing_repeats < 0:
            raise UserError(f"evaluation.timing_repeats {self.timing_repeats} is below 0; use 0 for no timing")
        for name in TUNED:
            for value in getattr(self, f"tune_{name}"):
                SamplerConfig(**{name: value})  # ValueError for what no sampler can do
        object.__setattr__(self, "keep", min(self.keep, self.prompts))

    @property
    def reference(self) -> int:
        """T_ref."""
        return self.steps[-1]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Prompts, judges and real features, held equal for all systems of one report."""

    dataset: Any  # held-out split
    scorer: Scorer
    # held out? -> features of real pictures of those prompts, None of a set without pictures
    real_features: Callable[[bool], np.ndarray | None]
    settings: Evaluation
    workdir: str
    measured_dir: str  # where points of systems with an identity are kept
    out: str = ""  # where the report goes, if not into workdir
    judged: tuple[str, ...] = ("judge",)  # scores of the judge; the first decides where the set has no verifier

    @property
    def metric(self) -> str:
        """The measure that decides: the exact verifier where there is one."""
        return self.judged[0] if self.dataset.verify is None else "graded"

    def untrained(self, rewards: Mapping[str, float]) -> tuple[str, ...]:
        """Measures of a report that training on these rewards did not see: the verifier, and other CLIPs."""
        verifier = () if self.dataset.verify is None else ("the exact verifier",)
        return verifier + tuple(name for name in self.judged if name in curve.CLIP and not rewards.get(name))

    def protocol(
        self, prompts: int, *, group: int | None = None, keep: int = 0, seed: int | None = None, held_out: bool = True
    ) -> Protocol:
        """Prompts and noise of one measurement; held-out prompts unless told otherwise.

        At most as many captions as there are: repeated ones are no more evidence.
        """
        s = self.settings
        seed = s.seed if seed is None else seed
        texts = tuple(self.dataset.prompts(min(prompts, self.dataset.distinct(held_out)), seed, held_out=held_out))
        return Protocol(
            prompts=texts,
            cond=self.dataset.encode(list(texts)),
            group=s.group if group is None else group,
            batch_size=s.batch_size,
            seed=seed,
            real_features=self.real_features(held_out),
            keep=min(keep, len(texts)),
        )

    def glance(self, system: System, setting: float) -> tuple[dict[str, float], np.ndarray]:
        """A small measurement for the logs: scalars, and a grid of the first samples."""
        s = self.settings
        count = min(16, s.glance_prompts)
        point = measure.measure(system, setting, self.protocol(s.glance_prompts, group=2, keep=count), self.scorer)
        values = {tag.replace("eval/", "glance/"): value for tag, value in scalars(point).items()}
        return values, image_grid(point.kept["images"] / 255, columns=8)

    def tune(self, system_of: Callable[[Any], System], sampler: Any) -> Any:
        """Pick the base's best Gumbel scale, guidance and temperature, one after another, at T_ref.

        Those of them that its sampler, a dataclass, has.

        On prompts that are not held out. Acceleration is measured against the base at its best, so the deciding
        measure picks here too; among settings within half of the margin of equal quality, the smallest Frechet
        distance does, since the surest draws alone buy a little of that measure with all variety (our choice).
        Stored as JSON with what it was tuned for, since stages above start from it; not tuned again for the same
        parameters and grids, nor by a later measurement (`out`), which must not change what those stages did.
        """
        s = self.settings
        path = epath.Path(self.workdir, SAMPLER)
        tuned = [name for name in TUNED if hasattr(sampler, name)]
        grids = [getattr(s, f"tune_{name}") for name in tuned]
        key = measured.identity(system_of(sampler).identity, grids, s.reference, s.tune_prompts, s.margin, s.seed)
        # A process of several tunes again, to the same end: whether a file exists need not look the same to all.
        if path.exists() and jax.process_count() == 1 and (self.out or json.loads(path.read_text()).get("key") == key):
            return read_sampler(self.workdir, sampler)
        protocol = self.protocol(s.tune_prompts, group=2, seed=s.seed + 1, held_out=False)
        rows, chosen = [], dataclasses.replace(sampler, num_steps=s.reference)
        progress = writers.Progress("tuning the base's sampler", sum(map(len, grids)))
        for name, grid in zip(tuned, grids, strict=True):
            for value in grid:
                tried = dataclasses.replace(chosen, **{name: value})
                settings = {other: getattr(tried, other) for other in tuned}
                if any(settings.items() <= row.items() for row in rows):
                    continue  # the best of the sweep before
                point = measure.measure(system_of(tried), s.reference, protocol, self.scorer)
                rows.append(settings | scalars(point))
                progress.update(len(rows))
            quality = f"eval/{self.metric}@{s.reference}"
            least = max(row[quality] for row in rows) - s.margin / 2
            near = [row for row in rows if row[quality] >= least]
            distance = f"eval/fd_judge@{s.reference}"
            # Without pictures there is no distance: the best of the deciding measure.
            row = min(near, key=lambda row: row[distance] if distance in row else -row[quality])
            chosen = dataclasses.replace(chosen, **{other: row[other] for other in tuned})
        progress.close()
        if jax.process_index() == 0:
            found = {"key": key, "reference": s.reference, "sampler": dataclasses.asdict(chosen), "tried": rows}
            paths.write(path, json.dumps(found, indent=1) + "\n")
        return chosen

    def measure(self, system: System, settings: Sequence[float]) -> list[Point]:
        """The points of one system's curve; those of a system with an identity are measured once for all runs.

        Whatever runs call it: a student's base is the teacher of what is tuned.
        """
        s = self.settings
        protocol = self.protocol(s.prompts, keep=s.keep)
        held_equal = measured.identity(dataclasses.asdict(protocol), self.scorer.identity, system.identity)

        def point(setting):
            made = functools.partial(measure.measure, system, setting, protocol, self.scorer)
            if not system.identity:
                return made()
            key = measured.identity(held_equal, setting)
            found = measure.unpack(measured.once(self.measured_dir, "point", key, lambda: measure.pack(made())))
            return dataclasses.replace(found, system=system.name, label=system.label)

        progress, points = writers.Progress(f"measuring {system.label}", len(settings)), []
        for setting in settings:
            points.append(point(setting))
            progress.update(len(points))
        progress.close()
        return points

    def criteria(self) -> curve.Criteria:
        """What counts as equal quality."""
        return curve.Criteria(
            margins={self.metric: self.settings.margin},
            frechet_ratio=0 if self.real_features(True) is None else curve.Criteria.frechet_ratio,
            diversity_ratio=0.9 if self.settings.group > 1 else 0,
        )

    @property
    def choice(self) -> str:
        """What `tune` does, in words."""
        return CHOICE_WITHOUT_PICTURES if self.real_features(True) is None else CHOICE

    def time(self, base: tuple[System, float], tuned: tuple[System, float], batch_sizes: Sequence[int]) -> list:
        """Wall-clock comparison at some batch sizes; each size is a program of its own."""
        s = self.settings
        texts = self.dataset.prompts(max(batch_sizes), s.seed)

        def runner(system, setting, size):
            def run(repeat):
                offset = 10_000 * (repeat + 1)
                cond = self.dataset.encode([texts[(repeat + i) % len(texts)] for i in range(size)])
                made = system.generate(setting, cond, np.arange(offset, offset + size, dtype=np.int32), s.seed)
                return made.images, made.calls

            return run

        # Single samples differ in calls and cost little, so more of them are timed.
        repeats = {size: max(s.timing_repeats, -(-TIMED_SAMPLES // size)) for size in batch_sizes}
        return [
            timing.compare(runner(*base, size), runner(*tuned, size), batch_size=size, repeats=repeats[size])
            for size in batch_sizes
        ]

    def write(
        self,
        findings: report.Findings,
        step: int,
        facts: dict[str, str],
        draw: Callable[[str], Sequence[illustrate.Illustration]] | None = None,
    ) -> None:
        """Draw, write report.md and results.json, and log the same to TensorBoard; process 0 only.

        `draw(folder)` adds figures of the stage's own.
        """
        if jax.process_index() != 0:
            return
        if self.real_features(True) is None:
            findings = dataclasses.replace(findings, notes=(*findings.notes, NO_PICTURES))
        reference = findings.reference
        equality = report.equalities(findings).get(findings.tuned)
        prompts = self.protocol(self.settings.prompts).prompts
        out = self.out or self.workdir
        drawn = illustrate.illustrate(
            out,
            findings.points,
            reference,
            prompts,
            logged=writers.read_metrics(self.workdir),
            tuned=findings.tuned,
            equality=equality,
            setting=None if findings.aim is None else reference[0].setting,  # better at the same calls was the aim
        )
        drawn += [] if draw is None else draw(out)
        path = report.write(out, dataclasses.replace(findings, illustrations=drawn), facts)
        for point in findings.points:
            measure.save_samples(epath.Path(out, "points"), point)
        writer = writers.Writer(out, step)
        for point in findings.points:
            prefix = "" if point.system == reference[0].system else f"{point.system}/"
            writer.scalars(step, {f"{prefix}{tag}": value for tag, value in scalars(point).items()})
        writer.images(step, {f"report/{pathlib.PurePosixPath(d.path).stem}": d.image for d in drawn})
        writer.close()
        print(f"report: {path}", flush=True)


def scalars(point: Point) -> dict[str, float]:
    """TensorBoard tags of a point, `eval/<measure>@<setting>`."""
    values = {name: interval.mean for name, interval in point.metrics.items()}
    if point.frechet is not None:
        values |= {"fd_judge": point.frechet, "precision": point.precision, "recall": point.recall}
    values |= {"calls": point.calls_mean}
    if point.diversity is not None:
        values["diversity"] = point.diversity.mean
    return {f"eval/{name}@{point.setting:g}": float(value) for name, value in values.items()}


def read_sampler(workdir: str, fallback: Any) -> Any:
    """The sampler that `tune` chose for a base model, or the config's where none was tuned."""
    path = epath.Path(workdir, SAMPLER)
    if not path.exists():
        return fallback
    return type(fallback)(**json.loads(path.read_text())["sampler"])


def tuning_notes(workdir: str, reference: int) -> tuple[str, ...]:
    """What a report must say of the base's sampler: another T_ref, or a setting at the edge of what was tried.

    Nothing is missed beyond a natural end.
    """
    path = epath.Path(workdir, SAMPLER)
    if not path.exists():
        return ("The base's sampler was not tuned: it is the one of its config.",)
    found = json.loads(path.read_text())
    notes = []
    if found["reference"] != reference:
        notes.append(
            f"The base's sampler was tuned at {found['reference']} calls and is the reference at {reference} here."
        )
    for name in (name for name in TUNED if name in found["sampler"]):
        chosen, grid = found["sampler"][name], {row[name] for row in found["tried"]}
        if len(grid) > 1 and chosen in (min(grid), max(grid)) and chosen != NATURAL_ENDS.get(name):
            notes.append(
                f"The base's best {name} ({chosen:g}) is at the edge of what was tried ({min(grid):g} to "
                f"{max(grid):g}): a better one may lie beyond."
            )
    return tuple(notes)
