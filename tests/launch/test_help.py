import re

import pytest
from omegaconf import OmegaConf

from robustdyn.commands import certify, evaluate, measure, replicas, train
from robustdyn.defaults import config_dir
from tests.runs import invoke

GROUPS = {
    "train": {"data", "method", "logger", "ensemble/settings"},
    "evaluate": {"attack", "data", "evaluation", "evaluation/attack", "model"},
    "measure": {"attack", "data", "measure", "model"},
    "replicas": set(),
    "certify": set(),
}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("train", train),
        ("evaluate", evaluate),
        ("measure", measure),
        ("replicas", replicas),
        ("certify", certify),
    ],
)
def test_help_lists_the_groups_in_use_and_every_comment_of_the_settings(name, command, monkeypatch, capsys):
    assert invoke(command.main, monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    head, _, tail = text.partition("== Settings (change with key=value) ==\n")
    groups = set(re.findall(r"(?m)^([\w/]+): \w", head.partition("== Groups")[2]))
    assert groups == GROUPS[name] if name != "train" else groups > GROUPS[name]
    assert "evaluation" not in groups or name == "evaluate"
    assert groups.isdisjoint({"ball", "setting", "size", "unmeasured"})  # they follow the choices of others
    own = (config_dir() / f"{name}.yaml").read_text().partition("\nhydra:")[0]
    settings = re.sub(r"(?s)^.*?\n\n", "", own, count=1)
    comments = re.findall(r"\w:.*?\s# (.*)", settings)
    assert comments
    for comment in comments:
        assert f"# {comment}\n" in tail
    config = tail.rpartition("Any setting below")[0]
    assert OmegaConf.create(config) is not None


def test_a_setting_of_a_group_has_the_comment_of_the_choice(monkeypatch, capsys):
    assert invoke(train.main, monkeypatch, "--help", "data=cifar10") == 0
    text = capsys.readouterr().out
    written = (config_dir() / "data/cifar10.yaml").read_text()
    (comment,) = re.findall(r"(?m)^download: true +# (.*)", written)
    assert f"  download: true  # {comment}\n" in text
    assert "$$" not in text


def test_help_knows_the_users_own_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text("defaults: [digits, _self_]\ntrain_size: 5  # my size\n")
    assert invoke(train.main, monkeypatch, "--config-dir", str(tmp_path), "--help", "data=mine") == 0
    text = capsys.readouterr().out
    assert re.search("(?m)^data: .*digits, image_folder, mine,", text)
    assert "  train_size: 5  # my size\n" in text


def test_hydras_own_help_is_there_where_ours_has_nothing_to_compose(monkeypatch, capsys):
    """It takes the text for a template, in which a dollar sign begins a name."""
    assert invoke(train.main, monkeypatch, "--help", "-cn", "train") == 0
    text = capsys.readouterr().out
    assert "== Settings" in text
    assert "$$" not in text
