"""Requests of the scoring server → arrays → scores: parse and check one request, score many as one batch.

Every way in which a request can be wrong raises Refused with one line that names the field and the index.
Sizes in the docstrings: P images of R = 36 regions, S sentences of W words, D embed_size.
"""

import codecs
import hashlib
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import pybase64
import torch
from cachetools import LRUCache
from msgspec import UNSET, Meta, UnsetType

from data import pad
from lib.checkpoint import load_checkpoint
from lib.constants import N_REGIONS, N_SLOTS
from lib.datasets.boxes import SQUARE
from lib.datasets.regions import are_shares
from lib.segmentation import segment
from lib.web import Refused
from model import load_model
from position import BoxError, position_grid
from Tencent_PFAN.model_whole import SCAN
from Tencent_PFAN.vocab import Vocabulary
from vocab import checkpoint_vocab

MAX_PIXELS = 1e6  # height and width of an image
LARGEST = 1e9  # of a feature's values, so that no product of float32 overflows
MAX_CHARACTERS, MAX_WORDS, MAX_SENTENCES = 20_000, 1_000, 100  # of a request: text costs more than its bytes show
BLOCK_IMAGES = 128  # images that are encoded, or scored with one request's sentences, at once


# ---------------------------------------------------------------- text


def caption(sentence, field):
    """Words separated by spaces, of a list of words or of a string, which is cut with jieba where it is Chinese."""
    if sum(map(len, sentence)) > MAX_CHARACTERS:
        raise Refused(400, f"{field}: {sum(map(len, sentence))} characters, expected at most {MAX_CHARACTERS}")
    if isinstance(sentence, str):
        sentence = segment(sentence)
    text = " ".join(sentence)
    if not text.strip():
        raise Refused(400, f"{field}: empty, expected words")
    return text


# ---------------------------------------------------------------- the form of a request


Sentence = str | list[str]
Size = Annotated[float, Meta(ge=1, le=MAX_PIXELS, description="pixels")]
BASE64 = {"contentEncoding": "base64"}


class Image(msgspec.Struct):
    image_id: Annotated[Any, Meta(description="yours; not read")]
    image_h: Size
    image_w: Size
    num_boxes: Annotated[int, Meta(ge=N_REGIONS, le=N_REGIONS)]
    boxes: Annotated[str, Meta(description="float32, 36 x 4: x1, y1, x2, y2 in pixels", extra_json_schema=BASE64)]
    features: Annotated[str, Meta(description="float32, 36 x img_dim", extra_json_schema=BASE64)]


class Body(msgspec.Struct):
    """A request: sentence (a string is cut into words where it is Chinese) or sentences, a whole item for each box."""

    boxes: Annotated[list[Image], Meta(min_length=1)]
    whole_items: list[list[float]]
    sentence: Sentence | UnsetType = UNSET
    sentences: Annotated[list[Sentence], Meta(min_length=1, max_length=MAX_SENTENCES)] | UnsetType = UNSET


def request_body(img_dim):
    """What OpenAPI calls requestBody, with features of img_dim values."""
    _, parts = msgspec.json.schema_components([Body])
    schema = parts["Body"]
    schema["properties"]["boxes"]["items"] = parts["Image"]
    schema["properties"]["whole_items"]["items"].update(minItems=img_dim, maxItems=img_dim)
    return {"required": True, "content": {"application/json": {"schema": schema}}}


decode_body = msgspec.json.Decoder(Body).decode


def parse(body):
    """bytes → Body. Raises Refused."""
    try:
        return decode_body(body.removeprefix(codecs.BOM_UTF8))
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        place = place.rstrip("`").lstrip(".")
        raise Refused(400, f"{place or 'body'}: {reason[:1].lower()}{reason[1:]}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"body: not JSON ({error})") from None


def floats(text, shape, field):
    """base64 of little-endian float32 → bytes of an array of that shape. Line breaks inside are skipped."""
    if "\n" in text:
        text = "".join(text.split())
    try:
        data = pybase64.b64decode(text, validate=True)
    except ValueError:
        raise Refused(400, f"{field}: not base64") from None
    expected = 4 * shape[0] * shape[1]
    if len(data) != expected:
        raise Refused(400, f"{field}: {len(data)} bytes, expected {expected}, float32 of {shape[0]} x {shape[1]}")
    return data


def check_features(features, field):
    """features (…, img_dim) of one image: finite, and small enough to calculate with."""
    if not max(features.max(), -features.min()) <= LARGEST:  # NaN is not <= anything either
        *place, _ = np.argwhere(~(np.abs(features) <= LARGEST))[0]
        where = f", region {place[0]}" if place else ""
        raise Refused(400, f"{field}{where}: NaN, infinite or beyond {LARGEST:g}, expected finite numbers")


def make_grids(boxes, sizes, indices):
    """Position grids (P, 36, 31) of boxes (P, 36, 4), x1, y1, x2, y2, in images of sizes (P, 2), height, width.

    indices: of the images in the request.
    """
    try:
        grids = position_grid(boxes, sizes)
    except BoxError as error:
        raise Refused(400, f"boxes[{indices[error.image]}].boxes: box {error.box} {error.reason}") from None
    outside = np.argwhere(grids[:, :, N_SLOTS] == 0)  # the weight of the cell that a box covers most
    if len(outside):
        i, box = outside[0]
        corners = boxes[i, box].tolist()
        raise Refused(400, f"boxes[{indices[i]}].boxes: box {box} {corners} has no area inside the image")
    for i, corners, size in zip(indices, boxes, sizes, strict=True):
        if are_shares(corners) and size.max() > SQUARE:
            found = f"none reaches beyond 1 in an image of {size[0]:g} x {size[1]:g}"
            raise Refused(400, f"boxes[{i}].boxes: {found}, expected pixels, not shares of its sides")
    return grids


# ---------------------------------------------------------------- jobs


@dataclass
class Job:
    """One checked request: the S sentences' word ids, the P images' keys, and what is not in the cache yet."""

    captions: list  # S tensors (W,) int64
    single: bool  # asked with `sentence`: scores are lists, with `sentences` lists of lists
    keys: list  # P bytes
    embeddings: dict  # key → (regions (36, D), whole (D,)), from the cache
    new: dict  # key → (features (36, img_dim), whole (img_dim,), grid (36, 31)), numpy


def bytes_of(embeddings):
    """Size of an image's cached embeddings."""
    return sum(x.nbytes for x in embeddings) + 500  # and what Python keeps beside


class Scorer:
    """A checkpoint with its vocabulary. read() may run in any number of threads, score() in one."""

    def __init__(self, model_path, vocab_path=None, cache_bytes=256 << 20, **overrides):
        checkpoint = load_checkpoint(model_path)
        opt = checkpoint["opt"]
        opt.vocab_path = vocab_path or opt.vocab_path
        self.vocab = checkpoint_vocab(model_path, checkpoint, opt, Vocabulary)
        self.model = load_model(model_path, len(self.vocab), SCAN, checkpoint, **overrides)
        self.img_dim = opt.img_dim
        with open(model_path, "rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        self.cache, self.cache_lock = LRUCache(cache_bytes, bytes_of), threading.Lock()

    def word_ids(self, sentence, field):
        ids = self.vocab.encode(caption(sentence, field))
        if len(ids) > MAX_WORDS + 2:
            raise Refused(400, f"{field}: {len(ids) - 2} words, expected at most {MAX_WORDS}")
        return torch.tensor(ids)

    def read(self, data):
        """The bytes of a request → Job. Raises Refused."""
        body = parse(data)
        single = body.sentence is not UNSET
        if single == (body.sentences is not UNSET):
            raise Refused(400, "sentence: beside sentences, expected one of the two" if single else "sentence: missing")
        sentences = {"sentence": body.sentence}
        if not single:
            sentences = {f"sentences[{i}]": sentence for i, sentence in enumerate(body.sentences)}
        if len(body.whole_items) != len(body.boxes):
            raise Refused(400, f"whole_items: {len(body.whole_items)}, but {len(body.boxes)} boxes")
        captions = [self.word_ids(sentence, field) for field, sentence in sentences.items()]
        return Job(captions, single, *self.read_images(body))

    def read_images(self, body):
        """The images of a Body → keys, embeddings, new, as Job has them. An image in the cache passed before."""
        keys, embeddings, new = [], {}, {}
        for i, (image, whole) in enumerate(zip(body.boxes, body.whole_items, strict=True)):
            if len(whole) != self.img_dim:
                raise Refused(400, f"whole_items[{i}]: {len(whole)} numbers, expected {self.img_dim}")
            boxes = floats(image.boxes, (N_REGIONS, 4), f"boxes[{i}].boxes")
            features = floats(image.features, (N_REGIONS, self.img_dim), f"boxes[{i}].features")
            with np.errstate(over="ignore"):  # beyond float32: infinite, which the check below finds
                whole = np.array(whole, np.float32)
            size = np.array([image.image_h, image.image_w])
            digest = hashlib.sha256(features)
            digest.update(boxes + whole.tobytes() + size.tobytes())
            keys.append(key := digest.digest())
            with self.cache_lock:
                entry = self.cache.get(key)
            if entry is not None:
                embeddings[key] = entry
            elif key not in new:
                features = np.frombuffer(features, "<f4").reshape(N_REGIONS, self.img_dim)
                check_features(features, f"boxes[{i}].features")
                check_features(whole, f"whole_items[{i}]")
                new[key] = i, features, whole, np.frombuffer(boxes, "<f4").reshape(N_REGIONS, 4), size
        if new:
            indices, features, wholes, boxes, sizes = zip(*new.values(), strict=True)
            grids = make_grids(np.stack(boxes), np.stack(sizes), indices)
            new = dict(zip(new, zip(features, wholes, grids, strict=True), strict=True))
        return keys, embeddings, new

    @torch.inference_mode()
    def score(self, jobs):
        """[{"sim_t2i", "sim_i2t"}] of jobs, encoded as one batch; each scored with its own images only."""
        known = {key: entry for job in jobs for key, entry in job.embeddings.items()}
        new = {key: x for job in jobs for key, x in job.new.items() if key not in known}
        known.update(self.encode(new))
        captions = [ids for job in jobs for ids in job.captions]
        lengths = [len(ids) for ids in captions]
        words, _, finals = self.model.encode_captions(pad(captions), lengths)
        results, start = [], 0
        for job in jobs:
            mine = slice(start, start + len(job.captions))
            start = mine.stop
            entries = [known[key] for key in job.keys]
            text = words[mine, : max(lengths[mine])], lengths[mine], finals[mine]
            results.append({f"sim_{way}": self.sims(entries, text, way, job.single) for way in ("t2i", "i2t")})
        return results

    def encode(self, new):
        """key → (features, whole, grid) of new images → key → (regions (36, D), whole (D,)), kept in the cache."""
        encoded, keys = {}, list(new)
        for at in range(0, len(keys), BLOCK_IMAGES):
            block = keys[at : at + BLOCK_IMAGES]
            columns = zip(*(new[key] for key in block), strict=True)
            embeddings = self.model.encode_images(*(torch.from_numpy(np.stack(column)) for column in columns))
            for key, *entry in zip(block, *embeddings, strict=True):
                encoded[key] = tuple(x.clone() for x in entry)  # a view would keep its whole batch in memory
                with self.cache_lock, suppress(ValueError):  # larger than the whole cache
                    self.cache[key] = encoded[key]
        return encoded

    def sims(self, entries, text, way, single):
        """Scores of the images' entries with words (S, W, D), lengths, finals (S, D): (P,) or (S, P), as lists."""
        blocks = [entries[at : at + BLOCK_IMAGES] for at in range(0, len(entries), BLOCK_IMAGES)]
        stacked = (map(torch.stack, zip(*block, strict=True)) for block in blocks)
        sims = torch.cat([self.model.score(*images, *text, cross_attn=way) for images in stacked]).T
        if not torch.isfinite(sims).all():
            raise Refused(400, "boxes: features that have no finite score with this model")
        return (sims[0] if single else sims).tolist()
