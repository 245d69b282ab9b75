"""Where a process finds its place, and what tells that another one is gone."""

import socket

import jax
import pytest

from maskrl_jax import cluster
from maskrl_jax.cluster import Place
from maskrl_jax.errors import UserError

NOTHING = dict.fromkeys(cluster.FIELDS)
ENVIRONMENT = {
    "MASKRL_COORDINATOR_ADDRESS": "10.0.0.1:8476",
    "MASKRL_NUM_PROCESSES": "4",
    "MASKRL_PROCESS_ID": "3",
}


def test_flags_come_before_the_environment():
    assert cluster.place(NOTHING, ENVIRONMENT, True) == Place("10.0.0.1:8476", 4, 3)
    assert cluster.place(NOTHING | {"process_id": 0}, ENVIRONMENT, True) == Place("10.0.0.1:8476", 4, 0)


def test_without_either_the_cluster_is_asked():
    assert cluster.place(NOTHING, {}, True) == Place()


def test_a_run_of_one_process_ignores_the_environment_and_refuses_flags():
    assert cluster.place(NOTHING, ENVIRONMENT, False) is None
    with pytest.raises(UserError, match="--process_id without --distributed"):
        cluster.place(NOTHING | {"process_id": 0}, {}, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASKRL_PROCESS_ID": "4"}, "--process_id=4 is not one of --num_processes=4"),
        ({"MASKRL_PROCESS_ID": "-1"}, "--process_id=-1 is not one of"),
        ({"MASKRL_PROCESS_ID": "two"}, "MASKRL_PROCESS_ID=two is not a number"),
        ({"MASKRL_PROCESS_ID": ""}, "--process_id missing"),
        ({"MASKRL_COORDINATOR_ADDRESS": "10.0.0.1"}, "is not host:port"),
        ({"MASKRL_COORDINATOR_ADDRESS": "http://10.0.0.1:8476"}, "is not host:port"),
    ],
)
def test_a_place_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        cluster.place(NOTHING, ENVIRONMENT | changes, True)


def test_a_port_that_is_taken_and_a_name_without_address_are_told_at_once(capsys):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at port {port} .*in use.*another port"):
            cluster.join(Place(f"localhost:{port}", 2, 0), 5)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="node..x is no name of a machine"):
        cluster.join(Place(f"node..x:{port}", 2, 1), 5)
    cluster._look_at_address(Place(f"nowhere.invalid:{port}", 2, 1))
    assert capsys.readouterr().err == "warning: the name nowhere.invalid has no address yet; waiting for it\n"


def test_the_loss_of_a_process_is_told_from_other_failures():
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:54492")
    wrapped = ValueError("could not save")
    wrapped.__cause__ = gone
    assert cluster.lost(gone) and cluster.lost(wrapped)
    assert not cluster.lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not cluster.lost(ValueError("Gloo"))
