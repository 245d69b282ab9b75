"""Sample images from a trained stage: `python -m maskrl_jax.sample --workdir=<dir> --prompt="a red circle"`."""

import dataclasses
import io
import pathlib

import numpy as np
from absl import flags

from maskrl_jax import command
from maskrl_jax.distill.diffusion import METHODS
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.studio import settings
from maskrl_jax.sampling.maskgit import MODES, SamplerConfig
from maskrl_jax.sampling.schedules import IDLE, SCHEDULES
from maskrl_jax.tasks.continuous import MarSampler


def _listed(sampler):
    found = dataclasses.asdict(sampler).items()
    return " ".join(f"{name}={','.join(map(str, x)) if isinstance(x, tuple) else x}" for name, x in found)


WORKDIR = flags.DEFINE_string("workdir", None, "run of a stage that makes images", required=True)
PROMPT = flags.DEFINE_multi_string("prompt", None, "caption, or class name or number; may be repeated")
NUM_IMAGES = flags.DEFINE_integer("num_images", 8, "images of each prompt", lower_bound=1)
NUM_STEPS = flags.DEFINE_integer(
    "num_steps", None, "steps of the fixed sampler, iterations of MAR; a tuned policy decides by itself"
)
FULL_STEPS = flags.DEFINE_integer(
    "full_steps",
    None,
    "run of a shortcut: steps that run the full network, evenly spread; default: the share of --num_steps in its report",
)
DIAL = flags.DEFINE_float("dial", None, "asks a tuned policy for fewer (positive) or more calls")
MODE = flags.DEFINE_string("mode", None, f"fixed sampler: {', '.join(MODES)}")
SCHEDULE = flags.DEFINE_string("schedule", None, f"fixed sampler: {', '.join(SCHEDULES + IDLE)}")
GUMBEL = flags.DEFINE_float("gumbel", None, "modes confidence, uncertain: noise on the order")
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "fixed sampler: divides the logits before a draw; MAR and its students: of the noise"
)
FULL_NOISE = flags.DEFINE_integer("full_noise", None, "MAR: iterations that see fewer tokens keep temperature 1")
GUIDANCE = flags.DEFINE_float("guidance", None, "fixed sampler and MAR: guidance scale, 1 is none")
GUIDANCE_SCHEDULE = flags.DEFINE_string(
    "guidance_schedule", None, "fixed sampler: constant, linear or cosine; MAR: constant or linear"
)
INNER_STEPS = flags.DEFINE_integer("inner_steps", None, "MAR: steps of the chain that draws a token")
METHOD = flags.DEFINE_string("method", None, f"MAR: how that chain draws, {' or '.join(METHODS)}")
THRESHOLD = flags.DEFINE_float("threshold", None, "modes threshold, uncertain (probability) and entropy (nats)")
SET = flags.DEFINE_multi_string(
    "set", None, f"any setting as name=value, may be repeated; fixed sampler, with defaults: {_listed(SamplerConfig())}; "
    f"MAR: {_listed(MarSampler())}",
)  # fmt: skip
IMAGE = flags.DEFINE_string("image", None, "picture to inpaint")
BOX = flags.DEFINE_list("box", None, "top,left,bottom,right in pixels: what of --image is made anew")
SEED = flags.DEFINE_integer("seed", 0, "seed of the noise", lower_bound=0, upper_bound=2**31 - 1)
OUT = flags.DEFINE_string("out", "samples.png", "picture to write: a row per prompt")
ORDER = flags.DEFINE_string("order", None, "also draw in which order tokens appear, to this file")
ASKED = (
    NUM_STEPS, MODE, SCHEDULE, GUMBEL, TEMPERATURE, GUIDANCE, GUIDANCE_SCHEDULE, THRESHOLD, FULL_STEPS, DIAL, INNER_STEPS,
    METHOD, FULL_NOISE,
)  # fmt: skip


def main() -> None:
    """Sample as the flags say."""
    from PIL import Image

    from maskrl_jax import runner
    from maskrl_jax.evaluate.grid import image_grid

    _check_out()
    context, params = runner.open_workdir(WORKDIR.value)
    stage = runner.task_module(context.config)
    if not hasattr(stage, "studio"):
        raise UserError(f"{WORKDIR.value} holds a {context.config.task!r} stage, which makes no images")
    studio = stage.studio(context, params)
    prompts = PROMPT.value or studio.dataset.prompts(4, SEED.value)
    cond = studio.dataset.encode(prompts).repeat(NUM_IMAGES.value, axis=0)
    wanted = len(cond)
    # Filled up until the devices divide it.
    cond = cond[np.arange(-(-wanted // context.parallel.num_devices) * context.parallel.num_devices) % wanted]
    asked = {flag.name: flag.value for flag in ASKED if flag.value is not None}
    changed = settings(SET.value or (), studio.sampler)
    if twice := asked.keys() & changed:
        raise UserError(f"--{min(twice)} and --set {min(twice)} are one setting; leave one out")
    system, setting, words = studio.asked(asked | changed, _given(studio))
    print(f"{words}, parameters of {context.config.name}")
    made = system.generate(setting, cond, np.arange(len(cond), dtype=np.int32), SEED.value).first(wanted)
    Image.fromarray(image_grid(made.images, columns=NUM_IMAGES.value)).save(OUT.value)
    for row, prompt in enumerate(prompts):
        calls, steps = (x[row * NUM_IMAGES.value :][: NUM_IMAGES.value].mean() for x in (made.calls, made.taken))
        light = "" if made.steps is None else f", {steps - calls:.1f} shortcut steps"
        print(f"{prompt}: {calls:.1f} network calls an image{light}")
    print(f"wrote {OUT.value}")
    if ORDER.value:
        from maskrl_jax.evaluate.pictures import commit_order

        first = slice(None, None, NUM_IMAGES.value)
        pixels = np.round(np.clip(made.images[first], 0, 1) * 255).astype(np.uint8)
        commit_order(ORDER.value, pixels, made.commit_step[first], made.taken[first], prompts)
        print(f"wrote {ORDER.value}")


def _check_out():
    """Refuse before anything is sampled an --out or --order that could not be written."""
    from PIL import Image

    for flag in (OUT, ORDER):
        path = pathlib.Path(flag.value or "none.png")
        try:
            Image.new("RGB", (1, 1)).save(io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
        except (KeyError, OSError, ValueError):
            wrong = "no picture can be written under this ending; use .png or .jpg"
            raise UserError(f"--{flag.name} {path}: {wrong}") from None
        if not path.parent.is_dir():
            raise UserError(f"No such file or directory: {path.parent}, the folder of --{flag.name} {path}; make it")


def _given(studio):
    """Tokens of --image outside --box, MASK inside; None without an image."""
    if (IMAGE.value is None) != (BOX.value is None):
        raise UserError("--image and --box belong together: the picture, and the part of it to make anew")
    if IMAGE.value is None:
        return None
    from PIL import Image, UnidentifiedImageError

    from maskrl_jax.data.pixels import rgb

    try:
        picture = rgb(Image.open(IMAGE.value))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UserError(f"cannot read --image {IMAGE.value}: {error}") from None
    try:
        box = [int(number) for number in BOX.value]
    except ValueError:
        raise UserError(f"--box {','.join(BOX.value)} must be four numbers: top,left,bottom,right") from None
    return studio.inpainting(picture, box)


if __name__ == "__main__":
    command.run(main, mistakes=(ValueError, OSError))
