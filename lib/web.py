"""What the scoring server and the explorer share: JSON answers, refusals, host names, and the way they are served."""

import asyncio
import ipaddress
import re
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lib.errors import InputError

LINGER_SECONDS, LINGER_BYTES = 2, 16 << 20  # how long a refused request is still read, so that its client hears why
HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?")  # of a Host header: a name or an address, and a port
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")

# ---------------------------------------------------------------- answers and refusals


class Answer(Response):
    """A JSON answer of lists, dicts, str, int, float; NaN becomes null."""

    media_type = "application/json"

    def render(self, content):
        return msgspec.json.encode(content)


class Refusal(Answer):
    """{"error": reason}. What the client still sends is read and dropped, within bounds: closing at once would reset
    the connection, and many clients would then see that instead of the reason. The connection ends with it: else one
    could go on sending for ever."""

    def __init__(self, reason, status, headers=None):
        super().__init__({"error": reason}, status, headers)

    async def __call__(self, scope, receive, send):
        headers = Headers(scope=scope)
        announced = int(headers.get("content-length", 0))
        unread = not scope.get("body_read") and (announced > 0 or "transfer-encoding" in headers)
        if unread:
            self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": unread})
        if unread:
            if not ("expect" in headers or scope.get("no_linger")):  # with Expect, no body is sent before an answer
                await linger(receive, announced)
            await send({"type": "http.response.body", "body": b""})


async def linger(receive: Callable, announced: int) -> None:
    """Read a body of so many bytes to its end, if that comes soon; else give its client the time to read the answer."""
    left = LINGER_BYTES if announced <= LINGER_BYTES else 0
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while left > 0 and (message := await receive()).get("more_body"):
                left -= len(message["body"])
            if left <= 0:
                await asyncio.sleep(LINGER_SECONDS)


class Refused(HTTPException):
    """Raised where a request cannot be answered: status, and a reason of one line."""

    def __init__(self, status, reason, **headers):
        super().__init__(status, reason, {name.replace("_", "-"): value for name, value in headers.items()})


async def refuse(request: Request, error: Any) -> Response:
    return Refusal(str(error.detail), error.status_code, error.headers)


async def refuse_unexpected(request: Request, error: Any) -> Response:
    return Refusal("internal error", 500)  # uvicorn prints the traceback


async def refuse_parameters(request: Request, error: Any) -> Response:
    """For FastAPI's RequestValidationError."""
    return Refusal("; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors()), 400)


REFUSALS = {HTTPException: refuse, Exception: refuse_unexpected}  # an app's exception_handlers

# ---------------------------------------------------------------- host names


class HostNames:
    """ASGI layer that refuses requests for other host names.

    A page of another site can have its name point to 127.0.0.1 and would then read answers from there. Browsers
    always send the name; a request without one comes from a program of this machine.
    """

    def __init__(self, app, names):
        self.app, self.names = app, names

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and (host := Headers(scope=scope).get("host")):
            name = HOST.fullmatch(host.lower())
            if not name or name[1] not in self.names:
                reason = f"Host: {host[:100]}, expected {', '.join(sorted(self.names))} (--allowed_hosts adds names)"
                return await Refusal(reason, 400)(scope, receive, send)
        await self.app(scope, receive, send)


def check_host_names(app: Starlette, host: str, allowed: Iterable[str] = ()) -> None:
    """Have app answer only requests for a local name or an allowed one, where host, its address, is loopback."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if loopback:
        written = f"[{host}]" if ":" in host else host
        app.add_middleware(HostNames, names={*LOCAL_NAMES, written, *map(str.lower, allowed)})


# ---------------------------------------------------------------- serving


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on a host (str) and port. Raises InputError where that cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = error.strerror.split(" (")[0].lower()  # create_server appends the address
        raise InputError(f"--host {host} --port {port}: {why}, expected this machine's and a free one") from None


def make_server(app: Starlette, **options: Any) -> uvicorn.Server:
    """uvicorn's Server of app; options: those of uvicorn.Config. Headers end at 64 KB, h11's limit."""
    return uvicorn.Server(uvicorn.Config(app, **{"http": "h11", "loop": "asyncio", "ws": "none", **options}))


def serve(app: Starlette, listening: socket.socket, **options: Any) -> None:
    """Answer requests on a socket that listens, until SIGINT or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises what ended it once more, after a graceful end
    make_server(app, log_level="error", **options).run(sockets=[listening])
