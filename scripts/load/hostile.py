"""Clients that do a server harm, all at once and until they are stopped: python scripts/load/hostile.py PORT < BODY

Each connects again a second after its connection has ended. BODY: a good request's, of which some send a part.
"""

import asyncio
import random
import subprocess
import sys
from contextlib import contextmanager, suppress
from itertools import chain, repeat

HEAD = b"POST /scan_sentence_image_score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PAUSE = 1.0  # seconds between a connection and the next; 0.1 makes the broken-off bodies a flood of 340 MB a second


def head(size):
    return HEAD + f"Content-Length: {size}\r\n\r\n".encode()


def slow_headers(body):
    """A header that never ends."""
    return chain([HEAD + b"X-Slow: "], repeat(b"x"))


def slow_body(body):
    return chain([head(len(body))], (body[start : start + 512] for start in range(0, len(body), 512)))


def broken_off(body):
    """Half of a body, and the connection's end."""
    return head(len(body)), body[: len(body) // 2]


def nonsense(body):
    """Bytes that are not HTTP."""
    return (random.randbytes(random.randrange(1, 5000)) + b"\r\n\r\n",)


def huge(body):
    """A body of 100 GB, sent as fast as the server takes it."""
    return chain([head(10**11)], repeat(b" " * (1 << 16)))


# what is sent, a piece after the other; seconds between two pieces; how many clients
CLIENTS = ((slow_headers, 0.1, 100), (slow_body, 0.25, 60), (broken_off, 0, 20), (nonsense, 0, 10), (huge, 0, 10))


async def connect_for_ever(pieces, pause, port, body):
    await asyncio.sleep(random.uniform(0, PAUSE))
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                for piece in pieces(body):
                    if reader.at_eof():
                        break
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause)
            finally:
                writer.close()
        await asyncio.sleep(PAUSE)


async def run_all(port, body):
    await asyncio.gather(*(connect_for_ever(*kind, port, body) for *kind, count in CLIENTS for _ in range(count)))


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
