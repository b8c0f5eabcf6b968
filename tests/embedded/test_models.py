"""The embedded models' builders, on a few synthetic pictures: a step of each, and what must hold whatever the weights."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from diffusion2gan.embedded import autoencoder, build, emoji, perceptual, text_to_image
from diffusion2gan.embedded.emoji import EmojiDataset
from diffusion2gan.embedded.weights import embedded_student
from diffusion2gan.errors import UserError
from diffusion2gan.fit import FitConfig, fit
from diffusion2gan.images import to_tensor
from diffusion2gan.perceptual import LatentLPIPS
from diffusion2gan.run_log import read_scalars
from diffusion2gan.teachers.folders import stored_weights, token_ids
from diffusion2gan.teachers.protocol import TeacherConfig
from tests.conftest import tiny_pipeline
from tests.helpers import tree_digest


@pytest.fixture(scope="module")
def dataset() -> EmojiDataset:
    """Real records with synthetic pictures: one colour for each concept."""
    chosen = [r for r in emoji.packaged_records() if r.subcategory in ("heart", "face smiling")][:60]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (len(chosen), 1, 1, 3)).astype(np.uint8).repeat(64, 1).repeat(64, 2)
    records = [dataclasses.replace(r, split="cell" if i % 6 == 0 else "train") for i, r in enumerate(chosen)]
    return EmojiDataset(images, records)


def test_latent_statistics_are_folded_without_changing_the_pictures(dataset: EmojiDataset) -> None:
    torch.manual_seed(0)
    model = autoencoder.new_autoencoder().eval()
    images = np.random.default_rng(1).integers(0, 255, (8, 64, 64, 3)).astype(np.uint8)
    x = to_tensor(images)
    with torch.no_grad():
        before, posterior = model(x).sample, model.encode(x).latent_dist
        autoencoder.fold_latent_statistics(model, images)
        after, folded = model(x).sample, model.encode(x).latent_dist
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(folded.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    # The posterior's own deviation is scaled alike: samples decode to the same pictures too.
    torch.testing.assert_close(folded.std / posterior.std, (folded.mean.std(dim=(0, 2, 3)) / posterior.mean.std(dim=(0, 2, 3))).view(1, 4, 1, 1).expand_as(folded.std), rtol=1e-2, atol=0)  # fmt: skip
    assert tuple(folded.mean.shape[1:]) == (4, 16, 16)
    # The stock pipeline scales by the one and ignores the other.
    assert model.config.scaling_factor == 1
    assert not model.config.shift_factor


def test_pixels_map_to_minus_one_and_one() -> None:
    x = to_tensor(np.array([[[[0, 255, 128]]]], np.uint8))
    assert x.flatten().tolist() == pytest.approx([-1, 1, 1 / 255], abs=1e-6)


def test_tokenizer_knows_every_caption_and_survives_saving(tmp_path: Path) -> None:
    records = emoji.packaged_records()
    tokenizer = text_to_image.train_tokenizer(records, tmp_path)
    captions = sorted({c for r in records for c in emoji.all_captions(r)})
    ids = tokenizer(captions).input_ids
    assert max(map(len, ids)) <= text_to_image.MAX_TOKENS
    assert CLIPTokenizer.from_pretrained(tmp_path)(captions).input_ids == ids
    assert len({tuple(i) for i in ids}) == len(captions)
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    # The text encoder finds the end by its id, and caption dropout is the stock pipeline's empty negative prompt.
    config = text_to_image.new_text_encoder(tokenizer).config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name) < len(tokenizer)
    assert torch.equal(text_to_image.tokenize_captions(tokenizer, [])[""], token_ids(tokenizer, [""])[0])


def test_the_saved_pipeline_is_an_ordinary_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = text_to_image.train_tokenizer(emoji.packaged_records()[:200], tmp_path / "tokenizer")
    model = text_to_image.TextToImage(tokenizer)
    assert sum(p.numel() for p in model.text_encoder.parameters()) < 1_000_000
    text_to_image.save_pipeline(model, tokenizer, autoencoder.new_autoencoder(), tmp_path / "teacher")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("red heart", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert max(p.stat().st_size for p in (tmp_path / "teacher").rglob("*") if p.is_file()) < 12 << 20


def test_distortion_keeps_white_white_and_is_reproducible(dataset: EmojiDataset) -> None:
    x = to_tensor(dataset.images[:8])
    a, b = (perceptual.distort(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == x.shape
    assert a.abs().max() <= 1
    plain = perceptual.distort(torch.ones(64, 3, 64, 64), torch.Generator().manual_seed(0))
    assert plain.min() > 0.65  # tint and contrast alone: nothing dark comes in from outside
    assert (a - x).abs().mean() > 0.01


def test_the_autoencoder_learns(dataset: EmojiDataset, tmp_path: Path) -> None:
    config = dataclasses.replace(autoencoder.CONFIG, steps=30, batch_size=8, decay_steps=0, warmup_steps=2, ema_decay=0.9, compile=False)
    torch.manual_seed(config.seed)
    pictures = dataset.images[dataset.indices("cell")]
    before = autoencoder.psnr(autoencoder.new_autoencoder().eval(), pictures)
    trained = autoencoder.train(dataset, tmp_path, "f4", config)
    assert autoencoder.psnr(trained, pictures) > before + 3
    assert [r["psnr"] > before for r in read_scalars(tmp_path / "metrics.jsonl") if "psnr" in r] == [True]


def test_text_encoder_and_u_net_learn(dataset: EmojiDataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(
        text_to_image.CONFIG, steps=20, batch_size=8, decay_steps=0, warmup_steps=2, learning_rate=1e-3, log_every=1, compile=False
    )
    text_to_image.train(dataset, autoencoder.new_autoencoder().eval(), tmp_path, config)
    errors = [r["mse"] for r in read_scalars(tmp_path / "metrics.jsonl")]
    assert len(errors) == 20
    assert np.mean(errors[-5:]) < 0.8 * np.mean(errors[:3])


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_perceptual_networks_train_and_load(space: str, dataset: EmojiDataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = autoencoder.new_autoencoder().eval() if space == "latent" else None
    config = FitConfig(steps=3, batch_size=4, learning_rate=1e-3, checkpoint_every=2, log_every=1)
    metric, accuracy = perceptual.train(dataset, vae, tmp_path / "run", config)
    assert {"top1_concept", "top1_subcategory", "top1_style", "top1_tone"} <= set(accuracy)
    metric.save_pretrained(tmp_path / "saved", torch.float16)
    again = LatentLPIPS.from_pretrained(tmp_path / "saved")
    shape = (2, 4, 16, 16) if space == "latent" else (2, 3, 64, 64)
    a, b = torch.randn(2, *shape)
    assert (again(a, b) > 0).all()
    assert not any(p.requires_grad for p in again.parameters())


def test_fit_resumes_exactly(tmp_path: Path) -> None:
    def run(folder: Path, *stops: int) -> torch.Tensor:
        for steps in stops:
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 1)

            def loss(
                _rng: np.random.Generator, generator: torch.Generator, model: torch.nn.Linear = model
            ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                x = torch.randn(8, 3, generator=generator)
                return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

            state = fit(model, loss, FitConfig(steps, 8, 0.05, warmup_steps=2), folder)
        return state["weight"]

    assert torch.equal(run(tmp_path / "a", 9), run(tmp_path / "b", 4, 9))


def test_fit_without_or_with_a_damaged_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 1)

    def loss(_rng: np.random.Generator, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return model(torch.randn(8, 3, generator=generator)).square().mean(), {}

    config = FitConfig(6, 8, 0.05, checkpoint_every=2, log_every=1)
    fit(model, loss, config, tmp_path)
    path, log = tmp_path / "checkpoint.pt", (tmp_path / "metrics.jsonl").read_bytes()
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not what torch writes"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a checkpoint"):
            fit(model, loss, config, tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="had a checkpoint .checkpoint.pt., and has none now"):
        fit(model, loss, config, tmp_path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a checkpoint of this training"):
        fit(model, loss, config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_the_stages_one_after_another(
    dataset: EmojiDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`diffusion2gan embedded autoencoder | teacher | perceptual | calibrate`, two steps of each: every folder is what the next one reads."""
    monkeypatch.setattr(emoji, "load", lambda: dataset)
    for module in (autoencoder, text_to_image, perceptual):
        monkeypatch.setattr(module, "CONFIG", dataclasses.replace(module.CONFIG, batch_size=4, compile=False))
    monkeypatch.setattr("diffusion2gan.perceptual.train.compile_for_one_shape", lambda called, *_: called)
    monkeypatch.setattr(build, "TRIPLETS_OF_A_KIND", 16)
    for stage in ("autoencoder", "teacher", "perceptual"):
        build.run_stage(stage, tmp_path, 2)
    said = capsys.readouterr().out
    assert all(f"wrote {tmp_path / name}" in said for name in ("vae", "teacher", "latent_vgg", "pixel_vgg"))
    heads = {name: LatentLPIPS.from_pretrained(tmp_path / name).lins[0].weight.clone() for name in ("latent_vgg", "pixel_vgg")}
    build.run_stage("calibrate", tmp_path)
    assert "2AFC" in capsys.readouterr().out
    for name, before in heads.items():
        after = LatentLPIPS.from_pretrained(tmp_path / name).lins[0].weight
        assert not torch.equal(before, after)
        assert after.min() >= 0
    facts = build.training_facts(tmp_path)
    assert (facts["ae_f4: steps"], facts["unet: samples"]) == (2, 8)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher")
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)


def test_unpacked_weights_train_on(dataset: EmojiDataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = autoencoder.new_autoencoder().eval()
    tokenizer = text_to_image.train_tokenizer(emoji.packaged_records(), tmp_path / "tokenizer")
    text_to_image.save_pipeline(text_to_image.TextToImage(tokenizer), tokenizer, vae, tmp_path / "root" / "teacher")
    build.unpack(tmp_path / "root", tmp_path / "work", 5)
    with pytest.raises(UserError, match="is there already"):
        build.unpack(tmp_path / "root", tmp_path / "work", 5)
    small = dataclasses.replace(text_to_image.CONFIG, compile=False)
    again = tmp_path / "work" / "unet"
    with pytest.raises(UserError, match="stands at step 5, expected at most 4"):
        text_to_image.train(dataset, vae.float(), again, dataclasses.replace(small, steps=4, decay_steps=0))
    model = text_to_image.train(dataset, vae, again, dataclasses.replace(small, steps=5, decay_steps=0))
    shipped = StableDiffusionPipeline.from_pretrained(tmp_path / "root" / "teacher")
    for name, value in shipped.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], value.float()), name
    assert CLIPTokenizer.from_pretrained(again / "tokenizer").get_vocab() == tokenizer.get_vocab()
    assert build.training_facts(tmp_path / "work") == {}


def test_packed_weights_are_what_the_package_loads(
    tiny_embedded: Path, dataset: EmojiDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of those before, whose card stays; the student without the parts that it shares; nothing of it for too large a file."""
    with pytest.raises(UserError, match="holds none of teacher, latent_vgg, pixel_vgg and student"):
        build.pack(tmp_path / "mistyped", tiny_embedded)
    monkeypatch.setattr(emoji, "load", lambda: dataset)
    (tiny_embedded / "teacher" / "README.md").write_text("the card")
    work = tmp_path / "work"
    tiny_pipeline(seed=7).save_pretrained(work / "teacher")
    # The student there is of the teacher before.
    lines = build.pack(work, tiny_embedded)
    assert [line.split(":")[0] for line in lines[:-1]] == ["packed teacher", "left out student"]
    assert not (tiny_embedded / "student").exists()
    tiny_pipeline(seed=8).save_pretrained(work / "student")
    facts = {"teacher_weights": stored_weights(TeacherConfig(), work / "teacher")}
    (work / "student" / "diffusion2gan.json").write_text(json.dumps(facts))
    lines = build.pack(work, tiny_embedded)
    assert [line.split(":")[0] for line in lines[:-1]] == ["packed teacher", "packed student"]
    packed = StableDiffusionPipeline.from_pretrained(tiny_embedded / "teacher", safety_checker=None)
    for name, value in tiny_pipeline(seed=7).unet.state_dict().items():
        assert torch.equal(packed.unet.state_dict()[name], value)
    assert (tiny_embedded / "teacher" / "README.md").read_text() == "the card"
    assert {p.name for p in (tiny_embedded / "student").iterdir() if p.is_dir()} == {"unet", "scheduler"}
    assert (tiny_embedded / "latent_vgg" / "config.json").exists()
    packed_records = gzip.decompress((tiny_embedded.parent / "data" / "records.jsonl.gz").read_bytes()).decode()
    assert len(packed_records.splitlines()) == len(dataset.records)
    before = tree_digest(tiny_embedded)
    monkeypatch.setattr(build, "MAX_FILE", 1000)
    with pytest.raises(UserError, match="expected at most .* and 1,000; pack less"):
        build.pack(work, tiny_embedded)
    assert tree_digest(tiny_embedded) == before
    with pytest.raises(UserError, match="the package's own folder"):
        build.pack(tiny_embedded, tiny_embedded)


def test_fit_refuses_other_steps_while_the_rate_falls(tmp_path: Path) -> None:
    def run(steps: int, stop_after: int | None = None) -> None:
        model, done = torch.nn.Linear(1, 1), 0

        def loss(_rng: np.random.Generator, _generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            nonlocal done
            done += 1
            if stop_after is not None and done > stop_after:
                raise KeyboardInterrupt
            return model(torch.ones(1, 1)).square().mean(), {}

        fit(model, loss, FitConfig(steps, 1, 0.01, decay_steps=4, checkpoint_every=1), tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run(10, stop_after=8)
    with pytest.raises(UserError, match="at step 8 the learning rate is already falling towards step 10"):
        run(20)
    run(10)


def test_a_shipped_student_is_not_put_together_with_another_teacher(tiny_embedded: Path) -> None:
    assert (embedded_student() / "model_index.json").is_file()
    shutil.rmtree(tiny_embedded / "teacher")
    tiny_pipeline(seed=7).save_pretrained(tiny_embedded / "teacher")
    with pytest.raises(
        UserError, match=r"a student of teacher [0-9a-f]{16}\.\.\., but .* is [0-9a-f]{16}\.\.\.; distil one of this teacher"
    ):
        embedded_student()
