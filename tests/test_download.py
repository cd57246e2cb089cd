"""download_data.sh against a local server: what arrives, what is refused, what a user is told."""

import io
import os
import shutil
import subprocess
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
from conftest import ROOT
from dataset_commands import call
from folders import boxes_with_features, write_lines

from scripts import download_data

SCRIPT = ROOT / "scripts/download_data.sh"
F30K = "1ZiF1IoeExPcn9V9L78X6jEYuMxR96OLO"
COCO = "1DaCZxeXOCm05u-Gf-_MG_zSNKO1UxBat"
TENCENT = "1WKq05mhSMc2u0SLtCWkUzgmqTLx95kXR"
MODELS = "1SA2J8-m6w6HvbXyDkOtjLcD7Tw4A9hPn"


class Drive(BaseHTTPRequestHandler):
    """Serves server.files[id] = (content type, bytes), with ranges; the first server.cuts answers break off midway."""

    def do_GET(self):
        query = parse_qs(urlparse(self.path).query)
        assert query["export"] == ["download"] and query["confirm"] == ["t"]
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if query["id"][0] not in self.server.files:
            return self.send_error(404)
        content_type, body = self.server.files[query["id"][0]]
        in_part = asked and content_type != "text/html"
        body = body[int(asked.removeprefix("bytes=").rstrip("-")) if in_part else 0 :]
        self.send_response(206 if in_part else 200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.server.cuts else body)
        self.server.cuts = max(0, self.server.cuts - 1)

    def log_message(self, *args):
        pass


@pytest.fixture
def drive():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Drive)
    server.files, server.ranges, server.cuts = {}, [], 0
    server.url = f"http://127.0.0.1:{server.server_port}/download"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def download(tmp_path, drive, monkeypatch):
    """Runs the command in tmp_path with a `kaggle` that is set up only if tmp_path/kaggle.zip exists."""
    commands = tmp_path / "bin"
    commands.mkdir()
    kaggle = commands / "kaggle"
    kaggle.write_text(f'#!/bin/sh\n[ -f {tmp_path}/kaggle.zip ] && cp {tmp_path}/kaggle.zip "$6/scan-features.zip"\n')
    kaggle.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)

    def run(*args, url=drive.url):
        monkeypatch.setenv("PFAN_DRIVE_URL", url)
        done = call(download_data.main, "download_data.py", *args)
        return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line]

    return run


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(members, mode="w:gz"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc"
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def boxes(prefix="", splits=("train", "dev", "test")):
    return {f"{prefix}{split}_boxes.npy": f"boxes of {split}".encode() for split in splits}


def test_zip_and_tar_gz_are_unpacked_into_place(tmp_path, drive, download):
    drive.files[F30K] = "application/zip", zipped(boxes("some/folder/") | {"some/README": b"hello"})
    drive.files[COCO] = "application/octet-stream", tarred(boxes("coco_precomp/") | {"testall_boxes.npy": b"extra"})
    status, out, errors = download("f30k", "coco")
    assert (status, errors) == (0, [])
    assert (tmp_path / "data/pfan/f30k_precomp/dev_boxes.npy").read_bytes() == b"boxes of dev"
    assert (tmp_path / "data/pfan/coco_precomp/testall_boxes.npy").read_bytes() == b"extra"
    assert "test_boxes.npy" in out and "3 missing: sh scripts/download_data.sh f30k scan" in out
    assert "some/README: left in" in out and (tmp_path / "data/downloads/f30k.unpacked/some/README").exists()
    assert not list(tmp_path.glob("data/downloads/*.part"))


def test_transfers_go_on_where_they_stopped_and_a_page_in_between_does_not_spoil_the_part(tmp_path, drive, download):
    body = zipped(boxes())
    drive.files[F30K] = "application/zip", body
    drive.cuts = 3
    status, _, errors = download("f30k")
    assert status == 2 and len(errors) == 1 and "broke off" in errors[0]
    part = tmp_path / "data/downloads/f30k.part"
    there = part.read_bytes()
    assert drive.ranges[:2] == [None, f"bytes={len(body) // 2}-"]
    assert len(body) // 2 < len(there) < len(body) and body.startswith(there)
    drive.files[F30K] = "text/html", b"<html>Quota exceeded</html>"
    status, _, errors = download("f30k")
    assert status == 2 and len(errors) == 1 and "web page" in errors[0]
    assert part.read_bytes() == there
    drive.files[F30K] = "application/zip", body
    assert download("f30k")[0] == 0
    assert drive.ranges[-1] == f"bytes={len(there)}-"


def test_a_page_instead_of_the_file_is_told_and_not_kept(tmp_path, drive, download):
    drive.files[F30K] = "application/octet-stream", b"\n <html>Log in"
    status, _, errors = download("f30k")
    assert status == 2 and len(errors) == 1
    assert "web page" in errors[0] and f"https://drive.google.com/file/d/{F30K}/view" in errors[0]
    assert list((tmp_path / "data/downloads").iterdir()) == []


@pytest.mark.parametrize(
    "pack, name, content",
    [
        (zipped, "../evil", b"evil"),
        (zipped, "..\\evil", b"evil"),
        (tarred, "/tmp/pfan_evil", b"evil"),
        (tarred, "../" + "x" * 5000, b"evil"),
        (tarred, "evil_link", None),
    ],
)
def test_members_outside_the_folder_and_links_are_refused(tmp_path, drive, download, pack, name, content):
    drive.files[F30K] = "application/zip", pack(boxes() | {name: content})
    status, _, errors = download("f30k")
    assert status == 2 and len(errors) == 1 and "refused" in errors[0] and len(errors[0]) < 400
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/pfan_evil").exists()
    assert not list(tmp_path.rglob("*.npy"))


def test_http_errors_and_a_server_that_is_down_name_the_way_by_hand(tmp_path, drive, download):
    drive.files[COCO] = "application/zip", zipped(boxes())
    status, _, errors = download("f30k", "coco")  # the second is fetched although the first fails
    assert status == 2 and len(errors) == 1 and "404" in errors[0] and F30K in errors[0]
    assert (tmp_path / "data/pfan/coco_precomp/train_boxes.npy").exists()
    status, _, errors = download("f30k", url="http://127.0.0.1:1/download")
    assert status == 2 and len(errors) == 1 and "Connection refused" in errors[0] and F30K in errors[0]


def test_neither_an_archive_saved_by_hand_nor_what_came_from_it_is_fetched(tmp_path, drive, download):
    (tmp_path / "data/downloads").mkdir(parents=True)
    (tmp_path / "data/downloads/f30k").write_bytes(zipped(boxes()))
    assert download("f30k")[0] == 0
    shutil.rmtree(tmp_path / "data/downloads")
    assert download("f30k")[0] == 0 and drive.ranges == []


@pytest.mark.parametrize(
    "body, told",
    [
        (
            zipped(boxes(splits=["train"])),
            "has no data/pfan/f30k_precomp/dev_boxes.npy, data/pfan/f30k_precomp/test_boxes.npy",
        ),
        (zipped(boxes("a/") | boxes("b/")), "has no data/pfan/f30k_precomp/train_boxes.npy"),
        (zipped(boxes())[:-30], "no whole zip or tar archive"),
        (zipped(boxes()).replace(b"boxes of dev", b"boxes of DEV"), "f30k: cannot be unpacked (Bad CRC"),
        (tarred({"train_boxes.npy": np.random.default_rng(0).bytes(10**5)})[:-30], "f30k: cannot be unpacked"),
    ],
)
def test_archives_without_the_files_are_named(drive, download, body, told):
    drive.files[F30K] = "application/zip", body
    status, _, errors = download("f30k")
    assert status == 2 and len(errors) == 1 and told in errors[0]


def test_scan_features_come_through_kaggle_or_by_hand(tmp_path, download):
    status, _, errors = download("scan")
    assert status == 2 and len(errors) == 1
    assert "https://www.kaggle.com/datasets/kuanghueilee/scan-features" in errors[0]
    members = {"vocab/f30k_precomp_vocab.json": b"{}"}
    for folder, splits in (("f30k_precomp", "train dev test"), ("coco_precomp", "train dev test testall")):
        for split in splits.split():
            members |= {f"data/{folder}/{split}_{kind}": b"x" for kind in ("ims.npy", "caps.txt")}
    (tmp_path / "kaggle.zip").write_bytes(zipped({"data.zip": zipped(members)}))
    status, out, errors = download("scan")
    assert (status, errors) == (0, [])
    assert "3 missing: sh scripts/download_data.sh f30k scan" in out
    assert (tmp_path / "data/coco_precomp/testall_ims.npy").exists()
    assert (tmp_path / "vocab/f30k_precomp_vocab.json").exists()


def test_checkpoints_in_a_tar_are_not_taken_for_archives(tmp_path, drive, download):
    checkpoint = zipped({"archive/data.pkl": b"x"})
    models = {f"runs/{name}_t2i.pth.tar": checkpoint for name in ("sentence", "tag")}
    drive.files[MODELS] = "application/x-tar", tarred(models, "w")
    assert download("models", "--model_path", "trained")[::2] == (0, [])
    assert (tmp_path / "trained/tag_t2i.pth.tar").read_bytes() == checkpoint


@pytest.mark.parametrize("captions", ["caps.txt", "sent_caps.txt"])
def test_captions_of_tencent_news_keep_either_name(tmp_path, drive, download, captions):
    kinds = ("ims.npy", "boxes.npy", "who_ims.npy", captions)
    members = {f"{split}_{kind}": b"x" for split in ("train", "dev") for kind in kinds}
    drive.files[TENCENT] = "application/zip", zipped(members)
    _, out, errors = download("tencent")
    assert len(errors) == 1 and "tencent_test: " in errors[0]  # whose archive is not there
    assert (tmp_path / f"data/tencent_data/train_{captions}").exists()


def test_without_items_nothing_is_fetched(drive, download):
    status, out, errors = download()
    assert (status, errors, drive.ranges) == (0, [], [])
    assert "sh scripts/download_data.sh f30k" in out and "Kaggle" in out
    done = subprocess.run(["sh", SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "example: python scripts/download_data.py f30k scan" in done.stdout
    status, _, errors = download("flickr")
    assert status == 2 and "flickr" in errors[0]


# ---------------------------------------------------------------- positions in the features' order


@pytest.fixture(scope="module")
def published():
    """{split: (grids (n, 36, 31), features (n, 36, 256), captions: n lists of five)} of images drawn by chance."""
    images = {}
    for seed, (split, n) in enumerate({"train": 14, "dev": 10, "test": 12}.items()):
        captions = [[f"A {split} image, number {i}, caption {j}." for j in range(5)] for i in range(n)]
        images[split] = *boxes_with_features(n, seed=seed), captions
    return images


def scan_data(folder, published):
    """SCAN's features and captions of Flickr30K under folder/data."""
    folder = folder / "data/f30k_precomp"
    folder.mkdir(parents=True)
    for split, (_, features, captions) in published.items():
        np.save(folder / f"{split}_ims.npy", features)
        write_lines(folder / f"{split}_caps.txt", sum(captions, []))


def positions(published, kinds, rows=slice(None, None, -1)):
    """PFAN's archive: positions, and what else is asked for, of these rows of the images, in their order."""
    members = {}
    for split, (grids, features, captions) in published.items():
        arrays = {"boxes.npy": io.BytesIO(), "ims.npy": io.BytesIO()}
        for file, array in zip(arrays.values(), (grids[..., :30], features), strict=True):
            np.save(file, array[rows])
        contents = {kind: file.getvalue() for kind, file in arrays.items()}
        contents["caps.txt"] = "".join(f"{line}\n" for five in captions[rows] for line in five).encode()
        members |= {f"positions/{split}_{kind}": contents[kind] for kind in kinds}
    return "application/zip", zipped(members)


@pytest.mark.parametrize("features_first", [True, False])
@pytest.mark.parametrize("kinds", [["boxes.npy", "caps.txt"], ["boxes.npy"], ["boxes.npy", "ims.npy", "caps.txt"]])
def test_positions_arrive_in_the_order_of_the_features(tmp_path, drive, download, published, kinds, features_first):
    drive.files[F30K] = positions(published, kinds)
    if not features_first:
        assert download("f30k")[0] == 0
        assert not (tmp_path / "data/f30k_precomp").exists()  # no boxes lie where features will
    scan_data(tmp_path, published)
    assert download("f30k")[::2] == (0, [])
    for split, (grids, _, _) in published.items():
        made = np.load(tmp_path / f"data/f30k_precomp/{split}_boxes.npy")
        np.testing.assert_array_equal(made, grids[..., :30])
    assert download("f30k")[::2] == (0, []) and len(drive.ranges) == 1  # all is in place


def test_an_image_without_positions_stops_the_alignment(tmp_path, drive, download, published):
    scan_data(tmp_path, published)
    drive.files[F30K] = positions(published, ["boxes.npy", "caps.txt"], slice(None, 0, -1))
    status, out, errors = download("f30k")
    assert status == 2 and len(errors) == 1 and "3 without a partner" in errors[0] and "not put beside" in errors[0]
    assert "train, image 0: without a partner" in out
    assert not list((tmp_path / "data/f30k_precomp").glob("*boxes*"))
    assert len(list((tmp_path / "data/pfan/f30k_precomp").glob("*_boxes.npy"))) == 3


def test_boxes_of_unknown_order_are_not_taken_for_aligned_ones(tmp_path, drive, download, published):
    scan_data(tmp_path, published)
    np.save(tmp_path / "data/f30k_precomp/train_boxes.npy", published["train"][0][::-1])
    drive.files[F30K] = positions(published, ["boxes.npy", "caps.txt"])
    status, _, errors = download("f30k")
    assert status == 2 and len(errors) == 1 and "train_boxes.npy: there already, and made otherwise" in errors[0]
