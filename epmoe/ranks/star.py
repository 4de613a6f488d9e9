"""Star: a connection between rank 0 and the first rank of each other replica, for what both say at any time."""

import secrets
import socket
import time
from contextlib import suppress

from epmoe.ranks.mesh import Ranks

HELLO_S = 5.0  # within which whoever connects says who it is


def star(ranks: Ranks, timeout_s: float) -> dict[int, socket.socket]:
    """On rank 0 the connections by replica, on another replica's first rank {0: that to rank 0}, elsewhere none.

    A collective of all ranks.

    Raises:
        RuntimeError: a replica did not come within `timeout_s`.
    """
    if ranks.replicas == 1:
        return {}
    if not ranks.is_main:
        host, port, token = ranks.broadcast_json(None)
        return {0: _reach(host, port, f"{token} {ranks.replica:8d}\n", timeout_s)} if ranks.leads else {}
    assert ranks.watch is not None
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    both = family == socket.AF_INET6
    with socket.create_server(("", 0), family=family, backlog=ranks.replicas, dualstack_ipv6=both) as listener:
        token = secrets.token_hex(16)  # keeps strangers out
        ranks.broadcast_json([ranks.watch.host, listener.getsockname()[1], token])
        return _accept_all(listener, token, ranks.replicas, timeout_s)


def _reach(host: str, port: int, hello: str, timeout_s: float) -> socket.socket:
    made = socket.create_connection((host, port), timeout_s)
    made.sendall(hello.encode())
    return _lasting(made)


def _accept_all(listener: socket.socket, token: str, replicas: int, timeout_s: float) -> dict[int, socket.socket]:
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout_s
    while len(found) < replicas - 1:
        left_s = deadline - time.monotonic()
        try:
            if left_s <= 0:  # also where strangers come and come
                raise TimeoutError
            listener.settimeout(left_s)
            made = listener.accept()[0]
        except TimeoutError:
            absent = sorted(set(range(1, replicas)) - set(found))
            raise RuntimeError(f"replicas {absent} did not reach rank 0 within {timeout_s:g} s") from None
        with suppress(OSError, ValueError):
            made.settimeout(min(HELLO_S, left_s))
            said = made.makefile("rb", buffering=0).read(len(token) + 10) or b""
            given, replica = said.decode("ascii").split()
            if secrets.compare_digest(given, token):
                found[int(replica)] = _lasting(made)
                continue
        made.close()  # a stranger
    return found


def _lasting(made: socket.socket) -> socket.socket:
    made.settimeout(None)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made
