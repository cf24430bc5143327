"""The covariance C of the mini-batch gradient, from the gradients of M disjoint batches of B examples each.

This is the only estimate of the gradient noise that is defined while BatchNorm uses batch statistics. Every
batch is normalised by its own statistics, as in training, and no gradient of a single example is needed.

What is estimated. Let C₁ be the covariance of one example's gradient over m examples, with denominator m.
Means g_b of B of them, drawn without replacement, have covariance C₁ (m − B) / (B (m − 1)), and two disjoint
ones have −C₁ / (m − 1) with each other (docs/theory.md, section 1). With ḡ the mean of the M, therefore,

    Ĉ = 1/(M − 1) Σ_b (g_b − ḡ)(g_b − ḡ)ᵀ   has the mean   E Ĉ = C₁ m / (B (m − 1))

over random partitions, for any M: B times it is the unbiased covariance of one example's gradient. If the m
examples are themselves a random part of n training examples, or all of them, their disjoint batches are
disjoint batches of the n, so that m drops out. What the optimiser sees, drawing from the n without
replacement, is

    C = C₁ (n − B) / (B (n − 1)) = (1 − B/n) E Ĉ ,

now with C₁ over the n. Disjoint batches differ more than independent ones, and 1 − B/n corrects for this.

With batch statistics g_b is not a mean over examples. Hoeffding's decomposition for draws without replacement
has parts of first, second, … order in the examples. The part of first order obeys the above. The part of
order j has the correlation (−1)^j (n−B−j choose B−j) / (n−B choose B), about (−B/n)^j, between disjoint
batches. The factor 1 − B/n is then too small for it, to leading order by B/n at most, which is negligible at
B = 128, n = 50 000.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustdyn.curvature.empirical_risk import EmpiricalRisk, ParameterFilter
from robustdyn.curvature.examples import Structure, check_lengths, length, structure, take
from robustdyn.curvature.lanczos import EigenResult, eigen_residuals
from robustdyn.curvature.operators import LinearOperator
from robustdyn.curvature.risk_function import BatchNormMode, PerExampleLoss, cross_entropy, plain
from robustdyn.curvature.sharding import Shards

_SLAB_NUMBERS = 2**22  # work space of float64 arithmetic on the rows
# Eigenvalues below this part of the largest count as zero: the Gram matrix knows them to 1e-16 of the
# largest, so that the eigenvector of one at the limit is off by 1e-6.
_ZERO = 1e-10


@dataclass(frozen=True)
class MinibatchTrace:
    """Tr(C): the mean squared distance of a batch's gradient from the mean.

    Attributes:
        estimate: Tr(C).
        standard_error: Over batches, by the jackknife; NaN with two.
        batches: M.
        seconds: Wall time.
    """

    estimate: float
    standard_error: float
    batches: int
    seconds: float


@dataclass(frozen=True, eq=False)
class MinibatchVariances:
    """C seen in a k-dimensional subspace, float64 on the CPU.

    Attributes:
        covariance: (k, k), uᵀ C u.
        variances: (k,), its diagonal: the variance of a batch's gradient along each direction.
        standard_errors: (k,), of the variances, over batches, by the jackknife; NaN with two batches.
        mean: (k,), ḡᵀ u.
        projections: (M, k), g_bᵀ u of every batch.
        batches: M.
        seconds: Wall time.
    """

    covariance: Tensor
    variances: Tensor
    standard_errors: Tensor
    mean: Tensor
    projections: Tensor = field(repr=False)
    batches: int
    seconds: float


class MinibatchCovariance(LinearOperator):
    """C of gradients of mini-batches, at the weights the model has when this is made.

    It holds the M centred gradients: M·P numbers in the model's precision on its device, spread over the
    processes as the batches are (4.5 GB for 100 batches and 11 million parameters). Products cost reading
    them twice, and one all-reduce; everything else takes little more memory.

    The estimate has rank M − 1 at most, and its standard errors treat batches as independent.

    Attributes:
        examples: M·B, the examples used; on each process a remainder too small for a batch is left out.
        batches: M, over all processes.
        batch_size: B.
        batchnorm: Which statistics BatchNorm used.
        factor: 1 − B/n, included in all numbers about C; 1 without ``train_examples``.
        mean: (P,), ḡ, the mean of the M gradients.
        shards: How the batches are spread over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Structure,
        targets: Structure,
        *,
        batch_size: int,
        batchnorm: BatchNormMode,
        generator: torch.Generator | None,
        train_examples: int | None = None,
        loss: PerExampleLoss = cross_entropy,
        chunk_size: int | None = None,
        parameters: ParameterFilter | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Compute the gradient of every batch, which takes the time of one gradient over all examples.

        Args:
            model: As for ``EmpiricalRisk``, and left as it was found in the same way.
            inputs: (m_r, ...), this process's fixed examples, as for ``EmpiricalRisk``.
            targets: (m_r, ...).
            batch_size: B, examples in one batch, each batch on one process.
            batchnorm: ``"train"`` normalises each batch by its own statistics, ``"eval"`` all by the running
                ones.
            generator: Source of the random partition into batches. None takes the examples in their order, B
                at a time. They must then be in random order; otherwise C contains the differences between
                classes.
            train_examples: n, from which the optimiser draws its batches without replacement. None makes no
                correction, for draws with replacement or from an unlimited supply.
            loss: ``(outputs, targets) -> (B,)``.
            chunk_size: Examples per pass within a batch; None takes the batch at once, as ``"train"`` must.
            parameters: Which tensors make up θ, as for ``EmpiricalRisk``.
            group: Processes that share the measurement, each with its own examples (any number that makes a
                batch) and the same weights. All methods are then collective.

        Raises:
            ValueError: If the examples do not make two batches (one on each process), n is less than B,
                processes hold different weights, or ``EmpiricalRisk`` refuses. All raise together.
            FloatingPointError: If the gradient of a batch is not finite.
        """
        self.batch_size, self.batchnorm = batch_size, batchnorm
        inputs, targets = structure(inputs, "inputs"), structure(targets, "targets")
        risk, complaint = None, None
        try:
            order = _order(inputs, targets, batch_size, train_examples, generator)
            risk = EmpiricalRisk(
                model,
                *take((inputs, targets), order[0]),
                loss=loss,
                chunk_size=chunk_size,
                parameters=parameters,
                batchnorm=batchnorm,
            )
        except ValueError as error:
            complaint = str(error)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.shards = Shards(0 if risk is None else len(order), device, group)
        self.batches = self.shards.total
        self.examples = self.batches * batch_size
        complaint = self.shards.first_complaint(complaint)
        if complaint is not None or risk is None:
            raise ValueError(complaint)
        if self.batches < 2:
            raise ValueError(
                f"a covariance needs at least two batches; {length(inputs)} examples make one of {batch_size}"
            )
        _check_same_weights(model, batchnorm, self.shards)
        super().__init__(risk.numel, risk.dtype, risk.device)
        self._risk = risk

        self._rows = torch.empty(len(order), risk.numel, dtype=risk.dtype, device=risk.device)
        for row, which in zip(self._rows, order, strict=True):
            try:
                row.copy_(risk.over(*take((inputs, targets), which)).gradient())
            except FloatingPointError:
                row.fill_(float("nan"))  # all processes refuse together, below
        self.mean = self.shards.sum(self._rows.sum(dim=0)).div_(self.batches)
        if not bool(torch.isfinite(self.mean).all()):
            raise FloatingPointError("the gradient of a batch is not finite")
        self._rows -= self.mean
        self.factor = 1.0 if train_examples is None else 1.0 - batch_size / train_examples
        self._weight = self.factor / (self.batches - 1)
        self._inner_products: Tensor | None = None

    def _matvec(self, vector: Tensor) -> Tensor:
        with self._risk.guard():
            return self.shards.sum(self._rows.T @ (self._rows @ vector)).mul_(self._weight)

    def _matmat(self, matrix: Tensor) -> Tensor:
        with self._risk.guard():
            # columns as rows: half the time in long thin products
            images = (matrix.T.contiguous() @ self._rows.T) @ self._rows
            return self.shards.sum(images).mul_(self._weight).T

    # ------------------------------------------------------------------ the spectrum

    def gram(self) -> Tensor:
        """The (M, M) matrix whose non-zero eigenvalues are those of C, float64 on the CPU.

        M² P multiplications in float64, once. Processes see each other's rows a slab of columns at a time.
        """
        return self._inner() * self._weight

    def eigenpairs(self, k: int) -> EigenResult:
        """The k leading eigenpairs of this estimate, solved in its Gram matrix: exact up to rounding.

        They are not the eigenpairs of C. The variance that C has in many small directions appears in M − 1
        directions here. The leading eigenvalues are therefore too large if M is small compared with C's
        effective rank (Tr C)²/Tr C², and in the mean the first is always too large. We measured this on a
        small convolutional network on digits, with P = 6138 and B = 32. In eval mode (effective rank 3.5) the
        first was 1.7, 1.4, 1.2 and 1.07 times C's with 4, 8, 16 and 32 batches, and the third and fourth 1.6
        and 1.7 times with 8. With batch statistics (effective rank 10) the first was 2.4, 1.8, 1.4 and 1.2
        times C's. The trace has no such bias, and neither have ``variances`` along directions found without
        these batches. For variances along these eigenvectors, use a MinibatchCovariance of other examples.

        Args:
            k: At most the rank, which is at most M − 1.

        Returns:
            With residuals from k products; ``converged`` where they are below √eps of the largest eigenvalue.

        Raises:
            ValueError: If there are not k non-zero eigenvalues.
        """
        began = time.perf_counter()
        if not 1 <= k <= self.batches - 1:
            raise ValueError(
                f"{self.batches} batches give between 1 and {self.batches - 1} eigenpairs, not {k}"
            )
        values, vectors = torch.linalg.eigh(self._inner())
        # one process decides on signs, and on bases where eigenvalues nearly coincide
        decided = torch.cat([values[None], vectors]).to(self.device)
        decided = self.shards.sum(decided if self.shards.rank == 0 else decided.zero_()).flip(1)
        values, vectors = decided[0].cpu(), decided[1:]
        rank = int((values > _ZERO * values[0]).sum())
        if k > rank:
            raise ValueError(
                f"these {self.batches} gradients have covariance of rank {rank}: no {k} eigenpairs"
            )
        own = vectors[self.shards.own, :k] / values[:k].sqrt().to(self.device)
        columns = torch.empty(k, self.shape[0], dtype=self.dtype, device=self.device)
        for slab, rows in self._slabs():
            columns[:, slab] = self.shards.sum(own.T @ rows)
        eigenvalues = values[:k] * self._weight
        residuals = eigen_residuals(self, eigenvalues, columns.T)
        return EigenResult(
            eigenvalues=eigenvalues,
            eigenvectors=columns.T,
            residuals=residuals,
            converged=residuals <= torch.finfo(self.dtype).eps ** 0.5 * eigenvalues[0],
            products=k,
            restarts=0,
            seconds=time.perf_counter() - began,
            which="largest",
            warm_start=columns.sum(dim=0),
        )

    # ------------------------------------------------------------------ numbers with standard errors

    def trace(self) -> MinibatchTrace:
        """Tr(C), unbiased for any M."""
        began = time.perf_counter()
        own = torch.zeros(len(self._rows), dtype=torch.float64, device=self.device)
        for _, rows in self._slabs():
            own += rows.square().sum(dim=1)
        squares = self.shards.rows(own).cpu()
        return MinibatchTrace(
            estimate=float(squares.sum()) * self._weight,
            standard_error=float(_jackknife_error(squares)) * self.factor,
            batches=self.batches,
            seconds=time.perf_counter() - began,
        )

    def variances(self, directions: Tensor) -> MinibatchVariances:
        """u_iᵀ C u_i with standard errors; unbiased for any M along directions found without these batches.

        Args:
            directions: (P, k), not necessarily orthonormal.

        Raises:
            ValueError: If their shape is not (P, k).
        """
        began = time.perf_counter()
        if directions.dim() != 2 or len(directions) != self.shape[0]:
            raise ValueError(f"directions must be ({self.shape[0]}, k), got {tuple(directions.shape)}")
        columns = plain(directions)
        own = torch.zeros(len(self._rows), columns.shape[1], dtype=torch.float64, device=self.device)
        mean = torch.zeros(columns.shape[1], dtype=torch.float64, device=self.device)
        for slab, rows in self._slabs():
            part = columns[slab].to(rows)
            own += rows @ part
            mean += self.mean[slab].double() @ part
        centred, mean = self.shards.rows(own).cpu(), mean.cpu()
        covariance = centred.T @ centred * self._weight
        return MinibatchVariances(
            covariance=covariance,
            variances=covariance.diagonal().clone(),
            standard_errors=_jackknife_error(centred.square()) * self.factor,
            mean=mean,
            projections=centred + mean,
            batches=self.batches,
            seconds=time.perf_counter() - began,
        )

    # ------------------------------------------------------------------ the rows

    def _inner(self) -> Tensor:
        """The inner products of all centred gradients, (M, M) float64 on the CPU."""
        if self._inner_products is None:
            own = torch.zeros(len(self._rows), self.batches, dtype=torch.float64, device=self.device)
            for slab, rows in self._slabs():
                own += rows @ self.shards.rows(self._rows[:, slab]).double().T
            everybody = self.shards.rows(own).cpu()
            self._inner_products = (everybody + everybody.T) / 2.0
        return self._inner_products

    def _slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """This process's rows in float64, some columns at a time, the same ones on every process."""
        width = max(1, _SLAB_NUMBERS // self.batches)
        for start in range(0, self.shape[0], width):
            slab = slice(start, start + width)
            yield slab, self._rows[:, slab].double()


def _order(
    inputs: Structure,
    targets: Structure,
    batch_size: int,
    train_examples: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The places of this process's examples, one row for each batch."""
    check_lengths(inputs, targets)
    examples = length(inputs)
    if not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size must be between 1 and the {examples} examples here, not {batch_size}")
    if train_examples is not None and train_examples < batch_size:
        raise ValueError(f"train_examples={train_examples} do not make a batch of {batch_size}")
    if generator is None:
        order = torch.arange(examples)
    else:
        order = torch.randperm(examples, generator=generator, device=generator.device)
    batches = examples // batch_size
    return order[: batches * batch_size].view(batches, batch_size)


def _check_same_weights(model: nn.Module, batchnorm: BatchNormMode, shards: Shards) -> None:
    # running statistics may differ where they are not used, and do after distributed training
    if not shards.same([*model.parameters(), *(model.buffers() if batchnorm == "eval" else ())]):
        raise ValueError("the processes of group hold different weights or running statistics")


def _jackknife_error(squares: Tensor) -> Tensor:
    """The jackknife standard error of Σ_b q_b / (M − 1), with q_b a squared distance from the sample mean.

    Without batch a the estimate is (Σ q − q_a M/(M−1)) / (M − 2), for a distance along a direction as for one
    in R^P, so that se² = M / ((M−1)(M−2)²) Σ_b (q_b − q̄)². Whatever the distribution, this is in the mean too
    large by 2 Tr(C²) / ((M−1)(M−2)), with C the covariance in question: for normal gradients the standard
    error is too large by √((M−1)/(M−2)). The sample fourth moment of ``projected_covariance`` gives the
    same for many batches, is 22 % too small with 8 and 12 % with 16, and has no such form for a trace.

    Args:
        squares: q, (M, ...).

    Returns:
        (...), NaN with two batches, which have one distance only.
    """
    count = len(squares)
    if count < 3:
        return torch.full(squares.shape[1:], float("nan"), dtype=squares.dtype)
    spread = (squares - squares.mean(dim=0)).square().sum(dim=0)
    return (count / (count - 1) * spread).sqrt() / (count - 2)
