"""Tests that a GPU computes what the CPU does. Without a GPU they compare the CPU with itself.

The attack's steps follow the gradient (l2): the sign of a gradient that is zero except for rounding differs
between devices, and an l∞ step would move the pixel by a whole step. Random starts are drawn on the CPU,
because a GPU has other random numbers. TensorFloat-32 is off.
"""

import copy
import functools

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from robustdyn.attacks import PGD
from robustdyn.commands.evaluate import main as evaluate
from robustdyn.measure import Eigenpairs, measure_model
from tests.methods.fits import EXACTLY, SMALLER, WIDE, SaveWithin, fit, prepared, values
from tests.methods.test_device_waits import METHODS as STEPS
from tests.runs import command, invoke, rows

GPU = pytest.param("gpu", marks=pytest.mark.gpu)
BOTH = pytest.mark.parametrize("device", ["cpu", GPU])
SLOWER = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
PRECISIONS = pytest.mark.parametrize("precision", ["64-true", "32-true"])
L2 = ("attack=l2",)
METHODS = {
    "at": (),
    "awp": ("method=awp", "perturbation.warmup_epochs=0"),
    # where the attack starts near the image, as TRADES's does, rounding decides its first direction
    "trades": ("method=trades", "attack.train.random_start=uniform"),
}

# Of the step's length. The devices take sums in another order, and differ by some 1e-16 (6e-8) in each. The
# attack divides by a gradient's norm and BatchNorm by a standard deviation, twice in every layer, which
# enlarges that; measured on an H200 were 1e-9 in float64 after an epoch of AWP.
STEP = {"64-true": 1e-8, "32-true": 1e-2}
SEVERAL_STEPS = 5e-2  # of the way: float32, over six
# Lanczos stops at a residual of 1e-8 (1e-5) λ1. Eigenvalues are then as exact as rounding lets them be, and
# values along an eigenvector as exact as the residual over the distance to the next eigenvalue.
RESIDUAL = {"64-true": 1e-8, "32-true": 1e-5}
MEASURED = {"64-true": 1e-5, "32-true": 2e-2}
COMPARED = {
    "wci": ("wci", "hessian_trace", "weight_norm_sq"),
    "spectrum": ("hessian_eigenvalue", "gradient_noise", "noise_eigenvalue"),
}
START = PGD.start


@pytest.fixture(autouse=True)
def comparable(monkeypatch):
    """Random starts from the CPU, and no TensorFloat-32."""

    def start(attack, images, generator):
        draws = torch.Generator().manual_seed(generator.initial_seed())
        return START(attack, images.cpu(), draws).to(images.device)

    monkeypatch.setattr(PGD, "start", start)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def trained(device, *overrides, **settings):
    """Module and trainer after a run on this device."""
    return fit(*SMALLER, *overrides, accelerator=device, **settings)


def of(module):
    """Weights and statistics, on the CPU."""
    return {name: value.cpu() for name, value in values(module).items()}


def apart(found, wanted):
    """The distance of two modules, relative to the way that the second went."""
    begun = values(prepared(*SMALLER)[2])
    a, b, start = (
        torch.cat([t.double().flatten() for t in v.values()]) for v in (of(found), of(wanted), begun)
    )
    return float((a - b).norm() / (b - start).norm())


@BOTH
@PRECISIONS
@pytest.mark.parametrize("method", METHODS)
def test_a_step_and_an_evaluation_within_training(method, precision, device, record_property):
    one = {"limit_train_batches": 1, "max_epochs": 1, "precision": precision}
    found, wanted = (trained(where, *L2, *METHODS[method], **one)[0] for where in (device, "cpu"))
    difference = apart(found, wanted)
    metrics, expected = found.epoch_metrics(), wanted.epoch_metrics()
    record_property("weights", f"{difference:.1e}")
    losses = [name for name in expected if name.endswith("_loss")]
    of_losses = max(abs(metrics[name] / expected[name] - 1) for name in losses)
    record_property("losses", f"{of_losses:.1e}")
    assert difference <= STEP[precision]
    # the metrics are summed in float32
    assert of_losses <= max(STEP[precision], 1e-5)


@functools.cache
def network():
    """A network after an epoch on the CPU, and images of its training set."""
    module, trainer = fit(*SMALLER, *L2, max_epochs=1, limit_val_batches=0)
    data = trainer.datamodule
    batch = data.split("train").batch(torch.arange(24))
    return copy.deepcopy(module.model).eval(), batch.images, batch.targets


@SLOWER
@PRECISIONS
def test_a_measurement(precision, device, record_property):
    model, images, targets = network()
    dtype = torch.float64 if precision == "64-true" else torch.float32
    attack = PGD(norm="l2", eps=0.5, step_size=0.2, steps=3, random_start="uniform", batchnorm="eval")
    pairs = Eigenpairs(directions=2, tolerance=RESIDUAL[precision], max_products=200, extra_vectors=8)

    def measured(where):
        there = torch.device("cuda" if where == "gpu" else where)
        moved = copy.deepcopy(model).to(there, dtype)
        settings = {"attack": attack, "batch_size": 8, "second_attack": 8, "eigenpairs": pairs}
        return measure_model(moved, images.to(there, dtype), targets.to(there), **settings).to_frames()

    found, wanted = measured(device), measured("cpu")
    for table, columns in COMPARED.items():
        for column in columns:
            pair = zip(found[table][column], wanted[table][column], strict=True)
            difference = max(abs(a - b) / abs(b) for a, b in pair)
            record_property(column, f"{difference:.1e}")
            assert difference <= MEASURED[precision], column


@SLOWER
def test_an_evaluation(device, monkeypatch, tmp_path, record_property):
    settings = ("trainer.max_epochs=1", "measure=none", "report=false", f"hydra.run.dir={tmp_path}")
    assert command(monkeypatch, *WIDE, *SMALLER, *L2, *settings) == 0
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    quick = ("evaluation=quick", "evaluation.attacks.pgd20.steps=3", f"checkpoint={checkpoint}")

    def outcomes(where):
        there = "cuda" if where == "gpu" else where
        folder = tmp_path / f"{where}_results"
        assert invoke(evaluate, monkeypatch, *quick, f"device={there}", f"output={folder}") == 0
        return rows(folder, "outcomes")

    found, wanted = outcomes(device), outcomes("cpu")
    kept = ("evaluator", "index", "label", "prediction", "robust")
    differ = sum(any(a[key] != b[key] for key in kept) for a, b in zip(found, wanted, strict=True))
    record_property("examples that differ", f"{differ} of {len(wanted)}")
    # in float32 an example may lie so near the boundary that rounding decides
    assert differ <= len(wanted) // 60


@BOTH
def test_a_run_that_resumes_within_an_epoch_has_the_same_bits(device, tmp_path):
    path = tmp_path / "within.ckpt"
    wanted = trained(device, "trainer.max_epochs=2", callbacks=[SaveWithin(path)])[0]
    found, trainer = trained(device, "trainer.max_epochs=2", resume=path)
    assert trainer.global_step == 6
    torch.testing.assert_close(of(found), of(wanted), **EXACTLY)


@BOTH
@pytest.mark.parametrize("execution", ["default", "bf16"])
def test_two_runs_have_the_same_bits(execution, device):
    """With ``deterministic=true``, which is the default, and l∞ steps."""
    settings = (*METHODS["awp"], f"execution={execution}", "trainer.max_epochs=1")
    first, second = (trained(device, *settings)[0] for _ in range(2))
    assert first.epoch_metrics() == second.epoch_metrics()
    torch.testing.assert_close(of(first), of(second), **EXACTLY)


WAITING = STEPS | {"ema": ("averaging=ema",)}


@pytest.fixture
def no_waiting(monkeypatch):
    """Every wait of the host raises in training batches but an epoch's first and last, which are noted.

    In the first the order of the epoch goes to the GPU, and in the last the loss is checked.
    """
    batches, advance = [], _TrainingEpochLoop.advance

    def watched(loop, data_fetcher):
        within = 0 < loop.batch_idx + 1 < loop.trainer.num_training_batches - 1
        torch.cuda.set_sync_debug_mode("error" if within else "default")
        try:
            advance(loop, data_fetcher)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if within:
            batches.append(loop.batch_idx)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", watched)
    monkeypatch.setattr(PGD, "start", START)
    return batches


@pytest.mark.gpu
@pytest.mark.parametrize("case", WAITING)
def test_the_host_never_waits_within_a_step(case, no_waiting):
    trained("gpu", *WAITING[case], "data.train_size=160", "trainer.max_epochs=1", limit_val_batches=0)
    assert no_waiting == [1, 2, 3]


@pytest.mark.gpu
def test_the_host_never_waits_within_a_step_of_the_command(no_waiting, monkeypatch, tmp_path):
    """The run has all callbacks and a logger."""
    settings = ("data.train_size=160", "trainer.accelerator=gpu", "trainer.max_epochs=1")
    others = ("measure=none", "logger=csv", "report=false", f"hydra.run.dir={tmp_path}")
    assert command(monkeypatch, *WIDE, *SMALLER, *settings, *others) == 0
    assert no_waiting == [1, 2, 3]


def recorded():
    """How many CUDA graphs are kept."""
    from torch._inductor.cudagraph_trees import get_container

    def size(nodes):
        return sum(1 + sum(map(size, node.children.values())) for node in nodes)

    manager = get_container(torch.cuda.current_device()).tree_manager
    return 0 if manager is None else sum(map(size, manager.roots.values()))


GRAPHS = ("execution=compiled", "execution.compile=reduce-overhead", "trainer.max_epochs=2")


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda_graphs_compute_the_same(method, record_property):
    """Generated code contracts products and sums; the runs then differ by rounding, grown over six steps."""
    found, wanted = (
        trained("gpu", *L2, *METHODS[method], *settings)[0]
        for settings in (GRAPHS, ("trainer.max_epochs=2",))
    )
    torch.compiler.reset()
    difference = apart(found, wanted)
    record_property("weights", f"{difference:.1e}")
    assert 0 < difference <= SEVERAL_STEPS


@pytest.mark.gpu
def test_an_attack_has_one_graph_however_many_steps_it_takes(record_property):
    counts = []
    for steps in (2, 6):
        kept = trained("gpu", *GRAPHS, f"attack.steps={steps}", limit_val_batches=0)
        counts.append(recorded())
        del kept
        torch.compiler.reset()
    record_property("graphs", str(counts))
    assert counts[0] == counts[1] > 0


def test_the_tolerances_are_far_from_what_a_wrong_result_gives():
    """A step with another radius differs more than the devices may."""
    one = {"limit_train_batches": 1, "max_epochs": 1, "limit_val_batches": 0}
    usual, other = (trained("cpu", *L2, *more, **one)[0] for more in ((), ("attack.steps=1",)))
    assert apart(other, usual) > 2 * STEP["32-true"]
