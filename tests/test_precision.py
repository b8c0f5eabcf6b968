"""float32 that is float32, whatever the program around it has set."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.precision import no_tf32
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.conftest import tiny_pipeline

_SEE = """
import torch
from diffusion2gan.precision import no_tf32

def told(read):
    try:
        return read()
    except RuntimeError:
        return "refused"

def state():
    new = [k.fp32_precision for k in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)]
    old = [lambda: torch.backends.cuda.matmul.allow_tf32, lambda: torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision]
    return new, [told(read) for read in old]

{setting}
before = state()
with no_tf32():
    new, old = state()
    assert new == ["ieee"] * 3, new
    assert {older} or old == [False, False, "highest"], old
assert state() == before, (state(), before)
"""


@pytest.mark.parametrize(
    ("setting", "older"),
    [
        ("", False),
        ("torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False", False),
        ("torch.set_float32_matmul_precision('high')", False),
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.cudnn.conv.fp32_precision = 'ieee'", True),
    ],
)
def test_tf32_is_off_and_comes_back(setting: str, older: bool) -> None:
    """In a process of its own: some of these settings cannot be taken back."""
    done = subprocess.run([sys.executable, "-c", _SEE.format(setting=setting, older=older)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_error_inside_leaves_nothing_changed() -> None:
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError), no_tf32():
        1 / 0  # noqa: B018
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32) == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_x_has_no_noise_that_the_network_did_not_see(how: str) -> None:
    """A z that bf16 holds, and one that it rounds to the same: one x."""
    teacher = StableDiffusionTeacher.from_pipeline(tiny_pipeline())
    generator = OneStepGenerator.from_teacher(teacher).requires_grad_(False)
    if how == "weights":
        generator.network.to(torch.bfloat16)
    condition = teacher.encode_prompts(["cat", "sun"])
    z = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    seen = z.bfloat16().float()
    assert not torch.equal(z, seen)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        assert torch.equal(generator(z, condition), generator(seen, condition))
    whole = OneStepGenerator.from_teacher(teacher).requires_grad_(False)
    assert not torch.equal(whole(z, condition), whole(seen, condition))
