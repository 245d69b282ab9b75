"""What all stages that draw with a masked generator share: the model as functions, and how it is measured."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from maskrl_jax.data.dataset import Dataset, open_conditions, open_dataset
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import measured
from maskrl_jax.evaluate.bench import Bench, Evaluation, tuning_notes
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.report import Findings
from maskrl_jax.evaluate.systems import Engine, features_of, judge_scorer
from maskrl_jax.sampling.maskgit import SamplerConfig, make_plan
from maskrl_jax.tasks import codecs, encoding, forms
from maskrl_jax.tasks import judge as judge_task
from maskrl_jax.tasks.task import Context, Parent, Task

HELD_OUT = 256  # pictures of the loss that is watched
REAL_PICTURES = 2048  # about so many stand for the real ones
DRAWN_BY = ("maskgit", "mar", "tokenizer")  # stages that pictures depend on


def check_steps(sampler: SamplerConfig, num_tokens: int, **asked: Iterable[int]) -> None:
    """Raise ValueError for a number of steps that the sampler's tables or the grid do not hold.

    Early, because a report asks for them when training is over. `asked`: settings of `evaluation`, by name.
    """
    named = {count: f"evaluation.{name}" for name, counts in asked.items() for count in counts}
    for count, name in {**named, sampler.num_steps: "sampler.num_steps"}.items():
        try:
            make_plan(dataclasses.replace(sampler, num_steps=count), num_tokens)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def dataset_of(context: Context, split: str) -> Dataset:
    """Open a split of the stage's data at the tokenizer's image size."""
    return open_dataset(context.config.data, split, context.data_dir, _image_size(context))


def conditions_of(context: Context) -> Dataset:
    """What the stage's generator can be asked for, without its pictures."""
    return open_conditions(context.config.data, context.data_dir, _image_size(context))


def _image_size(context: Context) -> int:
    return context.config.parents.tokenizer.model.image_size


def training_set(context: Context) -> Dataset:
    """What a stage is trained on: pictures, or in their place the shards in the folder `data.encoded`."""
    if not encoding.folder_of(context.config):
        return dataset_of(context, "train")
    return encoding.encoded_set(context.config.data, context.parents["tokenizer"], dataset_of(context, "validation"))


def engine_of(context: Context, sizes: forms.Sizes, null: np.ndarray) -> Engine:
    """What systems of this stage and of those above it generate with."""
    codec = codecs.load(context.parents["tokenizer"])
    return Engine(
        parallel=context.parallel,
        logits=forms.generator(sizes).logits,
        codec=codec,
        tokenizer=context.parallel.replicate(codec.params),
        null=null,
        num_tokens=sizes.num_tokens,
        mask_id=sizes.mask_id,
    )


def kept(system: System, stages: Mapping[str, Parent], *settings: Any) -> System:
    """A system of trained stages and settings alone, whose measurements all runs with the same stages share."""
    drawn_by = [stages[name] for name in DRAWN_BY if name in stages]
    trained = [(stage.params, stage.extra, str(stage.config.model)) for stage in drawn_by]
    return dataclasses.replace(system, identity=measured.identity(trained, *settings))


def _real_pictures(context: Context, validation: Dataset, held_out: bool) -> np.ndarray | None:
    """Real pictures uint8 [M,H,W,3] that distances are measured against.

    Of a caption set, pictures of the held-out captions, or of the others, in equal shares, as they are prompted; the
    validation split has too few of each, so they come from the training split (as is usual for Frechet distances).
    None of a set without pictures.
    """
    if not validation.has_pictures:
        return None
    if validation.conditioning.kind == "class":
        return validation.take(np.arange(min(REAL_PICTURES, len(validation))))["image"]
    train, prompts = dataset_of(context, "train"), validation.describe(validation.pool(held_out=held_out))
    return train.take(train.positions_of(prompts, each=max(REAL_PICTURES // len(prompts), 1)))["image"]


def bench_of(context: Context) -> Bench:
    """The measuring bench of a generator stage: held-out split, judge, exact verifier."""
    if "judge" not in context.parents:
        raise UserError(
            f"{context.workdir} has no judge to be measured by; convert its weights again with --judge=<run>"
        )
    held_out = dataset_of(context, "validation")
    judge = judge_task.load(context.parents["judge"])
    params = jax.device_put(context.parents["judge"].params)  # once: those of a CLIP are large
    trained = context.config.get("rewards", {})  # bases have none
    judged = sorted(judge.names, key=lambda name: not trained.get(name))  # those that are trained on come first

    @functools.cache
    def real_features(prompts_held_out: bool) -> np.ndarray | None:
        pictures = _real_pictures(context, held_out, prompts_held_out)
        return None if pictures is None else features_of(judge, params, pictures)

    return Bench(
        dataset=held_out,
        scorer=judge_scorer(judge, params, held_out),
        real_features=real_features,
        settings=Evaluation(**context.config.evaluation),
        workdir=context.workdir,
        measured_dir=context.measured_dir,
        out=context.out,
        judged=tuple(judged),
    )


def _held_out(loss_of: Callable[..., tuple[jax.Array, jax.Array]], bench: Bench) -> float:
    """Mean loss of held-out pictures, in batches of the bench."""
    loss, weight = 0.0, 0.0
    for first in range(0, HELD_OUT, bench.settings.batch_size):
        rows = np.arange(first, min(first + bench.settings.batch_size, HELD_OUT))
        shown = bench.dataset.take(rows % len(bench.dataset))
        found = loss_of(shown["image"], shown["cond"], np.int32(first))
        loss, weight = (total + float(part) for total, part in zip((loss, weight), found, strict=True))
    return loss / weight


def base_task(
    context: Context,
    wiring: Any,
    tokenizer: Any,
    train: Dataset,
    system: Callable[[Any, Any], System],
    sampler: Any,
    facts: Callable[[Any], dict[str, str]],
) -> Task:
    """A base model's stage around its `wiring` (init, update, held_out_loss): batches, glances, search and curve.

    tokenizer: its placed parameters.
    `system(params, sampler)` generates; `facts(sampler)` are the report's lines about the sampler that was chosen.
    """
    config, parallel = context.config, context.parallel
    update = parallel.update(wiring.update)
    frozen, read = {"tokenizer": tokenizer}, {"tokenizer": encoding.read_by(config, tokenizer)}
    bench = functools.cache(lambda: bench_of(context))
    # Late: who measures a stage by prompts alone has no pictures to train it on.
    batches = functools.cache(lambda: encoding.examples(train, config, parallel.rows(config.batch_size)))
    held_out_loss = jax.jit(wiring.held_out_loss)

    def evaluate(state, step):
        loss = _held_out(functools.partial(held_out_loss, state.ema, frozen), bench())
        scores, picture = bench().glance(system(state.ema, sampler), bench().settings.glance_steps)
        return {"eval/loss": loss, **scores}, {"samples/grid": picture}

    def init(key):
        batches()  # refused before the first step
        return parallel.init(wiring.init, key)

    def report(params):
        stages = context.parents | {config.task: Parent(config, params, {}, context.workdir)}
        params = parallel.replicate(params)

        def base(chosen):
            return kept(system(params, chosen), stages, str(chosen))

        best = bench().tune(base, sampler)
        points = bench().measure(base(best), bench().settings.steps)
        findings = Findings(
            title=f"{config.task} on {config.data.name}",
            config=config.name,
            points=points,
            reference=points[-1:],
            criteria=bench().criteria(),
            held_out=("nothing of the prompts: the base has seen pictures of every caption",),
            notes=tuning_notes(context.workdir, bench().settings.reference),
        )
        bench().write(findings, config.num_steps, {**facts(best), "how it was chosen": bench().choice})

    return Task(
        init=init,
        batch=lambda step: batches()(step),
        step=lambda state, b: update(state, read, b),
        evaluate=evaluate,
        report=report,
    )
