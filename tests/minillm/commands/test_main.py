import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from minillm import __main__
from minillm.base.options import declared


def test_plot_writes_beside_the_run(home, call):
    folder = home.path / "out" / "plotted"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "time_s": 1}\n')
    assert call("plot", "out/plotted")[1] == "out/plotted/curve.png\n"
    assert call("plot", "out/plotted", "out/plotted/metrics.jsonl")[1] == "curves.png\n"
    assert (folder / "curve.png").stat().st_size > 1000 and (home.path / "curves.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate"], "--prompt"),
        (["generate", "--prompt", "x", "--modle", "y"], "--modle"),
        (["generate", "--prompt", "x", "--model", "nowhere"], "nowhere: no such folder"),
        (
            ["generate", "--prompt", "x", "--model", "text.txt"],
            "text.txt: a file and no folder; python -m minillm import",
        ),
        (["generate", "--prompt", "x", "--top_p", "2"], "--top_p 2.0: must be 0 to 1"),
        (["generate", "--prompt", "x", "--max_new_tokens", "0"], "--max_new_tokens 0: must be at least 1"),
        (["generate", "--prompt", "x", "--stop", ""], "--stop '': every text begins with it"),
        (["generate", "--prompt", "x", "--device", "abacus"], "abacus"),
        (["eval", "--data", "nothing.txt"], "nothing.txt: no such file"),
        (["eval", "--data", "text.txt", "--seq_len", "65"], "--seq_len 65"),
        (["eval", "--data", "text.txt", "--seq_len", "0"], "--seq_len 0"),
        (["eval", "--data", "text.txt", "--max_tokens", "-1"], "--max_tokens -1: must be at least 1"),
        (
            ["eval", "--data", "bins", "--limit", "5"],
            "--limit 5: is about questions, and bins holds token bins; say --m",
        ),
        (
            ["eval", "--data", "text.txt", "--limit", "5"],
            "--limit 5: is about questions, and text.txt holds texts; say",
        ),
        (["eval", "--data", "text.txt", "--max_new_tokens", "9"], "--max_new_tokens 9: is about questions"),
        (["eval", "--data", "text.txt", "--template", "simple"], "--template simple: is about questions"),
        (["eval", "--data", "bins", "--template", "simple"], "--template simple: is about questions"),
        (["eval", "--data", "bins", "--field", "story"], "--field story: is about texts, and bins holds token bins"),
        (["eval", "--data", "bins", "--split", "file"], "--split file: is about texts, and bins holds token bins"),
        (["eval", "--data", "bins", "--encoding", "gbk"], "--encoding gbk: is about files of text"),
        (["eval", "--data", "bins", "--allow_lossy", "true"], "--allow_lossy True: is about files of text"),
        (["eval", "--data", "questions.jsonl", "--field", "story"], "--field story: is about texts"),
        (["eval", "--data", "questions.jsonl", "--split", "file"], "--split file: is about texts"),
        (
            ["eval", "--data", "questions.jsonl", "--max_tokens", "9"],
            "--max_tokens 9: is about texts, and questions.jsonl",
        ),
        (["eval", "--data", "questions.jsonl", "--seq_len", "9"], "--seq_len 9: is about texts"),
        (["chat", "--turns", "0"], "--turns 0: must be at least 1"),
        (["eval", "--data", "questions.jsonl", "--limit", "0"], "--limit 0: must be at least 1"),
        (["vocab", "train", "--input", "text.txt", "--out", "v", "--vocab_size", "10"], "--vocab_size 10: at least 3"),
        (["bench", "train", "--rows", "0"], "--rows 0: must be at least 1"),
        (["plot", "out"], "metrics.jsonl: no such file"),
        (["info"], "either --preset NAME or --model DIR"),
        (["dance"], "dance"),
        (["gnerate"], "gnerate: no such command; did you mean generate?"),
        (["vocab"], "vocab: choose one of vocab train, vocab merge, vocab prune, vocab inspect"),
        (["vocab", "trian"], "did you mean vocab train?"),
        (["bench", "generate", "--rows", "8"], "--rows: no such option"),
        (["plot"], "RUNS"),
        (["eval"], "--data is needed: a folder of token bins, texts or questions"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_status_2(call, arguments, message):
    status, _, err = call(*arguments)
    assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_every_command_has_a_line_and_a_help_in_groups(call, capsys):
    status, out, _ = call("--help")
    assert status == 0
    listed = {line[2:].split("  ")[0] for line in out.splitlines() if line.startswith("  ")}
    assert listed == set(__main__.COMMANDS)
    assert call() == (2, out, "")
    status, out, _ = call("bench", "--help")
    assert status == 0 and "bench data" in out and "vocab" not in out
    for name, module in __main__.COMMANDS.items():
        with pytest.raises(SystemExit):
            __main__.main([*name.split(), "--help"])
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: python -m minillm {name}") and "general:\n" in shown
        for option, its in declared(importlib.import_module(module).Config).items():
            assert its.help and (its.positional or f"--{option} " in shown), option


def test_the_overview_needs_no_torch():
    """So it comes at once."""
    code = "import sys, minillm.__main__ as m; m.overview(); print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_options_of_a_command_may_come_from_a_file(home, call):
    (home.path / "options.toml").write_text('prompt = "Tom"\nmax_new_tokens = 3\nstop = ["!", "?"]\n')
    from_file = call("generate", "--config", "options.toml", "--temperature", "0")
    typed = call("generate", "--prompt", "Tom", "--max_new_tokens", "3", "--temperature", "0", "--stop", "!", "?")
    assert from_file == typed and typed[0] == 0
