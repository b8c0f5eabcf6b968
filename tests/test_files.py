"""What killed processes leave half-written, and what is not ours to touch."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from diffusion2gan.errors import UserError
from diffusion2gan.files import (
    _host,
    atomic_folder,
    disk_errors,
    hub_file,
    refuse_other_folder,
    sweep_temporaries,
    sweep_temporaries_of,
    write_bytes_atomic,
)


def _dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_is_swept(tmp_path: Path) -> None:
    dead, old = _dead_process(), time.time() - 2 * 86400
    ours, theirs = _host(), "0123abcd"
    names = {
        f".a.pt.xyz.{ours}-{dead}.tmp": False,
        f".a.pt.xyz.{ours}-{os.getpid()}.tmp": True,  # alive
        f".a.pt.xyz.{theirs}-{dead}.tmp": True,  # another host's, young
        f".b.pt.xyz.{theirs}-{dead}.tmp": False,  # and old
        ".work.tmp": True,  # of no form of ours
        ".notes.2024-05.tmp": True,
        f"a.pt.{ours}-{dead}.tmp": True,
    }
    for name in names:
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / name).write_text("")
        if name.startswith((".b", ".work", ".notes")):
            os.utime(tmp_path / "deep" / name, (old, old))
    draft = tmp_path / f".student.xyz.{ours}-{dead}.tmp"
    (draft / "student").mkdir(parents=True)
    (tmp_path / ".cache.tmp").mkdir()
    sweep_temporaries(tmp_path)
    assert {name: (tmp_path / "deep" / name).exists() for name in names} == names
    assert not draft.exists() and (tmp_path / ".cache.tmp").exists()


def test_what_is_swept_of_one_file(tmp_path: Path) -> None:
    dead = _dead_process()
    own, other = (tmp_path / f".{name}.xyz.{_host()}-{dead}.tmp" for name in ("a[1].pt", "a1.pt"))
    own.touch(), other.touch()
    sweep_temporaries_of(tmp_path / "a[1].pt")
    assert not own.exists() and other.exists()


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_folder_without_a_name_cannot_be_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no name of its own"):
        refuse_other_folder(Path(name), "marker", "student")


def test_a_file_system_that_flushes_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems answer EINVAL; what was written is there all the same."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes_atomic(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk" / "student").mkdir(parents=True)
    (tmp_path / "student").symlink_to(tmp_path / "disk" / "student")
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "student") as draft:
            draft.mkdir()
            (draft / "file").write_text(content)
        assert (tmp_path / "student").is_symlink()
        assert (tmp_path / "disk" / "student" / "file").read_text() == content
        assert [p.name for p in (tmp_path / "disk").iterdir()] == ["student"]


def test_a_folder_where_a_file_is_to_be(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="pictures: is a folder, expected the name of a file"):
        write_bytes_atomic(tmp_path / "pictures", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot write here .*; go elsewhere")])
def test_a_folder_that_cannot_be_copied_is_one_line(number: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()

    def refused(source: str, *_: object) -> None:
        raise OSError(number, os.strerror(number), source)

    with pytest.raises(UserError, match=said), disk_errors(tmp_path / "b", "go elsewhere"):
        shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=refused)


def test_a_proxy_that_refuses_does_not_hide_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client asks it before it looks into the cache, and raises what is no OSError."""
    cached = {"here.json": tmp_path / "here.json"}

    revisions: list[str | None] = []

    def download(_repository: str, name: str, revision: str | None, local_files_only: bool = False) -> str:
        revisions.append(revision)
        if not local_files_only:
            raise HTTPError("403 Forbidden")
        if name not in cached:
            raise LocalEntryNotFoundError("no such entry")
        return str(cached[name])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert hub_file("someone/something", "here.json") == cached["here.json"]
    with pytest.raises(FileNotFoundError, match="403 Forbidden"):
        hub_file("someone/something", "gone.json")
    assert hub_file("someone/something", "here.json", "a1b2") == cached["here.json"]
    assert revisions == [None] * 4 + ["a1b2"] * 2


def test_a_folder_with_somebody_elses_work_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "student"

    def write(name: str) -> None:
        with atomic_folder(folder, ours=("old",)) as draft:
            draft.mkdir()
            (draft / name).write_text(name)

    write("old")
    (folder / ".DS_Store").write_text("a file system's")
    write("new")
    assert [p.name for p in folder.iterdir()] == ["new"]
    (folder / "notes").write_text("keep me")
    with pytest.raises(UserError, match="would be replaced by a folder without notes, which is there"):
        write("new")
    assert sorted(p.name for p in folder.iterdir()) == ["new", "notes"]
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
