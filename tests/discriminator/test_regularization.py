from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion2gan.discriminator.multi_scale import DiscriminatorConfig, MultiScaleDiscriminator, score
from diffusion2gan.discriminator.regularization import (
    GENERATED,
    OTHER_LATENT,
    OTHER_NOISE,
    OTHER_TEXT,
    mix_and_match,
    r1_finite_difference,
    r1_penalty,
    r1_samples,
)
from diffusion2gan.teachers.attention import checkpoint_as_computed, twice_differentiable_attention
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.conftest import tiny_pipeline
from tests.discriminator.test_multi_scale import PLANS, _evaluate, _inputs


def test_r1_of_a_linear_discriminator() -> None:
    """s = w . x has |ds/dx|^2 = |w|^2, and its derivative to w is 2 w."""
    w = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(lambda x: (x * w).flatten(1).sum(1), torch.randn(5, 4, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(penalty, w.detach().square().sum().expand(5))
    penalty.mean().backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())


def test_r1_of_a_quadratic_discriminator() -> None:
    """s = a |x|^2 / 2 has |ds/dx|^2 = a^2 |x|^2: each sample its own."""
    a = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    penalty = r1_penalty(lambda x: a * x.square().flatten(1).sum(1) / 2, x)
    torch.testing.assert_close(penalty, 2.25 * x.square().flatten(1).sum(1))
    penalty.sum().backward()
    torch.testing.assert_close(a.grad, 3 * x.square().sum())


def _discriminator(plan: str, checkpointing: bool) -> MultiScaleDiscriminator:
    torch.manual_seed(0)
    network = PLANS[plan][0]().double()
    if checkpointing:
        network.enable_gradient_checkpointing()
    network.train()
    discriminator = MultiScaleDiscriminator(network, _evaluate, DiscriminatorConfig()).double()
    with torch.no_grad():
        # The zero-initialised additions take part.
        for p in discriminator.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return discriminator


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_r1_of_a_diffusion_discriminator(plan: str, checkpointing: bool) -> None:
    """Against differences along a direction: of the score for the penalty, of the penalty for its gradient to the weights."""
    discriminator = _discriminator(plan, checkpointing)
    latent, noise, condition = _inputs(plan)
    latent, noise = latent.double(), noise.double()

    def s(x: Tensor) -> Tensor:
        return score(discriminator(x, noise, condition))

    with sdpa_kernel(SDPBackend.MATH):
        penalty = r1_penalty(s, latent)
        penalty.mean().backward()
        x = latent.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(s(x).sum(), x)
        norm = gradient.flatten(1).norm(dim=1)
        step = 1e-5 * gradient / norm[:, None, None, None]
        with torch.no_grad():
            slope = (s(latent + step) - s(latent - step)) / 2e-5
        torch.testing.assert_close(slope.square(), penalty.detach(), rtol=1e-6, atol=0)
        # One direction in the space of all weights.
        torch.manual_seed(1)
        weights = [p for p in discriminator.parameters() if p.grad is not None]
        direction = [torch.randn_like(p) for p in weights]
        expected = sum((p.grad * d).sum() for p, d in zip(weights, direction, strict=True))
        values = []
        for sign in (1, -2):
            torch._foreach_add_([p.data for p in weights], direction, alpha=sign * 1e-6)
            values.append(r1_penalty(s, latent).mean().item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected.item(), rel=1e-4)
    # The last biases move no score's slope; everything else does.
    without = {n for n, p in discriminator.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert without == {f"readouts.{i}.out.bias" for i in range(len(discriminator.readouts))}


def test_finite_differences_agree_with_r1_in_the_mean() -> None:
    """Over many directions; of one sample, the estimate spreads by sqrt(2) of itself."""
    discriminator = _discriminator("tiny", False)
    latent, noise, condition = _inputs("tiny", 1)
    latent, noise = latent.double(), noise.double()
    count = 400
    many = condition.expand(count)

    def s(x: Tensor) -> Tensor:
        return score(discriminator(x, noise.expand(len(x), -1, -1, -1), many[: len(x)]))

    with sdpa_kernel(SDPBackend.MATH):
        exact = r1_penalty(s, latent).item()
    directions = torch.randn(count, *latent.shape[1:], dtype=torch.float64)
    with torch.no_grad():
        found = r1_finite_difference(s, latent.expand(count, -1, -1, -1), directions, sigma=1e-3)
    assert found.mean().item() == pytest.approx(exact, rel=4 * math.sqrt(2 / count))
    assert found.std().item() == pytest.approx(math.sqrt(2) * exact, rel=0.3)


def test_finite_difference_of_a_linear_discriminator() -> None:
    """(w . e)^2 whatever sigma, differentiable to w."""
    w = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    x, e = (torch.randn(5, 4, 3, 3, dtype=torch.float64) for _ in range(2))
    for sigma in (1e-3, 1.0):
        found = r1_finite_difference(lambda x: (x * w).flatten(1).sum(1), x, e, sigma)
        torch.testing.assert_close(found, (e * w.detach()).flatten(1).sum(1).square(), rtol=1e-8, atol=1e-10)
    found.sum().backward()
    assert w.grad is not None
    assert w.grad.norm() > 0


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_r1_looks_at_one_sample_of_each_part(parts: int, size: int, seed: int) -> None:
    found = r1_samples(np.random.default_rng(seed), parts * size, parts)
    assert found.tolist() == sorted(set(found.tolist()))
    assert (found // size).tolist() == list(range(parts))


def test_r1_samples_of_an_odd_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="2 R1 samples of a batch of 5"):
        r1_samples(np.random.default_rng(0), 5, 2)


@given(
    batch=st.integers(1, 9),
    texts=st.integers(1, 4),
    pairs=st.integers(1, 9),
    shares=st.tuples(*[st.sampled_from([0.0, 0.1, 1 / 3])] * 3),
    noise_is_seen=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_bookkeeping_of_mix_and_match(
    batch: int, texts: int, pairs: int, shares: tuple[float, ...], noise_is_seen: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.integers(pairs, size=batch)
    prompts = [f"text {r % texts}" for r in rows]
    uniform = generator.random((batch, 2))
    kinds, partners = mix_and_match(uniform, shares, rows, prompts, noise_is_seen)
    assert kinds.shape == partners.shape == (batch,)
    for i, (kind, j) in enumerate(zip(kinds, partners, strict=True)):
        assert 0 <= j < batch
        if kind == GENERATED:
            assert j == i
            continue
        assert shares[kind - 1] > 0
        assert rows[j] != rows[i], "a swap onto itself"
        if kind == OTHER_TEXT or not noise_is_seen:
            assert prompts[j] != prompts[i]
    # Only who finds no partner for the kind that was drawn stays as he was.
    drawn = 1 + np.searchsorted(np.cumsum(shares), uniform[:, 0], side="right")
    for i in np.flatnonzero((kinds == GENERATED) & (uniform[:, 0] < sum(shares) - 1e-9)):
        by_text = drawn[i] == OTHER_TEXT or not noise_is_seen
        assert all(p == prompts[i] for p in prompts) if by_text else all(r == rows[i] for r in rows)
    again = mix_and_match(uniform, shares, rows, prompts, noise_is_seen)
    assert (kinds == again[0]).all()
    assert (partners == again[1]).all()


def test_shares_and_partners_are_drawn_as_said() -> None:
    count = 40_000
    generator = np.random.default_rng(0)
    rows = np.arange(50)
    kinds, partners = [], []
    for _ in range(count // 50):
        k, p = mix_and_match(generator.random((50, 2)), (0.1, 0.2, 0.3), rows, [str(r) for r in rows])
        kinds.append(k)
        partners.append((p - rows) % 50)
    kinds_, distance = np.concatenate(kinds), np.concatenate(partners)
    for kind, share in ((GENERATED, 0.4), (OTHER_LATENT, 0.1), (OTHER_TEXT, 0.2), (OTHER_NOISE, 0.3)):
        assert (kinds_ == kind).mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))
    counts = np.bincount(distance[kinds_ != GENERATED], minlength=50)[1:]
    assert counts.std() / counts.mean() < 2 / math.sqrt(counts.mean())


def test_a_batch_of_one_has_nobody_to_swap_with() -> None:
    kinds, partners = mix_and_match(np.zeros((1, 2)), (1.0, 0.0, 0.0), np.array([3]), ["a"])
    assert kinds.tolist() == [GENERATED]
    assert partners.tolist() == [0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_outside_the_block_keeps_its_attention(checkpointing: bool) -> None:
    """One backward for a loss by fused attention and for R1, which needs the other kind, recomputed or not."""
    discriminator = _discriminator("sd15", False)
    latent, noise, condition = _inputs("sd15")
    latent, noise = latent.double(), noise.double()

    def s(x: Tensor) -> Tensor:
        return score(discriminator(x, noise, condition))

    def gradients() -> list[Tensor]:
        discriminator.zero_grad()
        with twice_differentiable_attention():
            penalty = r1_penalty(s, latent).sum()
        (s(latent).sum() + penalty).backward()
        return [p.grad.clone() for p in discriminator.parameters() if p.grad is not None]

    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients()
    if checkpointing:
        discriminator.network.enable_gradient_checkpointing(checkpoint_as_computed)
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    # Fused attention is what would be used otherwise, and it cannot do this.
    with pytest.raises(RuntimeError, match="derivative"):
        r1_penalty(s, latent).sum().backward()


def test_a_teachers_discriminator_recomputes_as_it_computed() -> None:
    """`gradient_checkpointing` with exact R1, as the recipes for one GPU have it: made by `from_teacher`, not by a test."""

    def gradients(checkpointing: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        teacher = StableDiffusionTeacher.from_pipeline(tiny_pipeline())
        d = MultiScaleDiscriminator.from_teacher(teacher, DiscriminatorConfig(gradient_checkpointing=checkpointing)).double()
        with torch.no_grad():
            for p in d.parameters():
                p.add_(0.1 * torch.randn_like(p))
        latent, noise, condition = _inputs("tiny", size=8)
        latent, noise, condition = latent.double(), noise.double(), condition.to(torch.float64)
        calls: list[int] = []
        d.network.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.append(1))

        def s(x: Tensor) -> Tensor:
            return score(d(x, noise, condition))

        with twice_differentiable_attention():
            penalty = r1_penalty(s, latent).sum()
        (s(latent).sum() + penalty).backward()
        return [p.grad for p in d.parameters() if p.grad is not None], len(calls)

    (plain, few), (recomputed, many) = gradients(False), gradients(True)
    for ours, theirs in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert few == 2 < many
