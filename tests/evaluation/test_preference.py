"""A study of preference: fair plans, pages that give nothing away, votes that are kept, numbers computed by hand."""

from __future__ import annotations

import base64
import csv
import html
import http.client
import itertools
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.preference import Ballot, Study, StudyConfig, Trial, Vote, load_study, simulate_votes, tally, write_votes
from diffusion2gan.evaluation.preference_analysis import analyse_study, screen
from diffusion2gan.evaluation.preference_make import make_study
from diffusion2gan.evaluation.preference_server import StudyServer, VoteBox, serve_study
from diffusion2gan.evaluation.statistics import cluster_bootstrap, wilson_interval

MODELS = ("alphamodel", "betamodel", "gammamodel")
PROMPTS = ("a red <cat> & dog</script>", "blue hearts", "green suns", "seven yellow stars", "a red dog", "one purple whale", "two cubes")


def pictures(folder: Path, seed: int, count: int = len(PROMPTS), size: tuple[int, int] = (16, 16), captions: bool = False) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    facts = PngImagePlugin.PngInfo()
    facts.add_text("model", folder.name)
    for i in range(count):
        pixels = np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (size[1], size[0], 3))
        Image.fromarray(pixels.copy()).save(folder / f"{folder.name}-{i:04d}.png", pnginfo=facts)
    if captions:
        (folder / "captions.txt").write_text(
            "".join(f"{PROMPTS[i % len(PROMPTS)]}{'' if i < len(PROMPTS) else f' {i}'}\n" for i in range(count))
        )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: pictures(root / name, i, size=(32, 32) if i == 2 else (16, 16), captions=i == 0) for i, name in enumerate(MODELS)}


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, 7 prompts, 3 votes, two questions: 126 votes of 15 raters."""
    folder = tmp_path_factory.mktemp("study") / "study"
    make_study(folders, folder, StudyConfig(votes=3, trials_per_rater=10, seed=4))
    return folder


@pytest.fixture
def study_folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "study")


def trials_of(study: Study) -> list[tuple[str, Trial]]:
    return [(rater.id, trial) for rater in study.raters for trial in rater.trials]


def attentive(trial: Trial) -> str:
    """The right answer of a check, else left."""
    return trial.expected or "left"


def vote_of(study: Study, rater: str, trial: Trial, choice: str | None = None, **more: Any) -> Vote:
    return Vote.model_validate({"study": study.id, "rater": rater, "trial": trial.id, "choice": choice or attentive(trial), **more})


# --- The plan -------------------------------------------------------------------------------------------------------
def test_every_pair_prompt_and_question_gets_its_votes_from_different_raters(made: Path) -> None:
    study = load_study(made)
    assert study.pairs == tuple(itertools.combinations(MODELS, 2))
    asked = [(study.cell(trial), rater, trial) for rater, trial in trials_of(study) if trial.expected is None]
    votes = Counter(cell for cell, _, _ in asked)
    assert set(votes) == {(k, q, p) for k in range(3) for q in ("realism", "alignment") for p in range(7)}
    assert set(votes.values()) == {3}
    assert max(Counter((cell, rater) for cell, rater, _ in asked).values()) == 1
    # Sides: of three votes one or two have the first model on the left, and over all prompts nearly half.
    left = Counter(cell for cell, _, trial in asked if trial.left.model == study.pairs[cell[0]][0])
    assert all(left[cell] in (1, 2) for cell in votes)
    for k, question in itertools.product(range(3), ("realism", "alignment")):
        assert abs(sum(left[k, question, p] for p in range(7)) - 10.5) <= 1.5
    assert len({trial.id for _, trial in trials_of(study)}) == len(trials_of(study))
    # No two sheets ask the same: whom a rater agrees with changes from trial to trial.
    assert len({frozenset(cell for cell, rater, _ in asked if rater == r.id) for r in study.raters}) == len(study.raters) == 15
    # Each rater has an order of their own: checks are not in one place, questions are mixed.
    assert len({tuple(t.expected is not None for t in rater.trials) for rater in study.raters}) > 5
    assert all({t.question for t in rater.trials} == {"realism", "alignment"} for rater in study.raters)


def test_attention_checks_are_a_tenth_and_their_answer_is_known(made: Path) -> None:
    study = load_study(made)
    expected = Counter(trial.expected for _, trial in trials_of(study) if trial.expected)
    assert abs(expected["left"] - expected["right"]) <= len(study.raters)
    for rater in study.raters:
        checks = [trial for trial in rater.trials if trial.expected]
        assert len(checks) >= max(5, 0.1 * len(rater.trials))
        for trial in checks:
            right, wrong = (trial.left, trial.right) if trial.expected == "left" else (trial.right, trial.left)
            assert right.prompt == trial.prompt
            if trial.question == "realism":
                assert wrong.model is None
            else:
                assert wrong.model == right.model
                # "a red <cat> & dog" and "a red dog" share words, so neither is the wrong answer of the other.
                assert {right.prompt, wrong.prompt} not in ({0}, {0, 4})


def test_checks_are_a_tenth_of_long_sheets_and_may_come_of_one_model(folders: dict[str, Path], tmp_path: Path) -> None:
    study = make_study(folders, tmp_path / "s", StudyConfig(votes=1, trials_per_rater=1000, checks=0.2, checks_from="betamodel"))
    (rater,) = study.raters
    checks = [trial for trial in rater.trials if trial.expected]
    assert (len(rater.trials) - len(checks), len(checks)) == (42, 11)  # 11 of 53 is the first share not below a fifth
    assert {side.model for trial in checks for side in (trial.left, trial.right)} == {"betamodel", None}


def test_a_pair_of_two_sizes_is_shown_at_the_smaller_one(made: Path) -> None:
    study = load_study(made)
    assert {source.size for source in study.models["gammamodel"]} == {(32, 32)}
    for _, trial in trials_of(study):
        if trial.expected is None:
            assert trial.size == (16, 16)
        for side in (trial.left, trial.right):
            assert Image.open(made / "pictures" / f"{side.picture}.png").size == trial.size
    assert (32, 32) in {trial.size for _, trial in trials_of(study)}  # checks of gammamodel alone


def test_a_study_is_a_function_of_its_seed(folders: dict[str, Path], made: Path, tmp_path: Path) -> None:
    def written(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    config = load_study(made).config
    make_study(folders, tmp_path / "again", config)
    assert written(tmp_path / "again") == written(made)
    other = make_study(folders, tmp_path / "other", config.model_copy(update={"seed": 5}))
    assert other.id != load_study(made).id
    assert [t.prompt for _, t in trials_of(other)] != [t.prompt for _, t in trials_of(load_study(made))]


def test_the_table_has_every_trial(made: Path) -> None:
    study = load_study(made)
    with open(made / "sheets.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [trial.id for _, trial in trials_of(study)]
    assert rows[0]["prompt"] in PROMPTS
    assert Counter(row["kind"] for row in rows)["vote"] == 126


def test_make_refuses_what_cannot_be_compared(folders: dict[str, Path], tmp_path: Path) -> None:
    config, two = StudyConfig(), {name: folders[name] for name in MODELS[:2]}
    out = tmp_path / "out"
    with pytest.raises(UserError, match="1 model to compare .alphamodel., expected at least 2"):
        make_study({"alphamodel": folders["alphamodel"]}, out, config)
    with pytest.raises(UserError, match="6 pictures of few for 7 prompts"):
        make_study({**two, "few": pictures(tmp_path / "few", 9, count=6)}, out, config)
    with pytest.raises(UserError, match="24 x 16, but .* is 16 x 16, expected one shape"):
        make_study({**two, "wide": pictures(tmp_path / "wide", 9, size=(24, 16))}, out, config)
    with pytest.raises(UserError, match="the same pictures"):
        make_study({"a": folders["betamodel"], "b": folders["betamodel"]}, out, config, folders["alphamodel"] / "captions.txt")
    with pytest.raises(UserError, match="1 different prompt, expected at least 2"):
        make_study(two, out, StudyConfig(count=1))
    (tmp_path / "same.txt").write_text("a cat\n" * 7)
    with pytest.raises(UserError, match="1 different prompt"):
        make_study(two, out, config, tmp_path / "same.txt")
    with pytest.raises(UserError, match="captions.txt: cannot be read"):
        make_study({"betamodel": folders["betamodel"], "alphamodel": folders["alphamodel"]}, out, config)
    with pytest.raises(UserError, match="no model 'delta', expected two of"):
        make_study(two, out, StudyConfig(pairs=(("alphamodel", "delta"),)))
    with pytest.raises(UserError, match="none twice"):
        make_study(two, out, StudyConfig(pairs=(("alphamodel", "betamodel"), ("betamodel", "alphamodel"))))
    with pytest.raises(UserError, match="one model twice"):
        make_study(two, out, StudyConfig(pairs=(("alphamodel", "alphamodel"),)))
    with pytest.raises(UserError, match="checks_from is 'delta'"):
        make_study(two, out, StudyConfig(checks_from="delta"))
    with pytest.raises(UserError, match="questions realism, realism"):
        make_study(two, out, StudyConfig(questions=("realism", "realism")))
    assert not out.exists()


def test_make_never_writes_over_anything(folders: dict[str, Path], study_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        make_study(folders, study_folder, StudyConfig())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        make_study(folders, tmp_path / "file", StudyConfig())
    with pytest.raises(UserError, match="a file is in the way"):
        make_study(folders, tmp_path / "file" / "study", StudyConfig())
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot write here"):
            make_study(folders, tmp_path / "shut" / "study", StudyConfig())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_missing_or_damaged_study_is_one_clear_line(study_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="study.json: cannot be read .No such file"):
        load_study(tmp_path)
    path = study_folder / "study.json"
    path.write_text(path.read_text().replace('"choice"', "", 1).replace('"realism"', '"beauty"', 1))
    with pytest.raises(UserError, match=r"config.questions.0: Input should be 'realism' or 'alignment'"):
        load_study(study_folder)


# --- The page -------------------------------------------------------------------------------------------------------
def test_a_page_gives_no_model_away(made: Path, folders: dict[str, Path]) -> None:
    study = load_study(made)
    before = []
    for rater in study.raters:
        page = (made / "pages" / rater.page).read_text()
        shown = re.findall(r'<script type="text/plain" id="([0-9a-f]{16})">data:image/png;base64,(\S+)</script>', page)
        # Only what is needed: of every trial the same keys, whether check or vote.
        sheet = json.loads(re.search(r'id="sheet">(.*?)</script>', page)[1])  # type: ignore[index]
        assert {tuple(trial) for trial in sheet["trials"]} == {("id", "question", "prompt", "left", "right", "size")}
        assert [trial["id"] for trial in sheet["trials"]] == [trial.id for trial in rater.trials]
        assert all((trial["prompt"] is None) == ("realistic" in trial["question"]) for trial in sheet["trials"])
        text = re.sub(r"base64,\S+", "", page)
        for secret in (*MODELS, *(str(folder) for folder in folders.values()), *(path.stem for path in (made / "pictures").iterdir())):
            assert secret not in text
        assert not re.search(r"alpha|beta|gamma|expected|check", re.sub(r"(?s)<script>.*|<style>.*</style>", "", text))
        # Pictures stand in the order of meaningless ids, bare of what their files said.
        names = [name for name, _ in shown]
        assert names == sorted(set(names))
        contents = {name: base64.b64decode(data) for name, data in shown}
        assert all(b"tEXt" not in content for content in contents.values())
        models = {t["left"]: r.left.model for t, r in zip(sheet["trials"], rater.trials, strict=True)}
        models |= {t["right"]: r.right.model for t, r in zip(sheet["trials"], rater.trials, strict=True)}
        order = [models[name] for name in names]
        before += [i < j for i, a in enumerate(order) for j, b in enumerate(order) if a == "alphamodel" and b == "betamodel"]
    assert np.mean(before) == pytest.approx(0.5, abs=0.1)
    pages = [(made / "pages" / rater.page).read_text() for rater in study.raters]
    ids = [set(re.findall(r'id="([0-9a-f]{16})"', page)) for page in pages]
    assert not set.intersection(*ids)  # no id in two pages means the same


def test_a_page_loads_nothing_and_says_the_consent_text(folders: dict[str, Path], tmp_path: Path) -> None:
    make_study(folders, tmp_path / "s", StudyConfig(votes=1, count=2, jpeg_quality=90, consent="I <agree>\n& begin"))
    page = (tmp_path / "s" / "pages" / "rater-001.html").read_text()
    assert not re.search(r'(src|href)="', page)
    assert "default-src 'none'" in page
    assert "I \\u003cagree>\\n& begin" in page
    assert page.count("data:image/jpeg;base64,") > 4
    assert "@" not in re.sub(r"base64,\S+|@media", "", page)


# --- Votes ----------------------------------------------------------------------------------------------------------
def test_votes_are_read_from_lines_and_from_downloaded_files(study_folder: Path, tmp_path: Path) -> None:
    study = load_study(study_folder)
    first, second = study.raters[:2]
    write_votes(study_folder / "votes.jsonl", [vote_of(study, first.id, trial, seconds=1.5) for trial in first.trials])
    rows = [{"trial": trial.id, "choice": attentive(trial), "seconds": 0.75} for trial in second.trials]
    download = tmp_path / "votes.json"
    download.write_text(json.dumps({"format": "diffusion2gan-votes-1", "study": study.id, "rater": second.id, "votes": rows}))
    result = analyse_study(study_folder, tmp_path / "out", [download], draws=100)
    assert [(row["rater"], row["finished"]) for row in result["raters"]] == [(first.id, True), (second.id, True)]
    assert result["votes"] == {"asked": 126, "counted": sum(not t.expected for t in first.trials + second.trials)}
    named = analyse_study(study_folder, tmp_path / "out", [study_folder / "votes.jsonl", download], draws=100)
    assert named == result  # its own votes are not counted twice
    with pytest.raises(UserError, match=r"votes.json: vote 1: a second vote of rater"):
        analyse_study(study_folder, tmp_path / "out", [download, download])


def test_a_damaged_last_line_is_dropped_and_anything_else_is_an_error(study_folder: Path, tmp_path: Path) -> None:
    study = load_study(study_folder)
    rater = study.raters[0]
    path = study_folder / "votes.jsonl"
    write_votes(path, [vote_of(study, rater.id, trial) for trial in rater.trials])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for torn in (whole + lines[0][:25], whole + b"\x00\x00\xff"):
        path.write_bytes(torn)
        with pytest.warns(UserWarning, match=f"line {len(lines) + 1}, the last, is damaged"):
            assert analyse_study(study_folder, tmp_path / "out", draws=10)["raters"][0]["finished"]

    def refused(line: bytes, match: str) -> None:
        path.write_bytes(b"".join([*lines[:2], line, *lines[3:]]))
        with pytest.raises(UserError, match=match):
            analyse_study(study_folder, tmp_path / "out")

    refused(lines[2][:25] + b"\n", r"votes.jsonl: line 3: Invalid JSON")
    refused(b"\n", "line 3: ")
    refused(lines[1], f"line 3: a second vote of rater {rater.id} on trial")
    refused(lines[2].replace(b'"left"', b'"both"').replace(b'"right"', b'"both"'), "line 3: choice: Input should be 'left' or 'right'")
    refused(lines[2].replace(b'"choice"', b'"vote"'), "line 3: choice: Field required")
    refused(lines[2].replace(rater.id.encode(), b"0" * 16), "line 3: rater '0000000000000000' is none of this study")
    refused(lines[2].replace(study.id.encode(), b"f" * 16), f"line 3: study 'ffffffffffffffff', expected {study.id}")
    refused(lines[2].replace(b'"simulated":false', b'"simulated":true'), "line 3: a simulated vote among real ones")
    other = study.raters[1].trials[0].id.encode()
    refused(lines[2].replace(rater.trials[2].id.encode(), other), "line 3: trial .* is none of rater")
    path.unlink()
    with pytest.raises(UserError, match="no votes, expected votes.jsonl"):
        analyse_study(study_folder, tmp_path / "out")
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"format": "diffusion2gan-votes-1", "study": "x"')
    with pytest.raises(UserError, match="damaged.json: Invalid JSON"):
        analyse_study(study_folder, tmp_path / "out", [damaged])
    with pytest.raises(UserError, match="none.json: cannot be read"):
        analyse_study(study_folder, tmp_path / "out", [tmp_path / "none.json"])


# --- The analysis ---------------------------------------------------------------------------------------------------
def hand_made(folder: Path, folders: dict[str, Path], wins: dict[str, list[int]], votes: int) -> tuple[Study, list[Vote]]:
    """Votes of alphamodel against betamodel with so many `wins` of the first for each prompt of a question."""
    count = len(next(iter(wins.values())))
    two = {name: folders[name] for name in MODELS[:2]}
    study = make_study(two, folder, StudyConfig(votes=votes, count=count, trials_per_rater=6))
    given: Counter[tuple[str, int]] = Counter()
    made = []
    for rater, trial in trials_of(study):
        choice = None
        if trial.expected is None:
            won = given[trial.question, trial.prompt] < wins[trial.question][trial.prompt]
            given[trial.question, trial.prompt] += 1
            choice = "left" if won == (trial.left.model == "alphamodel") else "right"
        made.append(vote_of(study, rater, trial, choice))
    return study, made


def test_hand_made_votes_give_numbers_computed_by_hand(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wins = {"realism": [2, 2, 2, 2, 1, 0], "alignment": [2, 2, 2, 2, 2, 2]}
    _, votes = hand_made(tmp_path / "s", folders, wins, votes=2)
    write_votes(tmp_path / "s" / "votes.jsonl", votes)
    result = analyse_study(tmp_path / "s", tmp_path / "out")
    assert "Ethics approval" in capsys.readouterr().out
    realism, alignment = result["results"]
    assert (realism["wins"], realism["votes"], realism["value"]) == (9, 12, 0.75)
    assert realism["prompts"] == {"won": 4, "lost": 1, "tied": 1}
    assert realism["p"] == pytest.approx(2 * (1 + 5) / 32)  # 0.375: one loss or none of five, both sides
    assert alignment["p"] == pytest.approx(2 / 64)
    assert (alignment["p_holm"], realism["p_holm"]) == (pytest.approx(4 / 64), pytest.approx(0.375))
    assert realism["claim"] == alignment["claim"] == "no difference shown"
    # One unit of six disagrees: observed 2, expected 2 * 9 * 3 / 11.
    assert realism["krippendorff_alpha"] == pytest.approx(1 - 22 / 54)
    assert alignment["krippendorff_alpha"] is None
    assert realism["wilson95"] == pytest.approx([0.4677, 0.9111], abs=1e-4)
    # All 6^6 ways to draw prompts again.
    exact = np.quantile([np.mean(draw) / 2 for draw in itertools.product(wins["realism"], repeat=6)], [0.025, 0.975])
    assert realism["interval95"] == pytest.approx(list(exact))
    assert alignment["interval95"] == [1, 1]
    strengths = {(row["question"], row["model"]): row for row in result["strengths"]}
    assert strengths["realism", "alphamodel"]["strength"] == pytest.approx(np.log(3) / 2, abs=1e-3)  # odds 3 : 1, mean 0
    assert strengths["realism", "alphamodel"]["elo"] - 1000 == pytest.approx(1000 - strengths["realism", "betamodel"]["elo"])
    assert strengths["realism", "alphamodel"]["elo"] == pytest.approx(1003, abs=0.2)  # 9 - 3 games of half a point of K = 1
    assert json.loads((tmp_path / "out" / "human_2afc.json").read_text()) == json.loads(json.dumps(result))
    told = (tmp_path / "out" / "human_2afc.md").read_text()
    assert "| alphamodel over betamodel | realism | 12 | 75.0 % |" in told
    assert "imulated" not in told
    page = (tmp_path / "out" / "human_2afc.html").read_text()
    assert page.count("data:image/png;base64,") == 1


def test_inattentive_raters_are_rejected_by_their_checks_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    study, votes = hand_made(tmp_path / "s", folders, {"realism": [3] * 6, "alignment": [3] * 6}, votes=3)
    careless, slow, silent = study.raters[:3]
    trials = {trial.id: trial for _, trial in trials_of(study)}
    changed, wrong = [], Counter[str]()
    for vote in votes:
        check = trials[vote.trial].expected
        # Five checks each: four right are 80 % and stay, three are out.
        if check and wrong[vote.rater] < {careless.id: 2, slow.id: 1}.get(vote.rater, 0):
            wrong[vote.rater] += 1
            vote = vote.model_copy(update={"choice": "left" if check == "right" else "right"})
        if not (check and vote.rater == silent.id):
            changed.append(vote)
    rows = {row["rater"]: row for row in screen(study, changed)}
    assert (rows[careless.id]["share"], rows[careless.id]["kept"]) == (0.6, False)
    assert (rows[slow.id]["share"], rows[slow.id]["kept"]) == (0.8, True)
    assert (rows[silent.id]["share"], rows[silent.id]["kept"], rows[silent.id]["finished"]) == (None, False, False)
    write_votes(tmp_path / "s" / "votes.jsonl", changed)
    result = analyse_study(tmp_path / "s", tmp_path / "out", draws=100)
    assert result["votes"] == {"asked": 36, "counted": 36 - 12}
    assert "2 more rejected below 80 %" in (tmp_path / "out" / "human_2afc.md").read_text()
    write_votes(tmp_path / "s" / "votes.jsonl", [vote for vote in changed if vote.rater == careless.id])
    with pytest.raises(UserError, match="every rater is below 80 %"):
        analyse_study(tmp_path / "s", tmp_path / "out")


def test_simulated_votes_recover_strengths_and_are_labelled_everywhere(made: Path, study_folder: Path, tmp_path: Path) -> None:
    study = load_study(made)
    strengths = {"alphamodel": 2.0, "betamodel": 0.0, "gammamodel": -2.0}
    votes = simulate_votes(study, strengths, seed=3)
    assert votes == simulate_votes(study, strengths, seed=3) != simulate_votes(study, strengths, seed=4)
    assert all(vote.simulated for vote in votes)
    with pytest.raises(UserError, match="strengths of alphamodel, expected one each"):
        simulate_votes(study, {"alphamodel": 1.0}, seed=0)
    write_votes(study_folder / "votes.jsonl", votes)
    result = analyse_study(study_folder, tmp_path / "out", published={}, draws=300)
    assert result["simulated"] is True
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"human_2afc-simulated.{kind}" for kind in ("html", "json", "md")]
    for kind in ("html", "md"):
        assert "SIMULATED VOTES" in (tmp_path / "out" / f"human_2afc-simulated.{kind}").read_text()
    for question in ("realism", "alignment"):
        found = {row["model"]: row for row in result["strengths"] if row["question"] == question}
        assert [row["group"] for row in found.values()] == [1, 1, 1]
        assert found["alphamodel"]["interval95"][0] > found["gammamodel"]["interval95"][1]
        assert found["alphamodel"]["elo"] > found["betamodel"]["elo"] > found["gammamodel"]["elo"]
        for model, strength in strengths.items():
            low, high = found[model]["interval95"]
            assert low - 0.5 < strength < high + 0.5
    with pytest.raises(UserError, match="simulated votes, expected real ones"):
        StudyServer(study_folder)


def test_models_without_a_chain_of_comparisons_have_no_common_scale(folders: dict[str, Path], tmp_path: Path) -> None:
    models = {**folders, "delta": pictures(tmp_path / "delta", 8)}
    pairs = (("alphamodel", "betamodel"), ("gammamodel", "delta"))
    study = make_study(models, tmp_path / "s", StudyConfig(pairs=pairs, questions=("realism",), votes=2))
    write_votes(tmp_path / "s" / "votes.jsonl", simulate_votes(study, dict.fromkeys(models, 0.0), seed=0))
    result = analyse_study(tmp_path / "s", tmp_path / "out", draws=50)
    assert [(row["group"], row["model"]) for row in result["strengths"]] == [
        (1, "alphamodel"),
        (1, "betamodel"),
        (2, "gammamodel"),
        (2, "delta"),
    ]


def test_published_values_are_joined_as_copied(made: Path, study_folder: Path, tmp_path: Path) -> None:
    study = load_study(made)
    write_votes(study_folder / "votes.jsonl", simulate_votes(study, dict.fromkeys(MODELS, 0.0), seed=0))
    names = {"alphamodel": "SDXL-Turbo", "betamodel": "SDXL-Diffusion2GAN"}
    result = analyse_study(study_folder, tmp_path / "out", published=names, draws=50)
    joined = {(*entry["pair"], entry["question"]): entry["published"] for entry in result["results"]}
    assert joined["alphamodel", "betamodel", "realism"] == pytest.approx(1 - 0.548)  # the other way round than in Figure 6
    assert joined["alphamodel", "gammamodel", "realism"] is None
    told = html.unescape((tmp_path / "out" / "human_2afc-simulated.html").read_text())
    assert "published (copied)" in told
    assert "SDXL-Diffusion2GAN over SDXL-Lightning</td><td>50.7 %</td><td>62.9 %" in told
    assert result["published"]["source"].startswith("copied")
    assert analyse_study(study_folder, tmp_path / "out", draws=50)["published"] is None
    with pytest.raises(UserError, match="no 'SDXL-Tubro' in Figure 6, expected one of"):
        analyse_study(study_folder, tmp_path / "out", published={"alphamodel": "SDXL-Tubro"})
    with pytest.raises(UserError, match="no model 'delta' in the study"):
        analyse_study(study_folder, tmp_path / "out", published={"delta": "SDXL-Turbo"})


@pytest.mark.parametrize(("spread", "cluster_at_least", "wilson_at_most"), [(0.0, 0.93, 1.0), (1.5, 0.93, 0.9)])
def test_intervals_cover_the_true_win_rate(
    spread: float, cluster_at_least: float, wilson_at_most: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    """300 simulated studies of 80 prompts x 4 votes. When votes on a prompt depend on each other, Wilson's interval misses."""
    root, strength = tmp_path / "models", 0.4
    models = {name: pictures(root / name, i, count=80, size=(2, 2), captions=i == 0) for i, name in enumerate(("a", "b"))}
    study = make_study(models, tmp_path / "s", StudyConfig(questions=("realism",), votes=4, trials_per_rater=80))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    truth = float((weights / (1 + np.exp(-strength - spread * nodes))).sum() / weights.sum())
    covered = []
    for seed in range(300):
        ((wins, counts),) = tally(study, simulate_votes(study, {"a": strength, "b": 0.0}, seed, spread=spread)).values()
        intervals = (cluster_bootstrap(wins, counts, draws=500, seed=seed), wilson_interval(int(wins.sum()), int(counts.sum())))
        covered.append([low <= truth <= high for low, high in intervals])
    cluster, wilson = np.mean(covered, axis=0)
    assert cluster >= cluster_at_least
    assert wilson <= wilson_at_most


# --- The server -----------------------------------------------------------------------------------------------------
@contextmanager
def served(server: StudyServer) -> Iterator[StudyServer]:
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def request(server: StudyServer, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, bytes, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}})
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.getheader("Location")
    connection.close()
    return found


def post(server: StudyServer, vote: Vote) -> int:
    return request(server, "POST", "/vote", vote.model_dump_json(exclude={"received", "simulated"}))[0]


def test_the_server_hands_out_sheets_keeps_votes_and_goes_on_after_a_restart(study_folder: Path, tmp_path: Path) -> None:
    study = load_study(study_folder)
    first, second = study.raters[:2]
    path = study_folder / "votes.jsonl"
    with served(StudyServer(study_folder)) as server:
        status, _, location = request(server, "GET", "/")
        assert (status, location) == (303, f"/sheet/{first.id}")
        assert request(server, "GET", "/")[2] == f"/sheet/{second.id}"
        status, page, _ = request(server, "GET", f"/sheet/{first.id}")
        assert status == 200
        assert b'id="sink">{"url": "/vote", "done": []}</script>' in page
        assert post(server, vote_of(study, first.id, first.trials[0], seconds=2.5)) == 200
        assert post(server, vote_of(study, first.id, first.trials[0], "right")) == 409
        with pytest.raises(UserError, match="another process serves this study"):
            StudyServer(study_folder)
    (kept,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (kept["choice"], kept["seconds"], kept["simulated"]) == (attentive(first.trials[0]), 2.5, False)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", kept["received"])
    # The machine stopped in the middle of a line.
    with open(path, "ab") as file:
        file.write(b'{"study": "')
    with pytest.warns(UserWarning, match="line 2, the last, is damaged"):
        again = StudyServer(study_folder)
    with served(again) as server:
        page = request(server, "GET", f"/sheet/{first.id}")[1]
        assert f'"done": ["{first.trials[0].id}"]'.encode() in page
        assert post(server, vote_of(study, first.id, first.trials[0])) == 409
        assert [post(server, vote_of(study, first.id, trial)) for trial in first.trials[1:]] == [200] * (len(first.trials) - 1)
        # The second sheet was given out before the restart, so the third is next.
        assert request(server, "GET", "/")[2] == f"/sheet/{study.raters[2].id}"
    result = analyse_study(study_folder, tmp_path / "out", draws=50)
    assert [(row["rater"], row["finished"], row["kept"]) for row in result["raters"]] == [(first.id, True, True)]


def test_a_last_line_without_its_end_is_ended(study_folder: Path) -> None:
    study = load_study(study_folder)
    rater = study.raters[0]
    path = study_folder / "votes.jsonl"
    write_votes(path, [vote_of(study, rater.id, rater.trials[0])])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with served(StudyServer(study_folder)) as server:
        assert post(server, vote_of(study, rater.id, rater.trials[1])) == 200
    ballot = Ballot(study)
    ballot.add_file(path)
    assert len(ballot.votes) == 2


def test_the_server_refuses_what_is_no_vote(study_folder: Path) -> None:
    study = load_study(study_folder)
    rater, other = study.raters[:2]
    good = {"study": study.id, "rater": rater.id, "trial": rater.trials[0].id, "choice": "left"}

    with served(StudyServer(study_folder)) as server:

        def status(body: Any, path: str = "/vote", **headers: str) -> int:
            return request(server, "POST", path, body if isinstance(body, bytes) else json.dumps(body), **headers)[0]

        assert status(b"x" * 5000) == 413
        assert status(b"x" * 500_000) == 413
        assert status(b"{}", Content_Length="1e3") == 411
        for wrong in (b"", b"{", b"null", b"[]", b"[" * 4000, b"\xff\xfe", b'"left"', b'{"choice": NaN}'):
            assert status(wrong) == 400
        changes = (
            {"choice": "both"},
            {"choice": 1},
            {"seconds": -1},
            {"seconds": "1"},
            {"extra": 1},
            {"simulated": True},
            {"received": "now"},
        )
        for change in changes:
            assert status(good | change) == 400
        assert status({key: value for key, value in good.items() if key != "choice"}) == 400
        unknown = ({"study": "other"}, {"rater": "nobody"}, {"rater": "../../study.json"}, {"trial": "none"}, {"trial": other.trials[0].id})
        for change in unknown:
            assert status(good | change) == 404
        assert status(good, path="/votes") == 404
        assert status(good, Content_Type="text/plain") == 415
        secrets = ("study.json", "sheets.csv", "votes.jsonl")
        climbs = (
            "/sheet/../study.json",
            "/sheet/..%2fstudy.json",
            "/../study.json",
            "//etc/passwd",
            "/sheet/",
            "/pages/rater-001.html",
        )
        for path in (*climbs, *(f"/{name}" for name in secrets), "/sheet/" + "0" * 16, "/sheet/" + rater.id + "/../../study.json"):
            code, body, _ = request(server, "GET", path)
            assert (code, b"alphamodel" in body) == (404, False)
        # Whoever recruits people adds a query of their own.
        code, body, _ = request(server, "GET", "/?participant=17")
        assert (code, b"alphamodel" in body) == (303, False)
        assert request(server, "PUT", "/vote", b"{}")[0] == 501
        assert (study_folder / "votes.jsonl").read_bytes() == b""
        assert status(good) == 200


def test_of_votes_that_come_together_one_counts(study_folder: Path) -> None:
    study = load_study(study_folder)
    rater = study.raters[0]
    with served(StudyServer(study_folder)) as server:
        results: list[int] = []
        threads = [
            threading.Thread(target=lambda trial=trial: results.append(post(server, vote_of(study, rater.id, trial))))
            for trial in rater.trials[:4]
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert Counter(results) == {200: 4, 409: 12}
    assert len((study_folder / "votes.jsonl").read_text().splitlines()) == 4


def test_when_all_sheets_are_out_only_one_never_begun_is_given_again(study_folder: Path) -> None:
    study = load_study(study_folder)
    with served(StudyServer(study_folder)) as server:
        given = [request(server, "GET", "/")[2] for _ in study.raters]
        assert given == [f"/sheet/{rater.id}" for rater in study.raters]
        assert request(server, "GET", "/")[0] == 503
    # An hour later: the first rater has voted, the second never came back.
    path = study_folder / "handed_out.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"time": row["time"] - 3600}) + "\n" for row in rows[:2]) + '{"rater": "torn')
    write_votes(study_folder / "votes.jsonl", [vote_of(study, study.raters[0].id, study.raters[0].trials[0])])
    box = VoteBox(study_folder)
    handed = [box.hand_out() for _ in range(len(study.raters))]
    box.close()
    assert [rater.id for rater in handed[:-1] if rater] == [rater.id for rater in (*study.raters[2:], study.raters[1])]
    assert handed[-1] is None


def test_a_sheet_that_went_to_somebody_else_takes_no_vote_of_the_first(study_folder: Path) -> None:
    study = load_study(study_folder)
    first, second, *_ = study.raters
    now = time.time()
    rows = [{"rater": rater.id, "time": now - (3600 if rater is first else 0)} for rater in study.raters]
    (study_folder / "handed_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served(StudyServer(study_folder)) as server:
        vote = vote_of(study, first.id, first.trials[0]).model_dump_json(exclude={"received", "simulated"})
        again = f"/sheet/{first.id}?turn=2"
        assert request(server, "GET", "/")[:3:2] == (303, again)
        # The page that was opened an hour ago, and the same address now.
        assert request(server, "POST", "/vote", vote)[0] == 410
        assert request(server, "GET", f"/sheet/{first.id}")[0] == 410
        status, page, _ = request(server, "GET", again)
        assert status == 200 and b'id="sink">{"url": "/vote?turn=2", "done": []}</script>' in page
        assert request(server, "POST", "/vote?turn=2", vote)[0] == 200
        # One that was never handed out twice is as it was.
        assert post(server, vote_of(study, second.id, second.trials[0])) == 200
    with served(StudyServer(study_folder)) as server:
        assert request(server, "GET", again)[0] == 200


def test_an_address_that_others_can_reach_is_warned_of_and_a_used_port_is_refused(study_folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"0.0.0.0 can be reached from other machines"):
        StudyServer(study_folder, "0.0.0.0").server_close()
    with served(StudyServer(study_folder)) as server, pytest.raises(UserError, match="cannot be used .*Address already in use"):
        StudyServer(shutil.copytree(study_folder, tmp_path / "copy"), port=server.server_port)
    with pytest.raises(UserError, match="port 70000: cannot be used"):
        StudyServer(study_folder, port=70000)


def test_serving_says_where_and_lets_go_of_the_study_when_interrupted(study_folder: Path) -> None:
    told = []

    def interrupted(text: str) -> None:
        told.append(text)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            serve_study(study_folder, port=0, say=interrupted)
    assert re.fullmatch(r"http://127.0.0.1:\d+/ gives out the sheets of .*, 0 votes of 201 are there; Ctrl-C stops", told[1])
    page = study_folder / "pages" / "rater-002.html"
    page.unlink()
    with pytest.raises(UserError, match="rater-002.html: no such file"):
        serve_study(study_folder, port=0)


# --- In a browser ---------------------------------------------------------------------------------------------------
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
KEYS = {"left": "1", "right": "2", "arrow left": "\ue012", "arrow right": "\ue014"}


class Browser:
    """A headless Chromium, driven over the WebDriver protocol."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        self._driver = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._driver.stdout is not None
        port = next(match[1] for line in self._driver.stdout if (match := re.search(r"successfully on port (\d+)", line)))
        self._url = f"http://127.0.0.1:{port}/session"
        arguments = [*FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "--window-size=1280,800"]
        options = {"binary": CHROMIUM, "args": arguments, "prefs": {"download.default_directory": str(folder)}}
        self._url += "/" + self.call("POST", "", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})["sessionId"]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        # No proxy: the driver is on this machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def wait(self, script: str) -> Any:
        limit = time.monotonic() + 30
        while not (found := self.run(f"return {script}")):
            assert time.monotonic() < limit, f"never true: {script}"
            time.sleep(0.02)
        return found

    def press(self, key: str) -> None:
        actions = [{"type": kind, "value": KEYS[key]} for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def click(self, selector: str) -> None:
        element = next(iter(self.call("POST", "/element", {"using": "css selector", "value": selector}).values()))
        self.call("POST", f"/element/{element}/click", {})

    def close(self) -> None:
        self.call("DELETE", "")
        self._driver.terminate()
        self._driver.wait()
        assert self._driver.stdout is not None
        self._driver.stdout.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium with its chromedriver; install both to drive the page for real")
    started = Browser(tmp_path_factory.mktemp("browser") / "files")
    yield started
    started.close()


@pytest.fixture(scope="module")
def small(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rater, 9 trials."""
    folder = tmp_path_factory.mktemp("small") / "study"
    make_study({name: folders[name] for name in MODELS[:2]}, folder, StudyConfig(votes=1, count=2))
    return folder


def vote_through(browser: Browser, study: Study, first: int, stop: int) -> None:
    """Answers trials `first` to `stop` - 1 as they come, by keys and by clicks, and looks at what is shown."""
    (rater,) = study.raters
    for i in range(first, stop):
        trial = rater.trials[i]
        assert browser.wait("!locked && current && current.id") == trial.id
        sizes = browser.run("return [...document.images].map((i) => [i.naturalWidth, i.getBoundingClientRect().width])")
        # Alike, and enlarged by a whole factor as far as the window lets them.
        assert sizes[0] == sizes[1] == [16, sizes[0][1] // 16 * 16]
        assert 320 <= sizes[0][1] <= 448
        text = browser.run("return find('trial').innerText")
        assert ("realistic" in text) == (trial.question == "realism")
        assert (study.prompts[trial.prompt] in text) == (trial.question == "alignment")
        choice = attentive(trial)
        (browser.press, browser.press, lambda key: browser.click(f"#{key}"))[i % 3](f"arrow {choice}" if i % 3 == 1 else choice)
        browser.wait(f"find('count').textContent === '{i + 1} of {len(rater.trials)}'")


def test_a_rater_fills_an_offline_page_and_hands_in_the_file(small: Path, browser: Browser) -> None:
    study = load_study(small)
    (rater,) = study.raters
    url = (small / "pages" / rater.page).as_uri()
    browser.open(url)
    assert "[Consent text of this study" in browser.run("return document.body.innerText")
    assert browser.run("return find('begin').textContent") == "I agree, begin"
    browser.press("left")  # nothing to answer yet
    browser.click("#begin")
    vote_through(browser, study, 0, 4)
    # A reload goes on where it was.
    browser.open(url)
    assert browser.wait("find('begin').textContent") == "Go on"
    browser.click("#begin")
    vote_through(browser, study, 4, len(rater.trials))
    browser.wait("!find('end').hidden")
    browser.press("left")
    text = browser.run("return find('votes').value")
    browser.click("#copy")
    browser.wait("find('copied').textContent === 'Copied.'")
    browser.click("#download")
    path = browser.folder / f"votes-{rater.id}.json"
    limit = time.monotonic() + 30
    while not path.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert path.read_text() == text
    ballot = Ballot(study)
    ballot.add_file(path)
    assert [(vote.trial, vote.choice) for vote in ballot.votes] == [(trial.id, attentive(trial)) for trial in rater.trials]
    assert all(vote.seconds is not None and vote.seconds >= 0.2 for vote in ballot.votes)


def test_a_rater_fills_a_served_page_across_a_restart(small: Path, browser: Browser, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "study")
    study = load_study(folder)
    (rater,) = study.raters
    with served(StudyServer(folder)) as server:
        port = server.server_port
        browser.open(server.url)
        browser.click("#begin")
        vote_through(browser, study, 0, 3)
    # The server is away: the choice waits in the page, and the page says so.
    browser.wait("!locked")
    browser.press(attentive(rater.trials[3]))
    assert "not saved yet" in browser.wait("find('trouble').textContent")
    with served(StudyServer(folder, port=port)) as server:
        browser.wait("find('count').textContent === '4 of 9'")
        assert browser.run("return find('trouble').hidden")
        vote_through(browser, study, 4, 6)
        # In another browser, which remembers nothing, the server's own record counts.
        browser.run("localStorage.clear()")
        browser.open(f"{server.url}sheet/{rater.id}")
        browser.click("#begin")
        vote_through(browser, study, 6, len(rater.trials))
        assert "All your choices are saved" in browser.wait("!find('end').hidden && document.body.innerText")
    ballot = Ballot(study)
    ballot.add_file(folder / "votes.jsonl")
    assert [(vote.trial, vote.choice) for vote in ballot.votes] == [(trial.id, attentive(trial)) for trial in rater.trials]
