"""Protocols from a folder of COCO and a model to result files: whole, resumed, shared out, and with things missing."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import datasets, evaluate, shards
from diffusion2gan.evaluation.datasets import Cifar10, PictureFolder, coco14_prompts, coco17_prompts, seeded_rows
from diffusion2gan.evaluation.evaluate import Evaluation, noise_seed, summary
from diffusion2gan.evaluation.extractors import dreamsim_network
from diffusion2gan.evaluation.models import Model, folder_model
from diffusion2gan.evaluation.protocols import PROTOCOLS, dreamdiv
from diffusion2gan.pairs.seeds import EVALUATION, draw_noise, evaluation_seed, pair_seed
from diffusion2gan.worker import Worker
from tests.evaluation.test_extractors import pictures, tiny_clip, tiny_inception_ts

pytest.importorskip("torchvision")

COUNT = 10


def small_coco(folder: Path) -> Path:
    """COCO 2017's validation set in small: pictures of several shapes, one of them grey, one with an alpha channel."""
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    annotations = []
    for i, picture in enumerate(pictures(COUNT, 5)):
        image = Image.fromarray(picture)
        image = image.convert("L") if i == 3 else image.convert("RGBA") if i == 4 else image
        image.save(folder / "val2017" / f"{100 + i:012d}.png")
        # The annotation with the smallest id is not the first in the file.
        annotations += [
            {"image_id": 100 + i, "id": 50 + i, "caption": f"later caption {i}"},
            {"image_id": 100 + i, "id": 10 + i, "caption": f" caption  number {i}\n"},
        ]
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps({"annotations": annotations}))
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_inception_ts(folder)
    tiny_clip(folder)
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 4)
    monkeypatch.setattr(shards.extract, "__kwdefaults__", {**shards.extract.__kwdefaults__, "size": 4})
    monkeypatch.setattr(shards.picture_facts, "__defaults__", (4,))


def toy_model(name: str = "toy", shift: int = 0, calls: list[int] | None = None) -> Model:
    """Pictures that depend on the prompt and the noise alone."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        if calls is not None:
            calls.append(len(prompts))
        out = []
        for prompt, noise in zip(prompts, draw_noise(list(seeds), (3, 8, 8)), strict=True):
            colour = np.random.default_rng([*prompt.encode()]).integers(0, 200, 3)
            out.append(np.clip(colour + 40 * noise.transpose(1, 2, 0) + shift, 0, 255).astype(np.uint8).repeat(4, 0).repeat(4, 1))
        return np.stack(out)

    return Model(name, {"subject": f"toy {shift}"}, draw, latent_shape=(3, 8, 8))


def evaluation(model: Model, out: Path, coco: Path, weights: Path, **options: Any) -> Evaluation:
    return Evaluation(model, out, options.pop("shared", out), coco, weights, progress=False, **options)


def read(out: Path, protocol: str) -> dict:
    return json.loads((out / f"{protocol}.json").read_text())


# --- The way through ------------------------------------------------------------------------------------------------
def test_a_model_through_fid_and_clip(tmp_path: Path, coco: Path, weights: Path) -> None:
    calls: list[int] = []
    protocols = ["fid5k_coco17", "clip5k_coco17"]
    skipped = evaluation(toy_model(calls=calls), tmp_path, coco, weights).run(protocols)
    assert skipped == {}
    assert calls == [4, 4, 2]  # every picture once for all metrics
    fid, clip = (read(tmp_path, p) for p in protocols)
    assert [(e["metric"], e["variant"]) for e in fid["results"]] == [("FID", "res256"), ("FID", "res512")]
    assert all(e["value"] > 0 and "far too few" in e["debug"] for e in fid["results"])
    assert [e["variant"] for e in clip["results"]] == ["gigagan", "gigagan-noprefix", "plain", "plain-prefix"]
    for result in (fid, clip):
        assert result["n"] == COUNT and result["partial"] is True
        assert result["prompts"]["name"] == "coco17-5k-first" and len(result["prompts"]["sha256"]) == 64
        assert result["noise"]["block"] == 0 and len(result["pictures_sha256"]) == 64
        assert all(len(e["network"]["weights"]["sha256"]) == 64 for e in result["results"])
    assert fid["reference"]["n"] == COUNT
    # The mean of what each picture got.
    plain = next(e for e in clip["results"] if e["variant"] == "plain")
    assert np.load(tmp_path / plain["values"]).mean() == pytest.approx(plain["value"], abs=1e-6)
    assert len(list((tmp_path / "samples" / "coco17").glob("*.png"))) == COUNT
    assert (tmp_path / "samples" / "coco17" / "00002.txt").read_text() == "caption number 2"
    table = summary(tmp_path, protocols)
    assert "FID (partial) (debug: too few)" in table and "gigagan-noprefix" in table
    # Again: nothing is drawn, the same numbers.
    evaluation(toy_model(calls=calls), tmp_path, coco, weights).run(protocols)
    assert len(calls) == 3 and read(tmp_path, "clip5k_coco17") == clip


def test_fid_is_that_of_the_pictures(tmp_path: Path, coco: Path, weights: Path) -> None:
    """The whole path against the pieces: same pictures, same network, one distance."""
    from diffusion2gan.evaluation.extractors import build_network
    from diffusion2gan.evaluation.metrics import frechet_distance_of_few

    model = toy_model()
    evaluation(model, tmp_path, coco, weights).run(["fid5k_coco17"])
    network = build_network("inception-clean-256", weights)
    prompts = coco17_prompts(coco).prompts
    drawn = model.draw(prompts, [noise_seed(i, 0) for i in range(COUNT)])
    real = PictureFolder(coco / "val2017").pictures(0, COUNT)
    a, b = (network.features(p, [""] * COUNT) for p in (drawn, real))
    assert read(tmp_path, "fid5k_coco17")["results"][0]["value"] == pytest.approx(frechet_distance_of_few(a, b), rel=1e-9)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_and_a_kill_give_the_same_result(tmp_path: Path, coco: Path, weights: Path, world: int) -> None:
    protocols = ["clip5k_coco17", "fid5k_coco17"]
    evaluation(toy_model(), tmp_path / "one", coco, weights).run(protocols)

    whole, drawn = toy_model(), []

    def killed(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        if drawn:
            raise KeyboardInterrupt
        drawn.append(len(prompts))
        return whole.draw(prompts, seeds)

    with pytest.raises(KeyboardInterrupt):
        evaluation(Model("toy", whole.identity, killed), tmp_path / "many", coco, weights).run(protocols)
    assert len(list((tmp_path / "many" / "features").rglob("clip-*.npy"))) == 1

    def work(rank: int) -> None:
        evaluation(toy_model(), tmp_path / "many", coco, weights, worker=Worker(rank, world)).run(protocols)

    threads = [threading.Thread(target=work, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for protocol in protocols:
        one, many = (read(tmp_path / name, protocol) for name in ("one", "many"))
        one.pop("seconds_per_image"), many.pop("seconds_per_image")
        assert one == many


def test_dreamsim_has_its_chance_level_beside_it(tmp_path: Path, coco: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub(nn.Module):
        def embed(self, x: Tensor) -> Tensor:
            return nn.functional.normalize(nn.functional.avg_pool2d(x, 28).flatten(1) - x.mean((1, 2, 3))[:, None], dim=1)

    import torch

    stub = dreamsim_network(Stub(), torch.device("cpu"), {"type": "stub"})
    monkeypatch.setattr(evaluate, "build_network", lambda kind, *_: stub)
    teacher = toy_model("teacher")
    same = Model("perfect", {"subject": "perfect"}, teacher.draw, latent_shape=(3, 8, 8))
    evaluation(same, tmp_path / "perfect", coco, weights, shared=tmp_path / "shared", teacher=teacher).run(["dreamsim5k"])
    found = {e["metric"]: e["value"] for e in read(tmp_path / "perfect", "dreamsim5k")["results"]}
    assert found["DreamSim to the teacher"] == pytest.approx(0, abs=1e-6)
    assert found["control: student, teacher of another noise"] == pytest.approx(found["control: teacher, teacher of another noise"])
    assert found["control minus DreamSim"] > 0.01
    evaluation(same, tmp_path / "perfect", coco, weights).run(["dreamdiv5k"])
    result = read(tmp_path / "perfect", "dreamdiv5k")
    assert result["n"] == 8 * COUNT and result["results"][0]["value"] > 0.01
    # Two noises of a prompt are as far apart in expectation as the control says.
    assert "--teacher" in evaluation(same, tmp_path / "no", coco, weights).run(["dreamsim5k"])["dreamsim5k"][0]
    # Noises of another shape are other noises: no number in that column.
    other = Model("other", {"subject": "other"}, teacher.draw, latent_shape=(4, 4, 4))
    evaluation(other, tmp_path / "other", coco, weights, shared=tmp_path / "shared", teacher=teacher).run(["dreamsim5k"])
    assert [e["metric"] for e in read(tmp_path / "other", "dreamsim5k")["results"]] == ["unpaired: student, teacher of the same prompt"]


def test_dreamdiv_is_the_mean_over_pairs() -> None:
    e = np.random.default_rng(0).standard_normal((5, 8, 12)).astype(np.float32)
    e /= np.linalg.norm(e, axis=2, keepdims=True)
    pairs = [[1 - float(g[i] @ g[j]) for i in range(8) for j in range(i)] for g in e]
    np.testing.assert_allclose(dreamdiv(e), np.mean(pairs, axis=1), rtol=1e-5)
    assert dreamdiv(np.repeat(e[:, :1], 8, 1)) == pytest.approx(np.zeros(5), abs=1e-6)
    with pytest.raises(UserError, match="at least two pictures"):
        dreamdiv(e[:, :1])


# --- Folders of pictures --------------------------------------------------------------------------------------------
def test_a_folder_with_captions(tmp_path: Path, coco: Path, weights: Path) -> None:
    folder = tmp_path / "drawn"
    folder.mkdir()
    for i, picture in enumerate(pictures(6)):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    (folder / "captions.txt").write_text("".join(f"a caption {i}\n" for i in range(6)))
    evaluation(folder_model(folder, "drawn", None), tmp_path / "out", coco, weights).run(["fid5k_coco17", "clip5k_coco17"])
    result = read(tmp_path / "out", "clip5k_coco17")
    assert result["n"] == 6 and result["noise"] is None and result["prompts"]["name"] == "captions of drawn"
    (folder / "captions.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="2 captions for 6 pictures"):
        folder_model(folder, "drawn", None)
    # A mark that ends no line stands in real captions.
    (folder / "captions.txt").write_text("".join(f"a caption\u2028{i}\n" for i in range(6)))
    assert folder_model(folder, "drawn", None).captions[5] == "a caption\u20285"
    (folder / "captions.txt").unlink()
    skipped = evaluation(folder_model(folder, "drawn", None), tmp_path / "bare", coco, weights).run(["fid5k_coco17", "clip5k_coco17"])
    assert list(skipped) == ["clip5k_coco17"] and "captions.txt" in skipped["clip5k_coco17"][0]
    assert (tmp_path / "bare" / "fid5k_coco17.json").exists()
    (folder / "003.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="003.png: cannot be read as a picture"):
        evaluation(folder_model(folder, "drawn", None), tmp_path / "corrupt", coco, weights).run(["fid5k_coco17"])


# --- What is missing or wrong ---------------------------------------------------------------------------------------
def test_without_its_weights_a_metric_is_skipped_and_the_others_finish(tmp_path: Path, coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_inception_ts(tmp_path / "weights")
    run = evaluation(toy_model(), tmp_path / "out", coco, tmp_path / "weights")
    skipped = run.run(["fid5k_coco17", "clip5k_coco17", "fid30k_coco14"])
    assert set(skipped) == {"clip5k_coco17", "fid30k_coco14"}
    assert "open_clip_pytorch_model.bin" in skipped["clip5k_coco17"][0]
    assert "captions_val2014.json" in skipped["fid30k_coco14"][0]
    assert (tmp_path / "out" / "fid5k_coco17.json").exists()
    assert not (tmp_path / "out" / "clip5k_coco17.json").exists()


def test_another_model_in_the_same_folder_is_refused(tmp_path: Path, coco: Path, weights: Path) -> None:
    evaluation(toy_model(), tmp_path, coco, weights).run(["clip5k_coco17"])
    with pytest.raises(UserError, match="holds the evaluation of toy, other weights than toy"):
        evaluation(toy_model(shift=3), tmp_path, coco, weights).run(["clip5k_coco17"])
    with pytest.raises(UserError, match="with block 0, now 1; choose a new --out"):
        evaluation(toy_model(), tmp_path, coco, weights, block=1).run(["clip5k_coco17"])
    # What is said only when it is not the rule counts when it was not said before.
    cut = replace(toy_model(), identity={**toy_model().identity, "quantiser": "trunc"})
    with pytest.raises(UserError, match=r"evaluated there without quantiser \(block\), now 'trunc'; choose"):
        evaluation(cut, tmp_path, coco, weights).run(["clip5k_coco17"])
    with pytest.raises(UserError, match=r"evaluated there without coco17_captions \(block\), now 'amd'; choose"):
        evaluation(toy_model(), tmp_path, coco, weights, coco17_captions="amd").run(["clip5k_coco17"])
    with pytest.raises(UserError, match="noise block 128, expected 0 to 127"):
        evaluation(toy_model(), tmp_path, coco, weights, block=128)
    with pytest.raises(UserError, match="protocol 'fid'"):
        evaluation(toy_model(), tmp_path, coco, weights).run(["fid"])
    skipped = evaluation(toy_model(), tmp_path / "x", coco, weights, count=11).run(["clip5k_coco17"])
    assert "count is 11, expected 1 to 10" in skipped["clip5k_coco17"][0]


def test_a_short_look_does_not_replace_a_result(tmp_path: Path, coco: Path, weights: Path) -> None:
    evaluation(toy_model(), tmp_path, coco, weights, count=6).run(["clip5k_coco17"])
    evaluation(toy_model(), tmp_path, coco, weights).run(["clip5k_coco17"])
    whole = (tmp_path / "clip5k_coco17.json").read_bytes()
    with pytest.raises(UserError, match="a result of 10 pictures, now of the first 6; choose a new --out, or leave --count out"):
        evaluation(toy_model(), tmp_path, coco, weights, count=6).run(["clip5k_coco17"])
    assert (tmp_path / "clip5k_coco17.json").read_bytes() == whole


def test_a_protocol_that_fails_leaves_the_others_their_results(tmp_path: Path, weights: Path) -> None:
    small_coco(tmp_path / "data")
    (tmp_path / "data" / "val2017" / f"{104:012d}.png").write_bytes(b"no picture")
    skipped = evaluation(toy_model(), tmp_path / "out", tmp_path / "data", weights).run(["fid5k_coco17", "clip5k_coco17"])
    assert list(skipped) == ["fid5k_coco17"] and "cannot be read as a picture" in skipped["fid5k_coco17"][0]
    assert (tmp_path / "out" / "clip5k_coco17.json").exists()


def test_damaged_weights_are_one_metrics_misfortune(tmp_path: Path, coco: Path) -> None:
    tiny_clip(tmp_path / "weights")
    (tmp_path / "weights" / "inception-2015-12-05.pt").write_bytes(b"cut short")
    skipped = evaluation(toy_model(), tmp_path / "out", coco, tmp_path / "weights").run(["fid5k_coco17", "clip5k_coco17"])
    assert list(skipped) == ["fid5k_coco17"] and "cannot be loaded" in skipped["fid5k_coco17"][0]
    assert (tmp_path / "out" / "clip5k_coco17.json").exists()


def test_pictures_of_another_size_are_no_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion2gan.evaluation.extractors import Network

    network = Network("inception-tf", lambda p, c: np.stack([x.mean((0, 1)) for x in p]).astype(np.float32))
    monkeypatch.setattr(evaluate, "build_network", lambda kind, *_: network)
    rows = np.random.default_rng(0).integers(0, 256, (25, 3073), dtype=np.uint8)
    (tmp_path / "data" / "cifar-10-batches-bin").mkdir(parents=True)
    for i in range(5):
        (tmp_path / "data" / "cifar-10-batches-bin" / f"data_batch_{i + 1}.bin").write_bytes(rows[5 * i : 5 * i + 5].tobytes())
    for name, side in (("right", 32), ("wrong", 40)):
        (tmp_path / name).mkdir()
        for i in range(12):
            noise = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i:02d}.png")
    evaluation(folder_model(tmp_path / "right", "right", None), tmp_path / "out", tmp_path / "data", tmp_path).run(["fid50k_cifar10"])
    result = read(tmp_path / "out", "fid50k_cifar10")
    assert result["n"] == 12 and result["partial"] is True and result["reference"]["n"] == 25
    with pytest.raises(UserError, match="picture 0 is 40 x 40, this protocol's are 32 x 32"):
        evaluation(folder_model(tmp_path / "wrong", "wrong", None), tmp_path / "o2", tmp_path / "data", tmp_path).run(["fid50k_cifar10"])


def test_pictures_can_be_saved_later(tmp_path: Path, coco: Path, weights: Path) -> None:
    evaluation(toy_model(), tmp_path, coco, weights).run(["clip5k_coco17"])
    assert not (tmp_path / "pictures").exists()
    evaluation(toy_model(), tmp_path, coco, weights, save_pictures=True).run(["clip5k_coco17"])
    saved = tmp_path / "pictures" / "coco17"
    assert len(list(saved.glob("*.png"))) == COUNT and len((saved / "captions.txt").read_text().splitlines()) == COUNT
    # What was saved is what was scored: as a folder it scores the same.
    evaluation(folder_model(saved, "saved", None), tmp_path / "again", coco, weights).run(["clip5k_coco17"])
    for ours, theirs in zip(read(tmp_path, "clip5k_coco17")["results"], read(tmp_path / "again", "clip5k_coco17")["results"], strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], abs=1e-7)


def test_the_result_says_how_pixels_were_rounded(tmp_path: Path, coco: Path, weights: Path) -> None:
    evaluation(replace(toy_model(), quantiser="trunc"), tmp_path / "cut", coco, weights).run(["clip5k_coco17"])
    assert read(tmp_path / "cut", "clip5k_coco17")["quantiser"] == "trunc"
    evaluation(folder_model(coco / "val2017", "real", None), tmp_path / "found", coco, weights).run(["fid5k_coco17"])
    assert read(tmp_path / "found", "fid5k_coco17")["quantiser"] == "as found"


def test_blank_pictures_are_reported(tmp_path: Path, coco: Path, weights: Path) -> None:
    black = Model("black", {"subject": "black"}, lambda p, s: np.zeros((len(p), 16, 16, 3), np.uint8))
    evaluation(black, tmp_path, coco, weights).run(["clip5k_coco17"])
    assert "10 pictures are of one colour" in read(tmp_path, "clip5k_coco17")["notes"][0]


# --- Data sets ------------------------------------------------------------------------------------------------------
def test_coco_captions_are_of_the_smallest_annotation(coco: Path) -> None:
    found = coco17_prompts(coco)
    assert found.prompts == tuple(f"caption number {i}" for i in range(COUNT))
    assert found.first(3).prompts == found.prompts[:3] and found.first(3).sha256 != found.sha256
    pictures = PictureFolder(coco / "val2017").pictures(0, COUNT)
    assert all(p.shape[2] == 3 and p.dtype == np.uint8 for p in pictures)


def test_coco14_list_is_seeded_and_dmd2s_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "annotations").mkdir()
    annotations = [{"image_id": i, "id": i, "caption": f"caption {i}"} for i in range(50)]
    (tmp_path / "annotations" / "captions_val2014.json").write_text(json.dumps({"annotations": annotations}))
    found = coco14_prompts(tmp_path, 20)
    rows = np.sort(np.random.Generator(np.random.PCG64(0)).choice(50, 20, replace=False))
    assert found.prompts == tuple(f"caption {i}" for i in rows) and found.name == "coco14-30k-seed0"
    with pytest.raises(UserError, match="captions of 50 pictures, expected at least 30000"):
        coco14_prompts(tmp_path)
    (tmp_path / datasets.DMD2_LIST).write_bytes(b" a cat \na dog\n")
    with pytest.raises(UserError, match="expected edabd2a556026cbf"):
        coco14_prompts(tmp_path)
    import hashlib

    monkeypatch.setattr(datasets, "DMD2_SHA256", hashlib.sha256(b" a cat \na dog\n").hexdigest())
    assert coco14_prompts(tmp_path).prompts == ("a cat", "a dog")


def test_amds_list_is_another_caption_of_the_same_pictures(
    tmp_path: Path, coco: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(coco, data)
    options = {"coco17_captions": "amd"}
    reasons = evaluation(toy_model(), tmp_path / "none", data, weights, **options).run(["clip5k_coco17"])["clip5k_coco17"]
    assert len(reasons) == 1 and "expected AMD's list" in reasons[0]
    content = "".join(f"{70 + i}----amd caption {i} \n" for i in range(COUNT)).encode()
    (data / datasets.AMD_LIST).write_bytes(content)
    reasons = evaluation(toy_model(), tmp_path / "other", data, weights, **options).run(["clip5k_coco17"])["clip5k_coco17"]
    assert "copy AMD's file again" in reasons[0]
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(datasets, "AMD_SHA256", (digest[:8], digest[-4:]))
    assert evaluation(toy_model(), tmp_path / "amd", data, weights, **options).run(["clip5k_coco17", "fid5k_coco17"]) == {}
    result = read(tmp_path / "amd", "clip5k_coco17")
    assert result["prompts"]["name"] == "coco17-5k-amd" and result["prompts"]["sha256"] == digest
    assert (tmp_path / "amd" / "samples" / "coco17" / "00002.txt").read_text() == "amd caption 2"
    evaluation(toy_model(), tmp_path / "first", data, weights).run(["clip5k_coco17"])
    assert read(tmp_path / "first", "clip5k_coco17")["results"][0]["value"] != result["results"][0]["value"]


def coco14(folder: Path, count: int) -> dict:
    """Annotations as COCO packs them: pictures in no order, and their captions in another one, three to five of each."""
    order = np.random.default_rng(5)
    images = [{"id": 7 * int(i) + 3, "file_name": f"COCO_val2014_{i:012d}.png"} for i in order.permutation(count)]
    captions = [(image["id"], k) for i, image in enumerate(images) for k in range(3 + i % 3)]
    annotations = [
        {"id": int(i), "image_id": captions[i][0], "caption": f"caption {captions[i][1]} of {captions[i][0]}"}
        for i in order.permutation(len(captions))
    ]
    (folder / "annotations").mkdir(parents=True)
    content = {"images": images, "annotations": annotations}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    return content


def test_dmd2s_choice_for_sdxl_is_pandas(tmp_path: Path) -> None:
    """Their rule in the library they used: merge, shuffle, first of each picture, draw, under one global seed."""
    pandas = pytest.importorskip("pandas")
    content = coco14(tmp_path, 60)
    images, annotations = pandas.DataFrame(content["images"]), pandas.DataFrame(content["annotations"])
    np.random.seed(123)
    rows = images.merge(annotations, how="left", left_on="id", right_on="image_id")[["file_name", "caption"]]
    chosen = rows.sample(frac=1).drop_duplicates(subset="file_name").sample(40)
    prompts, names = datasets.coco14_dmd2_sdxl(tmp_path, 40)
    assert list(prompts.prompts) == list(chosen["caption"]) and names == list(chosen["file_name"])
    assert len(set(names)) == 40
    with pytest.raises(UserError, match="expected at least 61"):
        datasets.coco14_dmd2_sdxl(tmp_path, 61)


def test_sdxls_protocol_is_against_the_chosen_pictures(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    content = coco14(data, 12)
    (data / "val2014").mkdir()
    for image, picture in zip(content["images"], pictures(12, 3), strict=True):
        Image.fromarray(picture).save(data / "val2014" / image["file_name"])
    monkeypatch.setattr(datasets.coco14_dmd2_sdxl, "__defaults__", (8,))
    assert evaluation(toy_model(), tmp_path / "out", data, weights).run(["fid10k_coco14", "clip10k_coco14"]) == {}
    result = read(tmp_path / "out", "fid10k_coco14")
    assert [(e["metric"], e["variant"]) for e in result["results"]] == [("FID", "res512"), ("patch-FID", "patch299")]
    assert result["n"] == 8 and result["reference"]["n"] == 8 and result["partial"]
    missing = data / "val2014" / datasets.coco14_dmd2_sdxl(data)[1][0]
    missing.unlink()
    reasons = evaluation(toy_model(), tmp_path / "again", data, weights).run(["fid10k_coco14"])["fid10k_coco14"]
    assert missing.name in reasons[0]


def test_cifar_10_in_its_binary_form(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (25, 3073), dtype=np.uint8)
    for i in range(5):
        (tmp_path / f"data_batch_{i + 1}.bin").write_bytes(rows[5 * i : 5 * i + 5].tobytes())
    cifar = Cifar10(tmp_path)
    assert len(cifar) == 25
    found = cifar.pictures(3, 12)
    assert found.shape == (9, 32, 32, 3)
    np.testing.assert_array_equal(found[2, 4, 7], rows[5, 1:].reshape(3, 32, 32)[:, 4, 7])
    (tmp_path / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="5 bytes, expected a multiple of 3073"):
        Cifar10(tmp_path)
    (tmp_path / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match="data_batch_2.bin: no such file"):
        Cifar10(tmp_path)


def test_seeded_rows_are_distinct_and_sorted() -> None:
    rows = seeded_rows(100, 30)
    assert len(set(rows.tolist())) == 30 and (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(seeded_rows(7, 7), np.arange(7))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_knows_its_networks_and_samples(protocol: str) -> None:
    from diffusion2gan.evaluation.extractors import NETWORKS

    p = PROTOCOLS[protocol]
    assert set(p.networks) <= set(NETWORKS)
    assert p.samples is None or p.samples in evaluate.SAMPLES
    assert not p.reference or p.samples is None or evaluate.SAMPLES[p.samples].reference is not None


def test_noises_meet_no_others() -> None:
    drawn = {noise_seed(sample, block) for sample in (0, 1, 39_999) for block in (0, 1, 127, 128, 255)}
    assert len(drawn) == 15 and all(seed & EVALUATION for seed in drawn)
    others = {evaluation_seed(i) for base in (0, 1 << 50, 1 << 51) for i in range(base, base + 4)} | {pair_seed(3, 1)}
    assert not drawn & others


def test_memory_is_bounded_by_a_shard(tmp_path: Path) -> None:
    """Never more pictures alive than one shard has: counted, not guessed."""
    alive: dict[str, int] = {"now": 0, "most": 0}

    class Counted(np.ndarray):
        def __new__(cls, i: int) -> Counted:
            alive["now"] += 1
            alive["most"] = max(alive["most"], alive["now"])
            return np.full((2, 2, 3), i % 256, np.uint8).view(cls)

        def __del__(self) -> None:
            if self.base is not None and self.shape == (2, 2, 3):
                alive["now"] -= 1

    def produce(start: int, stop: int) -> list[np.ndarray]:
        return [Counted(i) for i in range(start, stop)]

    rows: Callable[[Any, int, int], np.ndarray] = lambda p, start, stop: np.zeros((stop - start, 1), np.float32)  # noqa: E731
    shards.extract(produce, 40, tmp_path, [shards.Extractor("x", {}, rows)], progress=False)
    # One shard being made while the one before is let go.
    assert 4 <= alive["most"] <= 8


def test_diversity_within_a_prompt_is_of_one_prompt(tmp_path: Path, coco: Path, weights: Path) -> None:
    """Sixteen pictures of sixteen captions are no two prompts of eight."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    for i, picture in enumerate(pictures(16)):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    for captions, right in (([f"a caption {i // 8}" for i in range(16)], True), ([f"a caption {i}" for i in range(16)], False)):
        (folder / "captions.txt").write_text("".join(f"{c}\n" for c in captions))
        skipped = evaluation(folder_model(folder, "drawn", None), tmp_path / f"out-{right}", coco, weights).run(["dreamdiv5k"])
        assert ("picture 1 is of 'a caption 1'" in " ".join(skipped.get("dreamdiv5k", []))) is not right


def test_a_network_that_is_gone_leaves_its_numbers(tmp_path: Path, coco: Path, weights: Path) -> None:
    evaluation(toy_model(), tmp_path, coco, weights).run(["fid5k_coco17"])
    before = read(tmp_path, "fid5k_coco17")
    only = evaluation(toy_model(), tmp_path, coco, weights, networks={"inception-clean-512": UserError("not here")})
    assert list(only.run(["fid5k_coco17"])) == ["fid5k_coco17"]
    after = read(tmp_path, "fid5k_coco17")
    assert after["results"] == before["results"] and after["notes"] == ["inception-clean-512: not here"]
    # Of other pictures it is no longer true.
    (tmp_path / "fid5k_coco17.json").write_text(json.dumps({**before, "pictures_sha256": "0" * 64}))
    only.run(["fid5k_coco17"])
    assert [e["variant"] for e in read(tmp_path, "fid5k_coco17")["results"]] == ["res256"]


def test_where_nothing_ran_another_model_may(tmp_path: Path, coco: Path, weights: Path) -> None:
    assert evaluation(toy_model(), tmp_path, tmp_path / "no data", weights).run(["clip5k_coco17"])
    assert not (tmp_path / "model.json").exists()
    assert evaluation(toy_model(shift=3), tmp_path, coco, weights).run(["clip5k_coco17"]) == {}
    (tmp_path / "model.json").write_text('{"name": "toy"}')
    with pytest.raises(UserError, match=r"model.json: not what `diffusion2gan evaluate` writes"):
        evaluation(toy_model(shift=3), tmp_path, coco, weights).run(["clip5k_coco17"])


def test_captions_of_numbered_pictures(tmp_path: Path, coco: Path, weights: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(pictures(11, 5)):
        Image.fromarray(picture).save(folder / f"{i}.jpg")
    with pytest.warns(UserWarning, match="11 of 11 pictures are JPEG or WebP"):
        lossy = folder_model(folder, "numbered", None)
    assert evaluation(lossy, tmp_path / "out", coco, weights).run(["fid5k_coco17"]) == {}
    assert "11 pictures are JPEG or WebP" in read(tmp_path / "out", "fid5k_coco17")["notes"][0]
    (folder / "captions.txt").write_text("".join(f"caption {i}\n" for i in range(11)))
    with pytest.warns(UserWarning, match="JPEG"), pytest.raises(UserError, match=r"by name 10.jpg comes before 2.jpg, by number after it"):
        folder_model(folder, "numbered", None)
    for i in range(11):
        (folder / f"{i}.jpg").rename(folder / f"{i:02d}.jpg")
    with pytest.warns(UserWarning, match="JPEG"):
        assert folder_model(folder, "numbered", None).captions[10] == "caption 10"
    # Names that are no numbers have one order.
    for i, name in enumerate(("9b", "10a", "f3", "c1", "20", "3", "7aa", "d", "e", "f", "g")):
        (folder / f"{i:02d}.jpg").rename(folder / f"{name}.jpg")
    with pytest.warns(UserWarning, match="JPEG"):
        assert len(folder_model(folder, "named", None).captions) == 11
