"""Pages, archives and packed files; those that need a package say so without it."""

import gzip
import io
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from data import clean
from data.cleaning import reading, report
from data.cleaning.reading import document_of, raw_documents
from minillm.base.errors import UserError
from minillm.datasets.files.text_files import find_files

ZH = "清晨的河面上浮着一层薄雾，渔船还没有出港。老周坐在码头的石阶上，慢慢地补一张旧网，手指粗糙却很灵活。"
MORE = "".join(
    f"<p>第{n}天，太阳出来的时候，雾便散了，河水变成了金黄色，远处传来第{n}声汽笛，渔船一条条出港。</p>"
    for n in "一二三四五六"
)
PAGE = f"""<!doctype html><html><head><meta charset="gbk"><title>渔船</title><script>var a = 1;</script></head><body>
<nav><ul><li><a href="/">首页</a></li><li><a href="/about">关于我们</a></li></ul></nav>
<article><h1>渔船</h1><p>{ZH}</p>{MORE}<table><tr><td>船</td><td>港</td></tr></table></article>
<footer>版权所有</footer></body></html>"""


def texts(path, boundary: str = "file") -> list[str]:
    return [document_of(raw, "text")[0] for raw in raw_documents(path, boundary)]


def test_the_main_text_of_a_page_is_taken_out_whatever_its_encoding(tmp_path):
    pytest.importorskip("trafilatura")
    for encoding in ("utf-8", "gb18030"):
        file = tmp_path / f"{encoding}.html"
        file.write_bytes(PAGE.encode(encoding))
        (text,) = texts(file)
        assert ZH in text and "船" in text and "关于我们" not in text and "var a" not in text and "版权" not in text


RARE = "彧淼犇煊翀赟韡骉"  # none in daily use, by which an encoding is recognized


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ('<meta charset="gb2312">', "gbk"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=GBK">', "gbk"),
        ("<?xml version='1.0' encoding='GB18030'?>", "gb18030"),
        ("<META CHARSET=big5>", "big5"),
        ('<meta charset="euc-kr">', "euc_kr"),
        ('<meta charset="utf-8">', "utf-8"),
        ('<meta charset="gb2312">', "utf-8"),  # recoded without a change of what it says
        ('<meta charset="iso-8859-1">', "gb18030"),  # a server's default, under which Chinese is recognized
        ('<meta charset="windows-1251">', "cp1251"),
        ('<meta charset="no-such-thing">', "gb18030"),
    ],
)
def test_a_page_is_read_in_the_encoding_that_it_names(head, encoding):
    of_others = {"big5": "臺北的冬天", "euc_kr": "안녕하세요 여러분", "cp1251": "В начале июля, под вечер"}
    text = head + of_others.get(encoding, ZH if "no-such" in head or "8859" in head else RARE)
    page = text.encode(encoding)
    assert reading.decoded(page, reading.encoding_named(page)) == text


def test_a_few_wrong_bytes_in_a_page_that_names_its_encoding_are_replaced():
    page = b'<meta charset="gb2312">' + (RARE * 400).encode("gbk") + b"\xff" + RARE.encode("gbk")
    text = reading.decoded(page, reading.encoding_named(page))
    assert text.count("\ufffd") == 1 and text.endswith(RARE)
    noise = b'<meta charset="gb2312">' + bytes(random.Random(2).choices(range(128, 256), k=400))
    with pytest.raises(reading.Unreadable):
        reading.decoded(noise, reading.encoding_named(noise))


@pytest.mark.parametrize("ending", reading.PAGES)
def test_pages_are_read_by_all_the_names_that_servers_give_them(tmp_path, ending):
    pytest.importorskip("trafilatura")
    (tmp_path / f"a{ending}").write_text(PAGE, encoding="utf-8")
    (file,) = find_files([tmp_path], suffixes=reading.SUFFIXES)
    assert ZH in texts(file)[0]


def test_zst_is_unpacked_frame_by_frame(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    file = tmp_path / "rows.jsonl.zst"
    lines = [json.dumps({"text": f"{ZH}{i}"}).encode() + b"\n" for i in range(3)]
    file.write_bytes(zstandard.compress(lines[0]) + zstandard.compress(lines[1] + lines[2]))
    assert texts(file) == [f"{ZH}{i}" for i in range(3)]


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_packed_file_that_is_cut_off_gives_what_stands_before_and_says_so(tmp_path, packing):
    pack = gzip.compress if packing == "gz" else pytest.importorskip("zstandard").compress
    rows = [json.dumps({"text": f"{ZH}{i}"}).encode() + b"\n" for i in range(9)]
    first, second = pack(b"".join(rows[:4])), pack(b"".join(rows[4:]))
    file = tmp_path / f"rows.jsonl.{packing}"
    for n_bytes, n_rows in ((20, 0), (len(first) - 1, 0), (len(first) + 1, 4), (len(first + second) - 1, 4)):
        file.write_bytes((first + second)[:n_bytes])
        *raws, last = raw_documents(file, "file")
        assert [raw.value for raw in raws[:n_rows]] == rows[:n_rows]  # of the part that is cut some may be known too
        assert last.kind == "fault" and "ends in the middle; nothing after it is read" in last.value[1]
    for whole in (first, first + second, first + b"\0" * 5000, pack(b"")):
        file.write_bytes(whole)
        assert all(raw.kind == "line" for raw in raw_documents(file, "file"))


def test_zst_may_begin_with_a_part_to_be_skipped(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    to_skip = b"\x50\x2a\x4d\x18\x04\0\0\0size"  # as pzstd writes before each part
    file = tmp_path / "rows.jsonl.zst"
    parts = [zstandard.compress(json.dumps({"text": text}).encode() + b"\n") for text in (ZH, "b")]
    file.write_bytes(b"".join(to_skip + part for part in parts))
    assert texts(file) == [ZH, "b"]


def test_pages_of_an_archive_bring_their_address(tmp_path):
    pytest.importorskip("trafilatura")
    warcwriter = pytest.importorskip("warcio.warcwriter")
    from warcio.statusandheaders import StatusAndHeaders

    with (tmp_path / "crawl.warc.gz").open("wb") as file:
        writer = warcwriter.WARCWriter(file, gzip=True)
        for kind, body in (("text/html; charset=utf-8", PAGE.encode()), ("image/png", b"\x89PNG")):
            headers = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.1")
            address = "https://example.com/" + kind[:4]
            writer.write_record(writer.create_warc_record(address, "response", io.BytesIO(body), http_headers=headers))
    ((text, row),) = [document_of(raw, "text") for raw in raw_documents(tmp_path / "crawl.warc.gz", "file")]
    assert ZH in text and row == {"url": "https://example.com/text"}


@pytest.mark.parametrize(
    ("name", "package"), [("a.html", "trafilatura"), ("a.jsonl.zst", "zstandard"), ("a.warc", "warcio")]
)
def test_what_needs_a_package_names_the_extra(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd" if name.endswith("zst") else b"<p>a</p>")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.archiveiterator", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[clean\]"'):
        clean.clean(clean.Config(input=(str(tmp_path / name),), out=str(tmp_path / "out"), workers=1))


def test_txt_ends_where_it_is_told(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("a\nb\n\nc", encoding="utf-16")
    assert texts(file) == ["a\nb\n\nc"]
    assert texts(file, "blank") == ["a\nb", "c"] and texts(file, "lines") == ["a", "b", "c"]


def test_rows_of_a_table_in_gb18030(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_bytes(f"id\ttext\n1\t{ZH}\n".encode("gb18030"))
    ((text, row),) = [document_of(raw, "text") for raw in raw_documents(file, "file")]
    assert (text, row) == (ZH, {"id": "1"})


def test_a_broken_file_is_read_up_to_where_it_breaks(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = "".join(json.dumps({"text": f"{ZH}这是第{i}篇。"}) + "\n" for i in range(2000))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode())[:-500])
    (folder / "b.txt").write_bytes(b"PK\x03\x04 and so on")
    (folder / "c.csv").write_text(f'id,text\n1,{ZH}\n2,"{ZH}\n', encoding="utf-8")
    (folder / "d.json").write_text(json.dumps([{"text": MORE}, 5])[:-2], encoding="utf-8")
    (folder / "e.parquet").write_bytes(b"")
    (folder / "f.warc").write_text("no archive")
    (folder / "g.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd and so on")
    for package in ("warcio", "zstandard", "pyarrow"):
        pytest.importorskip(package)
    result = clean.clean(
        clean.Config(input=(str(folder),), out=str(tmp_path / "out"), workers=1, near_duplicates="off", recurring=0)
    )
    lines = (tmp_path / "out" / "dropped" / "broken_file.jsonl").read_text("utf-8").splitlines()
    about = {Path(row["source"]).name: row["what"] for row in (json.loads(line)["cleaning"] for line in lines)}
    assert result["by_reason"]["broken_file"]["documents"] == len(about)
    assert list(about) == ["a.jsonl.gz", "b.txt", "c.csv", "d.json", "e.parquet", "f.warc", "g.jsonl.zst"]
    assert "zip" in about["b.txt"] and "after line 2 comes no row of a .csv" in about["c.csv"]
    assert all(what.endswith("; nothing after it is read") for what in about.values())
    by_source = {Path(name).name: counts for name, counts in result["by_source"].items()}
    assert by_source["c.csv"]["read"] == by_source["d.json"]["read"] == 2
    assert by_source["a.jsonl.gz"]["read"] > 2
    assert sum(counts["read"] for counts in by_source.values()) == result["read"]["documents"]
    assert f"broken files: {len(about)}, read up to" in report.table(result)


@pytest.mark.parametrize(("n_other", "is_told"), [(1, False), (3, True)])
def test_rows_of_another_key_are_told_of_where_they_are_many(tmp_path, n_other, is_told):
    """A folder of several sources may have the text under several keys, of which --field names one."""
    rows = [{"text": f"Row {n} has a text."} for n in range(17)] + [{"content": "Other."}] * n_other
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = clean.clean(clean.Config(input=(str(tmp_path / "a.jsonl"),), out=str(tmp_path / "out"), workers=1))
    assert (f"no text in {n_other}: dropped/no_text.jsonl" in report.table(result)) == is_told
    assert "key 'text' is missing; there are content" in (tmp_path / "out" / "dropped" / "no_text.jsonl").read_text()


def test_what_the_system_cannot_read_stops(tmp_path):
    file = tmp_path / "a.txt"
    file.mkdir()
    with pytest.raises(UserError, match=r"a\.txt: cannot be read"):
        list(raw_documents(file, "file"))


def test_a_document_that_is_too_large_is_dropped_for_that(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST", 100)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": ZH * 9}) + "\n" + json.dumps({"text": "one"}))
    first, second = raw_documents(file, "file")
    with pytest.raises(reading.Unreadable, match="too_large"):
        document_of(first, "text")
    assert document_of(second, "text") == ("one", {})


def test_links_to_files_of_the_same_folder_are_left_out(tmp_path):
    (tmp_path / "b.txt").write_text(ZH)
    (tmp_path / "a.txt").symlink_to("b.txt")
    left_out = Counter()
    assert find_files([tmp_path], left_out) == [tmp_path / "b.txt"]
    assert left_out == {"files linked again": 1}


def test_a_name_that_is_no_text_can_be_reported(tmp_path):
    file = tmp_path / os.fsdecode(b"bad\xff.txt")
    file.write_text(ZH)
    result = clean.clean(clean.Config(input=(str(file),), out=str(tmp_path / "out"), workers=1))
    assert result["options"]["input"][0].endswith("bad\\xff.txt") and result["kept"]["documents"] == 1
