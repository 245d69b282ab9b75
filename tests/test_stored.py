"""A stage's folder: what its config comes down to, and back."""

import json

import pytest
import tiny
import toy_task

from configs import sizes
from maskrl_jax import stored
from maskrl_jax.errors import UserError


def test_fingerprint_follows_what_changes_the_result_and_nothing_else(tmp_path):
    plain = stored.fingerprint(toy_task.get_config("child"))
    for key, value in {
        "log_every": 7,
        "eval_every": 3,
        "save_every": 9,
        "keep": 4,
        "parallel": "sharded",
    }.items():
        config = toy_task.get_config("child")
        config[key] = config.parents.base[key] = value
        assert stored.fingerprint(config) == plain
    for change in ({"seed": 1}, {"model": {"width": 8}}, {"parents": {"base": {"num_steps": 7}}}):
        config = toy_task.get_config("child")
        config.update(change)
        assert stored.fingerprint(config) != plain


def served(name="child", **service):
    """The toy config with a service, its own and its parent's."""
    config = toy_task.get_config(name)
    for one in (config, config.parents.base):
        one.service = sizes.SERVICE | service
    return config


def test_a_service_without_a_url_is_as_none():
    old = toy_task.get_config("child")
    assert stored.fingerprint(served()) == stored.fingerprint(old)
    assert stored.differences(stored.plain(old), stored.plain(served())) == {}
    assert stored.differences(stored.plain(served()), stored.plain(old)) == {}


def test_data_without_tokens_is_as_that_of_before_there_were_any():
    old, new = toy_task.get_config("child"), toy_task.get_config("child")
    for one in (old, old.parents.base):
        one.data = {"name": "shapes", "text_length": 8}
    for one in (new, new.parents.base):
        one.data = sizes.data("shapes")
    assert stored.fingerprint(new) == stored.fingerprint(old)
    assert stored.differences(stored.plain(old), stored.plain(new)) == {}
    new.data.tokens = "clip"
    assert stored.fingerprint(new) != stored.fingerprint(old)
    assert sorted(stored.differences(stored.plain(old), stored.plain(new))) == [
        "data.pad",
        "data.tokenizer",
        "data.tokens",
    ]


def test_of_a_service_name_and_weight_count_and_not_how_it_is_reached(tmp_path):
    known = served(url="http://a")
    assert stored.fingerprint(known) != stored.fingerprint(served())
    moved = served(url="http://b", timeout=1.0, retries=0, pause=0.0, batch_size=1, patience=9, probe="p")
    assert stored.fingerprint(moved) == stored.fingerprint(known)
    (tmp_path / "config.json").write_text(json.dumps(stored.plain(known)))
    stored.finish(str(tmp_path), known.num_steps, "x")
    assert stored.is_done(moved, str(tmp_path))
    moved.service.weight = 2.0
    assert stored.fingerprint(moved) != stored.fingerprint(known)
    with pytest.raises(UserError, match="service.weight: 1.0 -> 2.0; use another"):
        stored.is_done(moved, str(tmp_path))


def test_fingerprint_of_a_replaced_parent_is_that_of_what_lies_there(tmp_path):
    base = toy_task.get_config()
    config = toy_task.get_config("child")
    plain = stored.fingerprint(config)
    config.init.base = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stored.plain(base)))
    found = {plain, stored.fingerprint(config)}
    for trained in ("these parameters", "others"):  # of the same config
        stored.finish(str(tmp_path), 6, trained)
        found.add(stored.fingerprint(config))
    base.seed = 5
    (tmp_path / "config.json").write_text(json.dumps(stored.plain(base)))
    assert len(found | {stored.fingerprint(config)}) == 5


def test_a_stage_that_shall_go_on_is_not_finished(tmp_path):
    config = toy_task.get_config()
    (tmp_path / "config.json").write_text(json.dumps(stored.plain(config)))
    assert not stored.is_finished(str(tmp_path))
    stored.finish(str(tmp_path), config.num_steps, "x")
    assert stored.is_finished(str(tmp_path))
    config.num_steps += 1
    (tmp_path / "config.json").write_text(json.dumps(stored.plain(config)))
    assert not stored.is_finished(str(tmp_path))


def test_every_evaluation_gets_a_folder_of_its_own(tmp_path):
    assert [stored.new_evaluation(str(tmp_path))[-13:] for _ in range(3)] == [f"evaluations/{i}" for i in (1, 2, 3)]


def test_places_are_kept_relative(tmp_path):
    run, moved = tmp_path / "runs" / "a", tmp_path / "moved"
    run.mkdir(parents=True)
    stored.write_places(str(run), {"base": str(tmp_path / "runs" / "stages" / "b")}, str(tmp_path / "runs" / "stages"))
    (tmp_path / "runs").rename(moved)
    assert stored.read_places(str(moved / "a")) == ({"base": f"{moved}/stages/b"}, f"{moved}/stages")
    assert stored.read_places(str(tmp_path)) is None


def test_a_stored_config_comes_back_hashable(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {"stages": [1, [2, 3]]}}')
    assert stored.read_config(str(tmp_path)).model.stages == (1, (2, 3))


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("")
    for workdir in (tmp_path / "notes.md", tmp_path / "notes.md" / "run"):
        with pytest.raises(UserError, match="is or lies below a file"), stored.lock(str(workdir)):
            pass


def test_how_data_are_read_makes_no_other_stage():
    """Nor do stages of before these keys existed count as others."""
    before, now = (tiny.get_config("maskgit") for _ in range(2))
    for config in (before, before.parents.tokenizer):
        for key in ("encoded", "workers"):
            with config.unlocked():
                if key in config.data:
                    del config.data[key]
    now.data.update({"encoded": "folder", "workers": 4})
    assert stored.fingerprint(before) == stored.fingerprint(now)
    assert stored.differences(stored.plain(before), stored.plain(now)) == {}
    assert stored.data_of(before) == stored.data_of(now) == {"name": "shapes", "text_length": 8}
