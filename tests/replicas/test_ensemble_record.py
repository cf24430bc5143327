import numpy as np
import pytest
import torch

from robustdyn.errors import ConfigError, RecordError
from robustdyn.replicas import Directions, EnsembleRecord, MeasuredPoint, read_ensemble, read_weights

SETTINGS = {
    "learning_rate": [0.1, 0.1],
    "record.steps": [0, 2],
    "record.loss_steps": [],
    "record.mean_steps": [2],
    "seed": 1,
}


def start():
    one = np.ones((1, 1))
    vectors = torch.ones(4, 1) / 2
    return MeasuredPoint(
        directions=Directions(positions=vectors, forces=vectors),
        eigenvalues=one[0],
        residuals=one[0],
        converged=True,
        hessian=one,
        mean_gradient=one[0],
        decay_gradient=one[0],
        example_covariance=one,
        attack_covariance=one,
        noise=one,
        sampled_gradients=np.empty((0, 1)),
        sampled_again=np.empty((0, 1)),
        slopes=one,
        slope_errors=one,
        slope_distances=one[0],
        loss=0.5,
        curvature_has_decay=False,
    )


def arrays(replicas):
    numbers = np.array(replicas, dtype=np.float64)
    each = np.tile(numbers[:, None], (1, 2))
    return {
        **dict.fromkeys(("position", "buffer", "gradient"), each[:, :, None]),
        "distance": each,
        "batch_loss": each,
        "robust_loss": np.empty((len(numbers), 0)),
        "robust_error": np.empty((len(numbers), 0)),
        "mean_move": numbers.mean() * np.ones((1, 1, 4), dtype=np.float32),
    }


def record(directory, chunk=2, **changes):
    return EnsembleRecord(directory, SETTINGS | changes, {"torch": "any"}, chunk=chunk)


def test_an_ensemble_grows_by_what_is_missing(tmp_path):
    first = record(tmp_path)
    first.start(start, torch.device("cpu"))
    first.add(range(2, 4), arrays(range(2, 4)))
    again = record(tmp_path)
    assert list(again.missing(6)) == [range(0, 2), range(4, 6)]
    assert list(again.missing(4)) == [range(0, 2)]
    again.add(range(4, 6), arrays(range(4, 6)))
    found = read_ensemble(tmp_path)
    assert found.replicas.tolist() == [2, 3, 4, 5]
    assert found.position[:, 0, 0].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert found.steps.tolist() == [0, 2]
    assert found.learning_rate.tolist() == [0.1, 0.1]
    assert found.start.loss == 0.5
    assert found.start.converged is True


def test_weights_are_kept_beside_the_chunks(tmp_path):
    found, both = record(tmp_path), range(2)
    found.start(start, torch.device("cpu"))
    found.add(both, arrays(both))
    with pytest.raises(RecordError, match="run the same robustdyn-replicas command again"):
        next(read_weights(tmp_path))
    assert list(found.missing(2)) == []
    assert list(found.missing(2, weights=True)) == [both]
    weights = np.arange(8, dtype=np.float32).reshape(2, 4)
    found.add(both, arrays(both) | {"weights": weights})
    assert list(found.missing(2, weights=True)) == []
    np.testing.assert_array_equal(np.concatenate(list(read_weights(tmp_path))), weights)
    assert read_ensemble(tmp_path).position[:, 0, 0].tolist() == [0.0, 1.0]


def test_shards_share_the_chunks(tmp_path):
    shared = record(tmp_path)
    parts = [list(shared.missing(10, shard=shard, shards=3)) for shard in range(3)]
    assert sorted((r.start, r.stop) for part in parts for r in part) == [(i, i + 2) for i in range(0, 10, 2)]
    assert [len(part) for part in parts] == [2, 2, 1]
    with pytest.raises(ConfigError, match="shard=3/3 does not exist; choose 0/3 to 2/3"):
        list(shared.missing(10, shard=3, shards=3))
    with pytest.raises(ConfigError, match="replicas=9 is not a multiple of chunk=2; choose 10"):
        list(shared.missing(9))


def test_the_start_is_measured_once(tmp_path):
    record(tmp_path).start(start, torch.device("cpu"))

    def never():
        raise AssertionError

    assert record(tmp_path).start(never, torch.device("cpu")).loss == 0.5


def test_a_chunk_half_written_does_not_count(tmp_path):
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / ".000000.npz.1.tmp").write_bytes(b"PK")
    assert list(record(tmp_path).missing(2)) == [range(0, 2)]
    with pytest.raises(RecordError, match="holds no finished replicas"):
        read_ensemble(tmp_path)


def test_other_settings_are_refused(tmp_path):
    record(tmp_path)
    with pytest.raises(RecordError, match=r"holds an ensemble with seed=1 \(now 2\); choose another output"):
        record(tmp_path, seed=2)
    with pytest.raises(RecordError, match=r"chunk=2 \(now 4\)"):
        record(tmp_path, chunk=4)


def test_damaged_files_are_named(tmp_path):
    good = record(tmp_path)
    good.start(start, torch.device("cpu"))
    good.add(range(2), arrays(range(2)))
    path = tmp_path / "chunks" / "000000.npz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RecordError, match=r"000000\.npz: cannot be read; delete it"):
        read_ensemble(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(RecordError, match=r"settings\.json: cannot be read"):
        record(tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(RecordError, match="missing beside an ensemble"):
        record(tmp_path)


def test_where_no_ensemble_is_one_is_told_how_to_make_it(tmp_path):
    with pytest.raises(RecordError, match="no ensemble; make one with robustdyn-replicas"):
        read_ensemble(tmp_path / "nowhere")
