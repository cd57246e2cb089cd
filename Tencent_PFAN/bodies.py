"""Bodies of requests under way: bounded in number, in bytes, and by a least rate; and gzip bodies unpacked.

A body that arrives slowly holds no place in the server's queue, and where there is no room for one more body, the
slowest gives way.
"""

import asyncio
import zlib

from starlette.requests import ClientDisconnect

from lib.web import COME_BACK, Refused

FREE_SECONDS = 5  # in which a body may arrive at any rate
YOUNG_SECONDS = 1  # in which no body gives way: its rate is not known yet


def now():
    return asyncio.get_running_loop().time()


class Arrival:
    """One body under way. limit: the asyncio.Timeout in which it is read. refusal: why it gave way, or None."""

    def __init__(self):
        self.started, self.data, self.limit, self.refusal = now(), bytearray(), None, None

    def rate(self):
        """Bytes a second so far."""
        return len(self.data) / max(now() - self.started, 1e-3)


class Bodies:
    """The bodies under way. opt: max_body_mb, bodies, bodies_mb, min_rate, timeout, as the command line has them."""

    def __init__(self, opt):
        self.opt, self.under_way = opt, set()

    def __len__(self):
        return len(self.under_way)

    def check_size(self, size):
        """Raises Refused for a body of more bytes than one may have."""
        if size > self.opt.max_body_mb << 20:
            raise Refused(413, f"body: over {self.opt.max_body_mb} MB (--max_body_mb)")

    async def read(self, request):
        """The body of a request (bytes). Raises Refused."""
        if len(self) >= self.opt.bodies:
            self.drop_slowest()
        arrival = Arrival()
        self.under_way.add(arrival)
        try:
            async with asyncio.timeout_at(self.deadline(arrival)) as arrival.limit:
                async for chunk in request.stream():
                    arrival.data += chunk
                    self.check_size(len(arrival.data))
                    while len(self) > 1 and sum(len(x.data) for x in self.under_way) > self.opt.bodies_mb << 20:
                        self.drop_slowest()
                    if arrival.refusal:
                        raise arrival.refusal
                    arrival.limit.reschedule(self.deadline(arrival))
        except TimeoutError:
            late = now() - arrival.started >= self.opt.timeout
            slow = f"slower than {self.opt.min_rate:g} KB a second (--min_rate)"
            reason = f"not complete after {self.opt.timeout:g} seconds (--timeout)" if late else slow
            raise arrival.refusal or Refused(408, f"body: {reason}") from None
        except ClientDisconnect:
            raise Refused(400, "body: the connection ended before it was complete") from None
        finally:
            self.under_way.discard(arrival)
        return bytes(arrival.data)

    def deadline(self, arrival):
        """When a body must be complete, or have more bytes (the loop's time)."""
        end = arrival.started + self.opt.timeout
        if not self.opt.min_rate:
            return end
        return min(end, arrival.started + FREE_SECONDS + len(arrival.data) / (1000 * self.opt.min_rate))

    def drop_slowest(self):
        """End the slowest body that is not young. Raises Refused where all are."""
        old = [arrival for arrival in self.under_way if now() - arrival.started > YOUNG_SECONDS]
        if not old:
            raise Refused(429, f"{len(self)} bodies arrive, come back later", COME_BACK)
        slowest = min(old, key=Arrival.rate)
        reason = f"body: {slowest.rate() / 1000:.0f} KB a second, the slowest; others needed its place"
        slowest.refusal = Refused(429, reason, COME_BACK)
        slowest.data.clear()
        if not slowest.limit.expired():
            slowest.limit.reschedule(now())
        self.under_way.remove(slowest)


def unpacked_size(packed):
    """Bytes of a gzip file before it was packed, by its last four bytes. Raises Refused where it is not gzip."""
    if packed[:2] != b"\x1f\x8b":
        raise Refused(400, "body: not gzip, though Content-Encoding says so")
    return int.from_bytes(packed[-4:], "little")


def unpack(packed, size):
    """The bytes in a gzip file of one member, size of them. Raises Refused."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        data = unpacker.decompress(packed, size + 1)  # no more memory than was announced
    except zlib.error as error:
        raise Refused(400, f"body: broken gzip ({error})") from None
    if not unpacker.eof or unpacker.unused_data:
        raise Refused(400, "body: gzip that is cut off, or more than one file")
    return data
