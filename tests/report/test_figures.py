import itertools

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from robustdyn.records import find_runs
from robustdyn.report import style
from robustdyn.report.figures import FIGURES
from robustdyn.report.plotting import Cast, label_ends, log_axis, mark_decays, named
from robustdyn.studies.shared.comparison_figures import draw_over_epochs, setting_colours
from tests.records.synthetic import DECAYS, LAYERS, write_run, write_sweep
from tests.report.conftest import frames_of

SPECS = {spec.name: spec for spec in FIGURES}
PANELS = {
    "robust_loss": 2,
    "robust_error": 2,
    "learning_rate": 1,
    "wci_and_gap": 3,
    "norm_and_trace": 3,
    "layer_terms": 1,
    "spectrum": 4,  # the fourth is the colour bar
    "posterior_variance": 5,
    "bound_terms": 3,
    "best_rate": 1,
    "whole_bound": 3,
}


def draw(name, frames, **changes):
    return SPECS[name].draw({**frames, **changes})


def curves(ax):
    """Lines over epochs: not decay marks, not single points."""
    return [line for line in ax.lines if len(line.get_xdata()) > 2]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


@pytest.mark.parametrize("name", PANELS)
def test_every_figure_has_its_panels_labels_and_decays(name, one_frames):
    figure = draw(name, one_frames)
    figure.draw_without_rendering()  # every text can be set
    assert len(figure.axes) == PANELS[name]
    assert figure.get_suptitle()
    for ax in figure.axes:
        assert ax.get_ylabel() or name == "layer_terms"
    over_epochs = [ax for ax in figure.axes if ax.get_xlabel() == "epoch"]
    for ax in over_epochs:
        assert [t for t in texts(ax) if t.startswith("η")] == ["η → 0.01", "η → 0.001"]
        marks = [line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1]]
        assert sorted(set(marks)) == list(DECAYS)


def test_the_bound_says_whether_it_is_vacuous(one_frames):
    catoni = one_frames["catoni"]
    figure = draw("whole_bound", one_frames)
    said = f"vacuous at {catoni['vacuous'].sum()} of {len(catoni)} measured epochs"
    assert figure.get_suptitle() == f"Catoni's bound over all parameters: {said}"
    ceiling, total = curves(figure.axes[0])
    np.testing.assert_allclose(ceiling.get_ydata(), 5.0)
    np.testing.assert_allclose(total.get_ydata(), catoni["total"])
    for flag, words in ((True, "at every epoch"), (False, "at no epoch")):
        title = draw("whole_bound", one_frames, catoni=catoni.assign(vacuous=flag)).get_suptitle()
        assert title.endswith(f"vacuous {words}")


def test_one_run_is_told_apart_by_colour_and_labelled_at_its_ends(one_frames):
    figure = draw("robust_loss", one_frames)
    left, right = figure.axes
    assert {"train", "test"} <= set(texts(left))
    assert [line.get_color() for line in curves(left)] == [style.TRAIN, style.TEST]
    assert not figure.legends
    recorded = one_frames["epochs"]
    np.testing.assert_array_equal(curves(left)[1].get_ydata(), recorded["test_robust_loss"])
    np.testing.assert_array_equal(curves(right)[0].get_ydata(), recorded["robust_loss_gap"])
    low = recorded["test_robust_loss"].min()
    assert f"lowest test: {low:.3f}" in left.get_title(loc="left")


def test_errors_are_shown_in_per_cent(one_frames):
    left, right = draw("robust_error", one_frames).axes
    np.testing.assert_allclose(curves(left)[1].get_ydata(), 100 * one_frames["epochs"]["test_robust_error"])
    assert left.get_ylabel() == "robust error (%)"
    assert right.get_ylabel() == "gap (percentage points)"


def test_a_validation_split_gets_its_line(one_frames):
    epochs = one_frames["epochs"].assign(validation_robust_loss=1.0)
    assert "validation" in texts(draw("robust_loss", one_frames, epochs=epochs).axes[0])


def test_seeds_share_a_hue_and_their_mean_is_bold(seeds_frames):
    figure = draw("robust_loss", seeds_frames)
    lines = [line for line in curves(figure.axes[0]) if line.get_color() == style.TEST]
    assert sorted(line.get_linewidth() for line in lines) == [0.8, 0.8, 2.4]
    mean = max(lines, key=lambda line: line.get_linewidth())
    expected = seeds_frames["epochs"].groupby("epoch")["test_robust_loss"].mean()
    np.testing.assert_allclose(mean.get_ydata(), expected)
    assert legend(figure) == ["mean of 2 seeds", "single seeds"]


def test_the_mean_stops_where_a_seed_does(tmp_path):
    write_run(tmp_path / "a", seed=0, epochs=10, measured=())
    write_run(tmp_path / "b", seed=1, epochs=6, measured=())
    figure = draw("learning_rate", frames_of(tmp_path))
    (mean,) = [line for line in curves(figure.axes[0]) if line.get_linewidth() == 2.4]
    assert mean.get_xdata().max() == 5


def test_methods_have_a_colour_each_and_splits_a_dash(methods_frames):
    figure = draw("robust_loss", methods_frames)
    bold = [line for line in curves(figure.axes[0]) if line.get_linewidth() >= 2.4]
    assert [line.get_linestyle() for line in bold] == ["--"] * 3 + ["-"] * 3
    assert [line.get_color() for line in bold] == list(style.PALETTE[:3]) * 2
    assert legend(figure)[:3] == [f"method={m} (mean of 2 seeds)" for m in ("at", "awp", "wci_lr")]
    assert {"train", "test", "single seeds"} <= set(legend(figure))
    assert not {"train", "test"} & set(texts(figure.axes[0]))


def test_wci_and_gap_share_their_epochs(one_frames):
    top, bottom, scatter = draw("wci_and_gap", one_frames).axes
    assert top.get_xlim() == bottom.get_xlim()
    assert top.collections  # the band of ±1 s.e.
    assert any(text.startswith("r = ") and "(11 points)" in text for text in texts(scatter))
    measured = one_frames["epochs"].set_index("epoch").loc[one_frames["wci"]["epoch"], "robust_loss_gap"]
    np.testing.assert_array_equal(curves(scatter)[0].get_xdata(), one_frames["wci"]["wci"])
    np.testing.assert_array_equal(curves(scatter)[0].get_ydata(), measured)


def test_the_bound_is_above_the_wci(one_frames):
    wci, bound = curves(draw("norm_and_trace", one_frames).axes[2])
    assert (bound.get_ydata() >= wci.get_ydata()).all()
    assert bound.get_linestyle() == "--"


def test_truncated_sums_say_top_k(one_frames):
    figure = draw("bound_terms", one_frames)
    assert "top 6 directions" in figure.get_suptitle()
    assert all("top 6" in ax.get_ylabel() for ax in figure.axes)


def test_a_line_per_direction_on_a_log_axis(one_frames):
    for ax in draw("spectrum", one_frames).axes[:3]:
        assert len(curves(ax)) == 6
        assert ax.get_yscale() == "log"


def test_negative_eigenvalues_are_open_circles(one_frames):
    spectrum = one_frames["spectrum"].copy()
    spectrum.loc[(spectrum["index"] == 5) & (spectrum["epoch"] < 12), "hessian_eigenvalue"] = -0.5
    ax = draw("spectrum", one_frames, spectrum=spectrum).axes[0]
    (circles,) = [line for line in ax.lines if line.get_fillstyle() == "none" and len(line.get_xdata())]
    assert list(circles.get_xdata()) == [0, 5, 10]
    assert list(circles.get_ydata()) == [0.5] * 3


def test_the_parts_of_the_variance_are_drawn_where_they_matter(one_frames):
    """The first decay is at epoch 20: nothing is propagated before it, and in the end next to nothing."""
    posterior = one_frames["posterior"]
    axes = draw("posterior_variance", one_frames).axes
    assert [ax.get_title(loc="left") for ax in axes[2:4]] == ["of it, propagated", "of it, injected"]
    leading = posterior[posterior["index"] == 0]
    for ax, part in zip(axes[2:4], ("propagated_variance", "injected_variance"), strict=True):
        drawn = leading[part].where(leading[part] > 1e-3 * leading["posterior_variance"])
        np.testing.assert_array_equal(curves(ax)[0].get_ydata(), drawn)
        assert drawn.notna().any()
    line = curves(axes[2])[0].get_ydata()
    assert np.isnan(line[: DECAYS[0]]).all()
    assert np.isfinite(line[list(DECAYS)]).all()


def test_a_record_without_the_parts_of_the_variance_has_no_panels_of_them(one_frames):
    parts = ["propagated_variance", "injected_variance"]
    older = one_frames["posterior"].assign(**dict.fromkeys(parts, np.nan))
    assert len(draw("posterior_variance", one_frames, posterior=older).axes) == 3


def test_layers_are_rows_in_network_order(methods_frames):
    figure = draw("layer_terms", methods_frames)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(LAYERS)
    filled = [line for line in figure.axes[0].lines if line.get_fillstyle() == "full"]
    last = (
        methods_frames["layers"].query("epoch == 39 and method == 'at'").groupby("layer")["wci_term"].mean()
    )
    np.testing.assert_allclose(filled[0].get_xdata(), last[list(LAYERS)])
    layers = methods_frames["layers"]
    late = draw("layer_terms", methods_frames, layers=layers[layers["epoch"] >= DECAYS[0]])
    # of lines with data: nothing was measured before a decay
    assert {line.get_fillstyle() for line in late.axes[0].lines if len(line.get_xdata())} == {"full"}


def test_alignment_is_drawn_when_measured(one_frames):
    axes = draw("alignment", one_frames).axes
    assert len(axes) == 3
    for ax, name in zip(axes, ("commutator", None, "total_correlation"), strict=True):
        if name:  # beside the measured line the one that sampling noise alone would give
            dotted, measured = (line.get_ydata() for line in ax.lines[:2])
            rows = one_frames["alignment"].dropna(subset=[name])
            np.testing.assert_allclose(dotted, rows[f"{name}_null"])
            np.testing.assert_allclose(measured, rows[name])


def spectral(frames, **changes):
    figure = draw("spectral_density", frames, **changes)
    columns = len(figure.axes) // 2
    return figure, figure.axes[:columns], figure.axes[columns:]


def drawn(ax, style="-"):
    return [line for line in ax.lines if line.get_linestyle() == style]


def test_spectral_densities_count_eigenvalues_and_noise(one_frames):
    figure, hessian, noise = spectral(one_frames)
    assert [ax.get_title(loc="left") for ax in hessian] == [
        "first measurement, epoch 0",
        "before the first decay, epoch 18",
        "last measurement, epoch 39",
    ]
    density = one_frames["density"]
    for panels, kind in ((hessian, "hessian"), (noise, "noise")):
        for ax, epoch in zip(panels, (0, 18, 39), strict=True):
            (line,) = drawn(ax)
            linear = ax.xaxis.get_transform().linear_width
            places = np.arcsinh(line.get_xdata() / linear) / np.log(10)
            rows = density[(density["kind"] == kind) & (density["epoch"] == epoch)]
            # the area is the mass, but for the 0.6 % of a Gaussian that lies beyond 2.5 widths at either end
            area = np.trapezoid(line.get_ydata(), places)
            assert area == pytest.approx(rows["mass"].sum() / rows["probe"].nunique(), rel=7e-3)
            left, right = ax.get_xlim()
            assert left < rows["ritz_value"].min() < rows["ritz_value"].max() < right
            assert ax.get_yscale() == "log"
            assert ax.collections  # the band of ±1 s.e.
        assert panels[0].get_ylabel()
        assert [len(drawn(ax, "--")) for ax in panels] == [0, 1, 1]
        np.testing.assert_array_equal(drawn(panels[2], "--")[0].get_ydata(), drawn(panels[0])[0].get_ydata())
    assert legend(figure) == ["first measurement"]


def test_spectral_densities_of_methods_are_means_of_their_seeds(methods_frames):
    figure, hessian, _ = spectral(methods_frames)
    assert [line.get_color() for line in drawn(hessian[0])] == list(style.PALETTE[:3])
    assert legend(figure) == [f"method={m} (mean of 2 seeds)" for m in ("at", "awp", "wci_lr")]
    density = methods_frames["density"]
    awp = {"density": density[density["method"] == "awp"]}
    alone = drawn(spectral(methods_frames, **awp)[1][2])
    np.testing.assert_allclose(alone[0].get_ydata().max(), drawn(hessian[2])[1].get_ydata().max(), rtol=0.1)


def test_moments_that_are_one_and_the_same_are_drawn_once(one_frames):
    density = one_frames["density"]
    _, panels, _ = spectral(one_frames, density=density[density["epoch"] == 39])
    assert [ax.get_title(loc="left") for ax in panels] == ["last measurement, epoch 39"]
    _, panels, _ = spectral(one_frames, density=density[density["epoch"].isin([5, 39])])
    assert [ax.get_title(loc="left") for ax in panels] == [
        "first measurement, epoch 5",
        "last measurement, epoch 39",
    ]


def test_a_spectrum_on_one_side_of_zero_is_drawn(one_frames):
    density = one_frames["density"].query("ritz_value > 0")
    _, panels, _ = spectral(one_frames, density=density)
    assert all(drawn(ax) for ax in panels)


def test_decays_of_single_groups_are_coloured_not_labelled(methods_frames):
    epochs = methods_frames["epochs"].copy()
    epochs.loc[epochs["method"] == "at", "lr"] = 0.1
    epochs.loc[(epochs["method"] == "at") & (epochs["epoch"] >= 10), "lr"] = 0.01
    ax = draw("learning_rate", methods_frames, epochs=epochs).axes[0]
    assert [t for t in texts(ax) if t.startswith("η")] == ["η → 0.01", "η → 0.001"]  # of the other two
    assert {line.get_color() for line in ax.lines if list(line.get_ydata()) == [0, 1]} == set(
        style.PALETTE[:3]
    )


def test_a_decay_that_some_groups_share_is_labelled(methods_frames):
    """A method with a schedule of its own does not take the label from the others' decay."""
    epochs = methods_frames["epochs"].copy()
    epochs["lr"] = 0.1
    epochs.loc[epochs["epoch"] >= 5, "lr"] = 0.01
    epochs.loc[(epochs["method"] != "at") & (epochs["epoch"] >= 12), "lr"] = 0.001
    ax = draw("learning_rate", methods_frames, epochs=epochs).axes[0]
    assert [t for t in texts(ax) if t.startswith("η")] == ["η → 0.01", "η → 0.001"]


def test_equal_curves_of_two_groups_both_show(methods_frames):
    epochs = methods_frames["epochs"].copy()
    epochs["test_robust_loss"] = epochs["epoch"] / 10.0
    ax = draw("robust_loss", methods_frames, epochs=epochs).axes[0]
    widths = {
        line.get_color(): line.get_linewidth()
        for line in ax.lines
        if len(line.get_ydata()) > 2 and line.get_linestyle() == "-"
    }
    assert len(set(widths.values())) == len(widths) > 1


def test_a_decay_to_several_rates_is_labelled_without_one(methods_frames):
    """A rate that follows the index decays when the others do, but to a rate of its own."""
    epochs = methods_frames["epochs"].copy()
    epochs["lr"] = 0.1
    after = epochs["epoch"] >= 10
    epochs.loc[after, "lr"] = 0.01
    ax = draw("learning_rate", methods_frames, epochs=epochs).axes[0]
    assert [t for t in texts(ax) if t.startswith("η")] == ["η → 0.01"]
    epochs.loc[after & (epochs["method"] == "at"), "lr"] = 0.006
    ax = draw("learning_rate", methods_frames, epochs=epochs).axes[0]
    assert [t for t in texts(ax) if t.startswith("η")] == ["η falls"]


@pytest.mark.slow  # renders figures of many runs
def test_more_runs_than_colours_get_shades(tmp_path):
    for i in range(10):
        write_run(tmp_path / str(i), perturbation__strength=i, epochs=4, measured=())
    frames = frames_of(tmp_path)
    assert len(set(Cast.of(named(frames["epochs"])).colours.values())) == len(find_runs(tmp_path)) == 10
    draw("robust_loss", frames)


def test_frames_without_labels_are_one_run(one_frames):
    bare = one_frames["epochs"].drop(columns=["run", "group"])
    assert len(curves(draw("robust_loss", one_frames, epochs=bare).axes[0])) == 2


def test_missing_tables_are_said(tmp_path):
    write_sweep(tmp_path, ("at",), epochs=3, measured=())
    frames = frames_of(tmp_path)
    assert SPECS["robust_loss"].missing(frames) is None
    assert "nothing is recorded in the table wci" in SPECS["wci_and_gap"].missing(frames)
    frames["epochs"]["test_robust_loss"] = np.nan
    assert "test_robust_loss" in SPECS["robust_loss"].missing(frames)


@pytest.mark.slow  # renders all figures twice
def test_files_are_valid_and_reproducible_and_settings_untouched(rendered, tmp_path, one_frames, caplog):
    caplog.set_level("INFO")  # as Hydra sets it
    before = dict(mpl.rcParams)
    (tmp_path / "again").mkdir()
    files = style.save(draw("learning_rate", one_frames), tmp_path / "rate")
    again = style.save(draw("learning_rate", one_frames), tmp_path / "again" / "rate")
    png, pdf = (file.read_bytes() for file in files)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")
    assert [file.read_bytes() for file in again] == [png, pdf]
    assert dict(mpl.rcParams) == before
    assert not caplog.records


def test_captions_and_alternatives_are_there():
    assert len({spec.name for spec in FIGURES}) == len(FIGURES)
    for spec in FIGURES:
        assert len(spec.caption) > 60
        assert spec.alt


def test_a_tower_of_first_epochs_does_not_flatten_the_rest(one_frames):
    epochs = one_frames["epochs"].copy()
    for name in ("test_robust_loss", "robust_loss_gap"):
        epochs[name] = epochs[name].where(epochs["epoch"] != 1, 40.0)
    left, right = draw("robust_loss", one_frames, epochs=epochs).axes
    for ax in (left, right):
        assert ax.get_ylim()[1] < 10
        assert "first epochs reach 40.0" in texts(ax)
    untouched = draw("robust_loss", one_frames).axes[0]
    assert not [text for text in texts(untouched) if "first epochs" in text]


def test_many_groups_have_a_marker_each_too(one_frames):
    names = [f"width={i}" for i in range(style.TOLD_BY_COLOUR + 1)]
    epochs = pd.concat([one_frames["epochs"].assign(group=name, run=name) for name in names])
    figure = draw("robust_loss", one_frames, epochs=epochs)
    for ax in figure.axes:
        shapes = {line.get_marker() for line in curves(ax)}
        assert shapes == set(style.MARKERS[: len(names)])
    assert legend(figure)[: len(names)] == names
    keys = [line.get_marker() for line in figure.legends[0].get_lines()]
    assert keys[: len(names)] == list(style.MARKERS[: len(names)])
    few = draw("robust_loss", one_frames, epochs=epochs[epochs["group"] != names[0]])
    assert {line.get_marker() for line in curves(few.axes[0])} == {""}


def test_lines_of_many_settings_are_named_with_their_markers():
    rows = [(f"s{i}", "q", epoch, float(i), 0.0, 9.0) for i in range(5) for epoch in (0, 1)]
    table = pd.DataFrame(rows, columns=["setting", "quantity", "epoch", "mean", "low", "high"])
    ax = style.new_figure("", 3.0).subplots()
    ends = draw_over_epochs(ax, table, setting_colours(table), {"q": "-"})
    label_ends(ax, ends)
    assert [line.get_marker() for line in ax.lines] == list(style.MARKERS[:5])
    assert texts(ax) == ["● s0", "■ s1", "▲ s2", "◆ s3", "▼ s4"]


def test_a_narrow_logarithmic_axis_has_two_ticks_at_least():
    for low, high in ((5.9e5, 1.7e6), (6.7e5, 1.36e6), (0.011, 0.019), (120, 285)):
        ax = style.new_figure("", 3.0).subplots()
        ax.plot([0, 1], [low, high])
        log_axis(ax)
        seen = [tick for tick in ax.get_yticks() if low <= tick <= high]
        assert len(seen) >= 2
        shown = [ax.yaxis.get_major_formatter()(tick) for tick in seen]
        assert len(set(shown)) == len(shown)


def test_decays_beyond_counting_are_not_marked(tmp_path):
    epochs = frames_of(write_run(tmp_path, epochs=240, measured=()))["epochs"]
    for period, marks in ((10, 24), (4, 0)):
        axes = style.new_figure("", 3.0).subplots()
        lr = np.where(epochs["epoch"] % period < period // 2, 0.1, 0.01)
        mark_decays([axes], epochs.assign(lr=lr), Cast.of(epochs))
        assert len(axes.lines) == marks


def test_lines_that_colours_do_not_tell_apart_have_dashes():
    assert set(style.dashes(4)) == {"none"}
    assert style.dashes(8) == ["none"] * 4 + ["9 3"] * 4
    assert all(one != other for one, other in itertools.pairwise(style.dashes(30)))
