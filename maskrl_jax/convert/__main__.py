"""Published weights as a stage to start from, and the network of a run back in its published layout.

python -m maskrl_jax.convert --from=kl16 kl16.ckpt --out=runs/published/kl16
python -m maskrl_jax.convert --from=mar checkpoint-last.pth --tokenizer=runs/published/kl16 --out=runs/published/mar-base
python -m maskrl_jax.main --config=configs/marval.py:base --config.init.tokenizer=runs/published/kl16 --config.init.mar=runs/published/mar-base
python -m maskrl_jax.convert --from=clip-rewards weights --out=runs/published/clip-rewards
python -m maskrl_jax.convert --to=mar runs/marval-base --out=student.safetensors
python -m maskrl_jax.convert --from=meissonic-tokenizer Meissonic --out=runs/published/meissonic-tokenizer --verify
python -m maskrl_jax.convert --from=meissonic Meissonic --tokenizer=runs/published/meissonic-tokenizer --out=runs/published/meissonic
python -m maskrl_jax.convert --to=meissonic runs/speed_rl-meissonic --like=Meissonic --out=Meissonic-tuned

Families: taming, maskgit-port, google-vqgan, google-maskgit, shortcut, kl16, mar, amused, meissonic-tokenizer, meissonic,
and dimoo, dimoo-shortcut; clip-rewards, a folder of rewards that are a CLIP, becomes a judge; docs/published_weights.md says what they
are. What is written is what a trained stage leaves: a config, a checkpoint, and the places of the stages below it.
"""

from absl import flags

from maskrl_jax import command
from maskrl_jax.errors import UserError

FROM = flags.DEFINE_string("from", None, "read weights of this family")
TO = flags.DEFINE_string("to", None, "write the network of a run in this family's layout")
OUT = flags.DEFINE_string(
    "out", None, "--from: folder of the new stage; --to: a .safetensors file, with --like a folder", required=True
)
CONFIG = flags.DEFINE_string("config", None, "--from: config file[:argument] of the stage, if not of published sizes")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "--from: converted or trained tokenizer of these weights")
BASE = flags.DEFINE_string("base", None, "--from=shortcut, dimoo-shortcut: converted base of these weights")
JUDGE = flags.DEFINE_string("judge", None, "--from: trained judge of the same data, to measure a generator by")
STORE = flags.DEFINE_string("store", None, "--from: where data sets and measurements go; runs/stages")
LIKE = flags.DEFINE_string("like", None, "--to=meissonic: published folder to copy with the tuned network in it")
VERIFY = flags.DEFINE_bool(
    "verify", False, "--from: compare a forward pass with that of the package the weights are for (extra parity)"
)
ENTRY = flags.DEFINE_string("entry", None, "--from: which of the dicts in a PyTorch file, if not its average")


def check() -> None:
    """Raise for flags that do not go together."""
    if (FROM.value is None) == (TO.value is None):
        raise UserError("expected --from=<family> or --to=<family>; see --help")
    for flag in (CONFIG, TOKENIZER, BASE, JUDGE, STORE, ENTRY, VERIFY):
        if TO.value and flag.value:
            raise UserError(f"--{flag.name} is for --from")
    if FROM.value and LIKE.value:
        raise UserError("--like is for --to")


def main(path: str) -> None:
    """Convert as the flags say."""
    from maskrl_jax import published

    if TO.value:
        published.write(TO.value, path, OUT.value, LIKE.value or "")
        return
    below = {"tokenizer": TOKENIZER.value, "maskgit": BASE.value, "judge": JUDGE.value}
    published.read(
        FROM.value,
        path,
        OUT.value,
        config=CONFIG.value or "",
        below={name: workdir for name, workdir in below.items() if workdir},
        store=STORE.value or "runs/stages",
        entry=ENTRY.value or "",
        compare=VERIFY.value,
    )


if __name__ == "__main__":
    command.run(main, check, arguments=1)
