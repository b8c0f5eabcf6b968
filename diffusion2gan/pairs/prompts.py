"""Prompt lists: text, JSONL, Parquet and WebDataset files or folders of them, filtered and de-duplicated; or the embedded captions."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import operator
import re
import sys
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from diffusion2gan.config import Section
from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.files import is_utf8

MAX_CHARACTERS = 2000
# Of one caption or JSON member of a WebDataset shard, in bytes.
_MAX_MEMBER = 1 << 20


class PromptsConfig(Section):
    """Where prompts come from."""

    source: str = "embedded"
    """`embedded`; a file, a folder of files of one kind or a pattern (`FOLDER/*.tar`), read in the order of their names: .txt (one a
    line), .jsonl, .parquet or .tar (WebDataset shards); or `empty`: the empty prompt, for teachers that read none."""
    column: str = "prompt"
    """Column of a .jsonl or .parquet file, key of a WebDataset sample's .json; `txt` for its .txt."""
    where: tuple[str, ...] = ()
    """Rows to take: conditions on columns that must all hold, as in `AESTHETIC_SCORE >= 6.25`, `language == "en"` or `safe == true`. A
    row without a value fails."""
    unique: bool = False
    """Passes over prompts that were there before; letter case and spaces make no difference, and the first spelling stays."""
    drop_unusable: bool = False
    """Passes over missing, empty, endless and broken captions, which an index of the web has, instead of refusing the list."""

    @field_validator("where")
    @classmethod
    def _conditions(cls, where: tuple[str, ...]) -> tuple[str, ...]:
        for text in where:
            Condition.parse(text)
        return where

    @model_validator(mode="after")
    def _nothing_to_choose_from(self) -> PromptsConfig:
        if self.source in ("embedded", "empty") and (self.where or self.unique or self.drop_unusable):
            raise ValueError(f"source is {self.source}, of which where, unique and drop_unusable choose nothing; leave them out")
        return self


@dataclass(frozen=True)
class Condition:
    """`column OPERATOR value`, on one row."""

    column: str
    operator: str
    value: float | str | bool

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises ValueError for what is no condition."""
        match = re.fullmatch(r"""\s*([^\s<>=!]+)\s*(>=|<=|==|!=|>|<)\s*("[^"]*"|'[^']*'|[^\s<>=!"']+)\s*""", text)
        if match is None:
            raise ValueError(f"where: {text!r}, expected `column OPERATOR value` with one of >= <= == != > < and text in quotes")
        column, sign, value = match.groups()
        if value[0] in "'\"":
            return cls(column, sign, value[1:-1])
        if value in ("true", "false"):
            return cls(column, sign, value == "true")
        try:
            number = float(value)
        except ValueError:
            return cls(column, sign, value)
        if not math.isfinite(number):
            raise ValueError(f"where: {text!r} compares with {value}, expected a finite number")
        return cls(column, sign, number)

    def holds(self, value: Any) -> bool:
        """Raises TypeError for a value that cannot be compared with this one."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return False
        if _kind(value) != _kind(self.value):
            raise TypeError
        return bool(_PYTHON[self.operator](value, self.value))

    def refusal(self, where: str, kind: str) -> UserError:
        return UserError(f"{where}: {self.column!r} is {kind}, not to be compared with {self.value!r}; mend pairs.prompts.where")


def _kind(value: Any) -> type:
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


_PYTHON: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt
}  # fmt: skip
_ARROW = {">=": "greater_equal", "<=": "less_equal", "==": "equal", "!=": "not_equal", ">": "greater", "<": "less"}


def read_prompts(config: PromptsConfig, count: int, seed: int) -> list[str]:
    """`count` prompts, the first that are there; a shorter list is read round and round. Raises UserError naming the file and the line
    at fault."""
    if config.source == "embedded":
        from diffusion2gan.evaluation.emoji10k import store_prompts

        return store_prompts(count, seed)
    if config.source == "empty":
        return [""] * count
    prompts = _prompts_of(config, count)
    return [prompts[i % len(prompts)] for i in range(count)]


def prompts_digest(prompts: Sequence[str]) -> str:
    """sha256 of a list's lines, for manifests and results."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.encode() + b"\n")
    return digest.hexdigest()


def source_is_here(config: PromptsConfig) -> bool:
    """Whether there is anything by the source's name: a file, a folder, or what a pattern matches."""
    path = Path(config.source)
    return config.source in ("embedded", "empty") or path.exists() or any(path.parent.glob(path.name))


def _files(config: PromptsConfig) -> list[Path]:
    """The file, the folder's files or those of the pattern, in the order of their names."""
    path = Path(config.source)
    if path.is_dir() or (not path.is_file() and any(c in path.name for c in "*?[")):
        parent, pattern = (path, "*") if path.is_dir() else (path.parent, path.name)
        files = sorted(p for p in parent.glob(pattern) if p.suffix in _READERS and p.is_file() and not p.name.startswith("."))
        kinds = sorted({p.suffix for p in files})
        if len(kinds) != 1:
            found = f"files of several kinds ({', '.join(kinds)})" if kinds else "no file of prompts"
            expected = f"expected files of one kind, {', '.join(_READERS)}, or a pattern such as {parent}/*{(kinds or ['.parquet'])[-1]}"
            raise UserError(f"pairs.prompts.source: {path} has {found}, {expected}")
        return files
    if not path.is_file():
        raise UserError(f"pairs.prompts.source: {path} does not exist; name a file or folder of prompts, `embedded` or `empty`")
    if path.suffix not in _READERS:
        raise UserError(f"pairs.prompts.source: {path} ends in {path.suffix!r}, expected {', '.join(_READERS)}")
    return [path]


def check_prompts(config: PromptsConfig) -> None:
    """Raises UserError where not even a first prompt is to be had: before anything that takes long. The rest is not read."""
    if config.source not in ("embedded", "empty"):
        _prompts_of(config, 1, tell=False)


def _prompts_of(config: PromptsConfig, count: int, tell: bool = True) -> list[str]:
    """At most `count` prompts; what comes after them is not read."""
    prompts: list[str] = []
    seen: set[str] = set()
    rows = unusable = repeated = 0
    for number, path, text in _rows_of(config):
        rows += 1
        prompt = (text or "").strip()
        wrong = _what_is_wrong(prompt)
        if wrong and not config.drop_unusable:
            raise UserError(f"{path}, line {number}: {wrong} (or set pairs.prompts.drop_unusable)")
        unusable += bool(wrong)
        if wrong:
            continue
        if config.unique:
            key = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
            if key in seen:
                repeated += 1
                continue
            seen.add(key)
        prompts.append(prompt)
        if len(prompts) == count:
            break
    if not prompts:
        left = (
            f"none of its rows is left ({rows:,} met the conditions, {unusable:,} of them unusable)"
            if config.where or rows
            else "no prompts in it"
        )
        if unusable:
            try:
                _prompts_of(config.model_copy(update={"drop_unusable": False}), count, tell=False)
            except UserError as error:
                first = str(error).removesuffix(" (or set pairs.prompts.drop_unusable)")
                raise UserError(f"{config.source}: {left}; the first: {first}") from None
        raise UserError(f"{config.source}: {left}; write one a line, or loosen pairs.prompts")
    if tell and (unusable or repeated):
        dropped = f"{unusable:,} unusable, {repeated:,} there before"
        print(f"{config.source}: {len(prompts):,} prompts of {rows:,} rows ({dropped})", file=sys.stderr)
    if tell and len(prompts) < count:
        print(
            f"{config.source}: {len(prompts):,} prompts for {count:,} pairs: each is used {count / len(prompts):.3g} times", file=sys.stderr
        )
    return prompts


def _rows_of(config: PromptsConfig) -> Iterator[tuple[int, Path, str | None]]:
    conditions = [Condition.parse(text) for text in config.where]
    for path in _files(config):
        if conditions and path.suffix == ".txt":
            raise UserError(f"pairs.prompts.where: {path} has no columns, expected a .jsonl, .parquet or .tar; drop the conditions")
        for number, text in _READERS[path.suffix](path, config, conditions):
            yield number, path, text


def _what_is_wrong(prompt: str) -> str:
    if not prompt:
        return "empty prompt; delete the line (`pairs.prompts.source: empty` is for teachers that read none)"
    if not is_utf8(prompt):
        return "half of a surrogate pair in the prompt; mend the text"
    if "\0" in prompt:
        return "a NUL character in the prompt; save the file as UTF-8"
    if len(prompt) > MAX_CHARACTERS:
        return f"a prompt of {len(prompt):,} characters, expected at most {MAX_CHARACTERS:,}; shorten it (the text encoder reads far fewer)"
    return ""


# --- One file: (line or row, text) of what meets the conditions; None for a caption that is broken, if such are dropped --------

_Rows = Iterator[tuple[int, str | None]]


def _broken(config: PromptsConfig, message: str) -> None:
    """A caption that cannot be read."""
    if not config.drop_unusable:
        raise UserError(f"{message} (or set pairs.prompts.drop_unusable)")


def _decoded(text: bytes, config: PromptsConfig, where: str, encoding: str = "utf-8") -> str | None:
    try:
        return text.decode(encoding)
    except UnicodeDecodeError as error:
        _broken(config, f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8")
        return None


def _text(path: Path, config: PromptsConfig, _conditions: list[Condition]) -> _Rows:
    """Lines between newlines alone: `splitlines` would also split at U+2028 and other marks that stand inside real prompts."""
    with path.open("rb") as file:
        if (start := file.read(2)) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path}: begins as UTF-16 text ({start.hex()}), expected UTF-8; save it as UTF-8")
        file.seek(0)
        for number, line in enumerate(file, 1):
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            yield number, _decoded(line, config, f"{path}, line {number}", "utf-8-sig" if number == 1 else "utf-8")


def _jsonl(path: Path, config: PromptsConfig, conditions: list[Condition]) -> _Rows:
    for number, line in _text(path, config, conditions):
        where = f"{path}, line {number}"
        if line is None:
            yield number, None
            continue
        try:
            row = json.loads(line)
            value = row[config.column]
        except (ValueError, KeyError, TypeError):
            _broken(config, f"{where}: expected a JSON object with {config.column!r}; mend the line or set pairs.prompts.column")
            yield number, None
            continue
        if _meets(row, conditions, where):
            yield number, _as_text(value, config, where)


def _meets(row: dict[str, Any], conditions: list[Condition], where: str) -> bool:
    for condition in conditions:
        value = row.get(condition.column)
        try:
            if not condition.holds(value):
                return False
        except TypeError:
            raise condition.refusal(where, f"a {type(value).__name__}") from None
    return True


def _as_text(value: object, config: PromptsConfig, where: str) -> str | None:
    """A missing caption is an empty one."""
    if value is not None and not isinstance(value, str):
        _broken(config, f"{where}: {config.column!r} is a {type(value).__name__}, expected a string")
        return None
    return value or ""


def _parquet(path: Path, config: PromptsConfig, conditions: list[Condition]) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = list(dict.fromkeys([config.column, *(c.column for c in conditions)]))
    first = 1
    try:
        file = pq.ParquetFile(path)
        there = file.schema_arrow
        missing = [name for name in wanted if name not in there.names]
        if missing:
            key = "column" if missing[0] == config.column else "where"
            raise UserError(f"{path}: no column {missing[0]!r}; set pairs.prompts.{key} to one of {there.names}")
        kind = there.field(config.column).type
        # Categories are dictionaries of strings.
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)):
            raise UserError(f"{path}: column {config.column!r} holds {kind}, expected strings; set pairs.prompts.column to one that does")
        for batch in file.iter_batches(columns=wanted):
            for number, text in _chosen(batch, config.column, conditions, path, first):
                yield number, _decoded(text or b"", config, f"{path}, line {number}")
            first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({in_one_line(error)}); is it whole?") from None


def _chosen(batch: Any, column: str, conditions: list[Condition], path: Path, first: int) -> Iterator[tuple[int, bytes | None]]:
    """The numbers and undecoded texts of the rows of an Arrow batch that meet the conditions."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # Views cannot be chosen from yet.
    for i, name in enumerate(batch.schema.names):
        if pa.types.is_string_view(batch.column(i).type):
            batch = batch.set_column(i, name, batch.column(i).cast(pa.large_string()))
    batch = batch.append_column("row number of this file", pa.array(range(first, first + len(batch)), pa.int64()))
    for condition in conditions:
        values = batch.column(condition.column)
        floating = pa.types.is_floating(values.type)
        try:
            if pa.types.is_float16(values.type):
                values = values.cast(pa.float32())
            # In the column's own precision: 6.1 stored as float32 is 6.1.
            value = pa.scalar(condition.value, values.type if floating else None)
            if isinstance(condition.value, bool) != pa.types.is_boolean(values.type):
                raise pa.ArrowInvalid("a truth value beside another")
            if isinstance(condition.value, bool):
                values, value = values.cast(pa.int8()), pa.scalar(int(condition.value), pa.int8())
            kept = pc.call_function(_ARROW[condition.operator], [values, value])
        except (pa.ArrowException, TypeError):
            raise condition.refusal(str(path), f"a column of {values.type}") from None
        if floating:  # pandas' way of a missing value
            kept = pc.and_(kept, pc.invert(pc.is_nan(values)))
        batch = batch.filter(kept)
    texts = batch.column(column)
    texts = texts.dictionary_decode() if pa.types.is_dictionary(texts.type) else texts
    # Not every writer has seen to it that a text is UTF-8.
    texts = texts.cast(pa.large_binary()).to_pylist()
    return zip(batch.column("row number of this file").to_pylist(), texts, strict=True)


def _web_dataset(path: Path, config: PromptsConfig, conditions: list[Condition]) -> _Rows:
    """Samples of a shard: members of one name up to the first dot. Nothing is unpacked to disk."""
    as_text = config.column == "txt"
    needed = {"txt"} if as_text else {"json"}
    needed |= {"json"} if conditions else set()
    number, key = 0, None
    sample: dict[str, bytes | None] = {}

    def finished() -> _Rows:
        where = f"{path}, sample {key!r}"
        row: Any = {}
        if "json" in needed:
            try:
                row = json.loads(sample["json"] or "")
                value = row.get("") if as_text else row[config.column]
            except (ValueError, KeyError, TypeError, AttributeError):
                hint = "mend pairs.prompts.where" if as_text else "set pairs.prompts.column (`txt` reads the caption of KEY.txt)"
                _broken(config, f"{where}: expected a .json with {config.column!r}; {hint}")
                yield number, None
                return
        if not _meets(row, conditions, where):
            return
        if as_text:
            if "txt" not in sample:
                _broken(config, f"{where}: no .txt; set pairs.prompts.column to the key of its .json that holds the caption")
            value = _decoded(sample["txt"] or b"", config, f"{where}, its .txt") if "txt" in sample else None
        yield number, _as_text(value, config, where)

    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                # A name that begins with a dot is no sample, but what some systems keep beside one.
                if not member.isfile() or not stem:
                    continue
                if f"{folder}/{stem}" != key:
                    if key is not None:
                        yield from finished()
                    number, key, sample = number + 1, f"{folder}/{stem}", {}
                suffix = suffix.lower()
                if suffix in needed:
                    sample[suffix] = None
                    if member.size > _MAX_MEMBER:
                        _broken(config, f"{path}: {member.name!r} has {member.size:,} bytes, expected at most {_MAX_MEMBER:,}")
                        continue
                    held = archive.extractfile(member)
                    sample[suffix] = held.read() if held else b""
            # An archive ends in zeros. `tarfile` takes one that was cut between two members, or within a header, for whole.
            archive.fileobj.seek(archive.offset)  # type: ignore[union-attr]
            end = archive.fileobj.read(tarfile.BLOCKSIZE)  # type: ignore[union-attr]
            if len(end) < tarfile.BLOCKSIZE or any(end):
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a whole .tar ({in_one_line(error)}); fetch the shard again") from None
    if key is not None:
        yield from finished()


_READERS: dict[str, Callable[[Path, PromptsConfig, list[Condition]], _Rows]] = {
    ".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet, ".tar": _web_dataset
}  # fmt: skip
