"""Clients that do a server harm, all at once and until they are stopped: python -m scripts.load.hostile PORT < BODY

Each connects again a second after its connection has ended. BODY: a good request's, of which some send a part.
"""

import asyncio
import os
import random
import subprocess
import sys
from contextlib import contextmanager, suppress

PATH = "/scan_sentence_image_score"
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
PAUSE = 1.0  # seconds between a connection and the next; 0.1 makes broken_off a flood of 340 MB a second


async def slow_headers(reader, writer, body):
    """A header that never ends, a byte every 0.1 seconds."""
    writer.write(HEAD.encode() + b"X-Slow: ")
    while not reader.at_eof():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.1)


async def slow_body(reader, writer, body):
    """A body at 2 KB a second."""
    writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode())
    for start in range(0, len(body), 512):
        if reader.at_eof():
            break
        writer.write(body[start : start + 512])
        await writer.drain()
        await asyncio.sleep(0.25)


async def broken_off(reader, writer, body):
    """Half of a body, and the connection's end."""
    writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2])
    await writer.drain()


async def nonsense(reader, writer, body):
    """Bytes that are not HTTP."""
    writer.write(random.randbytes(random.randrange(1, 5000)) + b"\r\n\r\n")
    await writer.drain()
    await asyncio.wait_for(reader.read(), 10)


async def huge(reader, writer, body):
    """A body of 100 GB, sent as fast as the server takes it."""
    writer.write(f"{HEAD}Content-Length: {10**11}\r\n\r\n".encode())
    while True:
        writer.write(b" " * (1 << 16))
        await writer.drain()


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
    """A process of all these clients; its Popen. It ends with the context."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    command = [sys.executable, "-m", "scripts.load.hostile", str(port)]
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE)
    try:
        process.stdin.write(body)
        process.stdin.close()
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    asyncio.run(run_all(int(sys.argv[1]), sys.stdin.buffer.read()))
