"""What killed processes leave half-written, and what is not ours to touch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from diffusion2gan.files import _host, sweep_temporaries, sweep_temporaries_of


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
