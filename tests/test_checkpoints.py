"""What load_checkpoint and load_model accept: this code's files, the published code's, and nothing that runs code."""

import io
import os
import pickle
import pickletools
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_opt
from dataset_commands import Calls

from lib.errors import InputError
from model import SCAN, load_checkpoint, load_model

KEYS = ("epoch", "model", "best_rsum", "opt", "Eiters")


def make_checkpoint(**flags):
    """What the published train.py hands to torch.save, for a small untrained model."""
    opt = make_opt(data_path="./data/", data_name="f30k_precomp", vocab_path="./vocab/", batch_size=4, **flags)
    torch.manual_seed(0)
    return {"epoch": 3, "model": SCAN(opt).state_dict(), "best_rsum": 123.4, "opt": opt, "Eiters": 77}


def check_model(model, checkpoint):
    """The model holds the checkpoint's parameters and gives embeddings."""
    for ours, stored in zip(model.state_dict(), checkpoint["model"], strict=True):
        assert list(ours) == list(stored)
        assert all(torch.equal(ours[name].cpu(), stored[name]) for name in stored)
    ids = torch.tensor([[1, 7, 2]])
    image = torch.ones(1, 2, model.opt.img_dim)
    assert torch.isfinite(model.forward_emb(image, torch.zeros(1, 2, 31), ids, [3])[0]).all()


def refused(path):
    """load_checkpoint's message about path: an InputError of one line that names it."""
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# ---------------------------------------------------------------- files that load


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_save_load(tmp_path, zipped):
    checkpoint = make_checkpoint()
    torch.save(checkpoint, tmp_path / "c.pth.tar", _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint(tmp_path / "c.pth.tar")
    assert [loaded[key] for key in ("epoch", "best_rsum", "Eiters")] == [3, 123.4, 77]
    assert loaded["opt"].data_name == "f30k_precomp"
    check_model(load_model(str(tmp_path / "c.pth.tar"), 50), checkpoint)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_model_trained_on_cuda_loads_on_a_cpu(tmp_path, monkeypatch, zipped):
    checkpoint = make_checkpoint()
    checkpoint["opt"].device = "cuda:7"  # what --device said when it was trained
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(checkpoint, tmp_path / "c.pth.tar", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    assert b"cuda:0" in (tmp_path / "c.pth.tar").read_bytes()
    check_model(load_model(tmp_path / "c.pth.tar"), checkpoint)


def python2_bytes(checkpoint):
    """A file of PyTorch's old format, of five pickles, with its text as Python 2.7 wrote it: as byte strings."""
    file, content, last = io.BytesIO(), b"", 0
    torch.save(checkpoint, file, _use_new_zipfile_serialization=False)
    data = file.getvalue()
    file.seek(0)
    for _ in range(5):
        for opcode, text, at in pickletools.genops(file):
            if opcode.name == "BINUNICODE":
                n = len(text.encode())
                head = b"U" + bytes([n]) if n < 256 else b"T" + struct.pack("<i", n)
                content += data[last:at] + head + text.encode()
                last = at + 5 + n
    return content + data[last:]


def test_files_of_python_2_load(tmp_path, monkeypatch):
    """Strings of 256 bytes and more have another opcode; things of its builtin module; saved on a GPU."""
    checkpoint = {**make_checkpoint(), "seen": {1, 2}}
    checkpoint["opt"].model_name = "/runs/" + 60 * "name/"
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    content = python2_bytes(checkpoint)
    monkeypatch.undo()
    assert b"U\tdata_name" in content and b"X" + struct.pack("<I", 9) + b"data_name" not in content
    assert b"c__builtin__\nset\n" in content and b"U\x06cuda:0" in content
    (tmp_path / "c.pth.tar").write_bytes(content)
    loaded = load_checkpoint(tmp_path / "c.pth.tar")
    assert vars(loaded["opt"]) == {**vars(checkpoint["opt"]), "position": "attention"} and loaded["seen"] == {1, 2}
    check_model(load_model(tmp_path / "c.pth.tar", 50), checkpoint)


@pytest.mark.parametrize("position", ["attention", "area", "none"])
def test_a_position_that_the_options_lack_is_inferred_from_the_parameters(tmp_path, position):
    checkpoint = make_checkpoint(position=position)
    del checkpoint["opt"].position
    torch.save(checkpoint, tmp_path / "c.pth.tar")
    assert load_checkpoint(tmp_path / "c.pth.tar")["opt"].position == position
    check_model(load_model(tmp_path / "c.pth.tar"), checkpoint)


def test_parameters_that_the_model_does_not_have_are_ignored(tmp_path):
    checkpoint = make_checkpoint()
    more = {**checkpoint, "optimizer": {"state": {}}, "model": [dict(state) for state in checkpoint["model"]]}
    for state in more["model"]:
        state["surplus.weight"] = torch.zeros(3)
    torch.save(more, tmp_path / "c.pth.tar")
    check_model(load_model(tmp_path / "c.pth.tar"), checkpoint)


# ---------------------------------------------------------------- files of descendants


def test_parameters_saved_under_data_parallel_load(tmp_path):
    checkpoint = make_checkpoint()
    states = [{f"module.{name}": x for name, x in state.items()} for state in checkpoint["model"]]
    torch.save({**checkpoint, "model": states}, tmp_path / "c.pth.tar")
    check_model(load_model(tmp_path / "c.pth.tar", 50), checkpoint)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"], ids=["NumPy 2", "NumPy 1"])
def test_numpy_scalars_are_read_as_pythons_numbers(tmp_path, zipped, module):
    checkpoint = {**make_checkpoint(), "epoch": np.int64(3), "best_rsum": np.float64(12.5), "Eiters": np.uint8(7)}
    stored = {
        "margin": np.float32(0.25),
        "bi_gru": np.True_,
        "data_name": np.str_("f30k ü"),
        "big": np.array(2, ">f8")[()],
    }
    vars(checkpoint["opt"]).update(stored)
    path = tmp_path / "c.pth.tar"
    with np.errstate(all="ignore"):
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    if module == "numpy.core" and not zipped:  # as NumPy 1 wrote it; a zip archive has checksums
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    loaded = load_checkpoint(path)
    found = [loaded[key] for key in ("epoch", "best_rsum", "Eiters")] + [
        getattr(loaded["opt"], name) for name in stored
    ]
    assert found == [3, 12.5, 7, 0.25, True, "f30k ü", 2.0]
    assert [type(x) for x in found] == [int, float, int, float, bool, str, float]


def test_options_and_scores_of_other_forms_load_where_nothing_is_lost(tmp_path):
    """A dict of options, paths, numbers that are tensors, and options that this project does not know."""
    checkpoint = make_checkpoint()
    options = {**vars(checkpoint["opt"]), "data_path": Path("some") / "where", "margin": torch.tensor(0.25)}
    options |= {"gpo_step": 32, "drop_regions": [0.1, 0.2], "teacher": None, "backbone": OrderedDict(depth=50)}
    torch.save({**checkpoint, "opt": options, "best_rsum": torch.tensor(1.5)}, tmp_path / "c.pth.tar")
    loaded = load_checkpoint(tmp_path / "c.pth.tar")
    assert loaded["best_rsum"] == 1.5 and loaded["opt"].margin == 0.25 and loaded["opt"].gpo_step == 32
    assert loaded["opt"].data_path == os.path.join("some", "where")
    check_model(load_model(tmp_path / "c.pth.tar"), checkpoint)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("agg_func", "GPO", "one of LogSumExp"),
        ("cross_attn", "both", "one of t2i"),
        ("embed_size", 32.0, "whole number"),
    ],
)
def test_an_option_of_a_descendant_that_changes_the_model_is_named(tmp_path, option, value, expected):
    checkpoint = make_checkpoint()
    setattr(checkpoint["opt"], option, value)
    torch.save(checkpoint, tmp_path / "c.pth.tar")
    message = refused(tmp_path / "c.pth.tar")
    assert f"its option {option} is {value!r}" in message and expected in message


# ---------------------------------------------------------------- files that do not fit


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_entry_is_an_error_that_names_it(tmp_path, key):
    checkpoint = make_checkpoint()
    del checkpoint[key]
    torch.save(checkpoint, tmp_path / "c.pth.tar")
    assert f"no {key}" in refused(tmp_path / "c.pth.tar")


@pytest.mark.parametrize(
    ("encoder", "which", "key"),
    [("basic", 0, "fc_att.bias"), ("basic", 1, "rnn.weight_hh_l0_reverse"), ("weight_norm", 0, "fc.weight_g")],
)
def test_a_parameter_that_is_missing_or_of_another_shape_is_an_error_that_names_it_and_the_file(
    tmp_path, encoder, which, key
):
    checkpoint = make_checkpoint(precomp_enc_type=encoder, position="attention")
    state = checkpoint["model"][which]
    missing = {name: value for name, value in state.items() if name != key}
    for checkpoint["model"][which] in (missing, {**state, key: torch.zeros(32, 100, 2)}):
        torch.save(checkpoint, tmp_path / "c.pth.tar")
        with pytest.raises(InputError) as error:
            load_model(tmp_path / "c.pth.tar")
        message = str(error.value)
        assert message.startswith(f"{tmp_path}/c.pth.tar: ") and key in message and "\n" not in message


def test_another_vocabulary_is_an_error_that_names_both_sizes(tmp_path):
    torch.save(make_checkpoint(), tmp_path / "c.pth.tar")
    with pytest.raises(InputError, match=r"c\.pth\.tar: made with a vocabulary of 50 words, found one of 51"):
        load_model(tmp_path / "c.pth.tar", 51)


def test_an_option_with_an_unknown_choice_is_an_error_that_names_the_file(tmp_path):
    torch.save(make_checkpoint(), tmp_path / "c.pth.tar")
    with pytest.raises(InputError, match=r"c\.pth\.tar: --agg_func Median"):
        load_model(tmp_path / "c.pth.tar", agg_func="Median")


# ---------------------------------------------------------------- files that are no checkpoints


@pytest.mark.parametrize("write", ["zip", "legacy", "pickle", "python2"])
@pytest.mark.parametrize("place", ["whole", "opt", "model", "surplus"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, write, place):
    path, marker = tmp_path / "c.pth.tar", tmp_path / "it_ran"
    payload = Calls(os.system, f"touch {marker}")
    value = payload if place == "whole" else {**make_checkpoint(), place: payload}
    if write == "pickle":
        path.write_bytes(pickle.dumps(value))
    elif write == "python2":
        path.write_bytes(python2_bytes(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=write == "zip")
    message = refused(path)
    assert "refused" in message or "not a checkpoint" in message
    assert not marker.exists()


CALLS = [eval, exec, __import__, os.listdir, getattr, open]
NO_OPTIONS = [np.datetime64("2026-01-01"), np.complex64(1), np.zeros(3), np.array(None), np.float64]


@pytest.mark.parametrize("value", [*NO_OPTIONS, np.random.RandomState(), *(Calls(call, "/") for call in CALLS)])
def test_options_may_hold_no_calls_and_no_objects_of_other_classes(tmp_path, value):
    checkpoint = make_checkpoint()
    checkpoint["opt"].extra = value
    torch.save(checkpoint, tmp_path / "c.pth.tar")
    assert "refused" in refused(tmp_path / "c.pth.tar")


def test_other_files_that_torch_or_another_program_wrote_are_refused(tmp_path):
    whole, path = make_checkpoint(), tmp_path / "c.pth.tar"
    models = 7, None, [1, 2], whole["model"][:1], {"img_enc": {}, "txt_enc": {}}, [[], []]
    changes = {"opt": {"margin": 0.2}}, *({"model": model} for model in models)
    for value in (torch.zeros(3), [1, 2, 3], {}, *({**whole, **change} for change in changes)):
        torch.save(value, path)
        refused(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "not a checkpoint")
    refused(path)
    assert refused(tmp_path / "missing").endswith("no such checkpoint")
    assert refused(tmp_path).endswith("a folder, expected one of its checkpoints")


def test_loading_allows_no_more_classes_than_before(tmp_path):
    """The Namespace is allowed for this one call: other torch.load calls of the process are as strict as ever."""
    torch.save(make_checkpoint(), tmp_path / "c.pth.tar")
    load_checkpoint(tmp_path / "c.pth.tar")
    assert Namespace not in torch.serialization.get_safe_globals()
