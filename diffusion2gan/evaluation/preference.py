"""A study of human preference (Figure 6, by LADD's procedure): two pictures side by side, one question, left or right.

    STUDY/study.json        every trial with its key (which side is which model), seed and digests: never for raters
    STUDY/sheets.csv        the same as a table
    STUDY/pages/            one page a rater; all that a rater may see
    STUDY/pictures/         every picture as it is shown, named by its sha256
    STUDY/votes.jsonl       votes, one a line, as preference_server appends them

`make_study` (preference_make) makes the folder, `serve_study` (preference_server) collects votes, `analyse_study`
(preference_analysis) counts them. P prompts, V votes of each (pair, prompt, question).
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from diffusion2gan.config import Section
from diffusion2gan.errors import UserError
from diffusion2gan.files import write_bytes_atomic

REMINDER = (
    "Ethics approval, consent, fair payment and a look at every picture for harmful content are outside this program: "
    "see to them before people vote."
)
# Realism: the paper does not give its wording. Alignment: as the same group asks it in the report of Stable Diffusion 3.
QUESTIONS = {
    "realism": "Which image looks more realistic?",
    "alignment": "Which image looks more representative to the text shown above and faithfully follows it?",
}

Question = Literal["realism", "alignment"]
Choice = Literal["left", "right"]
Cell = tuple[int, Question, int]
"""(number of the pair, question, prompt): what gets V votes."""


# --- The study ------------------------------------------------------------------------------------------------------
class StudyConfig(Section):
    """What is asked, and of how many."""

    pairs: tuple[tuple[str, str], ...] | None = None
    """Models to compare; the win rate is that of the first. Default: every pair."""
    votes: int = Field(5, ge=1)
    """V: raters of each (pair, prompt, question)."""
    questions: tuple[Question, ...] = Field(("realism", "alignment"), min_length=1)
    trials_per_rater: int = Field(64, ge=1)
    """Votes asked of one rater at most, attention checks not counted."""
    checks: float = Field(0.1, ge=0.1, le=0.5)
    """Least share of attention checks in a sheet."""
    checks_from: str | None = None
    """Model whose pictures are the right answers of attention checks. Default: all in turn; name the best one where another may
    miss its prompt so often that an attentive rater would fail."""
    count: int | None = Field(None, ge=1)
    """Only the first so many prompts."""
    jpeg_quality: int | None = Field(None, ge=1, le=100)
    """Smaller pages by lossy pictures, all alike. Default: PNG, no pixel changes."""
    consent: str | None = None
    """Text that a rater agrees to before the first trial. Default: a placeholder."""
    seed: int = Field(0, ge=0)


class Source(Section):
    """A picture of a model as it was given: file name, sha256 of the file, (width, height)."""

    file: str
    sha256: str
    size: tuple[int, int]


class Side(Section):
    """What one side of a trial shows: `model`'s picture of `prompt`, or noise (both None). `picture`: sha256 of the file shown."""

    model: str | None
    prompt: int | None
    picture: str


class Trial(Section):
    """One choice of one rater. `size`: (width, height) of both pictures as shown, the smaller of the two native ones.
    `expected`: the right answer of an attention check, None for a vote."""

    id: str
    question: Question
    prompt: int
    left: Side
    right: Side
    size: tuple[int, int]
    expected: Choice | None


class Rater(Section):
    """A sheet: its unguessable id, its page below `pages/`, its trials in the order shown."""

    id: str
    page: str
    trials: tuple[Trial, ...]


class Study(Section):
    """All of study.json."""

    format: Literal["diffusion2gan-preference-1"]
    id: str
    version: str
    config: StudyConfig
    models: dict[str, tuple[Source, ...]]
    prompts: tuple[str, ...]
    prompts_sha256: str
    pairs: tuple[tuple[str, str], ...]
    raters: tuple[Rater, ...]

    def sheets(self) -> dict[str, dict[str, Trial]]:
        """Rater -> trial id -> trial."""
        return {rater.id: {trial.id: trial for trial in rater.trials} for rater in self.raters}

    def cell(self, trial: Trial) -> Cell:
        """The (pair, question, prompt) that a vote counts for."""
        shown = (trial.left.model, trial.right.model)
        return self.pairs.index(shown if shown in self.pairs else shown[::-1]), trial.question, trial.prompt


def load_study(folder: Path) -> Study:
    """Reads STUDY/study.json. Raises UserError for a missing or damaged one."""
    path = folder / "study.json"
    try:
        return Study.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a study; name a folder that was made as one") from None
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}, expected a study as it was made; put the file back as it was") from None


def random_stream(seed: int, *purpose: object) -> np.random.Generator:
    """Draws that depend on the seed and on what they are for, and on nothing drawn before."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


# --- Votes ----------------------------------------------------------------------------------------------------------
class Vote(Section):
    """One line of votes.jsonl. `seconds`: from both pictures being seen to the choice. `received`: UTC, of the server."""

    study: str
    rater: str
    trial: str
    choice: Choice
    seconds: float | None = Field(None, ge=0, allow_inf_nan=False)
    received: str | None = None
    simulated: bool = False


class _GivenVote(Section):
    trial: str
    choice: Choice
    seconds: float | None = Field(None, ge=0, allow_inf_nan=False)


class _VotesFile(Section):
    """What an offline page offers for download."""

    format: Literal["diffusion2gan-votes-1"]
    study: str
    rater: str
    votes: tuple[_GivenVote, ...]


class Ballot:
    """Votes of one study, each checked as it comes: known rater and trial, nothing twice, real or simulated but never both."""

    def __init__(self, study: Study):
        self.study, self.votes = study, list[Vote]()
        self._sheets = study.sheets()
        self._seen: dict[str, set[str]] = {rater: set() for rater in self._sheets}

    def seen(self, rater: str) -> set[str]:
        """Trials that a rater has voted on."""
        return self._seen[rater]

    def unknown(self, vote: Vote) -> str | None:
        """Why the vote is none of this study's, if it is not."""
        if vote.study != self.study.id:
            return f"study {vote.study!r}, expected {self.study.id}"
        if vote.rater not in self._sheets:
            return f"rater {vote.rater!r} is none of this study"
        if vote.trial not in self._sheets[vote.rater]:
            return f"trial {vote.trial!r} is none of rater {vote.rater}"
        return None

    def add(self, vote: Vote, where: str) -> None:
        """Takes the vote. Raises UserError, beginning with `where`, for one that must not count."""
        if reason := self.unknown(vote):
            raise UserError(f"{where}: {reason}; give the votes of this study only")
        if vote.trial in self._seen[vote.rater]:
            raise UserError(f"{where}: a second vote of rater {vote.rater} on trial {vote.trial}, expected one; remove one of the two")
        if self.votes and vote.simulated != self.votes[0].simulated:
            kinds = ("a simulated vote among real ones", "a real vote among simulated ones")
            raise UserError(
                f"{where}: {kinds[not vote.simulated]}, expected one kind; analyse simulated votes in a study folder without real ones"
            )
        self._seen[vote.rater].add(vote.trial)
        self.votes.append(vote)

    def add_lines(self, path: Path, content: bytes) -> int:
        """Takes every line of a votes.jsonl. Returns the bytes of the whole lines: a last line that is no JSON, half-written when
        the machine stopped, is dropped with a warning. Raises UserError naming the line of anything else that is wrong."""
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                vote = Vote.model_validate_json(line)
            except ValidationError as error:
                if number == len(lines) and error.errors()[0]["type"] == "json_invalid":
                    warnings.warn(f"{path}: line {number}, the last, is damaged and was dropped", stacklevel=2)
                    return len(content) - len(line)
                raise UserError(f"{path}: line {number}: {_first(error)}, expected a vote; mend or remove the line") from None
            self.add(vote, f"{path}: line {number}")
        return len(content)

    def add_file(self, path: Path) -> None:
        """Takes a votes.jsonl, or a .json as an offline page gives it. Raises UserError naming the file and the place."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}), expected a file of votes; check the path") from None
        if path.suffix == ".jsonl":
            self.add_lines(path, content)
            return
        try:
            given = _VotesFile.model_validate_json(content)
        except ValidationError as error:
            raise UserError(f"{path}: {_first(error)}, expected the file that a rater's page offers; ask for it again") from None
        for number, row in enumerate(given.votes, 1):
            vote = Vote(study=given.study, rater=given.rater, **row.model_dump())
            self.add(vote, f"{path}: vote {number}")


def _first(error: ValidationError) -> str:
    """The first thing wrong, with its place, in one line."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else " ".join(problem["msg"].split())


def vote_line(vote: Vote) -> bytes:
    return vote.model_dump_json().encode() + b"\n"


def write_votes(path: Path, votes: Iterable[Vote]) -> None:
    """A whole votes.jsonl at once, atomically."""
    write_bytes_atomic(path, b"".join(map(vote_line, votes)))


def simulate_votes(study: Study, strengths: Mapping[str, float], seed: int, attention: float = 1.0, spread: float = 0.0) -> list[Vote]:
    """Votes of raters that do not exist, labelled `simulated`: a beats b with the probability 1 / (1 + exp(s_b - s_a)).

    `attention`: probability of the right answer at an attention check. `spread`: standard deviation of a shift of the log-odds
    that all votes on one (pair, prompt, question) share. Raises UserError for strengths of other models.
    """
    if strengths.keys() != study.models.keys():
        raise UserError(f"strengths of {', '.join(strengths) or 'no model'}, expected one each of {', '.join(study.models)}")
    shape = (len(study.pairs), len(QUESTIONS), len(study.prompts))
    shifts = spread * random_stream(seed, "shift").standard_normal(shape)
    draws = iter(random_stream(seed, "choice").random(sum(len(rater.trials) for rater in study.raters)).tolist())
    asked = list(QUESTIONS)
    votes = []
    for rater in study.raters:
        for trial in rater.trials:
            if trial.expected is not None:
                left = attention if trial.expected == "left" else 1 - attention
            else:
                k, question, prompt = study.cell(trial)
                a, b = study.pairs[k]
                odds = strengths[a] - strengths[b] + shifts[k, asked.index(question), prompt]
                left = 1 / (1 + math.exp(-odds if trial.left.model == a else odds))
            choice: Choice = "left" if next(draws) < left else "right"
            votes.append(Vote(study=study.id, rater=rater.id, trial=trial.id, choice=choice, simulated=True))
    return votes


def tally(study: Study, votes: Sequence[Vote]) -> dict[tuple[int, Question], tuple[np.ndarray, np.ndarray]]:
    """(pair, question) -> votes for the pair's first model and all votes, by prompt: (P,) each. Attention checks are left out."""
    p = len(study.prompts)
    counts: dict[tuple[int, Question], tuple[np.ndarray, np.ndarray]] = {
        (k, q): (np.zeros(p, int), np.zeros(p, int)) for q in study.config.questions for k in range(len(study.pairs))
    }
    sheets = study.sheets()
    for vote in votes:
        trial = sheets[vote.rater][vote.trial]
        if trial.expected is None:
            k, question, prompt = study.cell(trial)
            wins, total = counts[k, question]
            chosen = trial.left if vote.choice == "left" else trial.right
            wins[prompt] += chosen.model == study.pairs[k][0]
            total[prompt] += 1
    return counts
