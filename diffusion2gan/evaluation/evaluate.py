"""Runs protocols on a model: draws each set of pictures once for all metrics that want it, a shard at a time, and scores.

    OUT/model.json                       what was evaluated
    OUT/PROTOCOL.json                    the numbers, with all they depend on
    OUT/samples/SET/00000.png ...        the first pictures of each set, for `compare`
    OUT/features/SET-HASH/               features; the same command goes on where it stopped
    SHARED/reference|teacher/...         the same of real pictures and of the teacher, for all models

A metric whose weights or data are missing is said and skipped; the others finish.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from diffusion2gan import __version__
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import datasets, shards
from diffusion2gan.evaluation.datasets import (
    PictureFolder,
    PictureSet,
    PromptList,
    coco14_dmd2_sdxl,
    coco14_prompts,
    coco17_amd_prompts,
    coco17_prompts,
)
from diffusion2gan.evaluation.extractors import Network, Pictures, build_network
from diffusion2gan.evaluation.models import Model
from diffusion2gan.evaluation.protocols import PROTOCOLS, Given, Protocol
from diffusion2gan.evaluation.shards import Extractor, Rows
from diffusion2gan.evaluation.versions import software
from diffusion2gan.files import json_object, sweep_temporaries, sweep_temporaries_of, write_bytes_atomic, write_json
from diffusion2gan.images import png_bytes
from diffusion2gan.pairs.prompts import prompts_digest
from diffusion2gan.pairs.seeds import evaluation_seed, noise_fingerprint
from diffusion2gan.precision import no_tf32
from diffusion2gan.worker import Worker

Found = TypeVar("Found")

FORMAT = "diffusion2gan-result-1"
SHOWN = 16
BLOCKS = 256
CIFAR_COUNT = 50_000


@dataclass(frozen=True)
class SampleSet:
    """A set of `count` generated pictures: its prompts, how many pictures of each, and the `reference_count` real ones beside it."""

    count: int
    prompts: Callable[[Path], PromptList]
    reference: Callable[[Path], PictureSet] | None = None
    reference_count: int = 0
    replicas: int = 1
    side: int | None = None
    """Of pictures that go into the network as they are."""
    other_prompts: Mapping[str, Callable[[Path], PromptList]] = field(default_factory=dict)
    """Lists that were published for the same pictures, by name."""


def _unconditional(_: Path) -> PromptList:
    return PromptList("no prompts", ("",) * CIFAR_COUNT, prompts_digest([""] * CIFAR_COUNT))


def _of_dmd2_sdxl(data: Path) -> PictureSet:
    return PictureFolder(data / "val2014", "coco14-10k-dmd2", coco14_dmd2_sdxl(data)[1])


_COCO17 = {"amd": coco17_amd_prompts}
SAMPLES: Mapping[str, SampleSet] = {
    "coco14": SampleSet(30_000, coco14_prompts, lambda data: PictureFolder(data / "val2014"), 40_504),
    "coco14x10k": SampleSet(10_000, lambda data: coco14_dmd2_sdxl(data)[0], _of_dmd2_sdxl, 10_000),
    "coco17": SampleSet(5_000, coco17_prompts, lambda data: PictureFolder(data / "val2017"), 5_000, other_prompts=_COCO17),
    "coco17x8": SampleSet(40_000, coco17_prompts, replicas=8, other_prompts=_COCO17),
    "cifar10": SampleSet(CIFAR_COUNT, _unconditional, lambda data: datasets.Cifar10(data / "cifar-10-batches-bin"), CIFAR_COUNT, side=32),
}


def noise_seed(sample: int, block: int) -> int:
    """The noise of picture number `sample`, the same for every model and protocol; blocks 0 to 255 never meet, nor do they meet
    a pair store's or emoji10k-v1's."""
    return evaluation_seed((1 << 52) | (block << 40) | sample)


@dataclass(eq=False)
class Evaluation:
    """One model and where its results go. `count`: only the first so many prompts, which marks results partial.
    `block`: noise block 0 to 127 (other noises, same prompts); the teacher's control pictures use block + 128."""

    model: Model
    out: Path
    shared: Path
    data: Path
    weights: Path | None = None
    teacher: Model | None = None
    no_teacher: str = ""
    """Why there is none, where one was looked for."""
    count: int | None = None
    block: int = 0
    device: str = "cpu"
    save_pictures: bool = False
    allow_unknown_weights: bool = False
    coco17_captions: str = "first"
    """Which caption of a COCO 2017 picture: `first`, or `amd`'s published list."""
    progress: bool = True
    worker: Worker = field(default_factory=Worker.from_environment)
    networks: dict[str, Network | UserError] = field(default_factory=dict)
    """The scoring networks found so far; another evaluation may be given the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.block < BLOCKS // 2:
            raise UserError(f"noise block {self.block}, expected 0 to {BLOCKS // 2 - 1}")
        self._prompts: dict[str, PromptList | UserError] = {}
        self._references: dict[str, PictureSet] = {}

    # --- What is needed ---------------------------------------------------------------------------------------------
    def _network(self, kind: str) -> Network:
        return _found_or_raised(self.networks, kind, lambda: build_network(kind, self.weights, self.device, self.allow_unknown_weights))

    def _prompt_list(self, samples: str) -> PromptList:
        """The set's prompts; of a folder of pictures its own captions, picture by picture."""
        return _found_or_raised(self._prompts, samples, lambda: self._read_prompts(samples))

    def _captions(self, samples: str) -> list[str]:
        """The prompt of every picture."""
        return [p for p in self._prompt_list(samples).prompts for _ in range(SAMPLES[samples].replicas)]

    def _read_prompts(self, samples: str) -> PromptList:
        folder, chosen = self.model.folder, SAMPLES[samples]
        replicas = chosen.replicas
        if folder is None:
            return chosen.other_prompts.get(self.coco17_captions, chosen.prompts)(self.data).first(self.count)
        if len(folder) % replicas:
            raise UserError(f"{folder.folder}: {len(folder)} pictures, expected a multiple of {replicas}: that many of each prompt in turn")
        every = self.model.captions
        if other := next((i for i in range(len(every)) if every[i] != every[i - i % replicas]), None):
            raise UserError(
                f"{folder.folder}: picture {other} is of {every[other]!r} and the one before of {every[other - 1]!r}, expected {replicas} "
                "pictures of each prompt in turn; leave this protocol out"
            )
        captions = every[::replicas] or ("",) * (len(folder) // replicas)
        name = f"captions of {folder.name}" if self.model.captions else "no captions"
        return PromptList(name, captions, prompts_digest(captions)).first(self.count)

    # --- Running ----------------------------------------------------------------------------------------------------
    def run(self, ids: Sequence[str]) -> dict[str, list[str]]:
        """Runs the protocols; returns what was skipped and why, by protocol. Raises UserError for an unknown id or when the
        pictures cannot be made."""
        protocols = [_known(i) for i in ids]
        jobs = [(p, self._samples_of(p, protocols)) for p in protocols]
        skipped: dict[str, list[str]] = {p.id: [] for p in protocols}
        ready: list[tuple[Protocol, str, list[str]]] = []
        for protocol, samples in jobs:
            kinds = [k for k in protocol.networks if self._is_ready(protocol, samples, k, skipped[protocol.id])]
            if kinds:
                ready.append((protocol, samples, kinds))
        # The rule is not said, nor was it before there was another list.
        captions = {} if self.coco17_captions == "first" else {"coco17_captions": self.coco17_captions}
        # Where nothing can run, nothing is evaluated there.
        describe(self.out, self.model.name, self.model.identity, {"block": self.block, **captions}, look=not ready)
        for protocol, samples, _ in ready:
            refuse_fewer(self.out / f"{protocol.id}.json", len(self._captions(samples)))
        for samples in dict.fromkeys(s for _, s, _ in ready):
            # Every set is drawn once, for all networks of all its protocols.
            mine = [(p, kinds) for p, s, kinds in ready if s == samples]
            self._generated(self.model, samples, _union(k for _, k in mine), self.block)
            if self.save_pictures:
                self._save_missing(samples)
            of_reference = _union(k for p, k in mine if p.reference)
            for protocol, kinds in mine:
                try:
                    if protocol.reference:
                        self._reference_rows(samples, of_reference)  # read once too
                    self._score(protocol, samples, kinds, skipped[protocol.id])
                except UserError as error:
                    if self.worker.world > 1:
                        raise  # the other processes would wait for this one's shards
                    skipped[protocol.id].append(str(error))
        return {k: v for k, v in skipped.items() if v}

    def _score(self, protocol: Protocol, samples: str, kinds: Sequence[str], skipped: Sequence[str]) -> None:
        if protocol.teacher:
            assert self.teacher is not None
            for block in (self.block, self.block + BLOCKS // 2):
                self._generated(self.teacher, samples, kinds, block)
        if self.worker.rank == 0:
            entries = [self._entry(protocol, e, k) for k in kinds for e in protocol.networks[k](self._given(protocol, samples, k))]
            self._write(protocol, samples, entries, skipped)

    def _samples_of(self, protocol: Protocol, beside: Sequence[Protocol]) -> str:
        """A protocol of any pictures takes those that are drawn anyway."""
        return protocol.samples or next((p.samples for p in beside if p.samples and p.reference), "coco14")

    def _is_ready(self, protocol: Protocol, samples: str, kind: str, skipped: list[str]) -> bool:
        try:
            if protocol.teacher and self.teacher is None:
                raise UserError(self.no_teacher or f"{protocol.id} compares with the teacher's pictures; name it by --teacher")
            if protocol.teacher and self.model.folder is not None:
                raise UserError(f"{protocol.id} needs pictures of chosen noises, which a folder of pictures has not; name a model")
            prompts = self._prompt_list(samples)
            if kind == "clip" and not all(prompts.prompts):
                raise UserError(
                    f"{protocol.id} needs captions; put one a line into captions.txt beside the pictures, or name a file by --captions"
                )
            if protocol.reference:
                self._reference(samples)
            self._network(kind)
        except UserError as error:
            skipped.append(f"{kind}: {error}")
            return False
        return True

    def _reference(self, samples: str) -> PictureSet:
        if samples not in self._references:
            make = SAMPLES[samples].reference
            if make is None:
                raise UserError(f"{samples} has no reference pictures")
            self._references[samples] = make(self.data)
        return self._references[samples]

    # --- Features ---------------------------------------------------------------------------------------------------
    def _extractors(self, kinds: Sequence[str], identity: Mapping[str, Any], captions: Sequence[str]) -> list[Extractor]:
        def rows_of(network: Network) -> Callable[[Pictures, int, int], np.ndarray]:
            return lambda pictures, start, stop: network.features(pictures, captions[start:stop])

        networks = [self._network(k) for k in kinds]
        return [Extractor(k, {**identity, "network": dict(n.facts)}, rows_of(n)) for k, n in zip(kinds, networks, strict=True)]

    def _identity(self, model: Model, samples: str, block: int) -> dict[str, Any]:
        """All that a set of pictures depends on."""
        prompts = self._prompt_list(samples)
        return {
            "model": dict(model.identity),
            "samples": samples,
            "count": len(prompts.prompts) * SAMPLES[samples].replicas,
            "prompts": prompts.sha256,
            "noise": None if model.folder else {"block": block, "recipe": noise_fingerprint()},
        }

    def _folder(self, model: Model, samples: str, block: int) -> Path:
        """Pictures of other settings are other pictures: they go elsewhere, and never into one distance together."""
        above = self.out / "features" if model is self.model else self.shared / "teacher"
        return above / f"{samples}-{_hash(self._identity(model, samples, block))}"

    def _generated(self, model: Model, samples: str, kinds: Sequence[str], block: int) -> dict[str, Rows]:
        captions = self._captions(samples)

        def produce(start: int, stop: int) -> Pictures:
            pictures = _drawn(model, captions, start, stop, block)
            _check_size(pictures, start, SAMPLES[samples].side)
            if model is self.model:
                keep_samples(self.out / "samples" / samples, pictures, captions[start:stop], start)
                if self.save_pictures:
                    self._save(samples, pictures, start)
            return pictures

        extractors = self._extractors(kinds, self._identity(model, samples, block), captions)
        return shards.extract(
            produce, len(captions), self._folder(model, samples, block), extractors,
            label=f"{model.name} {samples}", progress=self.progress, worker=self.worker,
        )  # fmt: skip

    def _save(self, samples: str, pictures: Pictures, start: int) -> None:
        for i, picture in enumerate(pictures, start):
            write_bytes_atomic(self._picture(samples, i), png_bytes(Image.fromarray(picture)))

    def _picture(self, samples: str, i: int) -> Path:
        return self.out / "pictures" / samples / f"{i:06d}.png"

    def _save_missing(self, samples: str) -> None:
        """Draws again what was drawn before anyone asked for files."""
        if self.model.folder is not None:
            return
        captions = self._captions(samples)
        for k, (start, stop) in enumerate(shards.spans(len(captions), shards.SHARD)):
            if k % self.worker.world == self.worker.rank and not all(self._picture(samples, i).exists() for i in range(start, stop)):
                self._save(samples, _drawn(self.model, captions, start, stop, self.block), start)
        if self.worker.rank == 0:
            write_bytes_atomic(self.out / "pictures" / samples / "captions.txt", "".join(f"{c}\n" for c in captions).encode())

    def _reference_rows(self, samples: str, kinds: Sequence[str]) -> dict[str, Rows]:
        reference = self._reference(samples)
        extractors = self._extractors(kinds, self._reference_identity(samples), [""] * len(reference))
        return shards.extract(
            reference.pictures, len(reference), self._reference_folder(samples), extractors,
            label=f"reference {samples}", progress=self.progress, worker=self.worker,
        )  # fmt: skip

    def _reference_facts(self, samples: str) -> dict[str, Any]:
        """`sha256` is of the pictures themselves, as their features were taken."""
        reference = self._reference(samples)
        digest = shards.picture_facts(self._reference_folder(samples), "pictures", len(reference))["sha256"]
        return {"name": reference.name, "n": len(reference), "sha256": digest}

    def _reference_folder(self, samples: str) -> Path:
        return self.shared / "reference" / f"{samples}-{_hash(self._reference_identity(samples))}"

    def _reference_identity(self, samples: str) -> dict[str, Any]:
        reference = self._reference(samples)
        return {"reference": reference.name, "pictures": reference.identity, "count": len(reference)}

    def _given(self, protocol: Protocol, samples: str, kind: str) -> Given:
        """Everything is there already: these calls only open files."""

        def of(model: Model, block: int) -> Rows:
            return self._generated(model, samples, [kind], block)[kind]

        return Given(
            of(self.model, self.block),
            replicas=SAMPLES[samples].replicas,
            reference=self._reference_rows(samples, [kind])[kind] if protocol.reference else None,
            teacher=of(self.teacher, self.block) if protocol.teacher and self.teacher else None,
            teacher_other_noise=of(self.teacher, self.block + BLOCKS // 2) if protocol.teacher and self.teacher else None,
            paired=self.teacher is None or self.teacher.latent_shape == self.model.latent_shape,
        )

    # --- Results ----------------------------------------------------------------------------------------------------
    def _entry(self, protocol: Protocol, entry: dict[str, Any], kind: str) -> dict[str, Any]:
        values = entry.pop("values", None)
        if values is not None:
            entry["values"] = shards.save_values(self.out, f"{protocol.id}-{entry['metric']}-{entry['variant']}", values)
        return {**entry, "network": {"kind": kind, **self._network(kind).facts}}

    def _write(self, protocol: Protocol, samples: str, entries: list[dict[str, Any]], skipped: Sequence[str]) -> None:
        prompts, chosen = self._prompt_list(samples), SAMPLES[samples]
        count = len(prompts.prompts) * chosen.replicas
        folder = self._folder(self.model, samples, self.block)
        facts = shards.picture_facts(folder, "pictures", count)
        notes = list(skipped)
        if self.model.folder is not None and self.model.folder.lossy:
            notes.append(f"{self.model.folder.lossy} pictures are JPEG or WebP, which moves the scores: not comparable with lossless ones")
        if facts["blank"]:
            notes.append(f"{facts['blank']} pictures are of one colour: a safety checker or an overflow painted them")
        result = {
            "format": FORMAT,
            "protocol": protocol.id,
            "title": protocol.title,
            "model": {"name": self.model.name, **self.model.identity},
            "n": count,
            "partial": count != chosen.count or (protocol.reference and len(self._reference(samples)) != chosen.reference_count),
            "results": entries,
            "prompts": {
                "name": prompts.name,
                "sha256": prompts.sha256,
                "captions_sha256": prompts_digest(prompts.prompts),
                "replicas": chosen.replicas,
            },
            "noise": None if self.model.folder else {"block": self.block, "fingerprint": noise_fingerprint()},
            "reference": self._reference_facts(samples) if protocol.reference else None,
            "teacher": {"name": self.teacher.name, **self.teacher.identity} if protocol.teacher and self.teacher else None,
            "pictures_sha256": facts["sha256"],
            "quantiser": self.model.quantiser or "as found",
            "tf32": False,
            "seconds_per_image": None if self.model.folder else shards.seconds_per_image(folder, "pictures"),
            "versions": versions(),
            "notes": notes,
        }
        path = self.out / f"{protocol.id}.json"
        if path.exists():
            result["results"] = [*entries, *_kept(json_object(path), json.loads(json.dumps(result)))]
        write_json(path, result)


_SAME = ("format", "model", "n", "prompts", "noise", "reference", "teacher", "pictures_sha256", "quantiser")


def _kept(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a result from before has of networks that were not there this time, of the same pictures and references."""
    if any(before.get(key) != now[key] for key in _SAME):
        return []
    there = {e["network"]["kind"] for e in now["results"]}
    entries = [e for e in before["results"] if e["network"]["kind"] not in there]
    return entries if before["versions"] == now["versions"] else [{"versions": before["versions"], **e} for e in entries]


def keep_samples(folder: Path, pictures: Pictures, captions: Sequence[str], start: int) -> None:
    """Writes those of samples start, start + 1, ... that are among the first SHOWN, for people to look at."""
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True), start):
        if i >= SHOWN:
            break
        write_bytes_atomic(folder / f"{i:05d}.png", png_bytes(Image.fromarray(picture)))
        write_bytes_atomic(folder / f"{i:05d}.txt", caption.encode())


def describe(
    out: Path, name: str, identity: Mapping[str, Any], run: Mapping[str, Any] | None = None, part: str = "protocols", look: bool = False
) -> None:
    """Says in OUT/model.json what is evaluated there. Raises UserError when that is another model, or another setting of it; with
    `look` it only does that.

    `identity["subject"]` names the weights, and is one for all of OUT; the rest of `identity`, and `run`, are a `part`'s own.
    """
    path = out / "model.json"
    # The whole folder only where it is an evaluation's already: it may hold other things.
    if path.exists():
        sweep_temporaries(out)
    else:
        sweep_temporaries_of(path)
    settings = json.loads(json.dumps({k: v for k, v in identity.items() if k != "subject"} | dict(run or {})))
    found = json_object(path) if path.exists() else {"name": name, "subject": identity["subject"], "settings": {}}
    if not (isinstance(found.get("name"), str) and isinstance(found.get("subject"), str) and isinstance(found.get("settings"), dict)):
        raise UserError(f"{path}: not what `diffusion2gan evaluate` writes; choose a new --out")
    if found["subject"] != identity["subject"]:
        raise UserError(f"{out}: holds the evaluation of {found['name']}, other weights than {name}; choose a new --out")
    before = found["settings"].get(part, settings)
    for key in {**before, **settings}:
        if (key in before, before.get(key)) != (key in settings, settings.get(key)):
            there = f"with {key} {before[key]!r}" if key in before else f"without {key} ({', '.join(before)})"
            now = repr(settings[key]) if key in settings else f"without it ({', '.join(settings)})"
            raise UserError(f"{out}: evaluated there {there}, now {now}; choose a new --out")
    if not look and found["settings"].get(part) != settings:
        found["settings"][part] = settings
        write_json(path, found)


def refuse_fewer(path: Path, pictures: int, list_name: str | None = None) -> None:
    """Raises UserError where `path` is a result of more pictures, or of another prompt list: a short look must not replace it."""
    if not path.exists():
        return
    before = json_object(path)
    if before.get("list") != list_name:
        raise UserError(f"{path}: a result of the {before['list']} list, now it is the {list_name} list; choose a new --out")
    had = before["n"] if list_name is None else before["count"]
    if had > pictures:
        raise UserError(f"{path}: a result of {had} pictures, now of the first {pictures}; choose a new --out, or leave --count out")


def _drawn(model: Model, captions: Sequence[str], start: int, stop: int, block: int) -> Pictures:
    if model.folder is not None:
        return model.folder.pictures(start, stop)
    with no_tf32():
        return model.draw(captions[start:stop], [noise_seed(i, block) for i in range(start, stop)])


def _check_size(pictures: Pictures, start: int, side: int | None) -> None:
    for i, picture in enumerate(pictures if side else (), start):
        if picture.shape[:2] != (side, side):
            raise UserError(
                f"picture {i} is {picture.shape[1]} x {picture.shape[0]}, this protocol's are {side} x {side}; it does not resize"
            )


def _found_or_raised(known: dict[str, Found | UserError], key: str, find: Callable[[], Found]) -> Found:
    """What `find` returned or raised the first time: a failure is not tried again for every protocol."""
    if key not in known:
        try:
            known[key] = find()
        except UserError as error:
            known[key] = error
    found = known[key]
    if isinstance(found, UserError):
        raise found
    return found


def _known(protocol: str) -> Protocol:
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r}, expected some of {', '.join(['emoji10k-v1', *PROTOCOLS, 'latency'])}")
    return PROTOCOLS[protocol]


def _union(kinds: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(k for several in kinds for k in several))


def _hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def versions() -> dict[str, Any]:
    """What a result depends on besides its inputs."""
    packages = (
        "numpy",
        "torch",
        "torchvision",
        "diffusers",
        "transformers",
        "pillow",
        "clean-fid",
        "torch-fidelity",
        "open_clip_torch",
        "dreamsim",
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"diffusion2gan": __version__, **software(packages), **gpu}


def summary(out: Path, ids: Sequence[str]) -> str:
    """The numbers of finished protocols as a Markdown table."""
    from diffusion2gan.report import markdown_table

    rows = []
    for protocol in ids:
        path = out / f"{protocol}.json"
        if path.exists():
            result = json.loads(path.read_text())
            for entry in result["results"]:
                low_high = entry.get("interval95")
                interval = f"{low_high[0]:.4g} to {low_high[1]:.4g}" if low_high else spread(entry)
                mark = " (partial)" if result["partial"] else ""
                mark += " (debug: too few)" if entry.get("debug") else ""
                rows.append([protocol, f"{entry['metric']}{mark}", entry["variant"], float(entry["value"]), interval, result["n"]])
    return markdown_table(["protocol", "metric", "variant", "value", "95 % interval, or spread", "pictures"], rows)


def spread(entry: Mapping[str, Any]) -> str | None:
    """How the values of several noise blocks lie around their mean, in words; None for a value of one block."""
    if "blocks" not in entry:
        return None
    best = f", best {entry['best']:.4g}" if "best" in entry else ""
    return f"standard deviation {entry['standard_deviation']:.2g} over {len(entry['blocks'])} noise blocks{best}"
