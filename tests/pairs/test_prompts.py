from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.pairs.prompts import PromptsConfig, read_prompts, source_is_here
from diffusion2gan.recipe import load_recipe
from diffusion2gan.run import simulate_recipe


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a cat\n\na dog\n", "line 2: empty prompt"),
        ("p.txt", "a cat\n" + "x" * 10_000 + "\n", "line 2: a prompt of 10,000 characters"),
        ("p.txt", "", "no prompts"),
        ("p.txt", b"\xff", "not UTF-8"),
        ("p.txt", "a cat\na dog\n".encode("utf-16"), "begins as UTF-16 text"),
        ("p.txt", "a cat\na dog\n".encode("utf-16-le"), "line 1: a NUL character in the prompt; save the file as UTF-8"),
        ("p.csv", "a", r"ends in '.csv', expected .txt, .jsonl, .parquet, .tar"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: expected a JSON object with 'prompt'"),
        ("p.jsonl", '{"prompt": 3}\n', "is a int, expected a string"),
        ("p.parquet", "no parquet", "cannot be read as Parquet"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_prompts(PromptsConfig(source=str(path)), 4, 0)


def test_prompts_from_parquet_and_jsonl(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"TEXT": ["a", "b"], "url": ["", ""]}), tmp_path / "p.parquet")
    assert read_prompts(PromptsConfig(source=str(tmp_path / "p.parquet"), column="TEXT"), 3, 0) == ["a", "b", "a"]
    with pytest.raises(UserError, match=r"no column 'prompt'; set pairs.prompts.column to one of \['TEXT', 'url'\]"):
        read_prompts(PromptsConfig(source=str(tmp_path / "p.parquet")), 3, 0)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert read_prompts(PromptsConfig(source=str(tmp_path / "p.jsonl")), 2, 0) == ["a", "b"]


def test_strings_as_other_writers_store_them(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["a cat", None, "a dog", "a cat"]
    table = {"score": [1.0, 2.0, 3.0, 0.0]}
    for name, kind in (("view", pa.string_view()), ("large", pa.large_string()), ("category", pa.dictionary(pa.int32(), pa.string()))):
        path = tmp_path / f"{name}.parquet"
        language = pa.array(["en", "en", "en", "de"], kind)
        pq.write_table(pa.table({"prompt": pa.array(texts, kind), "language": language, **table}), path)
        assert pq.ParquetFile(path).schema_arrow.field("prompt").type == kind
        where = ("score > 0.5", 'language == "en"')
        assert read_prompts(PromptsConfig(source=str(path), where=where, drop_unusable=True), 2, 0) == ["a cat", "a dog"]
        assert read_prompts(PromptsConfig(source=str(path), drop_unusable=True), 3, 0) == ["a cat", "a dog", "a cat"]


def test_prompts_are_missed_before_the_teacher_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have to be fetched: no list, no such column, nothing that the conditions leave."""

    def loads(*_arguments: object) -> None:
        raise AssertionError("the teacher is not to be loaded")

    monkeypatch.setattr("diffusion2gan.run.load_teacher", loads)
    (tmp_path / "p.jsonl").write_text('{"text": "a cat", "score": 1.0}\n')
    for source, column, where, told in (
        ("none.parquet", "text", "", "none.parquet does not exist"),
        ("p.jsonl", "caption", "", "line 1: expected a JSON object with 'caption'"),
        ("p.jsonl", "text", "score > 2", "none of its rows is left"),
    ):
        prompts = {"source": str(tmp_path / source), "column": column, "where": [where] if where else []}
        recipe = load_recipe("emoji", [f"pairs.prompts={json.dumps(prompts)}"])
        with pytest.raises(UserError, match=told):
            simulate_recipe(recipe, tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


def test_parquet_of_numbers_is_no_prompt_list(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"prompt": [1, 2, 3]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="holds int64, expected strings"):
        read_prompts(PromptsConfig(source=str(tmp_path / "p.parquet"), column="prompt"), 3, 0)


ROWS: list[dict[str, Any]] = [
    {"TEXT": "a cat", "score": 6.5, "language": "en", "wide": True},
    {"TEXT": "A  Cat ", "score": 6.4, "language": "en", "wide": True},
    {"TEXT": "", "score": 7.0, "language": "en", "wide": True},
    {"TEXT": "ein Hund", "score": 6.9, "language": "de", "wide": True},
    {"TEXT": "a dog", "score": 6.0, "language": "en", "wide": True},
    {"TEXT": "a fish", "score": None, "language": "en", "wide": True},
    {"TEXT": None, "score": 6.3, "language": "en", "wide": True},
    {"TEXT": "a bird\u2028in two lines", "score": 6.25, "language": "en", "wide": False},
    {"TEXT": "x" * 3000, "score": 9.0, "language": "en", "wide": True},
]


def _tar(path: Path, rows: list[dict[str, Any]], folder: str = "") -> None:
    """A WebDataset shard as img2dataset writes it: picture, caption and metadata of each sample beside each other."""
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows):
            members = {"jpg": b"\xff\xd8", "txt": (row["TEXT"] or "").encode(), "json": json.dumps(row).encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{folder}{number:05d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _write(kind: str, path: Path, rows: list[dict[str, Any]]) -> None:
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        _tar(path, rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_an_index_of_the_web(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LAION's way: shards of a folder, a score to choose by, captions that are missing, endless, or there twice."""
    _write(kind, tmp_path / f"00000.{kind}", ROWS[:4])
    _write(kind, tmp_path / f"00001.{kind}", ROWS[4:])
    (tmp_path / "README.md").write_text("of no interest")
    config = {"source": str(tmp_path), "column": "TEXT", "where": ("score >= 6.25", 'language == "en"')}
    with pytest.raises(UserError, match=rf"00000.{kind}, line 3: empty prompt.*or set pairs.prompts.drop_unusable"):
        read_prompts(PromptsConfig.model_validate(config), 3, 0)
    config |= {"drop_unusable": True}
    bird = "a bird\u2028in two lines"
    assert read_prompts(PromptsConfig.model_validate(config), 4, 0) == ["a cat", "A  Cat", bird, "a cat"]
    told = capsys.readouterr().err
    assert "3 prompts of 6 rows (3 unusable, 0 there before)" in told
    assert "3 prompts for 4 pairs: each is used 1.33 times" in told
    # What comes after the last prompt that is needed is not read.
    assert read_prompts(PromptsConfig.model_validate(config), 2, 0) == ["a cat", "A  Cat"]
    assert not capsys.readouterr().err
    safe = config | {"where": ("wide == false",)}
    assert read_prompts(PromptsConfig.model_validate(safe), 1, 0) == [bird]
    pattern = config | {"source": f"{tmp_path}/*1.{kind}"}
    assert read_prompts(PromptsConfig.model_validate(pattern), 1, 0) == [bird]
    assert read_prompts(PromptsConfig.model_validate(config | {"unique": True}), 3, 0) == ["a cat", bird, "a cat"]
    assert "2 prompts of 6 rows (3 unusable, 1 there before)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"none of its rows is left \(0 met the conditions"):
        read_prompts(PromptsConfig.model_validate(config | {"where": ("score > 10",)}), 3, 0)


def test_captions_of_a_web_dataset(tmp_path: Path) -> None:
    rows = [{"TEXT": t, "score": s} for t, s in (("a cat", 1), ("a dog", 2), ("a fish", 3))]
    _tar(tmp_path / "a.tar", rows, "part.0/")
    assert read_prompts(PromptsConfig(source=str(tmp_path / "a.tar"), column="txt"), 3, 0) == ["a cat", "a dog", "a fish"]
    chosen = PromptsConfig(source=str(tmp_path / "a.tar"), column="txt", where=("score != 2",))
    assert read_prompts(chosen, 2, 0) == ["a cat", "a fish"]
    with pytest.raises(UserError, match=r"sample 'part.0/00000': expected a .json with 'caption'; set pairs.prompts.column \(`txt`"):
        read_prompts(PromptsConfig(source=str(tmp_path / "a.tar"), column="caption"), 3, 0)
    whole = (tmp_path / "a.tar").read_bytes()
    # Within a member, within a header, and between two members; a header's damage.
    for number, cut in enumerate((whole[:1600], whole[:1100], whole[:1024], whole[:1024] + b"x" * 512 + whole[1536:])):
        (tmp_path / f"cut{number}.tar").write_bytes(cut)
        with pytest.raises(UserError, match="not a whole .tar"):
            read_prompts(PromptsConfig(source=str(tmp_path / f"cut{number}.tar"), column="txt"), 3, 0)
    with tarfile.open(tmp_path / "big.tar", "w") as archive:
        info = tarfile.TarInfo("0.txt")
        info.size = 2 << 20
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(UserError, match="'0.txt' has 2,097,152 bytes, expected at most 1,048,576"):
        read_prompts(PromptsConfig(source=str(tmp_path / "big.tar"), column="txt"), 3, 0)


def test_broken_captions_are_passed_over_when_asked(tmp_path: Path) -> None:
    members = {
        "0.txt": b"\xff\xfe",
        "1.jpg": b"",
        "2.txt": b"x" * (2 << 20),
        "._3.txt": b"not a sample",
        "3.json": b"x" * (2 << 20),
        "3.TXT": b"a cat",
    }
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "a.jsonl").write_text('{"txt": 3}\nno json\n{"other": "a"}\n{"txt": "a cat"}\n')
    for name in ("a.tar", "a.jsonl"):
        with pytest.raises(UserError):
            read_prompts(PromptsConfig(source=str(tmp_path / name), column="txt"), 2, 0)
        assert read_prompts(PromptsConfig(source=str(tmp_path / name), column="txt", drop_unusable=True), 2, 0) == ["a cat"] * 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_scores_of_half_precision_and_missing_ones(kind: str, tmp_path: Path) -> None:
    """A float32 column's 6.1 is at least 6.1; pandas' nan is no value, also for `!=`."""
    path = tmp_path / f"p.{kind}"
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        scores = pa.array([6.1, float("nan"), 5.0], pa.float32())
        pq.write_table(pa.table({"prompt": ["a", "b", "c"], "score": scores}), path)
    else:
        path.write_text('{"prompt": "a", "score": 6.1}\n{"prompt": "b", "score": NaN}\n{"prompt": "c", "score": 5.0}\n')
    assert read_prompts(PromptsConfig(source=str(path), where=("score >= 6.1",)), 1, 0) == ["a"]
    assert read_prompts(PromptsConfig(source=str(path), where=("score != 6.1",)), 2, 0) == ["c"] * 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_conditions_that_make_no_sense(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{kind}"
    _write(kind, path, ROWS[:1])
    with pytest.raises(UserError, match=r"'language' is a (str|column of string), not to be compared with 3.0; mend pairs.prompts.where"):
        read_prompts(PromptsConfig(source=str(path), column="TEXT", where=("language > 3",)), 1, 0)
    if kind == "parquet":
        with pytest.raises(UserError, match=r"no column 'socre'; set pairs.prompts.where to one of"):
            read_prompts(PromptsConfig(source=str(path), column="TEXT", where=("socre > 3",)), 1, 0)


def test_what_is_wrong_with_a_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs.prompts.where: where: 'score', expected `column OPERATOR value`"):
        load_recipe("emoji", ["pairs.prompts.where=[score]"])
    for text in ("score >= 5 and x < 3", "score === 5", "score >=", "score > nan"):
        with pytest.raises(UserError, match="where"):
            load_recipe("emoji", [f"pairs.prompts.where=['{text}']"])
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(UserError, match=r"p.txt has no columns, expected a .jsonl, .parquet or .tar; drop the conditions"):
        read_prompts(PromptsConfig(source=str(tmp_path), where=("score > 1",)), 1, 0)
    (tmp_path / "p.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"files of several kinds \(.jsonl, .txt\), expected files of one kind.*or a pattern such as .*txt"):
        read_prompts(PromptsConfig(source=str(tmp_path)), 1, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no file of prompts"):
        read_prompts(PromptsConfig(source=str(tmp_path / "empty")), 1, 0)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_text_that_is_not_utf_8_is_refused_or_passed_over(kind: str, tmp_path: Path) -> None:
    path, broken = tmp_path / f"p.{kind}", [b"a cat", b"\xff\xfe", b"a dog"]
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"prompt": pa.array(broken, pa.binary()).view(pa.string())}), path)
    else:
        path.write_bytes(b"".join(b'{"prompt": "%s"}\n' % t if kind == "jsonl" else t + b"\n" for t in broken))
    with pytest.raises(UserError, match=rf"p.{kind}, line 2: not UTF-8 text \(byte .*or set pairs.prompts.drop_unusable"):
        read_prompts(PromptsConfig(source=str(path)), 3, 0)
    assert read_prompts(PromptsConfig(source=str(path), drop_unusable=True), 3, 0) == ["a cat", "a dog", "a cat"]


def test_utf_16_is_never_passed_over_line_by_line(tmp_path: Path) -> None:
    """All but its first line would be UTF-8, with NULs between the letters."""
    path = tmp_path / "p.txt"
    path.write_bytes("a cat\r\na dog\r\na bird\r\n".encode("utf-16"))
    with pytest.raises(UserError, match="begins as UTF-16 text"):
        read_prompts(PromptsConfig(source=str(path), drop_unusable=True), 3, 0)


def test_a_name_with_brackets_and_what_is_here(tmp_path: Path) -> None:
    name = str(tmp_path / "prompts [v2].txt")
    for source in (name, str(tmp_path), str(tmp_path / "*.txt")):
        assert source_is_here(PromptsConfig(source=source)) == (source == str(tmp_path))
    Path(name).write_text("a cat\n")
    for source in (name, str(tmp_path), str(tmp_path / "*.txt"), "embedded", "empty"):
        assert source_is_here(PromptsConfig(source=source))
    assert not source_is_here(PromptsConfig(source=str(tmp_path / "*.parquet")))
    assert read_prompts(PromptsConfig(source=name), 2, 0) == ["a cat", "a cat"]


@pytest.mark.parametrize("setting", ['where=["a > 1"]', "unique=true", "drop_unusable=true"])
def test_of_the_embedded_prompts_nothing_is_chosen(setting: str) -> None:
    with pytest.raises(UserError, match="source is embedded, of which where, unique and drop_unusable choose nothing"):
        load_recipe("emoji", [f"pairs.prompts.{setting}"])


def test_a_list_that_is_too_short_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    assert read_prompts(PromptsConfig(source=str(tmp_path / "p.txt")), 2, 0) == ["a cat", "a dog"]
    assert not capsys.readouterr().err
    assert read_prompts(PromptsConfig(source=str(tmp_path / "p.txt")), 5, 0)[4] == "a cat"
    assert "2 prompts for 5 pairs: each is used 2.5 times" in capsys.readouterr().err


def test_the_first_that_could_not_be_used_says_why(tmp_path: Path) -> None:
    """When all are passed over, it is the column or the encoding that is wrong."""
    (tmp_path / "p.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\nna\xefve\n")
    for name, message in (
        (
            "p.jsonl",
            r"none of its rows is left \(2 met the conditions, 2 of them unusable\); the first: .*line 1: expected a JSON object with 'prompt'",
        ),
        ("p.txt", r"the first: .*line 1: not UTF-8 text \(byte 3\); save it as UTF-8$"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(PromptsConfig(source=str(tmp_path / name), drop_unusable=True), 3, 0)
