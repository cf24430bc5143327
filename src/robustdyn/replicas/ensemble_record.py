"""Writes and reads an ensemble's directory: settings, starting point, and one file per chunk of replicas.

``settings.json`` contains everything on which the numbers depend, ``start.npz`` the starting point,
``lines.npz`` the loss along the directions, ``chunks/*.npz`` the replicas, ``path/*.npz`` the measurements at
their mean, ``noise_free/*.npz`` the repetitions of its noise-free path, ``weights/*.npz`` the weights of
every replica after the last step, and ``families/*.npz`` children of some of the replicas. Every file is
either complete or absent. A command that was killed can therefore always be resumed, and several commands can
work on parts of the ensemble.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from robustdyn.errors import ConfigError, RecordError
from robustdyn.records.files import replace_file
from robustdyn.records.labels import changes
from robustdyn.records.writer import jsonable
from robustdyn.replicas.ensemble import EXPANDED, Arrays
from robustdyn.replicas.expansion import Lines
from robustdyn.replicas.families import Families
from robustdyn.replicas.noise_free import MeanPaths
from robustdyn.replicas.point import MeasuredPoint

Array = NDArray[np.float64]

SETTINGS, START, LINES, CHUNKS, PATH = "settings.json", "start.npz", "lines.npz", "chunks", "path"
NOISE_FREE, FAMILIES = "noise_free", "families"
_ANOTHER = "choose another output=DIR, or delete this one"
WEIGHTS = "weights"  # folder, and the array in its files


class EnsembleRecord:
    """An ensemble's directory, written by any number of processes.

    Args:
        directory: The ensemble's directory; made if absent.
        settings: Everything on which the numbers depend, in a form that JSON can hold. The number of replicas
            is not part of it, because an ensemble may grow.
        provenance: Versions, hardware and the like, written with the first settings and never compared.
        chunk: Number of replicas in a chunk.

    Raises:
        RecordError: The directory cannot be used, or holds an ensemble of other settings.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, object],
        provenance: Mapping[str, object],
        *,
        chunk: int,
    ) -> None:
        self.directory, self.chunk = directory, chunk
        try:
            (directory / CHUNKS).mkdir(parents=True, exist_ok=True)
            with FileLock(directory / ".lock"):
                self._begin(jsonable({**settings, "chunk": chunk}), jsonable(provenance))
        except OSError as error:
            if isinstance(error, RecordError):
                raise
            raise _unwritable(directory, error) from error

    def _begin(self, settings: dict[str, Any], provenance: dict[str, Any]) -> None:
        path = self.directory / SETTINGS
        if not path.exists():
            if (self.directory / START).exists():
                raise RecordError(f"{path}: missing beside an ensemble that is there; {_ANOTHER}")
            text = json.dumps({"ensemble": settings, "provenance": provenance}, indent=1) + "\n"
            _write(path, text.encode())
            return
        stored = _settings(self.directory)
        if stored != settings:
            raise RecordError(
                f"{self.directory}: holds an ensemble with {changes(stored, settings)}; {_ANOTHER}"
            )

    def start(self, measure: Callable[[], MeasuredPoint], device: torch.device) -> MeasuredPoint:
        """The recorded starting point; if there is none, a single process calls ``measure``."""
        return MeasuredPoint.from_arrays(self._once(START, measure), device)

    def path(
        self, replicas: int, steps: Sequence[int], measure: Callable[[NDArray[np.float32]], MeasuredPoint]
    ) -> None:
        """Measure the path of the mean of the first ``replicas``, where it has not been measured yet.

        Args:
            replicas: All of them must be there.
            steps: The mean steps.
            measure: Returns the point at a mean move (P,); called by a single process.
        """
        with FileLock(self.directory / ".path.lock"):
            for row, step in enumerate(steps):
                file = self.directory / PATH / f"{step:06d}-{replicas}.npz"
                if file.exists():
                    continue
                file.parent.mkdir(exist_ok=True)
                chunks = [self._chunk(first) for first in range(0, replicas, self.chunk)]
                move = np.mean([_unpacked(chunk)["mean_move"][0, row] for chunk in chunks], axis=0)
                point = measure(move.astype(np.float32)).arrays()
                shared = ("positions", "forces")  # the same as at the start
                _write(file, _packed({k: v for k, v in point.items() if k not in shared}))

    def mean_path(self, repetition: int, follow: Callable[[], tuple[Array, Array]]) -> None:
        """Record one repetition of the noise-free path of the mean, where it is missing.

        Args:
            repetition: Its number.
            follow: Returns the positions (S, k) without and with the third-order drift.
        """
        file = self.directory / NOISE_FREE / f"{repetition:06d}.npz"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            plain, drifting = follow()
            _write(file, _packed({"plain": plain, "drifting": drifting}))

    def lines(self, measure: Callable[[], Lines]) -> Lines:
        """The recorded loss along the directions; if there is none, a single process calls ``measure``."""
        return Lines.from_arrays(self._once(LINES, measure))

    def _once(self, name: str, measure: Callable[[], MeasuredPoint | Lines]) -> dict[str, Any]:
        path = self.directory / name
        with FileLock(self.directory / f".{path.stem}.lock"):
            if not path.exists():
                _write(path, _packed(measure().arrays()))
            return _unpacked(path)

    def missing(
        self, replicas: int, *, shard: int = 0, shards: int = 1, weights: bool = False
    ) -> Iterator[range]:
        """Chunks among the first ``replicas`` that a shard still has to run.

        Whole chunks belong to a shard, so that no number depends on how many shards there are. If the weights
        are to be kept, a chunk without them is missing too.

        Raises:
            ConfigError: ``replicas`` is not a multiple of the chunk, or there is no such shard.
        """
        if replicas % self.chunk:
            near = -(-replicas // self.chunk) * self.chunk
            raise ConfigError(f"replicas={replicas} is not a multiple of chunk={self.chunk}; choose {near}")
        if not 0 <= shard < shards:
            raise ConfigError(
                f"shard={shard}/{shards} does not exist; choose 0/{shards} to {shards - 1}/{shards}"
            )
        for number in range(shard, replicas // self.chunk, shards):
            first = number * self.chunk
            if not self._chunk(first).exists() or (weights and not self._weights(first).exists()):
                yield range(first, first + self.chunk)

    def add(self, replicas: range, arrays: Arrays) -> None:
        """Write a finished chunk, its weights into a file of their own.

        Raises:
            RecordError: It cannot be written.
        """
        weights = {name: arrays[name] for name in (WEIGHTS,) if name in arrays}
        if weights:
            _add(self._weights(replicas.start), weights)
        _write(self._chunk(replicas.start), _packed({k: v for k, v in arrays.items() if k not in weights}))

    def _chunk(self, first: int) -> Path:
        return self.directory / CHUNKS / f"{first:06d}.npz"

    def _weights(self, first: int) -> Path:
        return self.directory / WEIGHTS / f"{first:06d}.npz"


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedEnsemble:
    """The content of an ensemble's directory.

    If BatchNorm is in train mode, the losses use a replica's own running statistics, and an expansion in θ
    does not include their changes.

    Attributes:
        settings: Everything on which the numbers depend, as in ``settings.json``.
        start: The measured starting point.
        path_steps: (Q,), the mean steps at which the path was measured for all these replicas.
        path: Q points at the mean of the replicas' weights, along the directions of the start.
        lines: The loss along the directions; None where it was not measured.
        mean_paths: Noise-free paths of the mean; None unless all repetitions are there.
        families: Children of some of the replicas, for each step from which they were trained.
        replicas: (R,) numbers of the finished replicas.
        steps: (S,) recorded steps.
        loss_steps: (L,).
        learning_rate: (T,), η of each step.
        position: (R, S, k), x_i = positions_iᵀ (θ − θ_0).
        buffer: (R, S, k), the optimiser's buffer along the forces.
        gradient: (R, S, k), of the mini-batch loss without weight decay in the step that led there; NaN at
            step 0.
        distance: (R, S), ‖θ − θ_0‖.
        batch_loss: (R, T), cross-entropy of each adversarial batch in nats, where its gradient was taken.
        robust_loss: (R, L), over the loss examples, attacked again.
        robust_error: (R, L), of the same.
        mean_steps: (M,).
        mean_move: (M, P) float32, mean of θ − θ_0 over the replicas.
        child: (R, S, k), x of the noise-free child of each replica since the last decay; NaN up to the first
            decay, and for replicas without children. None without any.
        recomputed_loss: (R, L, A), robust loss of each draw; without an expansion None, as the next four.
        held_loss: (R, L), on the adversarial examples of θ_0.
        linear_loss: (R, L), its expansion L_0 + g·Δ with Δ = θ − θ_0.
        expanded_loss: (R, L), its expansion L_0 + g·Δ + Δᵀ H Δ / 2.
        outside: (R, L), norm of the part of Δ outside the span of the directions.
    """

    settings: Mapping[str, Any]
    start: MeasuredPoint
    path_steps: NDArray[np.int64]
    path: tuple[MeasuredPoint, ...]
    lines: Lines | None = None
    mean_paths: MeanPaths | None = None
    families: tuple[Families, ...] = ()
    replicas: NDArray[np.int64]
    steps: NDArray[np.int64]
    loss_steps: NDArray[np.int64]
    learning_rate: NDArray[np.float64]
    position: NDArray[np.float64]
    buffer: NDArray[np.float64]
    gradient: NDArray[np.float64]
    distance: NDArray[np.float64]
    batch_loss: NDArray[np.float64]
    robust_loss: NDArray[np.float64]
    robust_error: NDArray[np.float64]
    mean_steps: NDArray[np.int64]
    mean_move: NDArray[np.float32]
    child: NDArray[np.float64] | None = None
    recomputed_loss: NDArray[np.float64] | None = None
    held_loss: NDArray[np.float64] | None = None
    linear_loss: NDArray[np.float64] | None = None
    expanded_loss: NDArray[np.float64] | None = None
    outside: NDArray[np.float64] | None = None


def read_ensemble(directory: Path) -> RecordedEnsemble:
    """Read all finished replicas in a directory.

    Raises:
        RecordError: There are none, or a file cannot be read.
    """
    if not (directory / SETTINGS).exists():
        raise RecordError(f"{directory}: no ensemble; make one with robustdyn-replicas")
    settings = _settings(directory)
    files = sorted((directory / CHUNKS).glob("*.npz"))
    if not files:
        raise RecordError(
            f"{directory}: holds no finished replicas; run the same robustdyn-replicas command again"
        )
    chunks = [_unpacked(path) for path in files]
    arrays: dict[str, Any] = dict.fromkeys(("child", *EXPANDED))
    arrays |= {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    arrays["mean_move"] = arrays["mean_move"].mean(axis=0)
    firsts = [int(path.stem) for path in files]
    measured = sorted((directory / PATH).glob(f"*-{sum(len(c['distance']) for c in chunks)}.npz"))
    try:
        start = _unpacked(directory / START)
        shared = {name: start[name] for name in ("positions", "forces")}
        return RecordedEnsemble(
            settings=settings,
            start=_point(start),
            path_steps=np.array([int(path.stem.partition("-")[0]) for path in measured], dtype=np.int64),
            path=tuple(_point({**_unpacked(path), **shared}) for path in measured),
            lines=Lines.from_arrays(_unpacked(lines)) if (lines := directory / LINES).exists() else None,
            mean_paths=_mean_paths(directory, settings),
            families=tuple(_families(path) for path in sorted((directory / FAMILIES).glob("*.npz"))),
            replicas=np.concatenate([np.arange(settings["chunk"]) + first for first in firsts]),
            steps=np.array(settings["record.steps"], dtype=np.int64),
            loss_steps=np.array(settings["record.loss_steps"], dtype=np.int64),
            learning_rate=np.array(settings["learning_rate"], dtype=np.float64),
            mean_steps=np.array(settings["record.mean_steps"], dtype=np.int64),
            **arrays,
        )
    except (KeyError, TypeError) as error:
        raise RecordError(
            f"{directory}: not an ensemble of robustdyn-replicas ({error}); {_ANOTHER}"
        ) from error


def read_weights(directory: Path) -> Iterator[NDArray[np.float32]]:
    """θ (R, P) of the replicas after the last step, chunk by chunk.

    Raises:
        RecordError: The weights of a finished chunk were not kept, or a file cannot be read.
    """
    files = [directory / WEIGHTS / path.name for path in sorted((directory / CHUNKS).glob("*.npz"))]
    if not files or not all(path.exists() for path in files):
        raise RecordError(
            f"{directory}: does not hold the weights of all replicas; run the same robustdyn-replicas "
            "command again with record.weights=true"
        )
    for path in files:
        yield _unpacked(path)[WEIGHTS]


def write_families(directory: Path, families: Families) -> None:
    """Add children to an ensemble's directory, in place of any from the same step.

    Raises:
        RecordError: They cannot be written.
    """
    _add(directory / FAMILIES / f"{families.step:06d}.npz", vars(families))


def _add(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a file into a folder that may not be there yet."""
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    _write(path, _packed(arrays))


def _families(path: Path) -> Families:
    arrays = _unpacked(path)
    return Families(
        step=int(arrays["step"]),
        learning_rate=float(arrays["learning_rate"]),
        steps=arrays["steps"],
        places=arrays["places"],
    )


def _mean_paths(directory: Path, settings: Mapping[str, Any]) -> MeanPaths | None:
    files = sorted((directory / NOISE_FREE).glob("*.npz"))
    if not files or len(files) < settings["noise_free"]["repetitions"]:
        return None
    paths = [_unpacked(file) for file in files]
    return MeanPaths(**{name: np.stack([path[name] for path in paths]) for name in ("plain", "drifting")})


def _point(arrays: dict[str, Any]) -> MeasuredPoint:
    return MeasuredPoint.from_arrays(arrays, torch.device("cpu"))


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / SETTINGS
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["ensemble"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path}: cannot be read; {_ANOTHER}") from error
    return stored


def _packed(arrays: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **{name: np.asarray(value) for name, value in arrays.items()})
    return file.getvalue()


def _unpacked(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise RecordError(f"{path}: cannot be read; delete it and run the command again") from error


def _write(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RecordError:
    return RecordError(f"{path}: cannot write ({error.strerror}); free space or choose another output=DIR")
