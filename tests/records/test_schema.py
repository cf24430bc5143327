import ast
from pathlib import Path

import pytest

from robustdyn.records import TABLES, schema
from robustdyn.records.columns import Table
from robustdyn.records.schema import EPOCHS, table

BELOW = {"attacks", "complexity", "curvature", "data", "methods", "models", "theory"}

DESIGN = {
    "epochs": "epoch step lr train_robust_loss train_robust_error train_clean_loss train_clean_error "
    "test_robust_loss test_robust_error test_clean_loss test_clean_error robust_loss_gap "
    "robust_error_gap seconds",
    "wci": "epoch step wci wci_se weight_norm_sq hessian_trace hessian_trace_se hessian_trace_all "
    "cauchy_schwarz_bound clamped_layers hvps examples batchnorm estimator seconds",
    "layers": "epoch layer numel weight_norm_sq hessian_trace hessian_trace_se wci_term optimal_variance",
    "spectrum": "epoch index hessian_eigenvalue residual curvature curvature_se gradient_noise "
    "gradient_noise_se attack_noise noise_eigenvalue "
    "stable posterior_variance_stationary curvature_term log_variance_term",
    "slopes": "epoch step index distance refreshed_slope refreshed_slope_se "
    "refreshed_slope_ratio refreshed_slope_ratio_se",
    "rates": "epoch step lr",
    "posterior": "epoch step index posterior_variance posterior_variance_independent "
    "posterior_variance_stationary",
    "alignment": "epoch commutator subspace_overlap total_correlation",
    "measures": "epoch step measure value value_se gradients undefined seconds",
    "costs": "epoch step part products converged warm seconds",
    "timing": "epoch step images_per_second attack_share step_share data_share evaluation_share "
    "measurement_share seconds",
    "catoni": "epoch step empirical_loss empirical_loss_se curvature kl_mean kl_trace kl_log_determinant "
    "kl_total_correlation kl kl_over_beta confidence complexity total total_se beta prior_variance "
    "loss_range alpha directions parameters covers curvature_se negative_curvature kl_se "
    "vacuous noise_free_parameters",
    "curvature_cells": "epoch step cell directions curvature gradient_noise gradient_noise_se "
    "posterior_variance",
    "density": "epoch kind probe index ritz_value mass",
    "whole_space": "epoch step hessian_trace hessian_trace_se hessian_squared_norm hessian_squared_norm_se "
    "hessian_negative_trace hessian_negative_trace_truncation negative_share negative_share_se "
    "negative_share_resolution noise_trace noise_trace_se noise_share_nonpositive noise_share_unstable "
    "curvature_term_positive_stable curvature_term_positive_stable_se "
    "curvature_term_positive_stable_truncation products seconds",
    "bounds": "epoch step tracked_directions unstable_directions curvature_term_top_k "
    "log_variance_term_top_k dominant_terms_top_k",
}


def test_every_table_of_the_design_has_its_columns():
    assert set(TABLES) == set(DESIGN)
    for name, columns in DESIGN.items():
        assert set(columns.split()) <= set(TABLES[name].names), name


@pytest.mark.parametrize("spec", TABLES.values(), ids=lambda spec: spec.name)
def test_columns_are_described_once(spec):
    assert len(set(spec.names)) == len(spec.names)
    assert set(spec.key) <= set(spec.required)
    for column in spec.columns:
        assert column.label, column
        assert column.meaning, column
        assert "\n" not in column.meaning


def test_errors_are_fractions_shown_in_per_cent():
    assert (EPOCHS["test_robust_error"].unit, EPOCHS["test_robust_error"].scale) == ("fraction", 100.0)
    assert EPOCHS["test_robust_error"].shown == "test robust error (%)"
    assert EPOCHS["robust_error_gap"].shown_unit == "percentage points"
    assert EPOCHS["test_robust_loss"].scale == 1.0


def test_metrics_say_which_direction_is_better():
    directions = {c.name: c.better for spec in TABLES.values() for c in spec.columns}
    assert all(directions[name] == "lower" for name in ("test_robust_error", "robust_loss_gap", "wci"))
    assert directions["lr"] is None


def test_truncations_say_so():
    sums = [c for c in TABLES["bounds"].columns if c.kind == "float"]
    assert all(c.name.removesuffix("_se").endswith("_top_k") for c in sums)
    assert all("top k" in c.meaning for c in sums if not c.name.endswith("_se"))
    assert "what covers names" in TABLES["catoni"]["total"].meaning


def test_an_unknown_table_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown table 'epoch': known are epochs, rates, wci"):
        table("epoch")
    with pytest.raises(KeyError, match="no column 'lrr'"):
        EPOCHS["lrr"]


def test_the_shared_names_of_columns_are_spelled_in_the_schema_only():
    """Packages below the records cannot import them."""
    columns = {name for table in vars(schema).values() if isinstance(table, Table) for name in table.names}
    shared = {
        value
        for key, value in vars(schema).items()
        if key.isupper() and isinstance(value, str) and value in columns
    }
    assert len(shared) > 20
    package = Path(schema.__file__).parents[1]
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] in BELOW or path == Path(schema.__file__):
            continue
        texts = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not shared & texts, path
