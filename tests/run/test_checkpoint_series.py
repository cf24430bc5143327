import pytest
import torch
from torch import nn

from robustdyn.errors import ConfigError, DataFileError
from robustdyn.run.checkpoint_series import find_checkpoints


def save(folder, name, **others):
    """A file of a tiny network: a ``state_dict``, or an entry of what others are given."""
    state = nn.Linear(2, 2).state_dict()
    torch.save({"net": state, **others} if others else state, folder / name)


def save_optimiser(folder, name, rate):
    optimiser = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=rate, momentum=0.9)
    torch.save(optimiser.state_dict(), folder / name)


def epochs(found):
    return {file.epoch: file.path.name for file in found}


@pytest.mark.parametrize(
    ("name", "epoch"),
    [
        ("model_12.pth", 12),  # Rice et al.
        ("model-wideres-epoch76.pt", 76),  # TRADES
        ("model-res-epoch76.pth.tar", 76),
        ("epoch=3-step=120.ckpt", 3),  # Lightning
        ("wrn-34-10_ep5.pt", 5),
        ("34.pt", 34),
        ("resnet18.pth", 0),  # not known, and the only file
        ("best.pth", 0),
    ],
)
def test_the_epoch_in_a_name(name, epoch, tmp_path):
    save(tmp_path, name)
    assert epochs(find_checkpoints(str(tmp_path / name), print)) == {epoch: name}


def test_the_epoch_in_a_file_comes_first(tmp_path):
    save(tmp_path, "model_7.pth", epoch=3)
    assert epochs(find_checkpoints(str(tmp_path), print)) == {3: "model_7.pth"}


def test_a_folder_in_the_order_of_epochs_without_what_has_no_weights(tmp_path):
    for epoch in (2, 10, 1):
        save(tmp_path, f"model_{epoch}.pth")
        save_optimiser(tmp_path, f"opt_{epoch}.pth", 0.1 * epoch)
    torch.save({"loss": [1.0]}, tmp_path / "eval.pth")
    (tmp_path / "log.txt").write_text("")
    said = []
    found = find_checkpoints(str(tmp_path), said.append)
    assert list(epochs(found)) == [1, 2, 10]
    assert [file.groups[0]["lr"] for file in found] == pytest.approx([0.1, 0.2, 1.0])
    (left,) = said
    assert "eval.pth: found a dict (loss)" in left
    pattern = find_checkpoints(str(tmp_path / "model_1*.pth"), said.append)
    assert list(epochs(pattern)) == [1, 10]


def test_an_optimiser_in_the_file_itself_counts(tmp_path):
    save_optimiser(tmp_path, "opt_3.pth", 0.5)
    state = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.2).state_dict()
    save(tmp_path, "model_3.pth", optimizer=state)
    (found,) = find_checkpoints(str(tmp_path / "model_3.pth"), print)
    assert found.groups[0]["lr"] == 0.2


def test_the_last_checkpoint_of_a_run_may_be_its_best(tmp_path):
    for name in ("best_on_test.ckpt", "last.ckpt"):
        save(tmp_path, name, epoch=4, global_step=50)
    assert epochs(find_checkpoints(str(tmp_path), print)) == {4: "best_on_test.ckpt"}


def test_refuses_what_has_no_epoch_or_the_same_one(tmp_path):
    save(tmp_path, "model_3.pth")
    save(tmp_path, "model_best.pth")
    with pytest.raises(
        ConfigError, match=r"model_best.pth: neither the file nor its name says its epoch"
    ) as e:
        find_checkpoints(str(tmp_path), print)
    pattern = str(e.value).rpartition("checkpoint=")[2].strip("'")
    assert epochs(find_checkpoints(pattern, print)) == {3: "model_3.pth"}
    save(tmp_path, "copy_3.pth")
    with pytest.raises(ConfigError, match=r"copy_3.pth and model_3.pth are both of epoch 3"):
        find_checkpoints(str(tmp_path / "*_3.pth"), print)


def test_refuses_what_is_not_there(tmp_path):
    save_optimiser(tmp_path, "opt_1.pth", 0.1)
    with pytest.raises(ConfigError, match="no file with weights"):
        find_checkpoints(str(tmp_path), print)
    with pytest.raises(ConfigError, match="no file with weights"):
        find_checkpoints(str(tmp_path / "*.pt"), print)
    with pytest.raises(DataFileError, match=r"no such file; did you mean opt_1.pth\?"):
        find_checkpoints(str(tmp_path / "opt_2.pth"), print)
