"""A reward that another process gives, over HTTP: `wire` says how they talk, docs/remote_rewards.md who runs what.

A score that could not be had is NaN, never 0: `rl.credit.assign` rejects a group with a NaN, which then enters neither
the update nor any memory.
"""

import contextlib
import dataclasses
import http.client
import json
import pathlib
import time
import urllib.parse
from collections.abc import Callable, Sequence

import numpy as np

from maskrl_jax.data.pixels import rgb
from maskrl_jax.errors import UserError
from maskrl_jax.rewards import wire

AGAIN = (408, 429)  # of the statuses below 500, those that another try may change
ANSWER_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class RemoteConfig:
    """Where a service is, and how much it is waited for."""

    url: str  # http://host:port/path or https://
    timeout: float = 60.0  # seconds of one try, all of it
    retries: int = 2  # tries after the first
    pause: float = 1.0  # seconds before the second try, twice that before each next one
    batch_size: int = 16  # pictures of a request
    patience: int = 3  # calls of `score` in a row that got no score at all, after which the run stops

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"url {self.url!r} is none; write http://localhost:8421")
        if min(self.timeout, self.batch_size, self.patience) <= 0 or min(self.retries, self.pause) < 0:
            raise ValueError(f"timeout, batch_size and patience must be above 0, retries and pause at least 0: {self}")


@dataclasses.dataclass(frozen=True)
class Probe:
    """Pictures [n,H,W,3] whose scores [n] by a service are known, to `tolerance`: at least two, not all alike."""

    images: np.ndarray
    prompts: tuple[str, ...]
    scores: np.ndarray
    tolerance: float

    def __post_init__(self):
        if len(self.images) != len(self.prompts) or np.shape(self.scores) != (len(self.prompts),):
            raise ValueError(
                f"a probe of {len(self.images)} pictures, {len(self.prompts)} prompts, {self.scores} scores"
            )
        if len(self.prompts) < 2 or np.ptp(self.scores) <= 2 * self.tolerance:
            raise ValueError("a probe needs two pictures whose scores differ by more than twice its tolerance")


class ServiceError(Exception):
    """Says why a try failed; `again` whether another may help."""

    def __init__(self, reason: str, again: bool = True):
        super().__init__(reason)
        self.again = again


class RemoteReward:
    """`score(images, prompts)` through a service; call `self_test` before the first."""

    def __init__(self, config: RemoteConfig, sleep: Callable[[float], None] = time.sleep):
        self.config, self._sleep = config, sleep
        self._silent, self._warned = 0, False

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Score pictures [B,H,W,3] in [0,1]: float32 [B], NaN for what is not finite or got no score.

        A request whose tries all fail ends the call: the pictures after it are not sent.

        Raises ValueError where pictures and prompts do not match, and UserError after `patience` calls in a row
        without any score.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(prompts):
            raise ValueError(f"pictures {images.shape} and {len(prompts)} prompts; wanted are [B,H,W,3] and B")
        scores = np.full(len(prompts), np.nan, np.float32)
        sent = np.flatnonzero(np.isfinite(images).all(axis=(1, 2, 3)))
        reasons, size = [], self.config.batch_size
        for start in range(0, len(sent), size):
            rows = sent[start : start + size]
            try:
                scores[rows] = self._asked(images[rows], [prompts[row] for row in rows])
            except ServiceError as error:
                reasons.append(str(error))
                if error.again:  # every try failed so: an outage, which more requests would wait out one by one
                    break
        if len(sent) and not np.isfinite(scores).any():
            reasons = reasons or ["no score of its answer is a number"]
            self._outage(reasons[-1])
        elif len(sent):
            self._silent = 0
        self._warn(reasons)
        return scores

    def self_test(self, probe: Probe) -> None:
        """Raise UserError of one line unless the service gives the known scores, in both orders of the pictures."""
        count = len(probe.prompts)
        for order in (np.arange(count), np.arange(count)[::-1]):
            try:
                found = self._asked(probe.images[order], [probe.prompts[i] for i in order])
            except ServiceError as error:
                raise UserError(
                    f"no reward service at {self.config.url}: {error}; start it, or change its url"
                ) from error
            wrong = ~(np.abs(found - probe.scores[order]) <= probe.tolerance)  # so that NaN is wrong
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                raise UserError(
                    f"the reward service at {self.config.url} scores {probe.prompts[order[at]]!r} of the probe "
                    f"{found[at]:g}, not {probe.scores[order[at]]:g}; is it the right one?"
                )

    def _warn(self, reasons: list[str]) -> None:
        """Say once an outage that there is one."""
        if reasons and not self._warned:
            print(f"warning: reward service {self.config.url}: {reasons[0]}; its groups are left out", flush=True)
        self._warned = bool(reasons)

    def _outage(self, reason: str) -> None:
        """Count a call without any score, and stop after too many in a row."""
        self._silent += 1
        if self._silent >= self.config.patience:
            raise UserError(
                f"the reward service at {self.config.url} gave no score {self._silent} times in a row: {reason}; "
                "mend it and run the same command again, which goes on from the last checkpoint"
            )

    def _asked(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Ask until there is an answer or no try is left (ServiceError)."""
        body, tries = wire.request(images, prompts), self.config.retries + 1
        for attempt in range(tries):
            try:
                return self._once(body, len(prompts))
            except ServiceError as error:
                if attempt == tries - 1 or not error.again:
                    raise
            self._sleep(self.config.pause * 2**attempt)

    def _once(self, body: bytes, count: int) -> np.ndarray:
        try:
            status, found = post(self.config.url, body, self.config.timeout)
            if status == 200:
                return wire.read_answer(found, count)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServiceError(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
        raise ServiceError(f"status {status}: {_said(found)}", again=status >= 500 or status in AGAIN)


def post(url: str, body: bytes, timeout: float) -> tuple[int, bytes]:
    """Post JSON and return (status, answer), at most ANSWER_BYTES of it, all within `timeout` seconds.

    Raises OSError, http.client.HTTPException, or ValueError for an answer that is too long or ends early. Neither a
    proxy nor a redirection is followed.
    """
    parts, end = urllib.parse.urlsplit(url), time.monotonic() + timeout
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    try:
        connection.connect()
        socket = connection.sock  # which the connection forgets once it has the head of the answer
        socket.settimeout(_left(end))
        # A service that refuses a request may answer and break off before it has all of it.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", path, body, {"Content-Type": wire.TYPE, "Connection": "close"})
        socket.settimeout(_left(end))
        response, found = connection.getresponse(), b""
        while part := response.read1(65536):
            found += part
            if len(found) > ANSWER_BYTES:
                raise ValueError(f"the answer has more than {ANSWER_BYTES} bytes")
            socket.settimeout(_left(end))  # a socket's timeout is of one read, ours of all
        if response.length:  # what was promised and did not come
            raise http.client.IncompleteRead(found, response.length)
        return response.status, found
    finally:
        connection.close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left


def _said(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])[:120]
    except (KeyError, TypeError, ValueError, RecursionError):
        return "no reason given"


def read_probe(path: str) -> Probe:
    """Read a probe: {"tolerance": t, "pictures": [{"image": file beside it, "prompt": text, "score": number}, ...]}.

    Raises UserError of one line for a file that is missing or wrong.
    """
    from PIL import Image

    place = pathlib.Path(path)
    try:
        found = json.loads(place.read_text())
        rows = found["pictures"]
        images = [rgb(Image.open(place.parent / row["image"])).astype(np.float32) / 255 for row in rows]
        scores = np.array([float(row["score"]) for row in rows])
        return Probe(np.stack(images), tuple(str(row["prompt"]) for row in rows), scores, float(found["tolerance"]))
    except (KeyError, OSError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"no probe of a reward service in {path}: {reason}; see docs/remote_rewards.md") from error
