"""The scoring network: checked weights, and features that depend on the picture alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("efficientnet_lite_pytorch")

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.scoring import FEATURES, SCORING_BATCH, SCORING_RESOLUTION, ScoringNetwork, weights_path


@pytest.fixture(scope="module")
def network() -> ScoringNetwork:
    return ScoringNetwork()


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (SCORING_BATCH + 3, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)


def test_features_do_not_depend_on_the_other_pictures_of_a_batch(network: ScoringNetwork, pictures: np.ndarray) -> None:
    together = network.features(pictures)
    assert together.shape == (len(pictures), FEATURES)
    assert together.dtype == np.float32
    assert together.std(0).mean() > 0.003
    alone = np.concatenate([network.features(pictures[i : i + 1]) for i in (0, 7, len(pictures) - 1)])
    np.testing.assert_allclose(alone, together[[0, 7, len(pictures) - 1]], atol=1e-4)


def test_folded_batch_norms_change_nothing(network: ScoringNetwork, pictures: np.ndarray) -> None:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite0", image_size=SCORING_RESOLUTION).eval()
    plain.load_state_dict(torch.load(weights_path(), weights_only=True))
    x = torch.from_numpy(pictures[:2]).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, size=(SCORING_RESOLUTION,) * 2, mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = plain.extract_features((x - 127) / 128).mean((2, 3)).numpy()
    np.testing.assert_allclose(network.features(pictures[:2]), expected, atol=1e-3)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"not these")
    with pytest.raises(UserError, match="sha256"):
        ScoringNetwork(weights=tmp_path / "other.pth")


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"diffusion2gan\[eval\]"):
        ScoringNetwork()


def test_float_pictures_are_refused(network: ScoringNetwork) -> None:
    with pytest.raises(UserError, match="expected uint8"):
        network.features(np.zeros((1, 64, 64, 3), np.float32))
