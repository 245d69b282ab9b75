"""The network that moves a feature, whatever base it stands on: what `stage shortcut` trains."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maskrl_jax.errors import UserError
from maskrl_jax.models.dimoo import Dimoo
from maskrl_jax.models.dimoo_shortcut import DimooShortcut, DimooShortcutConfig
from maskrl_jax.models.shortcut import Shortcut, ShortcutConfig
from maskrl_jax.sampling import dimoo
from maskrl_jax.tasks.forms import DimooSizes, Sizes, dimoo_prompt, generator

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Mover:
    """A shortcut network as functions of its own parameters and of the frozen base's.

    `advance(params, base_params)(features [b,T,D], Controls, masked share [b], cond [b, ...])` gives the next step's
    features float32.
    """

    config: ShortcutConfig | DimooShortcutConfig
    init: Callable[[Array], Any]  # key -> params
    advance: Callable[[Any, Any], Callable]


def network_config(sizes: Sizes, settings: Any) -> ShortcutConfig | DimooShortcutConfig:
    """Sizes of a shortcut on a base of these sizes. UserError for a base that has no shortcut."""
    own = dict(settings)
    own.pop("prompt_controls", None)
    if isinstance(sizes, DimooSizes):
        return DimooShortcutConfig(width=sizes.width, **own)
    if generator(sizes).controls is None:
        raise UserError(
            "a shortcut stands on a base of model.form ours, port, google or dimoo; none is published for others"
        )
    return ShortcutConfig(num_tokens=sizes.num_tokens, width=sizes.width, **own)


def mover(sizes: Sizes, settings: Any, null: Any) -> Mover:
    """The network; `null` is the null condition of one sample.

    `model.prompt_controls` of a DiMOO's: whether the prompt is among the controls of the conditional branch (published:
    True).
    """
    config = network_config(sizes, settings)
    if isinstance(sizes, DimooSizes):
        return _dimoo(sizes, config, null, dict(settings).get("prompt_controls", True))
    network, base = Shortcut(config), generator(sizes)

    def init(key):
        row = jnp.zeros((1, sizes.num_tokens, config.width))
        places = jnp.zeros((1, 1), jnp.int32)
        return network.init(key, row, row[:, :1], places, places == 0, jnp.ones(1))

    def advance(params, base_params):
        def fn(features, controls, share_b, _):
            told = base.controls(base_params)(controls.ids, controls.positions)
            return network.apply(params, features, told, controls.positions, controls.valid, share_b)

        return fn

    return Mover(config, init, advance)


def _dimoo(sizes: DimooSizes, config: DimooShortcutConfig, null: Any, prompt_controls: bool) -> Mover:
    network, base = DimooShortcut(config), Dimoo(sizes.network)

    def init(key):
        row, places = jnp.zeros((1, 1, config.width)), jnp.zeros((1, 1), jnp.int32)
        return network.init(key, row, row, places, places == 0, jnp.ones(1))

    def advance(params, base_params):
        def bound(*args, **options):
            return base.apply(base_params, *args, **options)

        def move(*args):
            return network.apply(params, *args)

        def fn(features, controls, share_b, cond):
            prompt, unconditional = dimoo_prompt(cond), dimoo_prompt(jnp.asarray(null))
            told = (features, controls, share_b, prompt, prompt_controls)
            return dimoo.advanced(bound, sizes.layout, unconditional, move, *told)

        return fn

    return Mover(config, init, advance)
