"""The released checkpoints: loaded as they are, and the same numbers as the released package (when it is installed)."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import types
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging import version
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual import ELatentLPIPS, LatentLPIPS, LatentSpace, LatentVGG, released
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.perceptual.released import LicenceNotice

torch.set_num_threads(1)


def released_state(channels: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights with the names and shapes of a released checkpoint: heads of both signs, each there twice."""
    generator = torch.Generator().manual_seed(seed)
    metric = LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=channels)))
    state = metric.state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(value.shape, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            state[name] = 0.1 * torch.randn(value.shape, generator=generator)
        elif name.startswith("lin"):
            state[name] = torch.randn(value.shape, generator=generator)
    return {**state, **{n.replace("lin", "lins.", 1): v for n, v in state.items() if n.startswith("lin")}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "sd15_latest_vgg16_tuned.pth"
    torch.save(released_state(4), path)
    return path


def test_a_released_file_loads_strictly(checkpoint: Path) -> None:
    with pytest.warns(LicenceNotice, match="CC BY-NC"), pytest.warns(UserWarning, match="negative and are now 0"):
        loss = ELatentLPIPS.from_pretrained(checkpoint)
    metric = loss.metric
    assert metric.calibrated and metric.net.config == LatentVGGConfig() and metric.space.scale == 0.18215
    assert all((head.weight >= 0).all() for head in metric.lins)
    state = torch.load(checkpoint, weights_only=True)
    assert torch.equal(metric.net.get_parameter("slice5.40.weight"), state["net.slice5.40.weight"])
    x0, x1 = torch.randn(2, 1, 4, 8, 8)
    raw0, raw1 = x0 / 0.18215, x1 / 0.18215
    torch.testing.assert_close(metric(raw0, raw1, raw=True), metric(x0, x1))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_name_and_what_is_kept_of_the_file(checkpoint: Path, tmp_path: Path) -> None:
    """Under another name the space is not known, unless it is given; name and sha256 of the file stay with the weights."""
    path = tmp_path / "mine.pth"
    path.symlink_to(checkpoint)
    x0, x1 = torch.randn(2, 1, 4, 8, 8)
    unknown = ELatentLPIPS.from_pretrained(path, "")
    with pytest.raises(UserError, match=r"from_pretrained\(..., space=diffusion2gan.perceptual.LatentSpace\(scale, shift\)\)"):
        unknown(x0, x1, raw=True)
    loss = ELatentLPIPS.from_pretrained(path, "", space=LatentSpace(0.5, 0.25))
    torch.testing.assert_close(loss(2 * x0 + 0.25, 2 * x1 + 0.25, raw=True), unknown(x0, x1))
    loss.save_pretrained(tmp_path / "saved")
    again = ELatentLPIPS.from_pretrained(tmp_path / "saved", augment=None)
    assert again.metric.space == LatentSpace(0.5, 0.25) and torch.equal(again(x0, x1), loss(x0, x1))
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["origin"] == {"source": "mine.pth", "sha256": sha256}
    assert again.metric.origin == loss.metric.origin and sha256 in repr(again) and "CC BY-NC" in repr(again)


def test_the_licence_goes_with_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    for kind in (LatentLPIPS, ELatentLPIPS):
        with pytest.warns(LicenceNotice) as said:
            kind.from_pretrained(checkpoint).save_pretrained(tmp_path)
        # It points at the line that asked for the weights.
        assert {w.filename for w in said if w.category is LicenceNotice} == {__file__}
    with pytest.warns(LicenceNotice, match="CC BY-NC"):
        again = LatentLPIPS.from_pretrained(tmp_path)
    again.licence = None
    again.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LicenceNotice)
        LatentLPIPS.from_pretrained(tmp_path / "ours")


def test_the_hub_is_asked_for_the_released_name(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def from_hub(repository: str, name: str, revision: str | None) -> Path:
        asked.append((repository, name))
        assert revision is None
        return checkpoint

    monkeypatch.setattr(released, "_from_hub", from_hub)
    with pytest.warns(UserWarning, match="negative and are now 0"):
        metric = LatentLPIPS.from_pretrained("flux")
    assert asked == [("Mingguksky/elatentlpips", "elatentlpips_ckpt/flux_latest_vgg16_tuned.pth")]
    assert (metric.space.scale, metric.space.shift) == (0.3611, 0.1159)
    assert metric.origin is not None and metric.origin.source == "/".join(asked[0])


def test_a_hub_repository_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LatentLPIPS(LatentVGG(LatentVGGConfig(width=0.125)), calibrated=True).save_pretrained(tmp_path)
    commit = "0123456789" * 4
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, name: str, revision: str | None) -> str:
        """As the hub's cache lays it out."""
        assert repository == "someone/latent-lpips"
        asked.append((name, revision))
        path = tmp_path / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((tmp_path / name).read_bytes())
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LatentLPIPS.from_pretrained("someone/latent-lpips").net.config.width == 0.125
    # The branch may move between the two files: both are of the commit that the first was found in.
    assert asked == [("config.json", None), ("model.safetensors", commit)]
    asked.clear()
    assert ELatentLPIPS.from_pretrained("someone/latent-lpips", revision="v1").metric.calibrated
    assert asked == [("config.json", "v1"), ("model.safetensors", commit)]
    with pytest.raises(UserError, match="revision is 'v1' and .* is no hub repository"):
        LatentLPIPS.from_pretrained(tmp_path, revision="v1")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    for text in ("teacher: {}\nname: x\n", "", "0 .", "{}"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match="x.yaml: (is no torch checkpoint|cannot be read|holds objects)"):
            LatentLPIPS.from_pretrained(tmp_path / "x.yaml")


def test_the_embedded_metric_has_a_name() -> None:
    assert ELatentLPIPS.from_pretrained("embedded").metric.net.config.width == 0.25


def test_a_changed_file_in_the_hub_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = tmp_path / ("0" * 64)
    blob.write_bytes(b"something else")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name, revision: str(blob))
    with pytest.raises(UserError, match="its sha256 is .* expected 0000"):
        LatentLPIPS.from_pretrained("sd15")


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="none of embedded, sd15, sd21, sdxl, sd3, flux"):
        LatentLPIPS.from_pretrained("sd16")
    with pytest.raises(UserError, match="could not be downloaded"):
        LatentLPIPS.from_pretrained("sd15")
    path = tmp_path / "x.pth"
    torch.save({"net.slice1.0.weight": _Payload()}, path)
    with pytest.raises(UserError, match="objects other than tensors"):
        LatentLPIPS.from_pretrained(path)
    assert "code ran" not in capsys.readouterr().out
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="is no torch checkpoint|cannot be read"):
        LatentLPIPS.from_pretrained(path)
    with pytest.raises(UserError, match="no such folder or file"):
        LatentLPIPS.from_pretrained("./metrc")
    with pytest.raises(UserError, match="could not be downloaded"):
        LatentLPIPS.from_pretrained("some--body/x")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="one file of a folder"):
        LatentLPIPS.from_pretrained(tmp_path / "model.safetensors")
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="lacks net.slice1.0.weight"):
        LatentLPIPS.from_pretrained(path)
    state = released_state(4)
    del state["net.slice4.24.bias"]
    torch.save(state, path)
    with pytest.raises(UserError, match="lacks net.slice4.24.bias"):
        LatentLPIPS.from_pretrained(path)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The released package (of the `dev` extra), in a folder of its own: it reads and writes `./ckpt`."""
    if "pkg_resources" not in sys.modules:
        # It came with setuptools before 81; the package takes one function of it.
        stand_in = types.ModuleType("pkg_resources")
        stand_in.parse_version = version.parse  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pkg_resources", stand_in)
    module = importlib.import_module("elatentlpips")
    monkeypatch.chdir(tmp_path)
    models = importlib.import_module("torchvision").models
    whole = models.vgg16_bn

    def without_classifier(**options: Any) -> nn.Module:
        """torchvision's network, not initialised: a checkpoint is loaded into all of it, and nothing reads the classifier's 0.5 GB."""
        with torch.device("meta"):
            network = whole(**options)
        network.classifier = nn.Identity()
        return network.to_empty(device="cpu")

    monkeypatch.setattr(models, "vgg16_bn", without_classifier)
    return module


@pytest.mark.filterwarnings("ignore:.*weights.*:UserWarning:torchvision", "ignore::diffusion2gan.perceptual.released.LicenceNotice")
@pytest.mark.parametrize(("encoder", "channels"), [("sd15", 4), ("flux", 16)])
def test_equals_the_released_package(package: Any, encoder: str, channels: int, tmp_path: Path) -> None:
    """Signed heads, no clamp, no augmentation, no L1: to 1e-5 of the value, and in the gradient; with L1 too."""
    state = released_state(channels)
    (tmp_path / "ckpt").mkdir()
    backbone = {f"model.features.{n.split('.', 2)[2]}": v for n, v in state.items() if n.startswith("net.")}
    torch.save({"state_dict": backbone, "best_acc1": 0.0}, tmp_path / "ckpt" / f"{encoder}_latent_vgg16.pth.tar")
    file = tmp_path / "ckpt" / f"{encoder}_latest_vgg16_tuned.pth"
    torch.save(state, file)
    theirs = package.ELatentLPIPS(encoder=encoder, augment=None, verbose=False)
    with pytest.warns(UserWarning, match="negative and stay so"):
        ours = LatentLPIPS.from_pretrained(file, clamp=False)
    plain = partial(theirs, ensembling=False, add_l1_loss=False)
    for size in ((24, 24), (16, 28), (7, 13), (4, 4)):
        x0, x1 = torch.randn(2, 2, channels, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(ours(x0, x1), plain(x0, x1).flatten(), rtol=1e-5, atol=1e-5)
            if size[0] > 8:
                continue
            # Scale and L1 are of each element: a small latent shows as much of them.
            torch.testing.assert_close(ours(x0, x1, raw=True), plain(x0, x1, normalize=True).flatten(), rtol=1e-5, atol=1e-5)
            ours.l1_weight = 1.0
            with_l1 = theirs(x0, x1, ensembling=False, add_l1_loss=True).flatten()
            torch.testing.assert_close(ours(x0, x1), with_l1, rtol=1e-5, atol=1e-5)
            ours.l1_weight = 0.0
    if channels == 4:  # the size of a latent of 512 pixels
        x0, x1 = torch.randn(2, 1, 4, 64, 64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            torch.testing.assert_close(ours(x0, x1), plain(x0, x1).flatten(), rtol=1e-5, atol=1e-5)
    # In float64 the gradients agree to the last digits: no rounding decides a ReLU or a pooling.
    theirs, ours = theirs.double(), ours.double()
    x0, x1 = torch.randn(2, 1, channels, 8, 12, dtype=torch.float64)
    gradients = []
    for function in (partial(theirs, ensembling=False, add_l1_loss=False), ours):
        x = x0.clone().requires_grad_()
        function(x, x1).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-12)
