"""A parent that `init` puts in the place of another: its own sizes count, and generators keep to their tokenizer."""

import pathlib
import shutil

import jax
import pytest
import tiny

from maskrl_jax import loop, runner, stored
from maskrl_jax.errors import UserError


@pytest.fixture
def built(monkeypatch):
    """Collect the tasks that would be trained."""
    tasks = []
    monkeypatch.setattr(loop, "train", lambda task, *args: tasks.append(task))
    monkeypatch.setattr(runner, "_trained_id", lambda workdir: "nothing was trained")
    return tasks


def test_sizes_follow_from_the_tokenizer_that_is_there(trained, built, one_device, tmp_path):
    config = tiny.get_config("maskgit")
    config.parents.tokenizer.model.codebook_size = 99  # what is there has 16
    config.init.tokenizer = trained.parents["tokenizer"].workdir
    with one_device():
        runner.run(config, str(tmp_path / "run"), trained.store)
    params = jax.eval_shape(built[0].init, jax.random.key(0)).params["params"]
    assert params["head"]["bias"].shape == (16,)


def test_a_base_of_another_tokenizer_is_refused(trained, built, one_device, tmp_path):
    config = tiny.get_config("speed_rl")
    config.parents.tokenizer = tiny.get_config("tokenizer")
    config.parents.tokenizer.num_steps = 2
    with one_device(), pytest.raises(UserError, match="not the one that the base was trained with"):
        runner.run(config, str(tmp_path / "run"), trained.store)
    for name in ("maskgit", "tokenizer"):
        config.parents.tokenizer.num_steps = 4
        config.init[name] = trained.parents[name].workdir
    with one_device():
        runner.run(config, str(tmp_path / "run"), trained.store)
    assert len(built) == 1


def test_a_tokenizer_of_the_same_config_with_other_parameters_is_refused(trained, built, one_device, tmp_path):
    theirs = pathlib.Path(trained.parents["tokenizer"].workdir)
    ours = tmp_path / "tokenizer"
    shutil.copytree(theirs, ours)
    stored.finish(str(ours), 4, "other parameters")
    config = tiny.get_config("speed_rl")
    config.init.tokenizer = str(ours)
    with one_device(), pytest.raises(UserError, match=f"is not the one that the base .*init.tokenizer={theirs}"):
        runner.run(config, str(tmp_path / "run"), trained.store)


def test_a_base_whose_own_tokenizer_was_replaced_is_known_by_it(trained, built, one_device, tmp_path):
    base = tiny.get_config("maskgit")
    base.init.tokenizer = trained.parents["tokenizer"].workdir
    base.parents.tokenizer.seed = 5
    resolved = runner._as_trained(base)
    assert resolved.parents.tokenizer.seed == 0 and base.parents.tokenizer.seed == 5
    assert runner._as_trained(tiny.get_config("maskgit")).parents.tokenizer.seed == 0
