from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion2gan.embedded import emoji
from diffusion2gan.embedded.emoji import EmojiRecord
from diffusion2gan.errors import UserError


@pytest.fixture(scope="module")
def records() -> list[EmojiRecord]:
    return emoji.packaged_records()


def test_all_pictures_are_accounted_for(records: list[EmojiRecord]) -> None:
    assert len(records) == 10_319
    assert len({(r.concept, r.style, r.tone) for r in records}) == 10_319
    assert sum(bool(r.tone) for r in records) == 4_645
    assert {r.style for r in records} == set(emoji.STYLES)


def test_the_split_is_by_concept_and_by_cell(records: list[EmojiRecord]) -> None:
    splits: dict[str, set[str]] = {}
    cells: dict[tuple[str, str], set[str]] = {}
    for r in records:
        splits.setdefault(r.concept, set()).add(r.split)
        cells.setdefault(r.cell, set()).add(r.split)
    # A held-out concept is held out whole, a held-out cell with all its tones.
    assert all("concept" not in s or s == {"concept"} for s in splits.values())
    assert all(len(s) == 1 for s in cells.values())
    # Of a concept with a held-out cell, other styles are in training.
    assert all("cell" not in s or "train" in s for s in splits.values())
    share = Counter(next(iter(s)) if len(s) == 1 else "mixed" for s in splits.values())
    assert 0.03 < share["concept"] / len(splits) < 0.07
    held_out_cells = sum(s == {"cell"} for s in cells.values())
    assert 0.03 < held_out_cells / len(cells) < 0.07


def test_reference_has_every_held_in_cell_once(records: list[EmojiRecord]) -> None:
    rows = emoji.reference_indices(records)
    cells = [records[i].cell for i in rows]
    assert len(set(cells)) == len(cells)
    assert set(cells) == {r.cell for r in records if r.split == "train"}
    tones = Counter(records[i].tone for i in rows if records[i].tone)
    assert set(tones) == set(emoji.TONES) - {""}


def test_captions_go_from_coarse_to_fine(records: list[EmojiRecord]) -> None:
    record = next(r for r in records if r.short_name == "wave" and r.style == "fluent" and r.tone == "dark")
    captions = emoji.all_captions(record)
    assert captions[0] == "people & body"
    assert "fluent waving hand sign, dark skin" in captions
    assert len(captions) == len(set(captions)) == 16
    plain = next(r for r in records if r.short_name == "pizza" and r.style == "noto")
    assert len(emoji.all_captions(plain)) <= 8
    assert all(c == c.lower() and c.strip() == c for r in records for c in emoji.all_captions(r))


def test_drawn_captions_follow_the_weights(records: list[EmojiRecord]) -> None:
    record = next(r for r in records if r.short_name == "wave" and r.style == "fluent" and r.tone == "dark")
    uniform = np.random.default_rng(0).random((4000, 3))
    drawn = [emoji.draw_caption(record, u) for u in uniform]
    assert set(drawn) == set(emoji.all_captions(record))
    category = sum("people & body" in c for c in drawn) / len(drawn)
    assert abs(category - emoji.LEVEL_WEIGHTS[0]) < 0.02
    assert abs(sum("fluent" in c for c in drawn) / len(drawn) - 0.5) < 0.03


def _tarball(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three npm packages in small: two emoji, one of them with a tone and with a pair of tones, one not drawn by everybody."""
    index: list[dict[str, Any]] = [
        {"unified": "1F44B", "image": "1f44b.png", "name": "WAVING HAND SIGN", "short_name": "wave", "category": "People & Body",
         "subcategory": "hand-fingers-open", "skin_variations": {"1F3FB": {"image": "1f44b-1f3fb.png"}, "1F3FB-1F3FC": {"image": "two.png"}}},
        {"unified": "1F431", "image": "1f431.png", "name": "CAT FACE", "short_name": "cat", "category": "Animals & Nature", "subcategory": "animal-mammal"},
    ]  # fmt: skip
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 32, 64))  # blue on the left; on the right transparent red, which must not show
    members = {
        "noto": {"package/emoji.json": json.dumps(index).encode()}
        | {f"package/img/google/64/{n}.png": _encoded(half, "png") for n in ("1f44b", "1f44b-1f3fb", "1f431")},
        "twemoji": {"package/img/twitter/64/1f431.png": _encoded(Image.new("RGBA", (64, 64), "lime"), "png")},
        "fluent": {"package/assets/1f431.webp": _encoded(Image.new("RGBA", (128, 128), "yellow"), "webp")},
    }
    found = []
    for package, _, style in emoji.PACKAGES:
        name, version = package.rsplit("@", 1)
        path = tmp_path / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        _tarball(path, members[style])
        found.append((package, hashlib.sha256(path.read_bytes()).hexdigest(), style))
    monkeypatch.setattr(emoji, "PACKAGES", tuple(found))
    return tmp_path


def test_the_data_set_is_built_from_the_packages(packages: Path) -> None:
    dataset, skipped = emoji.build(packages)
    # Of 4 variants in 3 styles: two tones at once are left out, and what a style has not drawn.
    assert skipped == {"two tones": 3, "no picture in this style": 4}
    assert [(r.style, r.tone, r.short_name) for r in dataset.records] == [
        ("noto", "", "cat"), ("twemoji", "", "cat"), ("fluent", "", "cat"), ("noto", "", "wave"), ("noto", "light", "wave")
    ]  # fmt: skip
    assert dataset.records[3].name == "waving hand sign" and dataset.records[3].subcategory == "hand fingers open"
    assert dataset.images.shape == (5, 64, 64, 3)
    assert (dataset.images[0, :, :32] == (0, 0, 255)).all() and (dataset.images[0, :, 32:] == 255).all()
    assert (dataset.images[1] == (0, 255, 0)).all() and (dataset.images[2] == (255, 255, 0)).all()


def test_a_package_that_is_not_the_published_one_is_refused(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(packages.glob("emoji-datasource-google*"))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=f"{path.name}: sha256 is .*; delete the file and run the command again"):
        emoji.build(packages)
    path.unlink()
    for error, message in (
        (FileNotFoundError(), "npm is not installed"),
        (subprocess.CalledProcessError(1, "npm", stderr="npm error network"), "npm error network.*check the network"),
        (subprocess.TimeoutExpired("npm", 600), "did not end within 10 minutes"),
    ):

        def run(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(UserError, match=message):
            emoji.build(packages)
