"""Writes synthetic run directories: plausible 40-epoch runs with two decays and robust overfitting."""

import json
from pathlib import Path

import numpy as np

from robustdyn.measure import POSTERIOR_TABLES, posterior_rows
from robustdyn.records import RunRecords, read_table, summarise
from robustdyn.records.schema import CATONI

DECAYS = (20, 32)
RATES = (0.1, 0.01, 0.001)
MEASURED = (0, 5, 10, 15, 18, 20, 22, 25, 30, 35, 39)
LAYERS = ("conv1", *(f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)), "linear")
OVERFITTING = {"at": 1.0, "awp": 0.25, "wci_lr": 0.5}


def config(method="at", seed=0, **changed):
    sections = {
        "seed": seed,
        "experiment_name": f"{method}_{seed}",
        "data": {
            "_target_": "robustdyn.data.Digits",
            "batch_size": 32,
            "train_size": 300,
            "root": f"/data/{seed}",
            "seed": "${seed}",
        },
        "model": {"_target_": "robustdyn.models.PreActResNet", "width": 16, "blocks": [2, 2, 2, 2]},
        "attack": {"norm": "linf", "eps_255": 51, "step_255": 12.75, "steps": 10},
        "objective": {"_target_": "robustdyn.methods.AdversarialCrossEntropy", "label_smoothing": 0.0},
        "perturbation": {},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"_target_": "robustdyn.methods.Piecewise", "milestones": list(DECAYS), "factor": 0.1},
        "measure": {"epochs": "every 5", "examples": 256},
        "trainer": {
            "_target_": "lightning.Trainer",
            "max_epochs": 40,
            "default_root_dir": "${hydra:runtime.output_dir}",
        },
    }
    if method == "awp":
        sections["perturbation"] = {"_target_": "robustdyn.methods.AWP", "gamma": 0.01}
    for key, value in changed.items():
        section, _, leaf = key.rpartition("__")
        (sections[section] if section else sections)[leaf] = value
    return sections


def write_hydra(path, settings, overrides=(), choices=None):
    folder = Path(path) / ".hydra"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (folder / "overrides.yaml").write_text(json.dumps(list(overrides)))
    (folder / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices or {}}}}))


def rate(epoch):
    return RATES[sum(epoch >= decay for decay in DECAYS)]


def epoch_rows(rng, method, epochs):
    strength = OVERFITTING[method]
    for epoch in range(epochs):
        after = max(0, epoch - DECAYS[0] + 1)
        train = (
            2.3 * np.exp(-epoch / 9) * 0.6
            + 0.75
            - (0.15 if after else 0)
            - strength * 0.33 * (1 - np.exp(-after / 8))
        )
        test = (
            2.3 * np.exp(-epoch / 7) * 0.6
            + 0.95
            - (0.08 if after else 0)
            + strength * 0.25 * (1 - np.exp(-after / 9))
        )
        train, test = train + 0.01 * rng.normal(), test + 0.02 * rng.normal()
        row = {"epoch": epoch, "step": 10 * (epoch + 1), "lr": rate(epoch), "seconds": 0.9}
        for split, loss in (("train", train), ("test", test)):
            row |= {
                f"{split}_robust_loss": loss,
                f"{split}_robust_error": float(np.clip(loss / 2.8, 0, 0.9)),
                f"{split}_clean_loss": loss / 3,
                f"{split}_clean_error": float(np.clip(loss / 14, 0, 0.9)),
            }
        row["robust_loss_gap"] = test - train
        row["robust_error_gap"] = row["test_robust_error"] - row["train_robust_error"]
        yield row


def measure(records, rng, method, epoch, directions):
    strength = OVERFITTING[method]
    growth = 1.0 + 3.0 * strength * (1 - np.exp(-max(0, epoch - DECAYS[0] + 1) / 8))
    stamp = {"epoch": epoch, "step": 10 * (epoch + 1)}
    measure_curvature(records, rng, stamp, growth)
    measure_spectrum(records, rng, stamp, growth, directions)
    measure_density(records, rng, stamp, growth)
    measure_bound(records, stamp, growth)


def measure_curvature(records, rng, stamp, growth):
    shares = np.linspace(2.0, 0.5, len(LAYERS))
    norms = 40 * shares * np.exp(-stamp["epoch"] / 60) + 5
    traces = 3.0 * shares[::-1] * growth * rng.uniform(0.85, 1.15, len(LAYERS))
    terms = np.sqrt(norms * traces)
    wci = {
        "wci": terms.sum(),
        "wci_se": 0.04 * terms.sum(),
        "weight_norm_sq": norms.sum(),
        "hessian_trace": traces.sum(),
        "hessian_trace_se": 0.07 * traces.sum(),
        "hessian_trace_all": 1.2 * traces.sum(),
        "cauchy_schwarz_bound": np.sqrt(norms.sum() * traces.sum()),
        "clamped_layers": 0,
        "hvps": 10,
        "examples": 256,
        "batchnorm": "eval",
        "estimator": "gauss_newton_exact",
        "seconds": 0.4,
    }
    records.append("wci", stamp | wci)
    rows = []
    for layer, norm, trace, term in zip(LAYERS, norms, traces, terms, strict=True):
        row = {
            "layer": layer,
            "numel": 100,
            "weight_norm_sq": norm,
            "hessian_trace": trace,
            "hessian_trace_se": 0.1 * trace,
            "wci_term": term,
            "optimal_variance": np.sqrt(norm / trace),
        }
        rows.append(stamp | row)
    records.extend("layers", rows)


def measure_spectrum(records, rng, stamp, growth, directions):
    i = np.arange(directions)
    values = 20 * growth * np.exp(-i / 3) * rng.uniform(0.9, 1.1, directions)
    noise = 0.02 * growth * np.exp(-i / 2) * rng.uniform(0.8, 1.2, directions)
    eta, mu = rate(stamp["epoch"]), 0.9
    stable = eta * values < 2 * (1 + mu)
    variance = (
        eta * noise * (1 + mu) / (values * (1 - mu) * np.where(stable, 2 * (1 + mu) - eta * values, np.nan))
    )
    curvature, log_variance, rows = values * variance, -np.log(variance), []
    for j in i:
        row = {
            "index": j,
            "hessian_eigenvalue": values[j],
            "residual": 0.02 * values[j],
            "curvature": values[j],
            "curvature_se": 0.05 * values[j],
            "gradient_noise": noise[j],
            "gradient_noise_se": 0.1 * noise[j],
            "attack_noise": 0.2 * noise[j],
            "noise_eigenvalue": 1.3 * noise[j],
            "noise_residual": 0.01 * noise[j],
            "posterior_variance_stationary": variance[j],
            "stable": stable[j],
            "curvature_term": curvature[j],
            "log_variance_term": log_variance[j],
        }
        rows.append(stamp | row)
    records.extend("spectrum", rows)
    sums = {
        "train_examples": 1280,
        "batch_size": 128,
        "tracked_directions": directions,
        "unstable_directions": (~stable).sum(),
        "curvature_term_top_k": np.nansum(curvature),
        "log_variance_term_top_k": np.nansum(log_variance),
        "dominant_terms_top_k": np.nansum(curvature + log_variance),
        "best_rate_top_k": 0.2 * directions / noise.sum(),
        "best_rate_top_k_se": 0.02 * directions / noise.sum(),
    }
    records.append("bounds", stamp | sums)
    measure_alignment(records, rng, stamp, directions)


def measure_alignment(records, rng, stamp, directions):
    commutator, correlation = rng.uniform(0.1, 0.2), rng.uniform(0.3, 0.5) if stamp["epoch"] else np.nan
    row = {
        "tracked_directions": directions,
        "commutator": commutator,
        "commutator_se": 0.01,
        "commutator_null": 0.04,
        "commutator_null_spread": 0.008,
        "cosine": rng.uniform(0.7, 0.9),
        "cosine_se": 0.03,
        "subspace_overlap": rng.uniform(0.5, 0.8),
        "captured_noise": rng.uniform(0.6, 0.9),
        "total_correlation": correlation,
        "total_correlation_se": 0.05,
        "total_correlation_null": 0.1 if stamp["epoch"] else np.nan,
        "total_correlation_null_spread": 0.02,
        "examples": 256,
    }
    records.append("alignment", stamp | row)


def measure_density(records, rng, stamp, growth, probes=3, parameters=2000):
    """Write a spectrum with a bulk around zero and outliers, along which most of the noise lies."""
    bulk = np.concatenate([-np.geomspace(0.5, 1e-3, 8), np.geomspace(1e-3, 2.0, 10)])
    outliers = 20 * growth * np.exp(-np.arange(5) / 3)[::-1]
    counts = np.concatenate([np.geomspace(10, 800, 8), np.geomspace(900, 10, 10), np.ones(5)])
    counts *= parameters / counts.sum()
    noise = np.concatenate([1e-4 * counts[:8], 2e-4 * counts[8:18], 0.05 * growth * np.geomspace(0.1, 1, 5)])
    for kind, masses in (("hessian", counts), ("noise", noise)):
        for probe in range(probes):
            nodes = np.concatenate([bulk * rng.uniform(0.8, 1.25, len(bulk)), outliers])
            rows = [
                {"kind": kind, "probe": probe, "index": i, "ritz_value": nodes[j], "mass": m}
                for i, (j, m) in enumerate(
                    zip(np.argsort(nodes), masses * rng.uniform(0.7, 1.3, len(masses)), strict=True)
                )
            ]
            records.extend("density", [stamp | row for row in rows])
    row = {
        "hessian_trace": outliers.sum() + 60 * growth,
        "hessian_negative_trace": -30 * growth,
        "hessian_squared_norm": 1.1 * (outliers**2).sum(),
        "negative_share": 0.4,
        "noise_trace": noise.sum(),
        "noise_share_nonpositive": 0.05,
        "noise_share_unstable": 0.0,
        "curvature_term_positive_stable": 0.5 * rate(stamp["epoch"]) * noise.sum() / 0.1,
    }
    row |= {f"{name}_se": 0.1 * abs(value) for name, value in row.items()}
    row |= {
        f"{name}_truncation": 0.01 for name in ("hessian_negative_trace", "curvature_term_positive_stable")
    }
    row |= {"negative_share_resolution": 0.3}
    records.append("whole_space", stamp | row | {"products": 6 * 23, "seconds": 0.7})


def measure_bound(records, stamp, growth, parameters=2000):
    """Write a bound that is vacuous as soon as the network overfits."""
    kl = 900.0 * growth
    row = {"empirical_loss": 1.0, "curvature": 0.02 * growth, "kl_over_beta": kl / 300, "kl": kl}
    row |= {"confidence": 0.02, "complexity": 0.3}
    total = sum(value for name, value in row.items() if name != "kl")
    row |= {"total": total, "total_se": 0.1, "loss_range": 5.0, "vacuous": total >= 5, "beta": 300.0}
    row |= {"parameters": parameters, "directions": parameters, "covers": f"all {parameters} parameters"}
    records.append("catoni", dict.fromkeys(CATONI.required) | stamp | row)


def rate_rows(epochs):
    """The ``rates`` rows of a run: one for each change of the learning rate."""
    changed = epochs["lr"].diff().fillna(1.0) != 0
    starts = epochs["step"].shift(fill_value=0)
    return [
        {"epoch": epoch, "step": start, "lr": lr}
        for epoch, start, lr in zip(
            epochs["epoch"][changed], starts[changed], epochs["lr"][changed], strict=True
        )
    ]


def write_run(path, method="at", seed=0, *, epochs=40, measured=MEASURED, directions=6, **changed):
    """Write a finished run directory and return its path."""
    path = Path(path)
    rng = np.random.default_rng([seed, list(OVERFITTING).index(method)])
    write_hydra(
        path, config(method, seed, **changed), [f"method={method}", f"seed={seed}"], {"method": method}
    )
    records = RunRecords(path)
    records.extend("epochs", epoch_rows(rng, method, epochs))
    for epoch in measured:
        if epoch < epochs:
            measure(records, rng, method, epoch, directions)
    records.extend("rates", rate_rows(read_table(path, "epochs")))
    tables = {name: read_table(path, name) for name in POSTERIOR_TABLES}
    rows = posterior_rows(tables, momentum=0.9, weight_decay=5e-4, interpolation="log_linear")
    records.replace("posterior", rows)
    records.write_summary(summarise(tables["epochs"]))
    environment = {"python": "3.11", "packages": {"robustdyn": "0.1.0", "torch": "2.6.0"}, "device": "cpu"}
    (path / "environment.json").write_text(json.dumps(environment))
    return path


def write_sweep(path, methods=("at", "awp", "wci_lr"), seeds=(0,), **options):
    """Write a sweep directory with one run per method and seed, and return its path."""
    path = Path(path)
    for job, (method, seed) in enumerate((m, s) for m in methods for s in seeds):
        write_run(path / f"{job}_{method}_{seed}", method, seed, **options)
    return path
