"""Prompt lists: a text file, a column of a Parquet or JSONL file, or the embedded captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from diffusion2gan.config import Section
from diffusion2gan.errors import UserError

MAX_CHARACTERS = 2000


class PromptsConfig(Section):
    """Where prompts come from."""

    source: str = "embedded"
    """`embedded`, a file (.txt, one a line; .jsonl; .parquet), or `empty`: the empty prompt, for teachers that read none."""
    column: str = "prompt"
    """Column of a .jsonl or .parquet file."""


def read_prompts(config: PromptsConfig, count: int, seed: int) -> list[str]:
    """`count` prompts; a shorter file is read round and round. Raises UserError naming the file and the line at fault."""
    if config.source == "embedded":
        from diffusion2gan.evaluation.emoji10k import store_prompts

        return store_prompts(count, seed)
    if config.source == "empty":
        return [""] * count
    path = Path(config.source)
    if not path.is_file():
        raise UserError(f"pairs.prompts.source: {path} is not a file; name a .txt, .jsonl or .parquet file, `embedded` or `empty`")
    lines = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix)
    if lines is None:
        raise UserError(f"pairs.prompts.source: {path} ends in {path.suffix!r}, expected .txt, .jsonl or .parquet")
    prompts = lines(path, config.column)
    if not prompts:
        raise UserError(f"{path}: no prompts in it; write one a line")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(
                f"{path}, line {number}: empty prompt; delete the line (`pairs.prompts.source: empty` is for teachers that read none)"
            )
        if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError(f"{path}, line {number}: half of a surrogate pair in the prompt; mend the text")
        if len(prompt) > MAX_CHARACTERS:
            raise UserError(
                f"{path}, line {number}: a prompt of {len(prompt):,} characters, expected at most {MAX_CHARACTERS:,}; shorten it (the text encoder reads far fewer)"
            )
    return [prompts[i % len(prompts)] for i in range(count)]


def prompts_digest(prompts: Sequence[str]) -> str:
    """sha256 of a list's lines, for manifests and results."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.encode() + b"\n")
    return digest.hexdigest()


def _text(path: Path, _column: str) -> list[str]:
    return [line.strip() for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Lines between newlines alone: `splitlines` would also split at U+2028 and other marks that stand inside real prompts."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n") if text else []


def _jsonl(path: Path, column: str) -> list[str]:
    prompts = []
    for number, line in enumerate(_lines(path), 1):
        try:
            value = json.loads(line)[column]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number}: expected a JSON object with {column!r}; mend the line or set pairs.prompts.column"
            ) from None
        if not isinstance(value, str):
            raise UserError(f"{path}, line {number}: {column!r} is a {type(value).__name__}, expected a string")
        prompts.append(value.strip())
    return prompts


def _parquet(path: Path, column: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=[column])
    except (pa.ArrowInvalid, KeyError, OSError):
        raise UserError(f"{path}: cannot read column {column!r}; is it a Parquet file that has it? Set pairs.prompts.column") from None
    if table.num_columns != 1:
        raise UserError(f"{path}: no column {column!r}; set pairs.prompts.column to one of {pq.read_schema(path).names}")
    kind = table.column(0).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}, expected strings; set pairs.prompts.column to one that does")
    return [(value or "").strip() for value in table.column(0).to_pylist()]
