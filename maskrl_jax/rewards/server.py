"""Serve a local reward to other processes: `python -m maskrl_jax.rewards.server --reward=strict`.

Listens on this machine alone unless --host says otherwise. There is no password and no encryption: beyond localhost it
belongs behind a firewall or a tunnel. `wire` says what is asked and answered; every size is bounded, nothing is
unpickled. GET tells the name of the reward.
"""

from absl import flags

from maskrl_jax import command
from maskrl_jax.errors import UserError
from maskrl_jax.rewards import wire
from maskrl_jax.rewards.serving import KNOWN, local_reward, make_server

REWARD = flags.DEFINE_string("reward", None, f"what to serve: {', '.join(KNOWN)}", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "run of a trained judge, for its rewards")
FOLDER = flags.DEFINE_string("folder", None, "weights and tokenizer, for the rewards that are a CLIP")
HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
PORT = flags.DEFINE_integer("port", 8421, "port to listen on, 0 for any", lower_bound=0, upper_bound=65535)
MEBIBYTES = flags.DEFINE_integer("mebibytes", 64, "largest request", lower_bound=1)


def main() -> None:
    """Serve as the flags say, until interrupted."""
    score = local_reward(REWARD.value, WORKDIR.value, FOLDER.value)
    bounds = wire.Bounds(bytes=MEBIBYTES.value * 2**20)
    try:
        server = make_server(REWARD.value, score, HOST.value, PORT.value, bounds)
    except OSError as error:
        raise UserError(
            f"cannot listen on {HOST.value}:{PORT.value} ({error.strerror}); choose another --port"
        ) from error
    host, port = server.server_address[:2]
    print(f"{REWARD.value} at http://{host}:{port}", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)


if __name__ == "__main__":
    command.run(main)
