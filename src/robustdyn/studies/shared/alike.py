"""Which runs may be put together: those that differ in their seed and in what is compared, and each once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from robustdyn.errors import RecordError
from robustdyn.records.labels import SEED, differences, format_value
from robustdyn.records.reader import Run

OPERATION = ("checkpoint", "nonfinite", "resume")  # sections that change no result


def require_alike(runs: Sequence[Run], but: Collection[str] = (), of: str = "") -> None:
    """Refuse runs that differ in more than their seed and the settings ``but``.

    All that differs counts, also what one setting implies: a schedule that comes with another model is two
    differences.

    Args:
        runs: Runs to put together.
        but: Dotted keys, or sections of the configuration with all that is in them.
        of: What the runs are of, for the message.

    Raises:
        RecordError: They do; the message names the settings and their values.
    """
    free = (SEED, *but)
    other = [
        f"{key} ({', '.join(dict.fromkeys(map(format_value, values)))})"
        for key, values in differences(runs).items()
        if not any(f"{key}.".startswith(f"{name}.") for name in (*free, *OPERATION))
    ]
    if other:
        raise RecordError(
            f"runs{of and f' of {of}'} differ in more than their {', '.join(free)}: {', '.join(other)}; give "
            "those of one sweep, or some of them, as several paths or by a shell pattern"
        )


def require_repetitions(runs: Sequence[Run], setting: Callable[[Run], str] = lambda run: "") -> None:
    """Refuse runs of one setting that differ in more than their seed, or do not in that.

    Their mean would say nothing, or count one run twice.

    Args:
        runs: Runs to put together.
        setting: A run's level of what is compared.

    Raises:
        RecordError: There are such; the message names the settings that differ, or both runs.
    """
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(setting(run), []).append(run)
    for name, own in members.items():
        require_alike(own, of=name)
        by_seed: dict[object, Run] = {}
        for run in own:
            seed = run.config.get(SEED)
            if seed in by_seed:
                of = name and f" of {name}"
                raise RecordError(
                    f"{run.path}: seed {seed}{of} is that of {by_seed[seed].path} too; leave one out"
                )
            by_seed[seed] = run
