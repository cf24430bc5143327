"""A Hydra application whose runs end in all the ways in which a job can end: ``... '+case={end:raises}'``."""

import os
import signal
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

CONF = Path(__file__).parents[2] / "conf"  # for hydra/launcher=slurm
LONGER_THAN_ANY_TEST_S = 600


class Unreadable(Exception):
    """Cannot be made again from its message, so that no other process can unpickle it."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def task(cfg: DictConfig) -> str:
    end, rank, requeues = cfg.case.end, os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    with Path(f"started_{end}").open("a") as started:
        started.write(f"{rank} {requeues}\n")
    match end:
        case "raises":
            raise ValueError("first line\nsecond line")
        case "raises_what_cannot_be_read":
            raise Unreadable(1, 2)
        case "leaves_with_status_0":
            raise SystemExit
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raises_on_rank_1" if rank == "1":
            raise RuntimeError("only here")
        case "requeued" if requeues != "0":
            pass
        case "raises_on_rank_1" | "cancelled" | "out_of_time" | "requeued":
            time.sleep(LONGER_THAN_ANY_TEST_S)
    return f"{end} after {requeues} requeues"


if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=str(CONF))(task)()
