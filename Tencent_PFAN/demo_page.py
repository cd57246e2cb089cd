"""What the page at / asks for: the items of a tencent_data_meta folder, with their images, as requests to send."""

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
    """The items of folder/test_list.json. Images to look at are images/ID.png there, where that exists."""

    def __init__(self, folder):
        path = os.path.join(folder, "test_list.json")
        self.folder = folder
        self.sentences, self.tags = ([words for words, _ in read_words(path, kind)] for kind in ("sentence", "tag"))
        self.flags = read_flags(path)
        ids, rows, wholes = (os.path.join(folder, name) for name in FILES)
        self.images = Images(load_img_url_to_id(ids), process_tsv_file(rows, sys.maxsize), process_json_file(wholes))

    def listing(self):
        """[{"sentence", "tags", "images": how many}], the items in order."""
        columns = zip(self.sentences, self.tags, self.flags, strict=True)
        return [{"sentence": words, "tags": tags, "images": len(flags)} for words, tags, flags in columns]

    def item(self, number):
        """{"images": [{"url", "image_id", "correct"}], "boxes", "whole_items"}, the last two as a request has them."""
        if not 0 <= number < len(self.flags):
            raise Refused(404, f"item {number}: expected 0 to {len(self.flags) - 1}")
        shown = [(url, flag) for url, flag in self.flags[number] if not self.images.missing(url)]
        boxes, wholes = zip(*(self.images.read(url) for url, _ in shown), strict=True) if shown else ([], [])
        images = [{"url": url, "image_id": self.images.ids[url], "correct": flag == 1} for url, flag in shown]
        return {"images": images, "boxes": boxes, "whole_items": wholes}

    def image(self, number):
        path = os.path.join(self.folder, "images", f"{number}.png")
        if not os.path.isfile(path):
            raise Refused(404, f"no image {number}")
        return path


def add_demo(app, folder, dependencies):
    """Give app the addresses under /demo; folder: a tencent_data_meta one."""
    items = Items(folder)
    options = {"dependencies": dependencies, "include_in_schema": False}

    @app.get("/demo/items", **options)
    def listing():
        return items.listing()

    @app.get("/demo/items/{number}", **options)
    def item(number: int):
        return Answer(items.item(number))

    @app.get("/demo/images/{number}", **options)
    def image(number: int):
        return FileResponse(items.image(number))
