"""Scoring networks against the reference libraries, through the real loading code, with small or random weights by path."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import extractors
from diffusion2gan.evaluation.extractors import BATCH, CLIP_VARIANTS, build_network, dreamsim_network
from diffusion2gan.evaluation.metrics import Moments, frechet_distance, precision_recall
from diffusion2gan.evaluation.preprocess import centre_patch, centre_square, lanczos_square, prepared
from diffusion2gan.evaluation.weights import CLIP_G14, UnavailableError, _sha256_of_all, find_weights, weights_folder

pytest.importorskip("torchvision")


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Smooth pictures of several shapes."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        height, width = 40 + 5 * (i % 3), 48 - 3 * (i % 2)
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        out.append(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)))
    return out


# --- Weights --------------------------------------------------------------------------------------------------------
def tiny_inception_ts(folder: Path) -> Path:
    """A TorchScript file as clean-fid loads it: `.layers`, 2,048 features of a 299 px picture."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2048, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(nn.functional.avg_pool2d(x, 32)).relu().mean((2, 3))

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Layers()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "inception-2015-12-05.pt"
    torch.jit.script(Base()).save(str(path))
    return path


def tiny_clip(folder: Path) -> Path:
    """An open_clip folder with random weights."""
    import open_clip

    target = folder / CLIP_G14
    target.mkdir(parents=True)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    preprocess = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (target / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{target}", load_weights=False)
    torch.save(model.state_dict(), target / "open_clip_pytorch_model.bin")
    return target


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_inception_ts(folder)
    return folder


# --- Preprocessing --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(43, 40), (40, 43), (41, 40), (40, 47), (7, 4), (5, 5)])
def test_centre_square_is_torchvisions(size: tuple[int, int]) -> None:
    from torchvision.transforms.functional import center_crop

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(centre_square(image)), np.asarray(center_crop(image, [min(size)] * 2)))


@pytest.mark.parametrize("size", [(301, 320), (299, 299), (400, 300)])
def test_centre_patch_is_torchvisions(size: tuple[int, int]) -> None:
    from torchvision.transforms.functional import center_crop

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(centre_patch(image, 299)), np.asarray(center_crop(image, 299)))


def test_a_picture_smaller_than_the_patch_stays_whole() -> None:
    image = Image.fromarray(np.zeros((299, 200, 3), np.uint8))
    assert centre_patch(image, 299) is image


def test_pictures_keep_their_order_on_many_threads() -> None:
    many = [np.full((2, 2, 3), i, np.uint8) for i in range(200)]
    np.testing.assert_array_equal(prepared(many, np.asarray)[:, 0, 0, 0], np.arange(200))


# --- clean-fid ------------------------------------------------------------------------------------------------------
def test_fid_is_clean_fids(weights: Path, tmp_path: Path) -> None:
    """Crop, Lanczos, float bicubic, network, distance: all of clean-fid's own path on two folders. Its features are cut to 8 so
    that 24 pictures have a covariance of full rank."""
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W
    from torchvision.transforms.functional import center_crop

    sets = {"a": pictures(24, 1), "b": pictures(24, 2)}
    for name, several in sets.items():
        (tmp_path / name).mkdir()
        for i, picture in enumerate(several):
            Image.fromarray(picture).save(tmp_path / name / f"{i:03d}.png")

    def crop_and_lanczos(x: np.ndarray) -> np.ndarray:
        image = Image.fromarray(x)
        return np.asarray(center_crop(image, [min(image.size)] * 2).resize((256, 256), Image.Resampling.LANCZOS))

    reference = InceptionV3W(str(weights), download=False)
    theirs = fid.compute_fid(
        str(tmp_path / "a"), str(tmp_path / "b"), mode="clean", num_workers=0, device=torch.device("cpu"), verbose=False,
        custom_feat_extractor=lambda x: reference(x)[:, :8], custom_image_tranform=crop_and_lanczos,
    )  # fmt: skip
    network = build_network("inception-clean-256", weights)
    a, b = (network.features(several, [""] * 24) for several in sets.values())
    assert a.shape == (24, 2048)
    ours = frechet_distance(Moments.of(a[:, :8]), Moments.of(b[:, :8]))
    assert ours == pytest.approx(theirs, rel=1e-6)
    # 512 is another protocol, not the same number.
    other = build_network("inception-clean-512", weights).features(sets["a"], [""] * 24)
    assert np.abs(other - a).max() > 1e-4


def test_features_do_not_depend_on_the_rest_of_the_batch(weights: Path) -> None:
    network = build_network("inception-clean-256", weights)
    several = pictures(BATCH + 1)
    together = network.features(several, [""] * len(several))
    for i in (0, 7, BATCH):
        np.testing.assert_array_equal(together[i], network.features([several[i]], [""])[0])


# --- torch-fidelity -------------------------------------------------------------------------------------------------
class Uint8(torch.utils.data.Dataset):
    def __init__(self, several: Sequence[np.ndarray]):
        self._pictures = several

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(np.array(self._pictures[i])).permute(2, 0, 1)


@pytest.fixture(scope="module")
def inception_tf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import inception_v3

    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    network = inception_v3(weights=None, aux_logits=False, num_classes=1008, init_weights=False)
    torch.save(network.state_dict(), folder / "weights-inception-2015-12-05-6726825d.pth")
    return folder


def test_fid_and_precision_recall_are_torch_fidelitys(inception_tf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its whole path, from data sets to numbers, on the 64 features of an early layer."""
    from torch_fidelity import calculate_metrics

    monkeypatch.setitem(
        extractors._BUILDERS, "early", ("inception_tf", extractors._fidelity("early", "64", "FeatureExtractorInceptionV3", None))
    )
    rng = np.random.default_rng(0)
    generated = [rng.integers(0, 200, (24, 24, 3), dtype=np.uint8) for _ in range(30)]
    real = [np.asarray(Image.fromarray(p).resize((24, 24))) for p in pictures(32, 3)]
    theirs = calculate_metrics(
        input1=Uint8(generated), input2=Uint8(real), fid=True, prc=True, feature_layer_fid="64", feature_layer_prc="64", cuda=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_tf / "weights-inception-2015-12-05-6726825d.pth"),
        batch_size=8, cache=False, cache_root=str(tmp_path), save_cpu_ram=True, verbose=False, prc_neighborhood=3,
    )  # fmt: skip
    network = build_network("early", inception_tf, allow_unknown=True)
    a, b = network.features(generated, [""] * 30), network.features(real, [""] * 32)
    assert a.shape == (30, 64)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert precision_recall(a, b, 3) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_equals_torch_fidelitys_exactly(k: int) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = np.random.default_rng(k)
    # The convention test of torch-fidelity itself, and overlapping sets with duplicates.
    for generated, real in (
        (0.1 * rng.standard_normal((200, 16)), 3 * rng.standard_normal((200, 16))),
        (rng.integers(0, 3, (150, 4)).astype(float), rng.integers(0, 3, (170, 4)).astype(float)),
        (rng.standard_normal((300, 64)), 0.3 + rng.standard_normal((280, 64))),
    ):
        a, b = generated.astype(np.float32), real.astype(np.float32)
        theirs = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), prc_neighborhood=k, save_cpu_ram=True, verbose=False)
        ours = precision_recall(a, b, k, block=64)
        # Theirs are float32 means of zeros and ones: the counts are what must agree.
        assert (ours[0] * len(a), ours[1] * len(b)) == pytest.approx(
            (round(theirs["precision"] * len(a)), round(theirs["recall"] * len(b))), abs=1e-9
        )
    gathered = precision_recall(0.1 * rng.standard_normal((200, 16)), 3 * rng.standard_normal((200, 16)), k)
    assert gathered[0] > 0.8 and gathered[1] < 0.3


def test_a_strict_boundary_differs_only_for_duplicates() -> None:
    rng = np.random.default_rng(0)
    distinct = rng.standard_normal((100, 8)), rng.standard_normal((100, 8))
    assert precision_recall(*distinct, strict=True) == precision_recall(*distinct)
    collapsed = np.zeros((20, 3)), np.zeros((20, 3))
    assert precision_recall(*collapsed) == (1, 1)
    assert precision_recall(*collapsed, strict=True) == (0, 0)


def test_kid_of_whole_sets_is_the_unbiased_polynomial_mmd() -> None:
    from diffusion2gan.evaluation.protocols import KID_SUBSET, Given, _kid

    class InMemory(list):
        def mapped(self) -> np.ndarray:
            return np.stack(self)

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((KID_SUBSET, 5)), 0.2 + rng.standard_normal((KID_SUBSET, 5))
    (entry,) = _kid(Given(InMemory(x), InMemory(y)), "v")  # type: ignore[arg-type]

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / 5 + 1) ** 3

    n = KID_SUBSET
    within = sum((kernel(a, a).sum() - np.trace(kernel(a, a))) / (n * (n - 1)) for a in (x, y))
    assert entry["value"] == pytest.approx(within - 2 * kernel(x, y).mean(), rel=1e-9)
    assert _kid(Given(InMemory(x[:999]), InMemory(y)), "v") == []  # type: ignore[arg-type]


# --- CLIP -----------------------------------------------------------------------------------------------------------
def test_clip_scores_are_open_clips(tmp_path: Path) -> None:
    import open_clip

    folder = tiny_clip(tmp_path)
    several, captions = pictures(5), ["a cat", "a very long caption " * 12, "red heart", "b", "a photo of a dog"]
    found = build_network("clip", tmp_path).features(several, captions)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer("ViT-g-14")

    def cosine(image: Image.Image, text: str) -> float:
        with torch.no_grad():
            pair = model.encode_image(transform(image)[None]), model.encode_text(tokenizer([text]))
        return float(torch.cosine_similarity(*pair))

    assert found.shape == (5, len(CLIP_VARIANTS))
    for row, picture, caption in zip(found, several, captions, strict=True):
        image = Image.fromarray(picture)
        square, prefixed = lanczos_square(image, 256), f"A photo depicts {caption}"
        expected = [cosine(square, prefixed), cosine(square, caption), cosine(image, caption), cosine(image, prefixed)]
        np.testing.assert_allclose(row, expected, atol=2e-6)


# --- DreamSim and DINOv2 --------------------------------------------------------------------------------------------
def test_the_dreamsim_adapter_gives_the_model_what_its_own_transform_gives() -> None:
    from torchvision import transforms

    class Stub(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 6, 16, stride=16), nn.Flatten(), nn.Linear(6 * 14 * 14, 10))

        def embed(self, x: Tensor) -> Tensor:
            return nn.functional.normalize(self.net(x), dim=1)

    model = Stub().eval().requires_grad_(False)
    several = pictures(4)
    theirs = transforms.Compose([transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BICUBIC), transforms.ToTensor()])
    expected = torch.cat([model.embed(theirs(Image.fromarray(p))[None]) for p in several])
    found = dreamsim_network(model, torch.device("cpu"), {}).features(several, [""] * 4)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_dinov2_is_loaded_from_a_local_repository(tmp_path: Path) -> None:
    from torchvision import transforms

    (tmp_path / "dinov2").mkdir()
    (tmp_path / "dinov2" / "hubconf.py").write_text(
        "from torch import nn\n"
        "def dinov2_vitl14(pretrained=True):\n"
        "    assert not pretrained\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 14, stride=14), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(3, 8, 14, stride=14), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.save(own.state_dict(), tmp_path / "dinov2_vitl14_pretrain.pth")
    several = pictures(3)
    theirs = transforms.Compose(
        [
            transforms.Lambda(lambda image: transforms.functional.center_crop(image, [min(image.size)] * 2)),
            transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.no_grad():
        expected = own(torch.stack([theirs(Image.fromarray(p)) for p in several]))
    np.testing.assert_allclose(build_network("dinov2", tmp_path).features(several, [""] * 3), expected, atol=1e-5)


# --- Weights that are not there, or are others ----------------------------------------------------------------------
@pytest.mark.parametrize("kind", extractors.NETWORKS)
def test_missing_weights_say_which_file_goes_where(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnavailableError) as caught:
        build_network(kind, tmp_path)
    text = str(caught.value)
    assert ("\n" not in text and str(tmp_path) in text and "expected" in text) or "could not be reached" in text


def test_weights_of_another_digest_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="sha256 begins .* expected 397923af"):
        find_weights("vgg16", tmp_path)
    assert find_weights("vgg16", tmp_path, allow_unknown=True).facts["checked"] == "UNKNOWN WEIGHTS"


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("vgg16-397923af.pth", "weights-inception-2015-12-05-6726825d.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    for kind in ("vgg16-256", "inception-tf"):
        with pytest.raises(UnavailableError, match="cannot be read as weights"):
            build_network(kind, tmp_path, allow_unknown=True)
    assert not (tmp_path / "ran").exists()


def test_where_weights_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION2GAN_WEIGHTS", str(tmp_path / "from-environment"))
    assert weights_folder() == tmp_path / "from-environment"
    assert weights_folder(tmp_path) == tmp_path
    monkeypatch.delenv("DIFFUSION2GAN_WEIGHTS")
    monkeypatch.setenv("DIFFUSION2GAN_CACHE", str(tmp_path / "cache"))
    assert weights_folder() == tmp_path / "cache" / "evaluation"


def test_the_digest_of_a_checkout_is_of_its_content(tmp_path: Path) -> None:
    """`git status` rewrites .git/index; on another host it is another one from the start."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "model.py").write_text("x = 1")
    before = _sha256_of_all([tmp_path])
    for name in (".git/index", "code/__pycache__/model.pyc", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("changes")
    assert _sha256_of_all([tmp_path]) == before
    (tmp_path / "code" / "model.py").write_text("x = 22")
    assert _sha256_of_all([tmp_path]) != before
