"""SCAN's and PFAN's public names: the published signatures, and that they do their work."""

import importlib
import inspect
import os
import signal

import pytest
import torch
from conftest import ROOT
from folders import random_batch
from torch.utils.data import DataLoader
from training import Place, WholePlace

import data
import evaluation
import model
import train
import vocab
from Tencent_PFAN import data_whole, evaluation_whole, model_whole, train_whole
from Tencent_PFAN import vocab as vocab_whole


def encoder_image_of_pfan(
    data_name, img_dim, embed_size, precomp_enc_type="basic", no_imgnorm=False, need_box_whole=False
):
    """Too long for a line of the tables below, whose functions only have signatures."""


COMMON_MODEL = {
    "l1norm": lambda X, dim, eps=1e-8: 0,
    "l2norm": lambda X, dim, eps=1e-8: 0,
    "EncoderImageWeightNormPrecomp": lambda img_dim, embed_size, no_imgnorm=False: 0,
    "EncoderText": lambda vocab_size, word_dim, embed_size, num_layers, use_bi_gru=False, no_txtnorm=False: 0,
    "func_attention": lambda query, context, opt, smooth, eps=1e-8: 0,
    "cosine_similarity": lambda x1, x2, dim=1, eps=1e-8: 0,
    "ContrastiveLoss": lambda opt, margin=0, max_violation=False: 0,
    "SCAN": lambda opt: 0,
    "SCAN.state_dict": lambda self: 0,
    "SCAN.load_state_dict": lambda self, state_dict: 0,
    "SCAN.train_start": lambda self: 0,
    "SCAN.val_start": lambda self: 0,
}
COMMON_DATA = {
    "PrecompDataset": lambda data_path, data_split, vocab: 0,
    "collate_fn": lambda data: 0,
    "get_precomp_loader": lambda data_path, data_split, vocab, opt, batch_size=100, shuffle=True, num_workers=2: 0,
    "get_loaders": lambda data_name, vocab, batch_size, workers, opt: 0,
    "get_test_loader": lambda split_name, data_name, vocab, batch_size, workers, opt: 0,
}
COMMON_EVALUATION = {
    "AverageMeter": lambda: 0,
    "AverageMeter.update": lambda self, val, n=0: 0,
    "LogCollector": lambda: 0,
    "LogCollector.update": lambda self, k, v, n=0: 0,
    "LogCollector.tb_log": lambda self, tb_logger, prefix="", step=None: 0,
    "encode_data": lambda model, data_loader, log_step=10, logging=print: 0,
    "evalrank": lambda model_path, data_path=None, split="dev", fold5=False, vocab_path=None, *, make_model, **more: 0,
    "softmax": lambda X, axis: 0,
}
COMMON_TRAIN = {
    "main": lambda: 0,
    "train": lambda opt, train_loader, model, epoch, val_loader: 0,
    "validate": lambda opt, val_loader, model: 0,
    "save_checkpoint": lambda state, is_best, filename="checkpoint.pth.tar", prefix="": 0,
    "adjust_learning_rate": lambda opt, optimizer, epoch: 0,
}
COMMON_VOCAB = {
    "Vocabulary": lambda: 0,
    "Vocabulary.add_word": lambda self, word: 0,
    "serialize_vocab": lambda vocab, dest: 0,
    "deserialize_vocab": lambda src: 0,
    "from_txt": lambda txt: 0,
    "build_vocab": lambda data_path, data_name, caption_file, threshold: 0,
    "main": lambda data_path, data_name: 0,
}
PUBLISHED = {
    model: {
        **COMMON_MODEL,
        "EncoderImage": lambda data_name, img_dim, embed_size, precomp_enc_type="basic", no_imgnorm=False: 0,
        "EncoderImagePrecomp": lambda img_dim, embed_size, no_imgnorm=False, split_size=16, position_embed_size=200: 0,
        "xattn_score_t2i": lambda images, captions, cap_lens, opt: 0,
        "xattn_score_i2t": lambda images, captions, cap_lens, opt: 0,
        "SCAN.forward_emb": lambda self, images, boxes, captions, lengths, volatile=False: 0,
        "SCAN.train_emb": lambda self, images, boxes, captions, lengths, ids=None, *args: 0,
    },
    model_whole: {
        **COMMON_MODEL,
        "EncoderImage": encoder_image_of_pfan,
        "EncoderImagePrecomp": lambda img_dim, embed_size, no_imgnorm=False, need_box_whole=False: 0,
        "xattn_score_t2i": lambda images, whole_images, captions, cap_lens, final_captions, opt: 0,
        "xattn_score_i2t": lambda images, whole_images, captions, cap_lens, final_captions, opt: 0,
        "SCAN.forward_emb": lambda self, images, whole_images, boxes, captions, lengths, volatile=False: 0,
        "SCAN.train_emb": lambda self, images, whole_images, boxes, captions, lengths, ids=None, *args: 0,
    },
    data: COMMON_DATA,
    data_whole: COMMON_DATA,
    evaluation: {
        **COMMON_EVALUATION,
        "shard_xattn_t2i": lambda images, captions, caplens, opt, shard_size=128: 0,
        "shard_xattn_i2t": lambda images, captions, caplens, opt, shard_size=128: 0,
        "i2t": lambda images, captions, caplens, sims, npts=None, return_ranks=False: 0,
        "t2i": lambda images, captions, caplens, sims, npts=None, return_ranks=False: 0,
    },
    evaluation_whole: {
        **COMMON_EVALUATION,
        "shard_xattn_t2i": lambda images, whole_images, captions, caplens, final_captions, opt, shard_size=128: 0,
        "shard_xattn_i2t": lambda images, whole_images, captions, caplens, final_captions, opt, shard_size=128: 0,
        "i2t": lambda images, captions, sims, npts=None, return_ranks=False: 0,
        "t2i": lambda images, captions, sims, npts=None, return_ranks=False: 0,
    },
    train: COMMON_TRAIN,
    train_whole: COMMON_TRAIN,
    vocab: COMMON_VOCAB,
    vocab_whole: COMMON_VOCAB,
}


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, names in PUBLISHED.items() for name in names],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_every_public_name_has_its_published_signature(module, name):
    """Ours may go on after it with defaults."""
    target = module
    for part in name.split("."):
        target = getattr(target, part)
    theirs = list(inspect.signature(PUBLISHED[module][name]).parameters.values())
    ours = list(inspect.signature(target).parameters.values())
    positional = [x for x in theirs if x.kind not in (x.KEYWORD_ONLY, x.VAR_KEYWORD, x.VAR_POSITIONAL)]
    assert [x.name for x in ours[: len(positional)]] == [x.name for x in positional]
    for mine, published in zip(ours, positional, strict=False):
        assert published.default in (mine.default, mine.empty), mine.name
    for more in ours[len(positional) :]:
        assert more.default is not more.empty or more.kind in (more.VAR_KEYWORD, more.VAR_POSITIONAL), more.name
    assert {x.name for x in theirs if x not in positional} <= {x.name for x in ours} | {"more"}


# ---------------------------------------------------------------- they do their work


@pytest.mark.parametrize("kind", ["basic", "weight_norm"])
def test_the_encoders_are_called_as_in_scan(kind):
    images, boxes, captions, lengths = random_batch()
    assert model.EncoderImage("f30k_precomp", 64, 32, kind)(images, boxes).shape == (3, 4, 32)
    assert model.EncoderImage("f30k_precomp", 64, 32, kind, position="none")(images).shape == (3, 4, 32)
    words, lens = model.EncoderText(50, 16, 32, 1, use_bi_gru=True)(captions, lengths)
    assert words.shape == (3, 6, 32) and lens == lengths
    images, whole_images, boxes, captions, lengths = random_batch(whole=True)
    regions, whole = model_whole.EncoderImage("tencent_data", 64, 32, kind)(images, whole_images, boxes)
    assert regions.shape == (3, 4, 32) and whole.shape == (3, 32)
    words, lens, sentences = model_whole.EncoderText(50, 16, 32, 1, use_bi_gru=True)(captions, lengths)
    assert words.shape == (3, 6, 32) and lens == lengths and sentences.shape == (3, 32)


@pytest.mark.parametrize("name", ["data", "data_whole"])
def test_get_precomp_loader_gives_the_batches_of_a_split_in_order_or_shuffled(name, tmp_path):
    module, place, words = (
        (data, Place(tmp_path), vocab) if name == "data" else (data_whole, WholePlace(tmp_path), vocab_whole)
    )
    folder, known = next((tmp_path / "data").iterdir()), words.deserialize_vocab(str(place.vocab_file))
    opt = place.trainer.get_parser().parse_args(place.line("run"))
    ordered, shuffled = (
        module.get_precomp_loader(str(folder), "dev", known, opt, 4, shuffle) for shuffle in (False, True)
    )
    ids = [[i for batch in loader for i in sorted(batch[-1])] for loader in (ordered, shuffled)]
    assert ids[0] == sorted(ids[1]) == list(range(len(ordered.dataset))) and ids[0] != ids[1]


class Pairs(torch.utils.data.Dataset):
    """A data set of one's own: items that collate_fn can batch, and nothing else."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        images, boxes, captions, (length,) = random_batch((6 - index % 3,), img_dim=16, seed=index)
        return images[0], boxes[0], captions[0, :length], index, index


def test_train_alone_trains_an_epoch_with_any_loader_and_validate_ranks(tmp_path, monkeypatch):
    """As SCAN's main calls them; without a run's signals, checkpoints and events."""
    place = Place(tmp_path)
    os.mkdir(tmp_path / "cwd")
    monkeypatch.chdir(tmp_path / "cwd")
    opt = train.get_parser().parse_args(place.line("run", "--val_step 3 --log_step 1"))
    known = vocab.deserialize_vocab(str(place.vocab_file))
    opt.vocab_size = 50
    val_loader = data.get_test_loader("dev", opt.data_name, known, 8, 0, opt)
    handlers, seen, validate = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)], [], train.validate
    monkeypatch.setattr(train, "validate", lambda *args: seen.append(validate(*args)) or seen[-1])
    scan, pairs = model.SCAN(opt), data.PrecompDataset(f"{place.data_path}/{opt.data_name}", "train", known)
    before = [parameter.clone() for parameter in scan.params]
    for loader in (
        DataLoader(pairs, 30, shuffle=True, collate_fn=data.collate_fn),
        DataLoader(Pairs(), 3, collate_fn=data.collate_fn),
    ):
        train.train(opt, loader, scan, 0, val_loader)
    assert scan.Eiters == 2 + 4 and len(seen) == 2, "after steps 3 and 6"
    assert not any(torch.equal(a, b) for a, b in zip(before, scan.params, strict=True))
    assert validate(opt, val_loader, scan) == seen[-1] and 0 <= seen[-1] <= 600
    assert handlers == [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    assert os.listdir() == [] and not (tmp_path / "run").exists()


def test_save_checkpoint_writes_a_file_and_the_best_ones_copy(tmp_path):
    os.mkdir(tmp_path / "runs")
    for is_best, names in ((False, ["checkpoint_3.pth.tar"]), (True, ["checkpoint_3.pth.tar", "model_best.pth.tar"])):
        train.save_checkpoint({"epoch": 3}, is_best, "checkpoint_3.pth.tar", prefix=f"{tmp_path}/runs/")
        assert sorted(os.listdir(tmp_path / "runs")) == names
        assert all(torch.load(tmp_path / "runs" / name) == {"epoch": 3} for name in names)


def test_public_functions_of_the_root_and_lib_have_type_hints():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("lib/[a-z]*.py"), *ROOT.glob("lib/datasets/[a-z]*.py")):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("_") and function.__module__ == module.__name__:
                missing = {*inspect.signature(function).parameters, "return"} - {*function.__annotations__}
                assert not missing, f"{module.__name__}.{name}"
