"""``robustdyn-fork``: trains branches of a run from one of its checkpoints, which differ in one setting."""

from robustdyn.commands.train import check_settings, train
from robustdyn.launch.application import run_app
from robustdyn.launch.fork import forked


def main() -> None:
    """The ``robustdyn-fork`` command: training that begins as a branch."""
    run_app(train, "fork", composed=forked, check=check_settings)


if __name__ == "__main__":
    # imported by name, so that a launcher's workers and a run's ranks find it
    from robustdyn.commands.fork import main as command

    command()
