"""Nothing under test may reach for the network: a hidden download fails, instead of failing only where there is none.

Armed in the test processes and in those that `helpers.Command` starts. A guard against oversights, not a sandbox.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any


class ReachedForTheNetworkError(BaseException):
    """Not an Exception, which libraries catch and try again."""


def _is_near(host: Any) -> bool:
    if host in (None, "", b"", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def forbid() -> None:
    """From here on, this process can talk to itself and its neighbours alone."""
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        del os.environ[name]  # a proxy may be on this very machine

    def near_connect(connect: Any) -> Any:
        def checked(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_near(address[0]):
                raise ReachedForTheNetworkError(f"connect to {address}")
            return connect(self, address)

        return checked

    def near_look_up(look_up: Any) -> Any:
        def checked(host: Any, *arguments: Any, **options: Any) -> Any:
            if not _is_near(host):
                raise ReachedForTheNetworkError(f"look-up of {host}")
            return look_up(host, *arguments, **options)

        return checked

    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, near_connect(getattr(socket.socket, name)))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        setattr(socket, name, near_look_up(getattr(socket, name)))
