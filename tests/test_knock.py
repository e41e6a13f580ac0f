"""Asking whether anybody is at home, before Ray is asked to go there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import ray

from psycho import cluster, knock
from psycho.config import ClusterConfig
from psycho.errors import BadInput


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server of one call."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            try:
                connection, _ = server.accept()
                with connection:
                    answer(connection)
            except OSError:
                return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.close()
        thread.join(timeout=10)


def test_who_answers_is_there():
    with listening(lambda connection: connection.sendall(b"\0")) as address:
        assert knock.answers(address) is True


def test_who_hangs_up_is_not():
    """As a forwarded port whose other end is gone."""
    with listening(lambda connection: None) as address:
        assert knock.answers(address) is False


def test_who_says_nothing_is_not_within_the_limit():
    done = threading.Event()
    with listening(lambda connection: done.wait(30)) as address:
        assert knock.answers(address, limit_s=0.1) is False
        done.set()


def test_a_name_that_takes_for_ever_to_look_up_has_a_limit(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *_: done.wait(30))
    before = time.monotonic()
    assert knock.answers("head:6379", limit_s=0.1) is False
    assert time.monotonic() - before < 20
    done.set()


@pytest.mark.parametrize(
    ("setting", "address", "said"),
    [
        ("RAY_ADDRESS", "127.0.0.1:1", r"no Ray answers at 127.0.0.1:1 \(RAY_ADDRESS\) within 5 s; start that cluster"),
        ("cluster.address", "127.0.0.1:1", r"\(cluster.address\) .* or unset it to start Ray here"),
        ("RAY_ADDRESS", "ray://127.0.0.1:1", "no Ray answers at ray://127.0.0.1:1"),
        ("RAY_ADDRESS", "http://127.0.0.1:1", "is the address of a job server; give it the job with `ray job submit"),
    ],
)
def test_a_dead_head_is_one_sentence_and_ray_is_not_asked(monkeypatch, setting, address, said):
    monkeypatch.setattr(cluster, "_QUIET", {})
    for name in (cluster.AUTOSCALING, cluster.OWN_RAY):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    config = ClusterConfig(address=address if setting == "cluster.address" else None)
    if setting == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BadInput, match=said), cluster.ray_session(config, verbose=True):
        pytest.fail("the job went on")


def test_auto_that_leads_to_a_head_which_has_ended(monkeypatch):
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda address: "127.0.0.1:1")
    with pytest.raises(BadInput, match=r"no Ray answers at 127.0.0.1:1"):
        cluster._knock("auto", "RAY_ADDRESS")
