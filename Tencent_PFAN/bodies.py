"""Bodies of requests under way: bounded in number, in bytes, and by a least rate; and gzip bodies unpacked.

A body that arrives slowly holds no place in the server's queue, and where there is no room for one more body, the
slowest gives way.
"""

import asyncio
import zlib

from starlette.requests import ClientDisconnect

from lib.web import Refused
from Tencent_PFAN.scoring import BadRequest

FREE_SECONDS = 5  # in which a body may arrive at any rate
YOUNG_SECONDS = 1  # in which no body gives way: its rate is not known yet


class Arrival:
    """One body under way. limit: the asyncio.Timeout in which it is read, moved on with every chunk."""

    def __init__(self, started):
        self.started, self.size, self.limit = started, 0, None

    def age(self):
        return asyncio.get_running_loop().time() - self.started

    def rate(self):
        """Bytes a second so far."""
        return self.size / max(self.age(), 1e-3)


class Bodies:
    """The bodies under way. opt: max_body_mb, bodies, bodies_mb, min_rate, timeout, as the command line has them."""

    def __init__(self, opt):
        self.opt = opt
        self.under_way = set()

    def __len__(self):
        return len(self.under_way)

    def check_size(self, size):
        """Raises Refused for a body of more bytes than one may have."""
        if size > self.opt.max_body_mb << 20:
            raise Refused(413, f"body: over {self.opt.max_body_mb} MB (--max_body_mb)")

    async def read(self, request):
        """The body of a request (bytes). Raises Refused."""
        if len(self) >= self.opt.bodies and not self.drop_slowest():
            raise Refused(429, f"{len(self)} bodies arrive, come back later", Retry_After="1")
        arrival, chunks = Arrival(asyncio.get_running_loop().time()), []
        self.under_way.add(arrival)
        try:
            async with asyncio.timeout_at(self.deadline(arrival)) as arrival.limit:
                async for chunk in request.stream():
                    if arrival not in self.under_way:  # it gave way, and the timeout is about to say so
                        raise TimeoutError
                    chunks.append(chunk)
                    arrival.size += len(chunk)
                    self.check_size(arrival.size)
                    self.make_room()
                    if arrival in self.under_way:
                        arrival.limit.reschedule(self.deadline(arrival))
        except TimeoutError:
            request.scope["no_linger"] = True  # to read on what gave way would cost what it was to save
            raise self.refusal(arrival) from None
        except ClientDisconnect:
            raise Refused(400, "body: the connection ended before it was complete") from None
        finally:
            self.under_way.discard(arrival)
        request.scope["body_read"] = True
        return b"".join(chunks)

    def deadline(self, arrival):
        """When a body must be complete, or have more bytes (the loop's time)."""
        end = arrival.started + self.opt.timeout
        if not self.opt.min_rate:
            return end
        return min(end, arrival.started + FREE_SECONDS + arrival.size / (1000 * self.opt.min_rate))

    def make_room(self):
        """Drop the slowest until all bytes under way fit. A single body always does."""
        while len(self) > 1 and sum(arrival.size for arrival in self.under_way) > self.opt.bodies_mb << 20:
            if not self.drop_slowest():
                raise Refused(429, f"{len(self)} bodies arrive, come back later", Retry_After="1")

    def drop_slowest(self):
        """End the slowest body that is not young. False where all are."""
        old = [arrival for arrival in self.under_way if arrival.age() > YOUNG_SECONDS]
        if not old:
            return False
        slowest = min(old, key=Arrival.rate)
        self.under_way.remove(slowest)
        if not slowest.limit.expired():
            slowest.limit.reschedule(asyncio.get_running_loop().time())
        return True

    def refusal(self, arrival):
        """Why a body that was not complete is read no further, as Refused."""
        if arrival not in self.under_way:
            rate = f"{arrival.rate() / 1000:.0f} KB a second"
            return Refused(429, f"body: {rate}, the slowest; others needed its place", Retry_After="1")
        if arrival.age() >= self.opt.timeout:
            return Refused(408, f"body: not complete after {self.opt.timeout:g} seconds")
        return Refused(408, f"body: slower than {self.opt.min_rate:g} KB a second (--min_rate)")


def unpacked_size(packed):
    """Bytes of a gzip file before it was packed, by its last four bytes. Raises BadRequest where it is not gzip."""
    if packed[:2] != b"\x1f\x8b":
        raise BadRequest("body: not gzip, though Content-Encoding says so")
    return int.from_bytes(packed[-4:], "little")


def unpack(packed, size):
    """The bytes in a gzip file of one member, size of them. Raises BadRequest."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        data = unpacker.decompress(packed, size + 1)  # no more memory than was announced
    except zlib.error as error:
        raise BadRequest(f"body: broken gzip ({error})") from None
    if not unpacker.eof or unpacker.unused_data:
        raise BadRequest("body: gzip that is cut off, or more than one file")
    return data
