"""A trained generator as a user samples from it: any sampler, a tuned policy, inpainting."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from maskrl_jax.errors import UserError, unknown
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.systems import Engine, fixed_program, fixed_system
from maskrl_jax.sampling.maskgit import SamplerConfig

KINDS = {  # of a sampler's settings, in words
    str: "a name",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple[float, float]: "two numbers, such as 1,0.5",
}


def check_steps(steps: int, num_tokens: int) -> None:
    """Raise UserError for a number of steps that the grid does not hold."""
    if not 1 <= steps <= num_tokens:
        raise UserError(f"--num_steps={steps} must lie in 1..{num_tokens}, the number of image tokens")


def settings(asked: Sequence[str], sampler: Any) -> dict[str, Any]:
    """Read `name=value` of a sampler's fields, a pair of numbers as `1,0.5`; UserError for what is not one of them."""
    found, kinds = {}, {field.name: field.type for field in dataclasses.fields(sampler)}
    for text in asked:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text} must be name=value, such as --set temperature=0.5")
        if name not in kinds:
            raise unknown("setting of the sampler", name, kinds)
        if name in found:
            raise UserError(f"--set {name} is given twice")
        try:
            found[name] = _value(kinds[name], value)
        except (KeyError, ValueError):
            raise UserError(f"--set {text} must be {KINDS[kinds[name]]}") from None
    return found


def _value(kind: Any, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is str:
        return text
    numbers = [int(part) if kind is int else float(part) for part in text.split(",")]
    if len(numbers) != (2 if kind == tuple[float, float] else 1) or not np.isfinite(numbers).all():
        raise ValueError(text)
    return tuple(numbers) if len(numbers) == 2 else numbers[0]


@dataclasses.dataclass(frozen=True)
class Studio:
    """What a generator stage offers for sampling.

    Attributes:
      engine: generation around the model.
      params: parameters of the network.
      dataset: held-out split; encodes prompts.
      sampler: the sampler that was tuned for the base, or that the policy was trained with.
      encode: images [B,H,W,3] in [0,1] -> tokens [B,N].
      image_size: pixels a side.
      tuned: the policy as a system, None for a base model.
      tuned_setting: the policy's usual one: dial 0, or the number of steps that it was trained with.
      shortcut: the network with its shortcut under a fixed sampler, as `fixed`; the setting is the number of full
        steps. None where the run has none.
      full_steps: their usual number, at the sampler's own number of steps.
      guided: whether the model can be guided: one that knows no null condition cannot.
    """

    engine: Engine
    params: Any
    dataset: Any
    sampler: SamplerConfig
    encode: Callable[[np.ndarray], np.ndarray]
    image_size: int
    tuned: System | None = None
    tuned_setting: float = 0.0
    shortcut: Callable[[SamplerConfig, np.ndarray | None], System] | None = None
    full_steps: int = 0
    guided: bool = True

    @functools.cached_property
    def program(self) -> Callable:
        """The fixed sampler's program, compiled once for all settings of a mode."""
        return fixed_program(self.engine)

    def fixed(self, sampler: SamplerConfig, given: np.ndarray | None = None) -> System:
        """The network under a fixed sampler; `given` int32 [N] are tokens to keep."""
        return fixed_system(self.engine, self.program, self.params, sampler, "fixed", "fixed sampler", given)

    def asked(self, flags: Mapping[str, Any], given: np.ndarray | None) -> tuple[System, float, str]:
        """The system that flags of `sample` ask for, its setting, and what it is in words; `given` as of `fixed`."""
        wanted = dict(flags)
        for name in ("inner_steps", "method"):
            if name in wanted:
                raise UserError(f"--{name} is for MAR, and this run draws discrete tokens")
        dial, full = wanted.pop("dial", None), wanted.pop("full_steps", None)
        if full is not None and self.shortcut is None:
            raise UserError("--full_steps is for a run of a shortcut stage, and this is another")
        if self.tuned is not None and not wanted and given is None:
            if dial is not None and self.tuned_setting:
                raise UserError("--dial is for a policy with a head; this one has a number of steps: use --num_steps")
            setting = self.tuned_setting if dial is None else dial
            return self.tuned, setting, f"{self.tuned.label} at {'steps' if self.tuned_setting else 'dial'} {setting:g}"
        if dial is not None:
            raise UserError(
                "--dial is for a tuned policy alone; leave it out with flags of the fixed sampler or --image"
            )
        steps = wanted.get("num_steps", self.sampler.num_steps)
        check_steps(steps, self.engine.num_tokens)
        wanted["max_steps"] = max(steps, wanted.get("max_steps", self.sampler.max_steps))
        sampler = dataclasses.replace(self.sampler, **wanted)
        if sampler.guidance != 1 and not self.guided:
            raise UserError("--guidance is not for this model, which knows no null class")
        words = f"{sampler.mode}, {steps} steps at most, Gumbel {sampler.gumbel:g}, guidance "
        words += f"{sampler.guidance:g}, temperature {sampler.temperature:g}"
        if self.shortcut is None:
            return self.fixed(sampler, given), steps, f"fixed sampler: {words}"
        if full is None:  # the usual share of them
            full = max(round(self.full_steps * steps / self.sampler.num_steps), 1)
        if not 1 <= full <= steps:
            raise UserError(f"--full_steps={full} must lie in 1..{steps}, the number of steps")
        return self.shortcut(sampler, given), full, f"shortcut, full steps: {full}, evenly spread: {words}"

    def inpainting(self, picture: np.ndarray, box: list[int]) -> np.ndarray:
        """Tokens int32 [N] of a uint8 [H,W,3] picture, MASK where a cell touches the box (top, left, bottom, right)."""
        size = self.image_size
        if picture.shape[:2] != (size, size):
            raise UserError(
                f"--image has {picture.shape[1]} x {picture.shape[0]} pixels; this model makes {size} x {size}"
            )
        if len(box) != 4 or not (0 <= box[0] < box[2] <= size and 0 <= box[1] < box[3] <= size):
            raise UserError(
                f"--box {box} must be top,left,bottom,right with 0 <= top < bottom <= {size}, likewise across"
            )
        tokens = np.array(self.encode(picture[None].astype(np.float32) / 255))[0]
        side = round(len(tokens) ** 0.5)
        cell = size // side
        top, left, bottom, right = box[0] // cell, box[1] // cell, -(-box[2] // cell), -(-box[3] // cell)
        grid = tokens.reshape(side, side)
        grid[top:bottom, left:right] = self.engine.mask_id
        return grid.reshape(-1)
