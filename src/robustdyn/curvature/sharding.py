"""Sums and rows over the processes that each hold a shard of the examples.

A single process is the case of one. Every method is collective: all processes of the group must call it, in
the same order. Results are the same bits on every process.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from robustdyn.curvature.vectors import checksum


class Shards:
    """How the examples are spread over a process group.

    Attributes:
        group: The processes, or None for this one alone.
        counts: Examples on each process, in rank order.
        rank: This process's place among them.
    """

    def __init__(self, examples: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """Exchange the counts of all processes.

        Args:
            examples: How many this process holds.
            device: Device of the tensors that will be passed; NCCL requires a GPU.
            group: The processes; None for this one alone.
        """
        self.group = group
        self._device = device
        self.rank = 0 if group is None else dist.get_rank(group)
        self.counts = self.each(examples)

    @property
    def total(self) -> int:
        """Examples on all processes."""
        return sum(self.counts)

    @property
    def own(self) -> slice:
        """Where this process's examples are among all, in rank order."""
        first = sum(self.counts[: self.rank])
        return slice(first, first + self.counts[self.rank])

    @property
    def processes(self) -> int:
        """How many processes share the work."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over processes, in place: one all-reduce."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def rows(self, own: Tensor) -> Tensor:
        """The rows of all processes, (m_r, ...) on process r, stacked in rank order to (m, ...)."""
        if self.group is None:
            return own
        padded = own.new_zeros((max(self.counts), *own.shape[1:]))
        padded[: len(own)] = own
        home = padded.device
        padded = padded.to(self._device)
        gathered = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(gathered, padded, group=self.group)
        rows = [part[:count] for part, count in zip(gathered, self.counts, strict=True)]
        return torch.cat(rows).to(home)

    def each(self, number: int) -> tuple[int, ...]:
        """The numbers of all processes, in rank order."""
        if self.group is None:
            return (number,)
        own = torch.tensor([number], device=self._device)
        everybody = [torch.empty_like(own) for _ in range(self.processes)]
        dist.all_gather(everybody, own, group=self.group)
        return tuple(int(value) for value in everybody)

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all processes hold the same bits, judged by a checksum."""
        if self.group is None:
            return True
        own = torch.tensor([checksum(tensors)])
        everybody = Shards(1, self._device, self.group).rows(own)
        return bool((everybody == everybody[0]).all())

    def first_complaint(self, complaint: str | None) -> str | None:
        """The error message of the lowest rank that has one, so that all processes refuse together."""
        if self.group is None:
            return complaint
        everybody: list[str | None] = [None] * self.processes
        dist.all_gather_object(everybody, complaint, group=self.group)
        for rank, words in enumerate(everybody):
            if words is not None:
                return f"rank {rank}: {words}"
        return None


def shard(tensors: Sequence[Tensor], rank: int, processes: int) -> tuple[Tensor, ...]:
    """The contiguous part of each tensor that a rank holds; sizes differ by at most one example.

    Args:
        tensors: (m, ...), the same m.
        rank: From 0.
        processes: How many ranks.

    Raises:
        ValueError: If there are fewer examples than processes.
    """
    examples = len(tensors[0])
    if examples < processes:
        raise ValueError(f"{examples} examples cannot be spread over {processes} processes")
    bounds = [examples * r // processes for r in (rank, rank + 1)]
    return tuple(tensor[bounds[0] : bounds[1]] for tensor in tensors)
