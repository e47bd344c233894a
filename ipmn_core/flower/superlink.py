"""Flower's SuperLink, accepting commands only from this machine: `python -m ipmn_core.flower.superlink`.

Flower 1.41 serves sites, its own command line and its workers at one port, and only sites need a key.
"""

from __future__ import annotations

from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

HERE = ("127.0.0.1", "::1")
FOR_SITES = "/v1/fleet/"  # these requests need the key of a registered site


def from_here_only(app):
    """ASGI middleware: requests from other machines get 403, except those below `FOR_SITES`."""
    refusal = PlainTextResponse("only accepted from the server's own machine\n", 403)

    async def guarded(scope, receive, send):
        away = scope["type"] != "lifespan" and (scope.get("client") or [""])[0] not in HERE
        refused = away and not scope.get("path", "").startswith(FOR_SITES)
        await (refusal if refused else app)(scope, receive, send)

    return guarded


if __name__ == "__main__":
    extensions.get_middleware = lambda: (Middleware(from_here_only),)
    flower_superlink()
