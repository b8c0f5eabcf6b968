"""The gate before any distilling, and the embedded teacher's model card: measured numbers and pictures, nothing by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffusion2gan.benchmark import autoencode_with, autoencoder_name, teacher_subject
from diffusion2gan.device import default_device
from diffusion2gan.embedded import emoji
from diffusion2gan.evaluation.emoji10k import (
    PRESERVATION_NOISES,
    Subject,
    drawn_prompt_list,
    extract,
    extract_samples,
    noise_seeds,
    preservation_samples,
    reference_features,
    reference_records,
    teacher_gate,
)
from diffusion2gan.evaluation.metrics import Moments, fd_infinity, nearest
from diffusion2gan.evaluation.scoring import ScoringNetwork
from diffusion2gan.files import write_bytes_atomic, write_json
from diffusion2gan.images import grid, png_bytes
from diffusion2gan.recipe import load_recipe
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.ode import SolverConfig
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher

NEIGHBOURS = 32


def _load(folder: Path) -> StableDiffusionTeacher:
    return StableDiffusionTeacher.from_pretrained(TeacherConfig(source=str(folder)), folder, default_device())


def _emoji_subject(teacher: StableDiffusionTeacher) -> Subject:
    """The teacher as the `emoji` recipe samples it."""
    pairs = load_recipe("emoji").pairs
    return teacher_subject(teacher, pairs.ode, pairs.precision, pairs.compile)


def _references(
    teacher: StableDiffusionTeacher, dataset: emoji.EmojiDataset, work: Path, network: ScoringNetwork
) -> tuple[np.ndarray, np.ndarray]:
    """Features of R and of R_rec, kept in `work`."""
    return reference_features(dataset, autoencode_with(teacher), autoencoder_name(teacher), work / "reference", network)


def progress(folder: Path, work: Path, count: int = 3000) -> dict[str, float]:
    """FD_inf to R_rec of a teacher folder on the validation prompts, with a fast solver: what its training is stopped by."""
    teacher, network, dataset = _load(folder), ScoringNetwork(), emoji.load()
    subject = teacher_subject(teacher, SolverConfig(solver="dpmpp", steps=12, spacing="trailing", guidance=3.0))
    target = work / "progress" / subject.identity.replace(" ", "-")
    _, reference_rec = _references(teacher, dataset, work, network)
    # The validation list twice, from noises A and then B: nothing is decided on the test list.
    texts = [p.prompt for p in drawn_prompt_list("validation")]
    prompts = [*texts, *texts][:count]
    seeds = [*noise_seeds("validation", "A", len(texts)), *noise_seeds("validation", "B", len(texts))][:count]
    features = extract_samples(subject.sample, prompts, seeds, target, "progress", network, subject.identity)
    fit = fd_infinity(features, Moments.of(reference_rec))
    return {"fd_inf_Rrec": fit.intercept, "slope": fit.slope, "count": count}


def measure_gate(folder: Path, work: Path, count: int = 2000, preservation: int | None = None) -> dict[str, Any]:
    """The three numbers of the gate, on the validation prompts and the coarse ones, with the solver of the `emoji` recipe."""
    teacher, network, dataset = _load(folder), ScoringNetwork(), emoji.load()
    subject = _emoji_subject(teacher)
    target = work / "gate" / subject.identity.replace(" ", "-")
    reference, reference_rec = _references(teacher, dataset, work, network)
    prompts = drawn_prompt_list("validation", count)
    seeds = noise_seeds("validation", "A", count)
    pictures = extract_samples(subject.sample, [p.prompt for p in prompts], seeds, target, "validation-A", network, subject.identity)
    texts, coarse_seeds = preservation_samples(preservation)
    coarse = extract_samples(subject.sample, texts, coarse_seeds, target, "preservation", network, subject.identity)
    grouped = coarse.reshape(-1, PRESERVATION_NOISES, coarse.shape[-1])
    return teacher_gate(
        pictures, prompts, grouped, texts[::PRESERVATION_NOISES], reference, reference_rec, reference_records(dataset.records)
    )


def neighbours_picture(folder: Path, work: Path, out: Path) -> None:
    """NEIGHBOURS samples, and under each the training picture nearest to it in scoring features."""
    teacher, network, dataset = _load(folder), ScoringNetwork(), emoji.load()
    subject = _emoji_subject(teacher)
    prompts = [p.prompt for p in drawn_prompt_list("validation", NEIGHBOURS)]
    samples = subject.sample(prompts, noise_seeds("validation", "B", NEIGHBOURS))
    rows = dataset.indices("train")
    known = extract(
        lambda a, b: dataset.images[rows[a:b]], len(rows), work / "reference", "train", network, {"sampler": "training pictures"}
    )
    found = dataset.images[rows[nearest(network.features(samples), known)]]
    half = NEIGHBOURS // 2
    parts = [samples[:half], found[:half], samples[half:], found[half:]]
    captions = [*prompts[:half], *[""] * half, *prompts[half:], *[""] * half]
    picture = grid(np.concatenate(parts), half, captions=captions, row_labels=["sample", "nearest", "sample", "nearest"])
    write_bytes_atomic(out, png_bytes(picture))


def write_card(folder: Path, work: Path, docs: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Measures the gate and writes `docs/embedded_teacher.md` with its pictures. `facts`: what the training log says."""
    gate = measure_gate(folder, work)
    neighbours_picture(folder, work, docs / "images" / "embedded_teacher_neighbours.png")
    write_json(docs / "embedded_teacher.json", gate | {"training": facts})
    ode = load_recipe("emoji").pairs.ode
    rows = [[name, entry["value"], entry["needed"], "yes" if entry["passed"] else "no"] for name, entry in gate["gate"].items()]
    text = f"""# The embedded teacher

A text-to-image latent diffusion model of 64 x 64 emoji: an ordinary `StableDiffusionPipeline` folder with an `AutoencoderKL`
(64 x 64 to 16 x 16 x 4), a `CLIPTextModel` with a vocabulary of its own and a `UNet2DConditionModel` of 4.2 M parameters.
It is a test bed and a demonstration, not a product: it knows ten thousand pictures and remembers them.

## Gate before distilling

{markdown_table(["number", "value", "needed", "passed"], rows)}
Of its pictures by the solver of the `emoji` recipe's pairs: {ode.solver}, {ode.steps} steps, {ode.spacing} spacing, guidance
{ode.guidance:g}. Prompt agreement is judged by a linear probe on EfficientNet-Lite0 features that has not seen the training picture nearest
to the one it judges; the ratio is to the probe's own agreement on R_rec.

## Memorisation

Each sample above the training picture nearest to it (EfficientNet-Lite0 features). Close copies are expected of so few
pictures, and no obstacle to what the model is for.

![samples and their nearest training pictures](images/embedded_teacher_neighbours.png)

## Training

{markdown_table(["what", "value"], list(facts.items()))}
Made by `diffusion2gan embedded data | autoencoder | teacher`. Pictures: Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0),
Fluent Emoji 3D (MIT); see NOTICE.
"""
    write_bytes_atomic(docs / "embedded_teacher.md", text.encode())
    return gate
