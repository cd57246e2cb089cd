"""What the scoring server and the explorer share: JSON answers, refusals, host names, and the way they are served."""

import asyncio
import ipaddress
import re
import signal
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import msgspec
import uvicorn
from fastapi.exceptions import RequestValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lib.errors import InputError

LINGER_SECONDS, LINGER_BYTES = 2, 16 << 20  # how long a body is read on after its request was answered
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")

# ---------------------------------------------------------------- answers and refusals


class Answer(Response):
    """A JSON answer of lists, dicts, str, int, float; NaN becomes null."""

    media_type = "application/json"

    def render(self, content):
        return msgspec.json.encode(content)


Refused = HTTPException  # raised where a request cannot be answered: status, a reason of one line, headers
COME_BACK = {"Retry-After": "1"}  # headers of a refusal: the same request may fare better in so many seconds


async def refuse(request: Request, error: Any) -> Response:
    return Answer({"error": str(error.detail)}, error.status_code, error.headers)


async def refuse_unexpected(request: Request, error: Any) -> Response:
    return Answer({"error": "internal error"}, 500)  # uvicorn prints the traceback


async def refuse_parameters(request: Request, error: Any) -> Response:
    return Answer({"error": "; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())}, 400)


# an app's exception_handlers
REFUSALS = {HTTPException: refuse, RequestValidationError: refuse_parameters, Exception: refuse_unexpected}

# ---------------------------------------------------------------- layers around an app


class EndUnread:
    """ASGI layer: where an answer comes before all of the body, the connection ends, else one could send for ever.

    What the client still sends is read and dropped first, within bounds: closing at once would reset the connection,
    and many clients would then see that instead of the answer.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        announced = int(headers.get("content-length", 0))
        unread = announced > 0 or "transfer-encoding" in headers
        left = LINGER_BYTES if announced <= LINGER_BYTES else 0

        async def receive_on():
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def send_on(message):
            nonlocal left
            if unread and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif unread and not message.get("more_body"):
                await send({**message, "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_SECONDS):
                        while unread and left > 0:
                            left -= len((await receive_on()).get("body", b""))
                        if unread:  # the client has time to read the answer before the reset
                            await asyncio.sleep(LINGER_SECONDS)
                message = {"type": "http.response.body"}
            await send(message)

        await self.app(scope, receive_on, send_on)


class HostNames:
    """ASGI layer that refuses requests for other host names.

    A page of another site can have its name point to 127.0.0.1 and would then read answers from there. Browsers
    always send the name; a request without one comes from a program of this machine.
    """

    def __init__(self, app, names):
        self.app, self.names = app, names

    async def __call__(self, scope, receive, send):
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else ""
        if host and re.sub(r":\d*$", "", host.lower()) not in self.names:
            reason = f"Host: {host[:100]}, expected {', '.join(sorted(self.names))} (--allowed_hosts adds names)"
            return await Answer({"error": reason}, 400)(scope, receive, send)
        await self.app(scope, receive, send)


def guard(app: Starlette, host: str, allowed: Iterable[str] = ()) -> None:
    """Put the layers around app. At a loopback address, host, it answers only to local names and allowed ones."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if loopback:
        app.add_middleware(HostNames, names={*LOCAL_NAMES, in_brackets(host), *map(str.lower, allowed)})
    app.add_middleware(EndUnread)


# ---------------------------------------------------------------- serving


def in_brackets(host: str) -> str:
    """A host as an address has it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on a host (str) and port. Raises InputError where that cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        why = str(getattr(error, "strerror", error)).split(" (")[0].lower()  # create_server appends the address
        raise InputError(f"--host {host} --port {port}: {why}, expected this machine's and a free one") from None


def make_server(app: Starlette, **options: Any) -> uvicorn.Server:
    """uvicorn's Server of app; options: those of uvicorn.Config. Headers end at 64 KB, h11's limit."""
    return uvicorn.Server(uvicorn.Config(app, **{"http": "h11", "loop": "asyncio", "ws": "none", **options}))


def serve(app: Starlette, listening: socket.socket, **options: Any) -> None:
    """Answer requests on a socket that listens, until SIGINT or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises what ended it once more, after a graceful end
    make_server(app, log_level="error", **options).run(sockets=[listening])
