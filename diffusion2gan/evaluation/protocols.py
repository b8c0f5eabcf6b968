"""The published protocols: which pictures, against which reference, through which network, to which number.

A number can be put beside another only when protocol, variant and count are the same; so a result always says all three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.datasets import seeded_rows
from diffusion2gan.evaluation.extractors import CLIP_VARIANTS
from diffusion2gan.evaluation.metrics import Moments, bootstrap_interval, frechet_distance_of_few, precision_recall
from diffusion2gan.evaluation.shards import Rows
from diffusion2gan.evaluation.statistics import frechet_interval

KID_SUBSET, KID_SEED = 1000, 2020
_GROUPS = 10


@dataclass(frozen=True)
class Given:
    """Rows of the generated pictures, and of the reference or of the teacher where the protocol has one."""

    generated: Rows
    reference: Rows | None = None
    teacher: Rows | None = None
    teacher_other_noise: Rows | None = None
    paired: bool = True
    """Whether generated and teacher's pictures are of the same noises."""
    replicas: int = 1


Score = Callable[[Given], list[dict[str, Any]]]
"""Entries of a result, each with `metric`, `variant` and `value`; with `values` (N,) where each picture or prompt has its own."""


@dataclass(frozen=True)
class Protocol:
    """`samples`: the set of generated pictures (see evaluate.SAMPLES), None for any. `networks`: kind -> score of its rows."""

    id: str
    title: str
    samples: str | None
    networks: Mapping[str, Score]
    reference: bool = False
    teacher: bool = False


def _fid(variant: str, name: str = "FID") -> Score:
    def score(given: Given) -> list[dict[str, Any]]:
        assert given.reference is not None
        n, m = len(given.generated), len(given.reference)
        d = next(iter(given.reference)).shape[1]
        entry: dict[str, Any] = {"metric": name, "variant": variant, "better": "lower", "n_reference": m}
        if min(n, m) <= max(d, 4 * _GROUPS):
            entry["value"] = _distance_of_few(given.generated, given.reference, d)
            entry["debug"] = f"{min(n, m)} pictures for {d} dimensions: far too few, the distance says little"
        else:
            value, low, high = frechet_interval(_groups(given.generated), Moments.over(given.reference))
            entry |= {"value": value, "interval95": [low, high], "interval": f"jackknife of {_GROUPS} groups of pictures"}
        return [entry, *_kid(given, variant)]

    return score


def _distance_of_few(a: Rows, b: Rows, d: int) -> float:
    few, other = (a, b) if len(a) <= len(b) else (b, a)
    return frechet_distance_of_few(few.load(), Moments.over(other) if len(other) > d else other.load())


def _groups(rows: Rows) -> list[Moments]:
    """Moments of tenths of the pictures, in order."""
    n = len(rows)
    edges = np.linspace(0, n, _GROUPS + 1).astype(int)
    parts: list[list[np.ndarray]] = [[] for _ in range(_GROUPS)]
    start = 0
    moments: list[Moments] = []
    for shard in rows:
        for i in range(_GROUPS):
            low, high = max(edges[i] - start, 0), min(edges[i + 1] - start, len(shard))
            if low < high:
                parts[i].append(shard[low:high])
        start += len(shard)
        while len(moments) < _GROUPS and edges[len(moments) + 1] <= start:
            moments.append(Moments.over(parts[len(moments)]))
            parts[len(moments) - 1] = []
    return moments


def _kid(given: Given, variant: str) -> list[dict[str, Any]]:
    """torch-fidelity's KID of the same features: unbiased, so it can be had of few pictures; 1,000 at least."""
    assert given.reference is not None
    if min(len(given.generated), len(given.reference)) < KID_SUBSET:
        return []
    try:
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    except ImportError:
        return []
    pair = [torch.from_numpy(rows.mapped()) for rows in (given.generated, given.reference)]
    found = kid_features_to_metric(*pair, kid_subset_size=KID_SUBSET, rng_seed=KID_SEED, verbose=False)
    return [
        {
            "metric": "KID",
            "variant": variant,
            "better": "lower",
            "value": float(found[KEY_METRIC_KID_MEAN]),
            "standard_deviation_of_subsets": float(found[KEY_METRIC_KID_STD]),
        }
    ]


def _precision_recall(variant: str, k: int, strict: bool = False) -> Score:
    def score(given: Given) -> list[dict[str, Any]]:
        assert given.reference is not None
        generated, real = given.generated.load(), given.reference.load()
        # As many of each: both numbers move with the sizes of the sets.
        n = min(len(generated), len(real))
        generated, real = (x if len(x) == n else x[seeded_rows(len(x), n)] for x in (generated, real))
        precision, recall = precision_recall(generated, real, k, strict=strict)
        facts = {"variant": variant, "better": "higher", "k": k, "n_each": n}
        return [{"metric": "precision", "value": precision, **facts}, {"metric": "recall", "value": recall, **facts}]

    return score


def _both(*scores: Score) -> Score:
    return lambda given: [entry for score in scores for entry in score(given)]


def _clip(given: Given) -> list[dict[str, Any]]:
    cosines = given.generated.load().astype(np.float64)
    entries = []
    for variant, column in zip(CLIP_VARIANTS, cosines.T, strict=True):
        entries.append(
            {
                "metric": "CLIP score",
                "variant": variant,
                "better": "higher",
                "value": float(column.mean()),
                "interval95": list(bootstrap_interval(column)),
                "interval": "bootstrap over pictures",
                "values": column,
            }
        )
    return entries


def _cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - cosine of each row, as DreamSim has it (its rows are centred unit vectors already)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray(1 - (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12))


def dreamsim_to_teacher(given: Given) -> list[dict[str, Any]]:
    """Distance of student and teacher pictures of the same noise, beside its chance level: the teacher's of another noise."""
    assert given.teacher is not None and given.teacher_other_noise is not None
    student, teacher, other = (rows.load() for rows in (given.generated, given.teacher, given.teacher_other_noise))

    def entry(metric: str, values: np.ndarray, better: str | None = None) -> dict[str, Any]:
        described: dict[str, Any] = {"metric": metric, "variant": "ensemble", "value": float(values.mean())}
        low_high = list(bootstrap_interval(values))
        described |= {"interval95": low_high, "interval": "bootstrap over prompts", "values": values}
        return described | ({"better": better} if better else {})

    same, control = _cosine_distance(student, teacher), _cosine_distance(student, other)
    if not given.paired:
        # Noises of another shape are other noises: all there is is how far two pictures of a prompt are apart.
        return [entry("unpaired: student, teacher of the same prompt", control)]
    return [
        entry("DreamSim to the teacher", same, "lower"),
        entry("control: student, teacher of another noise", control),
        entry("control: teacher, teacher of another noise", _cosine_distance(teacher, other)),
        entry("control minus DreamSim", control - same, "higher"),
    ]


def dreamdiv(embeddings: np.ndarray) -> np.ndarray:
    """Mean pairwise DreamSim distance within each prompt: (P, n, d) embeddings -> (P,), n >= 2.

    With unit e_j the mean over pairs of 1 - e_i . e_j is 1 - (|sum_j e_j|^2 - n) / (n (n - 1)).
    """
    if embeddings.ndim != 3 or embeddings.shape[1] < 2:
        raise UserError(f"embeddings of shape {embeddings.shape}, expected (P, n, d) with at least two pictures a prompt")
    e = embeddings.astype(np.float64)
    e /= np.maximum(np.linalg.norm(e, axis=2, keepdims=True), 1e-12)
    n = e.shape[1]
    return np.asarray(1 - ((e.sum(1) ** 2).sum(1) - n) / (n * (n - 1)))


def _dreamdiv(given: Given) -> list[dict[str, Any]]:
    rows = given.generated.load()
    values = dreamdiv(rows.reshape(-1, given.replicas, rows.shape[-1]))
    return [
        {
            "metric": "DreamDiv",
            "variant": f"ensemble, {given.replicas} pictures a prompt",
            "better": "higher",
            "value": float(values.mean()),
            "interval95": list(bootstrap_interval(values)),
            "interval": "bootstrap over prompts",
            "values": values,
        }
    ]


_PR_INCEPTION = _both(_precision_recall("inception-k5", 5, strict=True), _precision_recall("inception-k3", 3))

PROTOCOLS: Mapping[str, Protocol] = {
    p.id: p
    for p in (
        Protocol("fid30k_coco14", "FID-30k, COCO 2014", "coco14", {"inception-clean-256": _fid("res256")}, reference=True),
        Protocol("clip30k_coco14", "CLIP score, COCO 2014", "coco14", {"clip": _clip}),
        Protocol(
            "pr30k_coco14", "Precision and recall, COCO 2014", "coco14",
            {"vgg16-256": _precision_recall("vgg-k3", 3), "inception-tf-256": _PR_INCEPTION}, reference=True,
        ),
        Protocol(
            "fid5k_coco17", "FID-5k, COCO 2017", "coco17",
            {"inception-clean-256": _fid("res256"), "inception-clean-512": _fid("res512")}, reference=True,
        ),
        Protocol(
            "fid10k_coco14", "FID-10k and patch-FID of SDXL, COCO 2014", "coco14x10k",
            {"inception-clean-512": _fid("res512"), "inception-patch-299": _fid("patch299", "patch-FID")}, reference=True,
        ),
        Protocol("clip10k_coco14", "CLIP score, the 10,000 pictures of SDXL", "coco14x10k", {"clip": _clip}),
        Protocol("clip5k_coco17", "CLIP score, COCO 2017", "coco17", {"clip": _clip}),
        Protocol("dreamsim5k", "ODE preservation, COCO 2017", "coco17", {"dreamsim": dreamsim_to_teacher}, teacher=True),
        Protocol("dreamdiv5k", "Diversity within a prompt, COCO 2017", "coco17x8", {"dreamsim": _dreamdiv}),
        Protocol("fid50k_cifar10", "FID-50k, CIFAR-10", "cifar10", {"inception-tf": _fid("tf1-bilinear")}, reference=True),
        Protocol("fd_dinov2", "FD-DINOv2", None, {"dinov2": _fid("dinov2-l14", "FD-DINOv2")}, reference=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A number copied from a paper. Never measured here."""

    name: str
    protocol: str
    metric: str
    value: float
    source: str


_D2G, _DMD2 = "Kang et al. 2024", "Yin et al. 2024 (DMD2), Table 2"
PUBLISHED: tuple[Published, ...] = tuple(
    Published(name, protocol, metric, value, source)
    for protocol, metric, rows in (
        (
            "clip30k_coco14", "CLIP score",
            (("SD 1.5, 50 steps, guidance 3", 0.312, f"{_D2G}, Table 2"), ("Diffusion2GAN (SD 1.5)", 0.310, f"{_D2G}, Table 2")),
        ),
        (
            "pr30k_coco14", "precision", (("SD 1.5, 50 steps, guidance 3", 0.72, f"{_D2G}, Table 2"), ("Diffusion2GAN (SD 1.5)", 0.73, f"{_D2G}, Table 2")),
        ),
        (
            "pr30k_coco14", "recall", (("SD 1.5, 50 steps, guidance 3", 0.67, f"{_D2G}, Table 2"), ("Diffusion2GAN (SD 1.5)", 0.65, f"{_D2G}, Table 2")),
        ),
        (
            "latency", "seconds, end to end",
            (("SD 1.5, 50 steps (A100)", 2.59, f"{_D2G}, Table 3"), ("Diffusion2GAN (SD 1.5, A100)", 0.09, f"{_D2G}, Table 3")),
        ),
        (
            "fid30k_coco14", "FID",
            (("SD 1.5, 50 steps, guidance 3", 8.74, f"{_D2G}, Table 3"), ("Diffusion2GAN (SD 1.5)", 9.29, f"{_D2G}, Table 3"),
             ("InstaFlow-0.9B", 13.10, f"{_D2G}, Table 3"), ("UFOGen", 12.78, f"{_D2G}, Table 3"), ("DMD", 11.49, f"{_D2G}, Table 3"),
             ("GigaGAN", 9.09, f"{_D2G}, Table 3")),
        ),
        (
            "fid5k_coco17", "FID",
            (("SD 1.5, 50 steps, guidance 3", 19.1, f"{_D2G}, Table 4"), ("Diffusion2GAN (SD 1.5)", 19.5, f"{_D2G}, Table 4"),
             ("InstaFlow-0.9B", 23.4, f"{_D2G}, Table 4"), ("SDXL, 50 steps, guidance 7", 25.56, f"{_D2G}, Table 5"),
             ("Diffusion2GAN (SDXL)", 25.49, f"{_D2G}, Table 5"), ("SDXL-Turbo, 1 step", 28.10, f"{_D2G}, Table 5"), ("SDXL-Lightning, 1 step", 30.14, f"{_D2G}, Table 5")),
        ),
        (
            "clip5k_coco17", "CLIP score",
            (("SD 1.5, 50 steps, guidance 3", 0.313, f"{_D2G}, Table 4"), ("Diffusion2GAN (SD 1.5)", 0.311, f"{_D2G}, Table 4"),
             ("InstaFlow-0.9B", 0.304, f"{_D2G}, Table 4"),
             ("SDXL, 50 steps, guidance 7", 0.346, f"{_D2G}, Table 5"), ("Diffusion2GAN (SDXL)", 0.347, f"{_D2G}, Table 5"),
             ("SDXL-Turbo, 1 step", 0.342, f"{_D2G}, Table 5"),
             ("SDXL-Lightning, 1 step", 0.324, f"{_D2G}, Table 5")),
        ),
        (
            "fid10k_coco14", "FID",
            (("SDXL, 50 steps, guidance 6", 19.36, _DMD2), ("SDXL, 50 steps, guidance 8", 20.39, _DMD2), ("DMD2, 1 step", 19.01, _DMD2),
             ("SDXL-Turbo, 1 step", 24.57, _DMD2), ("SDXL-Lightning, 1 step", 23.92, _DMD2)),
        ),
        (
            "clip10k_coco14", "CLIP score",
            (("SDXL, 50 steps, guidance 6", 0.332, _DMD2), ("SDXL, 50 steps, guidance 8", 0.335, _DMD2),
             ("SDXL-Turbo, 1 step", 0.337, _DMD2), ("SDXL-Lightning, 1 step", 0.316, _DMD2)),
        ),
        (
            "dreamsim5k", "DreamSim to the teacher",
            (("Diffusion2GAN (SDXL)", 0.284, f"{_D2G}, Table 5"), ("SDXL-Turbo, 1 step", 0.368, f"{_D2G}, Table 5"),
             ("SDXL-Lightning, 1 step", 0.345, f"{_D2G}, Table 5")),
        ),
        (
            "dreamdiv5k", "DreamDiv",
            (("SDXL, 50 steps, guidance 7", 0.338, f"{_D2G}, Table 5"), ("Diffusion2GAN (SDXL)", 0.268, f"{_D2G}, Table 5"),
             ("SDXL-Turbo, 1 step", 0.232, f"{_D2G}, Table 5"), ("SDXL-Lightning, 1 step", 0.315, f"{_D2G}, Table 5")),
        ),
        (
            "fid50k_cifar10", "FID",
            (("EDM, unconditional, 35 evaluations", 1.97, "Karras et al. 2022"), ("CD", 3.67, f"{_D2G}, Table 6"),
             ("ODE distillation with LPIPS, 1 M pairs", 3.16, f"{_D2G}, Table 6")),
        ),
    )
    for name, value, source in rows
)  # fmt: skip
