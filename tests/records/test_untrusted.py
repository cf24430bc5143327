"""Tests the reading of configurations that somebody else may have written."""

import re
import time

import pytest
from omegaconf import OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.records.untrusted import DATA_ROOT, PURE_RESOLVERS, read_config, read_yaml, untrusted_config
from robustdyn.run.config import register_resolvers
from tests.runs import compose

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


STEPS = range(1, 41)
DOUBLED = [f"a{n}: ${{a{n - 1}}}${{a{n - 1}}}" for n in STEPS]
DOUBLED_NODES = [f"a{n}: {{x: '${{..a{n - 1}}}', y: ['${{a{n - 1}}}']}}" for n in STEPS]
DOUBLED_CHOICES = [f"a{n}: ${{oc.select:a{n - 1},''}}${{oc.select:..a{n - 1}}}" for n in STEPS]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x00\x01\xff\xfe", "codec can't decode"),
        (b"\x00", "unacceptable character"),
        (b"a: " + b"[" * 500 + b"]" * 500, "nested more than 50 deep"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "nested more than 50 deep|flow level"),  # newer libyaml: 1000
        (BOMB.encode(), "it has YAML aliases"),
        (b"a: " + b"x" * (1 << 20), "larger than 1 MiB"),
        (b"a: !!python/object/apply:os.system [touch called]", "could not determine a constructor"),
        (b"a: [1", "while parsing a flow sequence"),
        ("\n".join(["a0: xx", *DOUBLED]).encode(), "interpolations make it larger than 1 MiB"),
        ("\n".join(["a0: xx", *DOUBLED_NODES]).encode(), "interpolations make it larger than 1 MiB"),
        ("\n".join(["a0: xx", *DOUBLED_CHOICES]).encode(), "interpolations make it larger than 1 MiB"),
        (b"a: ${oc.select:b.${c}}", "a key is computed by an interpolation"),
        (b"5", "neither keys with values nor a list"),
        (b"a: 1\nb:\n- {c: 2, d: {}, c: 3}", "the key 'c' is there twice, again in line 3"),
        (b"a: 1\n2: x\na:\n  b: 1", "the key 'a' is there twice, again in line 3"),
    ],
)
def test_refuses_in_one_line(tmp_path, content, reason):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: '${per_255:'", "missing '}'|extraneous input|token recognition|mismatched|no viable"),
        ("a: !!set {b}", "not a supported primitive type"),
        ("- a", "not a configuration"),
        ("a: 1\na: 1", "config.yaml: cannot read .the key 'a' is there twice, again in line 2.; restore it"),
    ],
)
def test_what_is_no_configuration_is_refused_in_one_line(tmp_path, content, reason):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(RecordError, match=reason) as caught:
        read_config(tmp_path / "config.yaml", "restore it")
    assert "\n" not in str(caught.value)


def test_scalars_are_read_as_omegaconf_reads_them(tmp_path):
    numbers = ["1e-3", "1E5", "1.5e3", "-2e+4", "1_0e2", "1.e2", ".5", ".inf", "12", "0x1F", "1_000", "1:30"]
    others = ["1e", "e5", "0o7", "true", "off", "null", "~", "2026-11-29"]
    text = "".join(f"a{i}: {scalar}\n" for i, scalar in enumerate([*numbers, *others]))
    (tmp_path / "config.yaml").write_text(text)
    assert read_yaml(tmp_path / "config.yaml") == OmegaConf.to_container(
        OmegaConf.load(tmp_path / "config.yaml")
    )


SECRET = "a secret of this machine"
LEAKS = [
    "${oc.env:SECRET_TOKEN}",
    "${ oc.env:SECRET_TOKEN}",
    "${oc.env:SECRET_TOKEN,none}",
    "\\${oc.env:SECRET_TOKEN}",
    "\\\\${oc.env:SECRET_TOKEN}",
    "\\\\\\${oc.env:SECRET_TOKEN}",
    "seed ${seed} ${oc.env:SECRET_TOKEN}",
    "${short:${oc.env:SECRET_TOKEN}}",
    "${oc.select:none,${oc.env:SECRET_TOKEN}}",
    "${oc.decode:'${oc.env:SECRET_TOKEN}'}",
    "${oc.${part}:SECRET_TOKEN}",
    "${${name}:SECRET_TOKEN}",
    "${run_folder:SECRET_TOKEN}",
    "${now:%Y}",
    "${hydra:runtime.cwd}",
]


@pytest.mark.parametrize("leak", LEAKS)
def test_nothing_of_this_machine_is_read(tmp_path, monkeypatch, leak):
    register_resolvers()
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    content = {
        "seed": 3,
        "part": "env",
        "name": "oc.env",
        "leak": leak,
        "list": [{"leak": leak}],
        "ref": "${leak}",
    }
    folder = tmp_path / ".hydra"
    folder.mkdir()
    OmegaConf.save(OmegaConf.create({k: v for k, v in content.items() if v != leak}), folder / "config.yaml")
    with (folder / "config.yaml").open("a") as file:
        file.write(f"leak: '{leak.replace(chr(39), chr(39) * 2)}'\n")
    (folder / "overrides.yaml").write_text(f"- '+x={leak.replace(chr(39), chr(39) * 2)}'\n")
    (folder / "hydra.yaml").write_text("hydra: {runtime: {choices: {model: '${oc.env:SECRET_TOKEN}'}}}\n")
    (run,) = find_runs(tmp_path)
    assert run.config["leak"] == run.config["ref"] == leak
    assert SECRET not in str(run)
    assert time.strftime("%Y") not in str(run.config)


def test_what_follows_from_the_configuration_itself_is_resolved():
    register_resolvers()
    config = untrusted_config(
        {
            "a": {"b": [4, 8]},
            "c": "${a.b[1]}",
            "d": "${per_255:${c}}",
            "e": "${oc.select:x.${c},7}",
            "f": "$5 {}",
        }
    )
    assert OmegaConf.to_container(config, resolve=True) == {
        "a": {"b": [4, 8]}, "c": 8, "d": 8 / 255, "e": 7, "f": "$5 {}"
    }  # fmt: skip


@pytest.mark.parametrize("typed", [f"scale={path.stem}" for path in (config_dir() / "scale").glob("*.yaml")])
def test_a_run_of_every_scale_can_be_read_back(typed, tmp_path):
    register_resolvers()
    cfg = compose("data=svhn", "data.root=here", typed)
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    read = OmegaConf.to_container(read_config(tmp_path / "config.yaml", "restore it").data, resolve=True)
    assert read == OmegaConf.to_container(cfg.data, resolve=True)


def test_a_key_computed_by_a_class_that_is_itself_computed_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("a: ${oc.select:b.${data._target_}}\ndata: {_target_: '${c}'}\n")
    with pytest.raises(RecordError, match="a key is computed by an interpolation"):
        read_config(tmp_path / "config.yaml", "restore it")


def test_where_the_data_lie_is_all_that_a_command_may_ask(monkeypatch):
    monkeypatch.setenv("ROBUSTDYN_DATA", "here")
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    content = {"root": "${oc.env:ROBUSTDYN_DATA,data}", "leak": "${oc.env:SECRET_TOKEN}"}
    config = untrusted_config(content, (*PURE_RESOLVERS, DATA_ROOT))
    assert (config.root, config.leak) == ("here", content["leak"])
    assert untrusted_config(content).root == content["root"]


def test_every_resolver_of_conf_is_known():
    said = {
        name
        for file in config_dir().rglob("*.yaml")
        for name in re.findall(r"\$\{([\w.]+):", file.read_text())
    }
    assert said - {"hydra", "now", "oc.env", "run_folder", "help_groups", "help_settings"} <= set(
        PURE_RESOLVERS
    )
