"""MARVAL-RL: a one-call student tuned on a differentiable reward through its iterations (arXiv 2511.15190).

python -m maskrl_jax.main --config=configs/marval_rl.py            # embedded task; the reward is the judge
python -m maskrl_jax.main --config=configs/marval_rl.py:policy     # the same by a policy gradient
python -m maskrl_jax.main --config=configs/marval_rl.py:smoke      # a few updates of everything: does it run?
python -m maskrl_jax.main --config=configs/marval_rl.py:base --dry_run=v5e:4x4   # published sizes, compile only
python -m maskrl_jax.main --config=configs/marval_rl.py:large --dry_run=v5e:4x4
python -m maskrl_jax.main --config=configs/marval_rl.py:huge --dry_run=v5e:8x8

specs/marval.md section 10 says what is published: the objective, no length, rate or batch.
"""

from configs import mar, marval, sizes

STEPS = {"": 30, "policy": 100, "smoke": 3, **dict.fromkeys(mar.PUBLISHED, 5000)}


def get_config(arg: str = ""):
    """Sizes: default, `policy`, `smoke`; `base`, `large`, `huge` are networks of the published sizes."""
    sizes.check(arg, tuple(STEPS))
    smoke, published, policy = arg == "smoke", arg in mar.PUBLISHED, arg == "policy"
    # Ours: near its distillation, lest it paint what the judge likes, and no gradient through the chain of iterations.
    held = not published and not policy
    student = marval.get_config("" if policy else arg)
    parents = {**student.parents, "marval": student}
    steps = 4 if smoke else 16
    return sizes.run(
        "marval_rl",
        "configs/marval_rl.py" + (f":{arg}" if arg else ""),
        num_steps=STEPS[arg],
        batch_size=16 if smoke else 64 if published or policy else 32,
        log_every=1 if smoke else 2,
        save_every=50 if published or policy else 10,
        eval_every=0 if smoke or published else 10,  # the exact verifier watches what the judge is made to say
        parents=parents,
        init=dict.fromkeys(parents, ""),
        data=student.data.to_dict(),
        model={},
        # With objects too many or too few the judge is 0 whatever else is changed: a smoke run's pictures need another.
        rewards={"judge": 1.0} | ({"judge_whole": 0.1} if smoke else {}),
        gradient="policy" if policy else "reward",
        rollout={"num_steps": steps, "bucket": 64 if published else 16},  # fewer shapes compile sooner
        truncation={"iterations": 0, "detach_context": held},
        smoothing=0.0,  # noise on the tokens that are scored
        policy={
            "deviation": 0.1,
            "group": 8,
            "clip": 0.2,
            "kl": 0.01,
            "iterations": 0,
            "updates": 1,
        },  # its clip acts from the second update on
        anchor={"kind": "gsim", "weight": 1.0, "by": "gradient"}
        if held
        else {"kind": "none", "weight": 0.0, "by": "loss"},
        optimizer={
            "name": "adamw",
            "learning_rate": 1e-6 if published else 1e-4 if policy else 2e-5,
            "b1": 0.9,
            "b2": 0.999,
            "clip_norm": 1.0,
            "decay": "constant",
            "ema_decay": 0.999 if published else 0.9,
        },
        aim={"closed": 0.3, "closed_low": 0.1, "diversity": 0.9},
        sampler=student.sampler.to_dict(),
        evaluation=student.evaluation.to_dict(),
    )
