"""Paths as people have them, through Hydra's grammar and the shell."""

import json
import os
import re
import subprocess

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.launch.paths import anchor, load_run, quoted_paths
from robustdyn.records.command_line import at
from robustdyn.report.page import build_report
from tests.records.synthetic import write_hydra, write_run
from tests.report.test_page import Page

AWKWARD = (
    "a=1",
    "a (1)",
    "é ü",
    "it's",
    'say "x"',
    "a,b",
    "[x]",
    "{y}",
    "1e5",
    "007",
    "true",
    "back\\slash",
    "end\\",
)


def read(argument):
    """What Hydra makes of an argument."""
    override = OverridesParser.create().parse_override(argument)
    if override.is_sweep_override():
        return [read(f"x={text}") for text in override.sweep_string_iterator()]
    return OmegaConf.create({"value": override.value()}).value


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("key", ["checkpoint", "output", "hydra.run.dir", "hydra.sweep.dir", "++data.root"])
def test_a_path_is_the_text_that_was_typed(key, name, tmp_path):
    path = f"{tmp_path}/{name}/last.ckpt"
    (argument,) = quoted_paths([f"{key}={path}"])
    assert read(argument) == path
    assert quoted_paths([argument]) == [argument]  # as it is where it was quoted already


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed in ("~/r", "'~/r'", '"~/r"'):
        assert read(*quoted_paths([f"hydra.run.dir={typed}"])) == f"{tmp_path}/r"


def test_what_is_no_path_stays(tmp_path):
    typed = ["seed=0,1", "checkpoint=null", "checkpoint.every_minutes=5", "schedule.milestones=[1,2]", "-m"]
    assert quoted_paths(typed) == typed
    assert quoted_paths(["hydra.run.dir=out/${name}"]) == ["hydra.run.dir='out/${name}'"]
    assert quoted_paths(["replicas=8"]) == ["replicas=8"]
    assert read(*quoted_paths(["replicas=a=1"], also=["replicas"])) == "a=1"


def test_a_sweep_over_checkpoints_is_parted_at_commas_but_not_within_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=1,b=2").mkdir()
    _, argument = quoted_paths(["-m", "checkpoint=a=1,b=2,c=3,'d,e'"])
    assert read(argument) == ["a=1,b=2", "c=3", "d,e"]


def pasted(line, folder):
    """The arguments that a shell hands over, by way of a program that writes them down."""
    program = folder / "robustdyn-train"
    program.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    program.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    shell = ["bash", "-O", "failglob", "-euc", line]
    done = subprocess.run(shell, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", ["seed=0 (1) é", "it's ${x} `date` $HOME", "~", 'a"b;c&d|e,f=[0]'])
def test_the_commands_of_a_page_run_when_they_are_pasted(name, without_figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / name
    run = write_run(sweep / "method=at,seed=0", epochs=2, measured=())
    typed = ["method=at", "seed=0", "schedule.milestones=[20,32]", "data=cifar10", "data.root='/my data'"]
    write_hydra(run, json.loads((run / ".hydra/config.yaml").read_text()), typed, {"method": "at"})
    (sweep / "multirun.yaml").write_text(
        json.dumps({"hydra": {"overrides": {"task": ["method=at", "seed=0,1"], "hydra": []}}})
    )
    (run / "status.json").write_text('{"state": "failed", "error": "x", "settings": {}}')
    text = build_report([sweep.relative_to(tmp_path)], tmp_path / "report").html.read_text()
    codes = re.findall(r"<code>(robustdyn-train .*?)</code>", text, re.S)
    (tmp_path / "elsewhere").mkdir()
    commands = [Page(f"<p>{code}</p>").words for code in codes]
    assert len(commands) == 2
    for words, key, place in zip(commands, ("hydra.sweep.dir", "hydra.run.dir"), (sweep, run), strict=True):
        arguments = [a for a in quoted_paths(pasted("".join(words), tmp_path / "elsewhere")) if a != "-m"]
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            swept = [a for a in arguments if a != "seed=0,1"]
            cfg = hydra.compose("train", swept, return_hydra_config=True)
        assert OmegaConf.select(cfg, key) == str(place)


def test_a_printed_path_is_read_back(tmp_path):
    for name in (*AWKWARD, "${x}", "\\${x}", "null", "'q'", "~"):
        assert read(*quoted_paths([at("hydra.run.dir", tmp_path / name)])) == str(tmp_path / name)


def test_a_relative_root_is_where_the_run_was_started(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", epochs=1, measured=(), data__root="images")
    (run / ".hydra/hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"cwd": str(tmp_path)}}}))
    monkeypatch.chdir(run)
    assert load_run(run).data.root == "images"  # moved to another machine: from here
    (tmp_path / "images").mkdir()
    assert load_run(run).data.root == str(tmp_path / "images")
    (argument,) = quoted_paths(["data.root=images"])
    assert read(argument) == str(run / "images")
    cfg = OmegaConf.create({"data": {"root": "images"}})
    anchor(cfg, tmp_path)
    assert cfg.data.root == str(tmp_path / "images")
