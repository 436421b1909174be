"""Running the API on a socket: port checks before the model is loaded, and an orderly end."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import sys

import uvicorn
from starlette.applications import Starlette

from steerlm_nemo.compat.http_server import DrainingServer, JsonProtocol
from steerlm_nemo.errors import InputError, ServerError
from steerlm_nemo.serving.front_door import TOKEN_VARIABLE, FrontDoor

LOOPBACK = "127.0.0.1"

logger = logging.getLogger("steerlm_nemo.serving")


def open_listener(port: int, host: str = LOOPBACK, *, has_token: bool = False) -> socket.socket:
    """A bound socket, not yet listening: take the port before the model is loaded, answer when it is.

    `port` 0 takes a free one; `listener.getsockname()[1]` tells which.

    Raises:
        InputError: the port is taken or not allowed, or the host is no address of this machine.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port {port} is not a port; use 1 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Named TCP, or asyncio would not switch Nagle's algorithm off, and every answer would wait 40 ms for an ACK.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        # Lets a restarted server have its port back at once; a port with a listener is refused all the same.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except socket.gaierror as err:
        raise InputError(f"host {host!r} cannot be resolved ({err}); use 127.0.0.1 or an address of yours") from err
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} on {host} is in use. Stop the server that has it, or choose another with port=..."
            ) from err
        raise InputError(f"cannot listen on {host} port {port}: {err.strerror}") from err
    if not has_token and not _is_loopback(listener.getsockname()[0]):
        print(
            f"WARNING: serving on {host}: every machine that reaches this address can use the model, without a token. "
            f"Set {TOKEN_VARIABLE} or http.token_file, or bind 127.0.0.1 unless a proxy guards it.",
            file=sys.stderr,
        )
    return listener


def serve(app: Starlette, listener: socket.socket, name: str, drain_s: float) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish those in flight, for `drain_s` at most, and return.

    Meanwhile new requests are answered with 503, and in the end those that could not be finished. A second signal does
    so at once and ends the process.

    Raises:
        ServerError: the engine died.
    """
    host, port = listener.getsockname()[:2]
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,  # ours has rows and milliseconds, and no addresses
        timeout_keep_alive=75,  # longer than clients keep theirs (httpx: 5 s), or both ends would meet at the door
        timeout_graceful_shutdown=1,  # DrainingServer has waited for the requests already
        lifespan="on",
        http=JsonProtocol,
    )
    print(f"serving {name} on http://{host}:{port}", flush=True)
    door: FrontDoor = app.state.server.door
    DrainingServer(config, door, drain_s).run(sockets=[listener])
    if door.worker.failed is not None:
        raise ServerError(f"stopped serving {name}: the engine died: {door.worker.failed}")
    print(f"stopped serving {name}", flush=True)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
