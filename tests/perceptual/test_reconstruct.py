"""Figure 3's experiment: what it measures, and the command."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion2gan import cli, losses
from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.perceptual import LatentLPIPS, LatentVGG
from diffusion2gan.perceptual import reconstruct as reconstruction
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.perceptual.reconstruct import distances_of_figure_3, reconstruct, run_experiment
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig
from diffusion2gan.teachers.protocol import TeacherConfig
from tests.conftest import tiny_pipeline
from tests.helpers import ROOT

torch.set_num_threads(1)


def test_mse_arrives_and_blindness_shows() -> None:
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    found = reconstruct(lambda a, b, _: losses.mse(a, b), target, steps=600)
    assert found.errors[0] > 1 and found.errors[-1] < 0.02 and found.steps[-1] == 600

    def blind(a: Tensor, b: Tensor, _: torch.Generator) -> Tensor:
        return losses.mse(a[:, :2], b[:, :2])

    half = reconstruct(blind, target, steps=600)
    assert torch.allclose(half.latent[:, :2], target[:, :2], atol=0.05)
    start = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(half.latent[:, 2:], start[:, 2:])


def test_psnr_is_of_the_clamped_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known: pixels 0.2 off in a range of 2, but for those that clamping makes equal."""
    target = torch.full((1, 4, 8, 8), 0.5)
    found = target + 0.2

    def decode(x: Tensor) -> Tensor:
        pixels = x[:, :3].clone()
        pixels[:, :, :4] += 3  # beyond 1 in both
        return pixels

    monkeypatch.setattr(reconstruction, "reconstruct", lambda *_, **__: reconstruction.Reconstruction(found, [0, 1], [1.0, 0.2]))
    run_experiment({"mse": lambda a, b, _: losses.mse(a, b)}, target, decode, tmp_path, steps=1)
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["PSNR, dB"] == pytest.approx(10 * math.log10(4 / (0.2**2 / 2)), abs=1e-4)
    assert row["latent RMSE"] == 0.2


def test_draws_belong_to_the_step() -> None:
    """Twice the same experiment is the same; another seed is another."""
    torch.manual_seed(0)
    metric = LatentLPIPS(LatentVGG(LatentVGGConfig(width=0.125)))
    distance = distances_of_figure_3(metric, None, lambda x: x, ("bgo",))["e_latent_lpips bgo"]
    target = torch.randn(1, 4, 8, 8)
    first, again, other = (reconstruct(distance, target, steps=5, seed=s).latent for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_figure_3_with_the_weights_that_ship() -> None:
    """The network alone stops far from the picture's latent; averaged over augmentations it goes on (150 fast steps; the docs have 1,000)."""
    teacher = load_teacher(TeacherConfig(source="embedded"))
    solver = OdeSolver(teacher, SolverConfig(solver="dpmpp", steps=8, spacing="trailing"))
    target = solver.solve(draw_noise([1, 2], teacher.latent_shape), ["noto red heart", "flag germany"])
    latent = LatentLPIPS.from_pretrained(embedded_folder("latent_vgg"))
    distances = distances_of_figure_3(latent, None, teacher.decode, ("bgo",))
    plain, ensembled = (
        reconstruct(distances[name], target, steps=150, learning_rate=0.3).errors[-1] for name in ("latent_lpips", "e_latent_lpips bgo")
    )
    assert ensembled < 0.25 and plain > 2 * ensembled


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_pipeline().save_pretrained(tmp_path / "teacher")
    torch.manual_seed(0)
    LatentLPIPS(LatentVGG(LatentVGGConfig(width=0.125))).save_pretrained(tmp_path / "latent_vgg")
    LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=3, width=0.125, kept_poolings=(1, 2, 3, 4, 5)))).save_pretrained(
        tmp_path / "pixel_vgg"
    )
    monkeypatch.setenv("DIFFUSION2GAN_EMBEDDED", str(tmp_path))
    return tmp_path


def test_the_command(embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["perceptual", "reconstruct", "--out", str(out), "--steps", "3", "--prompt", "red heart", "cat"]) == 0
    rows = json.loads((out / "table.json").read_text())
    names = ["mse", "lpips (decoded)", "latent_lpips", *(f"e_latent_lpips {s}" for s in ("b", "g", "bg", "go", "bgo", "bgc", "bgco"))]
    assert [r["distance"] for r in rows] == names and all(r["targets"] == 2 for r in rows)
    assert Image.open(out / "pictures.png").height > 11 * 90
    assert Image.open(out / "curves.png").width > 400
    picture = tmp_path / "x.png"
    Image.new("RGB", (20, 16), "red").save(picture)
    assert cli.main(["perceptual", "reconstruct", "--out", str(out), "--steps", "2", "--images", str(picture)]) == 0
    capsys.readouterr()
    assert cli.main(["perceptual", "reconstruct", "--out", str(out), "--metric", "sd15"]) == 2
    assert "must be of the autoencoder's own latents" in capsys.readouterr().err
    for more, message in (
        (["--pixel-metric", str(embedded / "latent_vgg")], "reads 4 channels, expected a metric of pixels"),
        (["--images", str(picture), "--prompt", "cat"], "--prompt is drawn by the embedded teacher"),
    ):
        assert cli.main(["perceptual", "reconstruct", "--out", str(out), "--steps", "1", *more]) == 2
        assert message in capsys.readouterr().err
    other = tmp_path / "y.png"
    for size, message in (((32, 16), "expected one size"), ((4, 16), "expected at least 8 x 8")):
        Image.new("RGB", size, "red").save(other)
        assert cli.main(["perceptual", "reconstruct", "--out", str(out), "--images", str(picture), str(other)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["perceptual", "reconstruct", "--out", str(out), "--images", str(tmp_path / "no.png")]) == 2
    assert "cannot be read as a picture" in capsys.readouterr().err


def test_the_example_runs(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "reconstruct_one_latent.py"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["LatentLPIPS", "E-LatentLPIPS"]


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    def work(*_: object) -> torch.Tensor:
        raise AssertionError("the work has begun")

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run_experiment({"mse": work}, torch.zeros(1, 4, 8, 8), work, tmp_path / "file", 1)
