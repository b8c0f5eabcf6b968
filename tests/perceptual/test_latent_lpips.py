"""LatentLPIPS, E-LatentLPIPS (Eq. 3) and LPIPS through a decoder (Eq. 2)."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.errors import UserError
from diffusion2gan.perceptual import ELatentLPIPS, LatentLPIPS, LatentSpace, LatentVGG, latent_lpips, latent_vgg
from diffusion2gan.perceptual.augmentations import Augmentation
from diffusion2gan.perceptual.gradient_scale import with_scaled_gradients
from diffusion2gan.perceptual.latent_lpips import unit_normalized
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.perceptual.lpips import DecodedLPIPS

torch.set_num_threads(1)
LETTER_SETS = ["".join(c) for n in range(5) for c in itertools.combinations("bgco", n)]


def metric_of(channels: int = 4, **options: float) -> LatentLPIPS:
    torch.manual_seed(0)
    metric = LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=channels, width=0.125)), **options)  # type: ignore[arg-type]
    for head in metric.lins:
        nn.init.uniform_(head.weight, 0, 2)
    return metric


def plain_distance(metric: LatentLPIPS, x0: Tensor, x1: Tensor) -> Tensor:
    """LPIPS as published: normalise, square, weigh, average, add."""
    total = torch.zeros(len(x0), dtype=x0.dtype)
    for f0, f1, head in zip(metric.net(x0), metric.net(x1), metric.lins, strict=True):
        n0, n1 = (f / (f.pow(2).sum(1, keepdim=True) + 1e-8).sqrt() for f in (f0, f1))
        total += F.conv2d((n0 - n1) ** 2, head.weight).mean((1, 2, 3))
    return total


@pytest.mark.parametrize("channels", [1, 3, 4, 16])
def test_zero_at_equal_inputs(channels: int) -> None:
    metric = metric_of(channels)
    x = torch.randn(2, channels, 8, 12)
    for letters in LETTER_SETS:
        loss = ELatentLPIPS(metric, letters)
        assert torch.equal(loss(x, x.clone()), torch.zeros(2)), letters
        y = x.clone().requires_grad_()  # one pass with a graph, one without
        assert torch.equal(loss(y, x), torch.zeros(2)), letters


@pytest.mark.parametrize("size", [(4, 4), (4, 256), (256, 96), (256, 256)])
def test_sizes(size: tuple[int, int]) -> None:
    loss = ELatentLPIPS(metric_of(), "bgco")
    x0, x1 = torch.randn(2, 1, 4, *size)
    x0.requires_grad_()
    distance = loss(x0, x1, generator=torch.Generator().manual_seed(0))
    distance.sum().backward()
    assert distance.item() > 0
    assert x0.grad is not None
    assert x0.grad.isfinite().all()
    assert x0.grad.abs().max() > 0


@pytest.mark.parametrize("letters", ["", "bgo", "bgco"])
def test_positive_and_symmetric(letters: str) -> None:
    loss = ELatentLPIPS(metric_of(), letters)
    x0, x1 = torch.randn(2, 3, 4, 8, 8)
    parameters = loss.draw(3, x0.shape[1:])
    assert (loss(x0, x1, parameters) > 0).all()
    assert torch.equal(loss(x0, x1, parameters), loss(x1, x0, parameters))


def test_known_distance() -> None:
    metric = metric_of().double()
    x0, x1 = torch.randn(2, 3, 4, 8, 10, dtype=torch.float64)
    expected = plain_distance(metric, x0, x1)
    torch.testing.assert_close(metric(x0, x1), expected)
    torch.testing.assert_close(ELatentLPIPS(metric, "")(x0, x1), expected)
    torch.testing.assert_close(metric(x0, features=metric.target_features(x1)), expected)
    for head in metric.lins:
        nn.init.ones_(head.weight)
    assert not metric.calibrated
    fresh = LatentLPIPS(metric.net).double()
    torch.testing.assert_close(fresh(x0, x1), metric(x0, x1))
    metric.l1_weight = 0.5
    l1 = 0.5 * (x0 - x1).abs().mean((1, 2, 3))
    torch.testing.assert_close(metric(x0, x1) - fresh(x0, x1), l1)
    # Eq. 3's augmentation does not reach the L1 term.
    loss = ELatentLPIPS(metric, "bgco")
    parameters = loss.draw(3, x0.shape[1:])
    torch.testing.assert_close(loss(x0, x1, parameters) - ELatentLPIPS(fresh, "bgco")(x0, x1, parameters), l1)


def test_spatial() -> None:
    metric = metric_of()
    x0 = torch.randn(2, 4, 16, 16)
    x1 = x0.clone()
    x1[:, :, :4, :4] += 2
    distance = metric(x0, x1, spatial=True)
    assert distance.shape == (2, 16, 16) and (distance >= 0).all()
    assert (distance[:, :6, :6].mean((1, 2)) > 3 * distance[:, 10:, 10:].mean((1, 2))).all()
    torch.testing.assert_close(distance.mean((1, 2)), metric(x0, x1))  # sides of powers of 2: upsampling keeps the mean


def test_both_inputs_get_the_same_draw() -> None:
    metric = metric_of()
    loss = ELatentLPIPS(metric, "bgco")
    x0, x1 = torch.randn(2, 3, 4, 8, 8)
    parameters = loss.draw(3, x0.shape[1:], torch.Generator().manual_seed(5))
    augmentation = Augmentation("bgco")
    by_hand = metric(augmentation.apply(x0, parameters), augmentation.apply(x1, parameters))
    torch.testing.assert_close(loss(x0, x1, parameters), by_hand)
    torch.testing.assert_close(loss(x0, x1, generator=torch.Generator().manual_seed(5)), by_hand)


def test_ensemble_averages_draws() -> None:
    metric = metric_of()
    one, many = ELatentLPIPS(metric), ELatentLPIPS(metric, ensemble=3)
    x0, x1 = torch.randn(2, 2, 4, 8, 8)
    parameters = many.draw(2, x0.shape[1:])
    separate = [one(x0, x1, parameters.rows(slice(k, None, 3))) for k in range(3)]
    torch.testing.assert_close(many(x0, x1, parameters), torch.stack(separate).mean(0))
    with pytest.raises(UserError, match="expected 2 x 3"):
        many(x0, x1, one.draw(2, x0.shape[1:]))


def test_rows_are_independent() -> None:
    loss = ELatentLPIPS(metric_of(), "bgco")
    x0, x1 = torch.randn(2, 4, 4, 8, 8)
    parameters = loss.draw(4, x0.shape[1:])
    alone = loss(x0[2:3], x1[2:3], parameters.rows(slice(2, 3)))
    torch.testing.assert_close(loss(x0, x1, parameters)[2:3], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("letters", ["", "bgco"])
def test_gradient_is_the_finite_difference(letters: str) -> None:
    loss = ELatentLPIPS(metric_of().double(), letters)
    x0, x1 = torch.randn(2, 2, 4, 6, 8, dtype=torch.float64)
    parameters = loss.draw(2, x0.shape[1:], torch.Generator().manual_seed(0))
    x0.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x0, x1, parameters).sum(), x0)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    for seed in range(3):
        direction = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        h = 1e-7
        with torch.no_grad():
            numeric = (loss(x0 + h * direction, x1, parameters) - loss(x0 - h * direction, x1, parameters)).sum() / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-6)


def test_double_backward() -> None:
    loss = ELatentLPIPS(metric_of(), "bgco")
    x0, x1 = torch.randn(2, 2, 4, 8, 8)
    x0.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x0, x1).sum(), x0, create_graph=True)
    gradient.square().sum().backward()
    assert x0.grad is not None and x0.grad.isfinite().all() and x0.grad.abs().sum() > 0


def test_zero_features_have_finite_gradients() -> None:
    f = torch.zeros(1, 4, 2, 2, requires_grad=True)
    y = unit_normalized(f)
    assert torch.equal(y, torch.zeros_like(y))
    (gradient,) = torch.autograd.grad((y - 1).square().sum(), f, create_graph=True)
    assert gradient.isfinite().all()
    # A constant latent under dead filters: the whole first map is zero.
    metric = metric_of()
    bias = metric.net.get_parameter("slice1.4.bias")
    nn.init.constant_(bias, -1e6)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    metric(x, torch.randn(1, 4, 8, 8)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_target_leaves_no_graph() -> None:
    metric = metric_of()
    x = torch.randn(1, 4, 8, 8)
    assert all(f.grad_fn is None and not f.requires_grad for f in metric.target_features(x))
    assert all(f.requires_grad for f in metric.target_features(x.clone().requires_grad_()))
    assert metric(x, x).grad_fn is None
    leaf = x.clone().requires_grad_()
    metric(torch.randn(1, 4, 8, 8), leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in metric.parameters())


def test_train_changes_nothing() -> None:
    loss = ELatentLPIPS(metric_of())
    x0, x1 = torch.randn(2, 2, 4, 8, 8)
    parameters = loss.draw(2, x0.shape[1:])
    before = loss(x0, x1, parameters)
    assert torch.equal(loss.train()(x0, x1, parameters), before)
    assert not any(module.training for module in loss.metric.net.modules())


def test_4x4_and_bf16() -> None:
    loss = ELatentLPIPS(metric_of(), "bgco")
    assert loss(*torch.randn(2, 1, 4, 4, 4)).isfinite().all()
    x0, x1 = torch.randn(2, 2, 4, 8, 8)
    x0.requires_grad_()
    parameters = loss.draw(2, x0.shape[1:])
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(x0, x1, parameters)
        assert torch.equal(loss(x1, x1.clone(), parameters), torch.zeros(2))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss(x0, x1, parameters), rtol=0.05, atol=0.01)
    low.sum().backward()
    assert x0.grad is not None and x0.grad.isfinite().all()
    whole = ELatentLPIPS(metric_of(), "bgco").to(torch.bfloat16)
    torch.testing.assert_close(whole(x0.bfloat16(), x1.bfloat16(), parameters), low.detach(), rtol=0.1, atol=0.02)


def test_autocast_fp16() -> None:
    """Values near float32's, whole networks in float16 too; zero at equal inputs."""
    loss = ELatentLPIPS(metric_of(), "bgco")
    x0, x1 = torch.randn(2, 1, 4, 8, 8)
    parameters = loss.draw(1, x0.shape[1:], torch.Generator().manual_seed(0))
    expected = loss(x0, x1, parameters)
    with torch.autocast("cpu", torch.float16):
        low = loss(x0, x1, parameters)
        assert torch.equal(loss(x1, x1.clone(), parameters), torch.zeros(1))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, rtol=0.01, atol=1e-4)
    whole = ELatentLPIPS(metric_of().half(), "bgco")
    torch.testing.assert_close(whole(x0, x1, parameters), expected, rtol=0.01, atol=1e-4)


def test_gradients_in_float16_do_not_underflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss averaged over batch and locations sends gradients into the network that float16 does not hold."""
    metric = metric_of()
    x0, x1 = torch.randn(2, 2, 4, 16, 16)

    def gradient(weight: float, autocast: bool = True) -> Tensor:
        x = x0.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            distance = metric(x, x1)
        (weight * distance.mean()).backward()
        assert x.grad is not None
        return x.grad / weight

    def error(found: Tensor) -> float:
        return ((found - expected).norm() / expected.norm()).item()

    expected = gradient(1.0, autocast=False)
    ours = gradient(1.0)
    assert error(ours) < 0.1  # the forward pass' rounding
    # A power of two changes nothing: neither where float16 would hold nothing of it, nor what a scaler of the loss does.
    for weight in (2.0**-20, 2.0**60):
        assert torch.equal(gradient(weight), ours)
    assert gradient(0.0).isnan().all() and not gradient(float("inf")).isfinite().all()
    monkeypatch.setattr(latent_lpips, "computes_in_float16", lambda *_: False)
    assert error(gradient(2.0**-20)) > 0.9


def test_scaled_gradients_are_the_gradients() -> None:
    convolution = nn.Conv2d(2, 3, 3).double().requires_grad_(False)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def network(x: Tensor) -> list[Tensor]:
        return [y := convolution(x).square(), 1e-9 * y.sin()]

    def scaled(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(with_scaled_gradients(network, x))

    assert all(torch.equal(a, b) for a, b in zip(scaled(x), network(x), strict=True))
    assert torch.autograd.gradcheck(scaled, (x,))
    (gradient,) = torch.autograd.grad(scaled(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    none = torch.autograd.grad(sum(f.sum() for f in scaled(x)), x, torch.zeros((), dtype=torch.float64))[0]
    assert torch.equal(none, torch.zeros_like(x))


@pytest.mark.parametrize("ensemble", [1, 2])
def test_compiles_as_one_graph(ensemble: int) -> None:
    loss = ELatentLPIPS(metric_of(), "bgco", ensemble)
    x0, x1 = torch.randn(2, 2, 4, 8, 8)
    parameters = loss.draw(2, x0.shape[1:])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = x0.clone().requires_grad_(), x0.clone().requires_grad_()
    fast, slow = compiled(a, x1, parameters), loss(b, x1, parameters)
    torch.testing.assert_close(fast, slow)
    fast.sum().backward()
    slow.sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_options_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached features, raw latents and maps, and float16 with its scaled gradients, on a network of one convolution a block."""
    monkeypatch.setattr(latent_vgg, "BLOCKS", [(channels, 1) for channels, _ in latent_vgg.BLOCKS])
    loss = ELatentLPIPS(LatentLPIPS(metric_of().net, space=LatentSpace(0.5, 0.25)), "bo")
    x0, x1 = torch.randn(2, 1, 4, 8, 8)
    parameters = loss.draw(1, x0.shape[1:])

    def values(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        features = loss.target_features(x1, parameters, raw=True)
        with torch.autocast("cpu", torch.float16):
            low = loss.metric(x0, features=features, raw=True)
        return loss(x0, None, parameters, features=features, raw=True, spatial=True), low

    x0.requires_grad_()
    found, expected = (f(x0, x1) for f in (torch.compile(values, fullgraph=True, backend="aot_eager"), values))
    for fast, slow in zip(found, expected, strict=True):
        torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(low.sum() / 2**20, x0)[0] for _, low in (found, expected)))


def test_round_trip(tmp_path: Path) -> None:
    metric = metric_of(l1_weight=0.25, calibrated=True)
    metric.save_pretrained(tmp_path)
    again = LatentLPIPS.from_pretrained(tmp_path)
    assert (again.l1_weight, again.calibrated, again.net.config) == (0.25, True, metric.net.config)
    assert metric.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in metric.state_dict().items())
    x0, x1 = torch.randn(2, 1, 4, 8, 8)
    loss = ELatentLPIPS.from_pretrained(tmp_path, "b", ensemble=2)
    assert torch.equal(again(x0, x1), metric(x0, x1)) and loss.augmentation.letters == "b" and loss.ensemble == 2
    with pytest.raises(UserError, match="class is"):
        LatentVGG.from_pretrained(tmp_path)


def test_released_names(tmp_path: Path) -> None:
    metric = metric_of()
    state = metric.state_dict()
    assert {n for n in state if n.startswith("lin")} == {f"lin{i}.model.1.weight" for i in range(5)}
    assert state["lin2.model.1.weight"].shape == (1, metric.net.channels[2], 1, 1) and "net.slice4.24.weight" in state
    twice = {**state, **{f"lins.{i}.model.1.weight": state[f"lin{i}.model.1.weight"] for i in range(5)}}
    other = LatentLPIPS(LatentVGG(metric.net.config))
    other.load_weights(twice, "released")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in state.items())


def test_negative_heads(tmp_path: Path) -> None:
    metric = metric_of()
    with torch.no_grad():
        metric.lins[1].weight[0, :3] = -0.5
    metric.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="3 of .* negative and stay so"):
        signed = LatentLPIPS.from_pretrained(tmp_path, clamp=False)
    assert torch.equal(signed.lins[1].weight, metric.lins[1].weight)
    with pytest.warns(UserWarning, match="3 of .* negative and are now 0"):
        clamped = LatentLPIPS.from_pretrained(tmp_path)
    assert torch.equal(clamped.lins[1].weight, metric.lins[1].weight.clamp(min=0))
    # A pair that differs where the negative weights look most: below zero with them, not without.
    x0, x1 = (torch.randn(2, 64, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 10).requires_grad_().unbind()
    metric.lins[1].weight.data[0, 3:] = 0
    for head in (metric.lins[0], *metric.lins[2:]):
        head.weight.data.zero_()
    assert (metric(x0, x1) < 0).any()
    metric.save_pretrained(tmp_path / "worst")
    with pytest.warns(UserWarning, match="negative and are now 0"):
        assert (LatentLPIPS.from_pretrained(tmp_path / "worst")(x0, x1) >= 0).all()
    assert (clamped(x0, x1) >= 0).all()
    metric.lins[1].weight.data.abs_()
    metric.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LatentLPIPS.from_pretrained(tmp_path, clamp=True)
    metric.lins[1].weight.data[0, 0] = float("nan")
    metric.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lin1.model.1.weight has NaN .* calibrate the heads again"):
        LatentLPIPS.from_pretrained(tmp_path, clamp=True)
    metric.lins[1].weight.data[0, 0] = 1
    metric.net.get_buffer("slice1.1.running_mean")[0] = float("inf")
    metric.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"net.slice1.1.running_mean has NaN or infinite"):
        LatentLPIPS.from_pretrained(tmp_path)


def test_errors() -> None:
    metric = metric_of()
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(UserError, match="equal shapes"):
        metric(x, torch.randn(1, 4, 8, 10))
    with pytest.raises(UserError, match="expected one of them"):
        metric(x)
    with pytest.raises(UserError, match="cached features"):
        metric(x, features=metric.target_features(torch.randn(1, 4, 8, 10)))
    metric.l1_weight = 1.0
    with pytest.raises(UserError, match="no x1"):
        metric(x, features=metric.target_features(x))
    for ensemble in (0, 1.5):
        with pytest.raises(UserError, match=f"ensemble is {ensemble}, expected a whole number"):
            ELatentLPIPS(metric, ensemble=ensemble)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="l1_weight"):
        LatentLPIPS(metric.net, l1_weight=-1.0)
    assert ELatentLPIPS(metric, augment=None).augmentation.letters == ""


def test_arguments_that_exclude_each_other() -> None:
    metric = metric_of()
    loss, x = ELatentLPIPS(metric), torch.randn(1, 4, 8, 8)
    parameters = loss.draw(1, x.shape[1:])
    with pytest.raises(UserError, match="generator was given beside parameters"):
        loss(x, x, parameters, torch.Generator())
    for function, target in (
        (metric, metric.target_features(x)),
        (lambda *a, **k: loss(*a, parameters, **k), loss.target_features(x, parameters)),
    ):
        with pytest.raises(UserError, match="x1 was given beside features"):
            function(x, x, features=target)
    with pytest.raises(UserError, match="drawn for the letters 'bgo', expected 'go'"):
        ELatentLPIPS(metric, "go")(x, x, parameters)
    with pytest.raises(UserError, match="drawn for latents of 8 x 8, the latent has 8 x 12"):
        loss(*torch.randn(2, 1, 4, 8, 12), parameters)
    with pytest.raises(UserError, match="drawn for the letters"):
        loss.target_features(x, ELatentLPIPS(metric, "").draw(1, x.shape[1:]))
    # The order of letters is none of the augmentation.
    torch.testing.assert_close(ELatentLPIPS(metric, "obg")(x, x.flip(2), parameters), loss(x, x.flip(2), parameters))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("l1_weight", "1", "l1_weight is '1', expected a number"),
        ("l1_weight", None, "l1_weight is None, expected a number"),
        ("l1_weight", True, "l1_weight is True, expected a number"),
        ("calibrated", "no", "calibrated is 'no', expected true or false"),
        ("licence", 3, "licence is 3, expected text or null"),
        ("space", {"scale": "a", "shift": 0.0}, "space.scale is 'a', expected a number above 0"),
        ("space", {"scale": 1.0, "shift": None}, "space.shift is None, expected a number"),
        ("space", {"scale": 1.0}, "expected null or scale and shift"),
        ("space", [1.0, 0.0], "expected null or scale and shift"),
        ("origin", "the hub", "expected null or source and sha256"),
        ("origin", {"source": "x", "sha256": 3}, "expected two texts"),
        ("net", None, "the network is None, expected an object"),
        ("net", {"width": "x"}, "width is 'x', expected a number above 0"),
        ("net", {"in_channels": "4"}, "in_channels is '4', expected a whole number"),
        ("net", {"in_channels": 4.5}, "in_channels is 4.5, expected a whole number"),
        ("net", {"kept_poolings": 4}, "kept_poolings is 4, expected numbers of 1 to 5"),
        ("net", {"kept_poolings": [[4]]}, "expected numbers of 1 to 5"),
        ("net", {"height": 1}, "keys are height, expected in_channels"),
        ("calibrated", ..., "lacks or adds a key"),
        ("augment", "bgo", "lacks or adds a key"),
    ],
)
def test_damaged_configs(key: str, value: Any, message: str, tmp_path: Path) -> None:
    """One line that names the folder; `...`: the key is missing."""
    config = {"class": "LatentLPIPS"} | metric_of().settings | {key: value}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    with pytest.raises(UserError) as raised:
        LatentLPIPS.from_pretrained(tmp_path)
    assert message in str(raised.value) and str(raised.value).startswith(str(tmp_path)) and "\n" not in str(raised.value)


def test_a_config_from_before_space_and_licence(tmp_path: Path) -> None:
    metric = metric_of()
    metric.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["space"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = LatentLPIPS.from_pretrained(tmp_path)
    assert again.space == LatentSpace() and again.licence is None and again.origin is None


@pytest.mark.parametrize("name", ["latent_vgg", "pixel_vgg"])
def test_the_shipped_weights_are_calibrated(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = LatentLPIPS.from_pretrained(embedded_folder(name))
    assert metric.calibrated and metric.licence is None
    assert all((head.weight >= 0).all() and (head.weight > 0).any() for head in metric.lins)


@pytest.mark.parametrize("augment", LETTER_SETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_letter_and_dtype(augment: str, dtype: torch.dtype) -> None:
    """Zero at equal inputs, not negative, symmetric, finite gradients; sizes from 4 x 4, square or not."""
    loss = ELatentLPIPS(metric_of().to(dtype), augment)
    for size in ((4, 4), (8, 16), (13, 5)):
        x0, x1 = torch.randn(2, 2, 4, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
        parameters = loss.draw(2, x0.shape[1:], torch.Generator().manual_seed(1))
        x0.requires_grad_()
        distance = loss(x0, x1, parameters)
        assert (distance >= 0).all() and torch.equal(loss(x0, x0.detach().clone(), parameters), torch.zeros_like(distance))
        torch.testing.assert_close(loss(x1, x0, parameters), distance)
        distance.sum().backward()
        assert x0.grad is not None and x0.grad.isfinite().all()


def test_cached_features_and_maps() -> None:
    loss = ELatentLPIPS(metric_of(l1_weight=0.5), "bgco", ensemble=3)
    x0, x1 = torch.randn(2, 2, 4, 12, 8)
    parameters = loss.draw(2, x0.shape[1:])
    expected = loss(x0, x1, parameters)
    features = loss.target_features(x1, parameters)
    torch.testing.assert_close(loss(x0, x1, parameters, features=features), expected)
    with pytest.raises(UserError, match="map in augmented coordinates"):
        loss(x0, x1, parameters, spatial=True)
    with pytest.raises(UserError, match="cached features"):
        loss(x0, x1, parameters, features=[f[:2] for f in features])
    with pytest.raises(UserError, match="pass both"):
        loss(x0, x1, features=features)


def test_maps_of_augmented_latents() -> None:
    """A map is that of the augmented latents, and its mean nearly the distance; without geometry L1 and ensembles join in."""
    loss = ELatentLPIPS(metric_of(), "bgo")
    x0, x1 = torch.randn(2, 2, 4, 12, 8)
    parameters = loss.draw(2, x0.shape[1:])
    picture = loss(x0, x1, parameters, spatial=True)
    augmented = [loss.augmentation.apply(x, parameters) for x in (x0, x1)]
    torch.testing.assert_close(picture, loss.metric(*augmented, spatial=True))
    torch.testing.assert_close(picture.mean((1, 2)), loss(x0, x1, parameters), rtol=0.1, atol=0)
    still = ELatentLPIPS(metric_of(l1_weight=0.5), "co", ensemble=2)
    assert still(x0, x1, spatial=True).shape == (2, 12, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_inputs_of_any_precision(dtype: torch.dtype) -> None:
    """A float32 metric takes latents as an autoencoder in another precision makes them."""
    loss = ELatentLPIPS(metric_of(), "bgco")
    x0, x1 = torch.randn(2, 2, 4, 8, 8)
    parameters = loss.draw(2, x0.shape[1:])
    expected = loss(x0, x1, parameters)
    torch.testing.assert_close(loss(x0.to(dtype), x1.to(dtype), parameters).float(), expected, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(loss(x0, x1.to(dtype), parameters).float(), expected, rtol=0.1, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(x0.to(dtype), x1.to(dtype), parameters).float(), expected, rtol=0.1, atol=1e-3)


def test_raw_latents() -> None:
    metric = LatentLPIPS(metric_of().net, space=LatentSpace(0.5, 0.25))
    x0, x1 = torch.randn(2, 2, 4, 8, 8)
    loss = ELatentLPIPS(metric, "g")
    parameters = loss.draw(2, x0.shape[1:])
    torch.testing.assert_close(loss(2 * x0 + 0.25, 2 * x1 + 0.25, parameters, raw=True), loss(x0, x1, parameters))
    torch.testing.assert_close(
        loss.target_features(2 * x1 + 0.25, parameters, raw=True)[0], loss.target_features(x1, parameters)[0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(metric(2 * x0 + 0.25, features=metric.target_features(2 * x1 + 0.25, raw=True), raw=True), metric(x0, x1))
    metric.space = None
    with pytest.raises(UserError, match="scale of this metric's latents is not known"):
        metric(x0, x1, raw=True)
    metric.space, metric._deviation_settled = LatentSpace(0.18215), False
    with pytest.warns(UserWarning, match="look like scaled latents"):
        metric(x0, x1, raw=True)


def test_raw_latents_are_scaled_in_float32() -> None:
    space, x = LatentSpace(1.5305, 0.0609), torch.randn(1, 4, 8, 8)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(space.scaled(x.to(dtype)), (x.to(dtype).float() - 0.0609) * 1.5305)
    assert space.scaled(x.double()).dtype == torch.float64
    for values in ({"scale": 0.0}, {"scale": "a"}, {"shift": float("nan")}):
        with pytest.raises(UserError, match="expected a number"):
            LatentSpace(**values)  # type: ignore[arg-type]


def test_what_cannot_be_a_latent() -> None:
    loss = ELatentLPIPS(metric_of())
    x = torch.randn(1, 4, 8, 8)
    for bad, message in (
        (torch.randn(1, 16, 8, 8), r"has shape \(1, 16, 8, 8\), expected \(B, 4, H, W\)"),
        (torch.randn(1, 4, 16), r"has shape .* unpack these 2 x 2 patches"),
        (torch.randn(1, 4, 8, 8).numpy(), r"is a ndarray, expected a torch.Tensor \(B, 4, H, W\)"),
        (torch.randn(4, 8, 8), r"has shape \(4, 8, 8\), expected \(B, 4, H, W\)"),
        (torch.randn(0, 4, 8, 8), r"has shape \(0, 4, 8, 8\), expected at least one latent"),
        (torch.randint(0, 9, (1, 4, 8, 8)), "is of torch.int64, expected floating-point"),
        (x * float("nan"), "has NaN"),
        (x / 0, "has NaN or infinite"),
    ):
        for function in (loss, loss.metric):
            with pytest.raises(UserError, match=f"x1 {message}"):
                function(x, bad)  # type: ignore[arg-type]
            with pytest.raises(UserError, match=f"x0 {message}"):
                function(bad, x)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"x1 {message}"):
            loss.metric.target_features(bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"shape is \(1, 4, 8, 8\), expected \(C, H, W\)"):
        loss.draw(1, x.shape)
    with pytest.warns(UserWarning, match="look like unscaled latents"):
        loss(x, 5 * torch.randn(1, 4, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        loss(x, 5 * torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("scale", [0.18215, 0.13025, 0.3611])
def test_scaling_that_was_forgotten_or_done_twice(scale: float) -> None:
    """At the scales of SD 1.5, SDXL and FLUX; on a CPU also after calls that were right."""
    metric = LatentLPIPS(metric_of().net, space=LatentSpace(scale))
    scaled = torch.randn(2, 4, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric(scaled, scaled)
        metric(scaled / scale, scaled / scale, raw=True)
    with pytest.warns(UserWarning, match="look like unscaled latents"):
        metric(scaled, scaled / scale)
    metric._deviation_settled = False
    with pytest.warns(UserWarning, match="look like scaled latents"):
        metric(scaled, scaled, raw=True)


@pytest.mark.parametrize("scale", [0.477, 0.7, 1.0, 1.5305])
def test_a_scale_near_1_is_not_guessed_at(scale: float) -> None:
    """HunyuanVideo's, a made-up one, none, Stable Diffusion 3's: a factor that latents of another picture have as well."""
    metric = LatentLPIPS(metric_of().net, space=LatentSpace(scale))
    latent = torch.randn(2, 4, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for deviation in (0.7, 1.3):
            metric(latent, deviation * latent)
            metric(latent, deviation / scale * latent, raw=True)
        metric(latent, latent, raw=True)
    with pytest.warns(UserWarning, match="look like unscaled latents"):
        metric(latent, 4 * latent)


def test_a_space_is_a_latent_space(tmp_path: Path) -> None:
    metric_of().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"space is 0.18215, expected diffusion2gan.perceptual.LatentSpace"):
        LatentLPIPS.from_pretrained(tmp_path, space=0.18215)  # type: ignore[arg-type]


def test_values_are_looked_at_once_where_that_means_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device than the CPU; also where no target ever passes, because its features come from elsewhere."""
    metric, looked = metric_of().to("meta"), []
    monkeypatch.setattr(metric, "_check_finite", lambda inputs: looked.append(list(inputs)))
    monkeypatch.setattr(metric, "_looks_plausible", lambda target, raw: looked.append("deviation"))
    x = torch.randn(1, 4, 8, 8, device="meta")
    for _ in range(3):
        metric.checked(x, None, False)
    assert looked == [["x0"]]
    for _ in range(3):
        metric.checked(x, x, False)
    assert looked == [["x0"], "deviation"]
    x = torch.randn(1, 4, 8, 8)
    for _ in range(3):
        metric.checked(x, None, False)
    assert len(looked) == 5


def test_lpips_through_a_decoder() -> None:
    torch.manual_seed(0)
    decoder = nn.ConvTranspose2d(4, 3, 4, stride=4)
    pixel = LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=3, width=0.125, kept_poolings=(1, 2, 3, 4, 5))))
    loss = DecodedLPIPS(decoder, pixel)
    x0, x1 = torch.randn(2, 2, 4, 8, 8)
    torch.testing.assert_close(loss(x0, x1), pixel(decoder(x0), decoder(x1)))
    assert torch.equal(loss(x0, x0), torch.zeros(2))
    x0.requires_grad_()
    loss(x0, x1).sum().backward()
    assert x0.grad is not None and x0.grad.abs().sum() > 0
    assert not any(name.startswith("_decode") for name in loss.state_dict())


def test_synchronised_batch_norms_are_the_same() -> None:
    """A trainer that converts every batch norm of a model finds those of the loss in it."""
    loss = ELatentLPIPS(metric_of(), "bg")
    x0, x1 = torch.randn(2, 2, 4, 8, 8)
    parameters = loss.draw(2, x0.shape[1:])
    plain = loss(x0, x1, parameters)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(loss)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert torch.equal(converted(x0, x1, parameters), plain)


def test_draws_do_not_follow_torchs_default() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        drawn, neutral = Augmentation("bgco").draw(400, (4, 8, 8)), Augmentation("").draw(2, (4, 8, 8))
    finally:
        torch.set_default_dtype(before)
    for parameters in (drawn, neutral):
        assert {t.dtype for t in parameters[:3]} == {torch.float32}
    assert all(torch.isfinite(t).all() for t in drawn[:3])


def test_video_latents_are_told_what_to_do() -> None:
    video = torch.randn(2, 4, 3, 8, 8)
    with pytest.raises(UserError, match="of video give each frame as a latent"):
        metric_of()(video, video)
    frames = video.transpose(1, 2).flatten(0, 1)
    assert metric_of()(frames, frames).shape == (6,)
