"""The guard itself: what it lets through and what it does not."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from tests.no_network import ReachedForTheNetworkError


def test_other_machines_are_out_of_reach() -> None:
    with pytest.raises(ReachedForTheNetworkError, match="look-up of example.org"):
        urllib.request.urlopen("http://example.org", timeout=1)
    with socket.socket() as one, pytest.raises(ReachedForTheNetworkError, match="connect to"):
        one.connect(("192.0.2.1", 80))
    with socket.socket() as one, pytest.raises(ReachedForTheNetworkError, match="connect to"):
        one.connect_ex(("192.0.2.1", 80))
    with pytest.raises(ReachedForTheNetworkError, match="look-up of"):
        socket.gethostbyname("example.org")


def test_this_machine_is_not() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
    assert socket.getaddrinfo("localhost", 80)
