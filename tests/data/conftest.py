from pathlib import Path

import pytest

from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tok")
    train_tokenizer(["One apple, two apples. 你好，世界。 and one here"] * 20, 380, folder)
    return Tokenizer.load(folder)


@pytest.fixture
def tok_path(tok, tmp_path) -> Path:
    tok.save(tmp_path / "tok")
    return tmp_path / "tok"
