"""OneStepPipeline, as its users call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from diffusion2gan import OneStepPipeline, UserError
from diffusion2gan import pipeline as module
from diffusion2gan.embedded.weights import embedded_student
from diffusion2gan.export import export_student
from diffusion2gan.pairs.seeds import draw_noise, evaluation_seed
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.protocol import TeacherConfig
from tests.conftest import tiny_pipeline, tiny_pixel_pipeline
from tests.helpers import compiled_whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = tiny_pipeline()
    torch.manual_seed(3)
    weights = {f"network.{k}": v + 0.02 * torch.randn_like(v) for k, v in pipeline.unet.state_dict().items()}
    target = tmp_path_factory.mktemp("students") / "student"
    export_student(pipeline, weights, 999, target, {"recipe": "tiny"}, torch.float32)
    return target


def _tiny_decoder(path: Path, levels: int = 2, channels: int = 4) -> Path:
    AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=(8,) * levels, decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels, num_decoder_blocks=(1,) * levels,
    ).save_pretrained(path)  # fmt: skip
    return path


def test_one_prompt_is_enough(folder: Path) -> None:
    pipeline = OneStepPipeline.from_pretrained(folder)
    (picture,) = pipeline("red heart")
    assert isinstance(picture, Image.Image)
    assert picture.size == (16, 16)
    np.testing.assert_array_equal(np.asarray(picture), pipeline.generate(["red heart"], [0])[0])


def test_several_prompts_pictures_and_seeds(folder: Path) -> None:
    pipeline = OneStepPipeline.from_pretrained(folder)
    pictures = pipeline(["red heart", "cat"], images_per_prompt=2, seed=5, output_type="uint8", batch_size=3)
    assert pictures.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(pictures, pipeline.generate(["red heart", "red heart", "cat", "cat"], [5, 6, 7, 8]))
    chosen = pipeline(["red heart", "cat"], seed=[8, 8], output_type="uint8")
    np.testing.assert_array_equal(chosen[1], pictures[3])
    latents = pipeline(["red heart", "cat"], seed=[5, 8], output_type="latent", batch_size=1)
    expected = pipeline.latents(["red heart", "cat"], draw_noise([5, 8], (4, 8, 8)))
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


def test_what_cannot_be_drawn(folder: Path) -> None:
    pipeline = OneStepPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match=r"3 seeds for 2 pictures; give one number, or one for each picture"):
        pipeline(["red", "cat"], seed=[1, 2, 3])
    with pytest.raises(UserError, match=r"output_type is 'np', expected one of pil, uint8, latent"):
        pipeline("cat", output_type="np")  # type: ignore[call-overload]
    with pytest.raises(UserError, match="batch_size is 0"):
        pipeline("cat", batch_size=0)
    for prompts, count in (([], 1), (["cat"], 0)):
        with pytest.raises(UserError, match="no prompts and no pictures"):
            pipeline(prompts, images_per_prompt=count)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.5, [0.5], ["7"], np.int64(-1)])
def test_seeds_that_are_none(seed: Any, folder: Path) -> None:
    pipeline = OneStepPipeline.from_pretrained(folder)
    for output_type in ("uint8", "latent"):
        with pytest.raises(UserError, match=r"seed is .*, expected a whole number from 0 to 2\^63 - 1"):
            pipeline("cat", seed=seed, output_type=output_type)
    with pytest.raises(UserError, match=r"expected a whole number from 0 to 2\^63 - 1"):
        pipeline.generate(["cat"], seed if isinstance(seed, list) else [seed])


def test_seeds_of_numpy_and_of_evaluations(folder: Path) -> None:
    pipeline = OneStepPipeline.from_pretrained(folder)
    expected = pipeline(["red", "cat"], seed=3, output_type="uint8")
    for seed in (np.int64(3), np.uint8(3), np.array([3, 4]), range(3, 5)):
        np.testing.assert_array_equal(pipeline(["red", "cat"], seed=seed, output_type="uint8"), expected)
    np.testing.assert_array_equal(pipeline.generate(["red", "cat"], np.array([3, 4])), expected)
    assert pipeline.generate(["cat"], [evaluation_seed(5)]).shape == (1, 16, 16, 3)


def test_as_many_seeds_and_noises_as_prompts(folder: Path) -> None:
    pipeline = OneStepPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match=r"1 seeds for 2 pictures"):
        pipeline.generate(["red", "cat"], [1])
    with pytest.raises(UserError, match=r"3 seeds for 2 pictures"):
        pipeline.generate(["red", "cat"], [1, 2, 3])
    with pytest.raises(UserError, match="no prompts and no pictures"):
        pipeline.generate([], [])
    for prompts, count in (([], 0), (["cat"], 2), (["red", "cat"], 1)):
        with pytest.raises(UserError, match=f"{count} noises for {len(prompts)} prompts, expected one for each and at least one"):
            pipeline.latents(prompts, draw_noise(range(count), (4, 8, 8)))


def test_precisions_that_are_none(folder: Path) -> None:
    with pytest.raises(UserError, match=r"dtype is 'fp16', expected one of float64, float32, bfloat16, float16"):
        OneStepPipeline.from_pretrained(folder, "fp16")


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(tiny_pipeline, torch.float16), (lambda: tiny_pixel_pipeline(edm=True), torch.float16), (tiny_pixel_pipeline, torch.float32)],
)
def test_half_precision_on_a_gpu_unless_it_shows(build: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDPM's x is 157 times the network's output; without a GPU all is float32."""

    def load_without_gpu(config: TeacherConfig, device: str) -> Any:
        assert device in ("cuda:1", "cpu")
        return load_teacher(config)

    pipeline = build()
    weights = {f"network.{k}": v for k, v in pipeline.unet.state_dict().items()}
    export_student(pipeline, weights, 999, tmp_path / "student", {}, torch.float32)
    monkeypatch.setattr(module, "load_teacher", load_without_gpu)
    assert OneStepPipeline.from_pretrained(tmp_path / "student", device="cuda:1").teacher.dtype == dtype
    assert OneStepPipeline.from_pretrained(tmp_path / "student", device="cpu").teacher.dtype == torch.float32
    assert OneStepPipeline.from_pretrained(tmp_path / "student", "bfloat16", "cuda:1").teacher.dtype == torch.bfloat16
    (tmp_path / "student" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match=r"student: has no scheduler of diffusers \(.*\); restore the folder"):
        OneStepPipeline.from_pretrained(tmp_path / "student", device="cuda:1")


@pytest.mark.usefixtures("tiny_embedded")
def test_the_shipped_student_by_its_name() -> None:
    named, at_its_folder = (OneStepPipeline.from_pretrained(source, "float32") for source in ("embedded", embedded_student()))
    assert named.facts == at_its_folder.facts != {}
    assert (named("cat", output_type="uint8") == at_its_folder("cat", output_type="uint8")).all()


def test_sources_that_are_no_student(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"somebody/nothing: no such folder, and not found on the hub \(.*\); name a student's folder or hub id"
    ):
        OneStepPipeline.from_pretrained("somebody/nothing")
    with pytest.raises(UserError, match="not found on the hub"):
        OneStepPipeline.from_pretrained("three/parts/long")
    tiny_pipeline().save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"teacher: no student here \(no diffusion2gan.json\)"):
        OneStepPipeline.from_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "diffusion2gan.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        OneStepPipeline.from_pretrained(tmp_path / "teacher")
    for damaged in ("[]", '{"format": "diffusion2gan-student-1", "timestep": "x"}'):
        (tmp_path / "teacher" / "diffusion2gan.json").write_text(damaged)
        with pytest.raises(UserError, match="is no record of a student"):
            OneStepPipeline.from_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "diffusion2gan.json").write_text('{"format": "diffusion2gan-student-9"}')
    with pytest.raises(UserError, match="format 'diffusion2gan-student-9', expected 'diffusion2gan-student-1'"):
        OneStepPipeline.from_pretrained(tmp_path / "teacher")


def test_a_tiny_decoder_draws(folder: Path, tmp_path: Path) -> None:
    decoder = _tiny_decoder(tmp_path / "decoder")
    pipeline = OneStepPipeline.from_pretrained(folder, decoder=str(decoder))
    x = pipeline("cat", output_type="latent")
    by_hand = AutoencoderTiny.from_pretrained(decoder).decode(x).sample
    pictures = pipeline("cat", output_type="uint8")
    expected = ((by_hand / 2 + 0.5).clamp(0, 1) * 255).round().detach().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pictures.astype(float), expected, atol=1)
    assert pictures.std() > 1


@pytest.mark.parametrize(
    ("levels", "channels", "said"), [(3, 4, "has 4 pixels a latent, expected 2"), (2, 8, "has 8 latent channels, expected 4")]
)
def test_a_decoder_of_other_latents(levels: int, channels: int, said: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        OneStepPipeline.from_pretrained(folder, decoder=str(_tiny_decoder(tmp_path / "decoder", levels, channels)))


def test_a_decoder_that_is_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"decoder 'nowhere': nowhere is no AutoencoderTiny"):
        OneStepPipeline.from_pretrained(folder, decoder="nowhere")
    pipeline = tiny_pixel_pipeline()
    weights = {f"network.{k}": v for k, v in pipeline.unet.state_dict().items()}
    export_student(pipeline, weights, 999, tmp_path / "pixel", {}, torch.float32)
    with pytest.raises(UserError, match=r"a pixel student has no tiny decoder"):
        OneStepPipeline.from_pretrained(tmp_path / "pixel", decoder="tiny")


def test_compiled_pictures_are_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_whole(monkeypatch)
    prompts, seeds = ["red heart", "cat"], [1, 2]
    plain = OneStepPipeline.from_pretrained(folder)
    compiled = OneStepPipeline.from_pretrained(folder, compile=True)
    assert compiled.generator.state_dict().keys() == plain.generator.state_dict().keys()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    ours = compiled.generate(prompts, seeds)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= before + 2
    np.testing.assert_allclose(ours.astype(float), plain.generate(prompts, seeds).astype(float), atol=1)


def test_a_device_may_be_torchs_own(folder: Path) -> None:
    there = OneStepPipeline.from_pretrained(folder, device=torch.device("cpu"))
    assert there.teacher.device == torch.device("cpu")
