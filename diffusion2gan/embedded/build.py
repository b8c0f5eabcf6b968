"""The stages that make the embedded models, in order; each resumes where it stopped.

    data -> autoencoder -> teacher (text encoder and U-Net) -> perceptual -> calibrate -> pack

`diffusion2gan embedded STAGE` runs one; everything it makes lies under one work folder. `unpack` is the way back: a work
folder from what is shipped, to train it further.
"""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from diffusion2gan.device import default_device
from diffusion2gan.embedded import autoencoder, emoji, perceptual, text_to_image
from diffusion2gan.embedded.triplets import DISTORTIONS, synthetic_triplets
from diffusion2gan.embedded.weights import check_teacher, package_root
from diffusion2gan.errors import UserError
from diffusion2gan.export import text_in_float32
from diffusion2gan.files import atomic_folder, write_bytes_atomic, write_json
from diffusion2gan.fit import save_start
from diffusion2gan.perceptual import LatentLPIPS
from diffusion2gan.perceptual.calibrate import Encode, Judgements, calibrate, head_vector, judge, two_afc
from diffusion2gan.report import markdown_table
from diffusion2gan.run_log import read_scalars


def build_autoencoder(work: Path, steps: int | None = None) -> Path:
    """Trains the autoencoder, folds the latent statistics in, writes `work/vae`. Returns that folder."""
    dataset = emoji.load()
    config = replace(autoencoder.CONFIG, steps=steps or autoencoder.CONFIG.steps)
    vae = autoencoder.train(dataset, work / "ae_f4", "f4", config)
    autoencoder.fold_latent_statistics(vae, dataset.images[emoji.reference_indices(dataset.records)])
    vae.save_pretrained(work / "vae")
    return work / "vae"


def build_teacher(work: Path, steps: int | None = None) -> Path:
    """Trains text encoder and U-Net on the latents of `work/vae`, writes the pipeline folder `work/teacher`."""
    dataset = emoji.load()
    vae = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last).eval()
    config = replace(text_to_image.CONFIG, steps=steps or text_to_image.CONFIG.steps)
    model = text_to_image.train(dataset, vae, work / "unet", config, default_device())
    text_to_image.save_pipeline(model, CLIPTokenizer.from_pretrained(work / "unet" / "tokenizer"), vae, work / "teacher")
    return work / "teacher"


def build_perceptual(work: Path, steps: int | None = None) -> dict[str, dict[str, float]]:
    """Trains the latent and the pixel VGG, writes `work/latent_vgg` and `work/pixel_vgg`. Returns their top-1 on held-out cells."""
    dataset = emoji.load()
    vae = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last).eval()
    result = {}
    for name, encoder in (("latent_vgg", vae), ("pixel_vgg", None)):
        # Compiled, a step takes 0.6 of the time in latent space; the pixel network's, 1.25.
        config = replace(perceptual.CONFIG, steps=steps or perceptual.CONFIG.steps, compile=encoder is not None)
        metric, result[name] = perceptual.train(
            dataset, encoder.to(default_device()) if encoder else None, work / f"{name}_run", config, default_device()
        )
        metric.save_pretrained(work / name, torch.float16)
    return result


TRIPLETS_OF_A_KIND = 1000


def calibrate_perceptual(work: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Calibrates the heads of `work/latent_vgg` and `work/pixel_vgg` on synthetic triplets of training pictures, in place.

    Returns, by network and kind of distortion, the 2AFC score on triplets of held-out cells before (heads of ones) and after;
    it is kept in `work/calibration.json`.
    """
    dataset = emoji.load()
    vae = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last).eval()
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, encoder in (("latent_vgg", vae), ("pixel_vgg", None)):
        metric = LatentLPIPS.from_pretrained(work / name)
        encode = perceptual.encoder(encoder)
        for head in metric.lins:
            torch.nn.init.ones_(head.weight)

        def judged(split: str, seed: int, metric: LatentLPIPS = metric, encode: Encode = encode) -> dict[str, Judgements]:
            return {k: judge(metric, synthetic_triplets(dataset, split, k, TRIPLETS_OF_A_KIND, seed), encode) for k in DISTORTIONS}

        with torch.no_grad():
            held_out = judged("cell", 1)
            before = {kind: two_afc(head_vector(metric), triplets) for kind, triplets in held_out.items()}
            training = Judgements.cat(judged("train", 0).values())
        calibrate(metric, training)
        result[name] = {k: {"ones": before[k], "calibrated": two_afc(head_vector(metric), t)} for k, t in held_out.items()}
        metric.save_pretrained(work / name, torch.float16)
    write_json(work / "calibration.json", result)
    return result


MAX_TOTAL, MAX_FILE = 28 << 20, 12 << 20


def pack(work: Path, root: Path) -> list[str]:
    """Copies what `work` has into the package folder `root`, in fp16. Refuses, before anything is replaced, to ship more than
    28 MB in all or a file over 12 MB."""
    if work.resolve() == root.resolve():
        raise UserError(f"{work}: is the package's own folder; name the work folder of the training")
    parts = [name for name in ("teacher", "latent_vgg", "pixel_vgg") if (work / name).is_dir()]
    if (work / "student" / "unet").is_dir():
        parts.append("student")
    if not parts:
        raise UserError(f"{work}: holds none of teacher, latent_vgg, pixel_vgg and student, expected the work folder of the training")
    lines = []
    root.mkdir(parents=True, exist_ok=True)
    with atomic_folder(root) as draft:
        shutil.copytree(root, draft)
        for name in parts:
            shutil.rmtree(draft / name, ignore_errors=True)
            # A student shares everything but its network and its scheduler with the teacher.
            ignore = shutil.ignore_patterns("vae", "text_encoder", "tokenizer", ".*") if name == "student" else shutil.ignore_patterns(".*")
            shutil.copytree(work / name, draft / name, ignore=ignore)
            text_in_float32(draft / name)
            card = root / name / "README.md"
            if card.exists() and not (draft / name / card.name).exists():
                shutil.copyfile(card, draft / name / card.name)
            lines.append(f"packed {name}: {sum(p.stat().st_size for p in (draft / name).rglob('*') if p.is_file()):,} bytes")
        if (draft / "student").is_dir():
            try:
                check_teacher(draft / "teacher", draft / "student")
            except UserError as error:
                shutil.rmtree(draft / "student")
                lines.append(f"left out student: {error}")
        sizes = [p.stat().st_size for p in draft.rglob("*") if p.is_file()]
        if sum(sizes) > MAX_TOTAL or max(sizes, default=0) > MAX_FILE:
            raise UserError(
                f"{work}: {sum(sizes):,} bytes, largest file {max(sizes):,}, expected at most {MAX_TOTAL:,} and {MAX_FILE:,}; pack less"
            )
    records = "".join(json.dumps(asdict(r), sort_keys=True) + "\n" for r in emoji.load().records)
    write_bytes_atomic(root.parent / "data" / "records.jsonl.gz", gzip.compress(records.encode(), mtime=0))
    return [*lines, f"total {sum(sizes):,} bytes in {root}"]


def unpack(root: Path, work: Path, step: int) -> None:
    """Makes of the shipped teacher in `root` a work folder whose training stands at `step`, with an optimiser that begins anew.

    Raises UserError when `work` already holds an autoencoder or a training, which would be lost.
    """
    for part in (work / "vae", work / "unet"):
        if part.exists():
            raise UserError(f"{part}: is there already, expected a work folder without an autoencoder or a training; name another")
    for name, part in (("vae", work / "vae"), ("tokenizer", work / "unet" / "tokenizer")):
        shutil.copytree(root / "teacher" / name, part)
    tokenizer = CLIPTokenizer.from_pretrained(root / "teacher" / "tokenizer")
    model = text_to_image.TextToImage(tokenizer)
    for name, module in (("text_encoder", model.text_encoder), ("unet", model.unet)):
        module.load_state_dict(type(module).from_pretrained(root / "teacher" / name).float().state_dict())
    save_start(model, text_to_image.CONFIG, work / "unet", step)


def training_facts(work: Path) -> dict[str, Any]:
    """What the training logs in `work` say, for the model card."""
    facts: dict[str, Any] = {}
    for name, batch in (("ae_f4", autoencoder.CONFIG.batch_size), ("unet", text_to_image.CONFIG.batch_size)):
        rows = read_scalars(work / name / "metrics.jsonl")
        if not rows:  # a work folder that was unpacked has no log of what came before
            continue
        facts[f"{name}: steps"] = rows[-1]["step"]
        facts[f"{name}: samples"] = rows[-1]["step"] * batch
        facts[f"{name}: last loss"] = rows[-1]["loss"]
    psnr = [r["psnr"] for r in read_scalars(work / "ae_f4" / "metrics.jsonl") if "psnr" in r]
    return facts | ({"autoencoder: held-out PSNR, dB": psnr[-1]} if psnr else {})


def run_stage(stage: str, work: Path, steps: int | None = None) -> None:
    """One stage by name; prints what it made."""
    if stage == "data":
        dataset, skipped = emoji.build()
        print(f"{len(dataset.records)} pictures; skipped: " + ", ".join(f"{n} {reason}" for reason, n in skipped.items()))
    elif stage == "autoencoder":
        print(f"wrote {build_autoencoder(work, steps)}")
    elif stage == "teacher":
        print(f"wrote {build_teacher(work, steps)}")
    elif stage == "perceptual":
        for name, top1 in build_perceptual(work, steps).items():
            print(f"wrote {work / name}; on held-out cells: " + ", ".join(f"{head} {value:.3f}" for head, value in top1.items()))
    elif stage == "calibrate":
        for name, kinds in calibrate_perceptual(work).items():
            print(f"{name}: 2AFC on synthetic triplets of held-out cells")
            print(markdown_table(["distortion", "heads of ones", "calibrated"], [[k, *scores.values()] for k, scores in kinds.items()]))
    elif stage in ("progress", "gate"):
        # These use everything below `embedded` in the package, and nothing above needs them.
        from diffusion2gan.embedded import card

        if stage == "progress":
            print(json.dumps(card.progress(work / "teacher", work)))
        else:
            print(json.dumps(card.write_card(work / "teacher", work, Path("docs"), training_facts(work))["gate"], indent=1))
    elif stage == "unpack":
        if steps is None:
            raise UserError("embedded unpack: --steps is missing; say how many steps the shipped teacher was trained for")
        unpack(package_root(), work, steps)
        print(f"wrote {work / 'unet'}; `embedded teacher` goes on from step {steps}")
    elif stage == "pack":
        for line in pack(work, package_root()):
            print(line)
