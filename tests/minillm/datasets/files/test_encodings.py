"""Texts that are not UTF-8: named by their encoding, and read in the one that is given."""

import encodings
import gzip
import json
import pkgutil
from unittest.mock import ANY

import numpy as np
import pytest

from minillm.base.errors import UserError
from minillm.datasets.files.encodings import check_encoding, guess
from minillm.datasets.files.text_files import texts_of
from minillm.datasets.instructions import InstructionRows
from minillm.datasets.questions import read_questions

SIMPLIFIED = "第1章 山上有一座庙。\n\n第2章 庙里有个老和尚，他在给小和尚讲故事。\n"
TRADITIONAL = "第1章 山上有一座廟。\n\n第2章 廟裡有個老和尚，他在給小和尚講故事。\n"
WESTERN = "Le café est fermé à midi.\n\nIl était déjà là, où ça ? “Ici”, dit-elle.\n"
ENCODED = {  # encoding → text, and the name that is told
    "gbk": (SIMPLIFIED, "gb18030"),
    "gb18030": (SIMPLIFIED + "龘𠀀\n", "gb18030"),
    "big5": (TRADITIONAL, "big5"),
    "utf-16": (SIMPLIFIED, "utf-16"),
    "utf-16-le": (SIMPLIFIED, "utf-16-le"),
    "utf-16-be": (SIMPLIFIED, "utf-16-be"),
    "utf-16-le ": (WESTERN, "utf-16-le"),
    "cp1252": (WESTERN, "cp1252"),
}


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("form", ["txt", "txt.gz", "jsonl", "json"])
def test_an_encoding_is_named_and_read_if_it_is_given(tmp_path, encoding, form):
    text, name = ENCODED[encoding]
    documents = [part.strip("\n") for part in text.split("\n\n")]
    rows = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
    whole = {"jsonl": "\n".join(rows), "json": f"[{','.join(rows)}]"}.get(form, text)
    data = whole.encode(encoding.strip())
    path = tmp_path / f"a.{form}"
    path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    with pytest.raises(UserError, match=rf"a\.{form}: not UTF-8 but, as it seems, .*; read it by --encoding {name}"):
        list(texts_of(path, boundary="blank", field="text"))
    for given in (encoding.strip(), name):
        assert [found for found, _ in texts_of(path, boundary="blank", field="text", encoding=given)] == documents


def test_a_guess_is_made_only_where_it_is_clear():
    assert guess("Привет, как дела? Хорошо.".encode("cp1251")) is None
    assert guess("こんにちは、世界の皆さん。".encode("shift_jis")) is None
    assert guess(b"one \xff byte") is None
    assert guess(np.random.default_rng(0).integers(128, 255, 400, dtype=np.uint8).tobytes()) is None
    for n in range(1, 9):
        assert guess(SIMPLIFIED.encode("gbk")[: 20 + n]) == "gb18030"  # cut inside a character or not


def test_a_wrong_byte_in_utf_8_is_a_bad_line_and_far_into_a_file_the_encoding_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("一二三\n\n".encode() + b"caf\xe9\n\n" + "四五六\n".encode())
    with pytest.raises(UserError, match=r"record 3: not UTF-8 \(byte 0xE9, column 4\)$"):
        list(texts_of(path, boundary="blank", field="text"))
    path.write_bytes(b"x" * 300_000 + b"\n\n" + SIMPLIFIED.encode("gbk"))
    with pytest.raises(UserError, match=r"byte 0xB5, column 1\); it seems to be gb18030: --encoding gb18030"):
        list(texts_of(path, boundary="blank", field="text"))


def test_a_byte_that_the_encoding_does_not_know_spoils_its_own_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("山上\n\n".encode("gbk") + b"\xff\n\n" + "有庙\n".encode("gbk"))
    texts = []
    with pytest.raises(UserError, match="record 3: not UTF-8"):
        texts += [text for text, _ in texts_of(path, boundary="blank", field="text", encoding="gbk")]
    path.write_bytes(path.read_bytes().replace(b"\xff\n\n", b""))
    assert [text for text, _ in texts_of(path, boundary="blank", field="text", encoding="GBK")] == ["山上", "有庙"]


@pytest.mark.parametrize("name", ["gbkk", "hex", "undefined", "", "base64", "\0", "idna", "punycode", "rot13"])
def test_what_is_no_encoding_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="no known encoding; choose one such as gb18030"):
        check_encoding(name)


@pytest.mark.parametrize("name", sorted(module.name for module in pkgutil.iter_modules(encodings.__path__)))
def test_an_encoding_that_is_taken_is_read(tmp_path, name):
    try:
        check_encoding(name)
    except UserError:
        assert name not in ("gb18030", "big5", "gbk", "utf_16", "utf_16_le", "utf_32", "cp1252", "shift_jis")
        return
    (tmp_path / "a.txt").write_bytes("abc".encode(name))
    assert list(texts_of(tmp_path / "a.txt", boundary="blank", field="text", encoding=name)) == [("abc", ANY)]


def test_instructions_and_questions_in_another_encoding(tmp_path):
    from tests.minillm.datasets.test_instructions import Numbers

    path = tmp_path / "rows.jsonl"
    row = {"instruction": "1 2", "output": "3", "input": "", "note": "山上有一座庙。庙里有个老和尚"}
    path.write_bytes(json.dumps(row, ensure_ascii=False).encode("gbk"))
    for read in (lambda: InstructionRows(path, Numbers(), 16), lambda: read_questions(path)):
        with pytest.raises(UserError, match=r"rows\.jsonl: not UTF-8 but, as it seems, GB18030"):
            read()
    rows = InstructionRows(path, Numbers(), 16, encoding="gbk")
    assert rows.counts["learned"] == 2 and rows.files.not_used == {"note": 1}
    assert read_questions(path, encoding="gbk")[0]["note"] == row["note"]
    with pytest.raises(UserError, match="--encoding gbkk: no known encoding"):
        InstructionRows(path, Numbers(), 16, encoding="gbkk")
