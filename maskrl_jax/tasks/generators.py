"""What all stages that draw with a masked generator share: the model as functions, and how it is measured."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from maskrl_jax.data.dataset import Conditioning, Dataset, open_dataset
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.evaluate import measured
from maskrl_jax.evaluate.bench import CHOICE, Bench, Evaluation, tuning_notes
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.report import Findings
from maskrl_jax.evaluate.systems import Engine, features_of, judge_scorer
from maskrl_jax.models.google_maskgit import GoogleMaskGIT, GoogleMaskGITConfig
from maskrl_jax.models.maskgit import MaskGIT, MaskGITConfig
from maskrl_jax.models.maskgit_port import MaskGITPort, PortConfig
from maskrl_jax.sampling.maskgit import SamplerConfig, make_plan
from maskrl_jax.tasks import codecs, encoding
from maskrl_jax.tasks import judge as judge_task
from maskrl_jax.tasks.task import Context, Parent, Task

REAL_PICTURES = 2048  # about so many stand for the real ones
Sizes = MaskGITConfig | PortConfig | GoogleMaskGITConfig
PUBLISHED = {"port": PortConfig, "google": GoogleMaskGITConfig}
DRAWN_BY = ("maskgit", "mar", "tokenizer")  # stages that pictures depend on


@dataclasses.dataclass(frozen=True)
class Generator:
    """A base model as functions of its parameters."""

    logits: Callable[[Any], Callable]  # params -> logits_fn(ids, timestep, cond)
    features: Callable[[Any], Callable]  # params -> feature_fn(ids, timestep, cond) [B,T,D], T >= N, image tokens first
    head: Callable[[Any], Callable]  # params -> head_fn(features [...,D]) -> logits [...,K]
    controls: Callable[[Any], Callable]  # params -> fn(ids [b,n], positions [b,n]) -> [b,n,D], for a shortcut


def model_config(config: Any, tokenizer: Any, conditioning: Conditioning) -> Sizes:
    """Sizes that follow from the tokenizer and the data, and those that the config names.

    `model.form` is `ours`, where a config names none, or for classes `port` or `google`, forms A and B of
    specs/maskgit.md.
    """
    sizes = codecs.sizes(tokenizer.model)
    own, form = dict(config.model), config.model.get("form", "ours")
    own.pop("form", None)
    grid = {"num_tokens": sizes.num_tokens, "codebook_size": sizes.codebook_size}
    if form in PUBLISHED:
        if conditioning.kind != "class":
            raise UserError(f"model.form={form} is conditioned on classes, and {config.data.name} has captions")
        tuned = dict(config.evaluation).get("tune_guidance", (1.0,))
        if form == "google" and (config.sampler.guidance != 1 or config.cond_drop or any(x != 1 for x in tuned)):
            raise UserError(
                "model.form=google knows no null class; set sampler.guidance=1, evaluation.tune_guidance=(1.0,), cond_drop=0"
            )
        return PUBLISHED[form](**grid, num_classes=conditioning.vocab_size - 1, **own)
    if form != "ours":
        raise unknown("model.form", form, ("ours", *PUBLISHED))
    return MaskGITConfig(**grid, cond_vocab=conditioning.vocab_size, cond_length=max(conditioning.length, 1), **own)


def network(config: Sizes) -> nn.Module:
    """The module of these sizes."""
    return {MaskGITConfig: MaskGIT, PortConfig: MaskGITPort, GoogleMaskGITConfig: GoogleMaskGIT}[type(config)](config)


def generator(config: Sizes) -> Generator:
    """Wrap a network of these sizes."""
    model = network(config)
    return Generator(
        logits=lambda p: lambda ids, timestep, cond: model.apply(p, ids, cond),
        features=lambda p: lambda ids, timestep, cond: model.apply(p, ids, cond, method="features"),
        head=lambda p: lambda features: model.apply(p, features, method="logits"),
        controls=lambda p: lambda ids, positions: model.apply(p, ids, positions, method="controls"),
    )


def knows_null(config: Sizes) -> bool:
    """Whether a network was trained without its condition too, so that it can be guided."""
    return not isinstance(config, GoogleMaskGITConfig)


def check_steps(sampler: SamplerConfig, steps: Iterable[int], num_tokens: int) -> None:
    """Raise ValueError for a number of steps that the sampler's tables or the grid do not hold.

    Early, because a report asks for them when training is over.
    """
    for count in {sampler.num_steps, *steps}:
        make_plan(dataclasses.replace(sampler, num_steps=count), num_tokens)


def dataset_of(context: Context, split: str) -> Dataset:
    """Open a split of the stage's data at the tokenizer's image size."""
    data = context.config.data
    size = context.config.parents.tokenizer.model.image_size
    return open_dataset(data.name, split, context.data_dir, size, data.text_length)


def training_set(context: Context) -> Dataset:
    """What a stage is trained on: pictures, or in their place the shards in the folder `data.encoded`."""
    folder = encoding.folder_of(context.config)
    if not folder:
        return dataset_of(context, "train")
    return encoding.encoded_set(folder, context.parents["tokenizer"], dataset_of(context, "validation"))


def engine_of(context: Context, sizes: Sizes, null: np.ndarray) -> Engine:
    """What systems of this stage and of those above it generate with."""
    codec = codecs.load(context.parents["tokenizer"])
    return Engine(
        parallel=context.parallel,
        logits=generator(sizes).logits,
        decode=codec.decode,
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


def _real_pictures(context: Context, validation: Dataset, held_out: bool) -> np.ndarray:
    """Real pictures uint8 [M,H,W,3] that distances are measured against.

    Of a caption set, pictures of the held-out captions, or of the others, in equal shares, as they are prompted; the
    validation split has too few of each, so they come from the training split (as is usual for Frechet distances).
    """
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
    settings = Evaluation(**context.config.evaluation)

    @functools.cache
    def real_features(prompts_held_out: bool) -> np.ndarray:
        pictures = _real_pictures(context, held_out, prompts_held_out)
        return features_of(judge.read, judge.params, pictures)

    return Bench(
        dataset=held_out,
        scorer=judge_scorer(judge.read, judge.params, judge.config.kind, held_out),
        real_features=real_features,
        settings=settings,
        workdir=context.workdir,
        measured_dir=context.measured_dir,
        out=context.out,
    )


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
    held_out_loss = jax.jit(wiring.held_out_loss)

    def evaluate(state, step):
        examples = bench().dataset.take(np.arange(256) % len(bench().dataset))
        loss, weight = jax.device_get(held_out_loss(state.ema, frozen, examples["image"], examples["cond"]))
        scores, picture = bench().glance(system(state.ema, sampler), bench().settings.glance_steps)
        return {"eval/loss": float(loss / weight), **scores}, {"samples/grid": picture}

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
        bench().write(findings, config.num_steps, {**facts(best), "how it was chosen": CHOICE})

    return Task(
        init=lambda key: parallel.init(wiring.init, key),
        batch=encoding.examples(train, config, parallel.rows(config.batch_size)),
        step=lambda state, b: update(state, read, b),
        evaluate=evaluate,
        report=report,
    )
