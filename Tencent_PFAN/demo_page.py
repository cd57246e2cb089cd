"""What the page at / asks for: the items of a tencent_data_meta folder, with their images, as requests to send."""

import os
import sys

from fastapi.responses import FileResponse

from lib.datasets import news
from lib.web import Answer, Refused


def add_demo(app, folder, dependencies):
    """Give app the addresses under /demo: the items of folder/test_list.json, and folder/images/ID.png."""
    path = os.path.join(folder, "test_list.json")
    items, tags, flags = news.read_words(path, "sentence"), news.read_words(path, "tag"), news.read_flags(path)
    ids, rows, wholes = (os.path.join(folder, name) for name in news.FILES)
    images = news.Images(
        news.load_img_url_to_id(ids), news.process_tsv_file(rows, sys.maxsize), news.process_json_file(wholes)
    )
    options = {"dependencies": dependencies, "include_in_schema": False}

    @app.get("/demo/items", **options)
    def listing():
        """[{"sentence", "tags", "images": how many}], the items in order."""
        pairs = zip(items, tags, strict=True)
        return [{"sentence": words, "tags": tag, "images": len(urls)} for (words, urls), (tag, _) in pairs]

    @app.get("/demo/items/{number}", **options)
    def item(number: int):
        """{"images": [{"url", "image_id", "correct"}], "boxes", "whole_items"}, the last two as a request has them."""
        if not 0 <= number < len(flags):
            raise Refused(404, f"item {number}: expected 0 to {len(flags) - 1}")
        shown = [(url, flag) for url, flag in flags[number] if not images.missing(url)]
        boxes, whole_items = zip(*(images.read(url) for url, _ in shown), strict=True) if shown else ([], [])
        described = [{"url": url, "image_id": images.ids[url], "correct": flag == 1} for url, flag in shown]
        return Answer({"images": described, "boxes": boxes, "whole_items": whole_items})

    @app.get("/demo/images/{number}", **options)
    def image(number: int):
        path = os.path.join(folder, "images", f"{number}.png")
        if not os.path.isfile(path):
            raise Refused(404, f"no image {number}")
        return FileResponse(path)
