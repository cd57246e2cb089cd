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
MODELS = "1SA2J8-m6w6HvbXyDkOtjLcD7Tw4A9hPn"


class Drive(BaseHTTPRequestHandler):
    """Serves server.files[id] = (content type, bytes), with ranges; the first server.cuts answers break off midway."""

    def do_GET(self):
        query = parse_qs(urlparse(self.path).query)
        assert query["export"] == ["download"] and query["confirm"] == ["t"]
        self.server.ranges.append(self.headers.get("Range"))
        if query["id"][0] not in self.server.files:
            return self.send_error(404)
        content_type, body = self.server.files[query["id"][0]]
        start = 0
        if self.headers.get("Range") and content_type != "text/html":
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        body = body[start:]
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

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


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


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


def claiming(size, kind=tarfile.REGTYPE):
    """A tar of one member whose header says that it is so large."""
    info = tarfile.TarInfo("train_boxes.npy")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


BZ2 = tarred({"train_boxes.npy": np.random.default_rng(0).bytes(2_000_000)}, "w:bz2")


def boxes(prefix="", splits=("train", "dev", "test"), width=30):
    return {f"{prefix}{split}_boxes.npy": npy(np.zeros((3, 36, width), np.float32)) for split in splits}


def test_zip_and_tar_gz_are_unpacked_into_place(tmp_path, drive, download):
    drive.files[F30K] = "application/zip", zipped(boxes("some/folder/") | {"some/README": b"hello"})
    coco = boxes("coco_precomp/", ("train", "dev", "test", "testall"), 31)
    drive.files[COCO] = "application/octet-stream", tarred(coco)
    status, out, errors = download("f30k", "coco")
    assert (status, errors) == (0, [])
    assert np.load(tmp_path / "data/pfan/f30k_precomp/dev_boxes.npy").shape == (3, 36, 30)
    assert np.load(tmp_path / "data/pfan/coco_precomp/testall_boxes.npy").shape == (3, 36, 31)
    assert "3×36×31" in out and "missing" in out
    assert "some/README: left in" in out and (tmp_path / "data/downloads/f30k.unpacked/some/README").exists()
    assert not list(tmp_path.glob("data/downloads/*.part"))


def test_what_is_there_is_not_fetched_again_even_without_its_archive(tmp_path, drive, download):
    drive.files[F30K] = "application/zip", zipped(boxes())
    assert download("f30k", "--data_path", "elsewhere/")[0] == 0
    shutil.rmtree(tmp_path / "elsewhere/downloads")
    assert download("f30k", "--data_path=elsewhere")[0] == 0
    assert len(drive.ranges) == 1


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


@pytest.mark.parametrize(
    "content_type, page",
    [
        ("text/html; charset=utf-8", b"Too many users have viewed this"),
        ("application/octet-stream", b"\n <html>Log in"),
    ],
)
def test_a_page_instead_of_the_file_is_told_and_not_kept(tmp_path, drive, download, content_type, page):
    drive.files[F30K] = content_type, page
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
        (tarred, "evil_link", None),
    ],
)
def test_members_outside_the_folder_and_links_are_refused(tmp_path, drive, download, pack, name, content):
    drive.files[F30K] = "application/zip", pack(boxes() | {name: content})
    status, _, errors = download("f30k")
    assert status == 2 and len(errors) == 1 and "refused" in errors[0]
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/pfan_evil").exists()
    assert not list(tmp_path.rglob("*.npy"))


def test_http_errors_and_a_server_that_is_down_name_the_way_by_hand(tmp_path, drive, download):
    drive.files[COCO] = "application/zip", zipped(boxes(splits=("train", "dev", "test", "testall")))
    status, _, errors = download("f30k", "coco")  # the second is fetched although the first fails
    assert status == 2 and len(errors) == 1 and "404" in errors[0] and F30K in errors[0]
    assert (tmp_path / "data/pfan/coco_precomp/train_boxes.npy").exists()
    status, _, errors = download("f30k", url="http://127.0.0.1:1/download")
    assert status == 2 and len(errors) == 1 and "cannot reach" in errors[0] and F30K in errors[0]


def test_an_archive_saved_by_hand_is_used(tmp_path, drive, download):
    (tmp_path / "data/downloads").mkdir(parents=True)
    (tmp_path / "data/downloads/f30k").write_bytes(zipped(boxes()))
    assert download("f30k")[0] == 0 and drive.ranges == []


def test_faulty_arrays_are_named(drive, download):
    faulty = {
        "train_boxes.npy": (npy(np.zeros((3, 36, 30), np.float32))[:-4], "truncated or not an .npy array"),
        "dev_boxes.npy": (npy(np.zeros((3, 36, 4), np.float32)), "expected floats (n, 36, 30) or (n, 36, 31)"),
        "test_boxes.npy": (b"", "empty"),
    }
    drive.files[COCO] = "application/zip", zipped({name: content for name, (content, _) in faulty.items()})
    status, out, errors = download("coco")
    assert status == 2 and out.count("faulty") == 3
    for line, (name, (_, told)) in zip(errors, faulty.items(), strict=True):
        assert f"/{name}" in line and told in line


@pytest.mark.parametrize(
    "body, told",
    [
        (zipped(boxes(splits=["train"])), "has no pfan/f30k_precomp/dev_boxes.npy, pfan/f30k_precomp/test_boxes.npy"),
        (zipped(boxes("a/") | boxes("b/")), "has no pfan/f30k_precomp/train_boxes.npy"),
        (zipped(boxes())[:-30], "no whole zip or tar archive"),
        (zipped(boxes())[:100] + b"x" * 400 + zipped(boxes())[500:], "f30k: cannot be unpacked"),
        (BZ2[:-30], "f30k: cannot be unpacked"),
        (BZ2[:-300_000] + bytes(300_000), "f30k: cannot be unpacked (Invalid data stream)"),
        (claiming(1 << 70), "f30k: cannot be unpacked"),
        (claiming(-(1 << 70)), "f30k: cannot be unpacked"),
        (claiming(1 << 50, tarfile.XHDTYPE), "f30k: cannot be unpacked"),
        (tarred({"../" + "x" * 5000: b""}), "refused: its member '../xxx"),
    ],
)
def test_archives_without_the_files_are_named(drive, download, body, told):
    drive.files[F30K] = "application/zip", body
    status, _, errors = download("f30k")
    assert status == 2 and len(errors) == 1 and told in errors[0] and len(errors[0]) < 400


def test_scan_features_come_through_kaggle_or_by_hand(tmp_path, download):
    status, _, errors = download("scan")
    assert status == 2 and len(errors) == 1
    assert "https://www.kaggle.com/datasets/kuanghueilee/scan-features" in errors[0]
    members = {"vocab/f30k_precomp_vocab.json": b"{}"}
    for folder, splits in (("f30k_precomp", "train dev test"), ("coco_precomp", "train dev test testall")):
        for split in splits.split():
            members[f"data/{folder}/{split}_ims.npy"] = npy(np.zeros((1, 36, 2048), np.float32))
            members[f"data/{folder}/{split}_caps.txt"] = "one\ntwo\u0085\n3".encode()
    (tmp_path / "kaggle.zip").write_bytes(zipped({"data.zip": zipped(members)}))
    status, out, errors = download("scan")
    assert (status, errors) == (0, [])
    assert "1×36×2048" in out and "3 lines" in out and "3 missing: sh scripts/download_data.sh f30k scan" in out
    assert (tmp_path / "data/coco_precomp/testall_ims.npy").exists()
    assert (tmp_path / "vocab/f30k_precomp_vocab.json").exists()


def test_checkpoints_in_a_tar_are_not_taken_for_archives(tmp_path, drive, download):
    checkpoint = zipped({"archive/data.pkl": b"x"})
    models = {f"runs/{name}_t2i.pth.tar": checkpoint for name in ("sentence", "tag")}
    drive.files[MODELS] = "application/x-tar", tarred(models, "w")
    assert download("models", "--model_path", "trained")[::2] == (0, [])
    assert (tmp_path / "trained/tag_t2i.pth.tar").read_bytes() == checkpoint


def test_without_items_nothing_is_fetched(drive, download):
    status, out, errors = download()
    assert (status, errors, drive.ranges) == (0, [], [])
    assert "sh scripts/download_data.sh f30k" in out and "Kaggle" in out
    done = subprocess.run(["sh", SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "example: python scripts/download_data.py f30k scan" in done.stdout
    status, _, errors = download("flickr")
    assert status == 2 and "flickr" in errors[0]


# ---------------------------------------------------------------- positions in the features' order

N = {"train": 14, "dev": 10, "test": 12}


@pytest.fixture(scope="module")
def published():
    """{split: (grids (n, 36, 31), features (n, 36, 2048), captions: n lists of five)} of images drawn by chance."""
    images = {}
    for seed, (split, n) in enumerate(N.items()):
        captions = [[f"A {split} image, number {i}, caption {j}." for j in range(5)] for i in range(n)]
        images[split] = *boxes_with_features(n, img_dim=2048, seed=seed), captions
    return images


def scan_data(folder, published):
    """SCAN's features and captions of Flickr30K and MS-COCO under folder/data."""
    for name in ("f30k_precomp", "coco_precomp"):
        (folder / "data" / name).mkdir(parents=True)
        for split, (_, features, captions) in published.items():
            np.save(folder / f"data/{name}/{split}_ims.npy", features)
            write_lines(folder / f"data/{name}/{split}_caps.txt", sum(captions, []))
    for kind in ("ims.npy", "caps.txt"):
        shutil.copy(folder / f"data/coco_precomp/test_{kind}", folder / f"data/coco_precomp/testall_{kind}")


def positions(published, kinds, rows=slice(None, None, -1)):
    """Members of PFAN's archive: positions, and what else is asked for, of these rows of the images, in their order."""
    members = {}
    for split, (grids, features, captions) in published.items():
        lines = "".join(f"{line}\n" for five in captions[rows] for line in five)
        contents = {"boxes.npy": npy(grids[rows, :, :30]), "ims.npy": npy(features[rows]), "caps.txt": lines.encode()}
        members |= {f"positions/{split}_{kind}": contents[kind] for kind in kinds}
    return members


@pytest.mark.parametrize("kinds", [["boxes.npy", "caps.txt"], ["boxes.npy"], ["boxes.npy", "ims.npy", "caps.txt"]])
def test_positions_arrive_in_the_order_of_the_features(tmp_path, drive, download, published, kinds):
    scan_data(tmp_path, published)
    drive.files[COCO] = "application/zip", zipped(positions(published, kinds))
    assert download("coco")[::2] == (0, [])
    for split, (grids, _, _) in published.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"data/coco_precomp/{split}_boxes.npy"), grids[..., :30])
        assert len(np.load(tmp_path / f"data/pfan/coco_precomp/{split}_boxes.npy")) == len(grids)
    assert not (tmp_path / "data/coco_precomp/testall_boxes.npy").exists()
    assert download("coco")[::2] == (0, []) and len(drive.ranges) == 1  # all is in place


def test_features_that_come_later_get_their_positions(tmp_path, drive, download, published):
    drive.files[F30K] = "application/zip", zipped(positions(published, ["boxes.npy", "caps.txt"]))
    assert download("f30k")[0] == 0
    assert not (tmp_path / "data/f30k_precomp").exists()  # no boxes lie where features will
    scan_data(tmp_path, published)
    assert download("f30k")[::2] == (0, [])
    for split, (grids, _, _) in published.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"data/f30k_precomp/{split}_boxes.npy"), grids[..., :30])


def test_an_image_without_positions_stops_the_alignment(tmp_path, drive, download, published):
    scan_data(tmp_path, published)
    members = positions(published, ["boxes.npy", "caps.txt"], slice(None, 0, -1))
    drive.files[F30K] = "application/zip", zipped(members)
    status, out, errors = download("f30k")
    assert status == 2 and len(errors) == 1 and "3 without a partner" in errors[0] and "not put beside" in errors[0]
    assert "train, image 0: without a partner" in out
    assert not list((tmp_path / "data/f30k_precomp").glob("*boxes*"))
    assert len(list((tmp_path / "data/pfan/f30k_precomp").glob("*_boxes.npy"))) == 3


def test_boxes_of_unknown_order_are_not_taken_for_aligned_ones(tmp_path, drive, download, published):
    scan_data(tmp_path, published)
    np.save(tmp_path / "data/f30k_precomp/train_boxes.npy", published["train"][0][::-1])
    drive.files[F30K] = "application/zip", zipped(positions(published, ["boxes.npy", "caps.txt"]))
    status, _, errors = download("f30k")
    assert status == 2 and len(errors) == 1 and "train_boxes.npy: there already, and made otherwise" in errors[0]
