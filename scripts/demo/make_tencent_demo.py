"""Draw a small set of Chinese news items with images, in the published Tencent-News layout.

An item is an event in which three or four things were seen, one sentence and a few tags, all in words. Its positive
images show these things, each time arranged differently; the others come from other events. The images, their
regions and features are those of scripts/demo/make_demo_data.py: computed from pixels alone.

Under OUT: data/tencent_data and data/tencent_data_tag for training (one caption an image: a sentence, or tags),
and data/tencent_data_meta for test_server/test.py (regions, whole images, ids, test list, images/ID.png).

example: python scripts/demo/make_tencent_demo.py --out runs/tencent_demo
"""

import argparse
import base64
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.constants import N_REGIONS
from lib.errors import InputError, run
from lib.files import make_folder, read_lines, replace, write_lines
from position import position_grid
from scripts.demo.regions import IMG_DIM, propose, region_features
from scripts.demo.scenes import HEIGHT, WIDTH, make_group, one_of, render

COLOURS = {
    "red": ("红色", "大红"),
    "orange": ("橙色", "橘色"),
    "yellow": ("黄色", "金黄"),
    "green": ("绿色", "翠绿"),
    "turquoise": ("青色", "蓝绿"),
    "blue": ("蓝色", "天蓝"),
    "purple": ("紫色", "深紫"),
    "pink": ("粉色", "粉红"),
}
THINGS = {
    "circle": ("气球", "皮球"),
    "square": ("箱子", "包裹"),
    "triangle": ("帐篷", "三角旗"),
    "star": ("五角星", "星徽"),
    "cross": ("十字", "急救标"),
    "diamond": ("风筝", "菱形牌"),
    "ring": ("救生圈", "花环"),
    "heart": ("爱心", "心形灯"),
}
PLACES = "广场 街头 公园 机场 车站 学校 商场 海滩 体育馆 展览馆".split()
WHO = "记者 市民 游客 网友 居民 学生".split()
SAW = "发现 拍到 看到 围观 展示 目击".split()
OPENERS = ("今日 {place} {who} {saw}", "{who} 在 {place} {saw}", "{place} 新闻 : {who} {saw}", "快讯 : {place} {saw}")
URL = "http://news.example/images/{}.png"
CAPTION_KINDS = {"tencent_data": "sentence", "tencent_data_tag": "tags"}


def write_about(rng, scene):
    """{"sentence": [words], "tags": [words]} about the things in a scene, wherever in it they are."""
    things = [scene["objects"][i] for i in rng.permutation(len(scene["objects"]))]

    def name_things():
        return [[one_of(rng, COLOURS[o["colour"]]), one_of(rng, THINGS[o["kind"]])] for o in things]

    *others, last = name_things()
    words = one_of(rng, OPENERS).format(place=one_of(rng, PLACES), who=one_of(rng, WHO), saw=one_of(rng, SAW)).split()
    words += " 、 ".join(map(" ".join, others)).split() + ["和"] + last
    return {"sentence": words, "tags": sum(name_things(), [])}


def draw(rng, scene, widen):
    """Image (H, W, 3) uint8, boxes (36, 4), features (36, D), whole-image feature (D,) of a scene."""
    image, boxes = render(rng, scene), propose(rng, scene)
    everything = np.concatenate([boxes, [[0, 0, WIDTH, HEIGHT]]])
    features = np.maximum(region_features(image, everything) @ widen, 0).astype(np.float16)
    return image, boxes, features[:-1], features[-1]


def write_training(folders, split, n, rng, widen):
    """Arrays and captions of a split with n events of one image each, into both training folders."""
    made = []
    for _ in tqdm(range(n), desc=split, unit="image"):
        scene = make_group(rng, 1)[0]
        made.append((*draw(rng, scene, widen)[1:], write_about(rng, scene)))
    boxes, features, wholes, texts = zip(*made, strict=True)
    arrays = {"ims": features, "boxes": position_grid(boxes, np.tile([HEIGHT, WIDTH], (n, 1))), "who_ims": wholes}
    for folder, kind in folders.items():
        for name, array in arrays.items():
            replace(f"{folder}/{split}_{name}.npy", lambda file, array=array: np.save(file, np.stack(array)))
        write_lines(f"{folder}/{split}_sent_caps.txt", (" ".join(text[kind]) for text in texts))
        write_lines(f"{folder}/{split}_ids.txt", map(str, range(n)))


def write_test(folder, n_items, n_candidates, rng, widen):
    """n_items events, each with 2 to 4 positive images among n_candidates, in the published files."""
    make_folder(os.path.join(folder, "images"))
    events, owner, regions, wholes, ids = [], [], [], [], []
    for event in tqdm(range(n_items), desc="test", unit="item"):
        scenes = make_group(rng, int(rng.integers(2, 5)))
        events.append(write_about(rng, scenes[0]))
        for scene in scenes:
            number = len(owner)
            owner.append(event)
            image, boxes, features, whole = draw(rng, scene, widen)
            encoded = (base64.b64encode(x.astype("<f4").tobytes()).decode() for x in (boxes, features))
            regions.append("\t".join(map(str, (number, WIDTH, HEIGHT, N_REGIONS, *encoded))))
            wholes.append(json.dumps([URL.format(number), whole.astype(float).tolist()]))
            ids.append(f"{URL.format(number)}\t{number}")
            Image.fromarray(image).save(os.path.join(folder, "images", f"{number}.png"))
    owner, items = np.array(owner), []
    for event, text in enumerate(events):
        positive = np.flatnonzero(owner == event)
        others = rng.choice(np.flatnonzero(owner != event), n_candidates - len(positive), replace=False)
        candidates = rng.permutation(np.concatenate([positive, others]))
        item = {"Tag": text["tags"], "Content": text["sentence"], "Img_urls": [URL.format(i) for i in candidates]}
        item["Img_flags"] = (owner[candidates] == event).astype(int).tolist()
        items.append(json.dumps(item, ensure_ascii=False))
    files = {"test_own.tsv.0": regions, "test_features.json": wholes, "img_id.txt": ids, "test_list.json": items}
    for name, lines in files.items():
        write_lines(os.path.join(folder, name), lines)


def beside_chance(results, test_list):
    """Print MAP@1-3 and A@1-3 of outputs of compute_map.py, the files results, beside those of a random order.

    With m positives among an item's n images, the share of positives at each rank of a random order is m / n on
    average; so are its AP@k and A@k, for every k.
    """
    flags = [json.loads(line)["Img_flags"] for line in read_lines(test_list)]
    columns = {
        Path(path).stem: dict(line.split(": ", 1) for line in read_lines(path) if ": " in line) for path in results
    }
    print(" " * 8 + "".join(f"{name:>10}" for name in (*columns, "chance")))
    for measure, name in ("MAP", "MAP"), ("Acc", "A"):
        for k in (1, 2, 3):
            shares = [sum(item) / len(item) for item in flags if sum(item) >= k]
            values = [*(float(found[f"{measure}@{k}"].split()[0]) for found in columns.values()), np.mean(shares or 0)]
            print(f"{name}@{k}".ljust(8) + "".join(f"{x:10.3f}" for x in values))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default="runs/tencent_demo", help="folder to write (default: %(default)s)")
    add("--train", type=int, default=1000, help="images to train on (default: %(default)s)")
    add("--dev", type=int, default=128, help="images to choose the best epoch by (default: %(default)s)")
    add("--items", type=int, default=60, help="items to test with (default: %(default)s)")
    add("--candidates", type=int, default=10, help="images of an item (default: %(default)s)")
    add("--img_dim", type=int, default=2048, help="of a feature (default: %(default)s)")
    add("--seed", type=int, default=0, help="another one draws other images (default: %(default)s)")
    help_chance = "print outputs of compute_map.py beside chance, draw nothing"
    add("--beside_chance", metavar="RESULT", nargs="+", help=help_chance)
    opt = parser.parse_args()
    meta = os.path.join(opt.out, "data", "tencent_data_meta")
    if opt.beside_chance:
        return beside_chance(opt.beside_chance, os.path.join(meta, "test_list.json"))
    if min(opt.train, opt.dev, opt.img_dim) < 1 or opt.candidates < 4 or 2 * (opt.items - 1) < opt.candidates:
        raise InputError("expected --train, --dev, --img_dim of 1, --candidates of 4 and more, --items of half as many")
    rng = np.random.default_rng(opt.seed)
    widen = rng.standard_normal((IMG_DIM, opt.img_dim)).astype(np.float32) / np.sqrt(opt.img_dim / 2)
    folders = {os.path.join(opt.out, "data", name): kind for name, kind in CAPTION_KINDS.items()}
    for folder in folders:
        make_folder(folder)
    write_training(folders, "train", opt.train, rng, widen)
    write_training(folders, "dev", opt.dev, rng, widen)
    write_test(meta, opt.items, opt.candidates, rng, widen)


if __name__ == "__main__":
    run(main)
