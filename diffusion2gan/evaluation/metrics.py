"""Metrics of feature vectors. Nothing here knows where features come from.

N pictures (or M of another set), d feature dimensions, P prompts, n noises of each. Every sum is taken in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from diffusion2gan.errors import UserError

_ROWS = 2048


def _as_matrix(features: np.ndarray, name: str) -> np.ndarray:
    if features.ndim != 2:
        raise UserError(f"{name}: shape {features.shape}, expected (N, d); give one row of features a picture")
    if not np.isfinite(features).all():
        raise UserError(f"{name}: holds NaN or infinity, expected finite features; the pictures they come from are broken")
    return features


# --- Frechet distance -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Moments:
    """`n` samples, their `mean` (d,) and unbiased `covariance` (d, d), both float64."""

    n: int
    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of (N, d) features, N >= 2. Raises UserError for fewer, or for values that are not finite."""
        n, d = _as_matrix(features, "features").shape
        if n < 2:
            raise UserError(f"{n} feature vectors, expected at least 2: a covariance needs two; generate more pictures")
        mean = features.mean(0, dtype=np.float64)
        scatter = np.zeros((d, d))
        for start in range(0, n, _ROWS):
            centred = features[start : start + _ROWS] - mean
            scatter += centred.T @ centred
        return cls(n, mean, scatter / (n - 1))

    @classmethod
    def over(cls, parts: Iterable[np.ndarray]) -> Moments:
        """Moments of the rows of all `parts` (n, d) together, one pass in the order given. Raises UserError as `of` does."""
        n, shift, total, scatter = 0, np.empty(0), np.empty(0), np.empty((0, 0))
        for part in parts:
            x = _as_matrix(part, "features").astype(np.float64)
            if not n:
                # About any fixed point near the mean: nothing cancels.
                shift, total, scatter = x.mean(0), np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
            x -= shift
            n, total, scatter = n + len(x), total + x.sum(0), scatter + x.T @ x
        if n < 2:
            raise UserError(f"{n} feature vectors, expected at least 2: a covariance needs two; generate more pictures")
        return cls(n, shift + total / n, (scatter - np.outer(total, total) / n) / (n - 1))

    def merge(self, other: Moments) -> Moments:
        """The moments of both samples together, exactly as if they had been one."""
        n, delta = self.n + other.n, other.mean - self.mean
        scatter = self.covariance * (self.n - 1) + other.covariance * (other.n - 1) + np.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), scatter / (n - 1))

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance, (d, d)."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), >= 0; warns for n <= d, where it is defined but says little.

    The last trace by eigenvalues of S2^(1/2) S1 S2^(1/2): real by construction, unlike a general matrix root.
    Raises UserError when the two have different d.
    """
    d = len(a.mean)
    if len(b.mean) != d:
        raise UserError(f"features of {d} and {len(b.mean)} dimensions, expected equal; both must come from one scoring network")
    if min(a.n, b.n) < 2:
        raise UserError(f"a Frechet distance of {min(a.n, b.n)} samples, expected at least 2; generate more pictures")
    if min(a.n, b.n) <= d:
        warnings.warn(f"Frechet distance of {min(a.n, b.n)} samples in {d} dimensions: strongly biased, for debugging only", stacklevel=2)
    # b's root is cached: a reference meets many a's.
    values = np.linalg.eigvalsh(b.root @ a.covariance @ b.root)
    cross = np.sqrt(values.clip(0)).sum()
    distance = float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)
    return max(distance, 0.0)


def frechet_distance_of_few(few: np.ndarray, other: np.ndarray | Moments) -> float:
    """The same of (N, d) features with fewer samples than dimensions, where it is the exact and the quick way.

    With A = (X - mean) / sqrt(N - 1), Tr (S1 S2)^(1/2) is the nuclear norm of A1 A2^T when `other` is features (M, d) too, and the sum
    of the square roots of the eigenvalues of A1 S2 A1^T when it is moments. Raises UserError as `frechet_distance` does.
    """
    n, d = (other.n, len(other.mean)) if isinstance(other, Moments) else _as_matrix(other, "features").shape
    if _as_matrix(few, "features").shape[1] != d:
        raise UserError(f"features of {few.shape[1]} and {d} dimensions, expected equal; both must come from one scoring network")
    if min(len(few), n) < 2:
        raise UserError(f"a Frechet distance of {min(len(few), n)} samples, expected at least 2; generate more pictures")
    mean, root = _mean_and_root(few)
    if isinstance(other, Moments):
        other_mean, trace = other.mean, float(np.trace(other.covariance))
        cross = float(np.sqrt(np.linalg.eigvalsh(root @ other.covariance @ root.T).clip(0)).sum())
    else:
        other_mean, other_root = _mean_and_root(other)
        trace = float((other_root**2).sum())
        cross = float(np.linalg.norm(root @ other_root.T, "nuc"))
    return max(float(((mean - other_mean) ** 2).sum() + (root**2).sum() + trace - 2 * cross), 0.0)


def _mean_and_root(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = x.mean(0, dtype=np.float64)
    return mean, (x - mean) / np.sqrt(len(x) - 1)


@dataclass(frozen=True)
class FdInfinity:
    """FD_N = `intercept` + `slope` / N, and the (N, FD_N) it was fitted to."""

    intercept: float
    slope: float
    points: tuple[tuple[int, float], ...]


def fd_infinity(features: np.ndarray, reference: Moments, points: int = 15, smallest: int | None = None, seed: int = 0) -> FdInfinity:
    """The Frechet distance of (N, d) features to `reference`, extrapolated to endless samples.

    `points` subsets without replacement, their sizes even from `smallest` to N. By default `smallest` is N / 10, but at least
    2 d where N / 2 allows it: with fewer samples than dimensions the bias is no longer straight in 1/N.
    Raises UserError unless 2 <= smallest < N and points >= 2.
    """
    n, d = _as_matrix(features, "features").shape
    smallest = max(n // 10, min(2 * d, n // 2), 2) if smallest is None else smallest
    if points < 2 or not 2 <= smallest < n:
        raise UserError(
            f"FD_inf from {points} subsets of {smallest} to {n} samples, expected 2 or more of growing size; generate more pictures"
        )
    rng = np.random.Generator(np.random.Philox(key=seed))
    sizes = np.linspace(smallest, n, points).round().astype(int)
    subsets = [np.sort(rng.permutation(n)[:size]) for size in sizes]
    distances = [frechet_distance(Moments.of(features[rows]), reference) for rows in subsets]
    slope, intercept = np.polyfit(1 / sizes, distances, 1)
    return FdInfinity(float(intercept), float(slope), tuple((int(s), float(f)) for s, f in zip(sizes, distances, strict=True)))


def gap_closed(fd_student: float, fd_teacher: float, fd_untrained: float) -> float:
    """1 - (FD(student, T_B) - FD(T_A, T_B)) / (FD(untrained, T_B) - FD(T_A, T_B)): 1 is as good as the teacher's own
    pictures from other noises, 0 no better than one step of the undistilled network. Raises UserError when there is no gap."""
    if not fd_untrained > fd_teacher:
        raise UserError(
            f"gap closed: the untrained one-step network is at {fd_untrained:.4g}, the teacher at {fd_teacher:.4g}, expected a gap; "
            "check that `untrained` is the teacher evaluated once"
        )
    return 1 - (fd_student - fd_teacher) / (fd_untrained - fd_teacher)


# --- Precision and recall (Kynkaanniemi et al. 2019) ----------------------------------------------------------------
def _squared(a: np.ndarray, b: np.ndarray, a2: np.ndarray, b2: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2 by one float32 matmul: right to about 1e-6 of |a|^2 + |b|^2, so wrong for near duplicates."""
    return (a2[:, None] + b2[None, :] - 2 * (a @ b.T)).clip(0)


def _squared_exactly(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ((a.astype(np.float64) - b) ** 2).sum(-1)


_BAND = np.float32(1e-5)


class _Points:
    """`given` (N, d), and for float32 products `shifted` to near the origin: the smaller the norms, the better float32 does.
    Exact distances are of `given`: the shift rounds, and a tie would no longer be one."""

    def __init__(self, given: np.ndarray, centre: np.ndarray):
        self.given, self.shifted = given, (given - centre).astype(np.float32, copy=False)
        self.norms = (self.shifted * self.shifted).sum(1)

    def __len__(self) -> int:
        return len(self.given)

    def squared(self, rows: np.ndarray | slice, other: _Points, columns: slice) -> np.ndarray:
        """Distances of some rows to some of another set, in float32."""
        return _squared(self.shifted[rows], other.shifted[columns], self.norms[rows], other.norms[columns])


def _radii(x: _Points, k: int, block: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other point, (N,) float64."""
    n, spare = len(x), min(len(x) - 1, k + 8)
    radii = np.empty(n)
    for i in range(0, n, block):
        rows = slice(i, min(i + block, n))
        nearest, where = np.empty((rows.stop - i, 0), np.float32), np.empty((rows.stop - i, 0), np.int64)
        for j in range(0, n, block):
            d2 = x.squared(rows, x, slice(j, j + block))
            if i == j:
                np.fill_diagonal(d2, np.inf)  # self by index: a duplicate is a neighbour, at distance 0
            nearest = np.concatenate([nearest, d2], 1)
            where = np.concatenate([where, np.broadcast_to(np.arange(j, j + d2.shape[1]), d2.shape)], 1)
            if nearest.shape[1] > spare:
                keep = np.argpartition(nearest, spare - 1, axis=1)[:, :spare]
                nearest, where = np.take_along_axis(nearest, keep, 1), np.take_along_axis(where, keep, 1)
        # float32 only finds the candidates; which is the k-th, and how far it is, float64 differences say.
        for r, candidates in enumerate(where):
            radii[i + r] = np.partition(_squared_exactly(x.given[candidates], x.given[i + r]), k - 1)[k - 1]
    return radii


def _share_inside(points: _Points, centres: _Points, radii: np.ndarray, block: int, strict: bool) -> float:
    """Share of `points` within at least one ball (centre, squared radius), the boundary included unless `strict`."""
    is_inside = np.less if strict else np.less_equal
    inside = np.zeros(len(points), bool)
    for i in range(0, len(points), block):
        for j in range(0, len(centres), block):
            todo = i + np.flatnonzero(~inside[i : i + block])
            if not len(todo):
                break
            columns = slice(j, j + block)
            d2, r2 = points.squared(todo, centres, columns), radii[columns].astype(np.float32)
            band = _BAND * (points.norms[todo][:, None] + centres.norms[None, columns])
            inside[todo[(d2 < r2 - band).any(1)]] = True
            # Too close to the boundary for float32: look again, one candidate a point at a time.
            close = (np.abs(d2 - r2) <= band) & ~inside[todo][:, None]
            while (open_rows := np.flatnonzero(close.any(1))).size:
                first = close[open_rows].argmax(1)
                hit = is_inside(_squared_exactly(points.given[todo[open_rows]], centres.given[j + first]), radii[j + first])
                inside[todo[open_rows[hit]]] = True
                close[open_rows[hit]] = False
                close[open_rows, first] = False
    return float(inside.mean())


def nearest(points: np.ndarray, centres: np.ndarray, block: int = 2048) -> np.ndarray:
    """Index of the nearest of (M, d) `centres` to each of (N, d) `points`: (N,)."""
    points, centres = points.astype(np.float32), centres.astype(np.float32)
    c2 = (centres * centres).sum(1)
    # |p|^2 is the same for all centres.
    return np.concatenate([(c2 - 2 * (points[i : i + block] @ centres.T)).argmin(1) for i in range(0, len(points), block)])


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3, block: int = 2048, strict: bool = False) -> tuple[float, float]:
    """(precision, recall) of (N, d) against (M, d) features: the share of generated pictures inside the union of the balls
    of real ones, and the other way round; a ball reaches to the k-th nearest *other* picture of its own set.

    `strict` leaves a ball's boundary out (PyTorch-StudioGAN's reading): the same unless pictures are duplicates.
    Blockwise: never more than a few `block` x `block` matrices in memory. Raises UserError unless k < N and k < M.
    """
    _as_matrix(generated, "generated features"), _as_matrix(real, "real features")
    if not 1 <= k < min(len(generated), len(real)):
        raise UserError(
            f"precision/recall: k = {k} of {len(generated)} and {len(real)} pictures, expected 1 <= k < both; generate more pictures"
        )
    centre = real.mean(0, dtype=np.float64).astype(np.float32)
    fakes, reals = _Points(generated, centre), _Points(real, centre)
    precision = _share_inside(fakes, reals, _radii(reals, k, block), block, strict)
    recall = _share_inside(reals, fakes, _radii(fakes, k, block), block, strict)
    return precision, recall


# --- Same noise, same picture? --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Retrieval:
    """`hits` (P, n) bool: the student's picture is nearest to the teacher's picture of its own noise. Distances (P,):
    `paired` from its own teacher picture, `control` from those of the same prompt and other noises."""

    hits: np.ndarray
    paired: np.ndarray
    control: np.ndarray

    @property
    def rate(self) -> float:
        return float(self.hits.mean())

    @property
    def chance(self) -> float:
        return 1 / self.hits.shape[1]

    @property
    def ratio(self) -> float:
        """Paired over control distance: 0 for the same pictures, 1 when the noise says nothing."""
        return float(self.paired.mean() / self.control.mean())


def _pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances (n, d) x (m, d) -> (n, m) by differences: exact for equal rows."""
    return np.sqrt(_squared_exactly(a[:, None], b[None]))


def _as_groups(features: np.ndarray, name: str) -> np.ndarray:
    if features.ndim != 3 or features.shape[1] < 2:
        raise UserError(f"{name}: shape {features.shape}, expected (P, n, d) with n >= 2; give every prompt two noises or more")
    return features


def retrieval(student: np.ndarray, teacher: np.ndarray) -> Retrieval:
    """Compares (P, n, d) features of the student with the teacher's, from the same noises. Chance is 1/n.
    Raises UserError when the shapes differ or n < 2."""
    if _as_groups(student, "student features").shape != _as_groups(teacher, "teacher features").shape:
        raise UserError(f"student features {student.shape}, teacher features {teacher.shape}, expected equal shapes from the same noises")
    n = student.shape[1]
    hits, paired, control = [], [], []
    for s, t in zip(student, teacher, strict=True):
        distance = _pairwise(s, t)
        own = np.diag(distance)
        # A tie is no hit: a student with one picture for every noise retrieves nothing.
        hits.append((distance + np.diag(np.full(n, np.inf))).min(1) > own)
        paired.append(own.mean())
        control.append((distance.sum() - own.sum()) / (n * (n - 1)))
    return Retrieval(np.array(hits), np.array(paired), np.array(control))


def within_prompt_diversity(features: np.ndarray) -> np.ndarray:
    """Mean distance between two pictures of one prompt: (P, n, d) -> (P,). Raises UserError for n < 2."""
    n = _as_groups(features, "features").shape[1]
    return np.array([_pairwise(group, group).sum() / (n * (n - 1)) for group in features])


def variance_within(features: np.ndarray, groups: Sequence[str] | np.ndarray) -> float:
    """Share of the total variance (trace) of (N, d) features that lies inside `groups` (N,): 1 when the groups' means are equal.

    The plain ratio of sums of squares; with n pictures a group of pure noise it is 1 - about 1/n, not 1.
    Raises UserError when the lengths differ or nothing varies.
    """
    _as_matrix(features, "features")
    if len(groups) != len(features):
        raise UserError(f"{len(groups)} group labels for {len(features)} pictures, expected one each")
    x = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    total = (x**2).sum()
    if total == 0:
        raise UserError("all features are equal, expected some variance; the sampler returns one picture for everything")
    _, labels = np.unique(np.asarray(groups), return_inverse=True)
    between = sum((x[labels == g].sum(0) ** 2).sum() / (labels == g).sum() for g in range(labels.max() + 1))
    return float(1 - between / total)


def bootstrap_interval(values: np.ndarray, level: float = 0.95, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (P,), prompts redrawn with replacement; a function of the seed."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise UserError(f"bootstrap of values of shape {values.shape}, expected (P,), one a prompt")
    rng = np.random.Generator(np.random.Philox(key=seed))
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- Probe ----------------------------------------------------------------------------------------------------------
Targets = Mapping[str, frozenset[str]]
"""What a prompt asks for: head -> allowed labels. A head that is not named may say anything."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of standardised features, one head per label: `weight` head -> (d + 1, classes), the last row the bias."""

    mean: np.ndarray
    scale: np.ndarray
    labels: dict[str, list[str]]
    weight: dict[str, np.ndarray]

    @classmethod
    def fit(cls, features: np.ndarray, labels: Mapping[str, Sequence[str]], l2: float = 0.01, iterations: int = 100) -> Probe:
        """Multinomial logistic regression of (N, d) features on the labels of every head, mean cross-entropy + l2/2 |W|^2, by L-BFGS
        from zero: convex and without a random number. Raises UserError when a head has not one label a picture."""
        n = len(_as_matrix(features, "features"))
        for head, values in labels.items():
            if len(values) != n:
                raise UserError(f"probe head {head!r}: {len(values)} labels for {n} pictures, expected one each")
        mean = features.mean(0, dtype=np.float64)
        # A dead feature would otherwise be divided by zero here, and blown up on pictures where it wakes.
        scale = np.maximum(features.std(0, dtype=np.float64), 1e-3 * features.std(dtype=np.float64) + 1e-12)
        classes = {head: sorted(set(values)) for head, values in labels.items()}
        weight = {
            head: _logistic_regression(_standardise(features, mean, scale), [classes[head].index(v) for v in values], l2, iterations)
            for head, values in labels.items()
        }
        return cls(mean, scale, classes, weight)

    def predict(self, features: np.ndarray) -> dict[str, list[str]]:
        """The likeliest label of every head for (N, d) features."""
        x = _standardise(_as_matrix(features, "features"), self.mean, self.scale).numpy()
        return {head: [self.labels[head][c] for c in (x @ w).argmax(1)] for head, w in self.weight.items()}

    def agreement(self, features: np.ndarray, targets: Sequence[Targets]) -> np.ndarray:
        """Whether each picture shows what its prompt asks for: (N, d) features, N targets -> (N,) bool.
        True when the prediction of every head that the target names is among its allowed labels."""
        if len(targets) != len(features):
            raise UserError(f"{len(targets)} prompts for {len(features)} pictures, expected one each")
        predicted = self.predict(features)
        return np.array([all(predicted[head][i] in allowed for head, allowed in target.items()) for i, target in enumerate(targets)], bool)


def _standardise(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> torch.Tensor:
    """(N, d) -> (N, d + 1) float32 with a column of ones."""
    x = ((features - mean) / scale).astype(np.float32)
    return torch.from_numpy(np.concatenate([x, np.ones((len(x), 1), np.float32)], 1))


def _logistic_regression(x: torch.Tensor, labels: list[int], l2: float, iterations: int) -> np.ndarray:
    target = torch.tensor(labels)
    weight = torch.zeros(x.shape[1], int(target.max()) + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=iterations, history_size=10, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight, target) + l2 / 2 * weight[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach().numpy().copy()
