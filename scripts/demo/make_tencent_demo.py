"""Draw a small set of Chinese news items with pictures, in the published Tencent-News layout.

An item is an event in which three or four things were seen, one sentence and a few tags, all in words. Its right
pictures show these things, each time arranged differently; the others come from other events. The pictures, their
regions and features are those of scripts/demo/make_demo_data.py: computed from pixels alone.

Under OUT: data/tencent_data and data/tencent_data_tag for training (one caption a picture: a sentence, or tags),
and data/tencent_data_meta for test_server/test.py (regions, whole images, ids, test list, images/ID.png).
"""

import argparse
import base64
import json
import os

import numpy as np
from PIL import Image
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401
from lib.constants import N_REGIONS
from lib.errors import InputError, run
from lib.files import read_lines
from position import position_grid
from scripts.demo.drawing import render
from scripts.demo.regions import IMG_DIM, propose, region_features
from scripts.demo.scenes import HEIGHT, WIDTH, make_group

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")

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
URL = "http://news.example/pictures/{}.png"
CAPTION_KINDS = {"tencent_data": "sentence", "tencent_data_tag": "tags"}


def pick(rng, options):
    return options[rng.integers(len(options))]


def write_about(rng, scene):
    """{"sentence": [words], "tags": [words]} about the things in a scene, wherever in it they are."""
    things = [scene["objects"][i] for i in rng.permutation(len(scene["objects"]))]
    named = [[pick(rng, COLOURS[o["colour"]]), pick(rng, THINGS[o["kind"]])] for o in things]
    words = pick(rng, OPENERS).format(place=pick(rng, PLACES), who=pick(rng, WHO), saw=pick(rng, SAW)).split()
    for i, name in enumerate(named):
        words += ["和"] * (0 < i == len(named) - 1) + ["、"] * (0 < i < len(named) - 1) + name
    tagged = [[pick(rng, COLOURS[o["colour"]]), pick(rng, THINGS[o["kind"]])] for o in things]
    return {"sentence": words, "tags": [word for name in tagged for word in name]}


def draw(rng, scene, widen):
    """Picture (H, W, 3) uint8, boxes (36, 4), features (36, D), whole-image feature (D,) of a scene."""
    picture = render(rng, scene)
    boxes = propose(rng, scene)
    everything = np.concatenate([boxes, [[0, 0, WIDTH, HEIGHT]]])
    features = np.maximum(region_features(picture, everything) @ widen, 0).astype(np.float16)
    return picture, boxes, features[:N_REGIONS], features[N_REGIONS]


def write_training(folders, split, n, rng, widen):
    """Arrays and captions of a split with n events of one picture each, into both training folders."""
    img_dim = widen.shape[1]
    features = np.empty((n, N_REGIONS, img_dim), np.float16)
    wholes, boxes, texts = np.empty((n, img_dim), np.float16), np.empty((n, N_REGIONS, 4)), []
    for i in tqdm(range(n), desc=split, unit="picture"):
        scene = make_group(rng, 1)[0]
        _, boxes[i], features[i], wholes[i] = draw(rng, scene, widen)
        texts.append(write_about(rng, scene))
    grids = position_grid(boxes, np.tile([HEIGHT, WIDTH], (n, 1)))
    first = None
    for folder, kind in folders.items():
        prefix = os.path.join(folder, split)
        for suffix, array in ("_ims.npy", features), ("_boxes.npy", grids), ("_who_ims.npy", wholes):
            if os.path.lexists(prefix + suffix):
                os.remove(prefix + suffix)  # a link would be written through
            if first:
                os.symlink(os.path.join("..", os.path.basename(first), split + suffix), prefix + suffix)
            else:
                np.save(prefix + suffix, array)
        first = first or folder
        with open(prefix + "_sent_caps.txt", "w", encoding="utf-8", newline="") as file:
            file.writelines(" ".join(text[kind]) + "\n" for text in texts)
        with open(prefix + "_ids.txt", "w") as file:
            file.writelines(f"{i}\n" for i in range(n))


def write_test(folder, n_items, n_candidates, rng, widen):
    """n_items events, each with 2 to 4 right pictures among n_candidates, in the published files."""
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    events, owner = [], []
    with (
        open(os.path.join(folder, "test_own.tsv.0"), "w") as regions,
        open(os.path.join(folder, "test_features.json"), "w") as wholes,
        open(os.path.join(folder, "img_id.txt"), "w") as ids,
    ):
        for event in tqdm(range(n_items), desc="test", unit="item"):
            scenes = make_group(rng, int(rng.integers(2, 5)))
            events.append(write_about(rng, scenes[0]))
            for scene in scenes:
                number = len(owner)
                owner.append(event)
                picture, boxes, features, whole = draw(rng, scene, widen)
                encoded = (base64.b64encode(x.astype("<f4").tobytes()).decode() for x in (boxes, features))
                print(number, WIDTH, HEIGHT, N_REGIONS, *encoded, sep="\t", file=regions)
                print(json.dumps([URL.format(number), whole.astype(float).tolist()]), file=wholes)
                print(URL.format(number), number, sep="\t", file=ids)
                Image.fromarray(picture).save(os.path.join(folder, "images", f"{number}.png"))
    owner = np.array(owner)
    with open(os.path.join(folder, "test_list.json"), "w", encoding="utf-8") as file:
        for event, text in enumerate(events):
            right = np.flatnonzero(owner == event)
            others = rng.choice(np.flatnonzero(owner != event), n_candidates - len(right), replace=False)
            candidates = rng.permutation(np.concatenate([right, others]))
            item = {"Tag": text["tags"], "Content": text["sentence"], "Img_urls": [URL.format(i) for i in candidates]}
            item["Img_flags"] = (owner[candidates] == event).astype(int).tolist()
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


def read_measures(path, n_items):
    """{"MAP@1": …, …} of an output of compute_map.py. Raises InputError for another file, or of another test list."""
    lines = read_lines(path)
    try:
        found = {name: float(rest.split()[0]) for name, rest in (line.split(": ", 1) for line in lines if ": " in line)}
        items = next(int(line.split()[1]) for line in lines if line.startswith("Len "))
        missing = {f"{measure}@{k}" for measure in ("MAP", "Acc") for k in (1, 2, 3)} - set(found)
    except (ValueError, IndexError, StopIteration):
        missing = True
    if missing:
        raise InputError(f"{path}: expected what compute_map.py prints")
    if items != n_items:
        raise InputError(f"{path}: measures of {items} items, expected {n_items}, those of the test list")
    return found


def beside_chance(results, test_list):
    """Print MAP@1-3 and A@1-3 of outputs of compute_map.py, the files results, beside those of a random order.

    With m right ones among an item's n pictures, the share of right ones at each rank of a random order is m / n on
    average; so are its AP@k and A@k, for every k.
    """
    with open(test_list, encoding="utf-8") as file:
        flags = [json.loads(line)["Img_flags"] for line in file]
    columns = {os.path.splitext(os.path.basename(path))[0]: read_measures(path, len(flags)) for path in results}
    print(" " * 8 + "".join(f"{name:>10}" for name in (*columns, "chance")))
    for measure, name in ("MAP", "MAP"), ("Acc", "A"):
        for k in (1, 2, 3):
            shares = [sum(item) / len(item) for item in flags if sum(item) >= k]
            values = [*(found[f"{measure}@{k}"] for found in columns.values()), sum(shares) / max(1, len(shares))]
            print(f"{name}@{k}".ljust(8) + "".join(f"{x:10.3f}" for x in values))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python scripts/demo/make_tencent_demo.py --out runs/tencent_demo",
    )
    add = parser.add_argument
    add("--out", default="runs/tencent_demo", help="folder to write (default: %(default)s)")
    add("--train", type=int, default=1000, help="pictures to train on (default: %(default)s)")
    add("--dev", type=int, default=128, help="pictures to choose the best epoch by (default: %(default)s)")
    add("--items", type=int, default=60, help="items to test with (default: %(default)s)")
    add("--candidates", type=int, default=10, help="pictures of an item (default: %(default)s)")
    add("--img_dim", type=int, default=2048, help="of a feature (default: %(default)s)")
    add("--seed", type=int, default=0, help="another one draws other pictures (default: %(default)s)")
    add(
        "--beside_chance",
        metavar="RESULT",
        nargs="+",
        help="print outputs of compute_map.py beside chance, draw nothing",
    )
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
        os.makedirs(folder, exist_ok=True)
    write_training(folders, "train", opt.train, rng, widen)
    write_training(folders, "dev", opt.dev, rng, widen)
    write_test(meta, opt.items, opt.candidates, rng, widen)


if __name__ == "__main__":
    run(main)
