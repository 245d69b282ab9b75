"""Made-up points and generators whose numbers are known."""

import numpy as np
import pytest

from maskrl_jax.evaluate import bootstrap
from maskrl_jax.evaluate.measure import Generated, Point, Protocol, Scorer, System


def make_point(system, setting, calls, scores_P, *, seed=0, frechet=10.0, spread=1.0, label=None):
    """Return a point of two samples a prompt: graded = scores_P for both, pair distance = spread."""
    scores = np.repeat(np.asarray(scores_P, np.float64), 2)
    count = len(scores)
    features = np.zeros((count, 2))
    features[1::2, 0] = spread
    return Point(
        system=system, label=label or system, setting=setting, seed=seed, num_prompts=count // 2, group=2,
        calls_mean=float(calls), calls_sd=0.0, calls_histogram={int(calls): count},
        metrics={"graded": bootstrap.mean_interval(scores[::2])},
        frechet=frechet, precision=0.9, recall=0.8, diversity=bootstrap.Interval(spread, spread, spread),
        per_sample={"graded": scores, "features": features, "calls": np.full(count, calls)},
        kept={"images": np.zeros((0, 4, 4, 3), np.uint8), "commit_step": np.zeros((0, 4), np.uint8),
              "calls": np.zeros(0, np.int32)},
    )  # fmt: skip


def _noise(ids, seed, size):
    return np.stack([np.random.default_rng([seed, int(i)]).normal(size=size) for i in ids]).astype(np.float32)


def _images(noise, amount, cond):
    """Draw one coloured square per picture on a tone; noise in proportion to `amount`."""
    images = np.full((len(noise), 32, 32, 3), 0.93, np.float32)
    for image, row, value in zip(images, noise, cond, strict=True):
        top, left = 3 + 4 * (int(value) % 4), 5 + 3 * (int(value) % 5)
        image[top : top + 11, left : left + 11] = [(0.84, 0.2, 0.15), (0.1, 0.4, 0.75), (0.2, 0.6, 0.3)][int(value) % 3]
        image += amount * row.reshape(32, 32, 3)
    return np.clip(images, 0, 1)


@pytest.fixture(name="make_point")
def make_point_fixture():
    return make_point


@pytest.fixture
def systems():
    """Return (base, tuned): noise falls with the number of calls, for the tuned one three times as fast."""

    def generator(gain, adaptive):
        def generate(setting, cond, ids, seed):
            noise = _noise(ids, seed, 32 * 32 * 3)
            calls = np.full(len(ids), setting)
            if adaptive:
                calls = np.maximum(1, calls + np.round(noise[:, 0])).astype(int)
            commit = np.floor(np.abs(np.sin(np.arange(64) + ids[:, None])) * calls[:, None] * 0.999)
            images = _images(noise, 0.25 / (gain * setting), cond)
            return Generated(images, calls.astype(np.int32), commit.astype(np.uint8))

        return generate

    base = System("base", "Base", generator(1.0, False))
    return base, System("adaptive", "Speed-RL adaptive", generator(3.0, True))


@pytest.fixture
def scorer():
    """Judge by how flat the corner is; features are 4 corner and centre values."""

    def judge(images, prompts):
        roughness = images[:, :3, :3].std(axis=(1, 2, 3))
        features = images[:, [0, 15, 15, 31], [0, 8, 20, 31], 0]
        return {"judge": 1.0 - roughness, "features": features}

    def verify(images, prompts):
        graded = 1.0 - images[:, :3, :3].std(axis=(1, 2, 3))
        strict = (graded > 0.985).astype(np.float32)
        return {"graded": graded, "strict": strict, "colour": graded, "count": strict}

    return Scorer(judge, verify)


@pytest.fixture
def protocol():
    rng = np.random.default_rng(7)
    cond = np.arange(12)
    real = _images(rng.normal(size=(40, 3072)).astype(np.float32), 0.005, np.arange(40))
    captions = tuple(f"a {('red', 'blue', 'green')[i % 3]} square left of a yellow circle" for i in cond)
    real_features = real[:, [0, 15, 15, 31], [0, 8, 20, 31], 0]
    return Protocol(captions, cond, group=3, batch_size=10, seed=0, real_features=real_features, keep=8)
