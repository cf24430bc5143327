import pytest

from robustdyn.errors import ConfigError
from robustdyn.measure import measured_epochs


def epochs(spec, max_epochs=20, decays=(8, 15)):
    return sorted(measured_epochs(spec, max_epochs=max_epochs, decay_epochs=decays))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("every 5", [0, 5, 10, 15, 19]),
        ([3, 7], [3, 7, 19]),
        (4, [4, 19]),
        ("around decays 1", [7, 8, 9, 14, 15, 16, 19]),
        (["every 10", "around decays 0", 2], [0, 2, 8, 10, 15, 19]),
        ([], []),
        (["last", 2], [2, 19]),
    ],
)
def test_reads_every_form(spec, expected):
    assert epochs(spec) == expected


def test_around_decays_stays_inside_the_run():
    assert epochs("around decays 3", max_epochs=10, decays=(1, 9)) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_other_specs_have_their_own_name_and_no_last_epoch_unless_they_say_so():
    run = {"max_epochs": 20, "decay_epochs": (8,), "key": "other.epochs", "always_last": False}
    assert measured_epochs(["around decays 0", 2], **run) == {2, 8}
    assert measured_epochs("last", **run) == {19}
    with pytest.raises(ConfigError, match=r"^other\.epochs: epoch 20 is outside the run's epochs"):
        measured_epochs(20, **run)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sometimes", r"measure.epochs=sometimes cannot be read; use 'every N'"),
        ("every 0", "needs N of at least 1"),
        ([20], r"epoch 20 is outside the run's epochs 0..19"),
        ([True], "measure.epochs=True cannot be read"),
    ],
)
def test_names_the_key_in_errors(spec, message):
    with pytest.raises(ConfigError, match=message):
        epochs(spec)
