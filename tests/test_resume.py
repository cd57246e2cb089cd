"""Runs that build on a checkpoint: its words, --resume with what does not fit it, --init_from."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from folders import make_folder, write_lines
from processes import started
from training import NAME, Place, change, load, metrics

from evaluation import evalrank
from lib.checkpoint import load_checkpoint
from lib.errors import InputError
from vocab import deserialize_vocab, word_list


def swap_words(path, first="dog", second="red"):
    """A vocabulary file of the same size, in which two words have each other's id."""
    stored = json.loads(path.read_text())
    ids = stored["word2idx"]
    ids[first], ids[second] = ids[second], ids[first]
    path.write_text(json.dumps({**stored, "word2idx": ids}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    Place(root).fit("first")
    return root


@pytest.fixture
def place(trained, tmp_path):
    """A copy of the data set and of the run `first`, whose checkpoint's options lead to the copy."""
    shutil.copytree(trained, tmp_path / "place")
    place = Place(tmp_path / "place")
    place.checkpoint = place.root / "first" / "checkpoint_0.pth.tar"
    opt = torch.load(place.checkpoint, weights_only=False)["opt"]
    opt.data_path, opt.vocab_path = place.data_path, place.vocab_path
    change(place.checkpoint, opt=opt)
    return place


# ---------------------------------------------------------------- words


def test_a_checkpoint_carries_its_words_and_needs_no_vocabulary_file(place):
    words = word_list(deserialize_vocab(str(place.vocab_file)))
    assert load_checkpoint(str(place.checkpoint))["words"] == words
    expected = evalrank(str(place.checkpoint), split="dev")
    straight = place.fit("straight", f"--num_epochs 2 --resume {place.checkpoint}")
    place.vocab_file.unlink()
    assert evalrank(str(place.checkpoint), split="dev") == expected
    resumed = place.fit("resumed", f"--num_epochs 2 --resume {place.checkpoint}")
    states = [load_checkpoint(str(run / "checkpoint_1.pth.tar"))["model"][1] for run in (straight, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_another_vocabulary_of_the_same_size_is_refused_with_both_names_and_the_word(place):
    swap_words(place.vocab_file)
    ids = deserialize_vocab(str(place.vocab_file)).word2idx
    first = min(ids["dog"], ids["red"])
    for use in (
        lambda: evalrank(str(place.checkpoint), split="dev"),
        lambda: place.fit("resumed", f"--num_epochs 2 --resume {place.checkpoint}"),
    ):
        with pytest.raises(InputError) as error:
            use()
        assert str(place.checkpoint) in str(error.value) and str(place.vocab_file) in str(error.value)
        assert f"id {first} is '" in str(error.value)


def test_an_older_checkpoint_without_words_takes_any_vocabulary_of_its_size(place):
    change(place.checkpoint, words=None, segment=None, captions=None)
    expected = evalrank(str(place.checkpoint), split="dev")["n_images"]
    swap_words(place.vocab_file)
    assert evalrank(str(place.checkpoint), split="dev")["n_images"] == expected
    place.fit("resumed", f"--num_epochs 2 --resume {place.checkpoint}")


def test_a_vocabulary_that_cuts_chinese_goes_only_with_such_a_checkpoint(place):
    change(place.checkpoint, segment=True)
    with pytest.raises(InputError, match="made with --segment, unlike .*_vocab.json"):
        evalrank(str(place.checkpoint), split="dev")
    stored = json.loads(place.vocab_file.read_text())
    place.vocab_file.write_text(json.dumps({**stored, "segment": True}))
    evalrank(str(place.checkpoint), split="dev")


@pytest.mark.parametrize("words", [["<pad>"], "words", [1, 2], {"a": 1}])
def test_words_that_are_not_one_for_each_embedding_are_refused(place, words):
    change(place.checkpoint, words=words)
    with pytest.raises(InputError, match=r"checkpoint_0.pth.tar: words is .*, expected \d+ different words"):
        load_checkpoint(str(place.checkpoint))


# ---------------------------------------------------------------- what a resumed run must keep


@pytest.mark.parametrize(
    "flags",
    [
        "--agg_func LogSumExp",
        "--no_imgnorm",
        "--img_dim 8",
        "--data_name other_precomp",
    ],
)
def test_a_run_is_not_resumed_as_another_model_or_on_other_data(place, flags):
    make_folder(str(place.root), "other_precomp", n_regions=4)
    with pytest.raises(InputError) as error:
        place.fit("resumed", f"--num_epochs 2 --resume {place.checkpoint} {flags}")
    assert f"{place.checkpoint}: trained with {flags.split()[0]} " in str(error.value)
    assert f", found {flags}" in str(error.value) or flags == "--no_imgnorm"
    assert "--init_from" in str(error.value) and not (place.root / "resumed").exists()


def test_a_run_is_not_resumed_with_other_dev_captions_whose_best_score_is_another(place):
    captions = place.root / "data" / NAME / "dev_caps.txt"
    write_lines(captions, captions.read_text().splitlines()[::-1])
    with pytest.raises(InputError, match="trained with other dev captions; .*--init_from"):
        place.fit("resumed", f"--num_epochs 2 --resume {place.checkpoint}")


def test_more_training_captions_are_taken_between_epochs_only(place):
    captions = place.root / "data" / NAME / "train_caps.txt"
    write_lines(captions, captions.read_text().splitlines()[::-1])
    place.fit("resumed", f"--num_epochs 2 --resume {place.checkpoint}")
    change(place.checkpoint, step=2)
    with pytest.raises(InputError, match="trained with other train captions"):
        place.fit("again", f"--num_epochs 2 --resume {place.checkpoint}")


def test_what_only_changes_how_training_goes_on_may_change(place):
    flags = "--learning_rate .01 --margin .1 --batch_size 20 --seed 3 --grad_clip 0 --lr_update 1"
    place.fit("resumed", f"--num_epochs 2 --resume {place.checkpoint} {flags}")


def test_a_run_that_is_done_says_so_and_trains_no_more(place, caplog):
    before = {path: path.stat().st_mtime_ns for path in (place.root / "first").glob("*.tar")}
    place.fit("first", f"--resume {place.checkpoint}")
    assert f"{place.checkpoint}: has 1 epochs, --num_epochs 1 trains no more" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (place.root / "first").glob("*.tar")} == before


def test_a_run_is_not_resumed_with_other_features(place):
    path = place.root / "data" / NAME / "dev_ims.npy"
    np.save(path, np.load(path) + 1)
    with pytest.raises(InputError, match="trained with other dev features; .*--init_from"):
        place.fit("resumed", f"--num_epochs 2 --resume {place.checkpoint}")


# ---------------------------------------------------------------- the folder of a run


def test_a_folder_that_holds_another_runs_checkpoints_is_only_overwritten_when_asked(place):
    before = sorted(path.name for path in (place.root / "first").iterdir())
    for flags in ("", f"--init_from {place.checkpoint}"):
        with pytest.raises(InputError, match="another run's checkpoint; --resume auto .*, --overwrite .*, another --m"):
            place.fit("first", flags)
    assert sorted(path.name for path in (place.root / "first").iterdir()) == before
    with pytest.raises(InputError, match="--overwrite: .*expected no --resume auto"):
        place.fit("first", "--overwrite --resume auto")
    old = load(place.root / "first")["run"]
    place.fit("first", "--overwrite --seed 1")
    assert load(place.root / "first")["run"] != old and len(metrics(place.root / "first" / "log")) == 4 * 7 + 11


def test_a_run_resumed_from_an_earlier_epoch_does_not_mix_with_its_later_ones(place):
    place.fit("first", f"--num_epochs 3 --resume {place.checkpoint}")
    with pytest.raises(InputError, match="or later than the one resumed; .*--overwrite"):
        place.fit("first", f"--num_epochs 2 --resume {place.checkpoint}")
    place.fit("first", f"--num_epochs 2 --resume {place.checkpoint} --overwrite")
    assert sorted(path.name for path in (place.root / "first").glob("checkpoint*")) == [
        "checkpoint_0.pth.tar",
        "checkpoint_1.pth.tar",
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="folders are locked on POSIX systems only")
def test_two_processes_do_not_train_in_one_folder(place):
    code = "import sys; from lib.run_folder import RunFolder\nwith RunFolder(sys.argv[1]).locked(): print(); input()"
    line = [sys.executable, "-c", code, place.root / "first"]
    with started(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="--model_name .*first: another process trains there"):
            place.fit("first", "--resume auto")
        other.communicate(b"\n")
    place.fit("first", "--resume auto")


# ---------------------------------------------------------------- --init_from


def embeddings(path):
    checkpoint = load_checkpoint(str(path))
    return dict(zip(checkpoint["words"], checkpoint["model"][1]["embed.weight"], strict=True))


def test_init_from_takes_the_weights_and_nothing_else(place):
    """A step that learns nothing shows what it started from."""
    folder = place.fit("new", f"--init_from {place.checkpoint} --learning_rate 1e-30 --batch_size 64")
    old, new = (load_checkpoint(str(path)) for path in (place.checkpoint, folder / "checkpoint_0.pth.tar"))
    for theirs, ours in zip(old["model"], new["model"], strict=True):
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert (new["epoch"], new["Eiters"]) == (1, 1), "counted from 0"
    assert (folder / "model_best.pth.tar").exists(), "there is no older best score"


def test_init_from_carries_the_embeddings_of_shared_words_over(place, caplog):
    caplog.set_level("INFO")
    make_folder(str(place.root), "other_precomp", n_regions=4, seed=3)
    captions = place.root / "data" / "other_precomp" / "train_caps.txt"
    write_lines(captions, ["a zebra runs", *captions.read_text().splitlines()[1:]])
    vocab = place.root / "vocab" / "other_precomp_vocab.json"
    words = ["<pad>", "<start>", "<end>", "<unk>", "zebra", "runs", "dog", "a"]
    vocab.write_text(json.dumps({"word2idx": {word: i for i, word in enumerate(words)}}))
    folder = place.fit(
        "new", f"--data_name other_precomp --init_from {place.checkpoint} --learning_rate 1e-30 --batch_size 64"
    )
    old, new = embeddings(place.checkpoint), embeddings(folder / "checkpoint_0.pth.tar")
    assert list(new) == words
    for word in words:
        assert word == "zebra" or torch.equal(new[word], old[word]), word
    assert "embeddings of 7 of 8 words" in caplog.text


def test_init_from_an_older_checkpoint_reads_the_words_of_its_vocabulary_file(place, caplog):
    caplog.set_level("INFO")
    change(place.checkpoint, words=None)
    place.fit("new", f"--init_from {place.checkpoint}")
    assert "embeddings of 25 of 25 words" in caplog.text
    make_folder(str(place.root / "elsewhere"), NAME, n_regions=4)
    words = ["<pad>", "<start>", "<end>", "<unk>", "zebra"]
    place.vocab_file.write_text(json.dumps({"word2idx": {word: i for i, word in enumerate(words)}}))
    with pytest.raises(InputError, match=f"holds no words, and --vocab_path .* no vocabulary of {NAME} with 25 words"):
        place.fit("other", f"--init_from {place.checkpoint}")


def test_init_from_another_model_names_what_does_not_fit(place, caplog):
    with pytest.raises(
        InputError, match=r"checkpoint_0.pth.tar: image encoder: fc.weight is \(24, 216\), expected \(10, 216\)"
    ):
        place.fit("new", f"--init_from {place.checkpoint} --embed_size 10")
    with pytest.raises(InputError, match="words of word_dim 8, expected --word_dim 5"):
        place.fit("new", f"--init_from {place.checkpoint} --word_dim 5")
    place.fit("area", f"--init_from {place.checkpoint} --position area")
    assert "this model has no fc_att.weight, fc_att.bias" in caplog.text


def test_init_from_gives_way_to_a_run_that_resume_auto_finds(place, caplog):
    caplog.set_level("INFO")
    flags = f"--init_from {place.checkpoint} --resume auto"
    place.fit("new", flags)
    assert "weights taken over" in caplog.text
    caplog.clear()
    place.fit("new", f"{flags} --num_epochs 2")
    assert "weights taken over" not in caplog.text and "1 epochs and 0 steps done" in caplog.text
    with pytest.raises(InputError, match="--init_from .*: expected no --resume .* beside it"):
        place.fit("new", f"--init_from {place.checkpoint} --resume {place.checkpoint}")
