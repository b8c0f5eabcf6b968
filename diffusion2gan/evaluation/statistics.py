"""Intervals and tests. P prompts, V votes; every random draw is a function of a seed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.metrics import Moments, frechet_distance

Z95 = 1.959963984540054


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. Raises UserError for no trials."""
    if trials < 1 or not 0 <= successes <= trials:
        raise UserError(f"{successes} successes of {trials} trials, expected 0 to {max(trials, 1)} of at least 1")
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def cluster_bootstrap(sums: np.ndarray, counts: np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of sum(sums) / sum(counts), clusters (prompts, with all their votes) redrawn: (P,) each."""
    if sums.shape != counts.shape or sums.ndim != 1 or not len(sums):
        raise UserError(f"clusters of shapes {sums.shape} and {counts.shape}, expected (P,) both, one a prompt")
    rng = np.random.Generator(np.random.Philox(key=seed))
    # How often each prompt is drawn is all that matters.
    weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    totals = weights @ counts
    shares = (weights @ sums)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of so many wins and losses (ties dropped) under a fair coin."""
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(v) for v in logs))


def holm(p_values: Sequence[float]) -> list[float]:
    """p adjusted for testing several hypotheses (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def krippendorff_alpha(votes: Sequence[Sequence[int]]) -> float | None:
    """Agreement of raters, nominal data: `votes` has the votes of each unit. 1 is full agreement, 0 chance.
    None when no unit has two votes or all votes are equal."""
    units = [list(v) for v in votes if len(v) > 1]
    values = sorted({v for unit in units for v in unit})
    if len(values) < 2:
        return None
    index = {v: i for i, v in enumerate(values)}
    coincidence = np.zeros((len(values), len(values)))
    for unit in units:
        counts = np.bincount([index[v] for v in unit], minlength=len(values)).astype(float)
        coincidence += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    totals = coincidence.sum(0)
    n = totals.sum()
    observed = n - np.trace(coincidence)
    expected = (n * n - (totals**2).sum()) / (n - 1)
    return float(1 - observed / expected)


def bradley_terry(wins: np.ndarray, ridge: float = 1e-3, iterations: int = 50) -> np.ndarray:
    """Log-strengths (M,), mean 0, from `wins` (M, M): how often row beat column. Newton steps on the logistic likelihood with a
    little ridge, which also gives an answer when one model won every time."""
    m = len(wins)
    games, strength = wins + wins.T, np.zeros(m)
    for _ in range(iterations):
        p = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
        gradient = (wins - games * p).sum(1) - ridge * strength
        weight = games * p * (1 - p)
        hessian = np.diag(weight.sum(1) + ridge) - weight
        step = np.linalg.solve(hessian, gradient)
        strength += step
        if np.abs(step).max() < 1e-10:
            break
    return np.asarray(strength - strength.mean())


def elo(games: Sequence[tuple[int, int, float]], models: int, draws: int = 200, k: float = 1.0, seed: int = 0) -> np.ndarray:
    """Elo as ADD reports it: start 1000, K = 1, the mean over `draws` shuffled orders of `games` (a, b, score of a): (M,)."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    total = np.zeros(models)
    for _ in range(draws):
        rating = np.full(models, 1000.0)
        for i in rng.permutation(len(games)):
            a, b, score = games[i]
            change = k * (score - 1 / (1 + 10 ** ((rating[b] - rating[a]) / 400)))
            rating[a] += change
            rating[b] -= change
        total += rating
    return total / draws


# Student's t, 97.5 %, by degrees of freedom.
_T975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
)


def frechet_interval(groups: Sequence[Moments], reference: Moments) -> tuple[float, float, float]:
    """(FD, low, high) of all `groups` of generated pictures together: 95 % by the jackknife that leaves one group out.

    It says what other noises and prompts of the same kind would give, not the bias of FD at this N, which the point keeps. Wide rather
    than narrow: by a sixth with 23 samples a dimension, by two thirds with 2.4 (5,000 pictures in 2,048 dimensions).
    Raises UserError for fewer than 3 groups or more than 20.
    """
    g = len(groups)
    if not 3 <= g <= len(_T975) + 1:
        raise UserError(f"a jackknife of {g} groups, expected 3 to {len(_T975) + 1}")

    def merged(parts: Sequence[Moments]) -> Moments:
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.merge(part)
        return whole

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Frechet distance of")  # of a part; the whole is what is told
        without = np.array([frechet_distance(merged([*groups[:i], *groups[i + 1 :]]), reference) for i in range(g)])
    value = frechet_distance(merged(groups), reference)
    error = math.sqrt((g - 1) / g * ((without - without.mean()) ** 2).sum())
    half = _T975[g - 2] * error
    return value, max(value - half, 0.0), value + half
