"""What the page at / asks for: the items of a tencent_data_meta folder, with their pictures, as requests to send."""

import os
import sys

from fastapi.responses import FileResponse

from lib.datasets.news import (
    FILES,
    Images,
    load_img_url_to_id,
    process_json_file,
    process_tsv_file,
    read_flags,
    read_words,
)
from lib.web import Answer, Refused


class Items:
    """The items of folder/test_list.json. Pictures to look at are images/ID.png there, where that exists."""

    def __init__(self, folder):
        path = os.path.join(folder, "test_list.json")
        self.folder = folder
        self.sentences, self.tags = ([words for words, _ in read_words(path, kind)] for kind in ("sentence", "tag"))
        self.flags = read_flags(path)
        ids, rows, wholes = (os.path.join(folder, name) for name in FILES)
        self.images = Images(load_img_url_to_id(ids), process_tsv_file(rows, sys.maxsize), process_json_file(wholes))

    def listing(self):
        """[{"sentence", "tags", "pictures": how many}], the items in order."""
        columns = zip(self.sentences, self.tags, self.flags, strict=True)
        return [{"sentence": words, "tags": tags, "pictures": len(flags)} for words, tags, flags in columns]

    def item(self, number):
        """{"pictures": [{"url", "image_id", "right"}], "boxes", "whole_items"}, the last two as a request has them."""
        if not 0 <= number < len(self.flags):
            raise Refused(404, f"item {number}: expected 0 to {len(self.flags) - 1}")
        shown = [(url, right) for url, right in self.flags[number] if not self.images.missing(url)]
        boxes, wholes = zip(*(self.images.read(url) for url, _ in shown), strict=True) if shown else ([], [])
        pictures = [{"url": url, "image_id": self.images.ids[url], "right": right == 1} for url, right in shown]
        return {"pictures": pictures, "boxes": boxes, "whole_items": wholes}

    def image(self, number):
        path = os.path.join(self.folder, "images", f"{number}.png")
        if not os.path.isfile(path):
            raise Refused(404, f"no picture {number}")
        return path


def add_demo(app, folder, dependencies):
    """Give app the addresses under /demo; folder: a tencent_data_meta one, or None."""
    items = Items(folder) if folder else None
    options = {"dependencies": dependencies, "include_in_schema": False}

    def present():
        if items is None:
            raise Refused(404, "the server runs without --demo_path")
        return items

    @app.get("/demo/items", **options)
    def listing():
        return items.listing() if items else []

    @app.get("/demo/items/{number}", **options)
    def item(number: int):
        return Answer(present().item(number))

    @app.get("/demo/images/{number}", **options)
    def image(number: int):
        return FileResponse(present().image(number))
