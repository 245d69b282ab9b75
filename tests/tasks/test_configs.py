"""Every config with every argument loads, passes the runner's check and traces; every setting is read."""

import importlib
import inspect
import pathlib

import pytest
import tiny
from config_reads import SETTINGS, ConfigReads, field_uses
from ml_collections import ConfigDict

import configs
from maskrl_jax import runner
from maskrl_jax.data.dataset import conditioning_of
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel

NAMES = ("tokenizer", "judge", "maskgit", "speed_rl", "mask_grpo", "maskfocus", "shortcut")
NAMES += ("kl_vae", "mar", "marval", "marval_rl")
MODULES = {name: importlib.import_module(f"configs.{name}") for name in NAMES}
RUNNABLE = [(name, argument) for name in NAMES for argument in MODULES[name].STEPS]


def test_every_config_file_is_among_those_tested():
    files = {path.stem for path in pathlib.Path(inspect.getfile(configs)).parent.glob("*.py")}
    assert files - {"__init__", "sizes"} == set(NAMES)


def trace(config):
    """Trace every phase as the dry run does, without compiling."""
    parallel = Parallel(config.parallel)
    for phase in runner.task_module(config).phases(config, parallel):
        state, frozen, batch = phase.args
        program = (parallel.update if phase.kind == "update" else parallel.map)(phase.fn)
        arguments = (parallel.abstract(state), parallel.abstract(frozen), parallel.abstract_batch(batch))
        assert program.jaxpr(*arguments).eqns


@pytest.mark.parametrize(("name", "argument"), RUNNABLE)
def test_a_config_loads_passes_the_check_and_traces(name, argument):
    config = MODULES[name].get_config(argument)
    if argument.startswith(("meissonic", "maskgit512", "dimoo")):  # their blocks are alike, and take long to trace
        config.parents.maskgit.model.depth = 2
    assert config.name == f"configs/{name}.py" + (f":{argument}" if argument else "")
    assert config.task == name and config.num_steps == MODULES[name].STEPS[argument]
    if name == "marval_rl":  # iterations are alike, too
        config.rollout.num_steps = 2
    if argument == "maskgit512-official":  # four rollouts, for one to four devices
        config.batch_size = 8
    if argument.startswith(("meissonic", "maskgit512", "dimoo")):
        refused_without_weights(config)
        config.init.update({"tokenizer": "converted", "maskgit": "converted"})
        if not argument.startswith("maskgit512"):
            config.init.judge = "converted"
    runner.check(config)
    trace(config)


def refused_without_weights(config):
    with pytest.raises(
        UserError, match="a (tokenizer|judge) of model.(form|kind)=.* is not trained here; convert its published"
    ):
        runner.check(config)


def test_published_text_generators_trace():
    for argument in MODULES["maskgit"].TEXT:
        config = MODULES["maskgit"].get_config(argument)
        assert config.name == f"configs/maskgit.py:{argument}"
        config.model.depth = 2
        if argument == "dimoo":
            with pytest.raises(UserError, match="model.weights=bfloat16 of maskgit is for sampling; set float32"):
                runner.check(config)
            config.model.weights = "float32"
        refused_without_weights(config)
        config.init.update({"tokenizer": "converted", "judge": "converted"})
        runner.check(config)
        trace(config)


@pytest.mark.parametrize("argument", MODULES["maskgit"].PUBLISHED)
def test_published_generators_trace_and_wait_for_a_converted_tokenizer(argument):
    config = MODULES["maskgit"].get_config(argument)
    assert config.name == f"configs/maskgit.py:{argument}"
    config.model.depth = 2
    refused_without_weights(config)
    config.init.tokenizer = "converted"
    runner.check(config)
    trace(config)


@pytest.mark.parametrize("argument", MODULES["tokenizer"].PUBLISHED)
def test_published_tokenizers_are_not_trained_here(argument):
    refused_without_weights(MODULES["tokenizer"].get_config(argument))


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_answered_with_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown config argument 'tiny'; choose one of: .*smoke"):
        MODULES[name].get_config("tiny")


def test_reads_are_recorded_by_place():
    config = ConfigDict({"task": "toy", "a": 1, "b": {"c": 2, "d": 3}, "parents": {"base": {"task": "x", "e": 4}}})
    reads = ConfigReads()
    with reads.recorded():
        assert config.task and config.b.c and dict(**config.parents.base)["e"]
        assert str(config) and config.to_dict()
    assert reads.paths("toy") == ({"task", "a", "b.c", "b.d"}, {"task", "b.c"})


@pytest.mark.parametrize(
    "stage", ["tokenizer", "judge", "maskgit", "speed_rl"]
)  # the others: test_quality.py, test_shortcut.py
def test_a_run_reads_every_key_of_its_config(trained, stage):
    every, read = trained.reads.paths(stage)
    assert len(every) > 20
    # A stage that makes no images writes no report to put its name on.
    assert every - read == ({"name"} if stage in ("tokenizer", "judge") else set())


def test_every_field_of_the_settings_is_used(trained):
    # What `trained` leaves unused are the settings of the other policies, of guidance and of Muon.
    with field_uses(*SETTINGS) as unused:
        for other in ({"kind": "fixed"}, {"kind": "budget"}, {"action": "threshold"}):
            config = tiny.get_config("speed_rl")
            config.policy.update(other)
            config.policy.guidance, config.optimizer.name = 1.7, "muon"
            trace(config)
        trace(MODULES["maskgit"].get_config("smoke"))
    left = {cls.__name__: unused[cls] & trained.unused[cls] for cls in SETTINGS}
    assert {name: fields for name, fields in left.items() if fields} == {}


def test_class_conditioning_is_known_without_the_data():
    assert conditioning_of("digits").vocab_size == 11 and conditioning_of("digits").null == 10
