from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from diffusion2gan.embedded import emoji
from diffusion2gan.embedded.emoji import EmojiRecord


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
    assert emoji.split_of("1F600", "noto", 3) == emoji.split_of("1F600", "noto", 3)


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
