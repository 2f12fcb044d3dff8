"""Preparing again: only what changed is tokenized, damage is found, and the result is that of a fresh folder."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import pytest

from data import bin_writer, choose_tokenizer, sources, tokenize_files
from data import prepare as prepare_module
from data.prepare import prepare
from data.sources import checksum
from minillm.base import files as files_module
from minillm.base.errors import UserError
from minillm.datasets import token_bins
from minillm.datasets.token_bins import TokenBins
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer

OPTIONS = {"val_fraction": 0.2, "workers": 1}


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tok")
    train_tokenizer(["Document 1: apple 世界 apple one two"] * 20, 375, folder)
    return folder


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """Ten files of several pieces each; the eighth is a .txt."""
    monkeypatch.setattr(tokenize_files, "PIECE_BYTES", 400)
    monkeypatch.setattr(sources, "SMALL", 1)  # each file has bins of its own
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(10):
        rows = [f"File {i}, document {j}: " + "apple 世界 " * ((i + j) % 6) for j in range(25)]
        if i == 7:
            (folder / f"{i}.txt").write_text("\n\n".join(rows), encoding="utf-8")
        else:
            write(folder / f"{i}.jsonl", rows)
    return folder


def write(path: Path, rows: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


class Seen:
    """Which files' documents are tokenized while it watches."""

    def __init__(self, monkeypatch):
        self.files: set[str] = set()
        encode = tokenize_files.encode_piece

        def watched(documents, *rest):
            self.files |= {str(record.raw).partition("File ")[2][:1] for record in documents}
            return encode(documents, *rest)

        monkeypatch.setattr(tokenize_files, "encode_piece", watched)

    def take(self) -> set[str]:
        seen, self.files = self.files, set()
        return seen


@pytest.fixture
def seen(monkeypatch) -> Seen:
    return Seen(monkeypatch)


def contents(out: Path) -> dict:
    """All that training reads of a folder, and what is remembered."""
    bins = {path.name: path.read_bytes() for kind in ("bin", "sizes") for path in out.glob(f"*.{kind}")}
    return bins | {"meta.json": json.loads((out / "meta.json").read_text())}


def fresh(texts: Path, tok: Path, **options) -> dict:
    out = texts.parent / "fresh"
    shutil.rmtree(out, ignore_errors=True)
    prepare([texts], out, tokenizer=tok, **{**OPTIONS, **options})
    return contents(out)


@pytest.fixture
def out(texts, tok, tmp_path) -> Path:
    prepare([texts], tmp_path / "out", tokenizer=tok, **OPTIONS)
    assert len(list((tmp_path / "out").glob("train-*.bin"))) > 3
    return tmp_path / "out"


def test_only_the_changed_file_is_done_again(texts, tok, out, seen, capsys):
    write(texts / "4.jsonl", ["File 4, changed: apple " * 3] * 9)
    capsys.readouterr()
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    said = capsys.readouterr().out
    assert seen.take() == {"4"}
    assert "9 of 10 files are tokenized already" in said and f"text changed: {texts}/4.jsonl" in said
    assert contents(out) == fresh(texts, tok)
    assert not (out / "unfinished").exists()


def test_new_gone_moved_and_touched_files(texts, tok, out, seen, capsys):
    write(texts / "a.jsonl", ["File a, new"] * 30)
    (texts / "3.jsonl").unlink()
    (texts / "0.jsonl").rename(texts / "z.jsonl")
    (texts / "5.jsonl").touch()
    capsys.readouterr()
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    said = capsys.readouterr().out
    assert seen.take() == {"a"}
    assert f"new: {texts}/a.jsonl\n" in said and f"no longer an input: {texts}/0.jsonl, {texts}/3.jsonl\n" in said
    assert contents(out) == fresh(texts, tok)


def test_bins_of_a_version_without_sizes_are_kept(texts, tok, out, seen):
    meta = json.loads((out / "meta.json").read_text())
    for files in meta["files"].values():
        for file in files:
            file.pop("sizes", None)
    for record in meta["bins"]:
        record["val"].pop("sizes_sha256", None)
    meta["bins_sha256"] = sources.checksum(meta["bins"])
    (out / "meta.json").write_text(json.dumps(meta))
    for path in out.glob("*.sizes"):
        path.unlink()
    before = contents(out)
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert not seen.take() and contents(out) == before
    write(texts / "z.jsonl", ["File z, new"] * 30)
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert seen.take() == {"z"} and TokenBins(out, "val").document_bytes is None


def test_a_file_added_leaves_the_other_bins_as_they_are(texts, tok, out, seen):
    write(texts / "z.jsonl", ["File z, new"] * 30)
    before = {path: path.stat().st_ino for path in out.glob("*.bin")}
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert {path: path.stat().st_ino for path in before} == before  # not even copied
    assert seen.take() == {"z"} and contents(out) == fresh(texts, tok)


@pytest.mark.parametrize(("place", "done_again"), [(0.0, 1), (0.45, 1), (0.999, 1)])
@pytest.mark.parametrize("kind", ["train-*.bin", "val-*.bin", "val-*.sizes"])
def test_a_flipped_byte_is_found(texts, tok, out, seen, capsys, kind, place, done_again):
    before, files = contents(out), sorted(out.glob(kind))
    damaged = files[int(place * len(files))]
    data = bytearray(damaged.read_bytes())
    data[int(place * len(data))] ^= 4
    damaged.write_bytes(data)
    capsys.readouterr()
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert len(seen.take()) == done_again and "damaged" in capsys.readouterr().out
    assert contents(out) == before


@pytest.mark.parametrize("how", ["cut", "missing", "a record", "meta.json", "tokenizer.model"])
def test_other_damage_is_mended(texts, tok, out, seen, capsys, how):
    before, file = contents(out), out / "train-00001.bin"
    text = (out / "meta.json").read_text()
    files, records = text.split('"bins"')
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-2])
    elif how == "missing":
        file.unlink()
    elif how == "a record":
        assert '"documents": 2' in records
        (out / "meta.json").write_text(files + '"bins"' + records.replace('"documents": 2', '"documents": 3', 1))
    elif how == "meta.json":
        assert '"tokens": 1' in files
        (out / "meta.json").write_text(files.replace('"tokens": 1', '"tokens": 2') + '"bins"' + records)
    else:
        (out / how).write_bytes((out / how).read_bytes()[:-9])
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    expected = {"cut": 1, "missing": 1, "a record": 10}.get(how, 0)
    assert len(seen.take()) == expected
    assert ("meta.json is damaged" in capsys.readouterr().out) == (how == "a record")
    assert contents(out) == before and Tokenizer.load(out).sha256 == Tokenizer.load(tok).sha256


def test_bins_whose_meta_json_does_not_tell_what_they_were_made_from_are_refused(texts, tok, out):
    meta = json.loads((out / "meta.json").read_text())
    del meta["bins"], meta["bins_sha256"]
    (out / "meta.json").write_text(json.dumps(meta | {"format": 1}))
    with pytest.raises(UserError, match=r"train-00000\.bin: no meta\.json tells what it was made from"):
        prepare([texts], out, tokenizer=tok, **OPTIONS)


def test_bins_without_a_meta_json_are_refused(texts, tok, out):
    (out / "meta.json").unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin: no meta\.json tells what it was made from"):
        prepare([texts], out, tokenizer=tok, **OPTIONS)


def test_options_that_concern_some_files_alone(texts, tok, out, seen):
    for options, done_again in (
        ({"boundary": "lines"}, {"7"}),  # the .txt
        ({"boundary": "lines", "on_bad_line": "skip"}, set()),  # there was none
        ({"wrap": "eos"}, set("0123456789")),
    ):
        prepare([texts], out, tokenizer=tok, **{**OPTIONS, **options})
        assert seen.take() == done_again
        assert contents(out) == fresh(texts, tok, **options)
        seen.take()


def test_after_a_bad_line_is_mended_or_skipped_nothing_is_done_twice(texts, tok, seen, tmp_path):
    good = (texts / "6.jsonl").read_text()
    (texts / "6.jsonl").write_text(good + "{\n")
    with pytest.raises(UserError, match=r"6\.jsonl, line 26"):
        prepare([texts], tmp_path / "out", tokenizer=tok, **OPTIONS)
    seen.take()
    skip = OPTIONS | {"on_bad_line": "skip"}
    prepare([texts], tmp_path / "out", tokenizer=tok, **skip)
    assert seen.take() <= {"6", "7", "8", "9", ""} and contents(tmp_path / "out") == fresh(texts, tok, **skip)
    with pytest.raises(UserError, match=r"6\.jsonl, line 26"):
        prepare([texts], tmp_path / "out", tokenizer=tok, **OPTIONS)
    (texts / "6.jsonl").write_text(good)
    seen.take()
    prepare([texts], tmp_path / "out", tokenizer=tok, **OPTIONS)
    assert seen.take() == {"6"} and contents(tmp_path / "out") == fresh(texts, tok)


def test_a_learnt_tokenizer_is_learnt_again_only_from_other_text(texts, tok, tmp_path, seen, capsys):
    learn = {"train_tokenizer": 380, **OPTIONS}
    prepare([texts], tmp_path / "out", **learn)
    sha = Tokenizer.load(tmp_path / "out").sha256
    capsys.readouterr()
    prepare([texts], tmp_path / "out", **learn)
    assert "nothing to do" in capsys.readouterr().out
    write(texts / "4.jsonl", ["File 4: quite other words here, other letters"] * 9)
    seen.take()
    prepare([texts], tmp_path / "out", tokenizer=tmp_path / "out", **OPTIONS)  # keeps the tokenizer
    assert seen.take() == {"4"} and Tokenizer.load(tmp_path / "out").sha256 == sha
    prepare([texts], tmp_path / "out", **learn)
    assert "learning" in capsys.readouterr().out and Tokenizer.load(tmp_path / "out").sha256 != sha
    prepare([texts], tmp_path / "fresh", **learn)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


# ---- what was finished before, when a later command does not come to its end


def everything(out: Path) -> dict[str, bytes]:
    """All that is in a folder, besides what is not finished."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "lock"}


@pytest.fixture(scope="module")
def other_tok(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    train_tokenizer(["two three apple 世界 documents, one File"] * 20, 371, folder)
    return folder


BROKEN = {  # a command that fails → its options
    "a bad line": {},
    "a bad line under another tokenizer": {"tokenizer": "other"},
    "a missing field": {"field": "body"},
    "a vocabulary too large for the text": {"tokenizer": None, "train_tokenizer": 5000, "on_bad_line": "skip"},
    "a bad line after a tokenizer was learnt": {"tokenizer": None, "train_tokenizer": 380},
    "an empty file for validation": {"val_fraction": 0, "val_inputs": "empty"},
    "Ctrl-C": {"tokenizer": "other", "on_bad_line": "skip"},
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_command_that_fails_leaves_what_was_finished(
    texts, tok, other_tok, out, tmp_path, monkeypatch, seen, capsys, how
):
    for i in (1, 2, 3, 8, 9):
        (texts / f"{i}.jsonl").unlink()
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    before = everything(out)
    text = (texts / "6.jsonl").read_text(encoding="utf-8")
    (texts / "6.jsonl").write_text(text + "{\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    if how == "Ctrl-C":
        encode = tokenize_files.encode_piece
        calls = itertools.count()
        monkeypatch.setattr(
            tokenize_files, "encode_piece", lambda *rest: interrupt() if next(calls) == 15 else encode(*rest)
        )
    if how == "a bad line after a tokenizer was learnt":
        monkeypatch.setattr(choose_tokenizer, "_sample", lambda sources: ["apple 世界, File 1 document one"] * 99)
    options = OPTIONS | {"tokenizer": tok} | BROKEN[how]
    options["tokenizer"] = other_tok if options["tokenizer"] == "other" else options["tokenizer"]
    options |= {"val_inputs": [tmp_path / "empty.jsonl"]} if "val_inputs" in options else {}
    with pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else UserError):
        prepare([texts], out, **options)
    said = capsys.readouterr().out
    assert {name: data for name, data in everything(out).items() if name in before} == before
    for split in ("train", "val"):
        TokenBins(out, split).check_tokenizer(Tokenizer.load(out))
    assert "what was finished there before stays as it was" in said

    # the earlier command has nothing to do, or goes on with what is there
    (texts / "6.jsonl").write_text(text, encoding="utf-8")
    seen.take()
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert not seen.take() and {name: everything(out)[name] for name in before} == before
    assert not (out / "unfinished").exists()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_torn_bin_does_not_take_the_place_of_a_whole_one(texts, tok, out, monkeypatch):
    """A damaged bin is made again, this stops on the way, and then the bin comes back from a copy."""
    before = contents(out)
    damaged = out / "train-00004.bin"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-2])
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(bin_writer.BinWriter, "finish", lambda self: interrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert list((out / "unfinished").glob("*.train.bin"))
    damaged.write_bytes(whole)
    write(texts / "z.jsonl", ["File z, new"] * 30)
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert contents(out)[damaged.name] == before[damaged.name] and contents(out) == fresh(texts, tok)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("change", ["text", "tokenizer"])
def test_killed_anywhere_while_redoing_it_goes_on(texts, tok, other_tok, out, monkeypatch, seen, change):
    """It dies before the n-th change to the disk, for every n; what is there then is the one or the other, whole."""
    for i in (0, 1, 2, 3, 8, 9):  # of ten files it would take long
        (texts / f"{i}.jsonl").unlink()
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    before = contents(out)
    shutil.copytree(out, texts.parent / "start")
    new_tok = tok if change == "text" else other_tok
    if change == "text":
        write(texts / "4.jsonl", ["File 4, changed: apple " * 3] * 9)
    expected = fresh(texts, new_tok)
    monkeypatch.setattr(files_module, "sync", lambda path: None)
    left = [0]

    def dying(function):
        def call(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*args, **options)

        return call

    for name in ("replace", "unlink", "mkdir", "rmdir"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    n_between = 0  # times that it died where nothing was finished
    for n in range(1, 1000):
        left[0] = 0  # a live process again
        shutil.rmtree(out)
        shutil.copytree(texts.parent / "start", out)
        left[0] = n
        try:
            prepare([texts], out, tokenizer=new_tok, **OPTIONS)
        except Killed:
            left[0] = 0
            if (out / "meta.json").exists():
                looks = {path.name: path.read_bytes() for path in out.glob("*.bin")}
                whole = before if json.loads((out / "meta.json").read_text()) == before["meta.json"] else expected
                assert {name: looks[name] for name in whole if name.endswith(".bin")} == {
                    name: data for name, data in whole.items() if name.endswith(".bin")
                }
                TokenBins(out, "train").check_tokenizer(Tokenizer.load(out))
            else:
                n_between += 1

            # a command that fails leaves the folder finished, whatever the killed one was about
            with pytest.raises(UserError, match="key 'body' is missing"):
                prepare([texts], out, tokenizer=tok, field="body", **OPTIONS)
            assert contents(out) in (before, expected), n
            TokenBins(out, "train").check_tokenizer(Tokenizer.load(out))
            prepare([texts], out, tokenizer=new_tok, **OPTIONS)
            assert contents(out) == expected and not (out / "unfinished").exists(), n
        else:
            assert n > 20 and n_between > 5
            return


def test_two_groups_of_the_same_texts(texts, tok, tmp_path, seen):
    shutil.copy(texts / "4.jsonl", texts / "4b.jsonl")
    prepare([texts], tmp_path / "out", tokenizer=tok, **OPTIONS)
    expected = contents(tmp_path / "out")
    assert len(expected["meta.json"]["bins"]) == 11
    seen.take()
    (texts / "9.jsonl").unlink()
    prepare([texts], tmp_path / "out", tokenizer=tok, **OPTIONS)
    assert seen.take() == set() and contents(tmp_path / "out") == fresh(texts, tok)


# ---- a run that reads meanwhile, a text that is edited meanwhile


def test_a_bin_that_is_open_is_never_written_over(texts, tok, out):
    """A run reads through a memory map: written over, its tokens would change; cut, the system would end it."""
    file = out / "train-00001.bin"
    data = file.read_bytes()
    file.write_bytes(data[:20] + data[22:24] + data[22:])  # damaged, so it is made again under the same name
    reader = TokenBins(out, "train")
    before = [tokens.copy() for tokens in reader.arrays]
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert file.read_bytes() == data
    assert all((now == then).all() for now, then in zip(reader.arrays, before, strict=True))


def test_a_folder_prepared_again_while_it_is_opened_is_refused(texts, tok, out, monkeypatch):
    opened = TokenBins._open_files

    def open_files(self, *rest):
        opened(self, *rest)
        write(texts / "4.jsonl", ["File 4, changed: apple " * 3] * 9)
        prepare([texts], out, tokenizer=tok, **OPTIONS)

    monkeypatch.setattr(TokenBins, "_open_files", open_files)
    with pytest.raises(UserError, match="was prepared again while it was opened"):
        TokenBins(out, "train")


@pytest.mark.parametrize("edit", ["longer", "as long", "gone"])
@pytest.mark.parametrize("moment", ["tokenized", "learnt from"])
def test_a_text_that_is_edited_while_it_is_read_is_noticed(texts, tok, tmp_path, monkeypatch, edit, moment):
    """Its hash, by which a later preparation keeps the tokens, would be that of a text that nobody read."""
    file, out = texts / "4.jsonl", tmp_path / "out"
    before = file.read_text(encoding="utf-8")
    changed = {"longer": before + before, "as long": before.replace("document 3", "document 4")}

    def edit_once():
        if edit == "gone":
            file.unlink(missing_ok=True)
        else:
            file.write_text(changed[edit], encoding="utf-8")

    module, name = (tokenize_files, "encode_piece") if moment == "tokenized" else (prepare_module.train, "_learn")
    reading = getattr(module, name)

    def edited(*arguments, **options):
        edit_once()
        return reading(*arguments, **options)

    how = {"tokenizer": tok} if moment == "tokenized" else {"train_tokenizer": 375}
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(module, name, edited)
        with pytest.raises(UserError, match=r"(?i)4\.jsonl: .*(was changed while it was read|no such file)"):
            prepare([texts], out, **how, **OPTIONS)
    assert not (out / "meta.json").exists()
    prepare([texts], out, **how, **OPTIONS)
    expected = tmp_path / "expected"
    prepare([texts], expected, **how, **OPTIONS)
    assert contents(out) == contents(expected)


# ---- folders from elsewhere


@pytest.mark.parametrize("has_target", [True, False])
def test_nothing_is_written_through_a_link_in_the_folder(texts, tok, out, tmp_path, has_target):
    """Each name that a preparation writes is such a link once."""
    shutil.copytree(out, tmp_path / "whole")
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith(("train-0000", "val-0000")))
    names += ["train-00001.bin", "val-00001.bin", "val-00001.sizes", "unfinished"]
    assert {"lock", "meta.json", "tokenizer.model", "tokenizer.json"} <= set(names)
    write(texts / "4.jsonl", ["File 4, changed: apple " * 3] * 9)
    for name in names:
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "whole", out)
        outside = tmp_path / f"outside {name}"
        is_folder = name == "unfinished"
        if has_target:
            outside.mkdir() if is_folder else outside.write_text("mine")
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(outside)
        with contextlib.suppress(UserError):
            prepare([texts], out, tokenizer=tok, **OPTIONS)
        if is_folder and has_target:
            assert list(outside.iterdir()) == []
        else:
            assert outside.exists() == has_target and (not has_target or outside.read_text() == "mine"), name


@pytest.mark.parametrize("where", ["name", "key"])
def test_names_in_meta_json_lead_nowhere_else(texts, tok, out, tmp_path, where):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    meta = json.loads((out / "meta.json").read_text())
    if where == "name":
        meta["bins"][1]["train"]["name"] = "../outside"
    else:
        meta["bins"][1]["key"] = "../../outside"
    meta["bins_sha256"] = checksum(meta["bins"])
    (out / "meta.json").write_text(json.dumps(meta))
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert outside.read_text() == "mine" and not (tmp_path / "outside.json").exists()
    assert contents(out)["meta.json"]["bins"] == fresh(texts, tok)["meta.json"]["bins"]


def test_a_meta_json_that_could_not_be_read_is_not_written(texts, tok, tmp_path, seen, monkeypatch):
    out, least = tmp_path / "out", tmp_path / "least"
    prepare([texts], least, tokenizer=tok, **OPTIONS)
    size = (least / "meta.json").stat().st_size
    for module in (bin_writer, token_bins):
        monkeypatch.setattr(module, "MOST_META_BYTES", size - 1)
    with pytest.raises(UserError, match=rf"meta\.json: {size:,} bytes, more than are read \(at most {size - 1:,}\)"):
        prepare([texts], out, tokenizer=tok, **OPTIONS)
    with pytest.raises(UserError, match=rf"least/meta\.json: {size:,} bytes"):  # not "from elsewhere; delete it"
        prepare([texts], least, tokenizer=tok, **OPTIONS)

    # nothing of what was tokenized is lost
    for module in (bin_writer, token_bins):
        monkeypatch.setattr(module, "MOST_META_BYTES", size)
    seen.files.clear()
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert not seen.files and (out / "meta.json").stat().st_size == size
    assert TokenBins(out, "train").n_tokens == TokenBins(least, "train").n_tokens


def test_what_a_preparation_did_not_write_stays(texts, tok, out):
    mine = [out / name for name in ("train-mine.bin", "val-00000.bin.bak", "unfinished/draft.txt", "notes.tmp-1")]
    (out / "unfinished").mkdir()
    for path in mine:
        path.write_text("mine")
    write(texts / "4.jsonl", ["File 4, changed: apple " * 3] * 9)
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert all(path.read_text() == "mine" for path in mine)


@pytest.mark.parametrize("name", ["meta.json", "config.json", "tokenizer.model"])
def test_a_folder_of_something_else_is_left_alone(texts, tok, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    for how in ({"tokenizer": tok}, {"train_tokenizer": 375}):
        with pytest.raises(UserError, match=rf"{name}: .* choose another --out"):
            prepare([texts], out, **how, **OPTIONS)
    assert (out / name).read_text() == "{}"


def test_a_record_that_says_another_length_is_not_believed(texts, tok, out, seen):
    """Training would refuse such a bin, and each further preparation would call it finished."""
    expected = contents(out)
    meta = json.loads((out / "meta.json").read_text())
    meta["bins"][1]["train"]["tokens"] += 1
    meta["bins_sha256"] = checksum(meta["bins"])
    (out / "meta.json").write_text(json.dumps(meta))
    prepare([texts], out, tokenizer=tok, **OPTIONS)
    assert contents(out) == expected and TokenBins(out, "train")
