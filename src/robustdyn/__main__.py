"""The commands: ``robustdyn-train`` is ``python -m robustdyn train``."""

import ast
import sys
from importlib import import_module
from pathlib import Path

from robustdyn.defaults import config_dir
from robustdyn.launch.help import show_help
from robustdyn.run.status import speak_safely

COMMANDS = {
    path.stem.rstrip("_"): path for path in sorted((Path(__file__).parent / "commands").glob("[!_]*.py"))
}
"""By name, the modules of ``robustdyn.commands``; ``import_`` is that of ``import``, a word of Python's."""


def console_script() -> int | None:
    """What ``robustdyn-NAME`` runs."""
    return run(Path(sys.argv[0]).stem.removeprefix("robustdyn-"))


def run(name: str) -> int | None:
    """Run the command of this name with ``sys.argv``; its exit status, None for 0."""
    speak_safely()
    if (config_dir() / f"{name}.yaml").is_file():
        show_help(name)  # before the command's module, which loads slowly
    status: int | None = import_module(f"robustdyn.commands.{COMMANDS[name].stem}").main()
    return status


def main() -> int | None:
    """The command that the first argument names; a list of all without one."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        sys.argv = [f"robustdyn-{sys.argv[1]}", *sys.argv[2:]]
        return console_script()
    unknown = len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help")
    lines = [f"error: no command {sys.argv[1]}; choose one of these"] if unknown else []
    for name, path in COMMANDS.items():
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"{name:<11} {about.splitlines()[0].partition(': ')[2]}")
    print("\n".join(lines), file=sys.stderr if unknown else sys.stdout)
    return int(unknown)


if __name__ == "__main__":
    sys.exit(main())
