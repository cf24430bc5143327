"""Tests the loaders inside Lightning's own loops."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from robustdyn.errors import ConfigError
from tests.data.official import digits

AUGMENT = {"crop_padding": 1, "padding_mode": "zeros", "flip": True, "cutout": 2}


def checksums(batch):
    """Checksums of pixels and targets; those of the ranks' shares add up to that of the batch."""
    return batch.images.double().sum().item(), batch.targets.double().square().sum().item()


class Recorder(LightningModule):
    """A linear classifier that remembers the batches it was given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.train_batches, self.evaluated = [], []

    def training_step(self, batch, batch_idx):
        self.train_batches.append(
            (self.current_epoch, batch_idx, tuple(batch.indices.tolist()), *checksums(batch))
        )
        return torch.nn.functional.cross_entropy(self.layer(batch.images.flatten(1)), batch.targets)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append((dataloader_idx, len(batch.targets)))
        self.log("x", float(dataloader_idx), batch_size=len(batch.targets))

    def test_step(self, batch, batch_idx):
        self.evaluated.append(("test", len(batch.targets)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def module():
    torch.manual_seed(0)
    return Recorder()


def data_module(**changes):
    settings = {"train_size": 90, "batch_size": 40, "eval_batch_size": 300, "validation_size": 100}
    return digits(**(settings | {"augment": AUGMENT} | changes))


def trainer(tmp_path, epochs, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=epochs,
        num_sanity_val_steps=0,
        **(quiet | settings),
    )


def fit(tmp_path, epochs, ckpt_path=None, callbacks=(), mixup=0.0, **settings):
    model = module()
    loop = trainer(tmp_path, epochs, callbacks=list(callbacks), **settings)
    loop.fit(model, datamodule=data_module(mixup=mixup), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("mixup", [0.0, 0.7])
def test_fit_and_test(tmp_path, mixup):
    model, data = module(), data_module(mixup=mixup)
    loop = trainer(tmp_path, 2, enable_checkpointing=False)
    loop.fit(model, datamodule=data)
    assert [(epoch, number) for epoch, number, *_ in model.train_batches] == [
        (epoch, number) for epoch in range(2) for number in range(3)
    ]
    assert loop.global_step == 6
    for epoch in range(2):
        loader = data_module(mixup=mixup).train_dataloader()
        loader.epoch = lambda epoch=epoch: epoch
        expected = [(tuple(b.indices.tolist()), *checksums(b)) for b in loader]
        assert [batch[2:] for batch in model.train_batches if batch[0] == epoch] == expected
    assert model.evaluated == [(0, 100), (1, 300), (1, 240)] * 2
    model.evaluated.clear()
    loop.test(model, datamodule=data, verbose=False)
    assert model.evaluated == [("test", 300), ("test", 240)]


class SaveAt(ModelCheckpoint):
    """Keeps every checkpoint of one kind."""

    def __init__(self, folder, **when):
        super().__init__(
            dirpath=folder, filename="{epoch}-{step}", save_top_k=-1, auto_insert_metric_name=False, **when
        )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("when", "mixup"),
    [
        pytest.param({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 0.0, id="epoch end"),
        pytest.param(
            {"every_n_epochs": 1, "save_on_train_epoch_end": False},
            0.0,
            id="validation end",
            marks=pytest.mark.slow,
        ),
        pytest.param({"every_n_train_steps": 1}, 0.0, id="every step", marks=pytest.mark.slow),
        pytest.param({"every_n_train_steps": 1}, 0.7, id="every step, mixed"),
    ],
)
def test_resumed_runs_see_the_same_batches(tmp_path, when, mixup):
    whole = fit(tmp_path, 3, callbacks=[SaveAt(tmp_path / "saved", **when)], mixup=mixup)
    checkpoints = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(checkpoints) == (9 if "every_n_train_steps" in when else 3)
    for path in checkpoints:
        step = int(path.stem.split("-")[1])
        resumed = fit(tmp_path, 3, ckpt_path=path, enable_checkpointing=False, mixup=mixup)
        assert [b[2:] for b in resumed.train_batches] == [b[2:] for b in whole.train_batches[step:]], (
            path.stem
        )
        assert torch.equal(weights(resumed), weights(whole))


class Writer(Recorder):
    """Writes its batches to a file for each rank."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self):
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.train_batches))


@pytest.mark.slow  # starts two processes
@pytest.mark.parametrize("mixup", [0.0, 0.7])
def test_two_processes_are_one_on_the_union(tmp_path, mixup):
    whole = fit(tmp_path, 2, enable_checkpointing=False, mixup=mixup)
    two = trainer(tmp_path, 2, enable_checkpointing=False, devices=2, strategy="ddp_spawn")
    two.fit(Writer(tmp_path), datamodule=data_module(mixup=mixup))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for expected, left, right in zip(whole.train_batches, *ranks, strict=True):
        assert left[2] + right[2] == list(expected[2])
        for ours, theirs, both in zip(left[3:], right[3:], expected[3:], strict=True):
            assert ours + theirs == pytest.approx(both, rel=1e-12)  # float64 sums


def test_settings_that_do_not_fit_the_devices():
    class FourDevices:
        world_size = 4

    def check(message, **changes):
        data = data_module(**changes)
        data.trainer = FourDevices()
        with pytest.raises(ConfigError, match=message):
            data.setup()

    check("data.batch_size=3 is less than one image for each of 4 devices", batch_size=3)
    check("data.eval_batch_size=3 is less than one image for each of 4 devices", eval_batch_size=3)
    check("data.batch_size=44 leaves 2 train images for 4 devices", batch_size=44)
