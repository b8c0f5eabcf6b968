"""Metrics of features against closed forms and brute force."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import metrics
from diffusion2gan.evaluation.metrics import (
    Moments,
    Probe,
    bootstrap_interval,
    fd_infinity,
    frechet_distance,
    frechet_distance_of_few,
    gap_closed,
    precision_recall,
    retrieval,
    variance_within,
    within_prompt_diversity,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_frechet_distance_of_isotropic_gaussians_is_closed_form() -> None:
    d, shift, scale = 16, 0.3, 1.7
    a = Moments(1000, np.zeros(d), np.eye(d))
    b = Moments(1000, np.full(d, shift), scale**2 * np.eye(d))
    assert frechet_distance(a, b) == pytest.approx(d * shift**2 + d * (1 - scale) ** 2, rel=1e-12)  # 9.28


def test_frechet_distance_is_symmetric_and_zero_of_itself() -> None:
    a, b = Moments.of(normal(200, 12)), Moments.of(normal(300, 12, seed=1) @ normal(12, 12, seed=2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_equals_the_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    a, b = Moments.of(normal(200, 8)), Moments.of(normal(200, 8, seed=1) @ normal(8, 8, seed=2))
    root = np.trace(sqrtm(a.covariance @ b.covariance)).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_moments_are_numpys_and_merge_as_one_pass() -> None:
    x = normal(5000, 7) * 3 + 2
    whole, merged = Moments.of(x), Moments.of(x[:17]).merge(Moments.of(x[17:2200])).merge(Moments.of(x[2200:]))
    np.testing.assert_allclose(whole.covariance, np.cov(x.T), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    assert merged.n == whole.n == 5000


def test_frechet_distance_of_few_is_the_same_distance() -> None:
    rng = np.random.default_rng(0)
    for n, m, d in ((40, 50, 16), (12, 9, 30)):
        a, b = rng.standard_normal((n, d)), 1.5 * rng.standard_normal((m, d)) + 0.3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = frechet_distance(Moments.of(a), Moments.of(b))
        assert frechet_distance_of_few(a, b) == pytest.approx(expected, rel=1e-7)
        assert frechet_distance_of_few(a, Moments.of(b)) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance_of_few(a, a) == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match="30 and 29 dimensions"):
        frechet_distance_of_few(a, b[:, :29])
    with pytest.raises(UserError, match="1 samples"):
        frechet_distance_of_few(a[:1], b)


def test_frechet_distance_refuses_one_sample_and_warns_when_rank_deficient() -> None:
    with pytest.raises(UserError, match="at least 2"):
        Moments.of(normal(1, 4))
    with pytest.raises(UserError, match="NaN"):
        Moments.of(np.full((3, 2), np.nan))
    with pytest.raises(UserError, match="one scoring network"):
        frechet_distance(Moments.of(normal(9, 4)), Moments.of(normal(9, 5)))
    a = Moments.of(normal(4, 8))
    with pytest.warns(UserWarning, match="biased"):
        frechet_distance(a, a)


def test_fd_infinity_recovers_a_known_intercept() -> None:
    d, shift = 8, 0.5
    reference = Moments(10**9, np.zeros(d), np.eye(d))
    x = normal(6000, d) + shift
    fit = fd_infinity(x, reference, seed=1)
    assert fit.intercept == pytest.approx(d * shift**2, rel=0.05)
    assert len(fit.points) == 15
    assert fit.points[-1][0] == 6000
    assert fit == fd_infinity(x, reference, seed=1)
    # From the same distribution the plain distance is biased away from zero, the intercept is not.
    null = fd_infinity(normal(3000, d, seed=3), reference)
    assert null.slope > 0
    assert abs(null.intercept) < 0.3 * null.points[0][1]
    with pytest.raises(UserError, match="FD_inf"):
        fd_infinity(x[:2], reference)


def test_gap_closed() -> None:
    assert gap_closed(2.0, 2.0, 12.0) == 1
    assert gap_closed(12.0, 2.0, 12.0) == 0
    assert gap_closed(4.0, 2.0, 12.0) == pytest.approx(0.8)
    with pytest.raises(UserError, match="expected a gap"):
        gap_closed(1.0, 2.0, 2.0)


# --- Precision and recall -------------------------------------------------------------------------------------------
def brute_force(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    def share(points: np.ndarray, centres: np.ndarray) -> float:
        own = np.sqrt(((centres[:, None] - centres[None]) ** 2).sum(-1))
        np.fill_diagonal(own, np.inf)
        radius = np.sort(own, 1)[:, k - 1]
        return float((np.sqrt(((points[:, None] - centres[None]) ** 2).sum(-1)) <= radius[None]).any(1).mean())

    return share(generated, real), share(real, generated)


def test_precision_is_of_the_generated_and_recall_of_the_real() -> None:
    precision, recall = precision_recall(0.1 * normal(200, 16), 3 * normal(200, 16, seed=1))
    assert precision > 0.8
    assert recall < 0.3


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_equals_brute_force_whatever_the_block(k: int) -> None:
    generated, real = normal(150, 6).astype(np.float32), (1.3 * normal(130, 6, seed=1) + 0.4).astype(np.float32)
    expected = brute_force(generated.astype(np.float64), real.astype(np.float64), k)
    assert min(expected) > 0.05
    assert max(expected) < 1
    for block in (32, 1000):
        assert precision_recall(generated, real, k, block) == expected


def test_precision_recall_of_duplicates_far_from_the_origin() -> None:
    # Radius 0: only the very same point is inside, which |a|^2 + |b|^2 - 2ab in float32 cannot tell.
    points = np.repeat(normal(10, 6) + 1000, 5, axis=0).astype(np.float32)
    assert precision_recall(points, points) == (1.0, 1.0)
    near = points + np.float32(1e-3)
    assert precision_recall(near, points)[0] == 0.0


def test_nearest_is_the_smallest_distance() -> None:
    points, centres = normal(50, 5), normal(40, 5, seed=1)
    distance = ((points[:, None] - centres[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(metrics.nearest(points, centres, block=7), distance.argmin(1))


def test_precision_recall_refuses_too_few_pictures() -> None:
    with pytest.raises(UserError, match="k = 3 of 3"):
        precision_recall(normal(3, 4), normal(9, 4))


# --- Same noise, same picture ---------------------------------------------------------------------------------------
def test_retrieval_is_perfect_for_the_teacher_itself_and_chance_for_strangers() -> None:
    teacher = normal(60, 16, 10)
    same = retrieval(teacher, teacher)
    assert same.rate == 1
    assert same.ratio == 0
    stranger = retrieval(normal(60, 16, 10, seed=1), teacher)
    assert stranger.chance == 1 / 16
    assert stranger.rate == pytest.approx(1 / 16, abs=0.03)
    assert stranger.ratio == pytest.approx(1, abs=0.02)
    one_picture = retrieval(np.zeros((5, 4, 3)), np.zeros((5, 4, 3)))
    assert one_picture.rate == 0
    with pytest.raises(UserError, match="equal shapes"):
        retrieval(teacher[:3], teacher)


def test_diversity_is_the_mean_distance_of_two() -> None:
    features = np.array([[[0.0, 0], [3, 4]], [[1, 1], [1, 1]]])
    np.testing.assert_allclose(within_prompt_diversity(features), [5, 0])
    with pytest.raises(UserError, match="two noises"):
        within_prompt_diversity(features[:, :1])


def test_variance_within_groups() -> None:
    groups = np.repeat(["a", "b"], 2)
    assert variance_within(np.array([[0.0], [0], [1], [1]]), groups) == pytest.approx(0)
    assert variance_within(np.array([[0.0], [1], [0], [1]]), groups) == pytest.approx(1)
    # Group means +-1 and variance 1 in each: half of it.
    assert variance_within(np.array([[0.0], [2], [-2], [0]]), groups) == pytest.approx(0.5)


def test_bootstrap_interval_is_seeded_and_holds_the_mean() -> None:
    values = normal(400) + 2
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert (low, high) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)


# --- Probe ----------------------------------------------------------------------------------------------------------
def separable(seed: int = 0) -> tuple[np.ndarray, dict[str, list[str]]]:
    kind = np.random.default_rng(seed).integers(0, 3, 300)
    style = np.random.default_rng(seed + 1).integers(0, 2, 300)
    x = normal(300, 10, seed=seed + 2) * 0.3
    x[np.arange(300), kind] += 4
    x[:, 5] += 4 * style
    return x.astype(np.float32), {"kind": [f"k{v}" for v in kind], "style": [f"s{v}" for v in style]}


def test_probe_learns_separable_labels() -> None:
    x, labels = separable()
    probe = Probe.fit(x, labels)
    fresh, fresh_labels = separable(10)
    predicted = probe.predict(fresh)
    assert min(np.mean(np.array(predicted[head]) == np.array(fresh_labels[head])) for head in labels) > 0.99
    again = Probe.fit(x, labels)
    assert all(np.array_equal(probe.weight[h], again.weight[h]) for h in labels)
    with pytest.raises(UserError, match="one each"):
        Probe.fit(x, {"kind": labels["kind"][:-1]})


def test_probe_is_the_optimum_of_its_loss() -> None:
    # At a minimum of mean cross-entropy + l2/2 |W|^2 the gradient vanishes: l2 W = X^T (Y - softmax(X W)) / N.
    x, labels = separable()
    probe = Probe.fit(x, labels, l2=0.1)
    rows = metrics._standardise(x, probe.mean, probe.scale).numpy().astype(np.float64)
    logits = rows @ probe.weight["kind"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = np.array([[v == label for label in probe.labels["kind"]] for v in labels["kind"]])
    gradient = rows.T @ (p - y) / len(x)
    gradient[:-1] += 0.1 * probe.weight["kind"][:-1]
    assert np.abs(gradient).max() < 1e-4


def test_agreement_asks_only_for_the_heads_that_a_prompt_names() -> None:
    x, labels = separable()
    probe = Probe.fit(x, labels)
    right = [{"kind": frozenset({k})} for k in labels["kind"]]
    assert probe.agreement(x, right).mean() > 0.99
    assert probe.agreement(x, [{} for _ in x]).all()
    wrong_style = [t | {"style": frozenset({"s0"})} for t in right]
    expected = np.array([s == "s0" for s in labels["style"]])
    assert (probe.agreement(x, wrong_style) == expected).mean() > 0.99
