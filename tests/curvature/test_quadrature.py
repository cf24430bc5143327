import math

import pytest
import torch
from torch.testing import assert_close

from robustdyn.curvature import Hessian, LinearOperator
from robustdyn.curvature.probes import gaussian, rademacher
from robustdyn.curvature.quadrature import SpectralDensity, spectral_density
from robustdyn.theory.stationary import stationary_covariance, stationary_variance
from tests.cases import CASES
from tests.curvature.reference import Dense, dense_gradients, dense_hessian, generator, random, risk_of
from tests.tolerances import EXACT64, MC_SIGMAS

SIZE = 40
ETA, MU, OMEGA = 0.1, 0.9, 5e-2


class Diagonal(LinearOperator):
    """A diagonal matrix, whose product has no sums: each entry is rounded once."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__(len(values), values.dtype, values.device)
        self.values = values

    def _matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self.values * vector


def rotated(values: torch.Tensor, seed: int = 5) -> torch.Tensor:
    q, _ = torch.linalg.qr(random(len(values), len(values), seed=seed))
    matrix = q @ torch.diag(values) @ q.T
    return (matrix + matrix.T) / 2


def spectrum() -> torch.Tensor:
    """Outliers on both sides of a bulk, like a network's."""
    outliers = torch.tensor([9.0, 5.0, 3.0, -0.8], dtype=torch.float64)
    return torch.cat([outliers, torch.linspace(-0.4, 1.0, SIZE - 4, dtype=torch.float64)])


def positive() -> torch.Tensor:
    return torch.cat([spectrum()[:3], torch.logspace(-3, 0, SIZE - 3, dtype=torch.float64)])


def noise_root(seed: int = 8) -> torch.Tensor:
    """R with C = R Rᵀ dense, of rank SIZE / 2, and not commuting with the matrices here."""
    scales = torch.logspace(0, -2, SIZE // 2, dtype=torch.float64)
    return random(SIZE, SIZE // 2, seed=seed) * scales


def drawing(root: torch.Tensor):
    """z = R x, x normal."""
    return lambda g: root @ gaussian((root.shape[1],), g, root.dtype, root.device)


def stationary(eigenvalues: torch.Tensor, eta: float = ETA, mu: float = MU, omega: float = OMEGA):
    """h with γ h(λ) = λ σ², written from the formula; ``robustdyn.theory`` has the reference."""
    decayed = eigenvalues + omega
    return eigenvalues * eta * (1 + mu) / (decayed * (1 - mu) * (2 * (1 + mu) - eta * decayed))


def probe_vectors(count: int, size: int = SIZE, seed: int = 0) -> list[torch.Tensor]:
    """The signs that spectral_density draws from a generator of this seed."""
    g = generator(seed)
    return [rademacher((size,), g, torch.float64, torch.device("cpu")) for _ in range(count)]


def quadratic_form(matrix: torch.Tensor, vector: torch.Tensor, function) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (function(values) * (vectors.T @ vector).square()).sum()


def trapezoid(values: torch.Tensor, grid: torch.Tensor) -> float:
    return float(torch.trapezoid(values, grid))


# ---------------------------------------------------------------------- the quadrature of one vector


def test_full_depth_is_the_spectral_measure_of_the_probe():
    matrix = rotated(spectrum())
    operator = Dense(matrix)
    result = spectral_density(operator, probes=3, steps=SIZE, generator=generator())
    values, vectors = torch.linalg.eigh(matrix)
    for i, probe in enumerate(probe_vectors(3)):
        assert_close(result.nodes[i], values, **EXACT64)
        assert_close(result.weights[i], (vectors.T @ probe).square() / SIZE, **EXACT64)
    assert torch.equal(result.masses, torch.full((3,), float(SIZE), dtype=torch.float64))
    assert result.closed.all()
    assert result.products == operator.count == 3 * SIZE
    assert (result.probes, result.steps, result.lengths.tolist()) == (3, SIZE, [SIZE] * 3)
    assert result.seconds > 0.0


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_partial_depth_is_gauss_exact(steps):
    matrix, root = rotated(spectrum()), noise_root()
    matrix = matrix / torch.linalg.matrix_norm(matrix, 2)
    result = spectral_density(Dense(matrix), probes=2, steps=steps, generator=generator(), draw=drawing(root))
    g = generator()
    for i in range(2):
        z = drawing(root)(g)
        assert_close(result.masses[i], z @ z, **EXACT64)
        image = z.clone()
        for power in range(2 * steps):
            moment = result.masses[i] * (result.weights[i] * result.nodes[i] ** power).sum()
            # rounding is relative to zᵀ|A|ʲz ≤ ‖z‖², as ‖A‖ = 1
            assert_close(moment, z @ image, rtol=1e-10, atol=1e-13 * float(z @ z))
            image = matrix @ image
        # And no further: what is missing of the next moment is ‖z‖² Π β_j² (Golub & Meurant, chapter 6).
        moment = result.masses[i] * (result.weights[i] * result.nodes[i] ** (2 * steps)).sum()
        missing = result.masses[i] * result.recursion[i, 1].square().prod()
        assert_close(z @ image - moment, missing, rtol=1e-8, atol=1e-13 * float(z @ z))
    assert not result.closed.any()


def test_rows_are_probability_measures_inside_the_spectrum():
    values = spectrum()
    result = spectral_density(Dense(rotated(values)), probes=4, steps=7, generator=generator())
    assert result.nodes.shape == result.weights.shape == (4, 7)
    assert result.nodes.dtype == result.weights.dtype == result.masses.dtype == torch.float64
    assert_close(result.weights.sum(dim=1), torch.ones(4, dtype=torch.float64), **EXACT64)
    assert (result.weights >= 0.0).all()
    assert (result.nodes.diff(dim=1) > 0.0).all()
    assert result.nodes.min() > values.min() - 1e-12
    assert result.nodes.max() < values.max() + 1e-12


def test_shortened_is_a_shorter_run():
    operator = Dense(rotated(spectrum()))
    deep = spectral_density(operator, probes=3, steps=12, generator=generator())
    short = spectral_density(operator, probes=3, steps=5, generator=generator())
    cut = deep.shortened(5)
    assert torch.equal(cut.nodes, short.nodes)
    assert torch.equal(cut.weights, short.weights)
    assert torch.equal(cut.recursion, short.recursion)
    assert (cut.products, cut.steps) == (short.products, short.steps) == (15, 5)
    assert not cut.closed.any()
    assert torch.equal(deep.shortened(12).nodes, deep.nodes)


# ---------------------------------------------------------------------- traces


def test_trace_of_identity_is_hutchinson():
    matrix = rotated(spectrum())
    result = spectral_density(Dense(matrix), probes=6, steps=4, generator=generator())
    forms = torch.stack([probe @ matrix @ probe for probe in probe_vectors(6)])
    value, error = result.trace_of(lambda x: x)
    assert_close(value, float(forms.mean()), **EXACT64)
    assert_close(error, float(forms.std() / 6**0.5), **EXACT64)
    value, error = result.trace_of(torch.ones_like)
    assert_close(value, float(SIZE), **EXACT64)  # Tr(I) = P without error
    assert error < 1e-10


@pytest.mark.slow  # many samples
def test_traces_of_functions_are_unbiased():
    values = spectrum()
    result = spectral_density(Dense(rotated(values)), probes=100, steps=20, generator=generator())
    for function in (torch.exp, torch.square, lambda x: 1.0 / (x + 2.0)):
        truth = float(function(values).sum())
        value, error = result.trace_of(function)
        assert 0.0 < error < 0.2 * truth
        assert abs(value - truth) < MC_SIGMAS * error


@pytest.mark.slow  # many samples
def test_noise_weighted_traces_are_unbiased():
    root = noise_root()
    matrix = rotated(positive())
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    gamma = (vectors.T @ root).square().sum(dim=1)
    result = spectral_density(Dense(matrix), probes=200, steps=15, generator=generator(), draw=drawing(root))
    for function in (torch.ones_like, torch.square, torch.sin, stationary):
        truth = float((gamma * function(eigenvalues)).sum())
        value, error = result.trace_of(function)
        assert 0.0 < error < 0.2 * abs(truth)
        assert abs(value - truth) < MC_SIGMAS * error


def test_stationary_posterior_over_the_whole_space():
    """Tr(HΣ): the theory's variances, and its full Σ, against quadrature from noise vectors alone."""
    values, root = positive(), noise_root()
    matrix = rotated(values)
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    covariance = (vectors.T @ root @ root.T @ vectors).numpy()
    settings = {"learning_rate": ETA, "momentum": MU, "weight_decay": OMEGA}
    variances = stationary_variance(eigenvalues.numpy(), covariance.diagonal(), **settings)
    truth = float((eigenvalues.numpy() * variances).sum())
    # Σ's correlations do not enter: H is diagonal in this basis
    full = vectors @ torch.from_numpy(stationary_covariance(eigenvalues.numpy(), covariance, **settings))
    assert_close(float(torch.trace(matrix @ full @ vectors.T)), truth, **EXACT64)
    deep = spectral_density(Dense(matrix), probes=200, steps=20, generator=generator(1), draw=drawing(root))
    value, error = deep.trace_of(stationary)
    assert abs(value - truth) < MC_SIGMAS * error
    assert error < 0.1 * truth
    # the same draws by dense algebra: what 20 steps leave out is far below the standard error
    g = generator(1)
    forms = [quadratic_form(matrix, drawing(root)(g), stationary) for _ in range(200)]
    assert abs(value - float(torch.stack(forms).mean())) < 1e-3 * error
    # halving the depth shows the same
    assert abs(value - deep.shortened(10).trace_of(stationary)[0]) < error


def test_gradient_noise_of_a_network():
    """As in practice, ``draw`` puts random signs on centred per-example gradients."""
    risk = risk_of(CASES["tanh_mlp"])
    hessian, gradients = dense_hessian(risk), dense_gradients(risk)
    centred = gradients - gradients.mean(dim=0)
    m = len(centred)

    def draw(g: torch.Generator) -> torch.Tensor:
        return centred.T @ rademacher((m,), g, torch.float64, torch.device("cpu")) / math.sqrt(m - 1)

    result = spectral_density(Hessian(risk), probes=40, steps=8, generator=generator(), draw=draw)
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    gamma = (vectors.T @ torch.cov(gradients.T) @ vectors).diagonal()
    omega = 0.1 - float(eigenvalues.min())

    def function(x: torch.Tensor) -> torch.Tensor:
        return stationary(x, omega=omega)

    truth = float((gamma * function(eigenvalues)).sum())
    value, error = result.trace_of(function)
    assert abs(value - truth) < MC_SIGMAS * error
    assert error < 0.2 * abs(truth)
    value, error = result.trace_of(torch.ones_like)
    assert abs(value - float(gamma.sum())) < MC_SIGMAS * error


@pytest.mark.slow  # many samples
@pytest.mark.parametrize("noisy", [False, True])
def test_standard_errors_are_calibrated(noisy):
    matrix, root = rotated(spectrum()), noise_root()
    draw = drawing(root) if noisy else None
    grid, repeats, found, claimed = torch.tensor([0.0, 0.5, 5.0], dtype=torch.float64), 200, [], []
    for seed in range(repeats):
        result = spectral_density(Dense(matrix), probes=6, steps=2, generator=generator(seed), draw=draw)
        trace = (torch.tensor([x], dtype=torch.float64) for x in result.trace_of(torch.square))
        triples = zip(trace, result.density(grid, 0.5), result.cumulative(grid[:2]), strict=True)
        estimates, errors = (torch.cat(triple) for triple in triples)
        found.append(estimates)
        claimed.append(errors)
    spread = torch.stack(found).var(dim=0)
    ratio = torch.stack(claimed).square().mean(dim=0) / spread
    # A variance from 200 normal numbers is known to (2/200)^½ = 10 %; the tails here are heavier.
    assert ratio.min() > 0.7, ratio
    assert ratio.max() < 1.4, ratio
    if not noisy:
        truth = float((matrix @ matrix).trace())  # two steps are exact for a square
        mean = float(torch.stack(found)[:, 0].mean())
        assert abs(mean - truth) < MC_SIGMAS * float(spread[0] / repeats) ** 0.5


# ---------------------------------------------------------------------- density and distribution


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("width", [None, 0.05])
def test_density_integrates_to_one(width, noisy):
    draw = drawing(noise_root()) if noisy else None
    result = spectral_density(Dense(rotated(spectrum())), probes=4, steps=8, generator=generator(), draw=draw)
    grid, used = result.default_grid(width)
    assert width is None or used == width
    assert grid[0] < result.nodes.min() - 5 * used
    assert grid[-1] > result.nodes.max() + 5 * used
    density, error = result.density(grid, used)
    # what six standard deviations leave out, 2e-9
    assert_close(trapezoid(density, grid), 1.0, rtol=0.0, atol=1e-8)
    assert (density >= 0.0).all()
    assert (error >= 0.0).all()
    # its first moment is the mean eigenvalue, which broadening keeps
    mean = result.trace_of(lambda x: x)[0] / result.trace_of(torch.ones_like)[0]
    assert_close(trapezoid(grid * density, grid), mean, rtol=0.0, atol=1e-6)


def test_density_and_cumulative_at_full_depth():
    matrix, root, probes = rotated(spectrum()), noise_root(), 5
    values, vectors = torch.linalg.eigh(matrix)
    result = spectral_density(
        Dense(matrix), probes=probes, steps=SIZE, generator=generator(), draw=drawing(root)
    )
    g = generator()
    masses = torch.stack([(vectors.T @ drawing(root)(g)).square() for _ in range(probes)]).sum(dim=0)
    grid = torch.tensor([-2.0, -0.5, 0.013, 0.77, 4.0, 20.0], dtype=torch.float64)
    normal = torch.distributions.Normal(values, torch.tensor(0.3, dtype=torch.float64))
    wanted = (masses * normal.log_prob(grid[:, None]).exp()).sum(dim=1) / masses.sum()
    assert_close(result.density(grid, 0.3)[0], wanted, **EXACT64)
    wanted = (masses * (values <= grid[:, None])).sum(dim=1) / masses.sum()
    below, error = result.cumulative(grid)
    assert_close(below, wanted, **EXACT64)
    assert (below[0], below[-1]) == (0.0, 1.0)
    assert error[0] == 0.0
    assert error[-1] < 1e-12
    assert (error[1:-1] > 0.0).all()


def test_density_estimates_the_broadened_spectrum():
    values = spectrum()
    result = spectral_density(Dense(rotated(values)), probes=100, steps=25, generator=generator())
    grid, width = torch.linspace(-2, 11, 27, dtype=torch.float64), 0.4
    normal = torch.distributions.Normal(values, torch.tensor(width, dtype=torch.float64))
    wanted = normal.log_prob(grid[:, None]).exp().mean(dim=1)
    density, error = result.density(grid, width)
    # 1e-6: the quadrature's own error at this depth and width
    assert ((density - wanted).abs() < MC_SIGMAS * error + 1e-6).all()


@pytest.mark.parametrize("steps", [3, 6, 11])
def test_cumulative_obeys_chebyshev_markov_stieltjes(steps):
    matrix = rotated(spectrum())
    result = spectral_density(Dense(matrix), probes=1, steps=steps, generator=generator())
    values, vectors = torch.linalg.eigh(matrix)
    masses = (vectors.T @ probe_vectors(1)[0]).square() / SIZE
    grid = torch.linspace(-1.01, 9.02, 301, dtype=torch.float64)
    truth = (masses * (values <= grid[:, None])).sum(dim=1)
    below, _ = result.cumulative(grid)
    weights = torch.nn.functional.pad(result.weights[0], (1, 1))
    place = torch.searchsorted(result.nodes[0], grid, right=True)  # nodes at or below the point
    allowed = torch.maximum(weights[place], weights[place + 1])
    assert ((below - truth).abs() <= allowed + 1e-12).all()
    assert (below.diff() >= -1e-15).all()


def test_default_grid_of_a_single_eigenvalue():
    for value in (2.0, 0.0):
        matrix = value * torch.eye(SIZE, dtype=torch.float64)
        result = spectral_density(Dense(matrix), probes=2, steps=5, generator=generator())
        grid, width = result.default_grid()
        density, error = result.density(grid, width)
        assert_close(trapezoid(density, grid), 1.0, rtol=0.0, atol=1e-8)
        assert abs(float(grid[density.argmax()]) - value) <= width
        assert error.max() <= 1e-6 * density.max()


# ---------------------------------------------------------------------- housekeeping


def test_one_probe_has_no_standard_error():
    result = spectral_density(Dense(rotated(spectrum())), probes=1, steps=6, generator=generator())
    grid, width = result.default_grid()
    assert math.isnan(result.trace_of(torch.square)[1])
    for estimate, error in (result.density(grid, width), result.cumulative(grid)):
        assert estimate.isfinite().all()
        assert error.isnan().all()
        assert error.shape == grid.shape


def test_same_seed_same_bits_and_no_global_randomness():
    operator, root = Dense(rotated(spectrum())), noise_root()
    rng = torch.get_rng_state()
    for draw in (None, drawing(root)):
        first, second = (
            spectral_density(operator, probes=3, steps=6, generator=generator(1), draw=draw) for _ in range(2)
        )
        assert torch.equal(first.nodes, second.nodes)
        assert torch.equal(first.weights, second.weights)
        assert torch.equal(first.masses, second.masses)
        assert isinstance(first, SpectralDensity)
    assert torch.equal(torch.get_rng_state(), rng)


def test_draw_may_return_its_own_buffer_and_track_gradients():
    buffer = random(SIZE, seed=2).requires_grad_()
    before = buffer.detach().clone()
    result = spectral_density(
        Dense(rotated(spectrum())), probes=2, steps=4, generator=generator(), draw=lambda g: buffer
    )
    assert torch.equal(buffer.detach(), before)
    assert torch.equal(result.nodes[0], result.nodes[1])
    assert not result.weights.requires_grad


def test_operators_keep_their_own_memory():
    """An operator may return its product in a buffer that it uses again."""

    class Reusing(Dense):
        buffer = torch.empty(SIZE, dtype=torch.float64)

        def _matvec(self, vector: torch.Tensor) -> torch.Tensor:
            self.buffer.zero_()
            return self.buffer.addmv_(self.matrix, vector)

    matrix = rotated(spectrum())
    reusing, fresh = (
        spectral_density(kind(matrix), probes=2, steps=6, generator=generator()) for kind in (Reusing, Dense)
    )
    assert_close(reusing.nodes, fresh.nodes, **EXACT64)
    assert_close(reusing.weights, fresh.weights, **EXACT64)


def test_refusals():
    matrix = rotated(spectrum())
    operator = Dense(matrix)
    settings = {"probes": 2, "steps": 4, "generator": generator()}
    with pytest.raises(ValueError, match="probes must be at least 1"):
        spectral_density(operator, **{**settings, "probes": 0})
    with pytest.raises(ValueError, match="steps must be at least 1"):
        spectral_density(operator, **{**settings, "steps": 0})
    with pytest.raises(ValueError, match="draw must return"):
        spectral_density(operator, **settings, draw=lambda g: torch.ones(SIZE + 1))
    with pytest.raises(ValueError, match="draw must return"):
        spectral_density(operator, **settings, draw=lambda g: torch.ones(SIZE, dtype=torch.int64))
    with pytest.raises(ValueError, match="zero vector"):
        spectral_density(operator, **settings, draw=lambda g: torch.zeros(SIZE))
    with pytest.raises(FloatingPointError, match="draw"):
        spectral_density(operator, **settings, draw=lambda g: torch.full((SIZE,), math.inf))
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="not finite"):
            spectral_density(Dense(matrix * bad), **settings)
    result = spectral_density(operator, **settings)
    with pytest.raises(ValueError, match="function must return one value for each node"):
        result.trace_of(torch.sum)
    with pytest.raises(ValueError, match="function is not finite at the node -0"):
        result.trace_of(torch.log)
    grid = torch.linspace(0, 1, 5)
    for width in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="width must be positive"):
            result.density(grid, width)
        with pytest.raises(ValueError, match="width must be positive"):
            result.default_grid(width)
    with pytest.raises(ValueError, match="width=1e-07 needs more than 100000"):
        result.default_grid(1e-7)
    with pytest.raises(ValueError, match="grid must be one-dimensional"):
        result.density(grid[None], 0.1)
    with pytest.raises(ValueError, match="grid must be one-dimensional"):
        result.cumulative(grid[0])
    for steps in (0, 5):
        with pytest.raises(ValueError, match="steps must be between 1 and the 4"):
            result.shortened(steps)
