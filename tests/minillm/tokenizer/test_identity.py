"""What makes two tokenizers the same."""

import datetime
import json

from minillm.tokenizer import jinja_template
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer


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
