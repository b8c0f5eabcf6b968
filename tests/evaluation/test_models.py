"""What `evaluate` can draw with: each kind of model against the stock pipeline, on tiny random networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import save_file

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import models
from diffusion2gan.evaluation.commands import _teacher_of
from diffusion2gan.evaluation.evaluate import noise_seed
from diffusion2gan.evaluation.models import (
    PRESETS,
    Model,
    ModelOptions,
    RectifiedFlowScheduler,
    _family,
    _step_noise,
    check_steps,
    load_model,
    pipeline_model,
)
from diffusion2gan.export import export_student
from diffusion2gan.images import to_uint8
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.published import REVISIONS
from tests.conftest import tiny_pipeline, tiny_sdxl_pipeline

PROMPTS, SEEDS = ["cat", "sun", "cat"], [5, 6, 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    tiny_pipeline().save_pretrained(root / "sd")
    tiny_sdxl_pipeline().save_pretrained(root / "sdxl")
    return {"sd": root / "sd", "sdxl": root / "sdxl"}


def stock(pipeline: Any, steps: int, guidance: float) -> np.ndarray:
    """The pipeline's own call, one picture at a time."""
    pipeline.set_progress_bar_config(disable=True)
    shape = (pipeline.unet.config.in_channels, *[pipeline.unet.config.sample_size] * 2)
    out = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        noise = torch.from_numpy(draw_noise([seed], shape))
        pixels = pipeline(prompt, latents=noise, num_inference_steps=steps, guidance_scale=guidance, output_type="pt").images
        out.append(to_uint8(2 * pixels - 1))
    return np.concatenate(out)


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal but for a rounding on the edge of two levels."""
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 1 and (ours != theirs).mean() < 0.01


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_pipeline_draws_what_its_own_call_draws(folders: dict[str, Path], kind: str, batch: int) -> None:
    model = pipeline_model(str(folders[kind]), kind, 3, 2.5, "float32", "cpu", batch)
    make = tiny_pipeline if kind == "sd" else tiny_sdxl_pipeline
    assert_close(model.draw(PROMPTS, SEEDS), stock(make(), 3, 2.5))


def test_identity_names_weights_and_settings(folders: dict[str, Path]) -> None:
    def identity(steps: int = 3, guidance: float = 2.0, kind: str = "sd") -> dict:
        return dict(pipeline_model(str(folders[kind]), "any name", steps, guidance, "float32", "cpu", 4).identity)

    first = identity()
    assert first == identity()
    assert all(first != other for other in (identity(steps=4), identity(guidance=3.0), identity(kind="sdxl")))


def test_who_follows_steps_and_guidance(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ModelOptions(steps=4, guidance=2.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lcm").mkdir()  # an evaluation of the model of that name
    for specs in (["lcm"], ["teacher:embedded"], ["embedded", "teacher:embedded"], [str(folders["sd"])], ["someone/pipeline"]):
        check_steps(specs, asked)
    check_steps(["embedded"], ModelOptions())
    for specs, said in ((["embedded", str(tmp_path)], "embedded is a student or a folder of pictures"), ([], "was evaluated already")):
        with pytest.raises(UserError, match=f"--steps 4 --guidance 2.0: .*{said}"):
            check_steps(specs, asked)


def test_cut_off_pixels_are_another_model_and_darker(folders: dict[str, Path], tmp_path: Path) -> None:
    models = {
        q: [
            load_model(f"teacher:{folders['sd']}", ModelOptions(steps=2, guidance=2.0, quantiser=q)),
            pipeline_model(str(folders["sd"]), "any name", 2, 2.0, "float32", "cpu", 4, quantiser=q),
        ]
        for q in ("round", "trunc")
    }
    for rounded, cut in zip(models["round"], models["trunc"], strict=True):
        assert cut.identity["quantiser"] == "trunc" and "quantiser" not in rounded.identity
        assert {k: v for k, v in cut.identity.items() if k != "quantiser"} == rounded.identity
        assert (rounded.quantiser, cut.quantiser) == ("round", "trunc")
        difference = rounded.draw(PROMPTS, SEEDS).astype(int) - cut.draw(PROMPTS, SEEDS)
        assert set(np.unique(difference)) == {0, 1} and 0.3 < difference.mean() < 0.7
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "a.png")
    assert load_model(str(tmp_path / "pictures"), ModelOptions()).quantiser is None
    with pytest.raises(UserError, match="whole numbers already"):
        load_model(str(tmp_path / "pictures"), ModelOptions(quantiser="trunc"))


def test_a_teacher_draws_what_its_solver_solves(folders: dict[str, Path]) -> None:
    model = load_model(f"teacher:{folders['sd']}", ModelOptions(steps=4, guidance=2.0, batch_size=2))
    assert_close(model.draw(PROMPTS, SEEDS), stock(tiny_pipeline(), 4, 2.0))


def test_a_teacher_at_another_resolution(folders: dict[str, Path]) -> None:
    source = f"teacher:{folders['sd']}"
    own, larger = (load_model(source, ModelOptions(steps=2, guidance=2.0, resolution=r)) for r in (None, 32))
    assert own.draw(PROMPTS[:1], SEEDS[:1]).shape[1:3] == (16, 16) and larger.draw(PROMPTS[:1], SEEDS[:1]).shape[1:3] == (32, 32)
    assert own.identity == {k: v for k, v in larger.identity.items() if k != "resolution"} and larger.identity["resolution"] == 32
    # The teacher of a student of that size, from its card.
    student = replace(own, facts={"teacher": str(folders["sd"]), "ode": {"steps": 2, "guidance": 2.0}, "resolution": 32})
    teacher, why = _teacher_of(student, None, ModelOptions())
    assert teacher is not None, why
    assert teacher.latent_shape == larger.latent_shape == (4, 16, 16)


def test_an_sdxl_teacher_is_known_by_its_folder(folders: dict[str, Path]) -> None:
    model = load_model(f"teacher:{folders['sdxl']}", ModelOptions(steps=3, guidance=2.5, batch_size=2))
    assert_close(model.draw(PROMPTS, SEEDS), stock(tiny_sdxl_pipeline(), 3, 2.5))


def test_noise_on_the_way_is_another_for_every_sample_and_block() -> None:
    seeds = [noise_seed(sample, block) for sample in (0, 1, 1 << 33) for block in (0, 1, 128)]
    drawn = {float(torch.randn(1, generator=_step_noise(s))) for s in seeds}
    assert len(drawn) == len(seeds)


def test_a_pipeline_of_another_kind_is_refused_in_words(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="DDPMPipeline has no vae"):
        load_model(str(tmp_path), ModelOptions(steps=1, guidance=1.0))


# --- Presets --------------------------------------------------------------------------------------------------------
def test_one_rectified_flow_step_adds_the_velocity() -> None:
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [1000.0]
    z, v = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.equal(scheduler.step(v, 1000.0, z)[0], z + v)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]
    assert torch.allclose(scheduler.step(v, 750.0, z)[0], z + v / 4)


def test_instaflow_is_noise_plus_one_evaluation(folders: dict[str, Path]) -> None:
    model = pipeline_model(str(folders["sd"]), "instaflow", 1, 1.0, "float32", "cpu", 4, PRESETS["instaflow"].prepare)
    pipeline = tiny_pipeline()
    noise = torch.from_numpy(draw_noise(SEEDS, (4, 8, 8)))
    with torch.no_grad():
        ids = pipeline.tokenizer(
            PROMPTS, padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        velocity = pipeline.unet(noise, 1000.0, pipeline.text_encoder(ids)[0]).sample
        pixels = pipeline.vae.decode((noise + velocity) / pipeline.vae.config.scaling_factor).sample
    assert_close(model.draw(PROMPTS, SEEDS), to_uint8(pixels))


def test_lightning_takes_its_own_network_and_predicts_the_sample(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(9)
    other = tiny_sdxl_pipeline(seed=3).unet
    save_file(other.state_dict(), tmp_path / "unet.safetensors")
    asked: list[tuple] = []

    def download(*arguments: str, revision: str | None) -> str:
        asked.append(arguments)
        assert revision is None
        return str(tmp_path / "unet.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    seen: list[Any] = []

    def prepare(pipeline: Any) -> None:
        PRESETS["sdxl-lightning"].prepare(pipeline)  # type: ignore[misc]
        seen.append(pipeline)

    pipeline_model(str(folders["sdxl"]), "lightning", 1, 0.0, "float32", "cpu", 4, prepare).draw(PROMPTS, SEEDS)
    (pipeline,) = seen
    assert asked == [("ByteDance/SDXL-Lightning", "sdxl_lightning_1step_unet_x0.safetensors")]
    assert all(torch.equal(a, b) for a, b in zip(pipeline.unet.state_dict().values(), other.state_dict().values(), strict=True))
    assert pipeline.scheduler.config.prediction_type == "sample" and pipeline.scheduler.config.timestep_spacing == "trailing"
    # One step from the last timestep returns the network's output itself.
    pipeline.scheduler.set_timesteps(1)
    x = torch.randn(1, 4, 8, 8)
    assert torch.allclose(pipeline.scheduler.step(x, pipeline.scheduler.timesteps[0], torch.randn_like(x)).prev_sample, x, atol=1e-6)


# The cards' own numbers.
CARDS = {
    "sdxl-turbo": ("stabilityai/sdxl-turbo", 1, 0.0),
    "sdxl-lightning": ("stabilityai/stable-diffusion-xl-base-1.0", 1, 0.0),
    "lcm": ("SimianLuo/LCM_Dreamshaper_v7", 4, 8.0),
    "instaflow": ("XCLiu/instaflow_0_9B_from_sd_1_5", 1, 1.0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_run_as_its_card_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(models, "pipeline_model", lambda *arguments: calls.append(arguments))
    load_model(name, ModelOptions(batch_size=4))
    load_model(name, ModelOptions(steps=7, guidance=1.5))
    source, steps, guidance = CARDS[name]
    assert calls[0][:4] == (source, name, steps, guidance)
    assert calls[1][2:4] == (7, 1.5)


def test_turbo_starts_at_the_last_timestep() -> None:
    pipeline = tiny_sdxl_pipeline()
    prepare = PRESETS["sdxl-turbo"].prepare
    assert prepare is not None
    prepare(pipeline)
    pipeline.scheduler.set_timesteps(1)
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipeline.scheduler.timesteps.tolist() == [999]


# --- Names ----------------------------------------------------------------------------------------------------------
def test_what_is_no_model_is_said(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="needs --steps and --guidance"):
        load_model(str(folders["sd"]), ModelOptions())
    with pytest.raises(UserError, match="cannot be loaded as a diffusers pipeline"):
        load_model("nobody/nothing", ModelOptions(steps=1, guidance=1.0))
    for mistyped in (str(tmp_path / "studnet"), "./studnet", "studnet"):
        with pytest.raises(UserError, match="no such folder"):
            load_model(mistyped, ModelOptions())
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UserError, match="a file, expected a folder"):
        load_model(str(tmp_path / "file.txt"), ModelOptions(steps=1, guidance=1.0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no picture"):
        load_model(str(tmp_path / "empty"), ModelOptions())
    (tmp_path / "pictures").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "pictures" / "a.png")
    folder = load_model(str(tmp_path / "pictures"), ModelOptions())
    assert folder.folder is not None and len(folder.folder) == 1
    with pytest.raises(UserError, match="cannot draw new ones"):
        folder.draw(["x"], [1])


def test_a_published_teachers_family_is_read_at_its_commit(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that was filled at the commit on record knows no newest one."""
    source = "stabilityai/stable-diffusion-xl-base-1.0"

    def download(repository: str, name: str, revision: str | None, local_files_only: bool = False) -> str:
        if (repository, revision) != (source, REVISIONS[source]):
            raise LocalEntryNotFoundError("no such entry")
        return str(folders["sdxl"] / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert _family(source) == "sdxl"
    with pytest.raises(UserError, match="cannot be found"):
        _family("somebody/else")


def test_the_teacher_of_a_student_is_found_by_revision_and_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its repository's own files may be other ones by now, and other precisions have other digests."""
    asked: list[TeacherConfig] = []

    def load(config: TeacherConfig, device: str) -> None:
        asked.append(config)
        raise UserError("not here")

    monkeypatch.setattr("diffusion2gan.evaluation.models.load_teacher", load)
    monkeypatch.setattr("diffusion2gan.evaluation.models.hub_file", lambda *_: Path("nowhere/model_index.json"))
    facts = {"teacher": "somebody/model", "revision": "a1b2", "variant": "fp16"}
    model = Model("student", {}, lambda p, s: np.empty(0), facts=facts)
    for named in (None, "teacher:somebody/model", "another/model"):
        assert _teacher_of(model, named, ModelOptions()) == (None, "not here")
    found = [(c.source, c.revision, c.variant) for c in asked]
    assert found == [("somebody/model", "a1b2", "fp16")] * 2 + [("another/model", None, None)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_scored_decodes_with_the_stored_weights(folders: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    stored = tiny_pipeline().vae.state_dict()
    weights = {f"network.{k}": v for k, v in tiny_pipeline().unet.state_dict().items()}
    export_student(tiny_pipeline(), weights, 999, tmp_path / "student", {}, torch.float32)
    for timed in (False, True):
        half = dtype == "bfloat16" and timed
        for name in (str(tmp_path / "student"), f"teacher:{folders['sd']}", str(folders["sd"])):
            model = load_model(name, ModelOptions(steps=2, guidance=2.0, dtype=dtype, timed=timed))
            decoder = model.modules["decoder"].state_dict()
            for key, value in decoder.items():
                expected = stored[f"decoder.{key}"]
                assert torch.equal(value, expected.bfloat16() if half else expected), (name, key)
            assert model.draw(PROMPTS, SEEDS).std() > 1


def test_a_decoder_that_overflows_is_timed_in_float32(folders: dict[str, Path]) -> None:
    """SDXL's, in float16."""
    for name in (f"teacher:{folders['sdxl']}", str(folders["sdxl"])):
        for dtype, expected in (("float16", torch.float32), ("bfloat16", torch.bfloat16)):
            model = load_model(name, ModelOptions(steps=2, guidance=2.0, dtype=dtype, timed=True))
            assert {p.dtype for p in model.modules["decoder"].parameters()} == {expected}


def test_a_student_is_itself_in_every_precision(tmp_path: Path) -> None:
    weights = {f"network.{k}": v for k, v in tiny_pipeline().unet.state_dict().items()}
    export_student(tiny_pipeline(), weights, 999, tmp_path / "student", {}, torch.float32)
    whole, half = (load_model(str(tmp_path / "student"), ModelOptions(dtype=d)).identity for d in ("float32", "bfloat16"))
    assert whole["subject"] == half["subject"] and whole["decoder"] == half["decoder"] and whole != half


@pytest.mark.parametrize("empty", ["", " ", "teacher:"])
def test_an_empty_name_is_no_folder_of_pictures(empty: str) -> None:
    with pytest.raises(UserError, match="is a variable of your shell empty"):
        load_model(empty, ModelOptions())
