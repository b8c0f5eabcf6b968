"""What `export` writes beside the plain folder: the card, one file in the original layout, the hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion2gan.cli import main
from diffusion2gan.ema import trained_state
from diffusion2gan.embedded.weights import embedded_folder, embedded_student
from diffusion2gan.errors import UserError
from diffusion2gan.export import CardExtras, export_lora, export_single_file, export_student, push_to_hub
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.lora import lora_layers
from diffusion2gan.recipe import parse_recipe
from diffusion2gan.run import simulate_recipe, train_recipe
from diffusion2gan.run_log import read_scalars
from diffusion2gan.single_file import original_layout, original_open_clip
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from diffusion2gan.training.state import checkpoints, load_state, save_state
from tests.conftest import tiny_pipeline, tiny_pixel_pipeline, tiny_sdxl_pipeline
from tests.helpers import recipe_values


def _sd15() -> Any:
    """With the parts that the tiny pipeline leaves out: attention in the autoencoder, and three resolutions."""
    pipeline = tiny_pipeline()
    pipeline.vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 16),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    return pipeline


def _sd21() -> Any:
    """OpenCLIP's width, by which 2.x is known."""
    pipeline = tiny_pipeline("v_prediction")
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=1024, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16, max_position_embeddings=8,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipeline.text_encoder = CLIPTextModel(config)
    pipeline.unet = UNet2DConditionModel.from_config(
        dict(pipeline.unet.config) | {"cross_attention_dim": 1024, "use_linear_projection": True}
    )
    return pipeline


def _sdxl() -> Any:
    """As in SDXL, the second text encoder is the wider one, and as wide as its projection: diffusers tells them apart by that."""
    pipeline = tiny_sdxl_pipeline()
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=8,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=32,
    )  # fmt: skip
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(config)
    wider = {"cross_attention_dim": 48, "projection_class_embeddings_input_dim": 6 * 8 + 32}
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | wider)
    return pipeline


@pytest.mark.parametrize(
    ("build", "kind"), [(_sd15, StableDiffusionPipeline), (_sd21, StableDiffusionPipeline), (_sdxl, StableDiffusionXLPipeline)]
)
def test_diffusers_reads_the_original_layout_back(build: Any, kind: Any, tmp_path: Path) -> None:
    pipeline = build()
    pipeline.save_pretrained(tmp_path / "folder")
    weights = original_layout(pipeline)
    save_file(weights, tmp_path / "one.safetensors")
    again = kind.from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "folder"), local_files_only=True)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if not hasattr(pipeline, part):
            continue
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(again, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items()), part
    parts = [p for p in (getattr(pipeline, n, None) for n in ("unet", "vae", "text_encoder", "text_encoder_2")) if p is not None]
    assert sum(v.numel() for v in weights.values()) == sum(v.numel() for p in parts for v in p.state_dict().values())


def test_names_of_the_original() -> None:
    """A few that user interfaces look for, written out."""
    found = original_layout(_sd15())
    for name, shape in {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "model.diffusion_model.input_blocks.2.0.op.weight": (8, 8, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (16, 16),
        "model.diffusion_model.output_blocks.1.2.conv.weight": (16, 16, 3, 3),
        "model.diffusion_model.out.2.weight": (4, 8, 3, 3),
        "first_stage_model.decoder.up.2.block.0.conv1.weight": (16, 16, 3, 3),
        "first_stage_model.encoder.mid.attn_1.proj_out.weight": (16, 16, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (54, 16),
    }.items():
        assert found[name].shape == shape, name


def test_open_clip_computes_the_same() -> None:
    """OpenCLIP's block, written out from its own parameters, equals transformers' encoder."""
    encoder = _sdxl().text_encoder_2.eval()
    w = {k.removeprefix("model."): v for k, v in original_open_clip(encoder).items()}
    ids = torch.tensor([[0, 5, 9, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        x = w["token_embedding.weight"][ids] + w["positional_embedding"]
        mask = torch.full((8, 8), float("-inf")).triu(1)
        for i in range(3):
            p = f"transformer.resblocks.{i}."
            y = torch.nn.functional.layer_norm(x, (32,), w[p + "ln_1.weight"], w[p + "ln_1.bias"])
            attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
            attention.load_state_dict({k.removeprefix(p + "attn."): v for k, v in w.items() if k.startswith(p + "attn.")})
            x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
            y = torch.nn.functional.layer_norm(x, (32,), w[p + "ln_2.weight"], w[p + "ln_2.bias"])
            y = y @ w[p + "mlp.c_fc.weight"].T + w[p + "mlp.c_fc.bias"]
            # The tiny encoder has CLIP's activation.
            y = y * torch.sigmoid(1.702 * y)
            x = x + y @ w[p + "mlp.c_proj.weight"].T + w[p + "mlp.c_proj.bias"]
        x = torch.nn.functional.layer_norm(x, (32,), w["ln_final.weight"], w["ln_final.bias"])
        pooled = x[:, 3] @ w["text_projection"]
        expected = encoder(ids).text_embeds
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Path:
    root = tmp_path_factory.mktemp("export")
    tiny_pipeline().save_pretrained(root / "teacher")
    (root / "teacher" / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# A teacher\n")
    recipe = parse_recipe(recipe_values(root / "teacher", prompts_file, training__steps=6), "tiny")
    simulate_recipe(recipe, root / "store", progress=False)
    train_recipe(recipe, root / "store", root / "run", progress=False)
    return root / "run"


def test_the_card(run: Path, tmp_path: Path) -> None:
    (tmp_path / "measured.md").write_text("| gap closed |\n| --- |\n| 0.5 |\n")
    assert main(["export", str(run), str(tmp_path / "student"), "--results", str(tmp_path / "measured.md")]) == 0
    card = (tmp_path / "student" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusion2gan", "one-step"],
        "license": "creativeml-openrail-m",
    }
    assert "| gap closed |" in card
    assert "float16" in card
    assert (tmp_path / "student" / "samples.png").read_bytes() == sorted((run / "samples").glob("held-out-*.png"))[-1].read_bytes()
    assert "](samples.png)" in card
    validated = [r for r in read_scalars(run / "metrics.jsonl") if "validation_loss" in r][-1]
    assert f"at step 6: mse loss {validated['validation_loss']:.4g}, squared error {validated['validation_mse']:.4g}." in card
    trained = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert trained["training"]["steps"] == 6
    assert trained["loss"]["distance"] == "mse"
    assert "start" not in trained["generator"]
    assert "The metric that it was trained with" not in card
    # No path of this machine, nor in any configuration.
    assert str(run.parent) not in card
    texts = [p.read_text() for p in (tmp_path / "student").rglob("*.json")]
    assert any("_name_or_path" in text for text in texts)
    assert not any(str(run.parent) in text for text in texts)


def test_plain_diffusers_without_a_precision(run: Path, tmp_path: Path) -> None:
    """README's block on an export as it is by default, in float16; and on the student and the teacher of the package."""
    assert main(["export", str(run), str(tmp_path / "student")]) == 0
    for folder in (tmp_path / "student", embedded_student(), embedded_folder("teacher")):
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        assert {pipeline.unet.dtype, pipeline.text_encoder.dtype, pipeline.vae.dtype} == {torch.float32}
        picture = pipeline("red heart", num_inference_steps=1, guidance_scale=1).images[0]
        assert picture.size == (pipeline.unet.config.sample_size * pipeline.vae_scale_factor,) * 2
        half = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.bfloat16)
        assert {half.unet.dtype, half.text_encoder.dtype, half.vae.dtype} == {torch.bfloat16}


def test_another_runs_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = load_state(path)
    assert state.experiment is not None
    save_state(replace(state, experiment=state.experiment | {"training.seed": "7"}), path.parent, 2)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "student")]) == 2
    assert "is of another run, with training.seed 7 where this one has 0" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_one_file_from_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "student.safetensors"
    assert main(["export", str(run), str(tmp_path / "student"), "--dtype", "float32"]) == 0
    assert main(["export", str(run), str(out), "--format", "single-file", "--dtype", "float32"]) == 0
    with safe_open(out, "pt") as file:
        facts = json.loads(file.metadata()["diffusion2gan"])
        conv = file.get_tensor("model.diffusion_model.input_blocks.0.0.weight")
    assert facts["recipe"] == "tiny"
    assert facts["steps"] == 6
    # 24 pairs of 4 steps with guidance; 6 steps of 4 samples.
    assert facts["evaluations"] == {"data_teacher": 24 * 8, "student": 24, "target": 0, "teacher_online": 0}
    student = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    assert torch.equal(conv, student.unet.conv_in.weight)
    capsys.readouterr()
    assert main(["export", str(run), str(out), "--format", "single-file"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "student.ckpt"), "--format", "single-file"]) == 2
    assert "expected a name that ends in .safetensors" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "b.safetensors"), "--format", "single-file", "--push-to-hub", "a/b"]) == 2
    assert "uploads a folder" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "c"), "--results", str(tmp_path / "none.md")]) == 2
    assert "none.md: cannot be read" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student", "student.safetensors"]


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(tiny_pipeline, "float16"), (lambda: tiny_pixel_pipeline(edm=True), "float16"), (tiny_pixel_pipeline, "float32")],
)
def test_half_precision_unless_it_shows(build: Any, dtype: str, tmp_path: Path) -> None:
    """x is 14.6 times the output of the first, v-prediction's of the second, 157 times that of the third."""
    pipeline = build()
    weights = {f"network.{k}": v for k, v in pipeline.unet.state_dict().items()}
    export_student(pipeline, weights, 999, tmp_path / "student", {}, None)
    with safe_open(tmp_path / "student" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor("conv_in.weight").dtype == getattr(torch, dtype)
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"Weights are stored in {dtype}." in card
    assert ("Run in float32:" in card) is (dtype == "float32")


def test_the_card_of_a_lora_says_its_size(tmp_path: Path) -> None:
    """The teacher that it is loaded into may draw at another one by itself."""
    pytest.importorskip("peft")
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(sample_size=16)
    generator = OneStepGenerator.from_teacher(StableDiffusionTeacher.from_pipeline(pipeline), GeneratorConfig(lora_rank=2))
    layers = lora_layers(pipeline.unet, trained_state(generator), 2, None)
    extras = CardExtras(teacher="somebody/model", teacher_options={"revision": "a1b2", "variant": "fp16"})
    export_lora(pipeline, layers, 999, tmp_path / "lora", {}, None, extras)
    card = (tmp_path / "lora" / "README.md").read_text()
    # Its weights, not what the repository has by then.
    assert 'from_pretrained("somebody/model", revision="a1b2", variant="fp16")' in card
    assert 'pipeline("red heart", height=32, width=32, num_inference_steps=1' in card
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_pixels_have_no_original_layout(tmp_path: Path) -> None:
    pipeline = tiny_pixel_pipeline()
    weights = {f"network.{k}": v for k, v in pipeline.unet.state_dict().items()}
    with pytest.raises(UserError, match="DDIMPipeline has no original layout"):
        export_single_file(pipeline, weights, 999, tmp_path / "x.safetensors", {}, torch.float32)
    assert not list(tmp_path.iterdir())


def test_without_the_hub_the_student_is_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "student"), "--push-to-hub", "somebody/student"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("diffusion2gan: --push-to-hub somebody/student: ")
    assert "the student is whole in" in said
    assert said.count("\n") == 1
    assert (tmp_path / "student" / "unet").is_dir()


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client as it is, and nobody at its address."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint="http://127.0.0.1:9", token="x"))
    with pytest.raises(UserError, match=r"--push-to-hub me/student: .*; the student is whole in"):
        push_to_hub(tmp_path, "me/student", False)


def test_what_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client is asked for a repository and given the folder."""
    import huggingface_hub

    asked: list[Any] = []

    class Hub:
        is_private = True

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> huggingface_hub.RepoUrl:
            asked.append((name, private, exist_ok))
            return huggingface_hub.RepoUrl(f"{huggingface_hub.constants.ENDPOINT}/me/{name.rpartition('/')[2]}")

        def repo_info(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(private=self.is_private)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]) -> None:
            asked.append((repo_id, Path(folder_path), delete_patterns))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    # A name alone is of the one who is logged in.
    assert push_to_hub(tmp_path, "student", True).endswith("/me/student")
    name, folder, deleted = asked[1]
    assert (asked[0], name, folder) == (("student", True, True), "me/student", tmp_path)
    # What an earlier upload split in parts would be loaded instead.
    assert all(any(fnmatch(old, p) for p in deleted) for old in ("unet/a-00001-of-00002.safetensors", "unet/a.safetensors.index.json"))
    monkeypatch.setattr(Hub, "is_private", False)
    with pytest.raises(UserError, match="is there already, and public"):
        push_to_hub(tmp_path, "student", True)
    assert len(asked) == 3


def test_a_user_interface_knows_that_sdxl_predicts_v() -> None:
    pipeline = tiny_sdxl_pipeline()
    assert "v_pred" not in original_layout(pipeline)
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changed)
    assert {"v_pred", "ztsnr"} <= original_layout(pipeline).keys()


def test_the_card_names_the_metrics_licence(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    inputs = tmp_path / "run" / "inputs.json"
    inputs.write_text(json.dumps(json.loads(inputs.read_text()) | {"perceptual_settings": {"licence": "cc-by-nc-sa-4.0"}}))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "student")]) == 0
    assert "The metric that it was trained with is under cc-by-nc-sa-4.0." in (tmp_path / "student" / "README.md").read_text()
