import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.optimize import brentq

from robustdyn.commands.certify import _difference, main
from robustdyn.commands.replicas import main as replicas
from robustdyn.data.tensors import to_unit
from robustdyn.models import load_weights
from robustdyn.replicas import read_ensemble, read_weights
from robustdyn.run.config import build
from robustdyn.streams import generator
from tests.runs import command, compose, invoke, tiny_but

ARGUMENTS = (
    *tiny_but("measure.", "schedule.", "trainer.max_epochs", "data.train_size"),
    "trainer.max_epochs=2",
    "measure=none",
    "report=false",
    "schedule=constant",
    "data.batch_size=20",
)
HALF, WHOLE = 60, 120
ENSEMBLE = (
    "device=cpu",
    "replicas=6",
    "chunk=3",
    "steps=6",
    "learning_rate=0.01",
    "record.steps=[0,3,6]",
    "record.loss_steps=[]",
    "record.mean_steps=[3,6]",
    "start.eigenvectors=3",
    "start.attack_draws=1",
    "start.noise_batches=0",
    "start.slope_batches=0",
    "start.tolerance=1e-1",
)
SMALL = (
    "device=cpu",
    "chunk=4",
    "alpha=0.4",
    "gaussian.shift=[0,1]",
    "gaussian.scale=[1]",
    "gaussian.prior_std=[0.03,0.3]",
    "gaussian.alpha=0.3",
    "gaussian.alpha_sampling=0.2",
    "gaussian.screening.networks=6",
    "gaussian.screening.examples=8",
    "gaussian.sampling.networks=100",
    "gaussian.sampling.examples=8",
    "gaussian.test.networks=5",
    "gaussian.test.examples=8",
)
MORE = f"+run.data.train_size={WHOLE}"
INFORMED = "informed"  # the ensemble that also saw S


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    checkpoint = f"checkpoint={run_dir / 'checkpoints' / 'last.ckpt'}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, *ARGUMENTS, f"data.train_size={HALF}", f"hydra.run.dir={run_dir}") == 0
        assert invoke(replicas, monkeypatch, checkpoint, *ENSEMBLE, "record.weights=true") == 0
        output = f"output={run_dir / 'replicas' / INFORMED}"
        assert invoke(replicas, monkeypatch, checkpoint, *ENSEMBLE, MORE, output) == 0
    return run_dir


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def certify(monkeypatch, run, *arguments):
    checkpoint = f"checkpoint={run / 'checkpoints' / 'last.ckpt'}"
    return invoke(main, monkeypatch, checkpoint, *SMALL, *arguments)


def with_gaussians(run):
    return MORE, f"gaussian.replicas={run / 'replicas' / INFORMED}"


def certificate(run):
    return json.loads((run / "certificate" / "last.json").read_text())


def inverse(rate, budget):
    def kl(p):
        terms = [(rate, p), (1 - rate, 1 - p)]
        return sum(a * math.log(a / b) for a, b in terms if a > 0)

    most = 1 - 1e-15
    return 1.0 if kl(most) < budget else brentq(lambda p: kl(p) - budget, rate, most, xtol=1e-15)


def test_bounds_of_replicas_against_plain_networks_and_arithmetic_by_hand(run, monkeypatch, capsys):
    noise = "attack.steps=0"  # the random start alone, so that no rounding of a gradient's sign matters
    assert certify(monkeypatch, run, MORE, f"+run.{noise}") == 0
    said = capsys.readouterr().out
    found = certificate(run)
    own = found["replicas"]
    cfg = compose(*ARGUMENTS, noise)
    model, threat = build(cfg, "model"), build(cfg, "attack.evaluation")
    load_weights(model, run / "checkpoints" / "last.ckpt", layout="robustdyn")
    model.eval()
    parts = {"S": _difference(split(WHOLE), split(HALF))[0], "test": build(cfg, "data").split("test")}
    for name, part in parts.items():
        errors = []
        for j, theta in enumerate(np.concatenate(list(read_weights(run / "replicas" / "last")))):
            torch.nn.utils.vector_to_parameters(torch.from_numpy(theta), model.parameters())
            draws = generator(0, f"certify-replicas-{name}", j)
            adversarial = threat.perturb(model, to_unit(part.images), part.labels, draws)
            errors.append(float((model(adversarial).argmax(dim=1) != part.labels).double().mean()))
        np.testing.assert_allclose(own["errors"][name], errors, rtol=1e-12)
    n, on_s = WHOLE - HALF, own["errors"]["S"]
    assert (own["networks"], own["n"]) == (6, n)
    random, best = own["bounds"]
    np.testing.assert_allclose([random["error"], best["error"]], [np.mean(on_s), min(on_s)], rtol=1e-12)
    # each of the two has a half of alpha, and the best pays for the choice
    bounds = [
        inverse(random["error"], math.log(2 / 0.4) / n),
        inverse(best["error"], math.log(2 * 6 / 0.4) / n),
    ]
    np.testing.assert_allclose([row["risk_bound"] for row in (random, best)], bounds, rtol=1e-9)
    np.testing.assert_allclose(random["test"]["error"], np.mean(own["errors"]["test"]), rtol=1e-12)
    assert best["test"]["error"] == pytest.approx(own["errors"]["test"][int(np.argmin(on_s))])
    assert found["risk_bound"] == min(row["risk_bound"] for row in (random, best)) < 1
    assert (found["confidence"], found["gaussian"]) == (0.6, None)
    assert found["settings"]["examples"] == {"prior": HALF, "S": n, "all": WHOLE, "test": 60}
    # from where the command ran: a result that is shared tells nobody where its author keeps files
    paths = [found["settings"][key] for key in ("checkpoint", "ensemble")]
    assert paths == ["run/checkpoints/last.ckpt", "run/replicas/last"]
    held = found["held_out"]
    np.testing.assert_allclose(held["risk_bound"], inverse(held["error"], math.log(1 / 0.4) / n), rtol=1e-9)
    assert f"bound: {found['risk_bound']:.3f}; both bounds of the replicas hold with probability 0.6" in said


def test_every_term_of_the_gaussians_against_the_ensemble_and_arithmetic_by_hand(run, monkeypatch, capsys):
    assert certify(monkeypatch, run, *with_gaussians(run)) == 0
    said = capsys.readouterr().out
    found = certificate(run)["gaussian"]
    ensemble = read_ensemble(run / "replicas" / INFORMED)
    n, parameters = WHOLE - HALF, ensemble.mean_move.shape[1]
    rows = found["certificates"]
    assert [row["posterior"]["name"] for row in rows] == [
        "shift 0, scale 1",
        "shift 1, scale 1",
        "the prior itself",
    ]
    covariance = np.cov(ensemble.position[:, -1].T)
    squared = float((ensemble.mean_move[-1].astype(float) ** 2).sum())
    for row in rows:
        q, std = row["posterior"], row["posterior"]["prior_std"]
        ratio = (covariance if q["scale"] else std**2 * np.eye(3)) / std**2
        shape = 0.5 * (np.trace(ratio) - 3 - np.linalg.slogdet(ratio)[1])
        kl = q["shift"] ** 2 * squared / (2 * std**2) + shape
        np.testing.assert_allclose(row["kl"]["total"], kl, rtol=1e-6, atol=1e-12)  # the move is float32
        # two prior widths and three posteriors share the failure probabilities
        upper = inverse(row["sampled_error"], math.log(3 / 0.2) / 100)
        np.testing.assert_allclose(row["empirical_upper"], upper, rtol=1e-9)
        # for each prior there is Maurer's bound for all posteriors and Chernoff's for the prior itself
        price = math.log((2 * math.sqrt(n) if q["scale"] else 1) * 4 / 0.3) / n
        budget = kl / n + price
        np.testing.assert_allclose(row["risk_bound"], inverse(upper, budget), rtol=1e-6)
        assert row["n"] == n
        assert row["sampled_error"] * 800 == pytest.approx(round(row["sampled_error"] * 800))
        no_kl = inverse(upper, price)
        np.testing.assert_allclose(row["bound_at_zero_kl"], no_kl, rtol=1e-6)
        assert row["limited_by"] == "error on S"  # hardly trained: above one half
    assert min(row["risk_bound"] for row in rows) < 1 - 1e-6  # so that the arithmetic is tested
    assert rows[0]["kl"]["mean"] == 0 < rows[1]["kl"]["mean"]
    assert found["risk_bound"] == min(row["risk_bound"] for row in rows) == rows[found["best"]]["risk_bound"]
    assert found["confidence"] == 0.5
    assert (
        f"Gaussian posteriors: {found['risk_bound']:.3f}; all their bounds hold with probability 0.5" in said
    )

    # the replicas' law: the whole variance is the sum of those along the directions and outside
    measured = found["measured"]
    total = (ensemble.distance[:, -1] ** 2).mean() - squared
    outside = (parameters - 3) * measured["complement_std"] ** 2
    np.testing.assert_allclose(outside + np.trace(covariance), total * 6 / 5, rtol=1e-5)  # float32 moves


def split(size):
    return build(compose(*ARGUMENTS, f"data.train_size={size}"), "data").split("train")


def test_the_difference_takes_each_example_once():
    whole, half = split(WHOLE), split(HALF)
    rest, absent = _difference(whole, half)

    def prints(images):
        return sorted(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images.images)

    assert absent == 0
    assert sorted(prints(rest) + prints(half)) == prints(whole)
    assert _difference(half, whole)[1] == WHOLE - HALF
    twice = half.take(torch.tensor([0, 1, 0]))
    assert prints(_difference(twice, half.take(torch.tensor([0])))[0]) == prints(
        half.take(torch.tensor([0, 1]))
    )


@pytest.mark.slow
def test_numbers_follow_the_seed_and_not_the_chunk(run, monkeypatch):
    found = []
    for changes in ((), ("chunk=7", "batch_size=60", "engine=looped"), ("seed=1",)):
        assert certify(monkeypatch, run, *with_gaussians(run), *changes) == 0
        result = certificate(run)
        sampled = [row["sampled_error"] for row in result["gaussian"]["certificates"]]
        found.append([*sampled, *result["replicas"]["errors"]["S"]])
    assert found[0] == found[1] != found[2]


def test_an_earlier_step_and_another_attack(run, monkeypatch):
    changes = ("gaussian.step=3", "+run.attack.steps=0", "output=early.json")
    assert certify(monkeypatch, run, *with_gaussians(run), *changes) == 0
    early = json.loads((run.parent / "early.json").read_text())
    ensemble = read_ensemble(run / "replicas" / INFORMED)
    squared = float((ensemble.mean_move[0].astype(float) ** 2).sum())
    np.testing.assert_allclose(early["gaussian"]["measured"]["mean_move_norm"], math.sqrt(squared), rtol=1e-6)
    assert early["settings"]["attack"]["steps"] == 0


def refused(monkeypatch, capsys, run, *arguments):
    assert certify(monkeypatch, run, *arguments) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_certified_is_refused(run, monkeypatch, capsys):
    def said(*arguments):
        return refused(monkeypatch, capsys, run, *arguments)

    gaussian = with_gaussians(run)
    text = said()
    assert "run.data: of 60 training images the run has seen all but 0, and only the others count" in text
    assert "trained with a smaller data.train_size, such as 30" in text
    smaller = ("+run.data.train_size=100", gaussian[1])
    assert "not trained on the run's images and S together; repeat here" in said(*smaller)
    assert "step=4" in (text := said(*gaussian, "gaussian.step=4"))
    assert "it has 3, 6; run robustdyn-replicas with it among record.mean_steps" in text
    many = said(*gaussian, "gaussian.sampling.examples=61")
    assert "gaussian.sampling.examples=61 exceeds the 60 examples of S" in many
    assert "gaussian.prior_std=[0.1, 0] must be a list; each must be a positive number" in said(
        "gaussian.prior_std=[0.1,0]"
    )
    assert "gaussian.shift=1 must be a list" in said("gaussian.shift=1")
    assert "gaussian.alpha=0.99 and gaussian.alpha_sampling=0.2 must add up" in said("gaussian.alpha=0.99")
    assert "alpha=1 must lie between 0 and 1" in said("alpha=1")
    assert "no ensemble; make one with robustdyn-replicas" in said(MORE, f"replicas={run / 'checkpoints'}")
    assert "does not hold the weights of all replicas" in _without_weights(run, said)


def _without_weights(run, said):
    shutil.rmtree(run / "replicas" / "last" / "weights")
    return said(MORE)


def test_replicas_that_may_have_seen_s_are_refused(run, monkeypatch, capsys):
    said = refused(monkeypatch, capsys, run, MORE, f"replicas={run / 'replicas' / INFORMED}")
    assert "not trained on the 60 images of the run, so that they may have seen examples of S" in said


@pytest.mark.parametrize("known", [None, ["unknown"], "more"])
def test_a_checkpoint_that_may_have_seen_s_is_refused(run, monkeypatch, capsys, known):
    """Its configuration says what it was trained on last; the checkpoint says what it was ever trained on."""
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["training_images"] == [split(HALF).digest()]
    if known is None:
        del content["training_images"]
    else:
        content["training_images"] += [split(WHOLE).digest()] if known == "more" else known
    torch.save(content, path)
    settings = run / "replicas" / "last" / "settings.json"
    stored = json.loads(settings.read_text())
    stored["ensemble"]["checkpoint"] = hashlib.sha256(path.read_bytes()).hexdigest()
    settings.write_text(json.dumps(stored))
    said = refused(monkeypatch, capsys, run, MORE)
    assert "does not say that its run was trained on the 60 images of its configuration alone" in said


def test_ensembles_that_tell_too_little_are_refused(run, monkeypatch, capsys):
    folder = run / "replicas" / INFORMED
    settings = json.loads((folder / "settings.json").read_text())

    def said_with(**changes):
        text = json.dumps({**settings, "ensemble": {**settings["ensemble"], **changes}})
        (folder / "settings.json").write_text(text)
        return refused(monkeypatch, capsys, run, *with_gaussians(run))

    assert "an ensemble of another checkpoint; give gaussian.replicas=DIR" in said_with(checkpoint="0" * 64)
    assert "give an ensemble of SGD" in said_with(optimizer={"_target_": "torch.optim.Adam"})
    assert "run them with batchnorm=eval" in said_with(batchnorm="train")
    assert "no mean weights and positions of a step > 0" in said_with(**{"record.mean_steps": []})
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "chunks" / "000003.npz").unlink()
    message = refused(monkeypatch, capsys, run, *with_gaussians(run))
    assert "3 replicas are too few for a covariance of 3 directions; run" in message
    assert "run robustdyn-replicas with replicas=6" in message


@pytest.mark.parametrize("key", ["model", "data", "attack.evaluation"])
def test_a_stranger_s_run_calls_nothing_of_its_choice(run, monkeypatch, capsys, key):
    path = run / ".hydra" / "config.yaml"
    config = OmegaConf.load(path)
    config.merge_with_dotlist([f"{key}._target_=robustdyn.models.checkpoints.torch.os.system"])
    OmegaConf.save(config, path)
    assert certify(monkeypatch, run, MORE) == 1
    said = capsys.readouterr().err
    assert f"{key}._target_=robustdyn.models.checkpoints.torch.os.system is not allowed" in said


def test_a_run_of_another_version_is_refused(run, monkeypatch, capsys):
    path = run / ".hydra" / "config.yaml"
    config = OmegaConf.load(path)
    del config.data.validation_size
    OmegaConf.save(config, path)
    assert "the settings of this run lack data.validation_size, because" in refused(
        monkeypatch, capsys, run, MORE
    )


def test_examples_that_chose_the_checkpoint_are_refused(run, monkeypatch, capsys):
    """S is in the run's validation set, held out by it and not by a smaller data.train_size."""
    config = run / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("validation_size: 0", "validation_size: 1677"))
    changes = ("+run.data.train_size=null", "+run.data.validation_size=0")
    said = refused(monkeypatch, capsys, run, *changes)
    assert "examples of S were in the run's validation set" in said
