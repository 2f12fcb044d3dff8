"""Cleaning whole files: formats, counts that add up, workers, a kill, other thresholds, validation."""

import ast
import gzip
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data import clean
from data.cleaning import duplicates, passes
from minillm.base.errors import UserError
from minillm.datasets.files.row_files import RowFiles
from minillm.datasets.files.text_files import find_files

ROOT = Path(__file__).parents[3]
WORDS = "老周坐在码头石阶上慢慢地补旧网太阳出来时候雾便散了河水变成金黄色远处传第一声汽笛船还没有港风吹过田野麦子熟孩们"
ADVERT = "加微信：abc{}3456，日赚五百，兼职名额有限，先到先得，当天日结，绝不拖欠。"


def story(number: int) -> str:
    """A text that is no near duplicate of another."""
    return "老周说：" + "".join(random.Random(number).choices(WORDS, k=60)) + "。"


@pytest.fixture
def pile(tmp_path) -> Path:
    folder = tmp_path / "pile"
    (folder / "sub").mkdir(parents=True)
    rows = [{"text": story(i), "url": f"u{i}", "text_id": i} for i in range(40)]
    rows += [{"text": ADVERT.format(i), "url": "ad"} for i in range(5)]
    rows += [rows[3], {"title": "no text"}, {"text": 7}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows] + ["{broken"]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "array.json").write_text(json.dumps([{"text": "　　" + story(99) + "\u200b"}]), encoding="utf-8")
    (folder / "old.txt").write_bytes((story(100) + "\n\n" + story(101)).encode("gb18030"))
    (folder / "sub" / "note.md.gz").write_bytes(gzip.compress(f"# 题\n\n{story(102)}\n\n---\n".encode()))
    (folder / "table.csv").write_text(f"id,text\n7,{story(103)}\n", encoding="utf-8")
    return folder


def run(pile: Path, out: Path, **options) -> dict:
    return clean.clean(clean.Config(input=(str(pile),), out=str(out), **{"workers": 1, **options}))


def kept(out: Path) -> list[dict]:
    return [
        json.loads(line) for file in sorted(out.glob("kept-*.jsonl")) for line in file.read_text("utf-8").splitlines()
    ]


def dropped(out: Path) -> dict[str, list[dict]]:
    files = sorted((out / "dropped").glob("*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files}


def test_every_document_is_in_exactly_one_place(pile, tmp_path):
    result = run(pile, tmp_path / "out")
    rows, others = kept(tmp_path / "out"), dropped(tmp_path / "out")
    n_read = 49 + 4  # lines of the .jsonl, the other files' documents
    assert result["read"]["documents"] == n_read == len(rows) + sum(map(len, others.values()))
    assert sum(result[name]["documents"] for name in ("kept", "mended", "dropped", "duplicate")) == n_read
    assert {name: len(rows) for name, rows in others.items()} == {
        **{"sales": 5, "exact_duplicate": 1, "no_text": 2, "unreadable": 1}
    }
    assert {name: counts["documents"] for name, counts in result["by_reason"].items() if counts["documents"]} == {
        name: len(rows) for name, rows in others.items()
    }
    assert sum(source["read"] for source in result["by_source"].values()) == n_read
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8")) == json.loads(json.dumps(result))


def test_rows_keep_their_fields_and_say_where_they_are_from(pile, tmp_path):
    run(pile, tmp_path / "out")
    by_text = {row["text"]: row for row in kept(tmp_path / "out")}
    row = by_text[story(5)]
    assert (row["url"], row["text_id"], row["line"]) == ("u5", 5, 6) and row["source"].endswith("rows.jsonl")
    assert by_text[story(103)]["id"] == "7"
    assert by_text["　　" + story(99)]["cleaning"]["mended"] == ["invisible"]
    assert story(100) + "\n\n" + story(101) in by_text  # GB18030, one document
    assert "# 题\n\n" + story(102) in by_text  # the ruler is cut
    copy = dropped(tmp_path / "out")["exact_duplicate"][0]["cleaning"]
    assert (copy["line"], copy["of"].rpartition(":")[2]) == (46, "4")
    advert = dropped(tmp_path / "out")["sales"][0]["cleaning"]
    assert advert["value"] > 3.5 and advert["limit"] == "> 3.5"
    assert by_text[story(3)]["cleaning"]["copies"] == 2


def test_many_small_pieces_and_many_processes_give_the_same(pile, tmp_path, monkeypatch):
    run(pile, tmp_path / "one")
    monkeypatch.setattr(passes, "PIECE_BYTES", 1000)
    run(pile, tmp_path / "small")
    monkeypatch.setattr(passes, "POOL_FROM", 0)
    run(pile, tmp_path / "two", workers=2)
    assert kept(tmp_path / "one") == kept(tmp_path / "small") == kept(tmp_path / "two")
    assert dropped(tmp_path / "one") == dropped(tmp_path / "small") == dropped(tmp_path / "two")


def test_a_killed_run_goes_on_and_makes_no_piece_again(pile, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "PIECE_BYTES", 1000)
    made = []
    mend_piece = passes.mend_piece

    def dying(stem, raws, how):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(stem)
        mend_piece(stem, raws, how)

    monkeypatch.setattr(passes, "mend_piece", dying)
    with pytest.raises(KeyboardInterrupt):
        run(pile, tmp_path / "out")
    made.append(None)
    run(pile, tmp_path / "out")
    run(pile, tmp_path / "straight")
    assert len(set(made)) == len(made)  # none twice in the first folder, and the second's are of another
    assert kept(tmp_path / "out") == kept(tmp_path / "straight")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_disk_that_fills_up_by_signatures_is_an_error_of_one_line(pile, tmp_path, monkeypatch):
    """A file of which only the size was set has no place on the disk: to write it through a map ends the process."""
    working = tmp_path / "out" / ".cleaning"
    working.mkdir(parents=True)
    (working / "signatures.scratch").symlink_to("/dev/full")
    with pytest.raises(UserError, match="out: No space left on device; fix that and run the same command again"):
        run(pile, tmp_path / "out")
    (working / "signatures.scratch").unlink()
    monkeypatch.setattr(np, "memmap", partial(map_to_read, np.memmap))
    assert run(pile, tmp_path / "out")["kept"]["documents"] > 0


def map_to_read(memmap, file, dtype, mode, **how):
    assert mode == "r"
    return memmap(file, dtype, mode, **how)


def test_pieces_depend_on_all_code_that_makes_them():
    """Whatever the files that make pieces import, and these in turn, but for what all programs stand on."""
    names = {"data.cleaning.mending", "data.cleaning.judging"}
    while True:
        files = {ROOT / f"{name.replace('.', '/')}.py" for name in names}
        files = {file for file in files if file.exists()}
        imports = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
        imports = [node for node in imports if isinstance(node, ast.ImportFrom)]
        found = names | {node.module for node in imports}
        found |= {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        found = {name for name in found if name.startswith(("data.", "minillm.")) and ".base" not in name}
        if found <= names:
            break
        names |= found
    assert ROOT / "data" / "decontaminate.py" in files and files <= set(passes.CODE)


def test_a_change_of_code_makes_pieces_again(pile, tmp_path, monkeypatch):
    run(pile, tmp_path / "out")
    before = {path.name for path in (tmp_path / "out" / ".cleaning").glob("*.npz")}
    (tmp_path / "more.py").write_text("1")
    monkeypatch.setattr(passes, "CODE", [*passes.CODE, tmp_path / "more.py"])
    run(pile, tmp_path / "out")
    assert before.isdisjoint(path.name for path in (tmp_path / "out" / ".cleaning").glob("*.npz"))


def test_other_thresholds_read_nothing_again(pile, tmp_path, monkeypatch):
    options = {"near_duplicates": "off"}
    run(pile, tmp_path / "out", **options)
    monkeypatch.setattr(passes, "mend_piece", None)
    monkeypatch.setattr(passes, "judge_piece", None)
    before = kept(tmp_path / "out")
    rules = tmp_path / "rules.toml"
    rules.write_text("[sales]\nabove = 100\n")
    assert (
        run(pile, tmp_path / "out", rules=str(rules), dry_run=True, **options)["by_reason"]["sales"]["documents"] == 0
    )
    assert kept(tmp_path / "out") == before
    run(pile, tmp_path / "out", rules=str(rules), **options)
    assert len(kept(tmp_path / "out")) == len(before) + 5 and "sales" not in dropped(tmp_path / "out")


def test_lines_of_ten_documents_are_cut_and_copies_count_once(tmp_path):
    (tmp_path / "in").mkdir()
    footer = "本文由某某网友投稿，转载须注明出处与作者。"
    rows = [{"text": f"{story(i)}\n{footer}"} for i in range(10)]
    rows += [{"text": f"{story(77)}\n这一行只在同一篇文章的副本里出现，不是页脚。"}] * 12
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run(tmp_path / "in", tmp_path / "out")
    texts = [row["text"] for row in kept(tmp_path / "out")]
    assert texts == [*(story(i) for i in range(10)), rows[-1]["text"]]
    run(tmp_path / "in", tmp_path / "out", recurring=0)
    assert sum(footer in row["text"] for row in kept(tmp_path / "out")) == 10


def test_no_copy_of_a_validation_document_stays_in_training(pile, tmp_path):
    val = tmp_path / "val.jsonl"
    val.write_text(json.dumps({"text": story(5)}) + "\n" + json.dumps({"text": story(500)}))
    result = run(pile, tmp_path / "out", val_input=(str(val),))
    assert result["by_reason"]["copy_of_validation"]["documents"] == 1
    assert story(5) not in {row["text"] for row in kept(tmp_path / "out")}
    assert {row["text"] for row in kept(tmp_path / "out" / "val")} == {story(5), story(500)}


def test_of_a_cleaned_folder_only_what_was_kept_is_read(pile, tmp_path):
    run(pile, tmp_path / "out")
    assert [file.name for file in find_files([tmp_path / "out"])] == ["kept-00000.jsonl"]


def test_a_cleaned_folder_is_known_without_its_working_files(pile, tmp_path):
    out = tmp_path / "out"
    run(pile, out, val_input=(str(pile / "table.csv"),))
    shutil.rmtree(out / ".cleaning")
    assert [file.name for file in find_files([out])] == ["kept-00000.jsonl"]
    assert [file.parent.name for file in find_files([out / "val"])] == ["val"]
    assert find_files([tmp_path], suffixes=(".jsonl",)) == [out / "kept-00000.jsonl", pile / "rows.jsonl"]
    (pile / "report.json").write_text('[{"text": "a report of someone else"}]')
    assert pile / "report.json" in find_files([pile])


@pytest.mark.parametrize("killed_in", ["writing.rows_of_piece", "page"])
@pytest.mark.parametrize("has_working_files", [True, False])
def test_a_folder_that_is_not_whole_is_refused(killed_in, has_working_files, pile, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = {"val_input": (str(pile / "table.csv"),)}
    run(pile, out, **options)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(f"data.clean.{killed_in}", None)
        run(pile, out, **options)
    (out / "val").mkdir(exist_ok=True)
    (out / "kept-00000.jsonl").write_text('{"text": "cut o')
    if not has_working_files:
        shutil.rmtree(out / ".cleaning")
    for path in (out, out / "val", out / "kept-00000.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"{out}: .* not finished this folder; run the same command again"):
            find_files([path])
    with pytest.raises(UserError, match="not finished this folder"):
        RowFiles(out / "kept-00000.jsonl")
    run(pile, out, **options)
    assert find_files([out]) == [out / "kept-00000.jsonl"]


def test_explain_shows_each_feature(pile, tmp_path):
    text = clean.explain(clean.Config(explain=f"{pile / 'rows.jsonl'}:42"))
    assert "✗ sales: drop > 3.5" in text and "✓ digits" in text
    with pytest.raises(UserError, match="no document there"):
        clean.explain(clean.Config(explain=f"{pile / 'rows.jsonl'}:420"))


def test_what_is_missing_is_said(pile, tmp_path):
    with pytest.raises(UserError, match="--input and --out"):
        clean.Config(input=("x",))
    with pytest.raises(UserError, match="lies inside"):
        run(pile, pile / "out")
    with pytest.raises(UserError, match="there are text, url, text_id; choose the key with --field"):
        run(pile / "rows.jsonl", tmp_path / "out", field="body")


def test_the_script_prints_the_table(pile, tmp_path):
    command = [sys.executable, "data/clean.py", "--input", str(pile), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "exact_duplicate" in done.stdout and "read" in done.stdout


@pytest.mark.parametrize(
    ("split", "n_stories", "is_said"), [("file", 4000, True), ("blank", 4000, False), ("file", 9, False)]
)
def test_a_long_text_that_is_one_document_is_pointed_out(tmp_path, monkeypatch, capsys, split, n_stories, is_said):
    (tmp_path / "a.txt").write_text("\n\n".join(map(story, range(n_stories))), encoding="utf-8")
    arguments = ["--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--split", split, "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["clean.py", *arguments])
    clean.main()
    assert ("--split blank ends one at each empty line" in capsys.readouterr().out) == is_said


def test_near_duplicates_say_what_is_kept_and_may_be_repeated(tmp_path):
    text = story(1) + story(2)
    rows = [{"text": text}, {"text": text.replace("。", "！", 1)}, {"text": text + "完了。"}, {"text": story(3)}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run(tmp_path / "a.jsonl", tmp_path / "out")
    assert [row["text"] for row in kept(tmp_path / "out")] == [text, story(3)]
    copies = dropped(tmp_path / "out")["near_duplicate"]
    assert [row["cleaning"]["of"].rpartition(":")[2] for row in copies] == ["1", "1"]
    assert all(row["cleaning"]["similarity"] >= 0.8 for row in copies)
    run(tmp_path / "a.jsonl", tmp_path / "out", near_duplicates="repeat")
    assert [row["text"] for row in kept(tmp_path / "out")] == [text] * 3 + [story(3)]


def test_flags_are_counted_of_what_is_kept(pile, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text('[sales]\ndo = "flag"\n[letters]\nabove = 0.1\ndo = "flag"\n')
    rows = [{"instruction": f"问{i}", "output": f"电话1390000000{i}。"} for i in (1, 2, 2, 2)]
    (tmp_path / "sft.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    benchmark = tmp_path / "test.jsonl"
    benchmark.write_text(json.dumps({"question": story(7)}))
    of_texts = run(pile, tmp_path / "texts", rules=str(rules), check_against=(str(benchmark),))
    of_rows = run(tmp_path / "sft.jsonl", tmp_path / "rows", sft=True)
    for result, out in ((of_texts, "texts"), (of_rows, "rows")):
        found = Counter(flag for row in kept(tmp_path / out) for flag in row["cleaning"].get("flags", []))
        assert {name: n for name, n in result["flagged"].items() if n} == found
    assert of_texts["flagged"]["sales"] and of_rows["flagged"] == {"personal_data": 2}


def test_a_copy_of_a_copy_says_what_is_kept_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "MUCH_LONGER", 1.02)
    text = "".join(map(story, range(10, 16)))
    longer = text + story(4)[:20]
    rows = [{"text": text}, {"text": text}, {"text": longer}, {"text": text + "！"}, {"text": story(5)}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run(tmp_path / "a.jsonl", tmp_path / "out")
    assert [row["text"] for row in kept(tmp_path / "out")] == [longer, story(5)]
    copies = [row["cleaning"] for found in dropped(tmp_path / "out").values() for row in found]
    assert [copy["of"].rpartition(":")[2] for copy in copies] == ["3"] * 3
    assert len({copy["similarity"] for copy in copies if copy["line"] < 3}) == 1

    (tmp_path / "val.jsonl").write_text(json.dumps(rows[2]))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(rows[i]) for i in (0, 1, 3, 4)))
    result = run(tmp_path / "a.jsonl", tmp_path / "out", val_input=(str(tmp_path / "val.jsonl"),))
    assert {name for name, counts in result["by_reason"].items() if counts["documents"]} == {"copy_of_validation"}
    assert result["by_reason"]["copy_of_validation"]["documents"] == 3
    assert all("val.jsonl" in row["cleaning"]["of"] for row in dropped(tmp_path / "out")["copy_of_validation"])


def test_validation_texts_are_not_repeated(tmp_path):
    text = story(1) + story(2)
    rows = [{"text": text}, {"text": text.replace("。", "！", 1)}, {"text": text}, {"text": story(3)}]
    for name, of_file in (("val", rows), ("train", [*rows, *[{"text": story(4)}] * 3])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in of_file))
    options = {"val_input": (str(tmp_path / "val.jsonl"),), "near_duplicates": "repeat"}
    run(tmp_path / "train.jsonl", tmp_path / "out", **options)
    assert [row["text"] for row in kept(tmp_path / "out" / "val")] == [text, story(3)]
    assert [row["text"] for row in kept(tmp_path / "out")] == [story(4)] * 3


def test_articles_below_one_long_menu_are_no_copies(tmp_path):
    menu = "\n".join(f"{name}{kind}" for name in WORDS for kind in ("入门", "进阶", "实战"))
    rows = [{"text": f"{menu}\n{story(i)}"} for i in range(5)]
    rows += [{"text": f"{menu}\n{story(9)}{story(8)}{end}"} for end in ("完", "终", "了")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run(tmp_path / "a.jsonl", tmp_path / "out")
    assert [row["text"] for row in kept(tmp_path / "out")] == [row["text"] for row in rows[:6]]
    assert {row["text"] for row in dropped(tmp_path / "out")["near_duplicate"]} == {row["text"] for row in rows[6:]}


def test_texts_that_hold_a_benchmark_question_are_dropped(tmp_path):
    question = "珍妮的鸭子每天下十六个蛋，她早餐吃三个，还剩多少个可以卖？"
    rows = [{"text": story(1) + question + story(2)}, {"text": story(3)}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": question, "answer": "13"}))
    run(tmp_path / "a.jsonl", tmp_path / "out", check_against=(str(tmp_path / "test.jsonl"),))
    assert [row["text"] for row in kept(tmp_path / "out")] == [story(3)]
    assert "鸭子" in dropped(tmp_path / "out")["contaminated"][0]["cleaning"]["value"]


def test_the_page_shows_what_was_dropped_and_cannot_be_taken_over(pile, tmp_path):
    (pile / "evil.jsonl").write_text(json.dumps({"text": "<script>alert(1)</script>" * 9}))
    run(pile, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "http" not in page.partition("</style>")[0]
    assert page.count("<svg") > 10 and "<mark>" in page and "kept in its place" in page


HALF = "\ud800"  # half a character, which JSON may escape and UTF-8 cannot hold


@pytest.mark.parametrize("is_sft", [False, True])
def test_half_a_character_anywhere_in_a_row_is_mended_and_ends_no_run(is_sft, tmp_path):
    texts = ("instruction", "input", "output") if is_sft else ("text", "title", "also")
    rows = [{name: story(10 * i + j) for j, name in enumerate(texts)} for i in range(4)]
    rows[0][texts[0]] += HALF
    rows[1][texts[2]] = f"<p>{story(50)}{HALF}</p>"
    rows[2]["meta"] = [{"in" + HALF: ["deep" + HALF, 1, None]}]
    rows += [{"no" + HALF: HALF}, {HALF: {"role": HALF}, texts[0]: HALF}]
    deep = '{"meta":' + "[" * 600 + "]" * 600 + "}"
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, rows), deep]))
    (tmp_path / "b.json").write_text(json.dumps([{**row, "of": "an array"} for row in rows]))
    table = f"text,title\n{story(60)},b\n"
    (tmp_path / "c.csv").write_bytes(table.encode() + b"x,a\xffb\n")
    (tmp_path / "d.txt").write_bytes(story(61).encode() + b"\xed\xa0\x80")  # as if UTF-8 could hold it
    result = run(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", sft=is_sft)
    assert result["mended_by"]["surrogates"] >= 3 and result["kept"]["documents"] and result["mended"]["documents"]
    written = sorted((tmp_path.parent / f"{tmp_path.name}-out").glob("**/*.jsonl"))
    assert written and all("\\ud8" not in json.dumps(file.read_text("utf-8")).lower() for file in written)


def test_a_text_that_may_be_many_is_named(tmp_path, monkeypatch, capsys):
    """data/prepare.py ends a document at each empty line, data/clean.py at the end of a .txt unless it is told."""
    for name, n_parts in (("many.txt", 300), ("one.txt", 20)):
        (tmp_path / name).write_text("\n\n".join(f"Part {i} of it." for i in range(n_parts)))
    given = dict(input=(str(tmp_path),), out=str(tmp_path / "out"))
    assert clean.texts_of_many(clean.Config(**given)) == [tmp_path / "many.txt"]
    assert clean.texts_of_many(clean.Config(**given, split="blank")) == []

    out = str(tmp_path.parent / f"{tmp_path.name}-out")
    monkeypatch.setattr("sys.argv", ["clean.py", "--input", str(tmp_path), "--out", out, "--dry_run"])
    for more in ("", " and 1 more .txt", " and 2 more .txt"):
        clean.main()
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "--split blank" in line)
        assert line.startswith(f"{tmp_path / 'many.txt'}{more}: read as one document each; ")
        shutil.copy(tmp_path / "many.txt", tmp_path / f"more{more}.txt")
