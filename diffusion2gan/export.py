"""Writes the student as an ordinary diffusers folder, or as one file in Stable Diffusion's original layout. No training code.

The folder needs nothing of ours: `StableDiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=1,
guidance_scale=1)` runs G, because one DDIM step with trailing spacing and a final alpha-bar of one *is* the
conversion from prediction to x.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.files import (
    atomic_folder,
    atomic_path,
    disk_errors,
    hub_file,
    refuse_other_folder,
    sweep_temporaries_of,
    write_bytes_atomic,
)
from diffusion2gan.pairs.dataset import canonical_json
from diffusion2gan.pipeline import FORMAT, STUDENT_FILE
from diffusion2gan.single_file import original_layout
from diffusion2gan.teachers.folders import FAMILY_OF_CLASS, no_progress_bars, output_gain, student_precision
from diffusion2gan.teachers.load import FAMILIES

PICTURE = "samples.png"
LORA_FACTS = "diffusion2gan_lora.json"
"""Tells our LoRA folders from those of other tools, whose weights have the same file name."""
_OTHER_PROGRAMS = """Other programs, by their source code and not tried: 1 step, guidance (CFG) 1, and in ComfyUI sampler `euler` or `ddim` with
scheduler `sgm_uniform`, in AUTOMATIC1111 `Euler` with schedule type `SGM Uniform` (its DDIM would begin at the wrong end of the schedule).
In diffusers another scheduler than the folder's own must have trailing spacing; Euler's begins from slightly weaker noise."""


@dataclass(frozen=True)
class CardExtras:
    """What a student's card shows beside the facts."""

    picture: bytes | None = None
    """A PNG: samples of the run, teacher beside student."""
    results: str | None = None
    """Markdown: what `evaluate` measured."""
    held_out: str | None = None
    """A sentence: the losses on the pairs that were never trained on."""
    recipe: str | None = None
    """YAML: how it was trained."""
    licence: str | None = None
    """The teacher's, an identifier of the hub; it binds the student too."""
    metric_licence: str | None = None
    """Of the perceptual metric that it was trained with, where that has one."""
    teacher: str = ""
    """Hub id, if it has one."""
    teacher_options: Mapping[str, str] = field(default_factory=dict)
    """`revision` and `variant`, where they are not the repository's own."""


def with_generator(pipeline: Any, generator_weights: dict[str, Tensor], timestep: int) -> Any:
    """The teacher's `pipeline` with G's weights in float32 and a scheduler whose one step is G's x.

    Raises UserError for a timestep that no stock scheduler starts from.
    """
    _check_timestep(pipeline, timestep)
    # float32 first: the weights are rounded once, to the dtype they are stored in.
    network = pipeline.unet.float()
    network.load_state_dict({k.removeprefix("network."): v for k, v in generator_weights.items()})
    return _family(pipeline).one_step_pipeline(pipeline)


def _check_timestep(pipeline: Any, timestep: int) -> None:
    steps = pipeline.scheduler.config.num_train_timesteps
    if timestep != steps - 1:
        raise UserError(
            f"generator.timestep is {timestep}: a stock one-step scheduler starts at {steps - 1}; train with that timestep to export"
        )


def _storage(pipeline: Any, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or getattr(torch, student_precision(output_gain(pipeline.scheduler)))


def _family(pipeline: Any) -> Any:
    return FAMILIES[FAMILY_OF_CLASS[type(pipeline).__name__]]


def _cast(pipeline: Any, dtype: torch.dtype) -> None:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            # Module.to: the pipeline's own `to` warns of layers that these models do not have.
            torch.nn.Module.to(part, dtype)


def export_student(
    pipeline: Any,
    generator_weights: dict[str, Tensor],
    timestep: int,
    folder: Path,
    facts: dict[str, Any],
    dtype: torch.dtype | None,
    extras: CardExtras = CardExtras(),
) -> None:
    """Writes a student folder: the teacher's `pipeline` with G's weights, a one-step scheduler, a card and
    `diffusion2gan.json`.

    `facts` go into the card (recipe, steps, pairs). `dtype`: of the weights; None: by `student_precision`. Raises UserError as
    `with_generator` does, and for an output folder that already holds something else.
    """
    refuse_other_folder(folder, STUDENT_FILE, "student")
    dtype = _storage(pipeline, dtype)
    pipeline = with_generator(pipeline, generator_weights, timestep)
    kind = _family(pipeline)
    card = student_card(facts, dtype, kind.one_step_usage(pipeline), extras, kind.task, output_gain(pipeline.scheduler))
    _cast(pipeline, dtype)
    with atomic_folder(folder, ours=(PICTURE,)) as target:
        with no_progress_bars():
            pipeline.save_pretrained(target, safe_serialization=True)
        _forget_local_paths(target)
        text_in_float32(target)
        write_bytes_atomic(target / STUDENT_FILE, canonical_json({"format": FORMAT, "timestep": timestep} | facts))
        _write_card(target, card, extras)


def text_in_float32(folder: Path) -> None:
    """Where nobody names a precision, transformers loads a model in that of its configuration and diffusers in float32: of a pipeline stored in
    half precision the text would then not fit the U-Net. It is told float32; a precision that is named goes for both."""
    for path in folder.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text())
        if config.get("dtype") != "float32":
            _write_config(path, config | {"dtype": "float32"})


def _forget_local_paths(folder: Path) -> None:
    """diffusers notes in each configuration where it was loaded from; a folder of this machine is nobody's business."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        source = config.get("_name_or_path") if isinstance(config, dict) else None
        if source and Path(source).exists():
            _write_config(path, config | {"_name_or_path": ""})


def _write_config(path: Path, config: dict[str, Any]) -> None:
    """As diffusers and transformers write theirs."""
    write_bytes_atomic(path, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def _write_card(folder: Path, card: str, extras: CardExtras) -> None:
    if extras.picture is not None:
        write_bytes_atomic(folder / PICTURE, extras.picture)
    write_bytes_atomic(folder / "README.md", card.encode())


def export_single_file(
    pipeline: Any, generator_weights: dict[str, Tensor], timestep: int, path: Path, facts: dict[str, Any], dtype: torch.dtype | None
) -> None:
    """Writes one `.safetensors` file in the layout of the original Stable Diffusion checkpoints, for user interfaces; its metadata
    holds `facts`.

    `dtype` as in `export_student`. Raises UserError for a file that is there already, another suffix, or a family without such a
    layout.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a name that ends in .safetensors")
    if path.exists():
        raise UserError(f"{path}: is there already; choose a new name")
    dtype = _storage(pipeline, dtype)
    pipeline = with_generator(pipeline, generator_weights, timestep)
    _cast(pipeline, dtype)
    weights = original_layout(pipeline)
    metadata = {
        "format": "pt",
        "diffusion2gan": canonical_json({"format": FORMAT, "timestep": timestep} | facts).decode(),
        "usage": "one step, sampler euler or ddim with scheduler sgm_uniform (trailing spacing), guidance (CFG) 1",
    }
    sweep_temporaries_of(path)
    with disk_errors(path), atomic_path(path) as draft:
        save_file(weights, draft, metadata)


def export_lora(
    pipeline: Any,
    layers: tuple[dict[str, Tensor], dict[str, Any]],
    timestep: int,
    folder: Path,
    facts: dict[str, Any],
    dtype: torch.dtype | None,
    extras: CardExtras,
    frozen: torch.dtype = torch.float32,
) -> None:
    """Writes a folder with a LoRA of the teacher's `pipeline` (`lora_layers`' result), its card and `diffusion2gan_lora.json`.

    `dtype` as in `export_student`; `frozen` is what the teacher's weights were rounded to when it was trained. Raises UserError as
    `export_student` does.
    """
    refuse_other_folder(folder, LORA_FACTS, "LoRA of ours")
    _check_timestep(pipeline, timestep)
    dtype = _storage(pipeline, dtype)
    weights, metadata = {k: v.to(dtype) for k, v in layers[0].items()}, layers[1]
    name = type(pipeline).__name__
    # The teacher's own size may be another one.
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    loaded = ", ".join([f'"{extras.teacher or "the teacher"}"', *(f'{k}="{v}"' for k, v in extras.teacher_options.items())])
    usage = [
        f"from diffusers import DDIMScheduler, {name}",
        f"pipeline = {name}.from_pretrained({loaded})",
        'pipeline.load_lora_weights("this folder")',
        "pipeline.scheduler = DDIMScheduler.from_config(",
        '    pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False',
        ")",
        f'image = pipeline("red heart", height={side}, width={side}, num_inference_steps=1, guidance_scale=1).images[0]',
    ]
    if frozen in (torch.float16, torch.bfloat16):
        usage.insert(0, "import torch")
        usage.insert(3, f"pipeline.unet.to({frozen}).to(torch.float32)  # rounded as the LoRA knows it")
    card = student_card(facts, dtype, "\n".join(usage), extras, _family(pipeline).task, output_gain(pipeline.scheduler))
    with atomic_folder(folder, ours=(PICTURE,)) as target:
        pipeline.save_lora_weights(target, unet_lora_layers=weights, unet_lora_adapter_metadata=metadata)
        write_bytes_atomic(target / LORA_FACTS, canonical_json({"format": FORMAT, "timestep": timestep} | facts))
        _write_card(target, card, extras)


def push_to_hub(folder: Path, repository: str, private: bool) -> str:
    """Uploads a student folder to a model repository of the hub, which is made if there is none; returns its address.

    Raises UserError when the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(made.repo_id).private:
            raise UserError(
                f"--push-to-hub {repository} --private: that repository is there already, and public; name another, or change it on the hub first"
            )
        # An index or a shard of an earlier upload would be loaded instead of what comes now.
        stale = ["*/*.safetensors", "*/*.safetensors.index.json"]
        message = "A one-step student of diffusion2gan"
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message, delete_patterns=stale)
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = in_one_line(error)
        raise UserError(
            f"--push-to-hub {repository}: {reason}; the student is whole in {folder}: log in (`hf auth login`) and export again"
        ) from None
    return str(made)


def licence_of(folder: Path) -> str | None:
    """The licence that a model folder's own card declares, as the hub writes it."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    if not text.startswith("---"):
        return None
    try:
        front = yaml.safe_load(text.split("---", 2)[1])
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def hub_licence(repository: str, revision: str | None = None) -> str | None:
    """The same of a hub repository, from its card; None when it cannot be read."""
    try:
        return licence_of(hub_file(repository, "README.md", revision).parent)
    except (OSError, ValueError):
        return None


def student_card(facts: dict[str, Any], dtype: torch.dtype, usage: str, extras: CardExtras, task: str, gain: float | None) -> str:
    """The model card, Markdown with the hub's front matter. `gain`: what multiplies the network's last output, if anything."""
    stored = str(dtype).removeprefix("torch.")
    rounding = ""
    if gain is not None:
        best = "float32" if student_precision(gain) == "float32" else "float32 or float16"
        rounding = f" Run in {best}: the last layer's output is multiplied by {gain:.1f}, so what rounds it becomes visible grain."
    lines = "\n".join(f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items())
    front = {"library_name": "diffusers", "pipeline_tag": task, "tags": ["diffusion2gan", "one-step"]}
    front |= {"license": extras.licence or "other"}
    # Only of a hub id: a path says nothing elsewhere.
    front |= {"base_model": extras.teacher} if extras.teacher.count("/") == 1 else {}
    measured = [text.strip() for text in (extras.results, extras.held_out) if text]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# A one-step student",
        "Distilled with diffusion2gan. It draws in one network evaluation what its teacher draws in many, from the same noise.",
        f"![the teacher's pictures and the student's, from the same noises]({PICTURE})" if extras.picture is not None else "",
        f"```python\n{usage}\n```",
        f"Weights are stored in {stored}.{rounding}",
        _OTHER_PROGRAMS if task == "text-to-image" else "",
        "## Measured\n\n" + "\n\n".join(measured) if measured else "",
        f"## How it was made\n\n{lines}",
        f"<details><summary>The recipe</summary>\n\n```yaml\n{extras.recipe.strip()}\n```\n\n</details>" if extras.recipe else "",
        f"## Licence\n\nThat of its teacher, whose weights it started from: {extras.licence or 'see there'}."
        + (f" The metric that it was trained with is under {extras.metric_licence}." if extras.metric_licence else ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
