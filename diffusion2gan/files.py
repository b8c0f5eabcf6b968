"""Small file helpers: everything that must never be seen half-written goes through here."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffusion2gan.errors import UserError, in_one_line


def cache_dir() -> Path:
    """Where data sets are kept: $DIFFUSION2GAN_CACHE, or ~/.cache/diffusion2gan."""
    return Path(os.environ.get("DIFFUSION2GAN_CACHE") or Path.home() / ".cache" / "diffusion2gan")


def hub_file(repository: str, name: str, revision: str | None = None) -> Path:
    """A file of a hub repository, of its newest revision unless one is named; from the hub's cache where the hub cannot be asked.
    FileNotFoundError with the reason where it is not there either."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except (HTTPError, HFValidationError, OSError) as error:
        reason = in_one_line(error)
    try:
        # A proxy that refuses is asked before the cache.
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=True))
    except (HTTPError, HFValidationError, OSError):
        raise FileNotFoundError(reason) from None


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file, of any size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file that must hold an object holds. Raises UserError for a missing file or anything else."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path, or restore the file") from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON; restore it from a copy") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object; restore it from a copy")
    return content


ANOTHER_CACHE = "set DIFFUSION2GAN_CACHE to a folder you may write to"


@contextmanager
def disk_errors(path: Path, instead: str = "choose a folder you may write to") -> Iterator[None]:
    """Turns a full disk or a read-only folder into one clear line that names the path; `instead`: what to do when it is read-only."""
    try:
        yield
    except SafetensorError as error:
        if "No space left" in str(error) or "os error 28" in str(error):
            raise UserError(f"{path}: the disk is full; free some space and run the same command again") from None
        raise
    except OSError as error:
        number = _number_of(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full; free some space and run the same command again, it goes on where it stopped"
            ) from None
        if number in (errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"{path}: a file is in the way, expected a folder; choose another path") from None
        if number == errno.EISDIR:
            raise UserError(f"{path}: is a folder, expected the name of a file; choose another path") from None
        if number == errno.EBUSY:
            raise UserError(f"{path}: is in use (a mount point?) and cannot be replaced; name a folder in it") from None
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(f"{path}: cannot write here ({os.strerror(number)}); {instead}") from None
        raise


def _number_of(error: OSError) -> int | None:
    """errno; of `shutil.Error`, which has none but a text for every file that could not be copied, the first one's."""
    if isinstance(error, shutil.Error) and (found := re.search(r"\[Errno (\d+)\]", str(error))):
        return int(found[1])
    return error.errno


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed over `path`, otherwise removed."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(**_scratch(path))
        os.close(fd)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            fsync_dir(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can write it; half of a surrogate pair it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def lock(fd: int, taken: str) -> None:
    """Locks an open file against other processes until it is closed, or its process ends, however it does. Raises UserError, saying `taken`,
    while another has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(taken) from None


def sweep_temporaries(folder: Path) -> None:
    """Removes what killed processes left half-written below `folder`; a live process' files, and other hosts' of the last day, stay."""
    # Not by `rglob`, which ends with an error where another process removes a folder meanwhile.
    _sweep(Path(parent) / name for parent, folders, files in os.walk(folder) for name in [*folders, *files])


def sweep_temporaries_of(path: Path) -> None:
    """The same of what was being written in place of `path` alone, beside it."""
    _sweep(path.parent.glob(f".{glob.escape(path.name[:_NAMED])}.*.tmp"))


def _sweep(found: Iterable[Path]) -> None:
    for path in found:
        made_by = _TEMPORARY.fullmatch(path.name)
        if made_by is None:
            continue  # not ours
        try:
            if made_by["host"] == _host():
                if _is_alive(int(made_by["pid"])):
                    continue
            elif time.time() - path.stat().st_mtime < 86400:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except OSError:
            continue  # another was faster, or it is another's: what is left does no harm


_TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)\.tmp")
# So many characters of a file's name are in that of its temporary.
_NAMED = 80


def _scratch(path: Path) -> dict[str, Any]:
    """How `tempfile` is to name what is made beside `path`: whose it is says the name."""
    return {"dir": path.parent, "prefix": f".{path.name[:_NAMED]}.", "suffix": f".{_host()}-{os.getpid()}.tmp"}


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path`: afterwards the file has either its old content or all of the new one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON for people and programs to read, written as `write_bytes_atomic` does."""
    write_bytes_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def torch_save_atomic(path: Path, value: Any) -> None:
    """`torch.save` that leaves either the old file or all of the new one; a full disk is an OSError like everywhere else."""
    import torch

    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(value, file)
        except RuntimeError as error:
            # torch's zip writer reports a failed write as a failure of its own; the cause is further down.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def torch_load_safe(path: Path, by_page: bool = False) -> Any:
    """What `torch_save_atomic` wrote, on the CPU, read at once or `by_page` when it is used; no pickled code is run. Raises UserError for a damaged file or another's."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=by_page)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason}); delete it to go on from the one before, or anew") from None
    except pickle.UnpicklingError as error:  # a file that would have run code
        raise UserError(
            f"{path}: not a checkpoint of ours ({type(error).__name__}); delete it to go on from the one before, or anew"
        ) from None


def refuse_other_folder(folder: Path, marker: str, what: str) -> None:
    """Raises UserError unless `folder` may be written: new, empty, or holding the file `marker`, a `what` to be replaced."""
    if folder.name in ("", ".."):
        raise UserError(f"{folder}: has no name of its own, by which it could be replaced; name a folder in it, or its full path")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a folder; choose a new name")
    if folder.exists() and not (folder / marker).exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty and no {what} (no {marker}); choose a new folder")


def refuse_strangers(folder: Path, known: Collection[str]) -> None:
    """Raises UserError when `folder`, if there is one, holds names at its top that are not `known`; what file systems leave there aside."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if strangers := sorted(n for n in names if n not in known and n != ".DS_Store" and not n.startswith(".nfs")):
        raise UserError(
            f"{folder}: would be replaced by a folder without {strangers[0]}, which is there; choose a new one, or move that away"
        )


@contextmanager
def atomic_folder(folder: Path, ours: Collection[str] | None = None) -> Iterator[Path]:
    """Yields a path beside `folder` to fill; on success what was made there takes the place of `folder`.

    ours: raises UserError, and leaves the old folder as it is, if at its top it holds names that are neither in the new one nor in `ours`:
    the work of somebody else.

    An interrupted replacement leaves the old folder or the new one whole; a process killed in the one moment between two
    renames leaves the old one as `.NAME.old`, and the next call puts it back before anything else.
    """
    # Of a link, what it points to is replaced, where it is.
    folder = folder.resolve()
    aside = folder.with_name(f".{folder.name}.old")
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():
            if folder.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(folder)
        sweep_temporaries_of(folder)
        with tempfile.TemporaryDirectory(**_scratch(folder)) as scratch:
            draft = Path(scratch) / folder.name
            yield draft
            if ours is not None:
                refuse_strangers(folder, {p.name for p in draft.iterdir()} | set(ours))
            try:
                if folder.exists():
                    folder.rename(aside)
                draft.rename(folder)
            except BaseException:
                if aside.exists() and not folder.exists():
                    aside.rename(folder)
                raise
        shutil.rmtree(aside, ignore_errors=True)


def fsync_dir(path: Path) -> None:
    """Makes a rename inside `path` survive a power cut, where the file system has that."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
