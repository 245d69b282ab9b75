"""A reward over HTTP with real servers on localhost: whatever goes wrong, nothing is scored 0 by accident."""

import contextlib
import http.client
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from maskrl_jax.errors import UserError
from maskrl_jax.rewards import serving as serving_module
from maskrl_jax.rewards import wire
from maskrl_jax.rewards.remote import Probe, RemoteConfig, RemoteReward, post, read_probe
from maskrl_jax.rewards.serving import local_reward, make_server

PROMPTS = tuple("abcde")
IMAGES = np.arange(1, 6, dtype=np.float32)[:, None, None, None] / 10 * np.ones((1, 8, 8, 3), np.float32)
BRIGHTNESS = np.round(IMAGES[:, 0, 0, 0] * 255) / 255


def brightness(images, prompts):
    return images.mean(axis=(1, 2, 3))


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serving(score, **options):
    return running(make_server("test", score, **options))


def answering(*answers):
    """Serve these (status, body) in turn, the last one for ever; a body may be a function that writes it slowly."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may be gone
                body(self.wfile) if callable(body) else self.wfile.write(body)

        def log_message(self, *_):
            pass

    return running(ThreadingHTTPServer(("127.0.0.1", 0), Handler))


def client(url, **change):
    settings = {"timeout": 5.0, "retries": 1, "pause": 0.0, "batch_size": 2, "patience": 100}
    return RemoteReward(RemoteConfig(url, **(settings | change)), sleep=lambda seconds: None)


def scores(*values):
    return 200, json.dumps({"scores": list(values)}).encode()


def test_scores_come_in_the_order_of_the_pictures():
    with serving(brightness) as url:
        found = client(url).score(IMAGES, PROMPTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, BRIGHTNESS, rtol=1e-6)


def test_a_server_that_dies_leaves_nan_and_one_that_comes_back_is_used_again(capsys):
    with serving(brightness) as url:
        remote = client(url)
        assert np.isfinite(remote.score(IMAGES, PROMPTS)).all()
    port = int(url.rsplit(":", 1)[1])
    assert np.isnan(remote.score(IMAGES, PROMPTS)).all()
    assert np.isnan(remote.score(IMAGES, PROMPTS)).all()
    assert capsys.readouterr().out.count("its groups are left out") == 1
    with serving(brightness, port=port):
        assert np.isfinite(remote.score(IMAGES, PROMPTS)).all()


def test_a_server_that_dies_between_two_requests_loses_the_rest_alone():
    with answering(scores(0.1, 0.2), (500, b"")) as url:
        found = client(url).score(IMAGES, PROMPTS)
    np.testing.assert_array_equal(found, np.float32([0.1, 0.2, np.nan, np.nan, np.nan]))


def test_an_outage_is_waited_for_once_a_call_and_a_refusal_for_one_request_alone():
    pauses = []
    remote = RemoteReward(RemoteConfig("http://127.0.0.1:9", retries=1, pause=0.5, batch_size=1), sleep=pauses.append)
    assert np.isnan(remote.score(IMAGES, PROMPTS)).all() and pauses == [0.5]
    with answering((400, b""), scores(0.3)) as url:
        found = client(url, batch_size=1).score(IMAGES[:2], "ab")
    np.testing.assert_array_equal(found, np.float32([np.nan, 0.3]))


def test_too_long_an_outage_stops_the_run_in_one_line():
    remote = client("http://127.0.0.1:9", patience=2, retries=0)
    assert np.isnan(remote.score(IMAGES, PROMPTS)).all()
    with pytest.raises(UserError, match="gave no score 2 times in a row: ConnectionRefusedError") as found:
        remote.score(IMAGES, PROMPTS)
    assert "\n" not in str(found.value)


def test_a_service_that_answers_without_a_number_is_an_outage_too():
    with answering((200, b'{"scores": [null]}')) as url, pytest.raises(UserError, match="no score of its answer"):
        client(url, patience=1).score(IMAGES[:1], "a")


def test_a_try_that_fails_is_made_again_after_a_growing_pause():
    pauses = []
    with answering((503, b'{"error": "busy"}'), (200, b"{"), scores(0.3)) as url:
        remote = RemoteReward(RemoteConfig(url, retries=2, pause=0.5), sleep=pauses.append)
        np.testing.assert_array_equal(remote.score(IMAGES[:1], "a"), np.float32([0.3]))
    assert pauses == [0.5, 1.0]


def test_what_the_service_refuses_is_not_asked_again(capsys):
    pauses = []
    with answering((400, b'{"error": "cannot verify caption"}'), scores(0.3)) as url:
        found = RemoteReward(RemoteConfig(url, pause=0.5), sleep=pauses.append).score(IMAGES[:1], "a")
    assert np.isnan(found).all() and pauses == []
    assert "status 400: cannot verify caption" in capsys.readouterr().out


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"{", b"[0.1, 0.2]", b'{"scores": 0}', b'{"scores": [0.1]}', b'{"scores": [0.1, 0.2, 0.3]}'),
        *(b'{"scores": [0.1, false]}', b'{"scores": [0.1, "0"]}', b'{"score": [0, 0]}', b"<html>0 0</html>"),
        b'{"scores": [0.1, 0.2]}' + b" " * 2**20,
    ],
)
def test_any_other_answer_is_nan(body):
    with answering((200, body)) as url:
        found = client(url, retries=0).score(IMAGES[:2], "ab")
    assert np.isnan(found).all()


def test_a_score_that_is_no_number_is_nan_and_harms_no_other():
    with answering((200, b'{"scores": [NaN, 0.5]}'), (200, b'{"scores": [null, 0]}')) as url:
        found = client(url).score(IMAGES[:4], "abcd")
    np.testing.assert_array_equal(found, np.float32([np.nan, 0.5, np.nan, 0]))


def test_a_service_whose_scores_are_nan_tells_none():
    with serving(lambda images, prompts: np.array([np.nan, 1.0])) as url:
        np.testing.assert_array_equal(client(url).score(IMAGES[:2], "ab"), np.float32([np.nan, 1]))


def drip(file):
    """One byte at a time, so that no single read waits for long."""
    for byte in b'{"scores": [0.5]}':
        file.write(bytes([byte]))
        time.sleep(0.1)


def silence(file):
    time.sleep(1.0)
    file.write(b'{"scores": [0.5]}')


@pytest.mark.parametrize("slow", [drip, silence])
def test_a_slow_answer_is_given_up_in_time(slow):
    with answering((200, slow)) as url:
        began = time.monotonic()
        found = client(url, timeout=0.3, retries=0).score(IMAGES[:1], "a")
        assert time.monotonic() - began < 0.9
    assert np.isnan(found).all()


def test_an_answer_that_ends_early_is_none():
    server = socket.create_server(("127.0.0.1", 0))

    def half():
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{"scores": [0.5]}')

    thread = threading.Thread(target=half)
    thread.start()
    with server:
        found = client(f"http://127.0.0.1:{server.getsockname()[1]}", retries=0).score(IMAGES[:1], "a")
        thread.join()
    assert np.isnan(found).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pictures_that_are_not_finite_are_not_sent(value):
    broken, seen = IMAGES.copy(), []
    broken[[1, 4], 2, 3, 0] = value

    def score(images, prompts):
        seen.extend(prompts)
        return brightness(images, prompts)

    with serving(score) as url:
        found = client(url).score(broken, PROMPTS)
        nothing = client(url, patience=1).score(broken[[1, 4]], "be")
    np.testing.assert_array_equal(np.isnan(found), [False, True, False, False, True])
    np.testing.assert_allclose(found[[0, 2, 3]], BRIGHTNESS[[0, 2, 3]], rtol=1e-6)
    assert seen == ["a", "c", "d"] and np.isnan(nothing).all()


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="and 4 prompts"):
        client("http://localhost").score(IMAGES, PROMPTS[:4])


@pytest.mark.parametrize(
    ("url", "change"),
    [("localhost:8421", {}), ("file:///etc", {}), ("http://", {}), ("http://a", {"timeout": 0}), ("http://a:x", {})],
)
def test_bad_settings_are_refused(url, change):
    with pytest.raises(ValueError):
        RemoteConfig(url, **change)


# The self-test


def probe(**change):
    known = {"images": IMAGES[:3], "prompts": PROMPTS[:3], "scores": BRIGHTNESS[:3], "tolerance": 0.01}
    return Probe(**(known | change))


def test_the_right_service_passes():
    with serving(brightness) as url:
        client(url).self_test(probe())


@pytest.mark.parametrize(
    ("score", "named"),
    [
        (lambda images, prompts: 1 - brightness(images, prompts), "0.898039, not 0.101961; is it the right one"),
        (lambda images, prompts: brightness(images, prompts)[::-1], "is it the right one"),
        (lambda images, prompts: BRIGHTNESS[:3], "is it the right one"),  # whatever it is shown
        (lambda images, prompts: np.full(len(prompts), np.nan), "nan, not"),
        (lambda images, prompts: np.zeros((2, 2)), "no reward service .* status 500: TypeError"),
    ],
)
def test_a_wrong_service_is_found_at_the_start(score, named, capsys):
    with serving(score) as url, pytest.raises(UserError, match=named) as found:
        client(url, retries=0).self_test(probe())
    assert "\n" not in str(found.value)


def test_no_service_is_one_line():
    with pytest.raises(UserError, match="no reward service at http://127.0.0.1:9: ConnectionRefusedError"):
        client("http://127.0.0.1:9").self_test(probe())


@pytest.mark.parametrize("change", [{"scores": np.ones(3)}, {"prompts": PROMPTS}, {"tolerance": 0.2}])
def test_a_probe_that_shows_nothing_is_refused(change):
    with pytest.raises(ValueError, match="probe"):
        probe(**change)


def test_a_probe_from_a_file(tmp_path):
    from PIL import Image

    rows = [{"image": f"{i}.png", "prompt": f"{i}", "score": i} for i in range(2)]
    for i, row in enumerate(rows):
        Image.new("RGB", (4, 4), (i, 0, 255)).save(tmp_path / row["image"])
    file = tmp_path / "probe.json"
    file.write_text(json.dumps({"tolerance": 0.1, "pictures": rows}))
    found = read_probe(str(file))
    assert found.images.shape == (2, 4, 4, 3) and found.prompts == ("0", "1") and found.images.max() == 1
    for text, named in (("{", "Expecting"), ("{}", "lacks 'pictures'")):
        file.write_text(text)
        with pytest.raises(UserError, match=named):
            read_probe(str(file))
    with pytest.raises(UserError, match="No such file"):
        read_probe(str(tmp_path / "none.json"))


# The server


def status(url, body, **headers):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    with contextlib.closing(connection):
        connection.request("POST", "/", body, headers or {"Content-Type": wire.TYPE})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_what_is_no_request_is_refused_with_a_reason(capsys):
    good = wire.request(IMAGES, PROMPTS)

    def picky(images, prompts):
        if prompts == ["bad"]:
            raise UserError("cannot verify caption 'bad'")
        raise KeyError("secret")

    with serving(picky, bounds=wire.Bounds(bytes=len(good))) as url:
        assert status(url, b"{}")[0] == 400
        assert status(url, good + b" ")[0] == 413
        assert status(url, good, **{"Content-Type": "text/plain"})[0] == 415
        assert status(url, wire.request(IMAGES[:1], ["bad"])) == (400, {"error": "cannot verify caption 'bad'"})
        assert status(url, good) == (500, {"error": "KeyError"})
        chunked = {"Content-Type": wire.TYPE, "Transfer-Encoding": "chunked"}
        assert status(url, iter([b"5\r\n"]), **chunked)[0] == 411
    assert "secret" in capsys.readouterr().err


def test_it_listens_on_this_machine_alone_and_tells_its_name():
    server = make_server("test", brightness)
    assert server.server_address[0] == "127.0.0.1"
    with running(server) as url, contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"))) as asked:
        asked.request("GET", "/")
        assert json.loads(asked.getresponse().read()) == {"reward": "test"}


def test_more_clients_than_it_can_take_are_told_to_come_again():
    started, release = threading.Semaphore(0), threading.Event()

    def slow(images, prompts):
        started.release()
        release.wait(10)
        return brightness(images, prompts)

    body, found = wire.request(IMAGES[:1], "a"), []
    with serving(slow) as url:
        ask = lambda: found.append(post(url, body, 10)[0])  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        started.acquire(timeout=10)
        while len(found) < 4:  # those that found no place
            time.sleep(0.01)
        release.set()
        for thread in threads:
            thread.join()
    assert sorted(found) == 4 * [200] + 4 * [503]


def test_pictures_are_decoded_one_request_ahead_and_no_more(monkeypatch):
    decoded, started, release = [], threading.Semaphore(0), threading.Event()
    read = wire.read_request
    monkeypatch.setattr(wire, "read_request", lambda *args: decoded.append(1) or read(*args))

    def slow(images, prompts):
        started.release()
        release.wait(10)
        return brightness(images, prompts)

    body = wire.request(IMAGES[:1], "a")
    with serving(slow) as url:
        threads = [threading.Thread(target=post, args=(url, body, 10)) for _ in range(4)]
        for thread in threads:
            thread.start()
        started.acquire(timeout=10)
        time.sleep(0.3)
        assert len(decoded) == 2  # of the request that is scored, and of the next one
        release.set()
        for thread in threads:
            thread.join()
    assert len(decoded) == 4


def dripping(url, head, part):
    """Send a head, then a part of ten bytes a second until the service answers or is gone; returns what it said."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.settimeout(0.1)
        connection.sendall(head)
        for _ in range(40):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(part)
            with contextlib.suppress(TimeoutError):
                return connection.recv(4096)
    raise AssertionError("the service waits for ever")


def test_a_request_that_comes_too_slowly_is_given_up():
    head = f"POST / HTTP/1.0\r\nContent-Type: {wire.TYPE}\r\n".encode()
    with serving(brightness, bounds=wire.Bounds(seconds=1)) as url:
        said = dripping(url, head + b"Content-Length: 1000\r\n\r\n", b" ")
        assert b" 408 " in said.splitlines()[0]
        assert dripping(url, head, b"X") == b""  # a head that does not end
        assert np.isfinite(client(url).score(IMAGES, PROMPTS)).all()


def test_a_refused_client_that_goes_on_sending_is_left_at_the_deadline():
    head = f"POST / HTTP/1.0\r\nContent-Type: {wire.TYPE}\r\nContent-Length: 999999999\r\n\r\n".encode()
    with serving(brightness, bounds=wire.Bounds(bytes=1000, seconds=1)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(head)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for _ in range(10_000):  # 10 s
                    connection.sendall(b" " * 64)
                    time.sleep(1e-3)


@pytest.mark.parametrize(
    ("header", "code"), [({}, 413), ({"Content-Type": "text/plain"}, 415), ({"Transfer-Encoding": "chunked"}, 411)]
)
def test_a_request_refused_by_its_head_is_told_why_while_it_is_sent(header, code):
    body = b" " * 2**25
    if code == 411:
        body = iter([b"2000000\r\n", body, b"\r\n0\r\n\r\n"])
    with serving(brightness, bounds=wire.Bounds(bytes=1000)) as url:
        assert status(url, body, **({"Content-Type": wire.TYPE} | header))[0] == code


def test_a_client_reads_why_a_service_broke_off(capsys):
    said = b'HTTP/1.0 413 no\r\nContent-Type: application/json\r\n\r\n{"error": "too large"}'
    server = socket.create_server(("127.0.0.1", 0))

    def rude():
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            time.sleep(0.2)  # closed with most of the request unread

    thread = threading.Thread(target=rude)
    thread.start()
    pictures = np.random.default_rng(0).random((1, 2048, 2048, 3), np.float32)
    with server:
        remote = client(f"http://127.0.0.1:{server.getsockname()[1]}", retries=0)
        assert np.isnan(remote.score(pictures, "a")).all()
        thread.join()
    assert "status 413: too large" in capsys.readouterr().out


def test_more_connections_than_it_has_threads_for_are_closed(monkeypatch):
    monkeypatch.setattr(serving_module, "CONNECTIONS", 2)
    with serving(brightness) as url:
        host, port = url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(2)]
        with pytest.raises(OSError):
            post(url, wire.request(IMAGES[:1], "a"), 5)
        for connection in idle:
            connection.close()
        patient = RemoteReward(RemoteConfig(url, retries=99), sleep=lambda seconds: time.sleep(0.05))
        assert np.isfinite(patient.score(IMAGES[:1], "a")).all()


def test_the_exact_verifier_as_a_service(capsys):
    from maskrl_jax.data.scenes import TONE_RGB

    empty = np.broadcast_to(np.float32(TONE_RGB[0]) / 255, (2, 32, 32, 3))
    with serving(local_reward("coherence")) as url:
        np.testing.assert_array_equal(client(url).score(empty, ["a red circle"] * 2), [1, 1])
        # What cannot be read is no score, and harms no other; a request of nothing else is told why.
        np.testing.assert_array_equal(client(url).score(empty, ["a red circle", "a purple cow"]), [1, np.nan])
        np.testing.assert_array_equal(client(url).score(empty, ["", "a red circle"]), [np.nan, 1])
        assert np.isnan(client(url).score(empty, ["a purple cow"] * 2)).all()
    assert "status 400: cannot verify caption 'a purple cow'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "named"),
    [("strickt", "did you mean 'strict'"), ("judge", "--workdir"), ("pick_score", "--folder")],
)
def test_a_reward_that_cannot_be_served_is_one_line(name, named):
    with pytest.raises(UserError, match=named):
        local_reward(name)


@pytest.mark.parametrize(
    ("name", "given"), [("strict", "folder"), ("strict", "workdir"), ("judge", "folder"), ("pick_score", "workdir")]
)
def test_a_flag_that_a_reward_does_not_read_is_refused(name, given):
    with pytest.raises(UserError, match=f"reward '{name}' reads no --{given}, which is for .*; leave it out"):
        local_reward(name, **{given: "somewhere"})
