"""Tests that several ranks, each with its share of the examples, measure the same numbers as one process."""

from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from robustdyn.measure import Measure
from robustdyn.methods import OptimizerState
from robustdyn.records import RunRecords
from robustdyn.run.config import build
from robustdyn.run.parts import build_module, measurement_plan
from tests.runs import TINY, compose, rows


def parts(cfg, records):
    lightning.seed_everything(cfg.seed, verbose=False)
    data = build(cfg, "data")
    data.prepare_data()
    plan = measurement_plan(cfg)
    measure = Measure(
        epochs=0,
        examples=cfg.measure.examples,
        inputs="adversarial",
        weights="trained",
        plan=plan,
        records=records,
    )
    return data, measure, plan


@pytest.mark.slow  # starts two processes
def test_two_ranks_measure_what_one_process_does(tmp_path):
    # 23 examples do not divide by two, and the second rank has none of the first 9. The tolerance is tight,
    # since the two may stop a product apart. PyTorch's own synchronised BatchNorm needs GPUs.
    cfg = compose(
        *TINY,
        "measure=measures",
        "trainer.max_epochs=1",
        "trainer.sync_batchnorm=false",
        "measure.examples=23",
        "measure.second_attack=9",
        "measure.eigenpairs.tolerance=1e-5",
    )
    data, measure, _ = parts(cfg, RunRecords(tmp_path))
    data.setup("fit")
    module = build_module(cfg, data)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    trainer = build(
        cfg,
        "trainer",
        devices=2,
        strategy="ddp_spawn",
        callbacks=[measure, checkpoint],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)

    data, measure, plan = parts(cfg, RunRecords(tmp_path / "unused"))
    data.setup("fit")
    module = build_module(cfg, data)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    module.load_state_dict(saved["state_dict"])  # rank 0's weights and running statistics
    group = saved["optimizer_states"][0]["param_groups"][0]
    module.last_step = OptimizerState(0.1, group["momentum"], group["weight_decay"])
    alone = SimpleNamespace(
        current_epoch=0,
        global_step=saved["global_step"],
        global_rank=0,
        is_global_zero=True,
        world_size=1,
        accumulate_grad_batches=1,
        datamodule=data,
    )
    measure._initial = saved["callbacks"]["Measure"]["initial"]
    snapshot = measure._snapshot(alone, module)
    expected = {}
    for table, row in plan.rows(snapshot, 0.0):
        if table != "costs":
            expected.setdefault(table, []).append({k: v for k, v in row.items() if k != "seconds"})
    assert {"wci", "spectrum", "measures"} <= set(expected)

    for table, wanted in expected.items():
        found = rows(tmp_path, table)
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            for name, value in theirs.items():
                # a residual is what is left at the tolerance: its own size is arbitrary below it
                if name.endswith("residual"):
                    assert abs(ours[name]) <= 1e-5 * max(abs(row[_of(name)]) for row in wanted) * 1.01
                elif isinstance(value, float):
                    # eigenvectors may differ by tolerance/gap; directions that nearly coincide by more
                    assert ours[name] == pytest.approx(value, rel=1e-2, nan_ok=True), (table, name)
                else:
                    assert ours[name] == value, (table, name)


def _of(residual):
    return {"residual": "hessian_eigenvalue", "noise_residual": "noise_eigenvalue"}[residual]
