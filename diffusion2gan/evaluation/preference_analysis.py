"""Counts the votes of a study: win rates with intervals, tests and agreement (Figure 6), strengths of several models, a report.

P prompts, M models. The unit that is drawn again is the prompt with all its votes: votes on one prompt depend on each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.evaluate import versions
from diffusion2gan.evaluation.preference import QUESTIONS, REMINDER, Ballot, Question, Study, Vote, load_study, tally
from diffusion2gan.evaluation.statistics import bradley_terry, cluster_bootstrap, elo, holm, krippendorff_alpha, sign_test, wilson_interval
from diffusion2gan.files import write_bytes_atomic, write_json
from diffusion2gan.report import Page, as_image, markdown_table, new_figure

PROTOCOL = "human_2afc"
LEAST_ATTENTION = 0.8
STRENGTH_DRAWS = 1000

# Figure 6: share of votes for the first, in %, read off the bars of the project page (+-0.3).
PUBLISHED = (
    ("SD1.5-Diffusion2GAN", "InstaFlow-0.9B", {"realism": 87.0, "alignment": 79.0}),
    ("SD1.5-Diffusion2GAN", "SD1.5 (50 steps)", {"realism": 46.8, "alignment": 47.8}),
    ("SDXL-Diffusion2GAN", "SDXL-Turbo", {"realism": 54.8, "alignment": 51.7}),
    ("SDXL-Diffusion2GAN", "SDXL-Lightning", {"realism": 50.7, "alignment": 62.9}),
    ("SDXL-Diffusion2GAN", "SDXL (50 steps)", {"realism": 41.6, "alignment": 45.7}),
)
PUBLISHED_SOURCE = "copied: read off the bars of Figure 6 on the project page, +-0.3 percentage points; published without intervals"


def analyse_study(
    folder: Path,
    out: Path,
    votes: Sequence[Path] = (),
    published: Mapping[str, str] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Counts STUDY/votes.jsonl, where there is one, and the files `votes` together; returns what OUT/human_2afc.json says, and
    writes it with a Markdown and an HTML report. Prints the reminder of what is not in the code.

    `published`: also the values of Figure 6; it maps models of the study to their names there (an empty one joins nothing). Of
    simulated votes every output says so, and the files are named human_2afc-simulated. Raises UserError for files that are
    damaged or of another study, real and simulated votes together, no votes, and names that are not in Figure 6.
    """
    study = load_study(folder)
    joined = _published(study, published)
    ballot = Ballot(study)
    own = folder / "votes.jsonl"
    if own.exists():
        ballot.add_file(own)
    for path in votes:
        if path.resolve() != own.resolve():
            ballot.add_file(path)
    if not ballot.votes:
        raise UserError(f"{folder}: no votes, expected {own.name} in it or files of votes; collect some first")
    raters = screen(study, ballot.votes)
    kept = {row["rater"] for row in raters if row["kept"]}
    if not kept:
        raise UserError(
            f"{folder}: every rater is below {LEAST_ATTENTION * 100:.0f} % of the attention checks, expected some above; no vote counts"
        )
    counted = [vote for vote in ballot.votes if vote.rater in kept]
    entries = _win_rates(study, counted, draws, seed)
    for entry in entries:
        entry["published"] = joined.get((*entry["pair"], entry["question"]))
    simulated = ballot.votes[0].simulated
    cells = len(study.pairs) * len(study.prompts) * len(study.config.questions)
    result = {
        "format": "diffusion2gan-result-1",
        "protocol": PROTOCOL,
        "title": ("SIMULATED VOTES, nobody was asked: " if simulated else "") + "Human preference, two pictures side by side",
        "simulated": simulated,
        "study": {"id": study.id, "seed": study.config.seed, "prompts": len(study.prompts), "prompts_sha256": study.prompts_sha256},
        "questions": {question: QUESTIONS[question] for question in study.config.questions},
        "votes": {"asked": cells * study.config.votes, "counted": sum(entry["votes"] for entry in entries)},
        "raters": raters,
        "draws": draws,
        "seed": seed,
        "results": entries,
        "strengths": _strengths(study, counted, min(draws, STRENGTH_DRAWS), seed),
        "published": None if published is None else {"source": PUBLISHED_SOURCE, "rows": [[a, b, dict(v)] for a, b, v in PUBLISHED]},
        "versions": versions(),
        "notes": [REMINDER],
    }
    name = PROTOCOL + ("-simulated" if simulated else "")
    write_json(out / f"{name}.json", result)
    _Report(result).write(out / f"{name}.md", out / f"{name}.html")
    print(REMINDER)
    return result


def _published(study: Study, names: Mapping[str, str] | None) -> dict[tuple[str, str, str], float]:
    """(a, b, question) of the study -> the published share of a."""
    known = {(a, b): values for a, b, values in PUBLISHED}
    known |= {(b, a): {question: 100 - value for question, value in values.items()} for a, b, values in PUBLISHED}
    for ours, theirs in (names or {}).items():
        if ours not in study.models:
            raise UserError(f"published: no model {ours!r} in the study, expected one of {', '.join(study.models)}")
        if not any(theirs in pair for pair in known):
            raise UserError(f"published: no {theirs!r} in Figure 6, expected one of {', '.join(sorted({a for a, _ in known}))}")
    found = {}
    for a, b in study.pairs:
        values = known.get(((names or {}).get(a, ""), (names or {}).get(b, "")), {})
        found.update({(a, b, question): round(value / 100, 4) for question, value in values.items()})
    return found


def screen(study: Study, votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Attention of each rater who voted, by their checks alone: below 80 % right, or without an answered check, none of their
    votes counts."""
    sheets = study.sheets()
    rows = []
    for rater in study.raters:
        answers = [(sheets[rater.id][vote.trial].expected, vote.choice) for vote in votes if vote.rater == rater.id]
        checks = [expected == choice for expected, choice in answers if expected is not None]
        if answers:
            share = sum(checks) / len(checks) if checks else None
            kept = share is not None and share >= LEAST_ATTENTION
            facts = {"votes": len(answers) - len(checks), "checks": len(checks), "right": sum(checks), "share": share, "kept": kept}
            rows.append({"rater": rater.id, "page": rater.page, **facts, "finished": len(answers) == len(rater.trials)})
    return rows


def _win_rates(study: Study, votes: Sequence[Vote], draws: int, seed: int) -> list[dict[str, Any]]:
    sheets = study.sheets()
    entries: list[dict[str, Any]] = []
    for (k, question), (wins, counts) in tally(study, votes).items():
        wins, counts = wins[counts > 0], counts[counts > 0]
        if not len(counts):
            continue
        a, b = study.pairs[k]
        won, lost = int((2 * wins > counts).sum()), int((2 * wins < counts).sum())
        shown = [(sheets[v.rater][v.trial], v.choice) for v in votes]
        left = [choice == "left" for trial, choice in shown if trial.expected is None and study.cell(trial)[:2] == (k, question)]
        entries.append(
            {
                "metric": "win rate",
                "variant": f"{a} over {b}, {question}",
                "pair": [a, b],
                "question": question,
                "votes": int(counts.sum()),
                "wins": int(wins.sum()),
                "value": float(wins.sum() / counts.sum()),
                "interval95": list(cluster_bootstrap(wins, counts, draws, seed)),
                "interval": "bootstrap over prompts",
                "wilson95": list(wilson_interval(int(wins.sum()), int(counts.sum()))),
                "prompts": {"won": won, "lost": lost, "tied": len(counts) - won - lost},
                "p": sign_test(won, lost),
                "krippendorff_alpha": krippendorff_alpha([[1] * w + [0] * (n - w) for w, n in zip(wins, counts, strict=True)]),
                "left_share": float(np.mean(left)),
            }
        )
    for entry, p in zip(entries, holm([entry["p"] for entry in entries]), strict=True):
        a, b = entry["pair"]
        entry["p_holm"] = p
        entry["claim"] = (
            "no difference shown" if p >= 0.05 else f"{a if entry['prompts']['won'] > entry['prompts']['lost'] else b} preferred"
        )
    return entries


# --- Several models -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Group:
    """Models that comparisons connect: only among them is one scale. `wins` (P, M, M): how often row beat column."""

    models: tuple[str, ...]
    wins: np.ndarray


def _groups(study: Study, votes: Sequence[Vote], question: Question) -> list[_Group]:
    counts = {k: pair for (k, asked), pair in tally(study, votes).items() if asked == question and pair[1].any()}
    groups: list[set[str]] = []
    for k in counts:
        touched = [g for g in groups if g & set(study.pairs[k])]
        groups = [g for g in groups if g not in touched] + [set(study.pairs[k]).union(*touched)]
    found = []
    for members in groups:
        models = tuple(name for name in study.models if name in members)
        wins = np.zeros((len(study.prompts), len(models), len(models)))
        for k, (won, total) in counts.items():
            if study.pairs[k][0] in members:
                a, b = (models.index(name) for name in study.pairs[k])
                wins[:, a, b], wins[:, b, a] = won, total - won
        found.append(_Group(models, wins))
    return found


def _strengths(study: Study, votes: Sequence[Vote], draws: int, seed: int) -> list[dict[str, Any]]:
    """Bradley-Terry log-strengths, mean 0 in each group of connected models, with a bootstrap over prompts; Elo as ADD has it."""
    rows = []
    for question in study.config.questions:
        for number, group in enumerate(_groups(study, votes, question), 1):
            p, m = group.wins.shape[:2]
            redrawn = np.random.Generator(np.random.Philox(key=seed)).multinomial(p, np.full(p, 1 / p), size=draws)
            samples = np.array([bradley_terry(w) for w in (redrawn @ group.wins.reshape(p, -1)).reshape(-1, m, m)])
            low, high = np.quantile(samples, [0.025, 0.975], axis=0)
            total = group.wins.sum(0).astype(int)
            games = [(a, b, 1.0) for a in range(m) for b in range(m) for _ in range(total[a, b])]
            for i, (strength, rating) in enumerate(zip(bradley_terry(total), elo(games, m, seed=seed), strict=True)):
                facts = {"strength": float(strength), "interval95": [float(low[i]), float(high[i])], "draws": draws, "elo": float(rating)}
                rows.append({"question": question, "group": number, "model": group.models[i], **facts})
    return rows


# --- Report ---------------------------------------------------------------------------------------------------------
class _Report:
    """The same parts as Markdown and as a page."""

    def __init__(self, result: dict[str, Any]):
        self._result = result

    def write(self, markdown: Path, html: Path) -> None:
        result = self._result
        page, lines = Page(result["title"], self._summary()), [f"# {result['title']}", self._summary()]
        for note in result["notes"]:
            page.text(note)
            lines.append(note)
        page.picture(bars(result), "Share of votes, 95 % bootstrap intervals over prompts; the dashed line is no preference.")
        for heading, text, columns, rows in self._parts():
            page.heading(heading)
            page.text(text)
            page.table(columns, rows)
            lines += [f"## {heading}", text, markdown_table(columns, rows).rstrip()]
        page.write(html)
        write_bytes_atomic(markdown, ("\n\n".join(lines) + "\n").encode())

    def _summary(self) -> str:
        result = self._result
        kept = sum(row["kept"] for row in result["raters"])
        return (
            f"{'Simulated votes of raters that do not exist. ' if result['simulated'] else ''}Study {result['study']['id']}: "
            f"{result['votes']['counted']} votes counted of {result['votes']['asked']} asked, {result['study']['prompts']} prompts, {kept} raters; "
            f"{len(result['raters']) - kept} more rejected below {LEAST_ATTENTION * 100:.0f} % of the attention checks, before any result was looked at."
        )

    def _parts(self) -> list[tuple[str, str, list[str], list[list[Any]]]]:
        result = self._result
        asked = " ".join(f"{question.capitalize()}: \u201c{text}\u201d" for question, text in result["questions"].items())
        entries = result["results"]
        columns = ["pair", "question", "votes", "first preferred", "95 %", "claim"]
        rows = [
            [" over ".join(e["pair"]), e["question"], e["votes"], percent(e["value"]), _span(e["interval95"]), e["claim"]] for e in entries
        ]
        if any(entry["published"] is not None for entry in entries):
            columns.append("published (copied)")
            for row, entry in zip(rows, entries, strict=True):
                row.append(None if entry["published"] is None else percent(entry["published"]))
        tests = [
            [
                " over ".join(e["pair"]),
                e["question"],
                _span(e["wilson95"]),
                "{won} : {lost} : {tied}".format(**e["prompts"]),
                e["p"],
                e["p_holm"],
                None if e["krippendorff_alpha"] is None else f"{e['krippendorff_alpha']:.2f}",
                percent(e["left_share"]),
            ]
            for e in entries
        ]
        parts = [
            (
                "Win rates",
                f"{asked} Intervals: {result['draws']} bootstrap draws over prompts. A preference is claimed where p (Holm, below) is under 0.05.",
                columns,
                rows,
            ),
            (
                "Tests and agreement",
                "p: two-sided sign test of the prompts' majorities, ties dropped; Holm over all rows. alpha: Krippendorff's agreement of "
                "raters, 1 full, 0 chance. left: share of votes for the left picture. Wilson's interval takes all votes as independent and "
                "is for reference only.",
                ["pair", "question", "Wilson", "won : lost : tied", "p", "p (Holm)", "alpha", "left"],
                tests,
            ),
            (
                "Strengths",
                "Bradley-Terry log-strengths, mean 0 in each group of models that comparisons connect (groups have no common scale), with a "
                "bootstrap over prompts. Elo (start 1000, K = 1, mean of shuffled orders) is for comparison with ADD only.",
                ["question", "group", "model", "log-strength", "95 %", "Elo"],
                [
                    [r["question"], r["group"], r["model"], r["strength"], "{:.2f} to {:.2f}".format(*r["interval95"]), f"{r['elo']:.0f}"]
                    for r in result["strengths"]
                ],
            ),
            (
                "Raters",
                "Attention checks have a known answer: a picture of the study against noise, or against the picture of another prompt.",
                ["page", "rater", "votes", "checks right", "share", "finished", "counted"],
                [
                    [
                        row["page"],
                        row["rater"],
                        row["votes"],
                        f"{row['right']} of {row['checks']}",
                        None if row["share"] is None else percent(row["share"]),
                        "yes" if row["finished"] else "no",
                        "yes" if row["kept"] else "no",
                    ]
                    for row in result["raters"]
                ],
            ),
        ]
        if result["published"]:
            copied = [
                [f"{a} over {b}", *(percent(values[question] / 100) for question in QUESTIONS)]
                for a, b, values in result["published"]["rows"]
            ]
            parts.insert(2, ("Published", f"Not measured here; {result['published']['source']}.", ["pair", *QUESTIONS], copied))
        return parts


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _span(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def bars(result: Mapping[str, Any]) -> Image.Image:
    """Win rates as bars, a panel for each question, with intervals and, where joined, the published values."""
    questions = list(result["questions"])
    pairs = list(dict.fromkeys(tuple(entry["pair"]) for entry in result["results"]))
    figure = new_figure(4.6 * len(questions) + 2, 1.3 + 0.55 * len(pairs), 110)
    if result["simulated"]:
        figure.suptitle("SIMULATED VOTES", color="#b3261e", fontweight="bold")
    for axes, question in zip(figure.subplots(1, len(questions), sharey=True, squeeze=False)[0], questions, strict=True):
        of = {tuple(entry["pair"]): entry for entry in result["results"] if entry["question"] == question}
        rows = [pair for pair in pairs if pair in of]
        places, values = [pairs.index(pair) for pair in rows], np.array([of[pair]["value"] for pair in rows])
        low, high = np.array([of[pair]["interval95"] for pair in rows]).reshape(-1, 2).T
        axes.barh(places, 100 * values, height=0.6, color="#2f6fde")
        axes.barh(places, 100 * (1 - values), left=100 * values, height=0.6, color="#d7dce3")
        # A percentile interval need not hold the value itself.
        axes.errorbar(
            100 * values,
            places,
            xerr=100 * np.maximum([values - low, high - values], 0),
            fmt="none",
            ecolor="#1d2430",
            capsize=4,
            linewidth=1.3,
        )
        told = [(100 * of[pair]["published"], pairs.index(pair)) for pair in rows if of[pair]["published"] is not None]
        if told:
            axes.plot(
                *zip(*told, strict=True), "D", markerfacecolor="white", markeredgecolor="#b3261e", markersize=6, label="published (copied)"
            )
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25))
        axes.axvline(50, color="#1d2430", linestyle="--", linewidth=1)
        axes.set_xlim(0, 100)
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.set_yticks(range(len(pairs)), [f"{a}\nover {b}" for a, b in pairs])
        axes.set_xlabel(f"{question}: votes for the first, %")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return as_image(figure)
