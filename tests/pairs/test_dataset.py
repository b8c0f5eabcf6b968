from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm

from diffusion2gan.errors import UserError
from diffusion2gan.pairs import dataset, maintain
from diffusion2gan.pairs import simulate as simulate_module
from diffusion2gan.pairs.dataset import PairDataset, encode_shard, shard_name
from diffusion2gan.pairs.prompts import PromptsConfig, read_prompts
from diffusion2gan.pairs.seeds import draw_noise, pair_seed
from diffusion2gan.pairs.simulate import PairsConfig, _Order, agree_on_settings, simulate, store_settings
from diffusion2gan.recipe import Recipe, check_pairs
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from diffusion2gan.worker import Worker
from tests.conftest import tiny_pipeline
from tests.helpers import recipe_values, tree_digest


def _config(prompts: Path, **changes: object) -> PairsConfig:
    values = {
        "count": 20,
        "prompts": {"source": str(prompts)},
        "ode": {"steps": 2, "guidance": 2.0},
        "batch_size": 4,
        "shard_size": 8,
        "seed": 5,
    }
    return PairsConfig.model_validate(values | changes)


@pytest.fixture
def store(tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path) -> Path:
    simulate(tiny_teacher, _config(prompts_file), tmp_path / "store", progress=False)
    return tmp_path / "store"


def test_pairs_are_what_the_teacher_made(store: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path) -> None:
    pairs = PairDataset(store)
    assert len(pairs) == 20
    prompts = read_prompts(PromptsConfig(source=str(prompts_file)), 20, 0)
    solver = OdeSolver(tiny_teacher, SolverConfig(steps=2, guidance=2.0), batch_size=4)
    for rows in ([0, 1, 2, 3], [16, 17, 18, 19]):
        batch = pairs.batch(rows)
        assert batch.seeds.tolist() == [pair_seed(5, i) for i in rows]
        assert batch.prompts == [prompts[i] for i in rows]
        np.testing.assert_array_equal(batch.noise, draw_noise(batch.seeds.tolist(), (4, 8, 8)))
        x = solver.solve(batch.noise, batch.prompts)
        np.testing.assert_array_equal(batch.latent, x.numpy().astype(np.float16))
    assert pairs[3].prompt == prompts[3]
    with pytest.raises(IndexError):
        pairs[20]


@pytest.mark.parametrize("given_up", [False, True])
def test_the_bar_moves_with_every_batch(
    given_up: bool, store: Path, tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard may take half an hour; the batches of one that somebody else finished meanwhile count once."""
    moves: list[float] = []
    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            moves.append(n or 0)
            bars[:] = [self]
            return super().update(n)

    monkeypatch.setattr("diffusion2gan.pairs.simulate.tqdm", Bar)
    folder, worker = tmp_path / "again", None
    if given_up:
        # The shard that is missing is another worker's, who finishes it after our first batch.
        shutil.copytree(store, folder)
        for name in ("manifest.json", "state.json", "dataset_info.json"):
            (folder / name).unlink()
        gone = next(folder.glob("shard-00001-*"))
        content = gone.read_bytes()
        gone.unlink()
        worker = Worker(0, 2)
        monkeypatch.setattr("diffusion2gan.pairs.simulate._has_shard", lambda *_: moves.count(4) > 0 and bool(gone.write_bytes(content)))
    simulate(tiny_teacher, _config(prompts_file), folder, worker)
    assert [m for m in moves if m] == ([4, 4] if given_up else [4] * 5)
    assert bars[0].n == 20


def test_stock_datasets_opens_it(store: Path) -> None:
    datasets = pytest.importorskip("datasets")
    ours, theirs = PairDataset(store), datasets.load_from_disk(str(store))
    assert len(theirs) == len(ours)
    row = theirs[13]
    assert row["prompt"] == ours[13].prompt
    assert row["seed"] == ours[13].seed
    np.testing.assert_array_equal(np.frombuffer(row["latent"], "<f2").reshape(4, 8, 8), ours[13].latent)


def test_stored_noise(tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, store: Path) -> None:
    """float16 noise is what the teacher saw; a store converted later holds the very bits that are drawn."""
    simulate(tiny_teacher, _config(prompts_file, noise_storage="float16"), tmp_path / "half", progress=False)
    half = PairDataset(tmp_path / "half")
    drawn = draw_noise(half.seeds[:4].tolist(), (4, 8, 8))
    np.testing.assert_array_equal(half.noises(range(4)), drawn.astype(np.float16).astype(np.float32))
    maintain.store_noise(store, tmp_path / "full")
    full, plain = PairDataset(tmp_path / "full"), PairDataset(store)
    assert full.noise_dtype == np.float32
    np.testing.assert_array_equal(full.noises(range(20)), plain.noises(range(20)))
    np.testing.assert_array_equal(full.latents(range(20)), plain.latents(range(20)))
    # A conversion that was cut short goes on: what is there is not made again.
    first = min((tmp_path / "full").glob("shard-*"))
    made_at = first.stat().st_mtime_ns
    max((tmp_path / "full").glob("shard-*")).unlink()
    maintain.store_noise(store, tmp_path / "full")
    assert first.stat().st_mtime_ns == made_at and PairDataset(tmp_path / "full").noise_dtype == np.float32
    with pytest.raises(UserError, match="already stores"):
        maintain.store_noise(tmp_path / "full", tmp_path / "again")


def test_a_log_that_cannot_be_written_stops_nothing(tiny_teacher: StableDiffusionTeacher, prompts_file: Path, tmp_path: Path) -> None:
    """A folder that is mounted for writing may lie in one that is not."""
    (tmp_path / "store.log.jsonl").mkdir()
    with pytest.warns(UserWarning, match=r"store.log.jsonl: cannot be written \(Is a directory\)"):
        simulate(tiny_teacher, _config(prompts_file), tmp_path / "store", progress=False)
    assert len(PairDataset(tmp_path / "store")) == 20


def test_pairs_are_shown_by_their_own_teacher(store: Path, tiny_teacher: StableDiffusionTeacher, tmp_path: Path) -> None:
    maintain.show(store, tiny_teacher, tmp_path / "pairs.png", 4)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["teacher"]["weights"] = "f" * 64
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="pairs of teacher ffffffffffffffff..., the recipe's is"):
        maintain.show(store, tiny_teacher, tmp_path / "other.png", 4)


def test_a_store_grows_into_the_larger_one_byte_for_byte(tiny_teacher: StableDiffusionTeacher, prompts_file: Path, tmp_path: Path) -> None:
    small, large = (_config(prompts_file).model_copy(update={"count": n}) for n in (21, 40))
    simulate(tiny_teacher, small, tmp_path / "small", progress=False)
    simulate(tiny_teacher, large, tmp_path / "large", progress=False)
    simulate(tiny_teacher, large, tmp_path / "grown", progress=False, smaller=tmp_path / "small")
    assert tree_digest(tmp_path / "grown") == tree_digest(tmp_path / "large")
    made = [json.loads(line)["shard"] for line in (tmp_path / "grown.log.jsonl").read_text().splitlines()]
    assert sorted(made) == [2, 3, 4]  # the short last shard of the small store too

    other = large.model_copy(update={"ode": large.ode.model_copy(update={"guidance": 3.5})})
    with pytest.raises(UserError, match=r"a store of other settings: ode.guidance is"):
        simulate(tiny_teacher, other, tmp_path / "other", progress=False, smaller=tmp_path / "small")
    with pytest.raises(UserError, match="has 40 pairs, expected at most"):
        simulate(tiny_teacher, small, tmp_path / "other", progress=False, smaller=tmp_path / "large")
    with pytest.raises(UserError, match="expected a pair store"):
        simulate(tiny_teacher, small, tmp_path / "other", progress=False, smaller=tmp_path)
    assert not (tmp_path / "other").exists()


def test_shards_go_round_and_idle_workers_help() -> None:
    """Each worker makes its own share first, then the others' from the far end; nothing is left when some are gone."""
    assert [_Order(7, Worker(r, 3), Random(0)).next(()) % 3 for r in range(3)] == [0, 1, 2]
    assert _Order(7, Worker(1, 3), Random(0), {1, 4}).next({1, 4}) in (5, 6)
    assert _Order(7, Worker(0, 3), Random(0)).next(set(range(7))) is None
    for world in (1, 2, 5):
        worker = Worker(world - 1, world)
        order, made = _Order(7, worker, Random(1)), list[int]()
        while (index := order.next(made)) is not None:
            made.append(index)
            order.made(index)
        assert sorted(made) == list(range(7))
        own = len(range(worker.rank, 7, world))
        assert {i % world for i in made[:own]} == {worker.rank}


@pytest.mark.parametrize("jobs", [2, 8, 16])
def test_jobs_that_know_nothing_of_each_other_share_the_work(jobs: int) -> None:
    """The same command started several times, each as if it were the only one, at much the same speed."""
    random, total = Random(jobs), 1000
    orders = [_Order(total, Worker(), random) for _ in range(jobs)]
    present, begun, busy = set[int](), 0, [(random.random(), job, order.next(())) for job, order in enumerate(orders)]
    while busy:
        time, job, index = min(busy)
        busy.remove((time, job, index))
        begun += 1
        if index not in present:
            present.add(index)
            orders[job].made(index)
        following = orders[job].next(present)
        if following is not None:
            busy.append((time + random.uniform(0.95, 1.05), job, following))
    assert len(present) == total
    # Few of them twice, most near the end; one process alone makes each once.
    assert begun < 1.1 * total


def test_a_store_without_a_shard_takes_the_mended_settings(
    tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path
) -> None:
    """As after a first batch for which the memory was too small."""
    agree_on_settings(tmp_path / "pairs", store_settings(tiny_teacher, _config(prompts_file), "0" * 64))
    simulate(tiny_teacher, _config(prompts_file, batch_size=8), tmp_path / "pairs", progress=False)
    assert PairDataset(tmp_path / "pairs").manifest["batch_size"] == 8


@pytest.mark.parametrize("when", ["before the shard is written", "while it is written"])
def test_settings_that_change_under_a_running_worker(
    when: str, tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command of other settings found the store still empty."""
    other = store_settings(tiny_teacher, _config(prompts_file, batch_size=8), "0" * 64)
    made, write = simulate_module._make_shard, simulate_module.write_bytes_atomic

    def interfere(*args: Any) -> bytes | None:
        agree_on_settings(tmp_path / "pairs", other)
        return made(*args)

    def slow_write(path: Path, data: bytes) -> None:
        if path.name.startswith("shard-"):
            agree_on_settings(tmp_path / "pairs", other)
        write(path, data)

    if when.startswith("before"):
        monkeypatch.setattr(simulate_module, "_make_shard", interfere)
    else:
        monkeypatch.setattr(simulate_module, "write_bytes_atomic", slow_write)
    with pytest.raises(UserError, match="a store of other settings: batch_size is 8 there"):
        simulate(tiny_teacher, _config(prompts_file), tmp_path / "pairs", progress=False)
    assert not list((tmp_path / "pairs").glob("shard-*"))


def test_another_worker_finishes_what_one_left(
    tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, store: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    sorted(copy.glob("shard-*"))[2].unlink()
    for name in ("manifest.json", "state.json", "dataset_info.json"):
        (copy / name).unlink()
    with pytest.raises(UserError, match="2 of 3 shards"):
        PairDataset(copy)
    simulate(tiny_teacher, _config(prompts_file), copy, Worker(1, 2), progress=False)
    assert tree_digest(copy) == tree_digest(store)
    assert "host" in (tmp_path / "copy.log.jsonl").read_text()


def test_other_batch_size_gives_the_same_pairs_but_is_refused_in_one_store(
    tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, store: Path
) -> None:
    with pytest.raises(UserError, match="batch_size is 4 there and 8 in the recipe"):
        simulate(tiny_teacher, _config(prompts_file, batch_size=8), store, progress=False)
    simulate(tiny_teacher, _config(prompts_file, batch_size=8), tmp_path / "eight", progress=False)
    np.testing.assert_allclose(
        PairDataset(tmp_path / "eight").latents(range(20)).astype(float), PairDataset(store).latents(range(20)).astype(float), atol=2e-2
    )


class TestDamage:
    def _shard(self, store: Path) -> Path:
        return sorted(store.glob("shard-*.arrow"))[1]

    def test_missing(self, store: Path) -> None:
        path = self._shard(store)
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name}: missing shard"):
            PairDataset(store)

    def test_truncated(self, store: Path) -> None:
        path = self._shard(store)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match="truncated shard"):
            PairDataset(store)

    def test_corrupt_in_a_large_store(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not hashed when it is opened, and no flipped bit is trained on all the same."""
        name = PairDataset(store).manifest["shards"][1]["file"]
        content = bytearray((store / name).read_bytes())
        content[content.index(PairDataset(store).latents([9]).tobytes()) + 5] ^= 1
        (store / name).write_bytes(content)
        monkeypatch.setattr(dataset, "VERIFY_BYTES", 0)
        pairs = PairDataset(store)
        assert pairs.latents([0, 19]).shape == (2, 4, 8, 8)
        for _ in range(2):
            with pytest.raises(UserError, match="corrupt shard"):
                pairs.latents([9])
        # Of two processes, the second vouches for it.
        PairDataset(store, share=(0, 2)).latents([9])
        with pytest.raises(UserError, match="corrupt shard"):
            PairDataset(store, share=(1, 2)).latents([9])
        PairDataset(store, verify=False).latents([9])

    def test_corrupt_noise_in_a_large_store(
        self, tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Mix-and-match reads a partner's noise alone."""
        folder = tmp_path / "noisy"
        simulate(tiny_teacher, _config(prompts_file, noise_storage="float16"), folder, progress=False)
        pairs = PairDataset(folder)
        path = folder / pairs.manifest["shards"][1]["file"]
        content = bytearray(path.read_bytes())
        content[content.index(pairs.noises([9]).astype(np.float16).tobytes()) + 5] ^= 1
        path.write_bytes(content)
        monkeypatch.setattr(dataset, "VERIFY_BYTES", 0)
        with pytest.raises(UserError, match="corrupt shard"):
            PairDataset(folder).noises([9])

    def test_corrupt(self, store: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path) -> None:
        path = self._shard(store)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        for act in (
            lambda: PairDataset(store),
            lambda: maintain.check(store),
            lambda: simulate(tiny_teacher, _config(prompts_file), store, progress=False),
        ):
            with pytest.raises(UserError, match="corrupt shard"):
                act()
        # What the message says to do mends it.
        before = json.loads((store / "manifest.json").read_text())
        path.unlink()
        simulate(tiny_teacher, _config(prompts_file), store, progress=False)
        assert json.loads((store / "manifest.json").read_text()) == before
        assert maintain.check(store)["pairs"] == 20

    def test_manifest_cannot_lead_outside(self, store: Path) -> None:
        manifest = json.loads((store / "manifest.json").read_text())
        manifest["shards"][0]["file"] = "../" + manifest["shards"][0]["file"]
        (store / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="not a plain file name"):
            PairDataset(store)

    def test_other_noise_recipe(self, store: Path) -> None:
        manifest = json.loads((store / "manifest.json").read_text())
        manifest["noise_recipe"]["fingerprint"] = "0" * 16
        (store / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="NumPy version"):
            PairDataset(store)

    def test_a_folder_that_is_no_store(self, tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path) -> None:
        (tmp_path / "precious.txt").write_text("keep me")
        with pytest.raises(UserError, match="not empty"):
            simulate(tiny_teacher, _config(prompts_file), tmp_path, progress=False)
        with pytest.raises(UserError, match="no pair store here"):
            PairDataset(tmp_path)


def test_other_teacher_or_guidance_is_refused(
    tmp_path: Path, store: Path, prompts_file: Path, tiny_teacher: StableDiffusionTeacher
) -> None:
    with pytest.raises(UserError, match=r"ode.guidance is 2.0 there and 4.0 in the recipe"):
        simulate(tiny_teacher, _config(prompts_file, ode={"steps": 2, "guidance": 4.0}), store, progress=False)
    other = StableDiffusionTeacher.from_pipeline(tiny_pipeline(seed=1))
    with pytest.raises(UserError, match="teacher.weights"):
        simulate(other, _config(prompts_file), store, progress=False)


def test_precision_is_in_the_manifest(tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, store: Path) -> None:
    """As is what the text was encoded in; a store of the teacher's own precision is as it was before there was a choice."""
    simulate(tiny_teacher, _config(prompts_file, precision="bfloat16"), tmp_path / "half", progress=False)
    half, plain = PairDataset(tmp_path / "half").manifest, PairDataset(store).manifest
    assert (half["precision"], half["text_precision"]) == ("bfloat16", "float32")
    assert plain["precision"] == "float32" and "text_precision" not in plain and "compile" not in plain
    with pytest.raises(UserError, match="precision is 'bfloat16' there and 'float32' in the recipe"):
        simulate(tiny_teacher, _config(prompts_file), tmp_path / "half", progress=False)
    difference = PairDataset(tmp_path / "half").batch([0]).latent.astype(np.float32) - PairDataset(store).batch([0]).latent
    assert 0 < np.abs(difference).mean() < 0.1


def test_no_compiler_leaves_nothing_behind(
    tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="set pairs.compile=false"):
        simulate(tiny_teacher, _config(prompts_file, compile=True), tmp_path / "store", progress=False)
    simulate(tiny_teacher, _config(prompts_file), tmp_path / "store", progress=False)
    assert len(PairDataset(tmp_path / "store")) == 20


def test_a_shard_that_two_workers_made_is_kept_once(store: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path) -> None:
    (made,) = store.glob("shard-00001-*")
    pairs = PairDataset(store)
    batch = pairs.batch(range(8, 16))
    other = batch.latent.copy()
    other.view(np.uint16)[0, 0, 0, 0] ^= 1  # arithmetic of another machine: the last bit
    data = encode_shard(batch.seeds.tolist(), batch.prompts, other, None)
    twin = store / shard_name(1, 3, hashlib.sha256(data).hexdigest())
    twin.write_bytes(data)
    (store / "manifest.json").unlink()
    simulate(tiny_teacher, _config(prompts_file), store, progress=False)
    assert list(store.glob("shard-00001-*")) == [min(made, twin)]
    maintain.check(store)


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_a_solution_that_cannot_be_stored(
    value: float, tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve, calls = OdeSolver.solve, []

    def broken(self: OdeSolver, noise: np.ndarray, prompts: list[str]) -> torch.Tensor:
        x = solve(self, noise, prompts)
        calls.append(1)
        if len(calls) == 2:
            x[2, 0, 0, 0] = value
        return x

    monkeypatch.setattr(OdeSolver, "solve", broken)
    # Begins with the first shard, not anywhere.
    monkeypatch.setattr("diffusion2gan.pairs.simulate.random.SystemRandom", lambda: SimpleNamespace(randrange=lambda _total: 0))
    with pytest.raises(UserError, match=r"pair 6 \('"):
        simulate(tiny_teacher, _config(prompts_file), tmp_path / "store", progress=False)
    assert not list((tmp_path / "store").glob("shard-*"))
    assert not (tmp_path / "store" / "manifest.json").exists()


def _leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        leaf for k, v in values.items() for leaf in (_leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else [f"{prefix}{k}"])
    ]  # fmt: skip


def test_every_setting_of_a_store_is_compared(store: Path, tmp_path: Path, prompts_file: Path) -> None:
    recipe = Recipe.model_validate(recipe_values(tmp_path, prompts_file))
    manifest = json.loads((store / "manifest.json").read_text())
    settings = {k: v for k, v in manifest.items() if k not in ("shards", "fingerprint")}
    accepted = set()
    for leaf in _leaves(settings):
        changed = copy.deepcopy(settings)
        *sections, last = leaf.split(".")
        part = changed
        for section in sections:
            part = part[section]
        part[last] = "another"
        try:
            check_pairs(recipe, changed, manifest, store)
        except UserError as error:
            assert f"pairs.{leaf}: " in str(error)  # noqa: PT017
        else:
            accepted.add(leaf)
    assert "teacher.source" in accepted  # where the weights were found
    accepted.remove("teacher.source")
    assert {a.split(".")[0] for a in accepted} == {"batch_size", "shard_size", "noise_storage", "precision", "noise_recipe"}
    assert settings["ode"].keys() == {"solver", "steps", "spacing", "guidance"}
    assert {"weights", "tokenizer", "schedule", "prediction_type", "latent_scaling"} <= settings["teacher"].keys()


def test_the_negative_prompt_is_the_solvers(store: Path, tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path) -> None:
    simulate(tiny_teacher, _config(prompts_file, negative_prompt="sun"), tmp_path / "other", progress=False)
    batch = PairDataset(tmp_path / "other").batch(range(4))
    solver = OdeSolver(tiny_teacher, SolverConfig(steps=2, guidance=2.0), 4, negative_prompt="sun")
    np.testing.assert_array_equal(batch.latent, solver.solve(batch.noise, batch.prompts).numpy().astype(np.float16))
    assert not np.array_equal(batch.latent, PairDataset(store).latents(range(4)))


def test_check_counts_seeds(
    tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as m:
        m.setattr("diffusion2gan.pairs.simulate.pair_seed", lambda seed, index: pair_seed(seed, index // 2))
        simulate(tiny_teacher, _config(prompts_file), tmp_path / "store", progress=False)
    with pytest.raises(UserError, match="10 seeds appear twice"):
        maintain.check(tmp_path / "store")


def test_check_looks_for_what_is_not_finite(store: Path) -> None:
    """A shard whose checksum is right and whose content is not."""
    pairs = PairDataset(store)
    batch, old = pairs.batch(range(8, 16)), store / pairs.manifest["shards"][1]["file"]
    batch.latent[3, 0, 0, 0] = np.nan
    data = encode_shard(batch.seeds.tolist(), batch.prompts, batch.latent, None)
    old.unlink()
    (store / shard_name(1, 3, hashlib.sha256(data).hexdigest())).write_bytes(data)
    settings = {k: v for k, v in pairs.manifest.items() if k not in ("shards", "fingerprint")}
    dataset.write_final_files(store, settings)
    with pytest.raises(UserError, match="pairs 0 to 19 is not finite"):
        maintain.check(store)


def test_where_the_teacher_was_found_is_no_other_store(
    tmp_path: Path, tiny_teacher: StableDiffusionTeacher, prompts_file: Path, store: Path
) -> None:
    """A new commit of the hub with the same weights, or a copy in a folder."""
    tiny_teacher.source = "somebody/model@abc"
    again = simulate(tiny_teacher, _config(prompts_file), store, progress=False)
    assert len(again["shards"]) == 3
    grown = simulate(tiny_teacher, _config(prompts_file, count=24), tmp_path / "grown", progress=False, smaller=store)
    assert len(grown["shards"]) == 3


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("manifest.json", "{", "not valid JSON"),
        ("manifest.json", "[]", "holds a list, expected an object"),
        ("manifest.json", json.dumps({"format": dataset.FORMAT}), "has no 'count': the file is damaged"),
        ("settings.json", "{", "not valid JSON"),
        ("settings.json", "[]", "holds a list, expected an object"),
        ("settings.json", "{}", "has no 'count': the file is damaged"),
        ("shard-old.arrow", "", "not a shard of this store"),
    ],
)
def test_damaged_metadata_is_one_line(name: str, content: str, told: str, store: Path) -> None:
    if name != "manifest.json":
        (store / "manifest.json").unlink()
    (store / name).write_text(content)
    with pytest.raises(UserError, match=told):
        PairDataset(store)
