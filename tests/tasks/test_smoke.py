"""Every config in its smoke size runs a few steps, each on the stages below it."""

import jax
import numpy as np
import pytest

from configs import judge, kl_vae, mar, marval, marval_rl, mask_grpo, maskfocus, maskgit, shortcut, speed_rl, tokenizer
from maskrl_jax import runner
from maskrl_jax.parallel import Parallel
from maskrl_jax.tasks.task import Context, Parent

CHAINS = {
    "shapes": [("tokenizer", tokenizer, "smoke"), ("judge", judge, "smoke"), ("maskgit", maskgit, "smoke")]
    + [("speed_rl", speed_rl, "smoke"), ("mask_grpo", mask_grpo, "smoke"), ("maskfocus", maskfocus, "smoke")]
    + [("shortcut", shortcut, "smoke")],
    "continuous": [("tokenizer", kl_vae, "smoke"), ("judge", judge, "smoke"), ("mar", mar, "smoke")]
    + [("marval", marval, "smoke"), ("marval_rl", marval_rl, "smoke")],
    "digits": [("tokenizer", tokenizer, "digits-smoke"), ("judge", judge, "digits-smoke")]
    + [("maskgit", maskgit, "digits-smoke")],
}


def few_steps(config, parents, store, workdir):
    """Return the stage as a parent after two steps, or one in each of the three phases of `marval`."""
    steps = 3 if config.task == "marval" else 2
    parallel = Parallel(config.parallel, jax.local_devices()[:1])
    task = runner.build(Context(config, parents, parallel, store, workdir))
    state = task.init(jax.random.key(config.seed))
    before = jax.device_get(state.params)
    for step in range(steps):
        state, _ = task.step(state, task.batch(step))
    state = jax.device_get(state)
    assert int(state.step) == steps and int(state.bad_total) == 0
    if config.task == "marval":
        assert int(state.extra["auxiliary"].step) == 2  # of the warm-up and of the update
    changed = jax.tree.map(lambda a, b: np.isfinite(b).all() and not np.array_equal(a, b), before, state.params)
    assert any(jax.tree.leaves(changed))
    return Parent(config, state.ema, state.extra, workdir)


@pytest.mark.parametrize("chain", CHAINS)
def test_smoke_configs_run_a_few_steps(trained, tmp_path, chain):
    parents = {}
    for name, module, argument in CHAINS[chain]:
        workdir = tmp_path / name
        workdir.mkdir()
        parents[name] = few_steps(module.get_config(argument), parents, trained.store, str(workdir))
        if chain == "continuous" and name.startswith("mar"):
            a_user_samples(parents[name], parents, trained.store)


def a_user_samples(stage, parents, store):
    """`sample --num_steps=2`, without its flags."""
    context = Context(
        stage.config, parents, Parallel(stage.config.parallel, jax.local_devices()[:1]), store, stage.workdir
    )
    studio = runner.task_module(stage.config).studio(context, stage.params)
    system, steps, words = studio.asked({"num_steps": 2}, None)
    cond = studio.dataset.encode(studio.dataset.prompts(2, 0))
    made = system.generate(steps, cond, np.arange(2, dtype=np.int32), 0)
    assert f"{system.label}: 2 iterations" in words
    assert made.images.shape == (2, 32, 32, 3) and np.isfinite(made.images).all()
    np.testing.assert_array_equal(made.calls, 2)
