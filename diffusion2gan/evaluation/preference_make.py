"""Makes a study of preference: who sees which two pictures, and the page each rater sees them on."""

from __future__ import annotations

import base64
import csv
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion2gan import __version__
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.datasets import PictureFolder, prompts_of_file
from diffusion2gan.evaluation.preference import (
    QUESTIONS,
    REMINDER,
    Choice,
    Question,
    Rater,
    Side,
    Source,
    Study,
    StudyConfig,
    Trial,
    random_stream,
)
from diffusion2gan.files import atomic_folder, sha256_of

# With fewer, one who only clicks would pass the 80 % by chance too often (4 of 5: 19 %; 8 of 9: 2 %).
LEAST_CHECKS = 5
# What the server puts its own address into; as it stands, the page keeps the votes to itself.
OFFLINE = b'<script type="application/json" id="sink">null</script>'
CONSENT = (
    "[Consent text of this study: who runs it and why, how long it takes, what is paid, that taking part is voluntary and can be "
    "stopped at any time, what is stored and for how long, and whom to ask.]"
)


def make_study(models: Mapping[str, Path], out: Path, config: StudyConfig, prompts: Path | None = None) -> Study:
    """Makes the study folder `out` of one folder of pictures for each model: picture i, sorted by name, is that of prompt i.

    `prompts`: one a line; default: captions.txt in the first folder. Prints the reminder of what is not in the code. Raises
    UserError for fewer than two models or two different prompts, differing numbers or shapes of pictures, pairs of unknown
    models, and a folder that is in use or cannot be written.
    """
    if len(models) < 2:
        raise UserError(f"{len(models)} model to compare ({', '.join(models) or 'none'}), expected at least 2; name more folders")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already, expected a new or empty folder; choose another, a study in use is never changed")
    pairs = _pairs(models, config)
    folders = {name: PictureFolder(folder) for name, folder in models.items()}
    for pictures in folders.values():
        pictures.refuse_two_orders("the prompts could be meant in either order")
    listed = prompts_of_file(prompts or next(iter(models.values())) / "captions.txt")
    for name, folder in folders.items():
        if len(folder) != len(listed.prompts):
            raise UserError(
                f"{folder.folder}: {len(folder)} pictures of {name} for {len(listed.prompts)} prompts, "
                "expected one each in every folder; add what is missing, or take away what is too much"
            )
    listed = listed.first(config.count)
    if len(set(listed.prompts)) < 2:
        raise UserError(f"{len(set(listed.prompts))} different prompt, expected at least 2: attention checks show the picture of another")
    sources = _sources(folders, len(listed.prompts))
    # Ids come of the digests of the pictures too: one who has the page and the seed cannot work out what is which.
    secret = hashlib.sha256(
        json.dumps([config.model_dump(mode="json"), listed.sha256, {m: [s.sha256 for s in row] for m, row in sources.items()}]).encode()
    ).hexdigest()
    with atomic_folder(out) as draft:
        for name in ("pages", "pictures"):
            (draft / name).mkdir(parents=True)
        stimuli = _Stimuli(folders, sources, draft / "pictures", config)
        plan = _Plan(secret, config, listed.prompts, pairs, stimuli)
        study = Study(
            format="diffusion2gan-preference-1",
            id=_digest(secret, "study"),
            version=__version__,
            config=config,
            models=sources,
            prompts=listed.prompts,
            prompts_sha256=listed.sha256,
            pairs=pairs,
            raters=plan.raters(),
        )
        for rater in study.raters:
            _write_page(draft, study, rater, secret)
        _write_table(draft / "sheets.csv", study)
        (draft / "study.json").write_text(study.model_dump_json(indent=1) + "\n")
    print(f"Hand out nothing but {out / 'pages'}: study.json and sheets.csv say which model drew which picture. {REMINDER}")
    return study


def _pairs(models: Mapping[str, Path], config: StudyConfig) -> tuple[tuple[str, str], ...]:
    pairs = tuple(itertools.combinations(models, 2)) if config.pairs is None else config.pairs
    for pair in pairs:
        if unknown := [name for name in pair if name not in models]:
            raise UserError(f"pair {' and '.join(pair)}: no model {unknown[0]!r}, expected two of {', '.join(models)}")
        if pair[0] == pair[1]:
            raise UserError(f"pair {' and '.join(pair)}: one model twice, expected two of {', '.join(models)}")
    if len({frozenset(pair) for pair in pairs}) != len(pairs) or not pairs:
        raise UserError(f"{len(pairs)} pairs of models, expected at least one and none twice; see to `pairs`")
    if len(set(config.questions)) != len(config.questions):
        raise UserError(f"questions {', '.join(config.questions)}, expected none twice; see to `questions`")
    if config.checks_from is not None and config.checks_from not in models:
        raise UserError(f"checks_from is {config.checks_from!r}, expected one of {', '.join(models)}")
    return pairs


def _sources(folders: Mapping[str, PictureFolder], count: int) -> dict[str, tuple[Source, ...]]:
    """The first `count` pictures of each model. Raises UserError for shapes that cannot stand side by side."""
    sources: dict[str, tuple[Source, ...]] = {}
    first: tuple[Path, int, int] | None = None
    for name, folder in folders.items():
        rows = []
        for i, path in enumerate(folder.paths[:count]):
            height, width = folder.pictures(i, i + 1)[0].shape[:2]
            first = first or (path, width, height)
            if abs(width * first[2] / (height * first[1]) - 1) > 0.01:
                raise UserError(
                    f"{path}: {width} x {height}, but {first[0]} is {first[1]} x {first[2]}, expected one shape for all; crop the pictures"
                )
            digest = sha256_of(path)
            rows.append(Source(file=path.relative_to(folder.folder).as_posix(), sha256=digest, size=(width, height)))
        sources[name] = tuple(rows)
    for a, b in itertools.combinations(sources, 2):
        if all(x.sha256 == y.sha256 for x, y in zip(sources[a], sources[b], strict=True)):
            raise UserError(
                f"{folders[a].folder} and {folders[b].folder}: the same pictures, expected those of two models; check the paths"
            )
    return sources


def _digest(secret: str, *what: object) -> str:
    return hashlib.sha256(json.dumps([secret, *what]).encode()).hexdigest()[:16]


class _Stimuli:
    """Pictures as they are shown: scaled to the trial's size, bare of all metadata, alike in format, one file for each content."""

    def __init__(self, folders: Mapping[str, PictureFolder], sources: Mapping[str, Sequence[Source]], folder: Path, config: StudyConfig):
        self.sources = sources
        self._folders, self._folder, self._config = folders, folder, config
        self._known: dict[object, Side] = {}

    def size(self, *shown: tuple[str, int]) -> tuple[int, int]:
        """The smallest native size of these (model, prompt)."""
        return min(self.sources[model][prompt].size for model, prompt in shown)

    def picture(self, model: str, prompt: int, size: tuple[int, int]) -> Side:
        key = (model, prompt, size)
        if key not in self._known:
            picture = Image.fromarray(self._folders[model].pictures(prompt, prompt + 1)[0])
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.LANCZOS)
            self._known[key] = Side(model=model, prompt=prompt, picture=self._write(picture))
        return self._known[key]

    def noise(self, size: tuple[int, int]) -> Side:
        if size not in self._known:
            pixels = random_stream(self._config.seed, "noise", size).integers(0, 256, (size[1], size[0], 3), np.uint8)
            self._known[size] = Side(model=None, prompt=None, picture=self._write(Image.fromarray(pixels)))
        return self._known[size]

    def _write(self, picture: Image.Image) -> str:
        scratch = self._folder / "scratch"
        if self._config.jpeg_quality is None:
            picture.save(scratch, "PNG")
        else:
            picture.save(scratch, "JPEG", quality=self._config.jpeg_quality, subsampling=0)
        digest = sha256_of(scratch)
        scratch.rename(picture_file(self._folder, digest, self._config))
        return digest


def picture_file(folder: Path, digest: str, config: StudyConfig) -> Path:
    """Where a picture lies in the folder `pictures`."""
    return folder / f"{digest}.{'png' if config.jpeg_quality is None else 'jpg'}"


# --- Who sees what --------------------------------------------------------------------------------------------------
class _Plan:
    """Trials of every rater. V rounds: in each, every (pair, question, prompt) is dealt to one of the round's raters, so no rater
    meets one twice; and when raters stop coming, every prompt has about as many votes as any other."""

    def __init__(self, secret: str, config: StudyConfig, prompts: Sequence[str], pairs: Sequence[tuple[str, str]], stimuli: _Stimuli):
        self._secret, self._config, self._pairs, self._stimuli, self._prompts = secret, config, pairs, stimuli, prompts
        self._words = [set(re.findall(r"\w+", prompt.lower())) for prompt in prompts]

    def raters(self) -> tuple[Rater, ...]:
        config, p = self._config, len(self._prompts)
        cells = [(pair, question, prompt) for pair in self._pairs for question in config.questions for prompt in range(p)]
        # The first model is on the left for every second prompt of a (pair, question), and changes sides with every round.
        rng = random_stream(config.seed, "sides")
        sides = np.concatenate([rng.permutation(np.arange(p) % 2) for _ in range(len(cells) // p)])
        sheets = math.ceil(len(cells) / config.trials_per_rater)
        rounds = (random_stream(config.seed, "deal", v).permutation(len(cells)) for v in range(config.votes))
        deal = [part for order in rounds for part in np.array_split(order, sheets)]
        digits = max(3, len(str(len(deal))))
        raters = []
        for number, part in enumerate(deal):
            trials = [self._vote(cells[i], swapped=bool((sides[i] + number // sheets) % 2)) for i in part]
            trials += self._checks(number, len(part))
            order = random_stream(config.seed, "order", number).permutation(len(trials))
            shuffled = tuple(
                trials[i].model_copy(update={"id": _digest(self._secret, "trial", number, place)}) for place, i in enumerate(order)
            )
            raters.append(Rater(id=_digest(self._secret, "rater", number), page=f"rater-{number + 1:0{digits}}.html", trials=shuffled))
        return tuple(raters)

    def _vote(self, cell: tuple[tuple[str, str], Question, int], swapped: bool) -> Trial:
        pair, question, prompt = cell
        size = self._stimuli.size(*((model, prompt) for model in pair))
        left, right = (self._stimuli.picture(model, prompt, size) for model in (pair[::-1] if swapped else pair))
        return Trial(id="", question=question, prompt=prompt, left=left, right=right, size=size, expected=None)

    def _checks(self, number: int, votes: int) -> list[Trial]:
        share, questions = self._config.checks, self._config.questions
        # The small number undoes what a division in floating point may add to a whole one.
        count = max(LEAST_CHECKS, math.ceil(votes * share / (1 - share) - 1e-9))
        rng = random_stream(self._config.seed, "checks", number)
        models = [self._config.checks_from] if self._config.checks_from else list(self._stimuli.sources)
        prompts = np.resize(rng.permutation(len(self._prompts)), count)
        sides = rng.permutation(np.arange(count) % 2)
        trials = []
        for i, (prompt, side) in enumerate(zip(prompts.tolist(), sides.tolist(), strict=True)):
            question, model = questions[(number + i) % len(questions)], models[rng.integers(len(models))]
            if question == "realism":
                size = self._stimuli.size((model, prompt))
                wrong = self._stimuli.noise(size)
            else:
                other = self._unlike(prompt, rng)
                size = self._stimuli.size((model, prompt), (model, other))
                wrong = self._stimuli.picture(model, other, size)
            right = self._stimuli.picture(model, prompt, size)
            expected: Choice = "left" if side else "right"
            shown = (right, wrong) if side else (wrong, right)
            trials.append(Trial(id="", question=question, prompt=prompt, left=shown[0], right=shown[1], size=size, expected=expected))
        return trials

    def _unlike(self, prompt: int, rng: np.random.Generator) -> int:
        """Another prompt, drawn of those that share the fewest words: a picture of a near one could rightly be preferred."""
        shared = [
            len(self._words[prompt] & words) if text != self._prompts[prompt] else math.inf
            for text, words in zip(self._prompts, self._words, strict=True)
        ]
        return int(rng.choice(np.flatnonzero(np.array(shared) == min(shared))))


# --- What is written ------------------------------------------------------------------------------------------------
def _write_page(folder: Path, study: Study, rater: Rater, secret: str) -> None:
    """One rater's page. Its pictures stand in the order of ids that mean nothing, and differ from page to page."""

    def opaque(side: Side) -> str:
        return _digest(secret, "picture", rater.id, side.picture)

    trials = [
        {
            "id": trial.id,
            "question": QUESTIONS[trial.question],
            "prompt": study.prompts[trial.prompt] if trial.question == "alignment" else None,
            "left": opaque(trial.left),
            "right": opaque(trial.right),
            "size": trial.size,
        }
        for trial in rater.trials
    ]
    consent = study.config.consent or CONSENT
    # `<` would end the script element that the sheet stands in.
    sheet = json.dumps({"study": study.id, "rater": rater.id, "consent": consent, "trials": trials}).replace("<", "\\u003c")
    shown = {opaque(side): side.picture for trial in rater.trials for side in (trial.left, trial.right)}
    template = (resources.files("diffusion2gan.evaluation") / "data" / "preference.html").read_text()
    head, middle, end = re.split("@SHEET@|@PICTURES@", template)
    kind = "png" if study.config.jpeg_quality is None else "jpeg"
    with open(folder / "pages" / rater.page, "w") as file:
        file.write(head + sheet + middle)
        for name, digest in sorted(shown.items()):
            data = base64.b64encode(picture_file(folder / "pictures", digest, study.config).read_bytes()).decode()
            file.write(f'<script type="text/plain" id="{name}">data:image/{kind};base64,{data}</script>\n')
        file.write(end)


def _write_table(path: Path, study: Study) -> None:
    columns = "rater page place trial question prompt_number prompt kind left right width height expected"
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns.split())
        for rater in study.raters:
            for place, trial in enumerate(rater.trials, 1):
                kind, text = "vote" if trial.expected is None else "check", study.prompts[trial.prompt]
                sides = [f"{s.model}, prompt {s.prompt + 1}" if s.prompt is not None else "noise" for s in (trial.left, trial.right)]
                row = [rater.id, rater.page, place, trial.id, trial.question, trial.prompt + 1, text, kind, *sides]
                table.writerow([*row, *trial.size, trial.expected])
