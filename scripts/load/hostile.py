"""Clients that do a server harm, all at once and until they are stopped: python scripts/load/hostile.py PORT < BODY

Each connects again a second after its connection has ended. BODY: a good request's, of which some send a part.
"""

import asyncio
import random
import subprocess
import sys
from contextlib import contextmanager, suppress

HEAD = b"POST /scan_sentence_image_score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PAUSE = 1.0  # seconds between a connection and the next; 0.1 makes broken_off a flood of 340 MB a second


def head(size):
    return HEAD + f"Content-Length: {size}\r\n\r\n".encode()


async def send(reader, writer, pieces, pause=0.0):
    """Write pieces of bytes, so many seconds apart, until the server ends the connection."""
    for piece in pieces:
        if reader.at_eof():
            break
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause)


async def slow_headers(reader, writer, body):
    """A header that never ends, a byte every 0.1 seconds."""
    writer.write(HEAD + b"X-Slow: ")
    await send(reader, writer, iter(lambda: b"x", None), 0.1)


async def slow_body(reader, writer, body):
    """A body at 2 KB a second."""
    writer.write(head(len(body)))
    await send(reader, writer, (body[start : start + 512] for start in range(0, len(body), 512)), 0.25)


async def broken_off(reader, writer, body):
    """Half of a body, and the connection's end."""
    await send(reader, writer, [head(len(body)), body[: len(body) // 2]])


async def nonsense(reader, writer, body):
    """Bytes that are not HTTP."""
    await send(reader, writer, [random.randbytes(random.randrange(1, 5000)) + b"\r\n\r\n"])
    await asyncio.wait_for(reader.read(), 10)


async def huge(reader, writer, body):
    """A body of 100 GB, sent as fast as the server takes it."""
    writer.write(head(10**11))
    await send(reader, writer, iter(lambda: b" " * (1 << 16), None))


COUNTS = {slow_headers: 100, slow_body: 60, broken_off: 20, nonsense: 10, huge: 10}


async def connect_for_ever(client, port, body):
    await asyncio.sleep(random.uniform(0, PAUSE))
    while True:
        with suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await client(reader, writer, body)
            finally:
                writer.transport.abort()
        await asyncio.sleep(PAUSE)


async def run_all(port, body):
    clients = [client for client, count in COUNTS.items() for _ in range(count)]
    await asyncio.gather(*(connect_for_ever(client, port, body) for client in clients))


@contextmanager
def hostile_clients(port, body):
    """A process of all these clients, which ends with the context."""
    with subprocess.Popen([sys.executable, __file__, str(port)], stdin=subprocess.PIPE) as process:
        try:
            process.stdin.write(body)
            process.stdin.close()
            yield
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(run_all(int(sys.argv[1]), sys.stdin.buffer.read()))
