"""Python imports this before all else in the environments of clients: they reach this machine and no other.

Whoever wants to reach another one, or its name, gets an OSError, and the file $REFUSED a line with its name.
"""

import os
import sys
from typing import Any

OWN = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "", None)


def stay(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):  # a path is this machine's
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in OWN:
        with open(os.environ["REFUSED"], "a") as file:
            file.write(f"{host}\n")
        raise OSError(f"{host} is another machine")


sys.addaudithook(stay)
