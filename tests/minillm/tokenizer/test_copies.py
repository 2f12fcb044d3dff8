"""A tokenizer in other processes."""

import datetime
import json
import pickle

from minillm.tokenizer import jinja_template
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer
from tests.minillm.tokenizer.test_tokenizers_model import llama3, write_folder

TALK = [{"role": "user", "content": "Who has the ball? 谁有球？"}, {"role": "assistant", "content": "Tom."}]


def test_a_copy_of_either_kind_gives_the_same_ids(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "json").mkdir()
    train_tokenizer(["Who has the ball? Tom has the ball."] * 30, 370, tmp_path / "model")
    write_folder(llama3(), tmp_path / "json")
    for name in ("model", "json"):
        tokenizer = Tokenizer.load(tmp_path / name)
        data = pickle.dumps(tokenizer)
        started = jinja_template.STARTED
        monkeypatch.setattr(jinja_template, "STARTED", datetime.datetime(2000, 1, 1))  # another process
        copy = pickle.loads(data)
        assert type(copy) is type(tokenizer) and copy.identity == tokenizer.identity
        assert copy.encode_chat(TALK, template="simple") == tokenizer.encode_chat(TALK, template="simple")
        assert started == jinja_template.STARTED


def test_the_identity_is_of_all_files_and_of_the_day_if_a_template_tells_it(tmp_path, monkeypatch):
    train_tokenizer(["Who has the ball? Tom has the ball."] * 30, 370, tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    described = json.loads(settings.read_text())

    def identity(template: str, day: int = 1) -> str:
        settings.write_text(json.dumps(described | {"chat_template": template}))
        monkeypatch.setattr(jinja_template, "STARTED", datetime.datetime(2026, 1, day))
        return Tokenizer.load(tmp_path).identity

    assert identity("a") == identity("a", 2) != identity("b")
    assert identity("{{ strftime_now('%d') }}") != identity("{{ strftime_now('%d') }}", 2)
