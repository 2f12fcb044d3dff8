"""Which paths mean the bundled corpus."""

import pytest

from minillm.base.bundled_files import is_file, is_used


@pytest.mark.parametrize("absolute", [False, True])
def test_the_corpus_is_known_however_its_path_is_written(tmp_path, monkeypatch, absolute):
    monkeypatch.chdir(tmp_path)
    here = f"{tmp_path}/" if absolute else ""
    for written in ("data/bundled", "data/bundled/", "data//./bundled", "data/world/../bundled"):
        assert is_used(here + written) and is_used(f"mine, {here}{written}")
    for file in ("sft_train.jsonl", "requests_heldout.jsonl"):
        assert is_used(f"mine.jsonl, {here}data/bundled/./{file}", file[:3])
        assert is_file(f"{here}data/./bundled/{file}", file) and not is_file(f"{here}data/{file}", file)
    assert not is_used(f"{here}data/bundled/sft_train.jsonl", "requests")
    for other in ("data", "data/bundled2", "data/bundled/mine.jsonl", "bundled"):
        assert not is_used(here + other)
