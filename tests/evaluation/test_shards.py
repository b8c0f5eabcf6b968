"""Features by shards: resumed, shared out and extended, the rows are always those of one unbroken pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.metrics import Moments
from diffusion2gan.evaluation.shards import Extractor, Pictures, Rows, extract, picture_facts, seconds_per_image
from diffusion2gan.worker import Worker

COUNT, SIZE = 35, 8


def pictures(start: int, stop: int) -> list[np.ndarray]:
    """Noise of two sizes."""
    return [np.random.default_rng(i).integers(0, 256, (4 + i % 2, 5, 3), dtype=np.uint8) for i in range(start, stop)]


def moments_of(pictures: Pictures, start: int, stop: int) -> np.ndarray:
    assert len(pictures) == stop - start
    return np.array([[p.mean(), p.std()] for p in pictures], np.float32)


MEANS = Extractor("means", {"what": "mean and spread"}, moments_of)
NUMBERS = Extractor("numbers", {"what": "sample numbers"}, lambda p, start, stop: np.arange(start, stop, dtype=np.float32)[:, None])


def run(
    folder: Path, produce: Callable[[int, int], Pictures] = pictures, *extractors: Extractor, worker: Worker | None = None
) -> dict[str, Rows]:
    return extract(produce, COUNT, folder, extractors or (MEANS,), size=SIZE, progress=False, worker=worker)


def test_rows_are_in_order_and_their_moments_those_of_one_pass(tmp_path: Path) -> None:
    found = run(tmp_path, pictures, MEANS, NUMBERS)
    np.testing.assert_array_equal(found["numbers"].load()[:, 0], np.arange(COUNT))
    np.testing.assert_array_equal(found["means"].load(), moments_of(pictures(0, COUNT), 0, COUNT))
    before = sorted(tmp_path.iterdir())
    np.testing.assert_array_equal(found["means"].mapped(), found["means"].load())
    assert sorted(tmp_path.iterdir()) == before
    over, of = Moments.over(found["means"]), Moments.of(found["means"].load())
    assert over.n == of.n == COUNT
    np.testing.assert_allclose(over.mean, of.mean, rtol=1e-13)
    np.testing.assert_allclose(over.covariance, of.covariance, rtol=1e-11)


def test_killed_and_resumed_makes_only_what_is_missing(tmp_path: Path) -> None:
    made: list[int] = []

    def killed(start: int, stop: int) -> Pictures:
        made.append(start)
        if len(made) == 3:
            raise KeyboardInterrupt
        return pictures(start, stop)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, killed)
    rows = run(tmp_path, killed)["means"].load()
    assert made == [0, 8, 16, 16, 24, 32]
    np.testing.assert_array_equal(rows, run(tmp_path / "unbroken")["means"].load())


def test_another_extractor_is_added_to_what_is_there(tmp_path: Path) -> None:
    first = run(tmp_path)["means"].load()
    made: list[int] = []

    def counted(start: int, stop: int) -> Pictures:
        made.append(start)
        return pictures(start, stop)

    both = run(tmp_path, counted, MEANS, NUMBERS)
    assert made == [0, 8, 16, 24, 32]  # once for the new one
    np.testing.assert_array_equal(both["means"].load(), first)
    run(tmp_path, counted, MEANS, NUMBERS)
    assert len(made) == 5


def test_pictures_that_no_feature_was_taken_of_bind_nobody(tmp_path: Path) -> None:
    """Killed while the first features were computed, and resumed on another machine, whose last bits differ."""
    killed = Extractor("means", MEANS.identity, lambda p, start, stop: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, pictures, killed)
    assert (tmp_path / "pictures-00000-of-00005.json").exists()
    run(tmp_path, lambda a, b: [p // 2 for p in pictures(a, b)])


def test_other_pictures_under_a_new_extractor_are_noticed(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match="these pictures were other ones"):
        run(tmp_path, lambda a, b: [p // 2 for p in pictures(a, b)], MEANS, NUMBERS)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_same_rows(tmp_path: Path, world: int) -> None:
    found: dict[int, np.ndarray] = {}
    made: dict[int, list[int]] = {r: [] for r in range(world)}

    def work(rank: int) -> None:
        def produce(start: int, stop: int) -> Pictures:
            made[rank].append(start // SIZE)
            return pictures(start, stop)

        found[rank] = run(tmp_path / "several", produce, worker=Worker(rank, world))["means"].load()

    threads = [threading.Thread(target=work, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone = run(tmp_path / "alone")["means"].load()
    for rank in range(world):
        np.testing.assert_array_equal(found[rank], alone)
        assert made[rank] == [k for k in range(5) if k % world == rank]


def test_another_identity_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match="what is 'mean and spread', this run has 'median'"):
        run(tmp_path, pictures, Extractor("means", {"what": "median"}, moments_of))


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="7 pictures for 8 prompts"):
        run(tmp_path / "few", lambda a, b: pictures(a, b - 1))
    with pytest.raises(UserError, match=r"picture 0 is float64 .*expected uint8 \(H, W, 3\)"):
        run(tmp_path / "float", lambda a, b: [p / 255 for p in pictures(a, b)])
    with pytest.raises(UserError, match=r"picture 0 is uint8 \(4, 5\)"):
        run(tmp_path / "grey", lambda a, b: [p[..., 0] for p in pictures(a, b)])
    broken = Extractor("means", {}, lambda p, start, stop: np.array([[np.nan if i == 11 else 0.0] for i in range(start, stop)]))
    with pytest.raises(UserError, match="features of picture 11 are not finite"):
        run(tmp_path / "nan", pictures, broken)
    run(tmp_path / "cut")
    (tmp_path / "cut" / "means-00001-of-00005.npy").write_bytes(b"cut")
    with pytest.raises(UserError, match="not a whole .npy file; delete it"):
        run(tmp_path / "cut")["means"].load()


def test_blank_pictures_and_seconds_are_counted(tmp_path: Path) -> None:
    run(tmp_path, lambda a, b: [np.zeros((4, 4, 3), np.uint8) if i in (3, 20) else pictures(i, i + 1)[0] for i in range(a, b)])
    facts = picture_facts(tmp_path, "pictures", COUNT, SIZE)
    assert facts["blank"] == 2 and len(facts["sha256"]) == 64
    assert seconds_per_image(tmp_path, "pictures") is not None
    assert picture_facts(tmp_path / "nothing", "pictures", COUNT, SIZE) == {"sha256": None, "blank": None}


def test_a_torn_line_of_times_is_passed_over(tmp_path: Path) -> None:
    """Half a line of a killed process, to which the next one added its own."""
    rows = ['{"images": 4, "seconds": 9.0}', '{"images": 4, "sec{"images": 4, "seconds": 7.0}', '{"images": 4, "seconds": 2.0}']
    (tmp_path / "seconds-pictures.jsonl").write_text("\n".join(rows) + "\n")
    assert seconds_per_image(tmp_path, "pictures") == 0.5
