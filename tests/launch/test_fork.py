"""``robustdyn-fork``, up to the composed configuration: what a branch takes from its run, and its presets."""

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.errors import RecordError
from robustdyn.launch.fork import forked
from robustdyn.launch.paths import quoted_paths
from robustdyn.run.checkpointing import changed_settings
from robustdyn.run.combinations import check_combinations
from robustdyn.run.config import check
from tests.launch.test_resume import TYPED, remove, write
from tests.runs import compose

PRESETS = sorted(path.stem for path in (config_dir() / "branch").glob("*.yaml"))


def checkpoint_of(run_dir, *typed):
    """A checkpoint of the third epoch without any weights."""
    write(run_dir, *typed)
    settings = OmegaConf.to_container(compose(*typed, "name=n"), resolve=True)
    progress = {"fit_loop": {"epoch_progress": {"current": {"processed": 3}}}}
    state = {"config": settings, "hydra": {}, "loops": progress, "epoch": 2, "global_step": 30}
    state |= {"state_dict": {}, "callbacks": {}, "schedule": {}}
    state |= {"optimizer_states": [], "lr_schedulers": [], "pytorch-lightning_version": "2"}
    path = run_dir / "checkpoints" / "epoch=002.ckpt"
    path.parent.mkdir()
    torch.save(state, path)
    return path


def branch(path, *typed):
    """The composed configuration of the command."""
    name, arguments = forked("fork", quoted_paths([f"checkpoint={path}", *typed]))
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose(name, arguments, return_hydra_config=True)


def changes(path, cfg):
    """The settings of a branch that differ from its run's."""
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    before = torch.load(path, weights_only=True)["config"]
    return {name: new for name, _, new in changed_settings(before, OmegaConf.to_container(own, resolve=True))}


def test_a_branch_has_the_settings_of_its_run(tmp_path):
    path = checkpoint_of(tmp_path / "run", *TYPED)
    cfg = branch(path)
    assert changes(path, cfg) == {}
    assert cfg.fork == {"path": str(path), "epoch": 3}
    assert cfg.name == "n_fork"
    assert cfg.hydra.run.dir.startswith("outputs/n_fork/")
    assert cfg.hydra.overrides.task == []
    assert (cfg.hydra.runtime.choices.method, cfg.hydra.runtime.choices.branch) == ("awp", "unchanged")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_changes_one_part_of_a_run(preset, tmp_path):
    path = checkpoint_of(tmp_path / "run", "trainer.max_epochs=8")
    cfg = branch(path, f"branch={preset}")
    check(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]))
    check_combinations(cfg)
    changed = changes(path, cfg)
    assert len({name.partition(".")[0] for name in changed}) == (preset != "unchanged")
    if preset == "small_radius":
        assert changed == {
            "attack.train.eps": pytest.approx(0.1),
            "attack.train.step_size": pytest.approx(0.025),
        }
    if preset == "averaging":
        assert changed["averaging.start_epoch"] == 3


def test_a_longer_branch_keeps_its_decays(tmp_path):
    cfg = branch(checkpoint_of(tmp_path / "run", *TYPED), "trainer.max_epochs=20", "schedule=cosine")
    assert cfg.decay_epochs == [4, 6]
    assert cfg.schedule == {"_target_": "robustdyn.methods.Cosine", "length": 20}


def test_what_the_run_of_another_version_lacks_is_named(tmp_path):
    path = checkpoint_of(tmp_path / "run", "trainer.max_epochs=8")
    state = torch.load(path, weights_only=True)
    del state["config"]["measure"]["weights"]
    torch.save(state, path)
    assert branch(path).measure.weights == "trained"  # the run's configuration has it
    remove(tmp_path / "run", "measure.weights")
    with pytest.raises(RecordError, match=r"the settings of this run lack measure\.weights, because another"):
        branch(path)
    assert branch(path, "+measure.weights=averaged").measure.weights == "averaged"


def test_a_choice_that_the_run_has_later_is_not_the_checkpoint_s(tmp_path):
    """The run was resumed with another perturbation after the checkpoint was saved."""
    path = checkpoint_of(tmp_path / "run", "trainer.max_epochs=8")
    config = tmp_path / "run" / ".hydra" / "config.yaml"
    changed = OmegaConf.load(config)
    changed.perturbation = {"_target_": "robustdyn.methods.SAM", "rho": 0.1, "warmup_epochs": 0}
    OmegaConf.save(changed, config)
    assert branch(path).perturbation == {}
