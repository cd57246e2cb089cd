"""Clients that do a server harm, all at once and until they are stopped."""

import asyncio
import multiprocessing
import random
from contextlib import closing, contextmanager, suppress

PAUSE = 1.0  # seconds between a connection and the next; 0.1 makes the broken-off bodies a flood of 340 MB a second
HEAD = b"POST /scan_sentence_image_score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = HEAD + b"Content-Length: 3400000\r\n\r\n"  # that of eight images
HUGE = HEAD + b"Content-Length: 100000000000\r\n\r\n"
# what is sent first, and again and again; seconds between; how many clients
CLIENTS = (
    (HEAD + b"X-Slow: ", b"x", 0.1, 100),  # a header that never ends
    (BODY, b" " * 512, 0.25, 60),
    (BODY + b" " * 1_700_000, b"", 0, 20),  # half a body, and the connection's end
    (random.randbytes(2500) + b"\r\n\r\n", b"", 0, 10),  # not HTTP
    (HUGE, b" " * (1 << 16), 0, 10),  # as fast as the server takes it
)


async def connect_for_ever(port, first, more, pause):
    await asyncio.sleep(random.uniform(0, PAUSE))
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with closing(writer):
                writer.write(first)
                await writer.drain()
                while more and not reader.at_eof():
                    await asyncio.sleep(pause)
                    writer.write(more)
                    await writer.drain()
        await asyncio.sleep(PAUSE)


def run(port):
    async def run_all():
        await asyncio.gather(*(connect_for_ever(port, *kind) for *kind, count in CLIENTS for _ in range(count)))

    asyncio.run(run_all())


@contextmanager
def hostile_clients(port):
    """A process of all these clients, which ends with the context."""
    process = multiprocessing.get_context("spawn").Process(target=run, args=(port,))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()
