"""A recipe: one YAML file, one experiment. Sections are composed here; each section's fields live beside what they configure.

base: emoji            # another recipe, by name or path; this file holds only the lines that differ
loss: {distance: mse}
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import ValidationError, model_validator

from diffusion2gan.config import HOW_KEPT, Section, settings_difference, store_difference
from diffusion2gan.discriminator.multi_scale import DiscriminatorConfig
from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.generator import GeneratorConfig
from diffusion2gan.pairs.simulate import PairsConfig
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.training.adversarial import AdversarialConfig
from diffusion2gan.training.distance import LossConfig
from diffusion2gan.training.trainer import TrainingConfig


class Recipe(Section):
    """The resolved recipe: what `RUN/recipe.yaml` holds."""

    name: str
    """What the run, its student and its tables are called."""
    description: str = ""
    """One line, shown by `diffusion2gan recipes`."""
    teacher: TeacherConfig = TeacherConfig()
    pairs: PairsConfig
    generator: GeneratorConfig = GeneratorConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig
    adversarial: AdversarialConfig | None = None
    """Phase 2; without it, ODE distillation is all."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    @property
    def total_steps(self) -> int:
        """Optimiser steps of both phases."""
        return self.training.steps + (self.adversarial.steps if self.adversarial else 0)

    @property
    def phase_2_batch_size(self) -> int:
        """Global batch of phase 2: its own, or without one `training.batch_size`."""
        return (self.adversarial and self.adversarial.batch_size) or self.training.batch_size

    def samples(self, steps: int) -> int:
        """Training samples seen in the first so many steps of the run."""
        in_phase_2 = max(0, steps - self.training.steps)
        return (steps - in_phase_2) * self.training.batch_size + in_phase_2 * self.phase_2_batch_size

    @model_validator(mode="after")
    def _across_sections(self) -> Recipe:
        if self.training.holdout >= self.pairs.count:
            raise ValueError(f"training.holdout is {self.training.holdout}, expected fewer than pairs.count ({self.pairs.count})")
        if self.teacher.dtype == "float64" and self.training.mixed_precision != "no":
            raise ValueError("training.mixed_precision is bf16 with a float64 teacher, expected no")
        if self.generator.lora_rank is not None and self.teacher.dtype == "float16":
            raise ValueError(
                "teacher.dtype is float16 with generator.lora_rank, expected bfloat16 or float32: small gradients vanish in float16"
            )
        if self.training.shard:
            self._check_sharding()
        if self.training.zero:
            self._check_zero()
        elif self.training.zero_offload:
            raise ValueError("training.zero_offload is true and training.zero is 0, expected 1 or 2")
        self._check_phase_2()
        if self.training.steps == 0 and self.adversarial is None:
            raise ValueError("training.steps is 0 and there is no adversarial section, expected at least 1: nothing would be trained")
        return self

    def _check_sharding(self) -> None:
        """What was tried with FSDP2, and what cannot work: double backward through it."""
        adversarial = self.adversarial
        if self.training.compile:
            raise ValueError("training.compile is true with training.shard, expected false: choose one")
        for key, unlike in (("optimizer", "adamw"), ("ema_on_cpu", False)):
            if getattr(self.training, key) != unlike:
                raise ValueError(f"training.{key} is {getattr(self.training, key)} with training.shard, expected {unlike}: choose one")
        if self.generator.lora_rank is not None:
            raise ValueError("generator.lora_rank is set with training.shard, expected one of them: a LoRA's optimiser is small without it")
        if adversarial is not None and adversarial.weight and adversarial.r1 == "exact":
            raise ValueError(
                "adversarial.r1 is exact with training.shard, expected finite_difference: split weights have no double backward"
            )

    def _check_zero(self) -> None:
        """What was tried with DeepSpeed."""
        training = self.training
        if self.adversarial is not None:
            raise ValueError(
                f"training.zero is {training.zero} with an adversarial section, expected 0: it is for phase 1 alone (training.shard does both)"
            )
        for key, unlike in (("shard", False), ("compile", False), ("optimizer", "adamw")):
            if getattr(training, key) != unlike:
                raise ValueError(f"training.{key} is {getattr(training, key)} with training.zero, expected {unlike}: choose one")
        if self.generator.lora_rank is not None:
            raise ValueError("generator.lora_rank is set with training.zero, expected one of them: a LoRA's optimiser is small without it")

    def _check_phase_2(self) -> None:
        adversarial, batch, micro = self.adversarial, self.phase_2_batch_size, self.training.micro_batch_size
        if adversarial is None:
            return
        if micro and batch % micro:
            raise ValueError(f"adversarial.batch_size is {batch}, expected a multiple of training.micro_batch_size ({micro})")
        if not adversarial.weight:
            return
        if adversarial.other_noise and not self.discriminator.noise:
            raise ValueError(
                f"adversarial.other_noise is {adversarial.other_noise:g} and discriminator.noise is false, expected 0: a discriminator that does "
                "not see the noise would be told that a real latent is fake"
            )
        if adversarial.r1 != "none" and adversarial.r1_count is not None and batch % adversarial.r1_count:
            raise ValueError(f"adversarial.r1_count is {adversarial.r1_count}, expected a divisor of phase 2's batch size ({batch})")


class _Yaml(yaml.SafeLoader):
    """A safe loader whose numbers may be written 3e-4 too: PyYAML, which keeps to YAML 1.1, reads that as text."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Raises YAMLError for a key that is there twice, of which the last would count. As it is written: merged keys come later."""
        node = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is there twice", node.start_mark)
        return cast(yaml.MappingNode, node)


class _Dumper(yaml.SafeDumper):
    """Its counterpart: quotes text that looks like such a number."""


for _side in (_Yaml, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _yaml(text: str) -> Any:
    return yaml.load(text, _Yaml)


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name (`emoji`, `ablations/mse`)."""
    root = Path(str(resources.files("diffusion2gan") / "recipes"))
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


def _find(name: str, beside: Path | None = None) -> Path:
    candidates = [Path(name)] if beside is None else [beside.parent / name, beside.parent / f"{name}.yaml", Path(name)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    builtin = builtin_recipes()
    if name in builtin:
        return builtin[name]
    close = difflib.get_close_matches(name, builtin, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the built-in ones are {', '.join(builtin)}"
    raise UserError(f"recipe {name!r}: no such file or built-in recipe; {hint}")


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: base recipes go round in a circle; remove one `base:` line")
    try:
        values = _yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({in_one_line(error)}); mend the file") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(values).__name__}; see the built-in recipes for examples")
    base = values.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: base is {base!r}, expected the name or path of a recipe")
    return merge(_read(_find(base, path), (*seen, path.resolve())), values) if base else values


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    result = dict(base)
    for key, value in changes.items():
        result[key] = merge(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
    return result


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"--set {override}: expected section.key=value, for example --set training.steps=1000")
    *sections, last = key.split(".")
    target = values
    for section in sections:
        if target.get(section) is None:  # not there, or left out as `adversarial: null` is
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise UserError(f"--set {override}: {section} is not a section; name a key inside a section")
    try:
        target[last] = _yaml(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not a YAML value; quote it") from None


def _allowed_keys(location: Sequence[Any]) -> list[str]:
    model: Any = Recipe
    for part in location[:-1]:
        annotation = model.model_fields.get(part)
        model = annotation.annotation if annotation else None
        # A section that may be left out.
        model = next((m for m in get_args(model) if m is not type(None)), model)
        if not (isinstance(model, type) and issubclass(model, Section)):
            return []
    return list(model.model_fields)


def _one_line(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(p) for p in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        allowed = _allowed_keys(first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        return f"{source}: unknown key {key}; {'did you mean ' + close[0] + '? ' if close else ''}allowed here: {', '.join(allowed)}"
    if first["type"] == "missing":
        return f"{source}: {key} is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{source}: {key + ': ' if first['loc'] else ''}{message}"
    return f"{source}: {key} is {first['input']!r}: {message[0].lower() + message[1:]}"


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Checks a mapping. Raises UserError: one line naming the key and what is allowed."""
    try:
        # Through JSON mode: YAML has lists where the sections have tuples.
        return Recipe.model_validate_json(_json(values))
    except ValidationError as error:
        raise UserError(_one_line(error, source)) from None


def _json(values: dict[str, Any]) -> str:
    import json

    try:
        return json.dumps(values)
    except TypeError as error:
        raise UserError(f"recipe: a value that is neither text, number, list nor section ({error}); quote it") from None


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by path or built-in name, with its bases and `section.key=value` overrides. Raises UserError."""
    values = _read(_find(name))
    for override in overrides:
        _apply_override(values, override)
    return parse_recipe(values, name)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_training(recipe: Recipe) -> str:
    """As `dump_recipe`, of how a student was trained, without the names of folders: they say nothing elsewhere."""
    sections = recipe.model_dump(mode="json", include={"generator", "loss", "training", "adversarial", "discriminator"})
    del sections["generator"]["start"]
    if Path(recipe.loss.perceptual).exists():
        sections["loss"]["perceptual"] = "a folder"
    return yaml.dump(sections, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# What may differ when a run is continued: how far it goes, how often it reports, how it fits into memory. Everything else is
# another experiment.
_FREE_TO_CHANGE = {
    "name",
    "description",
    "training.steps",
    "adversarial.steps",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.log_every",
}
_FREE_TO_CHANGE |= {f"pairs.{key}" for key in HOW_KEPT}
_FREE_TO_CHANGE |= {
    # The digest of the weights, which the store and the run have, says whether they are others.
    "teacher.source",
    "teacher.revision",
    "training.micro_batch_size",
    "training.shard",
    "training.zero",
    "training.zero_offload",
    "training.ema_on_cpu",
    "training.compile",
    "generator.gradient_checkpointing",
    "discriminator.gradient_checkpointing",
    "training.validate_every",
    "training.sample_every",
    "training.sample_count",
}


def check_same_experiment(recipe: Recipe, saved: Recipe, folder: Path) -> None:
    """Raises UserError naming the first setting in which a run folder's recipe differs from `recipe`."""
    for key, ours, theirs in settings_difference(recipe.model_dump(mode="json"), saved.model_dump(mode="json")):
        if key not in _FREE_TO_CHANGE:
            raise UserError(
                f"{folder}: a run of another recipe: {key} is {theirs!r} there and {ours!r} now; choose a new --out, or mend the recipe"
            )


def check_pairs(recipe: Recipe, settings: dict[str, Any], manifest: dict[str, Any], store: Path) -> None:
    """Raises UserError naming the first setting in which a pair store is not the one that `recipe` asks for."""
    skip = HOW_KEPT | {"noise_recipe", "shards", "fingerprint"}
    ours = {k: v for k, v in settings.items() if k not in skip}
    theirs = {k: v for k, v in manifest.items() if k not in skip}
    for key, a, b in store_difference(ours, theirs):
        raise UserError(f"pairs.{key}: the store {store} has {b!r}, the recipe {a!r}; simulate pairs for this recipe, or mend the recipe")
