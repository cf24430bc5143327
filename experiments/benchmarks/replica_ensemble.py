"""How long does an ensemble of replicas take? 64 replicas × 500 steps on digits, PGD-5, 176,034 parameters.

First one replica's step, in one process on one thread: passing together (vmapped), one by one (looped), and
as many plain PyTorch training steps with the same attack. Then ``robustdyn-replicas`` itself from a
checkpoint of a short run, start measured and everything written, as two processes with half of the replicas
each.

    python experiments/benchmarks/replica_ensemble.py [--replicas 64] [--steps 500] [--rounds 5]

Writes ``experiments/benchmarks/results/replica_ensemble.json`` with the hardware and the date. Aim: ten
minutes on two cores.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
from torch.nn import functional as F

from robustdyn.attacks import PGD
from robustdyn.methods import AdversarialCrossEntropy
from robustdyn.models import PreActResNet
from robustdyn.replicas import Engine, MomentumUpdate, Sampling, StackedNetwork, Training
from robustdyn.replicas.training_step import batch_gradients

CHUNK, BATCH, EXAMPLES, AIM = 16, 64, 400, 600
PROCESSES = 2
RUN = [
    *("method=at", "data=digits", f"data.train_size={EXAMPLES}", f"data.batch_size={BATCH}", "model.width=8"),
    *("attack.eps_255=63.75", "attack.step_255=16", "attack.steps=5", "attack.train.batchnorm=eval"),
    *("optimizer.lr=0.05", "trainer.max_epochs=10", "trainer.check_val_every_n_epoch=100"),
    *("measure=none", "report=false"),
]


def training() -> tuple[torch.nn.Module, Training]:
    """The network and how its replicas train."""
    torch.manual_seed(0)  # what the images show does not matter for the time
    model = PreActResNet(
        num_classes=10,
        in_channels=1,
        width=8,
        blocks=(2, 2, 2, 2),
        strides=(1, 2, 2, 2),
        mean=[0.5],
        std=[0.25],
    )
    attack = PGD(
        norm="linf",
        eps=0.25,
        step_size=16 / 255,
        steps=5,
        random_start="uniform",
        start_std=1e-3,
        batchnorm="eval",
    )
    how = Training(
        images=torch.rand(EXAMPLES, 1, 8, 8),
        targets=torch.randint(10, (EXAMPLES,)),
        objective=AdversarialCrossEntropy(label_smoothing=0.0),
        attack=attack,
        perturbation=None,
        update=MomentumUpdate(momentum=0.9, weight_decay=5e-4, initial_buffer=None),
        learning_rate=[0.005],
        sampling=Sampling(examples=EXAMPLES, batch_size=BATCH, replacement=True, drop_last=False),
        batchnorm="eval",
        seed=0,
    )
    return model.eval(), how


def steps(rounds: int) -> dict[str, list[float]]:
    """Seconds of a chunk's gradients."""
    model, how = training()

    def stacked(engine: Engine) -> None:
        network = StackedNetwork(model, engine)
        theta = network.theta().expand(CHUNK, -1).clone()
        batch_gradients(network, theta, network.statistics(CHUNK), how, range(CHUNK), 0)

    def plain() -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(CHUNK):
            chosen = torch.randint(EXAMPLES, (BATCH,), generator=generator)
            images, targets = how.images[chosen], how.targets[chosen]
            adversarial = how.attack.perturb(model, images, targets, generator)
            torch.autograd.grad(F.cross_entropy(model(adversarial), targets), list(model.parameters()))

    variants = {
        "plain steps": common.timed(plain),
        "looped": common.timed(lambda: stacked("looped")),
        "vmapped": common.timed(lambda: stacked("vmapped")),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ensemble below
    common.alternate(variants, 1)  # the first calls allocate
    found = common.alternate(variants, rounds)
    torch.set_num_threads(threads)
    return found


def ensemble(folder: Path, replicas: int, count: int) -> float:
    """Seconds of a whole ``robustdyn-replicas``."""
    run = folder / "run"
    train = [sys.executable, "-m", "robustdyn.commands.train", *RUN, f"hydra.run.dir={run}"]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
    code = "from robustdyn.commands.replicas import main; main()"
    options = [
        *(
            f"checkpoint={run / 'checkpoints' / 'last.ckpt'}",
            "learning_rate=0.005",
            "sampling.replacement=true",
        ),
        *(
            f"replicas={replicas}",
            f"chunk={CHUNK}",
            "start.tolerance=1e-3",
            f"steps={count}",
            f"schedule.milestones=[{count // 2}]",
        ),
    ]
    started = time.perf_counter()
    shards = [
        subprocess.Popen(
            [sys.executable, "-c", code, *options, f"shard={number}/{PROCESSES}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for number in range(PROCESSES)
    ]
    if any(code != 0 for code in [shard.wait() for shard in shards]):
        raise SystemExit("an ensemble's process failed; its message is above")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--replicas", type=int, default=64, help="a multiple of 32: chunks of 16, two processes"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rounds = steps(args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        seconds = ensemble(Path(folder), args.replicas, args.steps)
    aimed = (args.replicas, args.steps) == (64, 500)
    whole = common.verdict(seconds, at_most=AIM) if aimed else round(seconds, 1)
    common.write_result(
        Path(__file__).stem,
        question="How long does an ensemble of replicas take?",
        settings={
            "parameters": 176_034,
            "attack": "PGD-5",
            "batch": BATCH,
            "chunk": CHUNK,
            "processes": PROCESSES,
            "replicas": args.replicas,
            "steps": args.steps,
        },
        summary=common.compare(rounds, "plain steps") | {"whole ensemble, seconds": whole},
        rounds=rounds,
    )


if __name__ == "__main__":
    main()
