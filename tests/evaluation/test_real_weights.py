"""The published scoring weights, where somebody has them: `EVAL_WEIGHTS_DIR=DIR python -m pytest -m weights`.

DIR is laid out as `evaluate --weights` wants it. DreamSim's example pictures (`images/ref_1.png`, `img_a_1.png`, `img_b_1.png` of its
repository) go into DIR/dreamsim/images; EVAL_DATA_DIR has COCO 2014 and GigaGAN's released pictures in gigagan_coco.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.evaluation.evaluate import Evaluation
from diffusion2gan.evaluation.extractors import Network, build_network
from diffusion2gan.evaluation.models import ModelOptions, folder_model, load_model
from diffusion2gan.evaluation.weights import UnavailableError
from diffusion2gan.images import open_rgb

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif("EVAL_WEIGHTS_DIR" not in os.environ, reason="no EVAL_WEIGHTS_DIR with the published weights"),
]


def published(kind: str) -> Network:
    try:
        return build_network(kind, Path(os.environ["EVAL_WEIGHTS_DIR"]))
    except UnavailableError as error:
        pytest.skip(str(error))


def test_the_two_inceptions_are_one_network() -> None:
    """NVIDIA's TorchScript file and torch-fidelity's weights are both of 2015-12-05: at 299 x 299 neither path resizes."""
    pictures = np.random.default_rng(0).integers(0, 256, (8, 299, 299, 3), dtype=np.uint8)
    pictures[4:] = np.sort(pictures[4:], axis=1)  # something smooth too
    a, b = (published(kind).features(pictures, [""] * 8) for kind in ("inception-patch-299", "inception-tf"))
    assert a.shape == (8, 2048) and a.std() > 0.01
    np.testing.assert_allclose(a, b, atol=2e-3)


def test_vgg16_tells_pictures_apart() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    features = published("vgg16-256").features(pictures, ["", ""])
    assert features.shape == (2, 4096) and (features >= 0).all() and np.abs(features[0] - features[1]).max() > 0.1


def test_clip_prefers_the_caption_of_the_picture() -> None:
    network = published("clip")
    prompts = ["a red heart", "a green apple", "a yellow sun", "a blue car"]
    model = load_model(f"teacher:{embedded_folder('teacher')}", ModelOptions(steps=20, guidance=5.0))
    pictures = model.draw(prompts, range(4))
    cosines = np.stack([network.features(pictures, [prompt] * 4)[:, 0] for prompt in prompts], 1)
    assert (cosines.argmax(1) == np.arange(4)).sum() >= 3
    assert 0.1 < cosines.diagonal().mean() < 0.5


def test_dreamsims_own_example() -> None:
    folder = Path(os.environ["EVAL_WEIGHTS_DIR"]) / "dreamsim" / "images"
    if not folder.is_dir():
        pytest.skip(f"no {folder} with DreamSim's example pictures")
    pictures = [np.asarray(open_rgb(folder / f"{name}.png", "copy it again")) for name in ("ref_1", "img_a_1", "img_b_1")]
    reference, a, b = published("dreamsim").features(pictures, [""] * 3)
    distances = [1 - reference @ x / np.linalg.norm(reference) / np.linalg.norm(x) for x in (a, b)]
    assert distances == pytest.approx([0.4453, 0.2756], abs=2e-3)


def test_dinov2_has_a_class_token() -> None:
    features = published("dinov2").features([np.asarray(Image.new("RGB", (80, 60), c)) for c in ("red", "blue")], ["", ""])
    assert features.shape == (2, 1024) and np.abs(features[0] - features[1]).max() > 0.1


def test_gigagans_released_pictures(tmp_path: Path) -> None:
    """The whole FID-30k, without drawing anything: 9.06 by its own evaluation."""
    published("inception-clean-256")
    data = Path(os.environ.get("EVAL_DATA_DIR", "nowhere"))
    if not (data / "gigagan_coco").is_dir() or not (data / "val2014").is_dir():
        pytest.skip("no EVAL_DATA_DIR with val2014 and gigagan_coco")
    model = folder_model(data / "gigagan_coco", "GigaGAN", None)
    evaluation = Evaluation(model, tmp_path, tmp_path, data, Path(os.environ["EVAL_WEIGHTS_DIR"]))
    assert evaluation.run(["fid30k_coco14"]) == {}
    (fid,) = (e for e in json.loads((tmp_path / "fid30k_coco14.json").read_text())["results"] if e["metric"] == "FID")
    assert fid["value"] == pytest.approx(9.06, abs=0.05)
