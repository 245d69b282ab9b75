"""The launch scripts: what they print, what they refuse, and what they run with stand-ins for the tools they call.

After a wanted change of the output: MASKRL_GOLDEN=write python -m pytest tests/test_launch.py
"""

import math
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
SCRIPTS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
PLACE = "--project=demo-project --zone=us-east5-b --bucket=gs://demo-runs/"
IMAGE = "--bucket=demo-runs --image=us-docker.pkg.dev/demo/ml/maskrl_jax:1"
CASES = {
    "tpu_vm_v5e.txt": f"tpu_vm.sh {PLACE} --type=v5litepod-16",
    "tpu_vm_v6e_spot.txt": f"tpu_vm.sh recreate {PLACE} --type=v6e-16 --spot --config=configs/maskfocus.py:smoke "
    '--name=demo --service_account=run@demo.iam.gserviceaccount.com -- --config.seed=1 "--config.note=it\'s 1"',
    "tpu_vm_run.txt": f"tpu_vm.sh run {PLACE} --type=v6e-8 --config=configs/speed_rl.py",
    "tpu_vm_delete.txt": "tpu_vm.sh delete --project=demo-project --zone=us-east5-b --name=speed-rl",
    "tpu_mig_v6e_spot.txt": f"tpu_mig.sh {PLACE} --type=v6e --topology=4x4 --spot",
    "tpu_mig_v5p.txt": f"tpu_mig.sh {PLACE} --type=v5p --topology=2x2x2",
    "tpu_mig_tpu7x.txt": f"tpu_mig.sh recreate {PLACE} --type=tpu7x --topology=2x2x4 --workdir=gs://other/run "
    "--config=configs/speed_rl.py",
    "tpu_mig_delete.txt": "tpu_mig.sh delete --project=demo-project --zone=us-east5-b --config=configs/mar.py:large",
    "tpu_mig_one_host.txt": f"tpu_mig.sh {PLACE} --type=v6e --topology=2x2",
    "gke_v6e.yaml": f"gke_jobset.sh {IMAGE}",
    "gke_v5e_one_host_spot.yaml": f"gke_jobset.sh {IMAGE} --type=v5e --topology=2x4 --chips_per_host=8 --spot",
    "gke_tpu7x_reward.yaml": f"gke_jobset.sh {IMAGE} --type=tpu7x --topology=2x2x4 --config=configs/maskfocus.py "
    "--reward=judge --reward_cpu=0.5 --reward_flags=--workdir=gs://demo-runs/judge --grace=120 -- '--config.note=a \"b\" \\ $(c) $$'",
    "slurm_gpu.txt": "slurm.sbatch --nodes=2 --gpus=8",
    "slurm_node.txt": "slurm.sbatch --nodes=4 --gpus=4 --per=node --partition=a100 --account=lab --time=12:00:00 "
    "-- --config.seed=1",
}


def launched(arguments, *more, **environment):
    """Run a script of launch/ far from the repository, with no tool of a cloud in reach."""
    script, *rest = shlex.split(arguments)
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *rest, *more],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def shellcheck(*arguments, **options):
    program = pathlib.Path(sys.executable).parent / "shellcheck"
    checked = subprocess.run([program, "--shell=bash", *arguments], capture_output=True, text=True, **options)
    assert checked.returncode == 0, checked.stdout


def stand_ins(folder, **bodies):
    """Make programs that note how they were called in `folder/calls`, then run a body of shell."""
    for name, body in bodies.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{folder}/calls\n{body}\n')
        path.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_what_is_wanted_and_nothing_else(name):
    script, *rest = CASES[name].split(" -- ")
    shown = launched(" -- ".join([f"{script} --dry_run", *rest]))
    assert shown.returncode == 0, shown.stderr
    if os.environ.get("MASKRL_GOLDEN") == "write":
        (GOLDEN / name).write_text(shown.stdout)
    assert shown.stdout == (GOLDEN / name).read_text()
    assert "error" not in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tpu_vm.sh", "give --project=... or set MASKRL_PROJECT"),
        (f"tpu_vm.sh {PLACE} --type=tpu7x-8", "have no TPU7x; use launch/tpu_mig.sh or launch/gke_jobset.sh"),
        (f"tpu_vm.sh {PLACE} --type=v9-8", "unknown type 'v9-8'"),
        (f"tpu_vm.sh {PLACE} --type=v6e-7", "unknown type 'v6e-7'"),
        (f"tpu_vm.sh {PLACE} --type=v5p-96", "unknown type 'v5p-96'"),
        (f"tpu_vm.sh {PLACE} --workdir=runs/here", "workdir 'runs/here' is none that the machines"),
        (f"tpu_vm.sh {PLACE} --config={ROOT}/configs/mar.py", "must be a path inside the repository"),
        (f"tpu_vm.sh {PLACE} --config=../{ROOT.name}/configs/mar.py", "must be a path inside the repository"),
        (f"tpu_vm.sh {PLACE} -- '--config.note=a\nb'", "a flag has a line break"),
        ("tpu_vm.sh --project=demo-project --zone=us-east5-b", "give --bucket=... or set MASKRL_BUCKET"),
        (f"tpu_vm.sh {PLACE} --typ=v6e-8", "unknown flag --typ; see --help"),
        (f"tpu_vm.sh {PLACE} --type", "--type needs a value"),
        (f"tpu_vm.sh {PLACE} --spot=maybe", "--spot is true or false"),
        (f"tpu_vm.sh start {PLACE}", "unexpected 'start'"),
        (f"tpu_vm.sh {PLACE} --zone=here", "zone 'here' is not like us-east5-b"),
        (f"tpu_vm.sh {PLACE} --bucket=Runs/1", "'Runs/1' is no name of a bucket"),
        (f"tpu_vm.sh {PLACE} --config=configs/none.py", "there is no config 'configs/none.py'"),
        (f"tpu_vm.sh {PLACE} --name=My_Run", "name 'My_Run' must be"),
        (f"tpu_vm.sh {PLACE} --dry_run=true", "--dry_run takes no value"),
        (f"tpu_vm.sh delete {PLACE}", "say which run: give --name=... or the --config=..."),
        (f"tpu_vm.sh {PLACE} '--project=my project'", "project 'my project' is no id of a project"),
        (f"tpu_vm.sh run {PLACE}", "give --config=..., that of the run"),
        (f"tpu_vm.sh delete {PLACE} --name=demo -- --config.seed=1", "delete takes no flags of maskrl_jax.main"),
        (f"tpu_vm.sh {PLACE} -- --distributed", "leave out --distributed"),
        (f"tpu_vm.sh {PLACE} --service_account=run", "service_account 'run' is not like run@"),
        (f"tpu_vm.sh {PLACE} --workdir=s3://here", "workdir 's3://here' is none that the machines can write to"),
        (f"tpu_vm.sh {PLACE} -- --workdir=gs://other/run", "give --workdir before the --"),
        (f"tpu_vm.sh {PLACE} --type=v5p-16384", "unknown type 'v5p-16384'"),
        (f"tpu_mig.sh {PLACE} '--machine=a b'", "'a b' is no machine type"),
        (f"gke_jobset.sh {IMAGE} --reward_flags=--folder=/weights", "go with --reward"),
        (f"gke_jobset.sh {IMAGE} --image=Mine:1", "image 'Mine:1' is not a name of an image"),
        ("slurm.sbatch --time=00:02:00", "time '00:02:00' is not longer than the 180 s of --warning"),
        ("slurm.sbatch --time=1-00:00:01 --warning=90000", "time '1-00:00:01' is not longer than the 90000 s"),
        (f"tpu_mig.sh {PLACE} --type=v5e", "unknown type 'v5e'; use v5p, v6e or tpu7x"),
        (f"tpu_mig.sh {PLACE} --topology=16", "v6e has no topology '16'; it has 1x1, 2x2, 2x4, 4x4"),
        (f"tpu_mig.sh {PLACE} --type=v5p --topology=4x4", "v5p has no topology '4x4'; it has 2x2x1, 2x2x2"),
        (f"tpu_mig.sh {PLACE} --type=v5p --topology=8x4x4", "and sides of 4, 8, 12, ... that do not fall"),
        *(
            (f"tpu_mig.sh {PLACE} --type=v5p '--topology={wrong}'", f"v5p has no topology '{wrong}'")
            for wrong in ("4x4x30", "4xx4x4", "4x4x4x", "4 4 4", "2x2x1 2x2x2", "4x4x996")
        ),
        (f"tpu_mig.sh {PLACE} --chips_per_host=8", "a v6e slice of 4x4 has no hosts of '8' chips"),
        (f"tpu_mig.sh {PLACE} --topology=1x1 --chips_per_host=4", "a v6e slice of 1x1 has no hosts of '4' chips"),
        (f"tpu_mig.sh {PLACE} --store=runs/stages", "store 'runs/stages' is none that the machines"),
        (f"gke_jobset.sh {IMAGE} --grace=30", "grace '30' must be a number of seconds, at least 60"),
        (f"gke_jobset.sh {IMAGE} --grace=0090", "grace '0090' must be a number of seconds, at least 60"),
        (f"gke_jobset.sh {IMAGE} --grace=99999999999999999999", "must be a number of seconds"),
        (f"gke_jobset.sh {IMAGE} --max_restarts=-1", "max_restarts '-1' is no number"),
        (f"gke_jobset.sh {IMAGE} --service_account=a@b", "service_account 'a@b' is not a name of a-z, 0-9, - and ."),
        (f"gke_jobset.sh {IMAGE} '--reward=my reward'", "reward 'my reward' is not a name of a reward"),
        (f"gke_jobset.sh {IMAGE} --reward_cpu=2", "reward_cpu and reward_memory go with --reward"),
        (
            f"gke_jobset.sh {IMAGE} --reward=strict --reward_memory=lots",
            "reward_memory 'lots' is not an amount of memory",
        ),
        (f"gke_jobset.sh {IMAGE} --type=tpu7x --topology=2x2", "tpu7x has no topology '2x2'"),
        (f"gke_jobset.sh {IMAGE} --type=v4", "unknown type 'v4'"),
        (f"gke_jobset.sh {IMAGE} '--namespace=a: b'", "namespace 'a: b' is not a name"),
        ("gke_jobset.sh --bucket=demo-runs", "give --image=... or set MASKRL_IMAGE"),
        ("slurm.sbatch --per=core", "per 'core' is not one of gpu, node"),
        ("slurm.sbatch --nodes=0", "nodes '0' is no number above 0"),
        ("slurm.sbatch '--time=a b'", "time 'a b' is not like 30 (minutes)"),
        ("slurm.sbatch '--partition=a b'", "'a b' is no name of a partition"),
        ("local.sh", "give a config first"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    refused = launched(arguments, **stand_ins(tmp_path, gcloud="", kubectl="", sbatch=""))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    assert message in refused.stderr
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "tool"),
    [
        ("slurm.sbatch", "sbatch"),
        (f"tpu_vm.sh {PLACE}", "gcloud"),
        (f"tpu_mig.sh {PLACE}", "gcloud"),
        (f"gke_jobset.sh {IMAGE}", "kubectl"),
    ],
)
def test_a_tool_that_is_not_there_is_missed_before_anything_is_done(tmp_path, arguments, tool):
    for name in ("bash", "dirname", "git", "sed", "tr"):
        (tmp_path / name).symlink_to(shutil.which(name))
    refused = launched(arguments, PATH=str(tmp_path))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"error: there is no {tool} here; see docs/launch.md, or look at --dry_run\n" in refused.stderr


def test_a_job_that_was_submitted_from_elsewhere_says_where_from():
    refused = launched("slurm.sbatch", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR="/etc")
    assert refused.returncode == 2
    assert refused.stderr == "error: there is no /etc/launch/plan.sh; submit from the repository's root\n"


@pytest.mark.parametrize("inside", [".", "part/of/a/larger/repository"])
def test_a_config_that_is_not_committed_is_refused(tmp_path, inside):
    def git(*arguments):
        own = ("-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path))
        subprocess.run(["git", *own, *arguments], check=True, capture_output=True)

    root = tmp_path / inside
    shutil.copytree(ROOT / "launch", root / "launch")
    configs = root / "configs"
    configs.mkdir()
    (configs / "speed_rl.py").touch()
    refused = launched(f"{root}/launch/tpu_vm.sh {PLACE}", **stand_ins(tmp_path, gcloud=""))
    assert (refused.returncode, refused.stdout) == (2, "") and "there is no git commit here" in refused.stderr
    git("init")
    git("add", ".")
    git("commit", "--message=all")
    script = f"{root}/launch/tpu_vm.sh {PLACE} --dry_run"
    assert "without the changes" not in launched(script).stderr
    (configs / "mine.py").touch()
    refused = launched(f"{script} --config=configs/mine.py:arg")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "error: config configs/mine.py is not in the last commit" in refused.stderr
    assert "note: the machines get the last commit, without the changes made since\n" in launched(script).stderr


def test_a_local_run_tells_its_usage():
    shown = launched("local.sh --help")
    assert (shown.returncode, shown.stderr) == (0, "") and shown.stdout.startswith("usage: bash launch/local.sh")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_mig.sh", "gke_jobset.sh", "slurm.sbatch"])
def test_help_names_every_flag_with_its_variable(script):
    shown = launched(f"{script} --help")
    assert shown.returncode == 0
    assert "MASKRL_CONFIG" in shown.stdout and "--dry_run" in shown.stdout


def test_the_environment_stands_in_for_flags():
    variables = {"MASKRL_PROJECT": "demo-project", "MASKRL_ZONE": "us-east5-b", "MASKRL_BUCKET": "demo-runs"}
    shown = launched("tpu_vm.sh --type=v5litepod-16 --dry_run", **variables)
    assert shown.stdout == (GOLDEN / "tpu_vm_v5e.txt").read_text()
    assert "no longer develops" in shown.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    shellcheck("--external-sources", "--source-path=SCRIPTDIR", str(ROOT / "launch" / script))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("tpu", "slurm"))])
def test_shellcheck_finds_nothing_in_what_is_printed(name):
    printed = (GOLDEN / name).read_text()
    shellcheck("-", input="#!/bin/bash\n" + printed)
    _, _, startup = printed.partition("<<'STARTUP'\n")
    if startup:
        shellcheck("-", input=startup.partition("\nSTARTUP\n")[0] + "\n")


def strict(schema):
    """Permit no field that the schema does not name, as the API server does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    fields = isinstance(closed.get("properties"), dict) and closed.get("type") == "object"
    return {**closed, "additionalProperties": False} if fields else closed


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("gke")])
def test_a_jobset_fits_the_published_schema_and_stops_and_restarts_as_a_run_needs(name):
    jobset = yaml.safe_load((GOLDEN / name).read_text())
    schema = strict(yaml.safe_load((GOLDEN / "jobset_crd.yaml").read_text()))
    jsonschema.Draft7Validator(schema).validate(jobset)

    jobs = {job["name"]: job for job in jobset["spec"]["replicatedJobs"]}
    job = jobs["worker"]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    assert (job["completionMode"], job["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert container["command"][:4] == ["python", "-m", "maskrl_jax.main", "--distributed"]  # no shell
    assert {flag.partition("=")[0] for flag in container["command"][4:7]} == {"--config", "--workdir", "--store"}
    annotations = jobs["worker"]["template"]["metadata"]["annotations"]
    assert annotations == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}

    codes = {
        code: rule["action"] for rule in job["podFailurePolicy"]["rules"] for code in rule["onExitCodes"]["values"]
    }
    assert codes == {1: "FailJob", 42: "Count", 143: "Count"}
    rules = {rule["onJobFailureReasons"][0]: rule["action"] for rule in jobset["spec"]["failurePolicy"]["rules"]}
    assert rules == {"PodFailurePolicy": "FailJobSet", "BackoffLimitExceeded": "RestartJobSet"}

    assert ("reward" in jobs) == ("reward" in name) == ("dependsOn" in jobs["worker"])
    if "reward" in jobs:
        (server,) = jobs["reward"]["template"]["spec"]["template"]["spec"]["containers"]
        assert server["command"][:3] == ["python", "-m", "maskrl_jax.rewards.server"]
        assert "--config.service.url=http://maskfocus-reward-0-0.maskfocus:8421" in container["command"]
        assert container["command"][-2] == '--config.note=a "b" \\ $$(c) $$$$'  # which Kubernetes reads as $(c) $$


def test_a_schema_error_would_be_found():
    jobset = yaml.safe_load((GOLDEN / "gke_v6e.yaml").read_text())
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
    schema = strict(yaml.safe_load((GOLDEN / "jobset_crd.yaml").read_text()))
    assert not jsonschema.Draft7Validator(schema).is_valid(jobset)


def test_machines_of_a_group_number_themselves_and_name_worker_0(tmp_path):
    group = """case "$*" in
      *list-instances*) printf 'run-zz\\nrun-aa\\nrun-mm\\nrun-bb\\n' ;;
      *describe*run-aa*) echo 10.0.0.7 ;;
    esac"""
    nothing = dict.fromkeys(("systemctl", "tar", "uv", "systemd-run"), "")
    environment = stand_ins(tmp_path, gcloud=group, curl="echo run-mm", **nothing)
    startup = (GOLDEN / "tpu_mig_v6e_spot.txt").read_text().partition("<<'STARTUP'\n")[2].partition("\nSTARTUP\n")[0]
    subprocess.run(
        ["bash"],
        input=startup,
        env={**environment, "MASKRL_HOME": f"{tmp_path}/home"},
        text=True,
        check=True,
        timeout=60,
    )
    started = (tmp_path / "calls").read_text().splitlines()[-1]
    assert started.startswith("systemd-run --unit=maskrl")
    assert "RestartForceExitStatus=42 143" in started and "RestartPreventExitStatus=1 2" in started
    assert started.endswith(
        "-m maskrl_jax.main --distributed --coordinator_address=10.0.0.7:8476 --num_processes=4 --process_id=2 "
        "--config=configs/speed_rl.py --workdir=gs://demo-runs/runs/speed-rl --store=gs://demo-runs/runs/stages"
    )


def test_a_run_does_what_the_dry_run_prints(tmp_path):
    environment = stand_ins(tmp_path, gcloud="")
    done = launched(CASES["tpu_vm_delete.txt"], **environment)
    assert done.returncode == 0, done.stderr
    printed = shlex.split((GOLDEN / "tpu_vm_delete.txt").read_text().replace("\\\n", ""))
    assert (tmp_path / "calls").read_text().split() == printed


def test_what_is_left_of_a_group_is_deleted(tmp_path):
    environment = stand_ins(tmp_path, gcloud='[[ "$*" != *" delete "* ]]')
    done = launched(CASES["tpu_mig_delete.txt"], **environment)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 4


@pytest.mark.parametrize("gcloud", ["exit 1", '[[ "$*" != *" list "* ]] || echo mar-large'])
def test_a_group_that_is_still_there_is_told(tmp_path, gcloud):
    done = launched(CASES["tpu_mig_delete.txt"], **stand_ins(tmp_path, gcloud=gcloud))
    assert done.returncode == 1
    assert ("error: the group mar-large is still there" in done.stderr) == (gcloud != "exit 1")


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (42, True), (143, True)])
def test_a_slurm_job_that_is_told_to_stop_goes_back_to_the_queue(tmp_path, code, requeued):
    environment = stand_ins(tmp_path, srun=f"exit {code}", scontrol="", sleep="")
    job = launched("slurm.sbatch", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT), **environment)
    assert job.returncode == code, job.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.startswith("srun --cpus-per-task=8") and ("scontrol requeue 7" in calls) == requeued


def test_a_slurm_job_whose_shell_is_signalled_too_leaves_it_to_slurm(tmp_path):
    environment = stand_ins(tmp_path, srun="kill -TERM $PPID\nexit 143", scontrol="", sleep="")
    job = launched("slurm.sbatch", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT), **environment)
    assert job.returncode == 143
    assert "sleep 600\nscontrol requeue 7\n" in (tmp_path / "calls").read_text()
