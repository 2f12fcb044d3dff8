"""Which input files share a bin."""

from pathlib import Path

import pytest

from data import sources
from data.prepare import prepare


@pytest.fixture
def small_files(tmp_path, monkeypatch) -> Path:
    """A hundred files of about 100 bytes, and a large one among them."""
    monkeypatch.setattr(sources, "SMALL", 1000)
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.txt").write_text(f"File {i}: " + "apple " * (10 + i % 9))
    (folder / "050.txt").write_text("File 50\n\n" + "apple one\n\n" * 200)
    return folder


def groups_of(meta: dict) -> list[list[str]]:
    return [[Path(source["file"]).stem for source in record["sources"]] for record in meta["bins"]]


def test_small_files_share_a_bin_and_a_large_one_has_its_own(small_files, tok_path, tmp_path, monkeypatch):
    meta = prepare([small_files], tmp_path / "out", tokenizer=tok_path, val_fraction=0, workers=1)
    groups = groups_of(meta)
    assert [name for group in groups for name in group] == [f"{i:03}" for i in range(100)]  # in order, each once
    assert ["050"] in groups and 5 < len(groups) < 30
    sizes = [sum((small_files / f"{name}.txt").stat().st_size for name in group) for group in groups]
    assert all(size < 8000 for size in sizes)
    monkeypatch.setattr(sources, "SMALL", 1 << 20)
    whole = prepare([small_files], tmp_path / "whole", tokenizer=tok_path, val_fraction=0, workers=1)
    assert len(whole["bins"]) == 1
    one = (tmp_path / "whole" / "train-00000.bin").read_bytes()
    assert b"".join(path.read_bytes() for path in sorted((tmp_path / "out").glob("*.bin"))) == one


def test_many_bins_become_fewer(small_files, tok_path, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALL", 1)
    monkeypatch.setattr(sources, "MOST_GROUPS", 10)
    meta = prepare([small_files], tmp_path / "out", tokenizer=tok_path, val_fraction=0, workers=1)
    assert len(meta["bins"]) < 30


@pytest.mark.parametrize("change", ["changed", "added", "deleted"])
def test_a_small_file_concerns_its_own_group_alone(small_files, tok_path, tmp_path, capsys, change):
    options = {"tokenizer": tok_path, "val_fraction": 0, "workers": 1}
    before = prepare([small_files], tmp_path / "out", **options)
    if change == "changed":
        (small_files / "033.txt").write_text("File 33, changed")
    elif change == "added":
        (small_files / "033a.txt").write_text("File 33a")
    else:
        (small_files / "033.txt").unlink()
    capsys.readouterr()
    after = prepare([small_files], tmp_path / "out", **options)
    said = capsys.readouterr().out
    assert len({record["key"] for record in after["bins"]} - {record["key"] for record in before["bins"]}) <= 2
    assert "in one bin with a file that changed: " in said and "damaged" not in said
    fresh = prepare([small_files], tmp_path / "fresh", **options)
    assert after == fresh
