"""`perceptual train`, `calibrate` and `score` on a tiny autoencoder and synthetic images."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from PIL import Image

from diffusion2gan import cli
from diffusion2gan.errors import UserError
from diffusion2gan.perceptual import LatentLPIPS, LatentSpace, LatentVGG, latent_cache
from diffusion2gan.perceptual.bapps import TripletFolder
from diffusion2gan.perceptual.commands import Autoencoder, open_autoencoder, train_command
from diffusion2gan.perceptual.latent_cache import ImageFolder, LatentCache, cache_latents, centre_crop, random_crop
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.perceptual.train import Classifier, accuracies
from tests.helpers import tree_digest


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=6,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in colour, of several sizes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, colour in (("blue", (20, 30, 220)), ("red", (220, 30, 20))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-20, 20, (24 + 4 * (i % 3), 32, 3))
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def _train(vae: Path, images: Path, out: Path, *more: str) -> int:
    arguments = ["perceptual", "train", "--vae", vae, "--data", images, "--out", out, "--resolution", 16, "--crops", 2, "--width", 0.125]
    return cli.main([str(a) for a in arguments] + ["--batch-size", "8", "--learning-rate", "3e-3", *more])


@pytest.mark.parametrize("reading", ["released", "before"])
def test_train_learns_and_its_metric_loads(vae: Path, images: Path, tmp_path: Path, reading: str) -> None:
    assert _train(vae, images, tmp_path, "--epochs", "20", "--reading", reading) == 0
    assert json.loads((tmp_path / "accuracy.json").read_text())["top1_class"] >= 0.9
    metric = LatentLPIPS.from_pretrained(tmp_path / "metric")
    assert metric.net.config.in_channels == 6 and not metric.calibrated
    assert (metric.space.scale, metric.space.shift) == (0.5, 0.25)
    x0, x1 = torch.randn(2, 1, 6, 8, 8)
    assert metric(x0, x1, raw=True) > 0


def test_an_autoencoder_of_another_make(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a scale for every channel: refused by name on the command line, used from Python."""
    own = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, attn_scales=[], temperal_downsample=[False])
    own.save_pretrained(tmp_path / "vae")
    assert _train(tmp_path / "vae", images, tmp_path / "no") == 2
    assert "holds AutoencoderKLQwenImage, expected AutoencoderKL" in capsys.readouterr().err.splitlines()[-1]
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None, None]

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = own.encode(pixels[:, :, None]).latent_dist.mode()
        return latent[:, :, 0] * scale

    given = Autoencoder(encode, lambda x: x, LatentSpace(), 4, "own", 16)
    train_command(given, str(images), tmp_path / "out", resolution=16, width=0.125, epochs=1, batch_size=8, encode_batch=4)
    assert LatentLPIPS.from_pretrained(tmp_path / "out" / "metric").net.config.in_channels == 4
    cache = LatentCache(tmp_path / "out" / "latents" / "val")
    pixels = torch.from_numpy(np.array(centre_crop(ImageFolder(images / "val").image(0), 16))).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(cache.batch(np.array([0]), np.array([0])), encode(pixels), rtol=1e-2, atol=2e-3)


def test_pixels_are_read_as_by_lpips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--vae pixels`: all five poolings, features before them. Of 21 classes and more, top-5 is counted too."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(21):
            folder = tmp_path / "images" / split / f"{number:02d}"
            folder.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(folder / "x.png")
    arguments = (Path("pixels"), tmp_path / "images", tmp_path / "out", "--epochs", "1")
    assert _train(*arguments, "--reading", "before") == 2
    assert "--reading is before with --vae pixels" in capsys.readouterr().err
    assert _train(*arguments) == 0
    metric = LatentLPIPS.from_pretrained(tmp_path / "out" / "metric")
    assert metric.net.config == LatentVGGConfig(in_channels=3, width=0.125, kept_poolings=(1, 2, 3, 4, 5), tap="before")
    accuracy = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert accuracy.keys() == {"top1_class", "top5_class"} and accuracy["top1_class"] <= accuracy["top5_class"] <= 1


def test_top_1_and_top_5_by_hand() -> None:
    model = Classifier(LatentVGGConfig(width=0.125), {"many": 21, "few": 20})
    logits = -torch.arange(21.0).expand(8, 21)
    model.forward = lambda x: {"many": logits, "few": logits[:, :20]}  # type: ignore[method-assign]
    # Ranks 0, 1, 4, 5 and 20, and three labels that are left out; then nothing but ties, which are no right answers.
    labels = torch.tensor([0, 1, 4, 5, 20, -1, -1, -1])
    found = accuracies(model, [(torch.zeros(8, 4, 4, 4), {"many": labels, "few": labels.clamp(max=19)})])
    assert found == pytest.approx({"top1_many": 1 / 5, "top5_many": 3 / 5, "top1_few": 1 / 5})
    logits = torch.zeros(8, 21)
    assert accuracies(model, [(torch.zeros(8, 4, 4, 4), {"many": labels, "few": labels.clamp(max=19)})])["top5_many"] == 0


def test_encoding_is_done_once_and_goes_on(vae: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "SHARD", 5)
    encoder = open_autoencoder(str(vae), torch.device("cpu"))
    folder = ImageFolder(images / "train")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cache_latents(folder, encoder.encode, whole, {"vae": "x"}, 16, crops=2)
    encoded = []

    def stumbling(x: torch.Tensor) -> torch.Tensor:
        encoded.append(len(x))
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encoder.encode(x)

    with pytest.raises(KeyboardInterrupt):
        cache_latents(folder, stumbling, parts, {"vae": "x"}, 16, crops=2)
    with pytest.raises(UserError, match="2 of 5 shards"):
        LatentCache(parts)
    for rank in (1, 0):
        cache_latents(folder, encoder.encode, parts, {"vae": "x"}, 16, crops=2, rank=rank, world=2)
    assert tree_digest(parts) == tree_digest(whole)
    cache_latents(folder, lambda x: pytest.fail("encoded again"), parts, {"vae": "x"}, 16, crops=2)
    cache = LatentCache(parts)
    assert len(cache) == 24 and cache.shape == (6, 8, 8) and cache.views == 2
    assert cache.labels.tolist() == [0] * 12 + [1] * 12
    assert sum(len(x) for x, _ in cache.in_order(7)) == 24
    with pytest.raises(UserError, match="resolution is 16 there and 32 now"):
        cache_latents(folder, encoder.encode, parts, {"vae": "x"}, 32, crops=2)
    (parts / "00001.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match="a shard cannot be read"):
        LatentCache(parts)
    for damaged in ("", "{", "[]", '{"resolution": 16}'):
        (parts / "settings.json").write_text(damaged)
        for read in (LatentCache, lambda p: cache_latents(folder, encoder.encode, p, {"vae": "x"}, 16, crops=2)):
            with pytest.raises(UserError, match=r"settings.json: cannot be read, expected the settings of cached latents; delete .*parts "):
                read(parts)


def test_cached_latents_are_the_autoencoders(vae: Path, images: Path, tmp_path: Path) -> None:
    encoder = open_autoencoder(str(vae), torch.device("cpu"))
    folder = ImageFolder(images / "val")
    cache_latents(folder, encoder.encode, tmp_path / "latents", {}, 16, limit=4)
    cache = LatentCache(tmp_path / "latents")
    assert len(cache) == 4 and cache.labels.tolist() == [0, 0, 1, 1]
    pixels = torch.from_numpy(np.array(centre_crop(folder.image(0), 16))).permute(2, 0, 1)[None] / 127.5 - 1
    model = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        expected = (model.encode(pixels).latent_dist.mode() - 0.25) * 0.5
    torch.testing.assert_close(cache.batch(np.array([0]), np.array([0])), expected, rtol=1e-2, atol=2e-3)


def test_crops() -> None:
    wide = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (32, 1, 3)))
    middle = np.asarray(centre_crop(wide, 28))
    assert middle.shape == (28, 28, 3) and abs(int(middle[:, 14].mean()) - 128) < 8
    rng = np.random.default_rng(0)
    crops = [np.asarray(random_crop(wide, 16, rng)) for _ in range(200)]
    assert all(c.shape == (16, 16, 3) for c in crops)
    flipped = np.mean([int(c[0, 0, 0]) > int(c[0, -1, 0]) for c in crops])
    assert 0.35 < flipped < 0.65


def test_two_processes_learn_what_one_does(vae: Path, images: Path, tmp_path: Path) -> None:
    """With group norm, whose statistics are of one sample."""
    options = ["--epochs", "2", "--norm", "group"]
    assert _train(vae, images, tmp_path / "one", *options) == 0
    shape = ["--resolution", "16", "--crops", "2", "--width", "0.125", "--batch-size", "8", "--learning-rate", "3e-3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "diffusion2gan", "perceptual", "train"]
    command += ["--vae", str(vae), "--data", str(images), "--out", str(tmp_path / "two"), *shape, *options]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}, timeout=300)
    one, two = (LatentLPIPS.from_pretrained(tmp_path / n / "metric").state_dict() for n in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert tree_digest(tmp_path / "one" / "latents") == tree_digest(tmp_path / "two" / "latents")


def test_calibrate_and_score(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 110), ("val", 8)):
        base = tmp_path / "bapps" / "2afc" / split / "cnn"
        for part in ("ref", "p0", "p1", "judge"):
            (base / part).mkdir(parents=True)
        for i in range(count):
            reference = rng.integers(60, 190, (16, 16, 3))
            for part, strength in (("ref", 0), ("p0", 60 if i % 2 else 5), ("p1", 5 if i % 2 else 60)):
                noisy = reference + strength * rng.standard_normal((16, 16, 3))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(base / part / f"{i:06d}.png")
            np.save(base / "judge" / f"{i:06d}.npy", np.array([i % 2], np.float32))
    metric, out = tmp_path / "metric", tmp_path / "calibrated"
    LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=6, width=0.125))).save_pretrained(metric)
    common = ["--vae", str(vae), "--bapps", str(tmp_path / "bapps"), "--resolution", "16"]
    assert cli.main(["perceptual", "calibrate", str(metric), *common, "--out", str(out)]) == 0
    assert LatentLPIPS.from_pretrained(out).calibrated
    capsys.readouterr()
    assert cli.main(["perceptual", "score", str(out), *common]) == 0
    assert "| cnn | 8 | 16 x 16 | 1 |" in capsys.readouterr().out
    # Without --resolution the size that the autoencoder was made for.
    assert cli.main(["perceptual", "score", str(out), *common[:-2]]) == 0
    assert "| cnn | 8 | 32 x 32 | 1 |" in capsys.readouterr().out
    assert [TripletFolder(tmp_path / "bapps/2afc/val/cnn", side).batch for side in (16, 64, 128, 256, 512)] == [64, 64, 64, 16, 4]
    judge = tmp_path / "bapps" / "2afc" / "val" / "cnn" / "judge" / "000000.npy"
    judged = judge.read_bytes()
    judge.write_bytes(b"")
    assert cli.main(["perceptual", "score", str(out), *common]) == 2
    assert "000000.npy: cannot be read" in capsys.readouterr().err
    judge.write_bytes(judged)
    other = LatentLPIPS.from_pretrained(out)
    other.net.slices[4][0].weight.data.fill_(3e38)  # finite, and too much for sums
    other.save_pretrained(tmp_path / "steep")
    assert cli.main(["perceptual", "score", str(tmp_path / "steep"), *common]) == 2
    assert "its features of the pictures of cnn are not finite" in capsys.readouterr().err
    LatentLPIPS.from_pretrained(out, l1_weight=1.0).save_pretrained(tmp_path / "l1")
    assert cli.main(["perceptual", "score", str(tmp_path / "l1"), *common]) == 2
    assert "has an L1 term (l1_weight 1)" in capsys.readouterr().err
    (tmp_path / "bapps" / "2afc" / "val" / "blur" / "ref").mkdir(parents=True)
    assert cli.main(["perceptual", "score", str(out), *common]) == 2
    assert "has no folder p0" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "bapps" / "2afc" / "val" / "blur")
    LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=4, width=0.125))).save_pretrained(metric)
    assert cli.main(["perceptual", "score", str(metric), *common]) == 2
    assert "the metric reads 4" in capsys.readouterr().err


def test_bad_input_is_one_line(vae: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "broken" / "train" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "train" / "a" / "x.png").write_bytes(b"no picture")
    shutil.copytree(tmp_path / "broken" / "train", tmp_path / "broken" / "val")
    for arguments, message in (
        ((tmp_path, images, tmp_path / "o1"), "is no AutoencoderKL"),
        ((vae, tmp_path / "empty", tmp_path / "o2"), "no images in subfolders"),
        ((vae, tmp_path / "broken", tmp_path / "o3"), "x.png: cannot be read"),
        ((vae, vae, tmp_path / "o4"), "has no folder train"),
    ):
        assert _train(*arguments) == 2  # type: ignore[arg-type]
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1] and "Traceback" not in error


def test_bad_input_is_found_before_anything_is_encoded(vae: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(images / "train", tmp_path / "alone" / "train")
    shutil.copytree(images / "train", tmp_path / "other" / "train")
    shutil.copytree(images / "val" / "red", tmp_path / "other" / "val" / "red")
    shutil.copytree(vae, tmp_path / "means")
    settings = json.loads((vae / "config.json").read_text())
    (tmp_path / "means" / "config.json").write_text(json.dumps(settings | {"latents_mean": [0.0] * 6, "latents_std": [1.0] * 6}))
    shutil.copytree(vae, tmp_path / "damaged")
    (tmp_path / "damaged" / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors")
    for source, data, more, message in (
        (vae, tmp_path / "alone", (), "has no folder validation or val"),
        (vae, tmp_path / "other", (), "train and val have other classes"),
        (vae, images, ("--width", "-1"), "width is -1.0"),
        (tmp_path / "means", images, (), "has latents_mean and latents_std of its own"),
        (tmp_path / "damaged", images, (), "HeaderTooSmall|header|damaged"),
    ):
        assert _train(source, data, tmp_path / "out", *more) == 2
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])
        assert not (tmp_path / "out").exists()


def test_another_network_is_not_trained_in_the_same_folder(
    vae: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(vae, images, tmp_path, "--epochs", "1") == 0
    before = tree_digest(tmp_path)
    for option, value, key in (("--reading", "before", "kept_poolings"), ("--norm", "group", "norm"), ("--width", "0.25", "width")):
        assert _train(vae, images, tmp_path, "--epochs", "1", option, value) == 2
        assert f"vgg.{key}" in capsys.readouterr().err
    assert tree_digest(tmp_path) == before


def test_files_that_are_no_images_are_counted(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "train", tmp_path / "train")
    (tmp_path / "train" / "red" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / "blue" / "clip.tiff").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 files are not read \(\.tiff, \.txt\)"):
        found = ImageFolder(tmp_path / "train")
    assert len(found) == 24
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageFolder(images / "train")


@pytest.mark.parametrize(
    ("columns", "said"),
    [({"image": None, "label": 1}, ""), ({"img": None, "label": 1}, ""), ({"x": 1, "label": 1}, "no column image or img")],
)
def test_a_hub_data_set(columns: dict[str, Any], said: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    files = sorted((images / "train" / "red").glob("*.png"))[:3]
    features = {k: datasets.Image() if v is None else datasets.Value("int64") for k, v in columns.items()} | {
        "label": datasets.ClassLabel(names=["a", "b"])
    }
    rows = [{k: str(f) if v is None else 1 for k, v in columns.items()} for f in files]
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda _name: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda _name, split: made)
    if said:
        with pytest.raises(UserError, match=said):
            latent_cache.HubImages("owner/name", ("train",))
        return
    found = latent_cache.HubImages("owner/name", ("train",))
    assert (len(found), found.classes, found.label(2)) == (3, ["a", "b"], 1)
    assert np.array_equal(np.asarray(found.image(1)), np.asarray(Image.open(files[1]).convert("RGB")))
