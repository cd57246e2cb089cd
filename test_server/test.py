"""Scores a test list through the scoring server: one line of OUT per item, which compute_map.py reads.

An interrupted run goes on where it stopped: until the last item is scored, the lines lie in OUT.part.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import http.client
import json
import math
import os
import random
import socket
import threading

from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib import errors
from lib.datasets.news import FILES, Pictures, read_words
from lib.files import write_lines

PATH = "/scan_sentence_image_score"
BUSY = (408, 429, 500, 502, 503, 504)  # worth another attempt
NEVER = (401, 403, 404, 405)  # no item would fare better: a wrong key or a wrong server


class Refused(Exception):
    """The server will not score this request, and says why."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


class Server:
    """One scoring server, asked by any number of threads, each over a connection of its own that it keeps open."""

    def __init__(self, host, port, api_key=None, timeout=60.0, retries=6):
        self.host, self.port, self.timeout, self.retries = host, port, timeout, retries
        self.headers = {"Content-Type": "application/json", **({"X-API-Key": api_key} if api_key else {})}
        self.local = threading.local()
        self.stop = threading.Event()  # set: nobody waits for another attempt any more
        self.model, self.lock = None, threading.Lock()  # what X-Model of the answers says; some servers do not

    def check(self):
        """InputError where nothing listens at the address."""
        try:
            socket.create_connection((self.host, self.port), self.timeout).close()
        except (OSError, UnicodeError) as error:
            raise errors.InputError(
                f"no server at {self.host}:{self.port} ({error}); Tencent_PFAN/run_server.sh starts it"
            ) from None

    def post(self, body):
        """One attempt → status, headers, body of the answer. OSError or HTTPException where the connection fails."""
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        connection = self.local.connection
        try:
            try:
                connection.request("POST", PATH, body, self.headers)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a server may refuse a request before it has read all of it: the answer may be there
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        except BaseException:
            connection.close()
            raise

    def ask(self, words, boxes, wholes):
        """[(sim_t2i, sim_i2t)] of one sentence with each picture.

        Refused where the server answers that it cannot; InputError where it does not answer after all attempts,
        or answers what says that no request will be scored.
        """
        body = json.dumps({"sentence": words, "boxes": boxes, "whole_items": wholes}).encode()
        for attempt in range(self.retries + 1):
            delay = min(0.5 * 2**attempt, 30.0) * random.uniform(1.0, 1.2)
            try:
                status, headers, answer = self.post(body)
            except (OSError, http.client.HTTPException) as error:
                status, reason = None, f"{type(error).__name__} {error}".strip()
            else:
                if status == 200:
                    self.check_model(headers.get("X-Model"))
                    return self.scores(answer, len(boxes))
                reason = f"{status} {explain(answer)}"
                if status in NEVER or status < 400:
                    raise errors.InputError(f"{self.host}:{self.port}{PATH} answered {reason}")
                if status not in BUSY:
                    raise Refused(status, reason)
                after = headers.get("Retry-After", "")
                if after.isdecimal():
                    delay = max(delay, min(float(after), 3600.0))
            if attempt < self.retries and self.stop.wait(delay):
                break
        if status == 500:
            raise Refused(status, reason)
        raise errors.InputError(
            f"{self.host}:{self.port} gave no scores in {attempt + 1} attempts, the last time: {reason}; "
            "run the same command again to go on"
        )

    def check_model(self, model):
        """InputError where an answer comes from another model than the ones before."""
        with self.lock:
            self.model = self.model or model
            if model not in (None, self.model):
                raise errors.InputError(
                    f"{self.host}:{self.port} answers with model {model}, the items before were scored with "
                    f"{self.model}: start that one, or remove OUT.part to start over"
                )

    def scores(self, answer, count):
        """The answer's (sim_t2i, sim_i2t), one pair for each of count pictures."""
        try:
            answer = json.loads(answer)
            pairs = list(zip(answer["sim_t2i"], answer["sim_i2t"], strict=True))
        except (KeyError, TypeError, ValueError):
            raise errors.InputError(
                f"{self.host}:{self.port} answered {str(answer)[:60]!r}, expected sim_t2i and sim_i2t, equally long"
            ) from None
        if len(pairs) != count or not all(isinstance(x, (int, float)) and math.isfinite(x) for p in pairs for x in p):
            raise Refused(200, f"its answer is not {count} finite scores")
        return pairs


def explain(answer):
    """What an error answer says, on one line: the "error" of a JSON object, else the text itself."""
    text = answer.decode(errors="replace")
    try:
        text = str(json.loads(text)["error"])
    except (KeyError, TypeError, ValueError):
        pass
    return " ".join(text.split())[:200]


def ask_or_say_why(server, words, pictures):
    """(sim_t2i, sim_i2t) of each picture, or a string that says why there is none."""
    boxes, wholes = zip(*pictures, strict=True)
    try:
        return server.ask(words, boxes, wholes)
    except Refused as refusal:
        if len(pictures) == 1 or refusal.status >= 500:
            return [f"picture that the server refused: {refusal}"] * len(pictures)
    # one bad picture does not cost the others of its item
    return [ask_or_say_why(server, words, [picture])[0] for picture in pictures]


def score_item(server, pictures, words, urls):
    """One item → {"urls", "dist_t2i", "dist_i2t", "skipped"}: the scored pictures and why the others are not."""
    skipped = [reason for reason in map(pictures.missing, urls) if reason]
    urls = [url for url in urls if not pictures.missing(url)]
    answers = ask_or_say_why(server, words, [pictures.read(url) for url in urls]) if urls else []
    scored = [(url, *answer) for url, answer in zip(urls, answers, strict=True) if not isinstance(answer, str)]
    skipped += [answer for answer in answers if isinstance(answer, str)]
    if not urls and not skipped:
        skipped = ["item without pictures"]
    columns = zip(*scored, strict=True) if scored else ([], [], [])
    return {**dict(zip(("urls", "dist_t2i", "dist_i2t"), columns, strict=True)), "skipped": skipped}


def in_order(function, items, workers, stop):
    """function(item) of each item on so many threads, yielded in the items' order; few are under way at a time."""
    pending = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                while pending and (len(pending) >= 2 * workers or pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def fingerprint(kind, words, urls, sizes):
    """Tells whether a line of OUT.part was made from this item of the test list, and data files of these sizes."""
    return hashlib.sha256(json.dumps([kind == "tag", words, urls, sizes]).encode()).hexdigest()[:16]


def read_part(path, marks):
    """The lines that an interrupted run left in OUT.part; a last one that was cut off is removed from the file."""
    done, size = [], 0
    with open(path, "a+b") as file:
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(size)
                break
            try:
                done.append(json.loads(line))
                lists = [done[-1][key] for key in ("urls", "dist_t2i", "dist_i2t", "skipped")]
                fits = done[-1]["item"] == marks[number - 1] and all(isinstance(x, list) for x in lists)
                fits = fits and all(isinstance(reason, str) for reason in lists[-1])
            except (IndexError, KeyError, TypeError, ValueError, RecursionError):
                fits = False
            if not fits:
                raise errors.InputError(
                    f"{path}:{number}: expected a line for the same item of this test list, made with the same data "
                    "files; remove the file to start over"
                )
            size += len(line)
    return done


def write_out(path, lines):
    """The finished file, whole or not at all; what write_lines writes to first must not be OUT.part."""
    keys = "urls", "dist_t2i", "dist_i2t"
    write_lines(path + ".new", (json.dumps({key: line[key] for key in keys}) for line in lines))
    os.replace(path + ".new", path)


def skipped(lines):
    """[(reason, how many pictures or items)] of what was not scored, the most frequent first."""
    return collections.Counter(reason for line in lines for reason in line["skipped"]).most_common()


def report(lines, items, pictures):
    """Print what was scored, what was not and why."""
    print(
        f"scored {sum(len(line['urls']) for line in lines)} of {sum(len(urls) for _, urls in items)} pictures, "
        f"{sum(1 for line in lines if line['urls'])} of {len(items)} items have scores"
    )
    for reason, count in skipped(lines):
        print(f"skipped {count}: {reason}")
    if pictures.rows_without_id:
        print(f"skipped {pictures.rows_without_id}: row of test_own.tsv.0 without an integer id")
    for name, count in pictures.repeated.items():
        if count:
            print(f"note: {count} rows of {name} repeat an id, whose last row counts")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python test.py dist_sentence_t2i.json sentence 5091",
    )
    parser.add_argument("out", metavar="OUT", help="file to write")
    parser.add_argument("kind", help="tag: the items' Tag words; sentence or any other word: their Content words")
    parser.add_argument("port", type=int, help="of the server: run_server.sh uses 5091 for sentences, 5092 for tags")
    parser.add_argument("--host", default="127.0.0.1", help="of the server (default: %(default)s)")
    parser.add_argument(
        "--data_path",
        default="../data/tencent_data_meta",
        help="folder with test_list.json, img_id.txt, test_own.tsv.0 and test_features.json (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=4, help="requests at a time (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one answer (default: %(default)s)")
    parser.add_argument(
        "--retries",
        type=int,
        default=6,
        help="further attempts where the server is busy or gone, after 0.5, 1, 2, ... seconds or "
        "what it asks for (default: %(default)s)",
    )
    parser.add_argument("--api_key", help="sent as X-API-Key")
    args = parser.parse_args()
    if not 0 < args.port < 65536:
        parser.error(f"port: {args.port}, expected 1 to 65535")
    if args.workers < 1 or args.retries < 0 or not 0 < args.timeout < threading.TIMEOUT_MAX:
        parser.error("expected --workers of at least 1, --retries of at least 0, --timeout above 0")
    if args.api_key and not (args.api_key.isascii() and args.api_key.isprintable()):
        parser.error("--api_key: expected printable ASCII characters")
    return args


def main():
    args = parse_args()
    if os.path.isdir(args.out):
        raise errors.InputError(f"{args.out}: is a folder, expected a file to write")

    server = Server(args.host, args.port, args.api_key, args.timeout, args.retries)
    server.check()
    items = read_words(os.path.join(args.data_path, "test_list.json"), args.kind)
    if not items:
        raise errors.InputError(f"{args.data_path}/test_list.json: no items, expected one a line")
    sizes = [os.path.getsize(os.path.join(args.data_path, name)) for name in FILES]
    marks = [fingerprint(args.kind, *item, sizes) for item in items]
    part = args.out + ".part"
    lines = read_part(part, marks)
    if lines:
        print(f"going on after item {len(lines)} of {len(items)}, from {part}; remove that file to start over")
    server.model = next((line["model"] for line in lines if line.get("model")), None)
    pictures = Pictures(args.data_path, {url for _, urls in items for url in urls})

    bar = tqdm(total=len(items), initial=len(lines), unit="item", disable=None)
    with open(part, "a", encoding="utf-8") as file, bar:
        todo = items[len(lines) :]
        for line in in_order(lambda item: score_item(server, pictures, *item), todo, args.workers, server.stop):
            line |= {"item": marks[len(lines)], "model": server.model}
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update()
    if not any(line["urls"] for line in lines):
        os.remove(part)  # another attempt must not go on from here
        reason, count = skipped(lines)[0]
        raise errors.InputError(f"{args.out}: not written, no picture could be scored: {count} x {reason}")
    write_out(args.out, lines)
    os.remove(part)
    report(lines, items, pictures)


if __name__ == "__main__":
    errors.run(main)
