"""A reward behind HTTP: the server, and the rewards that this package can open (rewards/server.py is the command)."""

import json
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from maskrl_jax.data import verifier
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.rewards import clip, judge, wire

Score = Callable[[np.ndarray, Sequence[str]], Any]
WAITING = 4  # requests at once, one of which is scored; more are told to come again
VERIFIED = (*verifier.SCORES, "graded", "strict", "coherence")
JUDGED = judge.names("cells")
KNOWN = (*VERIFIED, *JUDGED, *clip.KINDS)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        print(f"warning: a client broke off: {sys.exception()!r}", file=sys.stderr)


def make_server(
    name: str, score: Score, host: str = "127.0.0.1", port: int = 0, bounds: wire.Bounds | None = None
) -> ThreadingHTTPServer:
    """Bind a server for score(images float32 [B,H,W,3], prompts) -> [B]; call its `serve_forever`.

    A ValueError or UserError of `score` is the client's mistake (400), anything else a failure of the service (500);
    a score that is not finite is told as none. `score` is called by one thread at a time.
    """
    bounds, lock, waiting = bounds or wire.Bounds(), threading.Lock(), threading.BoundedSemaphore(WAITING)

    def scored(body: bytes) -> bytes:
        images, prompts = wire.read_request(body, bounds)
        with lock:
            scores = np.asarray(score(images, prompts))
        if scores.shape != (len(prompts),):
            raise TypeError(f"reward {name} gave {scores.shape} for {len(prompts)} pictures")
        return wire.answer(scores)

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds without a byte from the client

        def do_GET(self):
            self._send(200, json.dumps({"reward": name}).encode())

        def do_POST(self):
            length = self.headers.get("Content-Length", "")
            if self.headers.get_content_type() != wire.TYPE:  # which no page in a browser can send unasked
                return self._refuse(415, f"send {wire.TYPE}")
            if not (length.isascii() and length.isdigit()):
                return self._refuse(411, "send Content-Length")
            if len(length) > 12 or int(length) > bounds.bytes:
                return self._refuse(413, f"the request is larger than {bounds.bytes} bytes")
            if not waiting.acquire(blocking=False):
                return self._refuse(503, "busy")
            try:
                self._send(200, scored(self.rfile.read(int(length))))
            except (UserError, ValueError) as error:
                self._refuse(400, " ".join(str(error).split()))
            except (ConnectionError, TimeoutError):
                self.close_connection = True  # the client is gone
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                self._refuse(500, type(error).__name__)
            finally:
                waiting.release()

        def _refuse(self, status, reason):
            self._send(status, json.dumps({"error": reason}).encode())

        def _send(self, status, body):
            self.send_response(status)
            self.send_header("Content-Type", wire.TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return _Server((host, port), Handler)


def local_reward(name: str, workdir: str | None = None, folder: str | None = None) -> Score:
    """Open a reward of KNOWN: the exact verifier's, a trained judge's of captions, or a CLIP's. UserError otherwise."""
    if name not in KNOWN:
        raise unknown("reward", name, KNOWN)
    if name in VERIFIED:
        return lambda images, prompts: verifier.verify(images, list(prompts))[name]
    if name in JUDGED:
        if not workdir:
            raise UserError(f"reward {name!r} is of a trained judge; give its run as --workdir")
        return _judge(name, workdir)
    if not folder:
        raise UserError(f"reward {name!r} needs --folder with its weights; see docs/remote_rewards.md")
    return clip.open_reward(name, folder).score


def _judge(name: str, workdir: str) -> Score:
    import jax

    from maskrl_jax import runner
    from maskrl_jax.models.judge import Judge, JudgeConfig

    context, params = runner.open_workdir(workdir)
    if context.config.task != "judge" or context.config.model.kind != "cells":
        raise UserError(f"{workdir} holds no judge of captions; give the run of one")
    sizes = JudgeConfig(**context.config.model)
    side = context.config.data.image_size
    program = jax.jit(lambda x, target: judge.score(sizes.kind, Judge(sizes).apply(params, x), target)[name])

    def score(images, prompts):
        if images.shape[1:3] != (side, side):
            raise ValueError(f"this judge looks at pictures of {side} x {side}")
        return program(images, judge.targets(sizes.kind, np.empty(0), prompts))

    return score
