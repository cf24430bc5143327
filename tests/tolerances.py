"""All shared numerical tolerances; a test that needs another one derives it in a comment."""

# float64 algebra on small well-conditioned problems: a few hundred ulp.
EXACT64 = {"rtol": 1e-10, "atol": 1e-12}
# float32 algebra with sums over at most a few thousand terms: sqrt(1e3) * 6e-8, times ten.
EXACT32 = {"rtol": 2e-5, "atol": 2e-6}
# central finite differences in float64: step 1e-5 gives truncation 1e-10 and rounding 1e-11 / step.
FD = {"rtol": 1e-5, "atol": 1e-6}
# a stochastic estimate must lie within this many of its own standard errors (fixed seeds).
MC_SIGMAS = 4.0
