"""The experiment composes as its README says, and the JPEG converter writes what the data module reads."""

import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustdyn.data import CIFAR10
from robustdyn.errors import ConfigError, DataFileError
from robustdyn.measure.when import measured_epochs
from robustdyn.run.combinations import check_combinations
from robustdyn.run.config import build, check
from tests.runs import compose

FOLDER = Path(__file__).parents[2] / "experiments" / "cifar10_at"
README = (FOLDER / "README.md").read_text()

TRAIN, TEST = 15, 4


@pytest.fixture
def converter(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("from_jpeg")
    sys.modules.pop("from_jpeg", None)


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    # one colour for all pixels and no subsampling: what JPEG loses is rounding
    Image.fromarray(pixels).save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()


def write_copy(folder: Path, **changed) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A JPEG copy of single-coloured images; their colours (N, 3) and labels, by split."""
    folder.mkdir()
    draws, told = np.random.default_rng(0), {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        colours = draws.integers(0, 256, (count, 3), dtype=np.uint8)
        labels = draws.integers(0, 10, count, dtype=np.uint8)
        files = [encoded(np.broadcast_to(colour, (32, 32, 3)).copy()) for colour in colours]
        offset = np.cumsum([0, *map(len, files)])
        arrays = {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offset": offset, "label": labels}
        np.savez_compressed(folder / f"{split}.npz", **(arrays | changed))
        told[split] = colours, labels
    return told


def cifar10(root: Path) -> CIFAR10:
    return build(
        compose("experiment=cifar10_at", f"data.root={root}", "data.download=false", "data.partial=true",
                "data.batch_size=5"),
        "data",
    )  # fmt: skip


def test_the_copy_is_read_back_in_order(converter, tmp_path):
    told = write_copy(tmp_path / "copy")
    assert converter.convert(tmp_path / "copy", tmp_path / "cifar10_jpeg")
    data = cifar10(tmp_path / "cifar10_jpeg")
    data.setup("fit")
    for split, (colours, labels) in told.items():
        images = data.split(split)
        assert images.labels.tolist() == labels.tolist()
        expected = torch.from_numpy(colours)[:, :, None, None].expand(-1, 3, 32, 32).int()
        # rounding of three colours to three others and back, at quality 100
        torch.testing.assert_close(images.images.int(), expected, rtol=0, atol=3)
    assert "lossy" in (tmp_path / "cifar10_jpeg" / "README.txt").read_text()


def test_the_planes_are_not_turned(converter, tmp_path):
    """Red falls with the rows, green with the columns: smooth, so that JPEG keeps it."""
    ramp = np.linspace(255, 0, 32)
    planes = np.stack([np.tile(ramp[:, None], 32), np.tile(ramp, (32, 1)), np.full((32, 32), 128.0)])
    file = np.frombuffer(encoded(planes.transpose(1, 2, 0).round().astype(np.uint8)), np.uint8)
    arrays = {
        "jpeg": np.tile(file, 5),
        "offset": np.arange(6) * len(file),
        "label": np.arange(5, dtype=np.uint8),
    }
    (tmp_path / "copy").mkdir()
    for split in ("train", "test"):
        np.savez(tmp_path / "copy" / f"{split}.npz", **arrays)
    converter.convert(tmp_path / "copy", tmp_path / "jpeg")
    record = np.fromfile(tmp_path / "jpeg" / "cifar-10-batches-bin" / "data_batch_4.bin", np.uint8)
    assert record.size == 3073
    assert record[0] == 3
    np.testing.assert_allclose(record[1:].reshape(3, 32, 32), planes, atol=6)  # rows differ by 8


def test_what_is_there_is_left_alone_and_what_was_cut_short_is_made_again(converter, tmp_path):
    write_copy(tmp_path / "copy")
    root = tmp_path / "cifar10_jpeg"
    (root / "cifar-10-batches-bin.part").mkdir(parents=True)
    (root / "cifar-10-batches-bin.part" / "data_batch_1.bin").write_text("killed while writ")
    assert converter.convert(tmp_path / "copy", root)
    assert not (root / "cifar-10-batches-bin.part").exists()
    batch = root / "cifar-10-batches-bin" / "data_batch_1.bin"
    assert batch.stat().st_size == TRAIN // 5 * 3073
    written = batch.stat().st_mtime_ns
    assert not converter.convert(tmp_path / "copy", root)
    assert batch.stat().st_mtime_ns == written


def test_a_folder_that_does_not_say_jpeg_is_refused(converter, tmp_path):
    write_copy(tmp_path / "copy")
    with pytest.raises(ConfigError, match="must say that its pixels are lossy"):
        converter.convert(tmp_path / "copy", tmp_path / "cifar10")
    assert not (tmp_path / "cifar10").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": np.full(TRAIN, 10, np.uint8)}, r"train.npz: .* do not fit together"),
        ({"offset": np.arange(TRAIN + 1)}, r"train.npz: .* do not fit together"),
        ({"label": np.zeros(TRAIN - 1, np.uint8)}, r"train.npz: .* do not fit together"),
        ({"offset": np.array([None])}, r"train.npz: no arrays jpeg, offset and label"),  # would be a pickle
    ],
)
def test_a_broken_copy_is_named(converter, tmp_path, changed, message):
    write_copy(tmp_path / "copy", **changed)
    with pytest.raises(DataFileError, match=message):
        converter.convert(tmp_path / "copy", tmp_path / "jpeg")
    assert not (tmp_path / "jpeg").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"no picture", "train.npz: image 0 is no JPEG"),
        (encoded(np.zeros((28, 32, 3), np.uint8)), "train.npz: image 0 is 28x32, not 32x32"),
    ],
)
def test_a_picture_that_is_none_is_named_by_its_number(converter, tmp_path, file, message):
    arrays = {"jpeg": np.frombuffer(file * 5, np.uint8), "offset": np.arange(6) * len(file)}
    (tmp_path / "copy").mkdir()
    for split in ("train", "test"):
        np.savez(tmp_path / "copy" / f"{split}.npz", **arrays, label=np.zeros(5, np.uint8))
    with pytest.raises(DataFileError, match=message):
        converter.convert(tmp_path / "copy", tmp_path / "jpeg")
    assert not (tmp_path / "jpeg" / "cifar-10-batches-bin").exists()


def test_the_experiment_is_the_papers_protocol():
    cfg = compose("experiment=cifar10_at")
    check(cfg)
    check_combinations(cfg)
    assert (cfg.data._target_, cfg.data.batch_size, cfg.data.train_size) == (
        "robustdyn.data.CIFAR10",
        128,
        None,
    )
    assert cfg.model.width == 64
    assert (cfg.attack.norm, cfg.attack.eps_255, cfg.attack.step_255, cfg.attack.steps) == ("linf", 8, 2, 10)
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.1, 0.9, 5e-4)
    assert (cfg.trainer.max_epochs, list(cfg.decay_epochs)) == (200, [100, 150])
    assert (cfg.trainer.precision, cfg.execution.compile) == ("bf16-mixed", "default")  # execution=fast


def commands(program: str) -> list[list[str]]:
    """Arguments of every such command of the README's blocks, lines that end in a backslash joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index(program) + 1 :] for line in words if program in line]


@pytest.mark.parametrize("arguments", commands("robustdyn-train"), ids=" ".join)
def test_every_command_of_the_readme_composes(arguments):
    cfg = compose(*arguments)
    check(cfg)
    check_combinations(cfg)
    epochs = cfg.trainer.max_epochs
    before, after = cfg.decay_epochs[0] - 1, epochs - 1
    assert {before, after} <= measured_epochs(
        cfg.measure.epochs, max_epochs=epochs, decay_epochs=list(cfg.decay_epochs)
    )
    if "jpeg" in cfg.data.root:
        assert "jpeg" in cfg.name
        assert not cfg.data.download  # else a wrong root would be filled with the official files


def test_the_readme_says_how_to_train_and_evaluate():
    assert len(commands("robustdyn-train")) >= 2
    assert len(commands("robustdyn-evaluate")) >= 1
