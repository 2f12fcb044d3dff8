"""docs/chinese.py goes its whole way on the bundled corpus, and what its page promises holds there."""

import importlib.util
import json
import re

import pytest

from minillm.tokenizer.tokenizer import Tokenizer
from tests import launch


@pytest.fixture(scope="module")
def chinese():
    spec = importlib.util.spec_from_file_location("chinese", launch.ROOT / "docs" / "chinese.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_whole_way_on_the_bundled_corpus(chinese, tmp_path, monkeypatch, capsys):
    in_a_shell = chinese.execute

    def execute(arguments: list[str], said: str) -> tuple[int, str]:
        """A process that starts at once, but for a chat, which reads what it is asked."""
        if said:
            return in_a_shell(arguments, said)
        script, rest = ("minillm/__main__.py", arguments[2:]) if arguments[0] == "-m" else (arguments[0], arguments[1:])
        process = launch.Process(script, rest, tmp_path / "printed.txt", {})
        status = process.wait(seconds=300)
        print(process.text)
        return status, process.text

    monkeypatch.chdir(launch.ROOT)
    monkeypatch.setattr(chinese, "execute", execute)
    monkeypatch.setattr("sys.argv", ["chinese.py", "--quick", "--out", str(tmp_path / "out")])
    chinese.main()
    printed, out = capsys.readouterr().out, tmp_path / "out"

    (merged,) = re.findall(r"added ([\d,]+), already there [\d,]+, unreachable 0\n", printed)
    assert ", 0 of these changed" in printed
    results = json.loads((out / "results.json").read_text())
    old, new = results["old vocabulary"], results["new vocabulary"]
    assert new["pieces"] == old["pieces"] + int(merged) == Tokenizer.load(out / "with" / "stage2-merged").vocab_size
    assert new["english"] == old["english"] and new["chinese"] > 2 * old["chinese"]

    ways = with_surgery, without = results["with surgery"], results["without surgery"]
    # logits of kept ids are the old ones, and new pieces take a little of the probability
    assert 0 <= with_surgery["start"]["english"] - without["start"]["english"] < 0.05
    for way in ways:
        assert way["stage2"]["chinese"] < way["stage1"]["chinese"] < way["start"]["chinese"] - 1
        assert way["stage2"]["english"] > way["start"]["english"]
        assert 0 <= way["instructions"]["exact match"] <= 1
    assert with_surgery["stage2"]["chinese"] < without["stage2"]["chinese"]
    assert printed.count("\n> ") == 4 and (out / "chinese.png").stat().st_size > 10_000
