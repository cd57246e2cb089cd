"""Data folders → batches: every layout of files that people bring, and batches that do not depend on the workers."""

import os
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import make_folder, random_captions, write_lines

from data import PrecompDataset, collate_fn, get_loaders, get_test_loader
from lib.errors import InputError
from vocab import deserialize_vocab

NAME = "toy_precomp"


class Toy:
    """A folder of make_folder with its vocabulary and options."""

    def __init__(self, root, **options):
        self.data_path, vocab_path = make_folder(str(root), **options)
        self.folder = Path(self.data_path) / NAME
        self.vocab = deserialize_vocab(f"{vocab_path}/{NAME}_vocab.json")
        self.opt = Namespace(data_path=self.data_path, img_dim=16)

    def dataset(self, split="test", **more):
        return PrecompDataset(str(self.folder), split, self.vocab, **more)

    def load(self, name):
        return np.load(self.folder / f"{name}.npy")

    def save(self, name, array):
        np.save(self.folder / f"{name}.npy", array)

    def captions(self, split, n):
        captions = random_captions(np.random.default_rng(n), n)
        write_lines(self.folder / f"{split}_caps.txt", captions)
        return captions


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


def loaders(toy, workers=0, batch_size=8, **flags):
    return get_loaders(NAME, toy.vocab, batch_size, workers, Namespace(**{**vars(toy.opt), **flags}))


def assert_same_batches(these, those):
    assert len(these) == len(those)
    for batch, other in zip(these, those, strict=True):
        for a, b in zip(batch, other, strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_an_item_is_an_image_its_boxes_and_one_of_its_captions(toy):
    dataset = toy.dataset()
    assert (len(dataset), dataset.n_images, dataset.im_div) == (30, 6, 5)
    image, box, target, index, img_id = dataset[13]
    assert (index, img_id) == (13, 2)
    np.testing.assert_array_equal(image, toy.load("test_ims")[2])
    np.testing.assert_array_equal(box, toy.load("test_boxes")[2])
    assert image.dtype == box.dtype == torch.float32 and target.dtype == torch.int64
    assert target.tolist() == toy.vocab.encode(dataset.captions[13])
    assert toy.vocab.idx2word[int(target[0])] == "<start>" and toy.vocab.idx2word[int(target[-1])] == "<end>"


@pytest.mark.parametrize(("width", "n_regions"), [(30, 36), (31, 36), (31, 10)])
def test_both_published_box_widths_and_any_number_of_regions_are_read(tmp_path, width, n_regions):
    images, boxes, *_ = next(iter(loaders(Toy(tmp_path, box_width=width, n_regions=n_regions))[1]))
    assert images.shape == (8, n_regions, 16) and boxes.shape == (8, n_regions, width)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i2"])
def test_features_of_any_number_type_are_read_and_float16_stays_what_it_is(toy, dtype, workers):
    """Half as many bytes travel to the device; the model computes in float32 from there."""
    ims, boxes = (toy.load("dev_ims") * 10).astype(dtype), toy.load("dev_boxes").astype(np.float64)
    toy.save("dev_ims", ims)
    toy.save("dev_boxes", boxes)
    images, grids, *_, ids = next(iter(loaders(toy, workers)[1]))
    assert images.dtype == (torch.float16 if dtype == "f2" else torch.float32) and grids.dtype == torch.float32
    assert images.is_shared() == (workers > 0)
    np.testing.assert_array_equal(images, ims[np.array(ids) // 5])
    np.testing.assert_array_equal(grids, boxes.astype(np.float32)[np.array(ids) // 5])


def test_a_process_tokenises_a_caption_once(toy):
    train, _ = loaders(toy)
    first = list(train)
    train.dataset.vocab.tokenize = lambda caption: pytest.fail("again")
    assert_same_batches(first, list(train))


@pytest.mark.parametrize("captions_per_image", [1, 2, 5, 7])
def test_captions_per_image_come_from_the_counts(tmp_path, captions_per_image):
    dataset = Toy(tmp_path, captions_per_image=captions_per_image).dataset()
    assert (len(dataset), dataset.n_images, dataset.im_div) == (6 * captions_per_image, 6, captions_per_image)
    assert [dataset[i][4] for i in range(len(dataset))] == [i // captions_per_image for i in range(len(dataset))]


@pytest.mark.parametrize("box_rows_repeat_too", [True, False])
def test_files_that_repeat_every_image_for_each_caption_hold_fewer_images(toy, box_rows_repeat_too):
    once = [toy.dataset()[i] for i in range(30)]
    toy.save("test_ims", toy.load("test_ims").repeat(5, axis=0))
    if box_rows_repeat_too:
        toy.save("test_boxes", toy.load("test_boxes").repeat(5, axis=0))
    dataset = toy.dataset()
    assert (len(dataset), dataset.n_images, dataset.im_div, dataset.repeats) == (30, 6, 5, 5)
    for item, other in zip(once, (dataset[i] for i in range(30)), strict=True):
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(item, other, strict=True))
    images, boxes = dataset.features([2, 3])
    assert images.shape[0] == boxes.shape[0] == 2
    assert torch.equal(images[1], once[15][0])


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        ((4, 6, 5, 5, 5, 5), "rows 0 to 3 are one image and rows 4 to 9 another, 4 and 6 times"),
        ((5, 5, 4, 5, 6, 5), "rows 5 to 9 are one image and rows 10 to 13 another, 5 and 4 times"),
        ((5, 10, 5, 10), "rows 0 to 4 are one image and rows 5 to 14 another, 5 and 10 times"),
    ],
)
def test_features_that_repeat_their_images_unequally_often_are_refused_with_the_rows(toy, counts, named):
    toy.save("test_ims", toy.load("test_ims")[: len(counts)].repeat(counts, axis=0))
    with pytest.raises(InputError, match=f"test_ims.npy: {named}"):
        toy.dataset()


def test_captions_of_other_words_than_the_vocabularys_are_warned_of(toy, caplog):
    toy.dataset()
    assert not caplog.text
    write_lines(toy.folder / "test_caps.txt", ["ein Mann läuft im Gras"] * 29 + ["a man"])
    toy.dataset()
    assert "test_caps.txt: 99 % of the words are not in the vocabulary" in caplog.text


def test_a_split_without_captions_has_images_only_where_that_is_asked_for(toy):
    (toy.folder / "test_caps.txt").unlink()
    with pytest.raises(InputError, match="test_caps.txt: no such file"):
        toy.dataset()
    dataset = toy.dataset(captions_optional=True)
    assert (len(dataset), dataset.n_images, dataset.captions) == (0, 6, [])
    np.testing.assert_array_equal(dataset.features([2, 3])[0], toy.load("test_ims")[2:4])
    loader = get_test_loader("test", NAME, toy.vocab, 8, 0, toy.opt, captions_optional=True)
    assert loader.dataset.n_images == 6
    write_lines(toy.folder / "test_caps.txt", ["a man"] * 30)
    assert len(toy.dataset(captions_optional=True)) == 30


def test_ids_are_one_an_image_whether_the_file_repeats_them_or_not(toy):
    assert toy.dataset().read_ids() == list("012345")
    write_lines(toy.folder / "test_ids.txt", [f"{i}.jpg" for i in range(6) for _ in range(5)])
    assert toy.dataset().read_ids() == [f"{i}.jpg" for i in range(6)]
    write_lines(toy.folder / "test_ids.txt", range(7))
    with pytest.raises(InputError, match="test_ids.txt: 7 ids for 6 images"):
        toy.dataset().read_ids()
    (toy.folder / "test_ids.txt").unlink()
    assert toy.dataset().read_ids() is None


def test_two_equal_images_side_by_side_lengthen_no_others_run(toy):
    ims = toy.load("test_ims")
    ims[3] = ims[2]
    toy.save("test_ims", ims.repeat(5, axis=0))
    dataset = toy.dataset()
    assert (dataset.n_images, dataset.im_div) == (6, 5)


def test_images_that_differ_in_any_one_value_are_different_images(toy):
    """Sparse features: the value that tells two images apart may stand anywhere."""
    toy.captions("test", 6)
    for region, value in ((0, 0), (0, 1), (1, 0), (35, 15), (17, 9)):
        ims = np.zeros((6, 36, 16), np.float32)
        ims[:, 0, 0] = np.arange(6) // 2 * 2
        ims[1::2, region, value] += 1  # the images of a pair are told apart by this alone
        toy.save("test_ims", ims)
        assert toy.dataset().n_images == 6, f"region {region}, value {value}"


def test_more_images_than_captions_give_each_caption_several_images(toy):
    captions = toy.captions("test", 2)
    dataset = toy.dataset()
    assert (len(dataset), dataset.n_images, len(dataset.captions)) == (6, 6, 2)
    for i in range(6):
        image, _, target, index, img_id = dataset[i]
        assert (index, img_id) == (i, i)
        np.testing.assert_array_equal(image, toy.load("test_ims")[i])
        assert target.tolist() == toy.vocab.encode(captions[i // 3])


@pytest.mark.parametrize("n", [4, 31])
def test_counts_that_do_not_divide_are_refused(toy, n):
    toy.captions("test", n)
    with pytest.raises(InputError, match=f"test: 6 images in _ims.npy and {n} captions"):
        toy.dataset()


def test_a_batch_is_sorted_by_length_and_its_ids_lead_back(toy):
    dataset = toy.dataset()
    order = [3, 29, 0, 17, 8]
    images, boxes, targets, lengths, ids = collate_fn([dataset[i] for i in order])
    assert images.shape == (5, 36, 16) and boxes.shape == (5, 36, 31)
    assert lengths == sorted(lengths, reverse=True) and targets.shape == (5, lengths[0])
    assert sorted(ids) == sorted(order)
    for row, index in enumerate(ids):
        image, box, target, *_ = dataset[index]
        assert torch.equal(images[row], image) and torch.equal(boxes[row], box)
        assert torch.equal(targets[row, : lengths[row]], target)
        assert not targets[row, lengths[row] :].any()


def test_features_stay_on_disk(toy):
    """Real files take 33 GB: they are mapped, and a copy sent to a worker takes along neither features nor boxes."""
    toy.save("test_ims", np.random.default_rng(0).standard_normal((6, 36, 512), dtype=np.float32))
    dataset = toy.dataset()
    assert isinstance(dataset.images, np.memmap) and isinstance(dataset.boxes, np.memmap)
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000 < dataset.images.nbytes
    copy = pickle.loads(sent)  # noqa: S301
    assert isinstance(copy.images, np.memmap)
    assert torch.equal(copy[7][0], dataset[7][0]) and torch.equal(copy[7][1], dataset[7][1])
    assert dataset.images is not None, "pickling must leave the data set usable"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to read ahead")
@pytest.mark.parametrize("repeats", [1, 5])
def test_the_rows_of_a_batch_are_asked_for_before_the_first_is_read(toy, repeats, monkeypatch):
    """Rows in any order come from a disk several times as fast where it may read them at once."""
    images = toy.load("train_ims")
    toy.save("train_ims", images.repeat(repeats, 0))
    asked, dataset = [], toy.dataset("train")
    first, size = dataset.images.offset, images[0].nbytes
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *more: asked.append(more))
    monkeypatch.setattr(PrecompDataset, "__getitem__", lambda self, index: asked.append(index))
    dataset.__getitems__([57, 3])
    asked_for = [(first + row * repeats * size, size, os.POSIX_FADV_WILLNEED) for row in (11, 0)]
    assert asked == [*asked_for, 57, 3]


def test_the_order_of_training_depends_on_seed_and_epoch_alone(toy):
    def order(seed, epoch):
        train, _ = loaders(toy, seed=seed)
        train.batch_sampler.epoch = epoch
        return [i for batch in train for i in batch[-1]]

    assert sorted(order(0, 0)) == list(range(60))
    assert order(0, 0) == order(0, 0) != list(range(60))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_more_than_5000_dev_captions_are_all_used(tmp_path):
    splits = {"train": 2, "dev": 1010, "test": 2}
    dev = loaders(Toy(tmp_path, splits=splits, n_regions=1, img_dim=16))[1]
    assert len(dev.dataset) == 5050 and dev.dataset.n_images == 1010


def test_without_position_no_boxes_are_needed(toy):
    for split in ("train", "dev"):
        (toy.folder / f"{split}_boxes.npy").unlink()
    with pytest.raises(InputError, match="train_boxes.npy: no such file"):
        loaders(toy)
    images, boxes, *_ = next(iter(loaders(toy, position="none")[0]))
    assert images.shape == (8, 36, 16) and boxes.shape == (8, 36, 0)
    for position in ("attention", "area"):
        with pytest.raises(InputError, match="train_boxes.npy: no such file"):
            loaders(toy, position=position)
