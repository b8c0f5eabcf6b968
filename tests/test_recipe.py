from __future__ import annotations

import itertools
from pathlib import Path
from typing import get_args

import pytest

from diffusion2gan.config import Section, settings_difference
from diffusion2gan.discriminator.multi_scale import DiscriminatorConfig
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe, builtin_recipes, check_same_experiment, dump_recipe, load_recipe
from tests.helpers import recipe_values, write_recipe


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml", recipe_values(Path("teacher"), Path("prompts.txt")))


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_builtin_recipe_is_valid_and_survives_saving(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "resolved.yaml")) == recipe


def test_rows_of_table_1_differ_by_the_distance_alone() -> None:
    distances = ("mse", "l1", "pseudo_huber", "lpips", "latent_lpips", "e_latent_lpips")
    rows = [load_recipe(f"ablations/{name}") for name in distances]
    plain = [r.model_dump() | {"name": "", "loss": ""} for r in rows]
    assert all(p == plain[0] for p in plain)
    assert len({r.loss.distance for r in rows}) == 6
    assert len({(r.loss.perceptual, r.loss.augment) for r in rows}) == 1


def test_other_ablations_differ_from_their_base_in_one_thing() -> None:
    base = load_recipe("ablations/e_latent_lpips")
    images = base.training.steps * base.training.batch_size
    for name in (n for n in builtin_recipes() if n.startswith(("ablations/e_latent_lpips_", "ablations/pairs_"))):
        row = load_recipe(name)
        different = {
            key.split(".")[0] + "." + key.split(".")[1]
            for key, _, _ in settings_difference(row.model_dump(), base.model_dump())
            if "." in key
        }
        expected = {"training.batch_size", "training.steps", "training.decay_steps"} if "batch" in name else None
        assert different == expected or len(different) == 1, name
        assert row.training.steps * row.training.batch_size == images, name


def test_rows_of_table_2_differ_from_their_neighbour_by_one_line() -> None:
    names = ("regression", "scratch", "diffusion", "noise", "r1", "multi_scale", "mix_and_match")
    rows = [load_recipe(f"table2/{name}") for name in names]
    path = builtin_recipes()["table2/regression"].parent
    for name in names[1:]:
        lines = [line for line in (path / f"{name}.yaml").read_text().splitlines() if not line.startswith(("#", "base:", "name:"))]
        assert len(lines) == 1, name
    changes = [{key for key, _, _ in settings_difference(a.model_dump(), b.model_dump())} - {"name"} for a, b in itertools.pairwise(rows)]
    assert changes == [
        {"adversarial.weight"},
        {"discriminator.kind", "discriminator.multi_scale"},
        {"discriminator.noise"},
        {"adversarial.r1"},
        {"discriminator.multi_scale"},
        {"adversarial.other_latent", "adversarial.other_text", "adversarial.other_noise"},
    ]
    assert len({r.total_steps for r in rows}) == 1
    # The last row is the method.
    assert rows[-1].discriminator == DiscriminatorConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adversarial.stepz=5", r"unknown key adversarial.stepz; did you mean steps\? allowed here: steps, batch_size"),
        ("adversarial.weight=-1", "adversarial.weight is -1: input should be greater than or equal to 0"),
        ("adversarial.loss=wgan", "adversarial.loss is 'wgan': input should be 'logistic', 'hinge' or 'relativistic'"),
        ("adversarial.other_text=0.85", "other_latent \\+ other_text \\+ other_noise is 1.05, expected at most 0.9"),
        ("adversarial.stop_accuracy=[0.9,0.6]", "stop_accuracy is \\[0.9, 0.6\\], expected the lower limit first"),
        ("discriminator.noise=false", "other_noise is 0.1 and discriminator.noise is false, expected 0"),
        ("adversarial.r1_count=5", r"r1_count is 5, expected a divisor of phase 2's batch size \(32\)"),
        ("adversarial={batch_size: 6, steps: 1, r1_count: 4}", r"r1_count is 4, expected a divisor of phase 2's batch size \(6\)"),
        ("discriminator={kind: scratch, gradient_checkpointing: true}", "gradient_checkpointing is true with kind scratch, expected false"),
        ("discriminator.kind=vgg", "discriminator.kind is 'vgg': input should be 'diffusion' or 'scratch'"),
        ("adversarial=null", "training.steps is 0 and there is no adversarial section"),
    ],
)
def test_what_is_wrong_with_phase_2_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("table2/mix_and_match", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=5", r"unknown key training.stepz; did you mean steps\? allowed here: steps, batch_size"),
        ("trainning.steps=5", "unknown key trainning; did you mean training"),
        ("training.steps=ten", "training.steps is 'ten'"),
        ("training.steps=0", "training.steps is 0 and there is no adversarial section"),
        ("training.mixed_precision=fp16", "training.mixed_precision is 'fp16': input should be 'no' or 'bf16'"),
        ("loss.augment=xyz", "loss.augment is 'xyz'"),
        ("loss.distance=l3", "loss.distance is 'l3'"),
        ("pairs.shard_size=9", r"shard_size is 9, expected a multiple of batch_size \(4\)"),
        ("training.holdout=24", "training.holdout is 24, expected fewer than pairs.count"),
        ("training.steps", "expected section.key=value"),
        ("name.x=1", "name is not a section"),
        ("pairs.seed=4194304", "pairs.seed is 4194304"),
    ],
)
def test_what_is_wrong_is_named(tiny: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(str(tiny), [override])


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'emoji'"):
        load_recipe("emojy")


def test_base_is_merged_section_by_section(tiny: Path) -> None:
    (tiny.parent / "other.yaml").write_text("base: tiny.yaml\nname: other\ntraining: {steps: 99}\n")
    base, other = load_recipe(str(tiny)), load_recipe(str(tiny.parent / "other.yaml"))
    assert other.training.steps == 99
    assert other.training.batch_size == base.training.batch_size
    assert other.pairs == base.pairs
    (tiny.parent / "circle.yaml").write_text("base: circle.yaml\nname: c\n")
    with pytest.raises(UserError, match="circle"):
        load_recipe(str(tiny.parent / "circle.yaml"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", ""])
def test_not_a_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match="r.yaml"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_run_belongs_to_one_experiment(tiny: Path) -> None:
    saved = load_recipe(str(tiny))
    check_same_experiment(load_recipe(str(tiny), ["training.steps=99"]), saved, tiny.parent)
    # The weights' digest guards them, wherever they are read from.
    for free in ("teacher.revision=a1b2", "teacher.source=elsewhere"):
        check_same_experiment(load_recipe(str(tiny), [free]), saved, tiny.parent)
    # The same pairs, kept otherwise: `train` takes such a store, so a run goes on with it too.
    for kept in (
        "pairs.batch_size=2",
        "pairs.shard_size=4",
        "pairs.noise_storage=float32",
        "pairs.precision=bfloat16",
        "pairs.compile=true",
    ):
        check_same_experiment(load_recipe(str(tiny), [kept]), saved, tiny.parent)
    with pytest.raises(UserError, match="training.learning_rate is 0.001 there and 0.5 now"):
        check_same_experiment(load_recipe(str(tiny), ["training.learning_rate=0.5"]), saved, tiny.parent)


def test_no_is_no_in_yaml() -> None:
    assert load_recipe("emoji", ["training.mixed_precision=no"]).training.mixed_precision == "no"


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1E-4", 1e-4), ("2.e-3", 2e-3), ("3.0e-4", 3e-4), ("0.5", 0.5), ("1", 1)])
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    """PyYAML alone reads 3e-4 as text."""
    assert load_recipe("emoji", [f"training.learning_rate={text}"]).training.learning_rate == value


def test_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("base: emoji\nname: 1e4b\ndescription: '1e4'\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert (recipe.name, recipe.description) == ("1e4b", "1e4")
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_samples_of_two_phases() -> None:
    recipe = load_recipe(
        "emoji", ["training.steps=10", "training.decay_steps=0", "training.batch_size=4", "adversarial={steps: 5, batch_size: 6}"]
    )
    assert [recipe.samples(n) for n in (0, 10, 11, 15)] == [0, 40, 46, 70]
    with pytest.raises(UserError, match=r"adversarial.batch_size is 6, expected a multiple of training.micro_batch_size \(4\)"):
        load_recipe("emoji", ["training.batch_size=4", "training.micro_batch_size=4", "adversarial={steps: 5, batch_size: 6}"])


@pytest.mark.parametrize("name", ["sd15_cfg3", "sd15_cfg8", "sdxl_cfg7"])
def test_siblings_have_the_papers_prompts_and_guidance(name: str) -> None:
    """A smaller store can be extended to the paper's list, and a shard is no more than half an hour of an A100 at the plan's 30 %."""
    paper = load_recipe(name)
    siblings = [n for n in builtin_recipes() if n.startswith(f"{name}_")]
    assert {f"{name}_8_gpu", f"{name}_single_gpu"} <= set(siblings)
    for recipe in map(load_recipe, [name, *siblings]):
        assert recipe.pairs.prompts == paper.pairs.prompts and recipe.pairs.ode.guidance == paper.pairs.ode.guidance
        evaluation = 6.76e12 if recipe.teacher.family == "sdxl" else 0.803e12
        flops = recipe.pairs.shard_size * recipe.pairs.ode.steps * 2 * evaluation
        assert flops / (0.3 * 312e12) < 35 * 60


@pytest.mark.parametrize(
    ("name", "pairs", "guidance", "aesthetic", "batches"),
    [
        ("sd15_cfg3", 3_000_000, 3.0, 6.25, (256, 256)),
        ("sd15_cfg8", 12_000_000, 8.0, 6.0, (256, 256)),
        ("sdxl_cfg7", 8_000_000, 7.0, 6.0, (256, 256)),
        ("sd15_cfg3_64_gpu", 3_000_000, 3.0, 6.25, (2048, 1024)),
    ],
)
def test_the_papers_numbers(name: str, pairs: int, guidance: float, aesthetic: float, batches: tuple[int, int]) -> None:
    """Section 4.1 and the captions of Tables 1 to 3: pairs, guidance, 50 steps of DDIM, prompts, batches."""
    recipe = load_recipe(name)
    assert recipe.pairs.count == pairs
    ode = recipe.pairs.ode
    assert (ode.solver, ode.steps, ode.guidance) == ("ddim", 50, guidance)
    assert recipe.pairs.prompts.where == (f"AESTHETIC_SCORE >= {aesthetic}",)
    assert recipe.training.steps == 20_000
    assert (recipe.training.batch_size, recipe.phase_2_batch_size) == batches


def test_a_key_that_is_there_twice(tiny: Path) -> None:
    path = tiny.parent / "twice.yaml"
    path.write_text(f"base: {tiny.name}\ntraining:\n  steps: 1\n  steps: 2000\n")
    with pytest.raises(UserError, match=r"twice.yaml: not valid YAML \(steps is there twice .*line 3"):
        load_recipe(str(path))
    # What is merged and overridden is there once.
    path.write_text(f"base: {tiny.name}\ntraining:\n  <<: {{steps: 1, seed: 3}}\n  steps: 2000\n")
    assert (load_recipe(str(path)).training.steps, load_recipe(str(path)).training.seed) == (2000, 3)
    path.write_text(f"base: {tiny.name}\ntraining: !!map foo\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(str(path))


def test_a_section_that_was_left_out_comes_back_by_its_keys(tiny: Path) -> None:
    (tiny.parent / "one.yaml").write_text(f"base: {tiny.name}\nadversarial: null\n")
    recipe = load_recipe(str(tiny.parent / "one.yaml"), ["adversarial.steps=5"])
    assert recipe.adversarial is not None and recipe.adversarial.steps == 5


def test_every_key_of_a_recipe_is_explained() -> None:
    def unexplained(section: type[Section], prefix: str) -> list[str]:
        found: list[str] = []
        for name, field in section.model_fields.items():
            kinds = (field.annotation, *get_args(field.annotation))
            inner = [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
            found += [key for kind in inner for key in unexplained(kind, f"{prefix}{name}.")]
            if not inner and not field.description:
                found.append(prefix + name)
        return found

    assert unexplained(Recipe, "") == []
