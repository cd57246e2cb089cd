"""Scores a test list through the scoring server: one line of OUT per item, which compute_map.py reads.

An interrupted run goes on where it stopped: until the last item is scored, the lines lie in OUT.part.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import math
import os
import random
import socket
import sys
import threading
import time

from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib import errors
from lib.datasets.news import FILES, Images, load_img_url_to_id, process_json_file, process_tsv_file, read_words
from lib.files import check_output, lock, sample_digest, write_lines

g_output_path = "./dist.json"  # what process() writes, and the port that it asks
g_port = 5091

PATH = "/scan_sentence_image_score"
COLUMNS = "urls", "dist_t2i", "dist_i2t"  # of a line of OUT
LONG_WAIT = 60  # seconds: a longer one, which the server asked for, is announced
BUSY = (408, 429, 500, 502, 503, 504)  # worth another attempt
NEVER = (401, 403, 404, 405)  # no item would fare better: a wrong key or a wrong server


# ---------------------------------------------------------------- the server


class Refused(Exception):
    """The server will not score this request, and says why."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


class Server:
    """One scoring server, asked by any number of threads.

    api_key: PFAN_API_KEY of the environment where None. retries: further attempts where it is busy or gone.
    """

    def __init__(self, host="127.0.0.1", port=5091, api_key=None, timeout=60.0, retries=6):
        self.host, self.port, self.timeout, self.retries = host, port, timeout, retries
        api_key = api_key or os.environ.get("PFAN_API_KEY")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise errors.InputError("the API key (--api_key or PFAN_API_KEY): expected printable ASCII characters")
        self.headers = {"Content-Type": "application/json", **({"X-API-Key": api_key} if api_key else {})}
        self.stop = threading.Event()  # set: nobody waits for another attempt any more
        self.model, self.lock = None, threading.Lock()  # what X-Model of the answers says; some servers do not
        self.quiet_until = 0.0  # the time until which a long wait has been announced

    def check(self):
        """InputError where nothing listens at the address."""
        try:
            socket.create_connection((self.host, self.port), self.timeout).close()
        except (OSError, UnicodeError) as error:
            raise errors.InputError(
                f"no server at {self.host}:{self.port} ({error}); Tencent_PFAN/run_server.sh starts it"
            ) from None

    def send(self, body=None, path=PATH, method="POST"):
        """One attempt → status, headers, body of the answer. OSError or HTTPException where the connection fails."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        with contextlib.closing(connection):
            # a server may refuse a request before it has read all of it: the answer may be there
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, self.headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def ask(self, body):
        """The answer (bytes) to a request's body, after further attempts where that may help.

        Refused where the server answers that it cannot; InputError where it does not answer after all attempts,
        or answers what says that no request will be scored.
        """
        for attempt in range(self.retries + 1):
            delay = min(0.5 * 2**attempt, 30.0) * random.uniform(1.0, 1.2)
            try:
                status, headers, answer = self.send(body)
            except (OSError, http.client.HTTPException) as error:
                status, reason = None, f"{type(error).__name__} {error}".strip()
            else:
                if status == 200:
                    self.check_model(headers.get("X-Model"))
                    return answer
                reason = f"{status} {explain(answer)}"
                if status in NEVER or status < 400:
                    raise errors.InputError(f"{self.host}:{self.port}{PATH} answered {reason}")
                if status not in BUSY:
                    raise Refused(status, reason)
                after = headers.get("Retry-After", "")
                if after.isdecimal():
                    delay = max(delay, min(float(after), 3600.0))
            if attempt < self.retries:
                self.announce(delay, reason)
                if self.stop.wait(delay):
                    break
        if status == 500:
            raise Refused(status, reason)
        raise errors.InputError(
            f"{self.host}:{self.port} gave no scores in {attempt + 1} attempts, the last time: {reason}; "
            "run the same command again to go on"
        )

    def announce(self, delay, reason):
        """Say a wait of more than LONG_WAIT seconds, once for all threads that wait."""
        now = time.monotonic()
        with self.lock:
            if delay > LONG_WAIT and now >= self.quiet_until:
                self.quiet_until = now + delay
                tqdm.write(f"waiting {delay:.0f} s: {self.host}:{self.port} answered {reason}", file=sys.stderr)

    def check_model(self, model):
        """InputError where an answer comes from another model than the ones before."""
        with self.lock:
            self.model = self.model or model
            if model not in (None, self.model):
                raise errors.InputError(
                    f"{self.host}:{self.port} answers with model {model}, the items before were scored with "
                    f"{self.model}: start that one, or remove OUT.part to start over"
                )


def explain(answer):
    """What an error answer says, on one line: the "error" of a JSON object, else the text itself."""
    text = answer.decode(errors="replace")
    with contextlib.suppress(KeyError, TypeError, ValueError):
        text = str(json.loads(text)["error"])
    return " ".join(text.split())[:200]


# ---------------------------------------------------------------- one item


def get_sim(data, server=None):
    """A server's answer to a request (dict of "sentence", "boxes", "whole_items"), as text.

    server: a Server; None for the one on port g_port of this machine. Raises Refused and InputError as Server.ask does.
    """
    return (server or Server(port=g_port)).ask(json.dumps(data).encode()).decode()


def read_scores(answer, count):
    """[(sim_t2i, sim_i2t)] of an answer's text, one pair for each of count images. Raises Refused."""
    try:
        sims = json.loads(answer)
        scores = list(zip(sims["sim_t2i"], sims["sim_i2t"], strict=True))
        fits = len(scores) == count and all(math.isfinite(x) for pair in scores for x in pair)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise Refused(200, f"it answered {answer[:60]!r}, expected {count} finite numbers as sim_t2i and as sim_i2t")
    return scores


def ask_or_say_why(server, words, images):
    """(sim_t2i, sim_i2t) of each image, or a string that says why there is none."""
    boxes, wholes = zip(*images, strict=True)
    try:
        answer = get_sim({"sentence": words, "boxes": boxes, "whole_items": wholes}, server)
        return read_scores(answer, len(boxes))
    except Refused as refusal:
        if len(images) == 1 or refusal.status >= 500:
            return [f"image that the server refused: {refusal}"] * len(images)
    # one bad image does not cost the others of its item
    return [ask_or_say_why(server, words, [image])[0] for image in images]


def score_item(server, images, words, urls):
    """One item → a line of OUT.part: the scored images, and in "skipped" why the others are not."""
    skipped = [reason for reason in map(images.missing, urls) if reason]
    urls = [url for url in urls if not images.missing(url)]
    answers = ask_or_say_why(server, words, [images.read(url) for url in urls]) if urls else []
    scored = [(url, *answer) for url, answer in zip(urls, answers, strict=True) if not isinstance(answer, str)]
    skipped += [answer for answer in answers if isinstance(answer, str)]
    if not urls and not skipped:
        skipped = ["item without images"]
    columns = zip(*scored, strict=True) if scored else ([], [], [])
    return {**dict(zip(COLUMNS, columns, strict=True)), "skipped": skipped}


# ---------------------------------------------------------------- the whole list


def read_part(file, run):
    """The lines that an interrupted run left in OUT.part; a last one that was cut off is removed from the file.

    run: the digest that its lines must have. Raises InputError where one has another.
    """
    file.seek(0)
    data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    file.truncate(len(data))
    try:
        lines = [json.loads(line) for line in data.splitlines()]
        fits = all(line["run"] == run for line in lines)
    except (KeyError, TypeError, ValueError, RecursionError):
        fits = False
    if not fits:
        raise errors.InputError(
            f"{file.name}: expected lines of the same test list, words and data files; remove the file to start over"
        )
    return lines


def process(text_input_flag="tag", data_path="../data/tencent_data_meta", workers=4, **server):
    """Score the items of data_path/test_list.json through the server on port g_port, and write g_output_path.

    text_input_flag: "tag" for the items' Tag words, any other for their Content words. workers: requests at a time.
    server: further arguments of Server. Raises InputError; what was scored until then stays in OUT.part.
    """
    list_path, *paths = (os.path.join(data_path, name) for name in ("test_list.json", *FILES))
    out = os.path.realpath(g_output_path)  # of a link, the file that it names is written
    check_output(out, list_path, *paths)
    server = Server(port=g_port, **server)
    server.check()
    items = read_words(list_path, text_input_flag)
    if not items:
        raise errors.InputError(f"{list_path}: no items, expected one a line")
    digested = json.dumps([text_input_flag == "tag", items, [sample_digest(path) for path in paths]])
    run = hashlib.sha256(digested.encode()).hexdigest()[:16]
    with open(out + ".part", "a+b") as part:
        lock(part, f"{part.name}: another run is writing it, expected another OUT")
        lines = read_part(part, run)
        if lines:
            print(f"going on after item {len(lines)} of {len(items)}, from {part.name}; remove that file to start over")
        server.model = next((line["model"] for line in lines if line["model"]), None)
        ids, rows, wholes = paths
        images = Images(load_img_url_to_id(ids), process_tsv_file(rows, sys.maxsize), process_json_file(wholes))
        bar = tqdm(total=len(items), initial=len(lines), unit="item", disable=None)
        with bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
            try:
                for line in pool.map(lambda item: score_item(server, images, *item), items[len(lines) :]):
                    line |= {"run": run, "model": server.model}
                    lines.append(line)
                    part.write(json.dumps(line).encode() + b"\n")
                    part.flush()
                    bar.update()
            finally:
                server.stop.set()
                pool.shutdown(cancel_futures=True)
        scored = any(line["urls"] for line in lines)
        if scored:  # OUT is written whole or not at all; what is written first must not be OUT.part
            write_lines(out + ".new", (json.dumps({key: line[key] for key in COLUMNS}) for line in lines))
            os.replace(out + ".new", out)
    os.remove(out + ".part")  # after a run without scores too: another attempt must not go on from here
    skipped = collections.Counter(reason for line in lines for reason in line["skipped"]).most_common()
    if not scored:
        reason, count = skipped[0]
        raise errors.InputError(f"{out}: not written, no image could be scored: {count} x {reason}")
    n_scored, n_images = sum(len(line["urls"]) for line in lines), sum(len(urls) for _, urls in items)
    n_items = sum(1 for line in lines if line["urls"])
    print(f"scored {n_scored} of {n_images} images, {n_items} of {len(items)} items have scores")
    for reason, count in skipped:
        print(f"skipped {count}: {reason}")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python test.py dist_sentence_t2i.json sentence 5091",
    )
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("out", metavar="OUT", help="file to write")
    add("kind", help="tag: the items' Tag words; sentence or any other word: their Content words")
    add("port", type=int, help="of the server: run_server.sh uses 5091 for sentences, 5092 for tags")
    add("--host", default="127.0.0.1", help=f"of the server {shown}")
    data = f"folder with test_list.json, {', '.join(FILES)} {shown}"
    add("--data_path", default="../data/tencent_data_meta", help=data)
    add("--workers", type=int, default=4, help=f"requests at a time {shown}")
    add("--timeout", type=float, default=60.0, help=f"seconds for one answer {shown}")
    waits = "further attempts where the server is busy or gone, after 0.5, 1, 2, ... seconds or what it asks for"
    add("--retries", type=int, default=6, help=f"{waits} {shown}")
    add("--api_key", help="sent as X-API-Key; better in PFAN_API_KEY, as others can read command lines")
    args = parser.parse_args()
    if not 0 < args.port < 65536:
        parser.error(f"port: {args.port}, expected 1 to 65535")
    if args.workers < 1 or args.retries < 0 or not 0 < args.timeout < threading.TIMEOUT_MAX:
        parser.error("expected --workers of at least 1, --retries of at least 0, --timeout above 0")
    return args


def main():
    global g_output_path, g_port
    options = vars(parse_args())
    g_output_path, g_port = options.pop("out"), options.pop("port")
    process(options.pop("kind"), **options)


if __name__ == "__main__":
    errors.run(main)
