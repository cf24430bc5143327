"""Tests that own training loops and own Lightning projects give one and the same record."""

import json

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from robustdyn import Recorder, measure_model
from robustdyn.attacks import PGD
from robustdyn.errors import ConfigError, RecordError
from robustdyn.lightning import MeasureCurvature
from robustdyn.measure import Eigenpairs, Spectrum, WeightCurvature
from robustdyn.methods import optimizer_state
from robustdyn.records import read_table
from tests.tolerances import EXACT64

N, B, EPOCHS, DECAY = 48, 12, 4, 2
SETTINGS = {
    "eigenpairs": Eigenpairs(directions=2, tolerance=1e-8),
    "measurements": {"spectrum": Spectrum(), "wci": WeightCurvature()},
}
TABLES = ("epochs", "rates", "spectrum", "bounds", "wci", "layers", "posterior")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()


def examples() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randn(N, 4, generator=source, dtype=torch.float64), torch.arange(N) % 3


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


class Project(lightning.LightningModule):
    """Somebody's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_robust_loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self) -> object:
        optimizer = sgd(self.network)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [DECAY])]


class Headless(Project):
    forward = lightning.LightningModule.forward

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])


class TwoOptimizers(Project):
    automatic_optimization = False

    def training_step(self, batch: object, index: int) -> None:
        return None

    def configure_optimizers(self) -> object:
        return [sgd(self.network), sgd(self.network)]


def fit(
    root, *callbacks, module=None, epochs=EPOCHS, checkpoint=None, **settings
) -> lightning.LightningModule:
    module = Project() if module is None else module
    saved = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, saved],
        logger=CSVLogger(root, name="log"),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    loader = DataLoader(TensorDataset(*examples()), batch_size=B)
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
    return module


def loop(run_dir, measured=(0, 2, 3), **settings) -> nn.Module:
    """Somebody's own loop."""
    model = network()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [DECAY])
    given = {"train_examples": N, "batch_size": B, **SETTINGS, **settings}
    with Recorder(model, *examples(), run_dir, **given) as recorder:
        for epoch in range(EPOCHS):
            for x, y in zip(*(t.split(B) for t in examples()), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                recorder.step(optimizer)
            scheduler.step()
            if epoch in measured:
                recorder.measure(epoch)
    return model


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("loop") / "run"
    return run_dir, loop(run_dir)


def same(first, second, tolerance=EXACT64) -> None:
    left_out = ("seconds", "train_robust_loss", "residual", "noise_residual")
    for name in TABLES:
        a, b = (read_table(run, name).drop(columns=[*left_out], errors="ignore") for run in (first, second))
        assert len(a), name
        for column in a:
            if column not in ("layer", "estimator", "batchnorm"):
                numbers = [torch.tensor(t[column].astype(float).to_numpy()) for t in (a, b)]
                torch.testing.assert_close(
                    *numbers,
                    **tolerance,
                    equal_nan=True,
                    msg=lambda words, where=f"{name}.{column}": f"{where}: {words}",
                )


def test_what_a_loop_records(own):
    run_dir, _ = own
    epochs, rates = read_table(run_dir, "epochs"), read_table(run_dir, "rates")
    assert epochs["step"].tolist() == [4, 8, 12, 16]  # the one that was not measured, too
    assert rates[["epoch", "step"]].to_numpy().tolist() == [[0, 0], [DECAY, 8]]
    assert rates["lr"].tolist() == pytest.approx([0.05, 0.005])
    assert read_table(run_dir, "wci")["epoch"].tolist() == [0, 2, 3]
    assert len(read_table(run_dir, "posterior")) == 2 * EPOCHS
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    assert json.loads((run_dir / "summary.json").read_text())["final"]["epoch"] == 3


def test_recording_changes_nothing(own):
    model = network()
    optimizer = sgd(model)
    for epoch in range(EPOCHS):
        if epoch == DECAY:
            optimizer.param_groups[0]["lr"] *= 0.1
        for x, y in zip(*(t.split(B) for t in examples()), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for mine, theirs in zip(own[1].state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_last_measurement_is_that_of_the_finished_model(own):
    run_dir, model = own
    found = measure_model(model, *examples(), **SETTINGS).rows["wci"][0]
    assert read_table(run_dir, "wci")["wci"].iloc[-1] == pytest.approx(found["wci"], rel=EXACT64["rtol"])
    again = measure_model(model, *examples(), **SETTINGS).rows["spectrum"]
    values = [row["hessian_eigenvalue"] for row in again]
    recorded = read_table(run_dir, "spectrum").query("epoch == 3")["hessian_eigenvalue"]
    assert recorded.tolist() == pytest.approx(
        values, rel=1e-7
    )  # a warm start ends elsewhere in the tolerance


def test_a_lightning_project_has_the_same_record(own, tmp_path):
    callback = MeasureCurvature(lambda: examples(), epochs=[0, 2], **SETTINGS)
    module = fit(tmp_path, callback)
    run_dir = tmp_path / "log/version_0/curvature"
    layers = read_table(run_dir, "layers")["layer"].unique().tolist()
    assert layers == ["network.0.weight", "network.3.weight"]
    same(own[0], run_dir)
    assert read_table(run_dir, "epochs")["train_robust_loss"].notna().all()
    assert "wci/wci" in (tmp_path / "log/version_0/metrics.csv").read_text()
    assert torch.equal(module.network[0].weight, own[1][0].weight)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_project_continues_its_record(own, tmp_path, stop):
    def callback() -> MeasureCurvature:
        return MeasureCurvature(*examples(), epochs=[0, 2], run_dir=tmp_path / "run", **SETTINGS)

    class Stops(Project):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == stop + 1:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, callback(), module=Stops())
    fit(tmp_path, callback(), checkpoint=tmp_path / f"epoch={stop - 1}.ckpt")
    same(own[0], tmp_path / "run")


def test_a_project_without_a_forward_method_names_its_network(own, tmp_path):
    with pytest.raises(ConfigError, match=r"no forward method: give MeasureCurvature\(model=lambda"):
        fit(tmp_path / "a", MeasureCurvature(*examples(), **SETTINGS), module=Headless())
    callback = MeasureCurvature(
        *examples(), epochs=[0, 2], run_dir=tmp_path / "run", model=lambda module: module.network, **SETTINGS
    )
    fit(tmp_path / "b", callback, module=Headless())
    same(own[0], tmp_path / "run")


def test_clipped_gradients_have_no_law(tmp_path):
    callback = MeasureCurvature(*examples(), epochs=[0], run_dir=tmp_path / "run", **SETTINGS)
    fit(tmp_path, callback, epochs=1, gradient_clip_val=1.0)
    assert read_table(tmp_path / "run", "spectrum")["posterior_variance_stationary"].isna().all()
    assert read_table(tmp_path / "run", "spectrum")["gradient_noise"].notna().all()
    assert read_table(tmp_path / "run", "posterior").empty


@pytest.mark.parametrize("setting", ["maximize", "nesterov"])
def test_another_rule_than_momentum_has_no_law(setting):
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
    assert optimizer_state(optimizer).plain
    optimizer.param_groups[0][setting] = True
    assert not optimizer_state(optimizer).plain


def test_momentum_that_changes_has_no_posterior(tmp_path):
    model = network()
    optimizer = sgd(model)
    with Recorder(model, *examples(), tmp_path / "run", batch_size=B, **SETTINGS) as recorder:
        for epoch, momentum in enumerate((0.9, 0.8, 0.9)):
            optimizer.param_groups[0]["momentum"] = momentum
            recorder.step(optimizer)
            recorder.measure(epoch)
    assert read_table(tmp_path / "run", "spectrum")["posterior_variance_stationary"].notna().all()
    assert read_table(tmp_path / "run", "posterior").empty


def test_several_optimisers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs one optimiser, but the module has 2"):
        fit(tmp_path, MeasureCurvature(*examples(), **SETTINGS), module=TwoOptimizers())


def test_misuse_of_a_recorder_is_explained(tmp_path, own):
    model = network()
    optimizer = sgd(model)
    with pytest.raises(RecordError, match="holds another record"):
        Recorder(model, *examples(), own[0])
    recorder = Recorder(model, *examples(), tmp_path / "run", batch_size=B)
    with pytest.raises(ValueError, match=r"no optimiser step was recorded: call step\(optimizer\)"):
        recorder.measure(0)
    for _ in range(3):
        recorder.step(optimizer)
    with pytest.raises(ValueError, match="3 steps since epoch -1 do not divide evenly among 2 epochs"):
        recorder.end_epoch(1)
    with pytest.raises(ValueError, match="unknown metrics loss: known are train_robust_loss"):
        recorder.end_epoch(0, loss=1.0)
    recorder.end_epoch(0, train_robust_loss=1.0, test_robust_loss=1.5)
    with pytest.raises(ValueError, match="epoch 0 was recorded before"):
        recorder.end_epoch(0)
    recorder.finish()
    assert read_table(tmp_path / "run", "epochs")["robust_loss_gap"].tolist() == [0.5]


def test_what_cannot_be_measured_is_refused_before_training(tmp_path):
    x, y = examples()
    for inputs, targets, settings, error, words in (
        (x, y, {"attack": PGD()}, ValueError, r"outside valid_range=\(0, 1\): scale them"),
        (x, y.double(), {}, ValueError, r"use targets\.long\(\)"),
        (x, y, {"loss": F.cross_entropy}, ValueError, "use reduction='none'"),
        (x, y, {"train_examples": N - 1}, ValueError, "is smaller than the 48 examples"),
        (x, y, {"batch_size": 0}, ValueError, "batch_size=0 must be at least 1"),
    ):
        with pytest.raises(error, match=words):
            Recorder(network(), inputs, targets, tmp_path / "run", **settings)
    for model, words in ((network().state_dict(), "load the weights into their network"), (len, "not a ")):
        with pytest.raises(TypeError, match=f"model must be a torch.nn.Module.*{words}"):
            Recorder(model, x, y, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_project_that_resumes_needs_its_record(tmp_path):
    """And two callbacks have two records."""

    def callbacks(*names: str) -> list[MeasureCurvature]:
        wci = {"measurements": {"wci": WeightCurvature()}}
        return [MeasureCurvature(*examples(), epochs=[0], run_dir=tmp_path / name, **wci) for name in names]

    fit(tmp_path, *callbacks("one", "two"), epochs=1)
    for name in ("one", "two"):
        assert read_table(tmp_path / name, "wci")["epoch"].tolist() == [0]
    saved = tmp_path / "epoch=0.ckpt"
    with pytest.raises(ConfigError, match=r"its checkpoint holds no record of MeasureCurvature.*another"):
        fit(tmp_path, *callbacks("another"), checkpoint=saved)
    (tmp_path / "one").rename(tmp_path / "moved")
    with pytest.raises(RecordError, match="one: does not hold the record of the 1 epochs before"):
        fit(tmp_path, *callbacks("one"), checkpoint=saved)


def test_a_data_module_does_not_stand_for_examples(tmp_path):
    with pytest.raises(ConfigError, match=r"give lambda: datamodule\.train_dataloader\(\)"):
        fit(tmp_path, MeasureCurvature(lightning.LightningDataModule()))


def test_an_error_in_the_loop_is_the_runs_status(tmp_path):
    with pytest.raises(ZeroDivisionError), Recorder(network(), *examples(), tmp_path / "run"):
        1 / 0  # noqa: B018
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], "division" in status["error"]) == ("failed", True)


class Plain(Project):
    """Without BatchNorm, whose statistics would be those of each process's part of a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()

    def train_dataloader(self) -> DataLoader:
        """The halves of a batch are its even and its odd examples."""
        data, processes = TensorDataset(*examples()), self.trainer.world_size
        part = DistributedSampler(data, processes, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=B // processes, sampler=part)


@pytest.mark.slow  # starts two processes
def test_two_processes_record_what_one_does(tmp_path):
    for name, devices in (("one", 1), ("two", 2)):
        callback = MeasureCurvature(*examples(), epochs=[0], run_dir=tmp_path / name, **SETTINGS)
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=devices,
            strategy="auto" if devices == 1 else "ddp_spawn",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        trainer.fit(Plain())
    one, two = tmp_path / "one", tmp_path / "two"
    assert read_table(two, "bounds")["batch_size"].tolist() == [B, B]
    same(one, two, {"rtol": 1e-6, "atol": 1e-9})  # the solvers may stop a product apart


def record_again(rank, folder):
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with pytest.raises(RecordError) as refusal:
        Recorder(network(), *examples(), folder / "used", group=dist.group.WORLD)
    (folder / f"{rank}.txt").write_text(str(refusal.value))


@pytest.mark.slow  # starts two processes
def test_every_process_refuses_a_used_directory(tmp_path):
    Recorder(network(), *examples(), tmp_path / "used")
    torch.multiprocessing.spawn(record_again, (tmp_path,), nprocs=2)
    for rank in range(2):
        assert "holds another record" in (tmp_path / f"{rank}.txt").read_text()
