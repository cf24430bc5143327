"""Imported by every Python that has this folder on its path: what a test wants to see of a rank, or break.

ROBUSTDYN_TEST_COUNTS: folder for how much went through convolutions while measuring, and for a digest of the
    last weights, by run and rank.
ROBUSTDYN_TEST_FAIL: "RANK:SEED", the rank that fails after the first epoch of the run of that seed.
"""

import hashlib
import json
import os
from pathlib import Path


def count_measured_work(folder, rank):
    """Numbers that go into convolutions and their derivatives during measurements, in a file of the rank."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from robustdyn.measure import Measure

    counted = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
    measure = Measure.on_train_epoch_end
    total = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal total
            if operation in counted:
                total += args[0].numel()
            return operation(*args, **(kwargs or {}))

    def measured(self, trainer, module):
        nonlocal total
        if trainer.current_epoch == 0:
            total = 0
        with Count():
            measure(self, trainer, module)
        left = Path(folder) / f"{Path(trainer.default_root_dir).name}_rank{rank}"
        left.with_suffix(".json").write_text(json.dumps(total))
        numbers = torch.cat([p.detach().flatten() for p in module.model.parameters()]).numpy()
        left.with_suffix(".weights").write_text(hashlib.sha256(numbers.tobytes()).hexdigest())

    Measure.on_train_epoch_end = measured
    return lambda: setattr(Measure, "on_train_epoch_end", measure)


def fail_after_an_epoch(seed):
    from robustdyn.methods import AdversarialTraining

    ended = AdversarialTraining.on_train_epoch_end

    def fail(self):
        if self.seed == seed:
            raise ArithmeticError("broken on purpose")
        ended(self)

    AdversarialTraining.on_train_epoch_end = fail


if "RANK" in os.environ:
    if "ROBUSTDYN_TEST_COUNTS" in os.environ:
        count_measured_work(os.environ["ROBUSTDYN_TEST_COUNTS"], os.environ["RANK"])
    if "ROBUSTDYN_TEST_FAIL" in os.environ:
        failing, of_seed = os.environ["ROBUSTDYN_TEST_FAIL"].split(":")
        if os.environ["RANK"] == failing:
            fail_after_an_epoch(int(of_seed))
