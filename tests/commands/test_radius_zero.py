"""Adversarial training with radius 0 is standard training, bit for bit."""

import pytest
import torch

from robustdyn.records import TABLES
from tests.runs import TINY, command, rows

VARIANTS = {
    "linf": (),
    "l2, all measures": ("attack=l2", "measure=measures", "measure.measurements.measures.names=all"),
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow if "all" in name else ()) for name in VARIANTS]
)
def test_weights_optimiser_and_records_are_the_same(variant, tmp_path, monkeypatch):
    for method in ("standard", "at"):
        settings = (*TINY, *VARIANTS[variant], "attack.eps_255=0", f"method={method}", "report=false")
        assert command(monkeypatch, *settings, f"hydra.run.dir={tmp_path / method}") == 0
    standard, adversarial = (
        torch.load(tmp_path / method / "checkpoints" / "last.ckpt", weights_only=True)
        for method in ("standard", "at")
    )
    assert adversarial["state_dict"].keys() == standard["state_dict"].keys()
    network = [name for name in standard["state_dict"] if name.startswith("model.")]
    assert any("running_mean" in name for name in network)
    for name in network:
        assert torch.equal(adversarial["state_dict"][name], standard["state_dict"][name]), name
    (found,), (wanted,) = adversarial["optimizer_states"], standard["optimizer_states"]
    assert found["param_groups"] == wanted["param_groups"]
    assert wanted["state"]
    for number, state in wanted["state"].items():
        assert torch.equal(found["state"][number]["momentum_buffer"], state["momentum_buffer"])
    recorded = {path.stem for path in (tmp_path / "standard" / "records").iterdir()} & TABLES.keys()
    assert {"epochs", "spectrum", "wci", "posterior"} <= recorded
    for table in recorded - {"timing"}:
        for ours, theirs in zip(
            rows(tmp_path / "at", table), rows(tmp_path / "standard", table), strict=True
        ):
            # standard training has no adversarial images, and so records none of their metrics
            shared = {
                name: value for name, value in theirs.items() if "robust" not in name or value is not None
            }
            assert {name: ours[name] for name in shared} == shared
