from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion2gan.discriminator.build import build_discriminator
from diffusion2gan.discriminator.multi_scale import DiscriminatorConfig, MultiScaleDiscriminator, score
from diffusion2gan.discriminator.regularization import GENERATED, OTHER_LATENT, OTHER_NOISE, OTHER_TEXT
from diffusion2gan.errors import UserError
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.pairs.dataset import PairDataset
from diffusion2gan.run_log import read_scalars
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from diffusion2gan.training.adversarial import AdversarialConfig, Guard, Statistics
from diffusion2gan.training.distance import LossConfig, build_distance
from diffusion2gan.training.state import LONG, checkpoint_step, checkpoints, load_state
from diffusion2gan.training.trainer import Trainer, TrainingConfig
from tests.conftest import tiny_pipeline, tiny_store
from tests.helpers import compiled_whole


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Path:
    return tiny_store(tmp_path_factory.mktemp("pairs") / "store", prompts_file, count=48, shard_size=16)


def _trainer(
    store: Path, folder: Path, adversarial: dict[str, Any] | None = None, discriminator: dict[str, Any] | None = None, **changes: object
) -> Trainer:
    teacher = StableDiffusionTeacher.from_pipeline(tiny_pipeline())
    values: dict[str, object] = {
        "steps": 2, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "holdout": 8, "checkpoint_every": 3,
        "sample_every": 100, "sample_count": 2, "log_every": 1,
    }  # fmt: skip
    of_phase_2: dict[str, Any] = {
        "steps": 6, "learning_rate": 1e-3, "discriminator_learning_rate": 1e-3, "warmup_steps": 1, "r1_every": 2, "weight": 0.5
    }  # fmt: skip
    config = AdversarialConfig.model_validate(of_phase_2 | (adversarial or {}))
    d = build_discriminator(DiscriminatorConfig.model_validate(discriminator or {}), teacher) if config.weight else None
    generator = OneStepGenerator.from_teacher(teacher)
    distance = build_distance(LossConfig(distance="mse"), teacher)
    return Trainer(
        teacher, PairDataset(store), generator, distance, TrainingConfig.model_validate(values | changes), folder, None, config, d
    )


def _weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def _phase_2(trainer: Trainer) -> Trainer:
    """Puts a trainer of `steps: 0` at the first step of phase 2."""
    trainer._enter_phase_2()
    return trainer


def test_both_phases(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path)
    assert trainer.adversary is not None
    first = _weights(trainer.adversary.bare)
    trainer.run(progress=False)
    assert trainer.step == trainer.total_steps == 8
    assert (_weights(trainer.adversary.bare) - first).abs().max() > 1e-4
    rows = {r["step"]: r for r in read_scalars(tmp_path / "metrics.jsonl") if "loss" in r}
    assert [s for s, r in rows.items() if "discriminator_loss" in r] == [3, 4, 5, 6, 7, 8]
    # Lazily: every second step of phase 2.
    assert [s for s, r in rows.items() if "r1" in r] == [3, 5, 7]
    for step in range(3, 9):
        told = rows[step]["discriminator"]
        assert told["columns"] == ["score", *trainer.adversary.statistics.columns[1:]]
        assert len(told["columns"]) == 7
        assert told["real"]["count"] == 4
        assert sum(told[k]["count"] for k in told if k not in ("columns", "real")) == 4
        # What begins at 0 has begun to be seen.
        assert rows[step]["input_norms"].keys() == {"noise_in", "latent_in.0"}
        assert min(rows[step]["input_norms"].values()) > 0
    assert rows[8]["input_norms"]["noise_in"] == pytest.approx(trainer.adversary.bare.noise_in.weight.norm().item(), abs=1e-6)
    assert (tmp_path / "samples" / "discriminator-00000008.png").exists()
    assert not list((tmp_path / "samples").glob("discriminator-00000000.png"))


def test_phase_2_begins_from_the_average_with_a_new_optimizer(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path, ema_decay=0.5)
    trainer.train_step(trainer._load(0))
    trainer.train_step(trainer._load(1))
    average = {k: v.clone() for k, v in trainer.ema.state.items()}
    assert not torch.equal(average["network.conv_in.weight"], trainer.bare_generator.state_dict()["network.conv_in.weight"])
    held_out = trainer.validate()["validation_loss"]
    trainer._enter_phase_2()
    assert all(torch.equal(v, average[k]) for k, v in trainer.bare_generator.state_dict().items())
    assert not trainer.descent.raw_optimizer.state
    assert trainer.guard == Guard(start=held_out, regression=held_out, good_step=2, judged_step=2)
    assert trainer.rate(1) == 1e-3
    assert trainer.rate(2) == 1e-3 * trainer.adversarial.schedule(0)  # type: ignore[union-attr]


def test_betas_of_phase_2(store: Path, tmp_path: Path) -> None:
    """G's own there, if they are given; what is resumed has them too."""
    for own, expected in ((None, (0.9, 0.999)), ((0.5, 0.99), (0.5, 0.99))):
        folder = tmp_path / str(own)
        for _ in range(2):
            trainer = _trainer(store, folder, {"betas": own})
            trainer.run(progress=False, deadline=lambda t=trainer: t.step + 1 >= 4)  # type: ignore[misc]
            assert [tuple(group["betas"]) for group in trainer.descent.raw_optimizer.param_groups] == [expected]


@pytest.mark.parametrize("interrupted_at", [2, 3, 6])
def test_resume_equals_an_unbroken_run(interrupted_at: int, store: Path, tmp_path: Path) -> None:
    """Both networks, both optimisers, the guard and the statistics; broken off at the border, and on either side."""
    unbroken = _trainer(store, tmp_path / "a", {"betas": (0.5, 0.99)}, log_every=4)
    unbroken.run(progress=False)
    broken = _trainer(store, tmp_path / "b", {"betas": (0.5, 0.99)}, log_every=4)
    broken.run(progress=False, deadline=lambda: broken.step + 1 >= interrupted_at)
    assert broken.step == interrupted_at
    resumed = _trainer(store, tmp_path / "b", {"betas": (0.5, 0.99)}, log_every=4)
    assert resumed.step == interrupted_at
    resumed.run(progress=False)
    assert unbroken.adversary is not None
    assert resumed.adversary is not None
    assert torch.equal(_weights(unbroken.bare_generator), _weights(resumed.bare_generator))
    assert torch.equal(_weights(unbroken.adversary.bare), _weights(resumed.adversary.bare))
    a, b = (load_state(checkpoints(tmp_path / x / "checkpoints")[-1]) for x in "ab")
    assert a.guard == b.guard
    assert a.gradient_scale == b.gradient_scale
    rows = [[{k: v for k, v in r.items() if k != "images_per_second"} for r in read_scalars(tmp_path / x / "metrics.jsonl")] for x in "ab"]
    assert rows[0] == rows[1]


def test_weight_0_is_the_regression_alone(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path, {"weight": 0.0})
    assert trainer.adversary is None
    trainer.run(progress=False)
    assert trainer.step == 8
    assert not any("discriminator_loss" in r for r in read_scalars(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("loss", ["logistic", "hinge", "relativistic"])
def test_g_leaves_no_gradient_in_d(loss: str, store: Path, tmp_path: Path) -> None:
    trainer = _phase_2(_trainer(store, tmp_path, {"loss": loss}, steps=0))
    adversary = trainer.adversary
    assert adversary is not None
    trainer.train_step(trainer._load(0))
    assert all(p.grad is None for p in adversary.bare.parameters())
    assert all(p.requires_grad for p in adversary.bare.parameters())
    before = _weights(adversary.bare)
    (pairs,) = trainer._load(1)
    with adversary.frozen():
        trainer.generator_step(pairs, trainer.teacher.encode_prompts(pairs.prompts), None, adversary)
    assert all(p.grad is None for p in adversary.bare.parameters())
    assert torch.equal(before, _weights(adversary.bare))
    assert any(p.grad is not None for p in trainer.bare_generator.parameters())


@pytest.mark.parametrize("loss", ["logistic", "hinge", "relativistic"])
def test_the_gradient_of_g_is_of_both_terms(store: Path, tmp_path: Path, loss: str) -> None:
    """L_G = d + lambda_GAN L_GAN, written out."""
    trainer = _phase_2(_trainer(store, tmp_path, {"loss": loss}, steps=0))
    adversary = trainer.adversary
    assert adversary is not None
    (pairs,) = trainer._load(0)
    condition = trainer.teacher.encode_prompts(pairs.prompts)
    with adversary.frozen():
        trainer.generator_step(pairs, condition, None, adversary)
    found = [p.grad.clone() for p in trainer.bare_generator.parameters() if p.grad is not None]
    trainer.bare_generator.zero_grad()
    fake = trainer.bare_generator(pairs.noise, condition)
    maps = adversary.bare(fake, pairs.noise, condition)
    real = adversary.bare(pairs.latent, pairs.noise, condition)
    of_map = {
        "logistic": lambda name: -torch.log(torch.sigmoid(maps[name])),
        "hinge": lambda name: -maps[name],
        "relativistic": lambda name: -torch.log(torch.sigmoid(maps[name] - real[name].detach())),
    }[loss]
    term = torch.stack([of_map(name).mean() for name in maps]).mean()
    ((fake - pairs.latent).square().mean() + 0.5 * term).backward()
    expected = [p.grad for p in trainer.bare_generator.parameters() if p.grad is not None]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_noise_another_latent_has_another_text(store: Path, tmp_path: Path) -> None:
    shares = {"other_latent": 0.9, "other_text": 0.0, "other_noise": 0.0}
    trainer = _phase_2(_trainer(store, tmp_path, shares, {"noise": False}, steps=0, batch_size=8))
    pairs = PairDataset(store)
    of = {pairs[i].latent.tobytes(): pairs.prompt(i) for i in range(len(pairs))}
    found = 0
    for step in range(8):
        (batch,) = trainer._load(step)
        assert batch.mixed is not None
        for i in np.flatnonzero(batch.mixed.kind.numpy() == OTHER_LATENT):
            assert of[batch.mixed.latent[i].numpy().astype(np.float16).tobytes()] != batch.prompts[i]
            found += 1
    assert found > 30


@pytest.mark.parametrize("kind", ["diffusion", "scratch"])
def test_d_learns_to_tell_and_g_lowers_eq_6(kind: str, store: Path, tmp_path: Path) -> None:
    """D against a frozen G is right in more than 70 % of cases; G against that frozen D lowers its term."""
    changes = {"other_latent": 0.0, "other_text": 0.0, "other_noise": 0.0, "steps": 60, "discriminator_learning_rate": 3e-3}
    trainer = _phase_2(_trainer(store, tmp_path, changes, {"kind": kind}, steps=0, batch_size=8))
    adversary, guard = trainer.adversary, trainer.guard
    assert adversary is not None
    assert guard is not None
    for step in range(40):
        batches = trainer._load(step)
        conditions = [trainer.teacher.encode_prompts(p.prompts) for p in batches]
        with torch.no_grad():
            fakes = [trainer.descent.trained(p.noise, c) for p, c in zip(batches, conditions, strict=True)]
        assert adversary.update(batches, conditions, fakes, step, 0, guard) is None
        if step == 29:
            adversary.tell()
    told = adversary.tell()["discriminator"]
    assert (told["real"]["accuracy"][0] + told["generated"]["accuracy"][0]) / 2 > 0.7
    trainer.adversarial = adversary.config
    terms = []
    for _ in range(15):
        (pairs,) = trainer._load(0)
        condition = trainer.teacher.encode_prompts(pairs.prompts)
        with adversary.frozen():
            term = adversary.generator_term(trainer.descent.trained(pairs.noise, condition), pairs, condition).mean()
            term.backward()
        terms.append(term.item())
        trainer.descent.step(1e-3, trainer.descent.norm())
    assert terms[-1] < terms[0] - 0.02


def test_single_sample_r1_every_16_steps_by_default(store: Path, tmp_path: Path) -> None:
    """Section 3.3: of a batch, one sample in each process."""
    assert AdversarialConfig(steps=1).r1_every == 16
    trainer = _phase_2(_trainer(store, tmp_path, {"r1_every": 16}, steps=0, batch_size=8))
    assert trainer.adversary is not None
    drawn = [len(trainer.adversary._r1_rows(step, 0)[0]) for step in range(33)]
    assert drawn == [1 if step % 16 == 0 else 0 for step in range(33)]


def test_what_d_sees(store: Path, tmp_path: Path) -> None:
    """Each kind of fake: whose latent, whose noise, whose text. Against the pairs themselves."""
    shares = {"other_latent": 0.3, "other_text": 0.3, "other_noise": 0.3}
    trainer = _phase_2(_trainer(store, tmp_path, shares, steps=0, batch_size=8))
    pairs = PairDataset(store)
    seen = set()
    for step in range(12):
        rows = trainer.order.rows(8 * step, 8)
        (batch,) = trainer._load(step)
        mixed = batch.mixed
        assert mixed is not None
        for i, (row, kind) in enumerate(zip(rows, mixed.kind.tolist(), strict=True)):
            own = pairs[int(row)]
            others = [pairs[int(r)] for r in rows if r != row]
            seen.add(kind)
            x, z, c = mixed.latent[i].numpy(), mixed.noise[i].numpy(), mixed.prompts[i]
            has = [np.array_equal(x, own.latent.astype(np.float32)), np.array_equal(z, own.noise), c == own.prompt]
            if kind == GENERATED:
                assert has == [True, True, True]
            elif kind == OTHER_LATENT:
                assert has == [False, True, True]
                assert any(np.array_equal(x, o.latent.astype(np.float32)) for o in others)
            elif kind == OTHER_TEXT:
                assert has == [True, True, False]
                assert c in [o.prompt for o in others]
            else:
                assert has == [True, False, True]
                assert any(np.array_equal(z, o.noise) for o in others)
    assert seen == {GENERATED, OTHER_LATENT, OTHER_TEXT, OTHER_NOISE}


def test_d_is_given_g_only_where_nothing_was_swapped(store: Path, tmp_path: Path) -> None:
    shares = {"other_latent": 0.2, "other_text": 0.2, "other_noise": 0.2, "r1": "none"}
    trainer = _phase_2(_trainer(store, tmp_path, shares, steps=0, batch_size=8))
    adversary = trainer.adversary
    assert adversary is not None
    (batch,) = trainer._load(0)
    mixed = batch.mixed
    assert mixed is not None
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    adversary.bare.register_forward_pre_hook(lambda _m, a: given.append((a[0].clone(), a[1].clone(), a[2].embeddings.clone())))
    fake = torch.full_like(batch.latent, 7.0)
    adversary._step(batch, trainer.teacher.encode_prompts(batch.prompts), fake, None)
    latent, noise, text = given[0]
    assert torch.equal(latent[:8], batch.latent)
    expected = trainer.teacher.encode_prompts([*batch.prompts, *mixed.prompts]).embeddings
    torch.testing.assert_close(text, expected)
    assert (mixed.kind == OTHER_TEXT).any() and not torch.equal(expected[:8], expected[8:])
    assert torch.equal(noise, torch.cat([batch.noise, mixed.noise]))
    for i, kind in enumerate(mixed.kind.tolist()):
        assert torch.equal(latent[8 + i], fake[i] if kind == GENERATED else mixed.latent[i])
    assert 0 < (mixed.kind == GENERATED).sum() < 8


@pytest.mark.parametrize("r1", ["exact", "finite_difference"])
def test_r1_is_scaled_for_its_interval_and_count(r1: str, store: Path, tmp_path: Path) -> None:
    """D's gradient with R1 - without = every x gamma / 2 x the mean over its samples of |grad s|^2."""
    gradients = {}
    for form in (r1, "none"):
        config = {"r1": form, "r1_every": 4, "r1_gamma": 6.0, "r1_count": 2, "r1_sigma": 1e-3}
        trainer = _phase_2(_trainer(store, tmp_path / form, config, steps=0, batch_size=8))
        adversary = trainer.adversary
        assert adversary is not None
        adversary.bare.double()
        (batch,) = trainer._load(0)
        batch = replace(batch, latent=batch.latent.double(), noise=batch.noise.double(), mixed=None)
        condition = trainer.teacher.encode_prompts(batch.prompts)
        rows, directions = adversary._r1_rows(0, 0)
        assert len(rows) == (0 if form == "none" else 2)
        if rows:
            assert rows[0] < 4 <= rows[1]
            index = torch.tensor(rows)

            def s(x: Tensor, adversary=adversary, batch=batch, condition=condition, index=index) -> Tensor:  # type: ignore[no-untyped-def]
                return score(adversary.bare(x, batch.noise[index], condition[index]))

            x = batch.latent[index].requires_grad_()
            if r1 == "exact":
                (slope,) = torch.autograd.grad(s(x).sum(), x, create_graph=True)
                penalty = slope.square().flatten(1).sum(1)
            else:
                assert directions is not None
                penalty = ((s(x + 1e-3 * directions.double()) - s(x)) / 1e-3).square()
            weights = [p for p in adversary.bare.parameters() if p.ndim > 1]
            expected = torch.autograd.grad(4 * 3.0 * penalty.mean(), weights, allow_unused=True)
        r1_input = adversary._r1_input([batch], [condition], rows, None if directions is None else directions.double())
        adversary._step(batch, condition, torch.zeros_like(batch.latent), r1_input)
        gradients[form] = [p.grad.clone() for p in adversary.bare.parameters() if p.ndim > 1]
        # Not at the steps between.
        assert adversary._r1_rows(3, 0) == ([], None)
        assert bool(adversary._r1_rows(4, 0)[0]) == (form != "none")
    for with_r1, without, wanted in zip(gradients[r1], gradients["none"], expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(with_r1 - without, wanted.to(with_r1), rtol=1e-5, atol=1e-8)


def test_accumulated_micro_batches_equal_the_whole_batch(store: Path, tmp_path: Path) -> None:
    config = {"r1_count": 2, "steps": 4}
    whole = _trainer(store, tmp_path / "a", config, batch_size=8)
    whole.run(progress=False)
    parts = _trainer(store, tmp_path / "b", config, batch_size=8, micro_batch_size=2)
    assert parts.share(2).accumulation == 4
    parts.run(progress=False)
    assert whole.adversary is not None
    assert parts.adversary is not None
    assert (_weights(whole.bare_generator) - _weights(parts.bare_generator)).abs().max() < 2e-4
    for a, b in zip(read_scalars(tmp_path / "a" / "metrics.jsonl"), read_scalars(tmp_path / "b" / "metrics.jsonl"), strict=True):
        for key in ("loss", "gradient_norm", "adversarial_loss", "discriminator_loss", "discriminator_gradient_norm", "r1"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=2e-3), (a["step"], key)
        assert a.get("discriminator", {}).get("real", {}).get("count") == b.get("discriminator", {}).get("real", {}).get("count")


def test_phase_2_has_a_batch_and_an_average_of_its_own(store: Path, tmp_path: Path) -> None:
    own = {"batch_size": 2, "ema_decay": 0.25}
    trainer = _trainer(store, tmp_path / "a", own, ema_decay=0.9)
    assert [len(batch.prompts) for step in (1, 2) for batch in trainer._load(step)] == [4, 2]
    # No pair is left out between the phases, and none seen twice.
    prompts = [p for step in range(8) for batch in trainer._load(step) for p in batch.prompts]
    pairs = PairDataset(store)
    assert prompts == [pairs.prompt(int(r)) for r in trainer.order.rows(0, 2 * 4 + 6 * 2)]
    for step in range(2):
        trainer.train_step(trainer._load(step))
    trainer._enter_phase_2()
    before = {k: v.clone() for k, v in trainer.ema.state.items()}
    trainer.train_step(trainer._load(2))
    now, name = trainer.bare_generator.state_dict(), "network.conv_in.weight"
    torch.testing.assert_close(trainer.ema.state[name], 0.25 * before[name] + 0.75 * now[name])
    whole = _trainer(store, tmp_path / "b", own | {"r1_count": 2})
    whole.run(progress=False)
    parts = _trainer(store, tmp_path / "c", own | {"r1_count": 2}, micro_batch_size=1)
    assert [parts.share(s).accumulation for s in (1, 2)] == [4, 2]
    parts.run(progress=False)
    assert (_weights(whole.bare_generator) - _weights(parts.bare_generator)).abs().max() < 2e-4
    with pytest.raises(UserError, match=r"adversarial.batch_size is 3, expected a multiple of processes x micro_batch_size \(1 x 2\)"):
        _trainer(store, tmp_path / "d", {"batch_size": 3}, micro_batch_size=2)


def test_a_batch_of_one_works(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path, batch_size=1)
    trainer.run(progress=False)
    assert trainer.step == 8


def test_gradient_checkpointing_changes_nothing(store: Path, tmp_path: Path) -> None:
    plain = _trainer(store, tmp_path / "a")
    plain.run(progress=False)
    checkpointed = _trainer(store, tmp_path / "b", discriminator={"gradient_checkpointing": True})
    assert checkpointed.adversary is not None
    calls = [0]
    checkpointed.adversary.bare.network.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))  # type: ignore[union-attr]
    checkpointed.run(progress=False)
    # Six steps of D, six looks of G and three of R1, and each computed again.
    assert calls[0] > 15
    assert (_weights(plain.bare_generator) - _weights(checkpointed.bare_generator)).abs().max() < 1e-5


def test_compiled_training_is_one_graph_and_the_same(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D with its hooks, in D's step and frozen in G's; R1 runs uncompiled beside it."""
    plain = _trainer(store, tmp_path / "plain")
    plain.run(progress=False)
    compiled = compiled_whole(monkeypatch)
    whole = _trainer(store, tmp_path / "whole", compile=True)
    whole.run(progress=False)
    assert compiled == [OneStepGenerator, MultiScaleDiscriminator]
    assert plain.adversary is not None
    assert whole.adversary is not None
    torch.testing.assert_close(_weights(whole.bare_generator), _weights(plain.bare_generator), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(_weights(whole.adversary.bare), _weights(plain.adversary.bare), atol=1e-4, rtol=1e-4)


def test_compiled_with_gradient_checkpointing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of D, whose hooks are inside of what is computed again."""
    real = torch.compile

    def compile_d(module: nn.Module, dynamic: bool) -> object:
        return real(module, dynamic=dynamic, backend="aot_eager") if isinstance(module, MultiScaleDiscriminator) else module

    monkeypatch.setattr(torch, "compile", compile_d)
    torch._dynamo.reset()
    trainer = _trainer(store, tmp_path, {"steps": 1, "r1": "none"}, {"gradient_checkpointing": True}, compile=True, steps=0)
    trainer.run(progress=False)
    assert trainer.step == 1


def test_bf16_trains(store: Path, tmp_path: Path) -> None:
    """But R1 is float32: rounded logits have no slope."""
    trainer = _trainer(store, tmp_path, {"r1_every": 1}, mixed_precision="bf16")
    adversary = trainer.adversary
    assert adversary is not None
    computed: list[torch.dtype] = []
    adversary.bare.network.conv_in.register_forward_hook(lambda _m, _a, out: computed.append(out.dtype))
    r1, in_r1 = adversary._r1, []

    def watched(*arguments: Any) -> Tensor:
        before = len(computed)
        penalty = r1(*arguments)
        in_r1.extend(computed[before:])
        del computed[before:]
        return penalty

    adversary._r1 = watched  # type: ignore[method-assign]
    trainer.run(progress=False)
    assert set(computed) == {torch.bfloat16}
    assert set(in_r1) == {torch.float32}
    assert trainer.adversary is not None
    assert all(p.dtype == torch.float32 for p in trainer.adversary.bare.parameters())


class TestGuard:
    def test_a_regression_loss_that_grows(self) -> None:
        config, guard = AdversarialConfig(steps=1), Guard(start=1.0, regression=1.0)
        for _ in range(500):
            assert guard.follow_regression(2.9, config) is None
        wrong = [guard.follow_regression(4.0, config) for _ in range(20)]
        assert wrong[0] is None
        assert wrong[-1] is not None
        assert "more than 3 times the 1 at the start" in wrong[-1]

    @pytest.mark.parametrize(("value", "shown"), [(0.995, "99.5%"), (0.505, "50.5%")])
    def test_an_accuracy_outside_over_a_window(self, value: float, shown: str) -> None:
        config, guard = AdversarialConfig(steps=1), Guard(start=1.0, regression=1.0)
        # In every step a few more or less; twice as many answers about real latents.
        right = value * 1000 + np.resize([-4, 4], 500)
        wrong = [guard.follow_accuracy([2 * float(r), 2000, float(r), 1000], config) for r in right]
        assert not any(wrong[:-1])
        assert wrong[-1] is not None
        assert f"was {shown} over 500 steps, outside 51% to 99%" in wrong[-1]

    def test_small_batches_do_not_hide_a_guessing_discriminator(self) -> None:
        """Half right in the mean, however far single steps lie apart."""
        config, guard = AdversarialConfig(steps=1), Guard(start=1.0, regression=1.0)
        right = np.random.default_rng(0).binomial(4, 0.5, (4000, 2))
        assert any(guard.follow_accuracy([float(r), 4, float(g), 4], config) for r, g in right)

    def test_what_takes_everything_for_real_is_right_in_half_of_the_cases(self) -> None:
        """However few of D's fakes are G's, or none in a step."""
        config, guard = AdversarialConfig(steps=1), Guard(start=1.0, regression=1.0)
        wrong = [guard.follow_accuracy([64, 64, 0, 6 if i % 2 else 0], config) for i in range(500)]
        assert "was 50.0% over" in str(wrong[-1])

    def test_a_collapse_is_seen_wherever_it_begins(self) -> None:
        config, guard = AdversarialConfig(steps=1), Guard(start=1.0, regression=1.0)
        for _ in range(750):
            assert guard.follow_accuracy([8, 10, 8, 10], config) is None
        # The last of the good steps leaves the window with the 500th bad one.
        wrong = [guard.follow_accuracy([10, 10, 10, 10], config) for _ in range(500)]
        assert wrong[450] is None
        assert "was 100.0% over 500 steps" in str(wrong[-1])

    def test_nothing_wrong(self) -> None:
        config, guard = AdversarialConfig(steps=1), Guard(start=1.0, regression=1.0)
        for _ in range(2000):
            assert guard.follow_regression(0.8, config) is None
            assert guard.follow_accuracy([8, 10, 4, 5], config) is None

    def test_the_last_good_average(self) -> None:
        guard = Guard(start=1.0, regression=1.0)
        config = AdversarialConfig(steps=1, good_regression=1.5)
        for step, loss, good in ((1, 1.4, 1), (2, 1.6, 1), (3, 0.9, 3), (4, float("nan"), 3)):
            guard.judge(step, loss, config)
            assert (guard.good_step, guard.judged_step) == (good, step)


@pytest.mark.parametrize("who", ["learning_rate", "discriminator_learning_rate", "both"])
def test_a_phase_that_goes_wrong_stops_and_keeps_the_good_average(who: str, store: Path, tmp_path: Path) -> None:
    """Learning rates far too large: for G, for D, for both."""
    rates = {"learning_rate": 3.0, "discriminator_learning_rate": 3.0}
    changes: dict[str, Any] = {"steps": 400, "stop_accuracy_steps": 20, "weight": 1.0}
    changes |= rates if who == "both" else {who: rates[who]}
    trainer = _trainer(store, tmp_path, changes, checkpoint_every=1, keep_checkpoints=1, sample_every=1000, validate_every=1000)
    with pytest.raises(UserError, match=r"step \d+: .*stopped before the update, the last good average is in .*step-\d+\.pt"):
        trainer.run(progress=False)
    assert trainer.guard is not None
    good = trainer.guard.good_step
    kept = {checkpoint_step(p) for p in checkpoints(tmp_path / "checkpoints")}
    assert good in kept
    state = load_state(next(p for p in checkpoints(tmp_path / "checkpoints") if checkpoint_step(p) == good))
    assert all(torch.isfinite(v).all() for v in state.ema.values())
    trainer.ema.load(state.ema)
    assert trainer.validate()["validation_loss"] <= 1.5 * trainer.guard.start


def test_non_finite_logits_stop_before_the_update(store: Path, tmp_path: Path) -> None:
    trainer = _phase_2(_trainer(store, tmp_path, steps=0))
    adversary = trainer.adversary
    assert adversary is not None
    with torch.no_grad():
        adversary.bare.readouts[0].out.bias.fill_(float("nan"))  # type: ignore[union-attr, index]
    before = [_weights(m).nan_to_num(7.0) for m in (trainer.bare_generator, adversary.bare)]
    with pytest.raises(UserError, match="step 0: the discriminator loss is nan"):
        trainer.train_step(trainer._load(0))
    for was, module in zip(before, (trainer.bare_generator, adversary.bare), strict=True):
        assert torch.equal(was, _weights(module).nan_to_num(7.0))


def test_a_non_finite_term_of_g_is_named(store: Path, tmp_path: Path) -> None:
    """D's own step is sound; only its answer to G's second look is not."""
    trainer = _phase_2(_trainer(store, tmp_path, steps=0))
    adversary = trainer.adversary
    assert adversary is not None
    term = adversary.generator_term
    adversary.generator_term = lambda *a: term(*a) * float("nan")  # type: ignore[method-assign]
    before = _weights(trainer.bare_generator)
    with pytest.raises(UserError, match="step 0: the adversarial loss is nan.*last good average is in .*step-00000000.pt"):
        trainer.train_step(trainer._load(0))
    assert torch.equal(before, _weights(trainer.bare_generator))


def test_r1_is_logged_whatever_the_steps_between(store: Path, tmp_path: Path) -> None:
    trainer = _trainer(store, tmp_path, {"steps": 12, "r1_every": 4}, steps=0, log_every=5)
    seen: list[float] = []
    adversary = trainer.adversary
    assert adversary is not None
    own = adversary._r1
    adversary._r1 = lambda *a: seen.append(float((r := own(*a)).detach().sum())) or r  # type: ignore[method-assign, func-returns-value]
    trainer.run(progress=False)
    told = [r["r1"] for r in read_scalars(tmp_path / "metrics.jsonl") if "r1" in r]
    # Due at steps 0, 4 and 8; told after 5, 10 and 12.
    assert told == pytest.approx([(seen[0] + seen[1]) / 2, seen[2]])


def test_steps_with_r1_are_cut_by_their_own_norm(store: Path, tmp_path: Path) -> None:
    """A heavy penalty every other step: what is left of its gradient is many times the others', and both norms come back."""
    trainer = _trainer(store, tmp_path, {"steps": 8, "r1_gamma": 1e7}, steps=0)
    left: dict[bool, list[float]] = {True: [], False: []}
    adversary = trainer.adversary
    assert adversary is not None
    adversary._plain_clip.state = (1e-3, LONG)  # as after many steps without R1
    own = adversary.descent.raw_optimizer.step

    def step(*a: Any) -> Any:
        gradients = [p.grad for p in adversary.bare.parameters() if p.grad is not None]
        left[len(left[True]) == len(left[False])].append(torch.nn.utils.get_total_norm(gradients).item())
        return own(*a)

    adversary.descent.raw_optimizer.step = step  # type: ignore[method-assign]
    trainer.run(progress=False)
    assert len(left[True]) == len(left[False]) == 4
    assert min(left[True]) > 10 * max(left[False])
    rows = [r for r in read_scalars(tmp_path / "metrics.jsonl") if "discriminator_loss" in r]
    assert [r.get("r1_gradient_norm") for r in rows] == [r["discriminator_gradient_norm"] if "r1" in r else None for r in rows]
    again = _trainer(store, tmp_path, {"steps": 8, "r1_gamma": 1e7}, steps=0).adversary
    assert again is not None
    for kind in ("_plain_clip", "_r1_clip"):
        assert getattr(again, kind).scale == getattr(adversary, kind).scale > 0


def test_relativistic_answers_are_about_pairs(store: Path, tmp_path: Path) -> None:
    """An offset common to both costs nothing there, and says nothing of D's accuracy."""
    statistics = Statistics(["a"], torch.device("cpu"))
    real, fake = {"a": torch.full((4, 1, 1, 1), 9.0)}, {"a": torch.full((4, 1, 1, 1), 5.0)}
    kind = torch.full((4,), GENERATED)
    assert statistics.add(real, fake, kind).tolist() == [[4.0, 4.0], [0.0, 4.0]]
    assert statistics.add(real, fake, kind, relative=True).tolist() == [[4.0, 4.0], [4.0, 4.0]]
    # A guess about a mismatch says nothing of real and generated latents.
    fake["a"][2:] = 99.0
    mixed = torch.tensor([GENERATED, GENERATED, OTHER_TEXT, OTHER_NOISE])
    statistics.sums.zero_()
    assert statistics.add(real, fake, mixed, relative=True).tolist() == [[2.0, 2.0], [2.0, 2.0]]
    told = statistics.tell(statistics.sums)
    assert told["real"]["count"] == 2 and told["other_text"]["accuracy"] == [0.0, 0.0]


def test_real_and_generated_weigh_alike_in_the_accuracy(store: Path, tmp_path: Path) -> None:
    """A discriminator that takes everything for real is right in half of the cases, not in most."""
    trainer = _phase_2(_trainer(store, tmp_path, {"other_latent": 0.6, "stop_accuracy_steps": 5}, steps=0, batch_size=8))
    adversary = trainer.adversary
    assert adversary is not None
    with torch.no_grad():
        for head in adversary.bare.readouts:  # type: ignore[union-attr]
            head.out.bias.fill_(50.0)  # type: ignore[union-attr]
    for step in range(4):
        trainer.train_step(trainer._load(step))
    before = [_weights(m) for m in (trainer.bare_generator, adversary.bare)]
    with pytest.raises(UserError, match=r"accuracy on real and generated latents was 50.0% over 5 steps"):
        trainer.train_step(trainer._load(4))
    assert all(torch.equal(was, _weights(m)) for was, m in zip(before, (trainer.bare_generator, adversary.bare), strict=True))


def test_a_stop_leaves_the_judgement_to_the_next_start(store: Path, tmp_path: Path) -> None:
    """The checkpoint at which a run was asked to stop is one to go back to as well, if it is good."""
    broken = _trainer(store, tmp_path, {"learning_rate": 1e-5, "weight": 0.01})
    broken.run(progress=False, deadline=lambda: broken.step + 1 >= 5)
    state = load_state(checkpoints(tmp_path / "checkpoints")[-1])
    assert state.guard is not None
    assert (state.step, state.guard["good_step"]) == (5, 3)
    resumed = _trainer(store, tmp_path, {"learning_rate": 1e-5, "weight": 0.01})
    assert resumed.guard is not None
    assert resumed.guard.good_step == 5


def test_the_end_of_phase_1_stays(store: Path, tmp_path: Path) -> None:
    _trainer(store, tmp_path, checkpoint_every=1, keep_checkpoints=1).run(progress=False)
    kept = [checkpoint_step(p) for p in checkpoints(tmp_path / "checkpoints")]
    assert {2, 8} <= set(kept)
    assert len(kept) <= 3


def test_a_weight_without_a_discriminator_is_an_error(store: Path, tmp_path: Path) -> None:
    teacher = StableDiffusionTeacher.from_pipeline(tiny_pipeline())
    config = TrainingConfig(steps=1, batch_size=4, holdout=8)
    distance = build_distance(LossConfig(distance="mse"), teacher)
    with pytest.raises(ValueError, match="adversarial.weight is 0.25 and there is no discriminator"):
        Trainer(
            teacher,
            PairDataset(store),
            OneStepGenerator.from_teacher(teacher),
            distance,
            config,
            tmp_path,
            None,
            AdversarialConfig(steps=1),
        )


def test_r1_count_must_fit(store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"adversarial.r1_count is 3, expected a multiple of the processes \(1\) that divides phase 2.s batch size"
    ):
        _trainer(store, tmp_path, {"r1_count": 3})


def test_statistics_by_hand() -> None:
    statistics = Statistics(["a", "b"], torch.device("cpu"))
    real = {"a": torch.tensor([[[[1.0, 3.0]]], [[[-1.0, -1.0]]]]), "b": torch.tensor([[[[2.0]]], [[[3.0]]]])}
    fake = {"a": torch.tensor([[[[-1.0, -3.0]]], [[[5.0, 5.0]]]]), "b": torch.tensor([[[[4.0]]], [[[-9.0]]]])}
    right = statistics.add(real, fake, torch.tensor([GENERATED, OTHER_TEXT]))
    # Real: scores 2 and 1, both right; the generated one scores 1, wrong; the mismatch is not counted.
    assert right.tolist() == [[2.0, 2.0], [0.0, 1.0]]
    told = statistics.tell(statistics.sums)
    assert told == {
        "columns": ["score", "a", "b"],
        "real": {"count": 2, "logit": [1.5, 0.5, 2.5], "accuracy": [1.0, 0.5, 1.0]},
        "generated": {"count": 1, "logit": [1.0, -2.0, 4.0], "accuracy": [0.0, 1.0, 0.0], "below_real": [1.0, 1.0, 0.0]},
        "other_text": {"count": 1, "logit": [-2.0, 5.0, -9.0], "accuracy": [1.0, 0.0, 1.0], "below_real": [1.0, 0.0, 1.0]},
    }


def test_a_map_that_a_mismatch_does_not_reach_tells_nothing() -> None:
    statistics = Statistics(["a"], torch.device("cpu"))
    same = {"a": torch.ones(2, 1, 2, 2)}
    statistics.add(same, same, torch.full((2,), OTHER_TEXT))
    assert statistics.tell(statistics.sums)["other_text"]["below_real"] == [0.5, 0.5]


def test_the_optimizers_settings_are_the_recipes(store: Path, tmp_path: Path) -> None:
    of_d = {"discriminator_betas": (0.1, 0.7), "discriminator_gradient_clip": 5.0}
    trainer = _trainer(store, tmp_path, of_d, weight_decay=0.3, gradient_clip=3.0)
    assert trainer.adversary is not None
    descent = trainer.adversary.descent
    (group,) = descent.raw_optimizer.param_groups
    assert (tuple(group["betas"]), group["weight_decay"], descent.clip.factor) == ((0.1, 0.7), 0.3, 5.0)
    assert trainer.descent.clip.factor == 3.0
