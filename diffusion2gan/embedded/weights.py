"""Finds the embedded models that ship with the package."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from diffusion2gan.errors import UserError


def package_root() -> Path:
    """Where the shipped weights lie in the package."""
    return Path(str(resources.files("diffusion2gan.embedded") / "weights"))


def weights_root() -> Path:
    """Folder of the shipped weights; $DIFFUSION2GAN_EMBEDDED overrides it (to try newly trained ones)."""
    override = os.environ.get("DIFFUSION2GAN_EMBEDDED")
    return Path(override) if override else package_root()


def embedded_folder(name: str) -> Path:
    """`teacher`, `student`, `latent_vgg` or `pixel_vgg`. Raises UserError when this installation does not have it."""
    folder = weights_root() / name
    if not folder.is_dir():
        raise UserError(f"embedded {name}: {folder} does not exist; train it with `diffusion2gan embedded`, or set DIFFUSION2GAN_EMBEDDED")
    return folder


def check_teacher(teacher: Path, student: Path) -> None:
    """Raises UserError when the student was distilled from another teacher: a network and a text encoder that do not fit draw nonsense."""
    from diffusion2gan.files import json_object
    from diffusion2gan.pipeline import STUDENT_FILE
    from diffusion2gan.teachers.folders import stored_weights
    from diffusion2gan.teachers.protocol import TeacherConfig

    expected = json_object(student / STUDENT_FILE).get("teacher_weights")
    found = stored_weights(TeacherConfig(), teacher)
    if expected != found:
        raise UserError(
            f"{student}: a student of teacher {str(expected)[:16]}..., but {teacher} is {found[:16]}...; distil one of this teacher and pack it"
        )


def student_folder(name: str) -> Path:
    """The folder of a student that is named by it; `embedded` is the shipped student of the embedded teacher."""
    return embedded_student() if name == "embedded" else Path(name)


def embedded_student() -> Path:
    """Folder of the shipped student: its own U-Net beside the teacher's other parts, put together in the cache at first use."""
    import hashlib
    import shutil
    import tempfile

    from diffusion2gan.files import ANOTHER_CACHE, cache_dir, disk_errors

    teacher, own = embedded_folder("teacher"), embedded_folder("student")
    files = sorted(p for folder in (teacher, own) for p in folder.rglob("*") if p.is_file())
    digest = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in files)).hexdigest()[:16]
    target = cache_dir() / f"student-{digest}"
    if not target.exists():
        check_teacher(teacher, own)
        with disk_errors(target, ANOTHER_CACHE):
            target.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(target, ANOTHER_CACHE), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            draft = Path(scratch) / "student"
            shutil.copytree(teacher, draft, ignore=shutil.ignore_patterns("unet", "README.md"))
            shutil.copytree(own, draft, dirs_exist_ok=True)
            try:
                draft.rename(target)
            except OSError:  # another process was faster: the same files
                if not target.exists():
                    raise
    return target
