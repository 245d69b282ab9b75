"""What every config needs of TPU slices that are not there: the dry runs of configs and topologies, as one table.

python benchmarks/scaling.py                                 # what benchmarks/scaling.json lacks; hours, resumable
python benchmarks/scaling.py --only=speed_rl:meissonic@v6e:2x4
python benchmarks/scaling.py --draw                          # the table and figures of what is there

Compiled are the programs of the config as it stands: its batch over all chips (strong scaling), or with --weak as many
rows a chip as on the smallest slice of its kind. Nothing is run, so no time here was measured: a time is the roofline's,
the least that the chip's published rates allow. Needs libtpu (pip install '.[tpu]').
"""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from maskrl_jax import dry_run, paths, runner  # noqa: E402
from maskrl_jax.evaluate import provenance  # noqa: E402

SLICES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v6e:2x4", "v5p:2x2x1")
PUBLISHED = (
    "speed_rl:meissonic",
    "maskfocus:meissonic",
    "mask_grpo:meissonic",
    "shortcut:maskgit512",
    "shortcut:dimoo",
)
PUBLISHED += ("maskgit:port512", "mar:huge", "marval:huge", "marval_rl:base")
EMBEDDED = ("maskgit", "speed_rl:full", "maskfocus", "shortcut", "mar", "marval")
ASKED = (
    *(f"{config}@v6e:2x4" for config in ("speed_rl:meissonic", "maskfocus:meissonic", "marval:huge")),
    *(f"{config}@v5e:4x4" for config in ("speed_rl:meissonic", "maskfocus:meissonic")),
    "shortcut:dimoo@v5p:2x2x1",
)
ONLY = flags.DEFINE_multi_string("only", None, "<config>[:argument]@<topology>, in the place of all")
WEAK = flags.DEFINE_bool("weak", False, "as many rows a chip as on the smallest slice of the same chips")
SET = flags.DEFINE_multi_string("set", None, "<key>=<value> of the config, such as rollout_rows=1; goes into the name")
DRAW = flags.DEFINE_bool("draw", False, "draw what is there, compile nothing")
OUT = flags.DEFINE_string("out", "benchmarks/scaling", "result files without their ending")
EACH = flags.DEFINE_bool("each", False, "compile one pair in this process (used by the command itself)")


def main(_: list[str]) -> None:
    """Compile what is missing, each pair in a process of its own, and write after every one."""
    place = (ROOT / OUT.value).with_suffix(".json")
    done = json.loads(place.read_text()) if place.exists() else {}
    every = list(dict.fromkeys([*ASKED, *(f"{c}@{s}" for c in (*PUBLISHED, *EMBEDDED) for s in SLICES)]))
    for pair in [] if DRAW.value else ONLY.value or every:
        name = _named(pair)
        if EACH.value:
            print(json.dumps(compiled(pair)))
            return
        if name in done:
            continue
        print(name, flush=True)
        changes = [f"--set={change}" for change in SET.value or ()]
        command = [sys.executable, __file__, f"--only={pair}", "--each", *(["--weak"] if WEAK.value else []), *changes]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if made.returncode:
            print(made.stderr.strip().splitlines()[-1], flush=True)
            continue
        done[name] = json.loads(made.stdout.strip().splitlines()[-1])
        paths.write(str(place), json.dumps(done, indent=1) + "\n")
    paths.write(str(place.with_suffix(".md")), table(done))
    _draw(done, place.with_suffix(".png"))


def _named(pair: str) -> str:
    return " ".join([pair, *(["weak"] if WEAK.value else []), *(SET.value or ())])


def compiled(pair: str) -> dict:
    """Dry run of a config on a topology: {"chips", "rows", "commit", "phases": {name: numbers}}."""
    config, topology = pair.split("@")
    file, _, argument = config.partition(":")
    made = importlib.import_module(f"configs.{file}").get_config(argument)
    for change in SET.value or ():
        path, _, value = change.partition("=")
        *parents, key = path.split(".")
        owner = made
        for part in parents:
            owner = owner[part]
        owner[key] = type(owner[key])(value)
    chips = _chips(topology)
    if WEAK.value:
        smallest = min(_chips(one) for one in SLICES if one.split(":")[0] == topology.split(":")[0])
        for rows in (made, made.evaluation):  # both must divide by the chips
            rows.batch_size = rows.batch_size * chips // smallest
    with open("/dev/null", "w") as nowhere:
        reports = dry_run.run(made, runner.phases, topology, out=nowhere)
    return {
        "chips": chips,
        "rows": made.batch_size,
        "parallel": made.parallel,
        "commit": provenance.commit_hash(ROOT),
        "phases": {report.name: _numbers(report) for report in reports},
    }


def _chips(topology: str) -> int:
    count = 1
    for side in topology.split(":")[1].split("x"):
        count *= int(side)
    return count


def _numbers(report: dry_run.PhaseReport) -> dict:
    if report.needs is None:
        return {"fits": False, "error": report.error}
    needs = report.needs
    collectives = {kind: [one.count, one.tensor_bytes] for kind, one in needs.collectives.items()}
    time = dataclasses.asdict(needs.time) | {"seconds": needs.time.seconds, "bound": needs.time.bound}
    return {
        "fits": report.fits,
        "peak": needs.memory.peak,
        "flops": needs.flops,
        "bytes": needs.bytes_accessed,
        "collectives": collectives,
        "time": time,
    }


def table(done: dict) -> str:
    """All pairs as markdown."""
    lines = [
        "# What configs need of TPU slices, by dry run",
        "",
        "Per device and execution, compiled and not run (`python benchmarks/scaling.py`, commits "
        f"{', '.join(sorted({one['commit'] for one in done.values()}))}). Times are the roofline's. Images a second: rows "
        "of the batch over the roofline time of one rollout and one update.",
        "",
        "| config @ slice | chips | rows | strategy | phase | fits | peak GiB | TFLOPs | collectives, GiB | roofline s | bound "
        "by | images / s |",
        "|---|---:|---:|---|---|---|---:|---:|---|---:|---|---:|",
    ]
    for name, one in done.items():
        for phase, x in one["phases"].items():
            head = f"| {name} | {one['chips']} | {one['rows']} | {one['parallel']} | {phase} "
            if "peak" not in x:
                lines.append(f"{head}| no: {x['error'].split(':')[0]} | | | | | | |")
                continue
            moved = ", ".join(
                f"{kind} {count} x, {size / 2**30:.3g}" for kind, (count, size) in x["collectives"].items()
            )
            last = phase == list(one["phases"])[-1]
            rate = f"{_rate(one):.3g}" if last and _rate(one) else ""
            lines.append(
                f"{head}| {'yes' if x['fits'] else 'no'} | {x['peak'] / 2**30:.3g} | {x['flops'] / 1e12:.3g} | "
                f"{moved or '-'} | {x['time']['seconds']:.3g} | {x['time']['bound']} | {rate} |"
            )
    return "\n".join(lines) + "\n"


def _rate(one: dict) -> float:
    """Images a second at the roofline; 0 where a phase does not compile."""
    if any("time" not in x for x in one["phases"].values()):
        return 0.0
    return one["rows"] / sum(x["time"]["seconds"] for x in one["phases"].values())


def _draw(done: dict, path: pathlib.Path) -> None:
    """Images a second against chips, of configs with two slices of the same chips or more: strong and weak scaling."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    labels = list({**_series(done, False), **_series(done, True)})
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axes, weak in zip(panels, (False, True), strict=True):
        for label, points in _series(done, weak).items():
            chips, rates = zip(*points, strict=True)
            color = f"C{labels.index(label)}"
            axes.loglog(chips, rates, marker="o", label=label, color=color)
            ideal = [rates[0] * n / chips[0] for n in chips]
            axes.loglog(chips, ideal, linewidth=0.8, linestyle=":", color=color)
        axes.set_title("a batch over more chips" if not weak else "as many rows a chip")
        axes.set_xticks([4, 16, 64, 256], ["4", "16", "64", "256"])
        axes.minorticks_off()
        axes.set_xlabel("chips")
        axes.legend(fontsize=7)
    panels[0].set_ylabel("images a second at the roofline (dotted: in proportion)")
    figure.savefig(path, dpi=150)


def _series(done: dict, weak: bool) -> dict[str, list[tuple[int, float]]]:
    """Label -> (chips, rate) of rising slices. Weak scaling starts from the smallest slice, which is the same program."""
    series: dict[str, dict] = {}
    for name, one in done.items():
        pair, *changes = name.split(" ")
        config, topology = pair.split("@")
        smallest = one["chips"] == min(_chips(s) for s in SLICES if s.split(":")[0] == topology.split(":")[0])
        if not _rate(one) or (("weak" in changes) != weak and not (weak and smallest)):
            continue
        changes = [change for change in changes if change != "weak"]
        series.setdefault(" ".join([config, topology.split(":")[0], *changes]), {})[one["chips"]] = _rate(one)
    return {label: sorted(points.items()) for label, points in series.items() if len(points) > 1}


if __name__ == "__main__":
    app.run(main)
