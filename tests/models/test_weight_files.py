"""Tests what a file of weights says: tensors in either format, and the epoch and optimiser beside them."""

import json

import pytest
import torch

from robustdyn.errors import DataFileError
from robustdyn.models import load_weights
from robustdyn.models.weight_files import read_weight_file
from tests.models.test_checkpoints import parallel, preact, public_preact, randomised, refused, same, saved


def test_of_an_average_and_the_weights_beside_it_the_reader_chooses(tmp_path):
    average, weights = (randomised(preact()).state_dict() for _ in range(2))
    states = {
        entry: {f"model.{name}": value for name, value in state.items()}
        for entry, state in (("state_dict", average), ("current_model_state", weights))
    }
    both = saved({"pytorch-lightning_version": "2.6.0", **states}, tmp_path)
    assert read_weight_file(both).averaged
    for trained, wanted in ((False, average), (True, weights)):
        model = preact()
        load_weights(model, both, layout="auto", trained=trained)
        assert same(model, wanted)
    one = {"pytorch-lightning_version": "2.6.0", "state_dict": states["state_dict"]}
    alone = saved(one, tmp_path)
    assert not read_weight_file(alone).averaged
    model = preact()
    load_weights(model, alone, layout="auto", trained=True)  # of a run without averaging, there is no other
    assert same(model, average)


# ---------------------------------------------------------------------- safetensors


def safetensors(path, tensors, metadata=None, change=lambda header: header):
    """Write a file as https://huggingface.co/docs/safetensors describes it; the package is not needed."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    for name, value in tensors.items():
        content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(content)]
        header[name] = {"dtype": kinds[value.dtype], "shape": list(value.shape), "data_offsets": place}
        data += content
    text = json.dumps(change(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("wrap", [dict, parallel], ids=["plain", "parallel"])
def test_safetensors_give_the_same_weights(wrap, tmp_path):
    theirs, model, plain = public_preact(), preact().double(), preact().double()
    load_weights(plain, saved(theirs, tmp_path), layout="auto")
    path = safetensors(tmp_path / "model.safetensors", wrap(theirs), {"epoch": "7", "format": "pt"})
    assert load_weights(model, path, layout="auto") == "robust_overfitting"
    assert same(model, plain.state_dict())
    assert read_weight_file(path).epoch == 7


def test_safetensors_of_other_types_and_shapes(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.tensor(1.5).bfloat16(), "c": torch.empty(0, 2)}
    read = read_weight_file(safetensors(tmp_path / "x.safetensors", tensors)).weights
    for name, value in tensors.items():
        torch.testing.assert_close(read[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda h: h | {"w": h["w"] | {"data_offsets": [0, 80]}}, "w lies outside it"),
        (lambda h: h | {"w": h["w"] | {"data_offsets": [-8, 0]}}, "w lies outside it"),
        (lambda h: h | {"w": h["w"] | {"shape": [-1, -10]}}, "w lies outside it"),
        (lambda h: h | {"w": h["w"] | {"shape": [3]}}, "w lies outside it"),
        (lambda h: h | {"w": h["w"] | {"dtype": "F8_E4M3"}}, "w has the type F8_E4M3"),
        (lambda h: h | {"w": {"dtype": "F32"}}, "KeyError"),
        (lambda h: [h], "TypeError"),
    ],
)
def test_refuses_safetensors_that_do_not_fit_their_header(change, found, tmp_path):
    path = safetensors(tmp_path / "x.safetensors", {"w": torch.ones(10)}, change=change)
    assert f"not a complete safetensors file ({found})" in refused(preact(), path, DataFileError)


@pytest.mark.parametrize(
    "content", [b"", b"1234", (2**40).to_bytes(8, "little"), b"\x04" + b"\0" * 7 + b"{]"]
)
def test_refuses_what_is_no_safetensors_file(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert "not a complete safetensors file" in refused(preact(), path, DataFileError)


# ---------------------------------------------------------------------- what else a file says


def test_epoch_step_and_optimiser(tmp_path):
    model = preact()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=2e-4)
    content = {"net": model.state_dict(), "optimizer": optimiser.state_dict(), "epoch": torch.tensor(3)}
    read = read_weight_file(saved(content, tmp_path))
    assert (read.entry, read.epoch, read.step) == ("net", 3, None)
    (group,) = read.groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.9, 2e-4)
    assert "params" not in group
    alone = read_weight_file(saved(optimiser.state_dict(), tmp_path))
    assert not alone.weights
    assert alone.groups == read.groups
    message = refused(preact(), tmp_path / "model.pth", DataFileError)
    assert "it has the state of an optimiser and no weights" in message


@pytest.mark.parametrize("epoch", [-1, 2.5, True, "three", None, torch.ones(2)])
def test_what_is_no_epoch(epoch, tmp_path):
    assert read_weight_file(saved({"net": preact().state_dict(), "epoch": epoch}, tmp_path)).epoch is None
