"""A run that begins where another ended: phase 2 from a phase-1 student, as every row of Table 2 does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusion2gan.demo import _history
from diffusion2gan.embedded.weights import student_folder
from diffusion2gan.errors import UserError
from diffusion2gan.pipeline import OneStepPipeline
from diffusion2gan.recipe import Recipe, load_recipe, parse_recipe
from diffusion2gan.run import _alone_in, _hub_options, export_run, generator_weights, simulate_recipe, train_recipe
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.published import REVISIONS
from diffusion2gan.training.state import checkpoint_path, checkpoints, load_state
from diffusion2gan.training.trainer import Trainer
from tests.conftest import tiny_pipeline
from tests.helpers import recipe_values, tree_digest

PHASE_2 = {"steps": 4, "weight": 0.5, "learning_rate": 1e-3, "discriminator_learning_rate": 1e-3}


def _recipe(teacher: Path, prompts: Path, /, **changes: Any) -> Recipe:
    return parse_recipe(recipe_values(teacher, prompts, **changes), "tiny")


@pytest.fixture(scope="module")
def phase_1(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, prompts_file: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("phase1")
    recipe = _recipe(tiny_teacher_folder, prompts_file, training__steps=6)
    simulate_recipe(recipe, folder / "store", progress=False)
    train_recipe(recipe, folder / "store", folder / "run", progress=False)
    export_run(folder / "run", folder / "student", "float32")
    return {name: folder / name for name in ("store", "run", "student")}


def _phase_2(phase_1: dict[str, Path], start: Path | str, teacher: Path, prompts: Path, /, **changes: Any) -> Recipe:
    values = {"training__steps": 0, "adversarial": PHASE_2, "generator": {"start": str(start)}}
    return _recipe(teacher, prompts, **(values | changes))


@pytest.mark.parametrize("of", ["run", "student"])
def test_phase_2_starts_from(of: str, phase_1: dict[str, Path], tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    recipe = _phase_2(phase_1, phase_1[of], tiny_teacher_folder, prompts_file)
    average = load_state(checkpoints(phase_1["run"] / "checkpoints")[-1]).ema
    weights = generator_weights(phase_1[of], recipe)
    assert weights.keys() == average.keys()
    assert all(torch.equal(v, weights[k]) for k, v in average.items())
    trainer = train_recipe(recipe, phase_1["store"], tmp_path / "run", progress=False)
    assert trainer.step == recipe.total_steps == 4
    # Nobody needs the teacher's own any more.
    assert all(p.is_meta for p in trainer.teacher.network.parameters())  # type: ignore[attr-defined]
    first = load_state(checkpoint_path(tmp_path / "run" / "checkpoints", 3))
    assert first.guard is not None
    # The average that was started from is what the guard compares with.
    begun = train_recipe(
        _phase_2(phase_1, phase_1[of], tiny_teacher_folder, prompts_file, adversarial=PHASE_2 | {"weight": 0.0, "steps": 1}),
        phase_1["store"],
        tmp_path / "other",
        progress=False,
    )
    assert begun.guard is not None
    assert first.guard["start"] == begun.guard.start
    facts = json.loads((phase_1["student"] / "diffusion2gan.json").read_text())
    assert "lambda_GAN" not in facts
    export_run(tmp_path / "run", tmp_path / "student", "float32")
    facts = OneStepPipeline.from_pretrained(tmp_path / "student").facts
    assert facts["lambda_GAN"] == 0.5
    assert facts["adversarial_steps"] == 4
    assert facts["discriminator"] == {"kind": "diffusion", "noise": True, "multi_scale": True}
    # What lies behind the start is told too, also when the start is gone.
    assert facts["start"] == {"recipe": "tiny", "steps": 6, "batch_size": 4}
    assert _history(facts) == "6 steps of 4, then 4 steps of 4 against the discriminator"


def test_a_start_that_cannot_be_one_is_said(
    phase_1: dict[str, Path], tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path
) -> None:
    def start(folder: Path, **changes: Any) -> None:
        generator_weights(folder, _phase_2(phase_1, folder, tiny_teacher_folder, prompts_file, **changes))

    with pytest.raises(UserError, match=r"generator.start: .*nowhere: no such folder"):
        start(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no student here"):
        start(tmp_path)
    with pytest.raises(UserError, match="was trained with timestep 999, this recipe has 981"):
        start(phase_1["run"], generator={"start": str(phase_1["run"]), "timestep": 981})
    tiny_pipeline(seed=3).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="was trained with teacher weights"):
        start(phase_1["student"], teacher={"source": str(tmp_path / "teacher")})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.yaml").write_text((phase_1["run"] / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        start(tmp_path / "empty")


def test_a_run_keeps_its_start_and_its_lengths(
    phase_1: dict[str, Path], tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path
) -> None:
    changes = {"training__steps": 2, "adversarial": PHASE_2 | {"decay_steps": 2}}
    recipe = _phase_2(phase_1, phase_1["run"], tiny_teacher_folder, prompts_file, **changes)
    train_recipe(recipe, phase_1["store"], tmp_path / "run", progress=False)

    def again(**others: Any) -> None:
        other = _phase_2(phase_1, phase_1["run"], tiny_teacher_folder, prompts_file, **(changes | others))
        train_recipe(other, phase_1["store"], tmp_path / "run", progress=False)

    again()
    for other in ({"start": str(phase_1["student"])}, {}):
        with pytest.raises(UserError, match="generator.start is .* there and"):
            again(generator=other)
    with pytest.raises(UserError, match=r"training.steps is 2 there and 3 now, but at step 6 phase 2 has begun"):
        again(training__steps=3)
    with pytest.raises(UserError, match=r"adversarial.steps is 4 there and 9 now, but at step 6 the learning rate is already falling"):
        again(adversarial=changes["adversarial"] | {"steps": 9})  # type: ignore[operator]
    with pytest.raises(UserError, match=r"adversarial.weight is 0.5 there and 0.25 now"):
        again(adversarial=changes["adversarial"] | {"weight": 0.25})  # type: ignore[operator]
    with pytest.raises(UserError, match=r"discriminator.multi_scale is True there and False now"):
        again(discriminator={"multi_scale": False})


def test_lengths_that_no_longer_fit_are_refused(
    phase_1: dict[str, Path], tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path
) -> None:
    def train(out: str, steps: int, after: int, stop: int | None = None, fall: int = 0) -> Trainer:
        phase_2 = PHASE_2 | {"steps": after, "decay_steps": fall}
        recipe = _recipe(tiny_teacher_folder, prompts_file, training__steps=steps, adversarial=phase_2, training__checkpoint_every=1)
        count = iter(range(100))
        deadline = None if stop is None else (lambda: next(count) + 1 >= stop)
        return train_recipe(recipe, phase_1["store"], tmp_path / out, progress=False, deadline=deadline)

    train("a", 8, 2, stop=4)
    with pytest.raises(UserError, match="training.steps is 8 there and 3 now, but at step 4 more is done already"):
        train("a", 3, 2)
    assert train("a", 5, 2).step == 7
    train("b", 3, 2, stop=3)
    with pytest.raises(UserError, match="training.steps is 3 there and 6 now, but at step 3 phase 2 has begun"):
        train("b", 6, 2)
    train("c", 0, 4, stop=2)
    with pytest.raises(UserError, match="training.steps is 0 there and 5 now, but at step 2 phase 2 has begun"):
        train("c", 5, 4)
    with pytest.raises(UserError, match="adversarial.steps is 4 there and 1 now, but at step 2 more is done already"):
        train("c", 0, 1)
    assert train("c", 0, 3).step == 3
    train("d", 0, 9, stop=4, fall=3)
    with pytest.raises(UserError, match="at step 4 the learning rate would jump: it would be falling since 3"):
        train("d", 0, 6, fall=3)
    assert train("d", 0, 7, fall=3).step == 7


def test_a_start_is_the_end_of_phase_1(phase_1: dict[str, Path], tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    """Also of a run that has gone on to phase 2: every row of Table 2 starts from the same student."""
    whole = _recipe(tiny_teacher_folder, prompts_file, training__steps=6, adversarial=PHASE_2, training__keep_checkpoints=1)
    train_recipe(whole, phase_1["store"], tmp_path / "whole", progress=False)
    weights = generator_weights(tmp_path / "whole", whole)
    expected = load_state(checkpoints(phase_1["run"] / "checkpoints")[-1]).ema
    assert all(torch.equal(v, weights[k]) for k, v in expected.items())
    checkpoint_path(tmp_path / "whole" / "checkpoints", 6).unlink()
    with pytest.raises(UserError, match=r"no checkpoint of the end of its phase 1 \(step-00000006.pt\)"):
        generator_weights(tmp_path / "whole", whole)


def test_a_run_goes_on_without_its_start(phase_1: dict[str, Path], tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    shutil.copytree(phase_1["run"], tmp_path / "start")
    recipe = _phase_2(phase_1, tmp_path / "start", tiny_teacher_folder, prompts_file)
    train_recipe(recipe, phase_1["store"], tmp_path / "run", progress=False)
    begun = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert begun["start_weights"]
    shutil.rmtree(tmp_path / "start")
    longer = _phase_2(phase_1, tmp_path / "start", tiny_teacher_folder, prompts_file, adversarial=PHASE_2 | {"steps": 5})
    assert train_recipe(longer, phase_1["store"], tmp_path / "run", progress=False).step == 5
    assert json.loads((tmp_path / "run" / "inputs.json").read_text()) == begun


def test_what_was_refused_can_be_mended_in_the_same_folder(
    phase_1: dict[str, Path], tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path
) -> None:
    def train(**changes: Any) -> Trainer:
        recipe = _phase_2(phase_1, phase_1["run"], tiny_teacher_folder, prompts_file, **changes)
        return train_recipe(recipe, phase_1["store"], tmp_path / "run", progress=False)

    with pytest.raises(UserError, match="discriminator.timestep is 1000"):
        train(discriminator={"timestep": 1000})
    with pytest.raises(UserError, match="first_pairs is 999, expected at most"):
        train(training__steps=0, training__first_pairs=999)
    assert train().step == 4


def test_export_of_an_earlier_step(phase_1: dict[str, Path], tmp_path: Path) -> None:
    export_run(phase_1["run"], tmp_path / "early", "float32", step=3)
    early = load_state(checkpoint_path(phase_1["run"] / "checkpoints", 3)).ema
    found = OneStepPipeline.from_pretrained(tmp_path / "early").generator.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in early.items())
    with pytest.raises(UserError, match="no checkpoint of step 4; there are 3, 6"):
        export_run(phase_1["run"], tmp_path / "none", step=4)


def test_a_run_starts_from_the_shipped_student(tiny_embedded: Path, prompts_file: Path, tmp_path: Path) -> None:
    values = recipe_values(tmp_path, prompts_file, training__steps=1, generator={"start": "embedded"}) | {"teacher": {"source": "embedded"}}
    recipe = parse_recipe(values, "tiny")
    simulate_recipe(recipe, tmp_path / "store", progress=False)
    shipped = load_file(tiny_embedded / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    weights = generator_weights(student_folder("embedded"), recipe)
    assert weights.keys() == {f"network.{k}" for k in shipped}
    assert all(torch.equal(weights[f"network.{k}"], v.float()) for k, v in shipped.items())
    train_recipe(recipe, tmp_path / "store", tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["start"]["recipe"] == "emoji"


def test_a_run_goes_on_with_a_teacher_that_was_moved_and_no_other(tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    """What is refused leaves the run as it was."""
    shutil.copytree(tiny_teacher_folder, tmp_path / "before")
    simulate_recipe(_recipe(tmp_path / "before", prompts_file), tmp_path / "store", progress=False)
    train_recipe(_recipe(tmp_path / "before", prompts_file), tmp_path / "store", tmp_path / "run", progress=False)
    (tmp_path / "before").rename(tmp_path / "after")
    train_recipe(_recipe(tmp_path / "after", prompts_file), tmp_path / "store", tmp_path / "run", progress=False)
    kept = (tmp_path / "run" / "recipe.yaml").read_bytes()
    assert b"after" in kept

    decoder = tiny_pipeline()
    for parameter in decoder.vae.parameters():
        torch.nn.init.normal_(parameter)
    decoder.save_pretrained(tmp_path / "decoder")
    with pytest.raises(UserError, match="this run was begun with decoder_weights"):
        train_recipe(_recipe(tmp_path / "decoder", prompts_file), tmp_path / "store", tmp_path / "run", progress=False)
    tiny_pipeline(seed=5).save_pretrained(tmp_path / "another")
    simulate_recipe(_recipe(tmp_path / "another", prompts_file), tmp_path / "store2", progress=False)
    with pytest.raises(UserError, match="this run was begun with"):
        train_recipe(_recipe(tmp_path / "another", prompts_file), tmp_path / "store2", tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == kept
    export_run(tmp_path / "run", tmp_path / "student")


def test_what_is_of_the_emoji_is_told_with_another_teacher(tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    recipe = _recipe(tiny_teacher_folder, prompts_file, pairs__prompts={"source": "embedded"}, loss={"distance": "latent_lpips"})
    with pytest.warns(UserWarning, match="for the captions of the emoji: pairs.prompts.source is `embedded`"):
        simulate_recipe(recipe, tmp_path / "store", progress=False)
    with pytest.warns(UserWarning, match=r"loss.perceptual is `embedded`, a network trained on the emoji, .*; name one of its latents"):
        train_recipe(recipe, tmp_path / "store", tmp_path / "run", progress=False)


def test_a_student_says_which_files_of_the_hub_were_its_teacher(monkeypatch: pytest.MonkeyPatch, tiny_teacher_folder: Path) -> None:
    known = TeacherConfig(source="somebody/model", revision="a1b2", variant="fp16")
    assert _hub_options(known) == {"revision": "a1b2", "variant": "fp16"}
    assert _hub_options(TeacherConfig(source=str(tiny_teacher_folder), variant="fp16")) == {}
    published = next(iter(REVISIONS))
    assert _hub_options(TeacherConfig(source=published)) == {"revision": REVISIONS[published]}


def test_one_process_trains_in_a_folder(phase_1: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(phase_1["run"], tmp_path / "run")
    recipe = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    before = tree_digest(tmp_path / "run")
    with _alone_in(tmp_path / "run"), pytest.raises(UserError, match="another process is training there"):
        train_recipe(recipe, phase_1["store"], tmp_path / "run", progress=False)
    assert tree_digest(tmp_path / "run") == before
    train_recipe(recipe, phase_1["store"], tmp_path / "run", progress=False)


def test_a_run_that_had_no_phase_1_is_no_start(
    phase_1: dict[str, Path], tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path
) -> None:
    """It would stand for what it started from itself, and not for what it made."""
    second = _phase_2(phase_1, phase_1["run"], tiny_teacher_folder, prompts_file)
    train_recipe(second, phase_1["store"], tmp_path / "second", progress=False)
    with pytest.raises(UserError, match=r"second stands for the end of its phase 1, and had none .*; export its student and name that"):
        train_recipe(
            _phase_2(phase_1, tmp_path / "second", tiny_teacher_folder, prompts_file), phase_1["store"], tmp_path / "third", progress=False
        )


def test_a_timestep_that_no_student_could_have_is_refused(
    phase_1: dict[str, Path], tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tiny_teacher_folder, prompts_file, generator={"timestep": 981})
    with pytest.raises(UserError, match="generator.timestep is 981, expected 999, where the teacher's schedule ends"):
        train_recipe(recipe, phase_1["store"], tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
