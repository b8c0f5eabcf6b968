"""What a teacher's folder or hub id may be, and how it is opened: kind, variant, revision, resolution; what is read of a prompt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from diffusion2gan.errors import UserError
from diffusion2gan.export import export_student
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.pipeline import OneStepPipeline
from diffusion2gan.recipe import load_recipe
from diffusion2gan.teachers import folders
from diffusion2gan.teachers.folders import PIPELINES, family_of, load_pipeline, stored_weights
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import SolverConfig, solve_ode
from diffusion2gan.teachers.pixel import PixelTeacher
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.published import REVISIONS
from diffusion2gan.teachers.sdxl import SDXLTeacher
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.conftest import tiny_pipeline, tiny_pixel_pipeline, tiny_pixel_unet, tiny_sdxl_pipeline

PROMPTS = ["red heart", "blue cat"]


def _saved(pipeline: Any, folder: Path, class_name: str | None = None, **unet: Any) -> TeacherConfig:
    """The configuration of a folder with `pipeline`, its U-Net otherwise built, and said to be of another class."""
    if unet:
        pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | unet)
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    if class_name:
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": class_name}))
    families = {"StableDiffusionXLPipeline": "sdxl", "DDPMPipeline": "pixel"}
    return TeacherConfig.model_validate({"family": families.get(index["_class_name"], "stable_diffusion"), "source": str(folder)})


# --- What it may be -------------------------------------------------------------------------------------------------
def test_pipelines_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a StableDiffusionInpaintPipeline, expected a StableDiffusionPipeline, .*; name another"):
        load_teacher(_saved(tiny_pipeline(), tmp_path / "a", "StableDiffusionInpaintPipeline", in_channels=9))
    with pytest.raises(UserError, match="is a StableDiffusionXLImg2ImgPipeline, expected"):
        load_teacher(_saved(tiny_sdxl_pipeline(), tmp_path / "b", "StableDiffusionXLImg2ImgPipeline"))


def test_pipelines_with_code_of_their_own(tmp_path: Path) -> None:
    config = _saved(tiny_pipeline(), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Mine"]}))
    assert family_of(tmp_path) is None
    with pytest.raises(UserError, match=r"is a \['pipeline', 'Mine'\], expected a StableDiffusionPipeline"):
        load_teacher(config)


@pytest.mark.parametrize("channels", [{"in_channels": 9}, {"out_channels": 8}, {"in_channels": 8, "out_channels": 8}])
def test_networks_that_read_more_than_latent_and_text(channels: dict[str, int], tmp_path: Path) -> None:
    reads, gives = channels.get("in_channels", 4), channels.get("out_channels", 4)
    with pytest.raises(UserError, match=f"network reads {reads} channels and gives {gives}, its autoencoder has 4, expected one number"):
        load_teacher(_saved(tiny_pipeline(), tmp_path, **channels))


@pytest.mark.parametrize("missing", [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")])
def test_missing_encoders(missing: tuple[str, str], tmp_path: Path) -> None:
    """SDXL's refiner has the second encoder alone."""
    pipeline = tiny_sdxl_pipeline()
    pipeline.register_modules(**dict.fromkeys(missing))
    with pytest.raises(UserError, match=f"the teacher has no {', '.join(missing)}, expected a model that draws from text alone"):
        load_teacher(_saved(pipeline, tmp_path))


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "pixel"])
def test_nobody_on_the_hub(family: str) -> None:
    with pytest.raises(UserError) as error:
        load_teacher(TeacherConfig.model_validate({"family": family, "source": "nobody/nothing"}))
    said = str(error.value)
    assert said.startswith("teacher.source: nobody/nothing is not whole in the hub's cache, and could not be fetched (")
    assert said.endswith("; go online once, or name a folder")
    assert "\n" not in said
    assert len(said) < 320


# --- Which of its weights -------------------------------------------------------------------------------------------
def test_a_variant_beside_plain_files(tmp_path: Path) -> None:
    tiny_pipeline(seed=0).save_pretrained(tmp_path)
    tiny_pipeline(seed=1).save_pretrained(tmp_path, variant="fp16")
    plain, half = (TeacherConfig(source=str(tmp_path), variant=v) for v in (None, "fp16"))
    teachers = [load_teacher(c) for c in (plain, half)]
    for seed, teacher in enumerate(teachers):
        pipeline = tiny_pipeline(seed=seed)
        for ours, theirs in ((teacher.network, pipeline.unet), (teacher.text_encoder, pipeline.text_encoder)):
            expected = theirs.state_dict()
            assert all(torch.equal(v, expected[k]) for k, v in ours.state_dict().items())
    first, second = (t.identity() for t in teachers)
    assert {k for k in first if first[k] != second[k]} == {"weights"}
    assert [stored_weights(c, tmp_path) for c in (plain, half)] == [first["weights"], second["weights"]]
    # Of the files that are read, not of all that are there.
    tiny_pipeline(seed=0).save_pretrained(tmp_path / "alone")
    assert stored_weights(plain, tmp_path / "alone") == first["weights"]


def test_the_hub_is_asked_for_revision_and_variant(tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tiny_teacher_folder)

    monkeypatch.setattr(StableDiffusionPipeline, "download", download)
    config = TeacherConfig(source="somebody/model", revision="a1b2c3")
    teacher = load_teacher(config)
    assert teacher.identity()["source"] == f"somebody/model@{tiny_teacher_folder.name}"
    assert stored_weights(config, config.source) == teacher.identity()["weights"]
    load_pipeline(TeacherConfig(source="somebody/model"), "somebody/model", torch.float32)
    assert len(asked) >= 3
    assert [o["revision"] for _, o in asked] == ["a1b2c3"] * (len(asked) - 1) + [None]
    assert all(name == "somebody/model" and o["use_safetensors"] and o["variant"] is None for name, o in asked)


def test_weights_are_hashed_when_somebody_asks(tiny_teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and not in order to draw: a large model's are gigabytes."""
    asked: list[Path] = []
    own = folders._files_digest

    def digest(folder: Path, variant: str | None) -> str:
        asked.append(folder)
        return own(folder, variant)

    monkeypatch.setattr(folders, "_files_digest", digest)
    teacher = load_teacher(TeacherConfig(source=str(tiny_teacher_folder)))
    pipeline = tiny_pipeline()
    export_student(pipeline, pipeline.unet.state_dict(), 999, tmp_path / "student", {}, torch.float32)
    OneStepPipeline.from_pretrained(tmp_path / "student", "float32").generate(["red heart"], [7])
    assert not asked
    assert teacher.identity() == teacher.identity() and asked == [tiny_teacher_folder]


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "pixel"])
def test_published_teachers_are_read_at_the_commit_on_record(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a recipe means the same weights next year; another revision is taken when it is named."""
    source = {
        "stable_diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
        "pixel": "google/ddpm-cifar10-32",
    }[family]
    assert source in {load_recipe(n).teacher.source for n in ("sd15_cfg3", "sdxl_cfg7", "cifar10_ddpm")}
    asked: list[str | None] = []

    def download(name: str, revision: str | None, **_options: Any) -> str:
        asked.append(revision)
        raise OSError("not in the cache")

    monkeypatch.setattr(PIPELINES[family], "download", download)
    pinned = f"has model_index.json, or teacher.revision=main for another commit than {REVISIONS[source][:12]}$"
    for config, told in (
        ({"source": source}, pinned),
        ({"source": source, "revision": "main"}, "has model_index.json$"),
        ({"source": "somebody/else"}, "has model_index.json$"),
    ):
        with pytest.raises(UserError, match=told):
            load_teacher(TeacherConfig.model_validate({"family": family, **config}))
    assert asked == [REVISIONS[source], "main", None]
    assert all(re.fullmatch("[0-9a-f]{40}", r) for r in REVISIONS.values())


# --- At which resolution --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("build", "kind"), [(tiny_pipeline, StableDiffusionTeacher), (tiny_sdxl_pipeline, SDXLTeacher)])
def test_another_resolution_is_the_stock_pipelines(build: Any, kind: Any, tmp_path: Path) -> None:
    """Twice the network's own 16 pixels."""
    stored = _saved(build(), tmp_path)
    config = stored.model_copy(update={"resolution": 32, "dtype": "float64"})
    teacher = load_teacher(config)
    assert isinstance(teacher, kind)
    assert teacher.latent_shape == (4, 16, 16)
    pipeline = build().to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    stock = pipeline(
        PROMPTS, height=32, width=32, num_inference_steps=5, guidance_scale=3.0, latents=noise.clone(), output_type="latent"
    ).images
    ours = solve_ode(teacher, noise, teacher.encode_prompts(PROMPTS), teacher.encode_negative(), SolverConfig(steps=5))
    assert (ours - stock).abs().mean().item() < 1e-9
    assert ours.abs().mean() > 0.1
    assert teacher.decode(ours).shape == (2, 3, 32, 32)


def test_the_own_resolution_needs_no_name(tmp_path: Path) -> None:
    config = _saved(tiny_pipeline(), tmp_path)
    plain, same, twice = (load_teacher(config.model_copy(update={"resolution": r})).identity() for r in (None, 16, 32))
    assert "resolution" not in plain
    assert same == plain
    assert twice == plain | {"resolution": 32}


@pytest.mark.parametrize(
    ("build", "size", "said"),
    [
        (
            tiny_pipeline,
            33,
            "teacher.resolution is 33, expected a multiple of 2, by which its autoencoder shrinks pictures; choose another",
        ),
        (
            tiny_pixel_pipeline,
            9,
            "teacher.resolution is 9, expected a multiple of 2, by which its network shrinks pictures; choose another",
        ),
    ],
)
def test_a_resolution_that_cannot_be(build: Any, size: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_teacher(_saved(build(), tmp_path).model_copy(update={"resolution": size}))


def test_pixels_at_another_resolution(tmp_path: Path) -> None:
    teacher = load_teacher(_saved(tiny_pixel_pipeline(), tmp_path).model_copy(update={"resolution": 12}))
    assert teacher.latent_shape == (3, 12, 12)
    noise = torch.from_numpy(draw_noise([1], teacher.latent_shape))
    x = solve_ode(teacher, noise, teacher.encode_prompts([""]), None, SolverConfig(steps=2, guidance=1))
    assert teacher.decode(x).shape == (1, 3, 12, 12)


def test_a_student_keeps_its_resolution(tmp_path: Path) -> None:
    config = _saved(tiny_sdxl_pipeline(), tmp_path / "teacher").model_copy(update={"resolution": 32})
    pipeline = load_pipeline(config, config.source, torch.float32)
    weights = {f"network.{k}": v for k, v in pipeline.unet.state_dict().items()}
    export_student(pipeline, weights, 999, tmp_path / "student", {}, torch.float32)
    student = OneStepPipeline.from_pretrained(tmp_path / "student")
    assert student("cat", output_type="uint8").shape == (1, 32, 32, 3)
    assert student.teacher.encode_prompts(["cat"]).added["time_ids"].tolist() == [[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]


# --- What it reads of a prompt --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("build", "kind"), [(tiny_pipeline, StableDiffusionTeacher), (tiny_sdxl_pipeline, SDXLTeacher)])
def test_prompts_are_equal_where_the_condition_is(build: Any, kind: Any) -> None:
    teacher = kind.from_pipeline(build())
    # The tiny tokenizers lower their input's case and keep six letters.
    for first, second, equal in (
        ("Red Heart", "red heart", True),
        ("  red   heart", "red heart", True),
        ("red heart", "red heading", True),
        ("red hat", "red cat", False),
        ("", "cat", False),
    ):
        one, two = teacher.reads([first, second])
        assert (one == two) is equal, (first, second)
        assert (hash(one) == hash(two)) is equal
        a, b = (teacher.encode_prompts([p]).embeddings for p in (first, second))
        assert torch.equal(a, b) is equal, (first, second)


def test_both_tokenizers_are_asked() -> None:
    pipeline = tiny_sdxl_pipeline()
    teacher = SDXLTeacher.from_pipeline(pipeline)
    first = pipeline.tokenizer
    # The first one knows no digits: to it they are one unknown token.
    assert first("7").input_ids == first("8").input_ids
    assert len(set(teacher.reads(["7", "8"]))) == 1
    pipeline.tokenizer_2.add_tokens(["8"])
    assert len(set(teacher.reads(["7", "8"]))) == 2


def test_pixels_read_a_class_or_nothing() -> None:
    nothing = PixelTeacher.from_pipeline(tiny_pixel_pipeline())
    assert len(set(nothing.reads(["cat", "red heart", ""]))) == 1
    classes = PixelTeacher(tiny_pixel_unet(classes=10), dict(DDPMScheduler().config))
    seven, also, eight = classes.reads(["7", "07", "8"])
    assert seven == also != eight
    with pytest.raises(UserError, match="expected the number of a class, 0 to 9"):
        classes.reads(["cat"])


def test_another_noise_schedule_is_refused() -> None:
    """EDM's and flow matching's have no betas: DDIM would take its own instead."""
    for scheduler in (EDMDPMSolverMultistepScheduler(), FlowMatchEulerDiscreteScheduler()):
        pipeline = tiny_sdxl_pipeline()
        pipeline.scheduler = scheduler
        with pytest.raises(UserError, match="another noise schedule"):
            SDXLTeacher.from_pipeline(pipeline)


def test_nothing_clips_latents() -> None:
    """Neither where the configuration says nothing of it, as early repositories' do not."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    assert pipeline.scheduler.config.clip_sample
    assert not StableDiffusionTeacher.from_pipeline(pipeline).scheduler_config["clip_sample"]


def test_a_proxy_that_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.HTTPError("403 Forbidden by the proxy")

    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    with pytest.raises(UserError, match=r"could not be asked for on the hub \(403 Forbidden by the proxy\); set HF_HUB_OFFLINE=1"):
        load_teacher(TeacherConfig(source="nobody/nothing"))


def test_folders_whose_weights_are_of_another_kind(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    half = TeacherConfig(source=str(tmp_path / "half"))
    with pytest.raises(UserError, match=r"has weights of variant fp16 alone; set teacher.variant=fp16$"):
        load_teacher(half)
    assert load_teacher(half.model_copy(update={"variant": "fp16"})).latent_shape == (4, 8, 8)
    (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(
        tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"
    )
    with pytest.raises(UserError, match=r"has weights of variant fp16 alone"):
        load_teacher(half)
    tiny_pipeline().save_pretrained(tmp_path / "half")  # both, and something else is wrong
    (tmp_path / "half" / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="is not a diffusers folder or hub id of family stable_diffusion"):
        load_teacher(half)
    tiny_pipeline().save_pretrained(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*/*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"has pickled weights \(.bin\) alone"):
        load_teacher(TeacherConfig(source=str(tmp_path / "whole")))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is one file, expected a diffusers folder; make one: StableDiffusionPipeline.from_single_file"):
        load_teacher(TeacherConfig(source=str(tmp_path / "model.safetensors")))
