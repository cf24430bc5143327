"""What a run's folder is called, and what its status says."""

import json
import re
import shutil
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustdyn.records.progress import RunStatus, folder_name, identity, is_done, mark_done

keys = st.sampled_from(["seed", "method", "data.root", "decay_epochs", "optimizer.lr"])
requests = st.dictionaries(keys, st.text("0/9a,[]é", min_size=1, max_size=70), max_size=5).map(
    lambda values: [f"{key}={value}" for key, value in values.items()]
)


@given(requests, requests, st.lists(keys, max_size=2), st.lists(keys, max_size=2), st.randoms())
def test_folders_are_named_after_the_request_alone(first, second, swept, more, random):
    name = folder_name(first, ["data"], swept)
    shuffled = random.sample(first, len(first))
    assert folder_name(shuffled, ["data"], swept) == name
    assert len(name.encode()) <= 255
    assert "/" not in name
    same = identity(first, ["data"]) == identity(second, ["data"])
    assert (folder_name(second, ["data"], more) == name) <= same  # no two requests share one
    assert "data.root" not in name


def test_folders_say_what_is_swept_where_they_cannot_say_all():
    request = ("seed=0", *(f"a.very.long.setting.number_{n}=1" for n in range(5)))
    assert re.fullmatch(r"seed=0-[0-9a-f]{8}", folder_name(request, [], ["seed"]))
    swept = ("data=svhn", *request, "data.partial=True")  # not swept, though a setting of what is
    assert re.fullmatch(r"data=svhn,seed=0-[0-9a-f]{8}", folder_name(swept, [], ["seed", "data"]))
    assert folder_name(("seed=0", "method=at"), [], []) == "method=at,seed=0"
    assert folder_name((), [], []) == "default"


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text())


SETTINGS = {"seed": 0, "optimizer": {"lr": 0.1}, "trainer": {"max_epochs": 2}, "report": True}


def test_done_is_said_at_the_end_and_of_the_same_settings(tmp_path):
    with RunStatus(tmp_path, SETTINGS):
        assert status(tmp_path)["state"] == "running"
        assert not is_done(tmp_path, SETTINGS)
    assert is_done(tmp_path, SETTINGS)
    assert is_done(tmp_path, SETTINGS | {"report": False})
    assert not is_done(tmp_path, SETTINGS | {"seed": 1})
    assert not is_done(tmp_path, SETTINGS | {"trainer": {"max_epochs": 3}})  # it is to continue
    assert not is_done(tmp_path / "elsewhere", SETTINGS)
    (tmp_path / "status.json").write_text('{"state": "do')  # of a machine that went down
    assert not is_done(tmp_path, SETTINGS)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_leaves_the_run_to_go_on(end, tmp_path):
    with suppress(BaseException), RunStatus(tmp_path, SETTINGS):
        raise end
    assert status(tmp_path)["state"] == "running"
    assert not (tmp_path / "error.txt").exists()


def test_a_run_can_say_it_is_done_for_its_own_report(tmp_path):
    mark_done(tmp_path)  # not a run that keeps a status: nothing to say
    assert not (tmp_path / "status.json").exists()
    with RunStatus(tmp_path, SETTINGS):
        mark_done(tmp_path)
        assert is_done(tmp_path, SETTINGS)
    assert is_done(tmp_path, SETTINGS)


def test_a_full_disk_does_not_hide_what_went_wrong(tmp_path):
    def fail():
        with RunStatus(tmp_path / "run", SETTINGS):
            shutil.rmtree(tmp_path / "run")  # the status can no longer be written
            raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        fail()
