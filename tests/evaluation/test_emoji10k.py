"""The protocol: prompts, targets, resumable features, and the whole path on a toy sampler."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffusion2gan import benchmark
from diffusion2gan.embedded import emoji
from diffusion2gan.embedded.emoji import EmojiDataset, EmojiRecord
from diffusion2gan.embedded.weights import embedded_student
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import emoji10k
from diffusion2gan.evaluation.comparison import duels, lines, read_evaluation
from diffusion2gan.evaluation.emoji10k import CrossFittedProbe, DrawnPrompt, Subject
from diffusion2gan.evaluation.evaluate import describe
from diffusion2gan.recipe import load_recipe


def record(concept: int, style: str, tone: str = "") -> EmojiRecord:
    sub = ("face smiling", "face sad", "hand", "cat")[concept % 4]
    category = {"hand": "people & body", "cat": "animals & nature"}.get(sub, "smileys & emotion")
    name = f"thing {concept}"
    return EmojiRecord(f"{concept:04X}", style, tone, f"full {name}", name, category, sub, "train")


@pytest.fixture(scope="module")
def records() -> list[EmojiRecord]:
    return [record(c, s, "dark" if c % 8 == 2 else "") for c in range(120) for s in emoji.STYLES if (c, s) != (5, "fluent")]


# --- Prompts --------------------------------------------------------------------------------------------------------
def test_prompts_have_exact_shares_in_every_four_and_fit_their_picture(records: list[EmojiRecord]) -> None:
    prompts = emoji10k.draw_prompts(records, 400, seed=3)
    counts = emoji10k.caption_counts(records)
    for start in range(0, 400, 4):
        assert Counter(p.stratum for p in prompts[start : start + 4]) == {"coarse": 2, "middle": 1, "fine": 1}
    for p in prompts:
        assert p.prompt in emoji.all_captions(records[p.picture])
        low, high = {"coarse": (30, 10**9), "middle": (3, 29), "fine": (1, 2)}[p.stratum]
        assert low <= counts[p.prompt] <= high


def test_prompts_are_a_function_of_seed_and_namespace_and_a_prefix_of_longer_lists(records: list[EmojiRecord]) -> None:
    prompts = emoji10k.draw_prompts(records, 200, seed=3)
    assert emoji10k.draw_prompts(records, 53, seed=3) == prompts[:53]
    assert emoji10k.draw_prompts(records, 200, seed=4) != prompts
    assert emoji10k.draw_prompts(records, 200, seed=3, namespace=0) != prompts


def test_a_reference_without_a_stratum_is_refused(records: list[EmojiRecord]) -> None:
    with pytest.raises(UserError, match="coarse"):
        emoji10k.draw_prompts(records[:6], 4, seed=0)


def test_committed_lists_are_whole_and_mixed() -> None:
    for name, size in emoji10k.LIST_SIZES.items():
        prompts = emoji10k.drawn_prompt_list(name)
        assert len(prompts) == size
        if name != "preservation":
            assert Counter(p.stratum for p in prompts) == {"coarse": size // 2, "middle": size // 4, "fine": size // 4}
    distinct = {p.prompt for p in emoji10k.drawn_prompt_list("preservation")}
    assert len(distinct) == 150
    assert emoji10k.drawn_prompt_list("test", 8) == emoji10k.drawn_prompt_list("test")[:8]
    with pytest.raises(UserError, match="1 to 10000"):
        emoji10k.drawn_prompt_list("test", 0)
    with pytest.raises(UserError, match="expected one of"):
        emoji10k.drawn_prompt_list("train")


def test_a_changed_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(emoji10k.LIST_SHA256, "validation", "0" * 64)
    with pytest.raises(UserError, match="sha256"):
        emoji10k._committed_list.__wrapped__("validation")


def test_committed_lists_are_drawn_by_this_code(tmp_path: Path) -> None:
    reference = emoji10k.reference_records()
    assert emoji10k.write_prompt_lists(reference, tmp_path / "a") == emoji10k.LIST_SHA256
    emoji10k.write_prompt_lists(reference, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    test_texts = [p.prompt for p in emoji10k.drawn_prompt_list("test", 100)]
    assert emoji10k.store_prompts(100, 0) != test_texts


def test_noise_seeds_never_meet() -> None:
    blocks = [emoji10k.noise_seeds(name, b, emoji10k.LIST_SIZES[name]) for name in ("test", "validation") for b in "AB"]
    seeds = [s for block in blocks for s in block] + emoji10k.preservation_samples()[1]
    assert len(set(seeds)) == len(seeds) == 2 * 12_000 + 3200
    assert all(1 << 62 <= s < 1 << 63 for s in seeds)
    assert emoji10k.noise_seeds("test", "B", 3) == [(1 << 62) + 1, (1 << 62) + 3, (1 << 62) + 5]


# --- Targets --------------------------------------------------------------------------------------------------------
def test_targets_are_what_a_caption_settles(records: list[EmojiRecord]) -> None:
    targets = emoji10k.prompt_targets(records)
    assert targets["smileys & emotion"] == {
        "category": {"smileys & emotion"},
        "subcategory": {"face smiling", "face sad"},
    }
    assert targets["thing 2"] == {"category": {"people & body"}, "subcategory": {"hand"}}
    # One style of concept 5 is missing from R: its caption still leaves the style open.
    assert "style" not in targets["thing 5"]
    assert targets["noto thing 2, dark skin"] == {
        "category": {"people & body"},
        "subcategory": {"hand"},
        "style": {"noto"},
    }
    assert set(targets) == set(emoji10k.caption_counts(records))


def test_cross_fitted_probe_judges_each_picture_by_the_other_half(records: list[EmojiRecord]) -> None:
    # Features that say the labels: everything agrees, the reference with its own captions too.
    features = label_features(records)
    probe = CrossFittedProbe.fit(features, records)
    prompts = emoji10k.draw_prompts(records, 80, seed=0)
    own = probe.own_agreement(features, prompts)
    assert own.mean() > 0.95
    wrong = [DrawnPrompt("cat", "coarse", 0)] * 2
    hands = [i for i, r in enumerate(records) if r.subcategory == "hand"][:2]
    assert probe.agreement(features[hands], wrong).sum() == 0


def test_a_generated_copy_of_the_reference_is_judged_like_the_reference(records: list[EmojiRecord]) -> None:
    # Features without any information: a probe that has seen the pictures would still know them by heart.
    features = np.random.default_rng(0).standard_normal((len(records), 400)).astype(np.float32)
    probe = CrossFittedProbe.fit(features, records)
    prompts = emoji10k.draw_prompts(records, 200, seed=0)
    copies = features[[p.picture for p in prompts]]
    np.testing.assert_array_equal(probe.agreement(copies, prompts), probe.own_agreement(features, prompts))
    assert probe.agreement(copies, prompts).mean() < 0.5


def label_features(records: list[EmojiRecord]) -> np.ndarray:
    labels = emoji10k.probe_labels(records)
    columns = [np.array([v == label for v in labels[h]]) for h in emoji10k.HEADS for label in sorted(set(labels[h]))]
    x = np.stack(columns, 1).astype(np.float32)
    return x + 0.05 * np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)


# --- Features -------------------------------------------------------------------------------------------------------
class MeanColour:
    """A scorer of 6 dimensions: mean and spread of each channel."""

    sha256 = "mean colour"

    def features(self, images: np.ndarray, progress: bool = False) -> np.ndarray:
        x = images.astype(np.float32) / 255
        return np.concatenate([x.mean((1, 2)), x.std((1, 2))], 1)


def noise_pictures(start: int, stop: int) -> np.ndarray:
    return np.stack([np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8) for i in range(start, stop)])


def test_shards_that_exist_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji10k, "SHARD", 10)
    calls: list[int] = []

    def produce(start: int, stop: int) -> np.ndarray:
        calls.append(start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return noise_pictures(start, stop)

    def run(what: Callable[[int, int], np.ndarray], folder: Path) -> np.ndarray:
        return emoji10k.extract(what, 35, folder, "A", MeanColour(), {"sampler": "x"}, progress=False)

    with pytest.raises(KeyboardInterrupt):
        run(produce, tmp_path / "killed")
    assert sorted(p.name for p in (tmp_path / "killed").glob("*.npy")) == ["features-A-00000-of-00004.npy", "features-A-00001-of-00004.npy"]
    resumed = run(produce, tmp_path / "killed")
    assert calls == [0, 10, 20, 20, 30]
    np.testing.assert_array_equal(resumed, run(noise_pictures, tmp_path / "unbroken"))
    assert emoji10k.seconds_per_image(tmp_path / "killed", "A") is not None

    with pytest.raises(UserError, match="sampler is 'x'"):
        emoji10k.extract(produce, 35, tmp_path / "killed", "A", MeanColour(), {"sampler": "y"}, progress=False)
    (tmp_path / "killed" / "features-A-00001-of-00004.npy").write_bytes(b"cut")
    with pytest.raises(UserError, match="delete it"):
        run(produce, tmp_path / "killed")


def test_a_sampler_that_returns_too_few_pictures_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 pictures for 4 prompts"):
        emoji10k.extract(lambda a, b: noise_pictures(a, b - 1), 4, tmp_path, "A", MeanColour(), {}, progress=False)


# --- The whole path -------------------------------------------------------------------------------------------------
def toy_sampler(quality: float) -> emoji10k.Sampler:
    """Colour from the prompt and the noise; the lower the quality, the greyer."""

    def sample(prompts: list[str], seeds: list[int]) -> np.ndarray:
        out = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            colour = np.random.default_rng([*prompt.encode()]).uniform(60, 200, 3) + 30 * np.random.default_rng(seed).standard_normal(3)
            picture = quality * colour + (1 - quality) * 128 + np.linspace(-20, 20, 64)[:, None, None] * quality
            out.append(np.broadcast_to(picture, (64, 64, 3)).clip(0, 255).round().astype(np.uint8))
        return np.stack(out)

    return sample


@pytest.fixture
def toy(records: list[EmojiRecord], monkeypatch: pytest.MonkeyPatch) -> EmojiDataset:
    pictures = toy_sampler(1.0)([r.name for r in records], list(range(len(records))))
    drawn = {name: emoji10k.make_prompt_list(name, records) for name in emoji10k.LIST_SIZES}
    monkeypatch.setattr(emoji10k, "_committed_list", lambda name: drawn[name])
    return EmojiDataset(pictures, records)


def test_evaluate_scores_a_perfect_and_a_poor_student(tmp_path: Path, toy: EmojiDataset) -> None:
    teacher, untrained = Subject(toy_sampler(1.0), "teacher"), Subject(toy_sampler(0.2), "untrained")

    def run(quality: float) -> dict:
        return emoji10k.evaluate_emoji10k(
            Subject(toy_sampler(quality), f"student {quality}"), teacher, untrained, lambda x: x, tmp_path / str(quality),
            shared=tmp_path / "shared", count=200, preservation_count=6, dataset=toy, scorer=MeanColour(), progress=False,
        )  # fmt: skip

    perfect, poor = run(1.0), run(0.4)
    scores = perfect["scores"]["all"]
    assert scores["gap_closed"] == pytest.approx(1)
    assert 0 < poor["scores"]["all"]["gap_closed"] < 0.9
    assert scores["fd_inf_ratio"] == pytest.approx(1)
    assert perfect["preservation"]["retrieval"]["mean"] == 1
    assert perfect["preservation"]["ratio"] == 0
    assert perfect["diversity"]["ratio"] == pytest.approx(1)
    assert poor["diversity"]["ratio"] < 0.6
    assert perfect["floors"]["R_Rrec"]["fd"] == pytest.approx(0, abs=1e-9)
    assert perfect["partial"] is True
    assert perfect["count"] == 200
    assert set(perfect["scores"]) == {"all", "coarse", "middle", "fine"}
    assert perfect["scores"]["coarse"]["n"] == 100
    assert json.loads((tmp_path / "1.0" / "emoji10k-v1.json").read_text())["sha256"]["prompt_list"] == emoji10k.LIST_SHA256["test"]
    for metric, mean in (
        ("prompt agreement", poor["scores"]["all"]["prompt_agreement"]["student"]["mean"]),
        ("retrieval of the own noise", poor["preservation"]["retrieval"]["mean"]),
        ("diversity within a prompt", poor["diversity"]["student"]["mean"]),
    ):
        assert np.load(tmp_path / "0.4" / poor["values"][metric]).mean() == pytest.approx(mean, rel=1e-5)
    # Prompt by prompt the perfect one is the nearer to its own noise.
    models = []
    for name in ("1.0", "0.4"):
        describe(tmp_path / name, name, {"subject": name})
        models.append(read_evaluation(tmp_path / name))
    won = {duel.line.metric: (duel.wins, duel.losses) for duel in duels(models, lines(models))}
    assert won["retrieval of the own noise"] == (6, 0)
    assert won.keys() == perfect["values"].keys()
    # A second run reads every shard and finds the same.
    again = run(1.0)
    assert again["scores"] == perfect["scores"]


def test_teacher_gate_passes_the_reference_and_stops_a_teacher_deaf_to_noise(records: list[EmojiRecord]) -> None:
    features = label_features(records)
    prompts = emoji10k.draw_prompts(records, 80, seed=0)
    coarse = ["smileys & emotion", "noto smileys & emotion", "people & body"]
    groups = []
    for text in coarse:
        rows = [i for i, r in enumerate(records) if text in emoji.all_captions(r)]
        groups.append(features[np.random.default_rng(0).permutation(rows)[:16]])
    preservation = np.stack(groups)
    shown = features[[p.picture for p in prompts]]
    gate = emoji10k.teacher_gate(shown, prompts, preservation, coarse, features, features, records)
    assert gate["gate"]["prompt_agreement_ratio"]["passed"]
    assert gate["gate"]["diversity_ratio"]["value"] > 0.8
    deaf = np.repeat(preservation[:, :1], 16, axis=1)
    stopped = emoji10k.teacher_gate(shown, prompts, deaf, coarse, features, features, records)
    assert stopped["gate"]["variance_within"]["value"] == pytest.approx(0, abs=1e-6)
    assert not stopped["passed"]


def test_the_teacher_is_solved_as_the_recipes_pairs_are(tiny_embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So its features serve the students of those pairs too, and theirs serve it."""
    seen: list[str] = []
    monkeypatch.setattr(benchmark, "_evaluate", lambda subject, name, sampler, *rest: seen.append(sampler.identity))
    pairs = load_recipe("emoji").pairs
    benchmark.evaluate_teacher(pairs, tmp_path / "teacher", tmp_path / "shared")
    facts_path = tiny_embedded / "student" / "diffusion2gan.json"
    facts = json.loads(facts_path.read_text()) | {"ode": pairs.ode.model_dump(), "precision": pairs.precision}
    facts_path.write_text(json.dumps(facts))
    benchmark.evaluate_student(embedded_student(), tmp_path / "student", tmp_path / "shared")
    benchmark.evaluate_teacher(pairs.model_copy(update={"precision": "float16"}), tmp_path / "other", tmp_path / "shared")
    assert seen[0] == seen[1] != seen[2]
