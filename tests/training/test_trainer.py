from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from diffusion2gan.ema import Ema
from diffusion2gan.errors import UserError
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.pairs.dataset import PairDataset
from diffusion2gan.perceptual import LatentLPIPS, LatentVGG
from diffusion2gan.perceptual.augmentations import Augmentation
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.run_log import read_scalars
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from diffusion2gan.training.batches import BatchShare
from diffusion2gan.training.distance import Distance, LossConfig, build_distance
from diffusion2gan.training.order import SampleOrder, augmentation_uniforms
from diffusion2gan.training.state import checkpoints, environment, load_state, save_state
from diffusion2gan.training.trainer import Trainer, TrainingConfig
from tests.conftest import tiny_pipeline, tiny_store
from tests.helpers import compiled_whole


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Path:
    return tiny_store(tmp_path_factory.mktemp("pairs") / "store", prompts_file)


@pytest.fixture(scope="session")
def perceptual_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vgg")
    LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=4, width=0.125))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pixel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pixel_vgg")
    LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=3, width=0.125, kept_poolings=(1, 2, 3, 4, 5)))).save_pretrained(folder)
    return folder


def _trainer(
    store: Path,
    folder: Path,
    loss: LossConfig | Distance | None = None,
    generator: GeneratorConfig | None = None,
    experiment: dict[str, str] | None = None,
    **changes: object,
) -> Trainer:
    teacher = StableDiffusionTeacher.from_pipeline(tiny_pipeline())
    values = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "holdout": 8,
        "checkpoint_every": 3,
        "sample_every": 100,
        "sample_count": 2,
        "log_every": 1,
    }
    config = TrainingConfig.model_validate(values | changes)
    distance = loss if isinstance(loss, Distance) else build_distance(loss or LossConfig(distance="mse"), teacher)
    student = OneStepGenerator.from_teacher(teacher, generator)
    return Trainer(teacher, PairDataset(store), student, distance, config, folder, experiment=experiment)


def _weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.bare_generator.parameters()])


@pytest.mark.parametrize("distance", ["mse", "l1", "pseudo_huber", "lpips", "latent_lpips", "e_latent_lpips"])
def test_every_loss_of_table_1_lowers_itself(
    distance: str, store: Path, tmp_path: Path, perceptual_folder: Path, pixel_folder: Path
) -> None:
    source = pixel_folder if distance == "lpips" else perceptual_folder
    loss = LossConfig.model_validate({"distance": distance, "perceptual": str(source)})
    trainer = _trainer(store, tmp_path, loss, steps=30, batch_size=8)
    metric = trainer.distance.network
    assert (metric is None) == (distance in ("mse", "l1", "pseudo_huber"))
    if metric is not None:
        # Running means of its batch norms among them, whatever mode somebody puts it in.
        metric.train()
        before = {k: v.clone() for k, v in metric.state_dict().items()}
    trainer.run(progress=False)
    if metric is not None:
        assert all(torch.equal(v, before[k]) for k, v in metric.state_dict().items())
        assert all(p.grad is None for p in metric.parameters())
    losses = [row["loss"] for row in read_scalars(tmp_path / "metrics.jsonl") if "loss" in row]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:2])
    assert (tmp_path / "samples" / "held-out-00000030.png").exists()


def test_mse_lowers_the_held_out_error(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path, steps=30, batch_size=8, ema_decay=0.5)
    before = trainer.validate()
    trainer.run(progress=False)
    after = trainer.validate()
    assert after["validation_loss"] == after["validation_mse"] < 0.95 * before["validation_mse"]


def test_resume_equals_an_unbroken_run(store: Path, tmp_path: Path, perceptual_folder: Path) -> None:
    """Augmented loss included: its draws are a function of the step, not of a generator's state."""
    loss = LossConfig(distance="e_latent_lpips", perceptual=str(perceptual_folder))
    unbroken = _trainer(store, tmp_path / "a", loss)
    unbroken.run(progress=False)
    _trainer(store, tmp_path / "b", loss, steps=3).run(progress=False)
    resumed = _trainer(store, tmp_path / "b", loss)
    assert resumed.step == 3
    resumed.run(progress=False)
    assert torch.equal(_weights(unbroken), _weights(resumed))
    a, b = (load_state(checkpoints(tmp_path / x / "checkpoints")[-1]) for x in "ab")
    assert all(torch.equal(v, b.ema[k]) for k, v in a.ema.items())
    assert a.ema["network.conv_in.weight"].stride() == b.ema["network.conv_in.weight"].stride()
    assert a.gradient_scale == b.gradient_scale


def test_moments_of_8_bits(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near AdamW's own steps, a quarter of its state for what is not small, and resumed exactly."""
    pytest.importorskip("bitsandbytes")
    small = {"optimizer": "adamw_8bit", "batch_size": 8}
    unbroken = _trainer(store, tmp_path / "a", **small)
    start = _weights(unbroken).clone()
    unbroken.run(progress=False)
    exact = _trainer(store, tmp_path / "exact", batch_size=8)
    exact.run(progress=False)
    moved, expected = _weights(unbroken) - start, _weights(exact) - start
    assert torch.cosine_similarity(moved, expected, 0) > 0.98
    state = unbroken.descent.raw_optimizer.state
    large = [p for p in unbroken.bare_generator.parameters() if p.numel() >= 4096]
    assert large
    assert {state[p]["state1"].dtype for p in large} == {torch.uint8}
    _trainer(store, tmp_path / "b", **small, steps=3).run(progress=False)
    resumed = _trainer(store, tmp_path / "b", **small)
    assert resumed.step == 3
    resumed.run(progress=False)
    assert torch.equal(_weights(unbroken), _weights(resumed))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install 'diffusion2gan\[8bit\]'"):
        _trainer(store, tmp_path / "c", **small)


def test_the_average_in_the_hosts_memory_is_the_same(store: Path, tmp_path: Path) -> None:
    beside, host = (_trainer(store, tmp_path / str(at), ema_on_cpu=at) for at in (False, True))
    assert (beside.ema.device, host.ema.device) == (None, torch.device("cpu"))
    elsewhere = Ema(host.bare_generator, 0.9, torch.device("meta"))
    assert {v.device.type for v in elsewhere.state.values()} == {"meta"}
    elsewhere.update(host.bare_generator, 0)
    for trainer in (beside, host):
        trainer.run(progress=False)
    for name, value in beside.ema.state.items():
        torch.testing.assert_close(host.ema.state[name], value, rtol=1e-6, atol=1e-7)


def test_accumulated_micro_batches_equal_the_whole_batch(store: Path, tmp_path: Path) -> None:
    whole = _trainer(store, tmp_path / "a", batch_size=8)
    whole.run(progress=False)
    parts = _trainer(store, tmp_path / "b", batch_size=8, micro_batch_size=2)
    assert parts.share(0).accumulation == 4
    parts.run(progress=False)
    assert (_weights(whole) - _weights(parts)).abs().max().item() < 2e-4
    # AdamW and the relative clip forgive a wrong scale of the gradient; the log does not.
    for a, b in zip(read_scalars(tmp_path / "a" / "metrics.jsonl"), read_scalars(tmp_path / "b" / "metrics.jsonl"), strict=True):
        for key in ("loss", "gradient_norm"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-3)
    assert (_weights(whole) - _weights(_trainer(store, tmp_path / "c", batch_size=8))).abs().max().item() > 1e-3


def test_gradient_checkpointing_changes_nothing(store: Path, tmp_path: Path) -> None:
    plain = _trainer(store, tmp_path / "a")
    plain.run(progress=False)
    checkpointed = _trainer(store, tmp_path / "b", generator=GeneratorConfig(gradient_checkpointing=True))
    calls: list[int] = []
    hook = checkpointed.bare_generator.network.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed.train_step(checkpointed._load(0))
    hook.remove()
    assert len(calls) == 2  # once forward, once recomputed
    checkpointed = _trainer(store, tmp_path / "b", generator=GeneratorConfig(gradient_checkpointing=True))
    checkpointed.run(progress=False)
    assert (_weights(plain) - _weights(checkpointed)).abs().max().item() < 1e-5


def test_bf16_trains(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path, mixed_precision="bf16")
    computed: set[torch.dtype] = set()
    trainer.bare_generator.network.conv_in.register_forward_hook(lambda _m, _a, out: computed.add(out.dtype))
    trainer.train_step(trainer._load(0))
    assert computed == {torch.bfloat16}
    trainer.run(progress=False)
    assert all(p.dtype == torch.float32 for p in trainer.bare_generator.parameters())
    assert math.isfinite(trainer.validate()["validation_loss"])


def test_non_finite_loss_stops_before_the_update(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path, Distance(lambda a, b, _: (a - b).flatten(1).mean(1) * float("nan")))
    before, average = _weights(trainer), trainer.ema.state["network.conv_in.weight"].clone()
    with pytest.raises(UserError, match="step 0: the regression loss is nan"):
        trainer.run(progress=False)
    assert torch.equal(before, _weights(trainer))
    assert torch.equal(average, trainer.ema.state["network.conv_in.weight"])


def test_ema_is_the_formula(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path, ema_decay=0.15)
    name = "network.conv_in.weight"
    expected = trainer.bare_generator.state_dict()[name].clone()
    for step in range(3):
        trainer.train_step(trainer._load(step))
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trainer.bare_generator.state_dict()[name]
    torch.testing.assert_close(trainer.ema.state[name], expected)


def test_held_out_pairs_are_never_trained_on(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path)
    rows = np.concatenate([trainer.order.rows(4 * s, 4) for s in range(40)])
    assert rows.max() == 15
    assert {tuple(b.prompts) for b in trainer._held_out(2)} == {tuple(PairDataset(store).prompt(i) for i in (16, 17))}


def test_too_few_pairs_and_odd_batches_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the store has 24 pairs"):
        _trainer(store, tmp_path, holdout=24)


def test_resume_warns_of_another_environment(store: Path, tmp_path: Path) -> None:
    _trainer(store, tmp_path, steps=3).run(progress=False)
    path = checkpoints(tmp_path / "checkpoints")[-1]
    with pytest.warns(UserWarning, match=r"threads was 1 and is 7 now"):
        load_state(path, environment(False, 1) | {"threads": "7"})


def test_a_checkpoint_of_another_run(store: Path, tmp_path: Path) -> None:
    """Told by what its run was about; one from before that was written, by its tensors."""
    _trainer(store, tmp_path / "one", steps=3).run(progress=False)
    (path,) = checkpoints(tmp_path / "one" / "checkpoints")
    state = load_state(path)
    for experiment, message in (
        (
            {"training.seed": "7", "a key of later": "x"},
            "is of another run, with training.seed 7 where this one has 0; put this run's own back",
        ),
        (None, r"does not fit this run's networks \(.*conv_in"),
    ):
        model = {k.replace("conv_in", "conv_out_of_it"): v for k, v in state.model.items()} if experiment is None else state.model
        save_state(replace(state, experiment=experiment, model=model), path.parent, 2)
        with pytest.raises(UserError, match=message):
            _trainer(store, tmp_path / "one", experiment={"training.seed": "0"}, steps=6)
    save_state(replace(state, experiment={"training.seed": "0"}), path.parent, 2)
    assert _trainer(store, tmp_path / "one", experiment={"training.seed": "0"}, steps=6).step == 3


def test_a_damaged_or_hostile_checkpoint_is_one_clear_line(store: Path, tmp_path: Path) -> None:
    _trainer(store, tmp_path, steps=3).run(progress=False)
    path = checkpoints(tmp_path / "checkpoints")[-1]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_state(path)
    torch.save({"format": print}, path)
    with pytest.raises(UserError, match="not a checkpoint of ours"):
        load_state(path)


class TestOrder:
    def test_every_pair_once_an_epoch(self) -> None:
        order = SampleOrder(10, seed=3)
        rows = np.concatenate([order.rows(4 * s, 4) for s in range(5)])
        assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
        assert rows[:10].tolist() != rows[10:].tolist()

    def test_a_function_of_the_step_alone(self) -> None:
        fresh = SampleOrder(10, seed=3).rows(16, 4)
        used = SampleOrder(10, seed=3)
        for step in (0, 9, 4):
            rows = used.rows(4 * step, 4)
        np.testing.assert_array_equal(fresh, rows)
        assert augmentation_uniforms(1, 2, 3, 4).tolist() == augmentation_uniforms(1, 2, 3, 4).tolist()
        assert augmentation_uniforms(1, 2, 3, 4).tolist() != augmentation_uniforms(1, 3, 3, 4).tolist()


def test_compiled_training_is_one_graph_and_the_same(
    store: Path, tmp_path: Path, perceptual_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = LossConfig(distance="e_latent_lpips", perceptual=str(perceptual_folder))
    plain = _trainer(store, tmp_path / "plain", loss)
    plain.run(progress=False)
    compiled = compiled_whole(monkeypatch)
    whole = _trainer(store, tmp_path / "whole", loss, compile=True)
    whole.run(progress=False)
    assert compiled == [OneStepGenerator, Distance]
    torch.testing.assert_close(_weights(whole), _weights(plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_what_would_split_the_weights_is_refused(kind: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` may ask for it; the average and the checkpoints would be of a part."""
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _: DistributedType[kind]))
    with pytest.raises(UserError, match=rf"training by {kind} is asked for and not supported; use `torchrun .*training.shard=true"):
        _trainer(store, tmp_path)


def test_only_the_first_pairs(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path, first_pairs=5)
    assert {int(r) for step in range(20) for r in trainer.order.rows(4 * step, 4)} == set(range(5))
    with pytest.raises(UserError, match="first_pairs is 17, expected at most 16"):
        _trainer(store, tmp_path, first_pairs=17)


@pytest.mark.parametrize("letters", ["", "b", "go", "bgco"])
def test_the_distance_of_a_recipe_is_eq_3(
    letters: str, perceptual_folder: Path, tmp_path: Path, tiny_teacher: StableDiffusionTeacher
) -> None:
    metric = LatentLPIPS.from_pretrained(perceptual_folder)
    with_l1 = LatentLPIPS.from_pretrained(perceptual_folder, l1_weight=3.0)
    with_l1.save_pretrained(tmp_path)
    x0, x1, uniform = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.rand(3, Augmentation.N_UNIFORM)
    augmentation = Augmentation(letters)
    drawn = augmentation.draw(3, x0.shape[1:], uniform=uniform)
    expected = metric.distance(augmentation.apply(x0, drawn), augmentation.apply(x1, drawn))
    # What the folder says of an L1 term does not slip into the loss of a recipe that does not ask for one.
    for folder, weight in ((perceptual_folder, 0.0), (tmp_path, 0.0), (perceptual_folder, 2.0)):
        config = LossConfig(distance="e_latent_lpips", perceptual=str(folder), augment=letters, l1_weight=weight)
        found = build_distance(config, tiny_teacher)(x0, x1, uniform)
        torch.testing.assert_close(found, expected + weight * (x0 - x1).abs().mean((1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_each_sample_keeps_its_pair_and_draw(world: int, micro: int, store: Path, tmp_path: Path, perceptual_folder: Path) -> None:
    loss = LossConfig(distance="e_latent_lpips", perceptual=str(perceptual_folder))
    (whole,) = _trainer(store, tmp_path / "whole", loss)._load(5)
    trainer = _trainer(store, tmp_path / "parts", loss, micro_batch_size=micro)
    trainer._phase_1 = BatchShare(4, micro, 4 // (world * micro))
    parts = []
    for rank in range(world):
        trainer.accelerator = SimpleNamespace(process_index=rank, device=torch.device("cpu"))  # type: ignore[assignment]
        parts += trainer._load(5)
    for name in ("noise", "latent", "uniform"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name
    assert [c for p in parts for c in p.prompts] == whole.prompts


def test_the_perceptual_network_stays_as_it_is(store: Path, tmp_path: Path, perceptual_folder: Path) -> None:
    trainer = _trainer(store, tmp_path, LossConfig(distance="e_latent_lpips", perceptual=str(perceptual_folder)), steps=2)
    network = trainer.distance.network
    assert network is not None
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert any("running_mean" in k for k in before)
    trainer.run(progress=False)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("stopped_at", [None, 2])
def test_a_lost_checkpoint_is_not_a_new_run(stopped_at: int | None, store: Path, tmp_path: Path) -> None:
    """Nor where the run was stopped before its first regular one, or is to write fewer now."""
    trainer = _trainer(store, tmp_path, checkpoint_every=5)
    trainer.run(progress=False, deadline=lambda: trainer.step + 1 == stopped_at)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    for path in checkpoints(tmp_path / "checkpoints"):
        path.unlink()
    with pytest.raises(UserError, match=r"had a checkpoint \(checkpoints/step-\*.pt\), and has none now"):
        _trainer(store, tmp_path, checkpoint_every=1000)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_the_optimizers_settings_are_the_recipes(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path, betas=(0.8, 0.95), weight_decay=0.3, gradient_clip=3.0)
    (group,) = trainer.descent.raw_optimizer.param_groups
    assert (tuple(group["betas"]), group["weight_decay"], trainer.descent.clip.factor) == ((0.8, 0.95), 0.3, 3.0)


def test_the_offset_of_a_batch_is_told(store: Path, tmp_path: Path) -> None:
    """Of what G is off by, the part that all pictures have alike; two micro-batches tell what one tells."""
    found = []
    for micro in (4, 2):
        trainer = _trainer(store, tmp_path / str(micro), micro_batch_size=micro)
        with torch.no_grad():
            error = torch.cat(
                [trainer.bare_generator(b.noise, trainer.teacher.encode_prompts(b.prompts)) - b.latent for b in trainer._load(0)]
            )
        found.append(trainer.train_step(trainer._load(0))["offset"])
        assert found[-1] == pytest.approx(error.mean(dim=(0, 2, 3)).square().mean().sqrt().item(), rel=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_rate_that_warms_up_and_falls() -> None:
    config = TrainingConfig(steps=10, learning_rate=2.0, warmup_steps=2, decay_steps=4)
    assert [config.rate(step) for step in (0, 1, 5, 6, 7, 8, 9)] == pytest.approx([1, 2, 2, 2, 1.5, 1, 0.5])


def test_text_is_encoded_alike_in_training_and_validation(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the teacher's own precision, whatever the network's."""
    trainer = _trainer(store, tmp_path, mixed_precision="bf16")
    encode, found = trainer.teacher.encode_prompts, []

    def watched(prompts: list[str]) -> object:
        found.append(torch.is_autocast_enabled("cpu"))
        return encode(prompts)

    monkeypatch.setattr(trainer.teacher, "encode_prompts", watched)
    trainer.train_step(trainer._load(0))
    trainer.validate()
    trainer._sample()
    assert len(found) >= 3
    assert not any(found)


def test_a_picture_that_cannot_be_drawn_ends_no_training(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(store, tmp_path, steps=2)
    decode = trainer.teacher.decode
    monkeypatch.setattr(trainer.teacher, "decode", lambda latent: decode(latent) * float("nan"))
    with pytest.warns(UserWarning, match="no pictures of held-out pairs: pictures have NaN"):
        trainer.run(progress=False)
    assert checkpoints(tmp_path / "checkpoints")
    assert not list(tmp_path.glob("samples/held-out-*.png"))


def test_lpips_decodes_in_float32_whatever_the_teacher(pixel_folder: Path) -> None:
    """Half precision has no numbers as small as a pixel's part of the gradient."""
    teacher = StableDiffusionTeacher.from_pipeline(tiny_pipeline().to(torch.float16))
    distance = build_distance(LossConfig(distance="lpips", perceptual=str(pixel_folder)), teacher)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    (1e-6 * distance(x, torch.zeros_like(x))).sum().backward()
    assert teacher.vae.dtype == torch.float32
    assert (x.grad != 0).float().mean() > 0.9
