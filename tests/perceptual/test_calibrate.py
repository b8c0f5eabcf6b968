"""Calibration and scoring on triplets whose answer is known, and the BAPPS folder."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual import LatentLPIPS, LatentVGG
from diffusion2gan.perceptual.bapps import TripletFolder, subsets
from diffusion2gan.perceptual.calibrate import Judgements, best_possible, calibrate, channel_differences, head_vector, judge, two_afc
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig


def _metric(channels: int = 3) -> LatentLPIPS:
    torch.manual_seed(0)
    return LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=channels, width=0.125)))


def test_the_distance_is_linear_in_the_heads() -> None:
    metric = _metric()
    for head in metric.lins:
        nn.init.uniform_(head.weight)
    x0, x1 = torch.randn(2, 3, 3, 16, 16)
    differences = channel_differences(metric.target_features(x0), metric.target_features(x1))
    torch.testing.assert_close(differences @ head_vector(metric), metric(x0, x1))


def _known(count: int, channels: int, useful: int, seed: int = 0) -> Judgements:
    """The first `useful` channels decide the judgement, the rest is noise of the same size."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, count, channels, generator=generator)
    judgement = (first[:, :useful].sum(1) > second[:, :useful].sum(1)).float()
    return Judgements(first, second, judgement)


def test_calibration_finds_the_channels_that_matter() -> None:
    metric = _metric()
    channels = len(head_vector(metric))
    train, held_out = _known(4000, channels, 16), _known(2000, channels, 16, seed=1)
    before = two_afc(head_vector(metric), held_out)
    calibrate(metric, train, steps=2000, dropout=0.0)
    heads = head_vector(metric)
    assert metric.calibrated and (heads >= 0).all() and abs(heads.mean().item() - 1) < 1e-5
    assert heads[:16].min() > 5 * heads[16:].mean(), (heads[:16].min(), heads[16:].mean())
    assert two_afc(heads, held_out) > max(0.85, before + 0.2)
    first, again = (calibrate(_metric(), train, steps=50) for _ in range(2))
    assert torch.equal(head_vector(again), head_vector(first))


def test_scores_by_hand() -> None:
    judgements = Judgements(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [1.0], [3.0]]), torch.tensor([0.2, 0.9, 0.7]))
    # Row 0: the metric says first (0.8 agree); row 1: second (0.9); row 2: a tie.
    assert two_afc(torch.ones(1), judgements) == pytest.approx((0.8 + 0.9 + 0.5) / 3)
    assert best_possible(judgements) == pytest.approx((0.8 + 0.9 + 0.7) / 3)


def test_too_few_triplets() -> None:
    with pytest.raises(UserError, match="at least 100"):
        calibrate(_metric(), _known(99, 8, 2))
    with pytest.raises(UserError, match="no triplets"):
        judge(_metric(), [], lambda x: x)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_pictures_that_cannot_be_compared(value: float) -> None:
    """No heads are fitted to pictures that all equal their references, or whose features are not finite."""
    metric = _metric()
    known = _known(100, len(head_vector(metric)), 2)
    with pytest.raises(UserError, match="differ from their references by .*, expected a number above 0"):
        calibrate(metric, Judgements(known.first * value, known.second, known.judgement), steps=1)
    assert not metric.calibrated and torch.equal(head_vector(metric), torch.ones(known.first.shape[1]))


@pytest.fixture
def bapps(tmp_path: Path) -> Path:
    """Two subsets of six triplets: p1 is the reference itself in every second one."""
    rng = np.random.default_rng(0)
    for subset in ("traditional", "cnn"):
        base = tmp_path / "2afc" / "val" / subset
        for part in ("ref", "p0", "p1", "judge"):
            (base / part).mkdir(parents=True)
        for i in range(6):
            reference = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
            other = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
            for part, picture in (("ref", reference), ("p0", other if i % 2 else reference), ("p1", reference if i % 2 else other)):
                Image.fromarray(picture).save(base / part / f"{i:06d}.png")
            np.save(base / "judge" / f"{i:06d}.npy", np.array([float(i % 2)], np.float32))
    return tmp_path


def test_bapps_folder(bapps: Path) -> None:
    found = subsets(bapps, "val", resolution=16)
    assert list(found) == ["cnn", "traditional"] and len(found["cnn"]) == 6
    metric, passes = _metric(), []
    metric.net.register_forward_hook(lambda *_: passes.append(1))
    judgements = judge(metric, found["cnn"].batches(4), lambda x: x)
    assert len(passes) == 2 * 3  # two batches; reference, first and second once each
    assert judgements.judgement.tolist() == [0, 1, 0, 1, 0, 1]
    assert two_afc(head_vector(_metric()), judgements) == 1.0
    reference, first, _, _ = next(found["cnn"].batches(1))
    assert reference.shape == (1, 3, 16, 16) and reference.min() >= -1 and reference.max() <= 1
    assert torch.equal(reference, first)
    assert next(TripletFolder(bapps / "2afc/val/cnn", 8).batches(2))[0].shape == (2, 3, 8, 8)


def test_bad_bapps_folders(bapps: Path) -> None:
    with pytest.raises(UserError, match="2afc/train"):
        subsets(bapps, "train")
    folder = bapps / "2afc" / "val" / "cnn"
    np.save(folder / "judge" / "000001.npy", np.array([2.0]))
    with pytest.raises(UserError, match="holds 2.0"):
        list(TripletFolder(folder, 16).batches())
    np.save(folder / "judge" / "000001.npy", np.array([{"a": 1}]))
    with pytest.raises(UserError, match="cannot be read"):
        list(TripletFolder(folder, 16).batches())
    judged = (folder / "judge" / "000002.npy").read_bytes()
    (folder / "judge" / "000002.npy").unlink()
    with pytest.raises(UserError, match="000002.npy: is missing"):
        TripletFolder(folder)
    (folder / "judge" / "000002.npy").write_bytes(judged)
    (folder / "p0" / "000003.png").unlink()
    with pytest.raises(UserError, match="000003.png: is missing"):
        TripletFolder(folder)
    (folder / "p0" / "000003.png").write_bytes(b"no picture")
    np.save(folder / "judge" / "000001.npy", np.array([1.0]))
    with pytest.raises(UserError, match="cannot be read"):
        list(TripletFolder(folder, 16).batches())


def test_synthetic_triplets_are_in_their_order() -> None:
    """Every distortion moves a picture further the stronger it is."""
    from diffusion2gan.embedded.triplets import DISTORTIONS

    x = torch.nn.functional.interpolate(torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1, scale_factor=4)
    for name, distortion in DISTORTIONS.items():
        sizes = []
        for strength in (0.0, 0.5, 1.0):
            y = distortion(x, torch.full((32,), strength), torch.Generator().manual_seed(1))
            assert y.shape == x.shape and y.isfinite().all()
            sizes.append((y - x).square().mean().sqrt().item())
        assert sizes[0] < sizes[1] < sizes[2], name


def test_synthetic_triplets() -> None:
    import dataclasses

    from diffusion2gan.embedded import emoji
    from diffusion2gan.embedded.emoji import EmojiDataset
    from diffusion2gan.embedded.triplets import synthetic_triplets

    records = [dataclasses.replace(r, split="train" if i % 2 else "cell") for i, r in enumerate(emoji.packaged_records()[:20])]
    images = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3)).astype(np.uint8)
    batches = list(synthetic_triplets(EmojiDataset(images, records), "cell", "noise", 70, seed=3, size=32))
    assert [len(b[3]) for b in batches] == [32, 32, 6]
    held = {im.tobytes() for im in images[::2]}
    for reference, first, second, judgement in batches:
        back = ((reference.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
        assert {im.tobytes() for im in back} <= held
        d0, d1 = ((p - reference).square().mean((1, 2, 3)) for p in (first, second))
        assert ((d1 < d0).float() == judgement).float().mean() > 0.9
    again = next(synthetic_triplets(EmojiDataset(images, records), "cell", "noise", 70, seed=3, size=32))
    assert all(torch.equal(a, b) for a, b in zip(again, batches[0], strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(synthetic_triplets(EmojiDataset(images, records), "cell", "jpeg", 4))
