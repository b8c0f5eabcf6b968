"""Prompt lists: text, JSONL, Parquet and WebDataset files or folders of them, filtered and de-duplicated; or the embedded captions."""

from __future__ import annotations

import hashlib
import json
import operator
import re
import sys
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import field_validator

from diffusion2gan.config import Section
from diffusion2gan.errors import UserError

MAX_CHARACTERS = 2000
# Of one caption or JSON member of a WebDataset shard, in bytes.
_MAX_MEMBER = 1 << 20


class PromptsConfig(Section):
    """Where prompts come from."""

    source: str = "embedded"
    """`embedded`; a file or a folder of files of one kind, read in the order of their names: .txt (one a line), .jsonl, .parquet or
    .tar (WebDataset shards); or `empty`: the empty prompt, for teachers that read none."""
    column: str = "prompt"
    """Column of a .jsonl or .parquet file, key of a WebDataset sample's .json; `txt` for its .txt."""
    where: tuple[str, ...] = ()
    """Rows to take: conditions on other columns that must all hold, as in `AESTHETIC_SCORE >= 6.25`. A row without a value fails."""
    unique: bool = False
    """Takes a prompt once; letter case and spaces make no difference, and the first spelling stays."""
    drop_unusable: bool = False
    """Passes over empty, endless and broken captions, which an index of the web has, instead of refusing the list."""

    @field_validator("where")
    @classmethod
    def _conditions(cls, where: tuple[str, ...]) -> tuple[str, ...]:
        for text in where:
            Condition.parse(text)
        return where


@dataclass(frozen=True)
class Condition:
    """`column OPERATOR value`, on one row."""

    column: str
    operator: str
    value: float | str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises ValueError for what is no condition."""
        match = re.fullmatch(r"\s*([^\s<>=!]+)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*", text)
        if match is None:
            raise ValueError(f"where: {text!r}, expected `column OPERATOR value` with one of >= <= == != > <")
        column, sign, value = match.groups()
        try:
            return cls(column, sign, float(value))
        except ValueError:
            return cls(column, sign, value[1:-1] if value[:1] == value[-1:] and value[:1] in "'\"" and len(value) > 1 else value)

    def holds(self, value: Any) -> bool:
        """Raises TypeError for a value that cannot be compared with this one."""
        if value is None:
            return False
        if isinstance(value, str) != isinstance(self.value, str):
            raise TypeError
        return bool(_PYTHON[self.operator](value, self.value))

    def refusal(self, where: str, kind: str) -> UserError:
        return UserError(f"{where}: {self.column!r} is {kind}, not to be compared with {self.value!r}; mend pairs.prompts.where")


_PYTHON: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt
}  # fmt: skip
_ARROW = {">=": "greater_equal", "<=": "less_equal", "==": "equal", "!=": "not_equal", ">": "greater", "<": "less"}


def read_prompts(config: PromptsConfig, count: int, seed: int) -> list[str]:
    """`count` prompts; a shorter list is read round and round. Raises UserError naming the file and the line at fault."""
    if config.source == "embedded":
        from diffusion2gan.evaluation.emoji10k import store_prompts

        return store_prompts(count, seed)
    if config.source == "empty":
        return [""] * count
    prompts = _prompts_of(config)
    return [prompts[i % len(prompts)] for i in range(count)]


def prompts_digest(prompts: Sequence[str]) -> str:
    """sha256 of a list's lines, for manifests and results."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.encode() + b"\n")
    return digest.hexdigest()


def _files(config: PromptsConfig) -> list[Path]:
    """The file, or the folder's files in the order of their names."""
    path = Path(config.source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _READERS)
        kinds = sorted({p.suffix for p in files})
        if len(kinds) != 1:
            found = f"files of several kinds ({', '.join(kinds)})" if kinds else "no file of prompts"
            raise UserError(f"pairs.prompts.source: {path} has {found}, expected files of one kind: {', '.join(_READERS)}")
        return files
    if not path.is_file():
        raise UserError(f"pairs.prompts.source: {path} does not exist; name a file or folder of prompts, `embedded` or `empty`")
    if path.suffix not in _READERS:
        raise UserError(f"pairs.prompts.source: {path} ends in {path.suffix!r}, expected {', '.join(_READERS)}")
    return [path]


def _prompts_of(config: PromptsConfig) -> list[str]:
    conditions = [Condition.parse(text) for text in config.where]
    prompts: list[str] = []
    seen: set[str] = set()
    rows = unusable = repeated = 0
    for path in _files(config):
        if conditions and path.suffix == ".txt":
            raise UserError(f"pairs.prompts.where: {path} has no columns, expected a .jsonl, .parquet or .tar; drop the conditions")
        for number, text in _READERS[path.suffix](path, config.column, conditions):
            rows += 1
            prompt = text.strip()
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
    if not prompts:
        left = (
            f"none of its rows is left ({rows:,} met the conditions, {unusable:,} of them unusable)"
            if conditions or rows
            else "no prompts in it"
        )
        raise UserError(f"{config.source}: {left}; write one a line, or loosen pairs.prompts")
    if unusable or repeated:
        dropped = f"{unusable:,} unusable, {repeated:,} there before"
        print(f"{config.source}: {len(prompts):,} prompts of {rows:,} rows ({dropped})", file=sys.stderr)
    return prompts


def _what_is_wrong(prompt: str) -> str:
    if not prompt:
        return "empty prompt; delete the line (`pairs.prompts.source: empty` is for teachers that read none)"
    if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):
        return "half of a surrogate pair in the prompt; mend the text"
    if len(prompt) > MAX_CHARACTERS:
        return f"a prompt of {len(prompt):,} characters, expected at most {MAX_CHARACTERS:,}; shorten it (the text encoder reads far fewer)"
    return ""


# --- One file: (line or row, text) of what meets the conditions ---------------------------------------------------------

_Rows = Iterator[tuple[int, str]]


def _text(path: Path, _column: str, _conditions: list[Condition]) -> _Rows:
    yield from enumerate(_lines(path), 1)


def _lines(path: Path) -> list[str]:
    """Lines between newlines alone: `splitlines` would also split at U+2028 and other marks that stand inside real prompts."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n") if text else []


def _jsonl(path: Path, column: str, conditions: list[Condition]) -> _Rows:
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            value = row[column]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{where}: expected a JSON object with {column!r}; mend the line or set pairs.prompts.column") from None
        if _meets(row, conditions, where):
            yield number, _as_text(value, column, where)


def _meets(row: dict[str, Any], conditions: list[Condition], where: str) -> bool:
    for condition in conditions:
        value = row.get(condition.column)
        try:
            if not condition.holds(value):
                return False
        except TypeError:
            raise condition.refusal(where, f"a {type(value).__name__}") from None
    return True


def _as_text(value: object, column: str, where: str) -> str:
    """A missing caption is an empty one."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is a {type(value).__name__}, expected a string")
    return value or ""


def _parquet(path: Path, column: str, conditions: list[Condition]) -> _Rows:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = list(dict.fromkeys([column, *(c.column for c in conditions)]))
    try:
        there = pq.read_schema(path).names
        missing = [name for name in wanted if name not in there]
        if missing:
            key = "column" if missing[0] == column else "where"
            raise UserError(f"{path}: no column {missing[0]!r}; set pairs.prompts.{key} to one of {there}")
        table = pq.read_table(path, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())[:120]}); is it whole?") from None
    kind = table.column(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}, expected strings; set pairs.prompts.column to one that does")
    numbers = pa.array(range(1, len(table) + 1), pa.int64())
    for condition in conditions:
        values = table.column(condition.column)
        try:
            kept = pc.call_function(_ARROW[condition.operator], [values, pa.scalar(condition.value)])
        except pa.ArrowException:
            raise condition.refusal(str(path), f"a column of {values.type}") from None
        table, numbers = table.filter(kept), numbers.filter(kept.combine_chunks())
    yield from zip(numbers.to_pylist(), (text or "" for text in table.column(column).to_pylist()), strict=True)


def _web_dataset(path: Path, column: str, conditions: list[Condition]) -> _Rows:
    """Samples of a shard: members of one name up to the first dot. Nothing is unpacked to disk."""
    as_text = column == "txt"
    number, key = 0, None
    sample: dict[str, bytes] = {}

    def finished() -> _Rows:
        where = f"{path}, sample {key!r}"
        row: Any = {}
        if not as_text or conditions:
            try:
                row = json.loads(sample["json"])
                value = row.get("") if as_text else row[column]
            except (ValueError, KeyError, TypeError, AttributeError):
                hint = "mend pairs.prompts.where" if as_text else "set pairs.prompts.column (`txt` reads the caption of KEY.txt)"
                raise UserError(f"{where}: expected a .json with {column!r}; {hint}") from None
        if not _meets(row, conditions, where):
            return
        if as_text:
            try:
                value = sample["txt"].decode()
            except KeyError:
                raise UserError(f"{where}: no .txt; set pairs.prompts.column to the key of its .json that holds the caption") from None
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: its .txt is not UTF-8 text (byte {error.start})") from None
        yield number, _as_text(value, column, where)

    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isfile():
                    continue
                if f"{folder}/{stem}" != key:
                    if key is not None:
                        yield from finished()
                    number, key, sample = number + 1, f"{folder}/{stem}", {}
                if suffix in ("txt", "json"):
                    if member.size > _MAX_MEMBER:
                        raise UserError(f"{path}: {member.name!r} has {member.size:,} bytes, expected at most {_MAX_MEMBER:,}")
                    held = archive.extractfile(member)
                    sample[suffix] = held.read() if held else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a whole .tar ({' '.join(str(error).split())[:120]}); fetch the shard again") from None
    if key is not None:
        yield from finished()


_READERS: dict[str, Callable[[Path, str, list[Condition]], _Rows]] = {
    ".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet, ".tar": _web_dataset
}  # fmt: skip
