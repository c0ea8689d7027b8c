"""The listening socket: whoever opens connections faster than its share, or has too many open, is cut off before they
cost more than that. With TLS, this alone counts those that begin no handshake.
"""

from __future__ import annotations

import resource
import socket
import time
from typing import Any
from weakref import WeakKeyDictionary

from ...errors import UnlearnError
from ..limits import OPENING_SECONDS, Limits

_CUT_AT_ONCE = 50  # connections, before the event loop goes on with those that it has; of those taken, one
_OTHER_FILES = 64  # of all that the process may have open: adapters, the store, logs
_MORE = 32  # connections that are taken beyond the limit, to be told so
_MANY = 1024  # addresses that are kept before those that are over are looked for


class Listening(socket.socket):
    """A listening socket for asyncio; `limits` are those of the server, None while it does not accept."""

    limits: Limits | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._took_one = False  # since the event loop went on
        self._open = WeakKeyDictionary[socket.socket, str]()  # connections that were taken, with their addresses
        self._until = dict[str, float]()  # by address: when its share is whole again, by the monotonic clock

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection and its address; one of an address that opened too many is closed at once."""
        if not self._took_one:  # asyncio asks again at once, until there is none, or a BlockingIOError
            waits = self.gettimeout() != 0
            for _ in range(_CUT_AT_ONCE):
                connection, address = super().accept()
                if self._admits(client := address_of(address)):
                    self._took_one, self._open[connection] = not waits, client
                    return connection, address
                connection.close()
                if waits:  # the next may not be there yet
                    break
        self._took_one = False
        raise BlockingIOError

    def _admits(self, address: str) -> bool:
        if self.limits is None:
            return True
        now = time.monotonic()
        if len(self._until) >= _MANY:
            self._until = {name: until for name, until in self._until.items() if until > now}
        until = max(self._until.get(address, now), now) + OPENING_SECONDS / self.limits.address_share
        if until - now > 2 * OPENING_SECONDS:  # so that one too many is told so
            return False
        self._until[address] = until
        taken = [client for connection, client in self._open.items() if connection.fileno() >= 0]
        return len(taken) < most_open(self.limits) + _MORE and taken.count(address) < 2 * self.limits.address_share


def listen(host: str, port: int) -> Listening:
    """Return a listening socket; call it before a model is loaded, so that a port in use is reported at once.

    Raises:
        UnlearnError: the port is in use, or not allowed.
    """
    try:
        made = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UnlearnError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port or --host"
        ) from None
    return Listening(fileno=made.detach())


def most_open(limits: Limits) -> int:
    """Return how many connections may be open at once: fewer than `limits` says where files are few."""
    return min(limits.connections, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FILES, 8))


def address_of(peer: Any) -> str:
    """Return what counts as a client's address: of IPv6 the network of 64 bits, which one client has whole."""
    host = str(peer[0]) if peer else ""
    if ":" not in host:
        return host
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex(":", 2)
