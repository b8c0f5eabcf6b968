"""Intervals and tests against values worked out elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import statistics as s
from diffusion2gan.evaluation.metrics import Moments, frechet_distance


def test_wilson_intervals_of_the_published_votes() -> None:
    # The paper's Figure 6 shares with 640 votes, and with 128 effective ones.
    assert s.wilson_interval(0.507 * 640, 640) == pytest.approx((0.468, 0.546), abs=5e-4)
    assert s.wilson_interval(0.548 * 640, 640) == pytest.approx((0.509, 0.586), abs=5e-4)
    assert s.wilson_interval(0.548 * 128, 128) == pytest.approx((0.462, 0.632), abs=5e-4)
    assert s.wilson_interval(0, 10)[0] == 0
    with pytest.raises(UserError, match="expected 0 to"):
        s.wilson_interval(3, 2)


def test_sign_test_is_the_binomial_tail() -> None:
    assert s.sign_test(5, 0) == pytest.approx(2 / 32)
    assert s.sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert s.sign_test(4, 4) == 1
    assert s.sign_test(0, 0) == 1
    scipy_stats = pytest.importorskip("scipy.stats")
    assert s.sign_test(70, 58) == pytest.approx(scipy_stats.binomtest(70, 128).pvalue)


def test_holm_adjusts_from_the_smallest() -> None:
    assert s.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert s.holm([0.6, 0.7]) == [1.0, 1.0]


def test_krippendorff_alpha() -> None:
    assert s.krippendorff_alpha([[0, 0], [1, 1], [0, 0, 0]]) == pytest.approx(1)
    # Krippendorff's own two-rater example: ten units, four disagreements.
    first, second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert s.krippendorff_alpha(list(zip(first, second, strict=True))) == pytest.approx(0.095, abs=5e-4)
    rng = np.random.default_rng(0)
    assert s.krippendorff_alpha(rng.integers(0, 2, (3000, 5)).tolist()) == pytest.approx(0, abs=0.03)
    assert s.krippendorff_alpha([[1, 1], [1]]) is None


def test_bradley_terry_recovers_known_strengths() -> None:
    strength = np.array([1.0, 0.0, -1.0])
    p = 1 / (1 + np.exp(strength[None] - strength[:, None]))
    wins = 4000 * p * (1 - np.eye(3))
    np.testing.assert_allclose(s.bradley_terry(wins, ridge=1e-9), strength, atol=1e-6)
    assert np.isfinite(s.bradley_terry(np.array([[0, 5], [0, 0]]))).all()


def test_elo_orders_and_keeps_its_sum() -> None:
    games = [(0, 1, 1.0)] * 60 + [(0, 1, 0.0)] * 40
    rating = s.elo(games, 2)
    assert rating.sum() == pytest.approx(2000)
    assert rating[0] > rating[1]


def test_cluster_bootstrap_is_wider_than_a_bootstrap_of_votes() -> None:
    rng = np.random.default_rng(0)
    sums = np.where(rng.random(128) < 0.5, 5.0, 0.0)  # all five raters of a prompt agree
    low, high = s.cluster_bootstrap(sums, np.full(128, 5.0))
    assert low < sums.mean() / 5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(128), rel=0.1)
    assert (low, high) == s.cluster_bootstrap(sums, np.full(128, 5.0))


def test_jackknife_interval_covers_the_spread_of_repeated_draws() -> None:
    """The interval of a Frechet distance is about the spread that the distance has over independent samples of the same size."""
    reference = Moments.of(np.random.default_rng(1).standard_normal((4000, 8)))

    def draw(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((2000, 8)) * 1.1 + 0.1

    values = [frechet_distance(Moments.of(draw(i)), reference) for i in range(60)]
    centre, hits, widths = np.mean(values), 0, []
    for i in range(60):
        groups = [Moments.of(part) for part in np.array_split(draw(i), 10)]
        value, low, high = s.frechet_interval(groups, reference)
        assert value == pytest.approx(values[i], rel=1e-9)
        hits += low <= centre <= high
        widths.append((high - low) / 2)
    assert hits >= 54
    assert np.mean(widths) < 4 * np.std(values)  # and not by being far too wide
    with pytest.raises(UserError, match="expected 3 to 20"):
        s.frechet_interval(groups[:2], reference)


def test_jackknife_interval_is_wide_rather_than_narrow_with_few_samples_a_dimension() -> None:
    """Of 2.4 samples a dimension, as 5,000 pictures have for Inception: it must not claim more than is known."""
    reference = Moments.of(np.random.default_rng(1).standard_normal((3000, 40)))
    values, widths = [], []
    for i in range(40):
        x = np.random.default_rng(100 + i).standard_normal((96, 40)) * 1.1 + 0.1
        value, low, high = s.frechet_interval([Moments.of(part) for part in np.array_split(x, 10)], reference)
        values.append(value)
        widths.append((high - low) / 2)
    assert 1.96 * np.std(values) < np.mean(widths) < 3 * 1.96 * np.std(values)
