"""Every family of teachers through both phases: the regression loss falls on held-out pairs, D tells real latents from generated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tiny_pipeline, tiny_pixel_pipeline, tiny_sdxl_pipeline
from tests.helpers import metrics, recipe_values, trained_from_scratch

GUIDED = {"steps": 4, "guidance": 2.0}
FAMILIES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "sd15": ("stable_diffusion", lambda: tiny_pipeline("epsilon"), GUIDED),
    "sd21_v": ("stable_diffusion", lambda: tiny_pipeline("v_prediction"), GUIDED),
    "sdxl": ("sdxl", tiny_sdxl_pipeline, GUIDED),
    "pixel_ddpm": ("pixel", tiny_pixel_pipeline, {"steps": 4, "guidance": 1.0}),
    "pixel_edm": (
        "pixel",
        lambda: tiny_pixel_pipeline(edm=True),
        {"solver": "heun", "steps": 4, "spacing": "linspace", "guidance": 1.0},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_both_phases_learn(name: str, tmp_path: Path, prompts_file: Path) -> None:
    family, pipeline, ode = FAMILIES[name]
    pipeline().save_pretrained(tmp_path / "teacher")
    values = recipe_values(tmp_path / "teacher", prompts_file, pairs__ode=ode)
    values["teacher"]["family"] = family
    values["training"] |= {"steps": 24, "validate_every": 4, "checkpoint_every": 24, "sample_every": 1000, "ema_decay": 0.8}
    # No regression to hold G back would be another method; its own rate is so low that D meets a G that stands still.
    values["adversarial"] = {
        "steps": 30, "learning_rate": 1e-12, "discriminator_learning_rate": 3e-3, "warmup_steps": 1, "r1_every": 8,
        "other_latent": 0.0, "other_text": 0.0, "other_noise": 0.0,
    }  # fmt: skip
    trainer = trained_from_scratch(values, tmp_path)
    rows = metrics(tmp_path / "run")
    held_out = {r["step"]: r["validation_loss"] for r in rows if "validation_loss" in r}
    assert held_out[24] < 0.95 * held_out[4], held_out
    told = [r["discriminator"] for r in rows if "discriminator" in r][-8:]
    right = [(t["real"]["accuracy"][0] + t["generated"]["accuracy"][0]) / 2 for t in told]
    assert sum(right) / len(right) > 0.7, right
    assert trainer.adversary is not None
    assert all(torch.isfinite(p).all() for p in trainer.adversary.bare.parameters())
