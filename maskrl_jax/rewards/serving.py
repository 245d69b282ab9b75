"""A reward behind HTTP: the server, and the rewards that this package can open (rewards/server.py is the command)."""

import contextlib
import io
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from maskrl_jax.data import captions, verifier
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.rewards import clip, judge, wire

Score = Callable[[np.ndarray, Sequence[str]], Any]
CONNECTIONS = 64  # at once, each with a thread; more are closed
WAITING = 4  # requests at once whose bodies are held, one of them scored and one decoded; more are told to come again
VERIFIED = (*verifier.SCORES, "graded", "strict", "coherence")
JUDGED = judge.names("cells")
KNOWN = (*VERIFIED, *JUDGED, *clip.KINDS)


class _LateError(TimeoutError):
    """Says that a client has not sent its request in time."""


class _Timed(io.RawIOBase):
    """Reads what a client sends until a deadline, however little comes at a time."""

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection, self._end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise _LateError
        try:
            self._connection.settimeout(left)
            return self._connection.recv_into(buffer)
        except TimeoutError as error:
            raise _LateError from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args):
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request, client_address):
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, *_):
        print(f"warning: a client broke off: {sys.exception()!r}", file=sys.stderr)


def make_server(
    name: str, score: Score, host: str = "127.0.0.1", port: int = 0, bounds: wire.Bounds | None = None
) -> ThreadingHTTPServer:
    """Bind a server for score(images float32 [B,H,W,3], prompts) -> [B]; call its `serve_forever`.

    A ValueError or UserError of `score` is the client's mistake (400), anything else a failure of the service (500);
    a score that is not finite is told as none. `score` is called by one thread at a time, and the pictures of one
    request are decoded meanwhile. A request is refused by its head before its body is read, and given up when it has
    not come within `bounds.seconds` (408).
    """
    bounds, waiting = bounds or wire.Bounds(), threading.BoundedSemaphore(WAITING)
    answer = _answering(name, score, bounds)

    class Handler(BaseHTTPRequestHandler):
        def setup(self):
            super().setup()
            self.rfile.close()
            self.rfile = io.BufferedReader(_Timed(self.connection, bounds.seconds))

        def do_GET(self):
            self._send(200, json.dumps({"reward": name}).encode())

        def do_POST(self):
            refusal = _refusal(self.headers, bounds)
            if not refusal and not waiting.acquire(blocking=False):
                refusal = 503, _told("busy")
            if refusal:
                self._send(*refusal)
                return self._drain()
            try:
                status, body = answer(self.rfile.read(int(self.headers["Content-Length"])))
            except _LateError:
                status, body = 408, _told(f"the request did not come within {bounds.seconds} seconds")
            finally:
                waiting.release()
            self._send(status, body)

        def _send(self, status, body):
            self.connection.settimeout(bounds.seconds)
            self.send_response(status)
            self.send_header("Content-Type", wire.TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _drain(self):
            """Read on until the deadline, so that a client that is still sending meets the answer, no broken pipe."""
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
                while self.rfile.read1(2**16):
                    pass

        def log_message(self, *_):
            pass

    return _Server((host, port), Handler)


def _refusal(headers: Message, bounds: wire.Bounds) -> tuple[int, bytes] | None:
    """Why a request is not read at all, as status and body; None where it is."""
    length = headers.get("Content-Length", "")
    if headers.get_content_type() != wire.TYPE:  # which no page in a browser can send unasked
        return 415, _told(f"send {wire.TYPE}")
    if not (length.isascii() and length.isdigit()):
        return 411, _told("send Content-Length")
    if len(length) > 12 or int(length) > bounds.bytes:
        return 413, _told(f"the request is larger than {bounds.bytes} bytes")
    return None


def _answering(name: str, score: Score, bounds: wire.Bounds) -> Callable[[bytes], tuple[int, bytes]]:
    """Return what turns a request's body into status and body of the answer; the threads of a server share it."""
    decoding, scoring = threading.Lock(), threading.Lock()

    def scored(body):
        with decoding:  # given back with its pictures in hand only once these are next: two requests' at most
            images, prompts = wire.read_request(body, bounds)
            scoring.acquire()
        try:
            scores = np.asarray(score(images, prompts))
        finally:
            scoring.release()
        if scores.shape != (len(prompts),):
            raise TypeError(f"reward {name} gave {scores.shape} for {len(prompts)} pictures")
        return wire.answer(scores)

    def answer(body):
        try:
            return 200, scored(body)
        except (UserError, ValueError) as error:
            return 400, _told(" ".join(str(error).split()))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return 500, _told(type(error).__name__)

    return answer


def _told(reason: str) -> bytes:
    return json.dumps({"error": reason}).encode()


def local_reward(name: str, workdir: str | None = None, folder: str | None = None) -> Score:
    """Open a reward of KNOWN: the exact verifier's, a trained judge's of captions, or a CLIP's. UserError otherwise."""
    if name not in KNOWN:
        raise unknown("reward", name, KNOWN)
    for flag, value, readers in (("workdir", workdir, JUDGED), ("folder", folder, clip.KINDS)):
        if value and name not in readers:
            raise UserError(f"reward {name!r} reads no --{flag}, which is for {', '.join(readers)}; leave it out")
    if name in VERIFIED:
        return _of_captions(lambda images, prompts: verifier.verify(images, prompts)[name])
    if name in JUDGED:
        if not workdir:
            raise UserError(f"reward {name!r} is of a trained judge; give its run as --workdir")
        return _of_captions(_judge(name, workdir))
    if not folder:
        raise UserError(f"reward {name!r} needs --folder with its weights; see docs/remote_rewards.md")
    return clip.open_reward(name, folder).score


def _of_captions(score: Score) -> Score:
    """`score`, and NaN for a caption outside the grammar; UserError where no caption of the request is inside it."""

    def scored(images, prompts):
        mistakes = [_mistake(prompt) for prompt in prompts]
        if all(mistakes):
            raise mistakes[0]
        some = prompts[mistakes.index(None)]  # in the place of what cannot be read, so that shapes stay
        found = score(images, [some if mistake else prompt for prompt, mistake in zip(prompts, mistakes, strict=True)])
        return np.where([mistake is None for mistake in mistakes], found, np.nan)

    return scored


def _mistake(prompt: str) -> UserError | None:
    try:
        captions.parse(prompt)
    except UserError as error:
        return error
    return None


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
