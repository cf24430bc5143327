"""Tests ``python -m robustdyn`` and the scripts of an installation."""

import subprocess
import sys
from importlib.metadata import entry_points

from robustdyn import __main__ as program
from robustdyn.defaults import config_dir

SLOW = {"lightning", "pandas", "torch"}
"""Packages that take seconds to import."""


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments])
    return program.main()


def test_lists_every_command_with_one_line_about_it(monkeypatch, capsys):
    for arguments in ((), ("--help",)):
        assert not called(monkeypatch, *arguments)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(program.COMMANDS)
        assert all(len(line.split()) > 2 for line in lines)


def test_refuses_an_unknown_command_and_lists_the_others(monkeypatch, capsys):
    assert called(monkeypatch, "trian") == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: no command trian; choose one of these\n")
    assert "\ntrain " in said.err
    assert said.out == ""


def test_every_command_has_a_script_of_its_name(monkeypatch):
    scripts = {e.name: e.value for e in entry_points(group="console_scripts") if "robustdyn" in e.value}
    assert scripts == {f"robustdyn-{name}": "robustdyn.__main__:console_script" for name in program.COMMANDS}
    ran = []
    monkeypatch.setattr(program, "run", ran.append)
    for script in scripts:
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{script}"])
        program.console_script()
    assert ran == list(program.COMMANDS)


def test_help_needs_no_slow_import():
    names = [name for name in program.COMMANDS if (config_dir() / f"{name}.yaml").is_file()]
    code = (
        "import sys\n"
        "from robustdyn.__main__ import console_script\n"
        f"for name in {names}:\n"
        "    sys.argv = [f'robustdyn-{name}', '--help']\n"
        "    try: console_script()\n"
        "    except SystemExit as end: assert not end.code\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("== Settings") == len(names)
    assert not SLOW & set(done.stderr.split())
