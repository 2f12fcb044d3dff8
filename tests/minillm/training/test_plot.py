import json
import sys
import warnings
from pathlib import Path

import pytest

from minillm.base.errors import UserError
from minillm.base.printing import visible
from minillm.training import plot


def run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(n=30, bpb=True, start=4.0):
    training = [{"step": i, "loss": start / i + 1, "time_s": 2.0 * i} for i in range(1, n + 1)]
    score = {"val_bpb": 2.0, "floor_bpb": 1.2, "floor_error": 0.01} if bpb else {}
    return [*training, {"step": n, "val_loss": 3.0, **score}]


def drawn(monkeypatch):
    """Keeps the figures that `draw` makes, so that they can be looked into."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    return figures


def test_a_run_is_drawn_against_steps_and_time(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    out = plot.draw([run(tmp_path / "a", rows())], tmp_path / "new" / "a.png")
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    loss, loss_by_time, score, score_by_time = figures[0].axes
    assert loss.lines[0].get_xdata().tolist() == list(range(1, 31))
    assert loss.lines[0].get_ydata().tolist() == [4 / i + 1 for i in range(1, 31)]
    assert loss_by_time.lines[0].get_xdata().tolist() == [2 * i for i in range(1, 31)]  # seconds
    assert score.lines[0].get_xydata().tolist() == [[30, 2.0]]
    assert score_by_time.lines[0].get_xydata().tolist() == [[60, 2.0]]  # the time of the step it belongs to
    assert score.lines[1].get_ydata() == [1.2, 1.2] and score.lines[1].get_label() == "floor 1.200"
    assert score.get_ylim()[0] < 1.2  # the floor is in sight
    assert "bits per byte" in score.get_ylabel() and "nats a token" in loss.get_ylabel()


def test_the_words_of_a_picture_are_there_in_chinese(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    monkeypatch.setattr(plot, "CHINESE_FONTS", ("DejaVu Sans",))  # there everywhere, if only with boxes for such words
    plot.draw([run(tmp_path / "a", rows())], tmp_path / "a.png", "zh")
    loss, _, score, score_by_time = figures[0].axes
    assert (loss.get_ylabel(), score.get_ylabel()) == ("训练损失（每个 token 的奈特）", "验证（比特/字节）")
    assert (score.get_xlabel(), score_by_time.get_xlabel()) == ("步数", "训练时间（秒）")
    assert score.lines[1].get_label() == "下界 1.200"
    assert {*plot.PANELS.values(), "floor", "optimum"} < {*plot.CHINESE}  # none is forgotten

    monkeypatch.setattr(plot, "CHINESE_FONTS", ("No Such Font",))
    with pytest.raises(UserError, match="--language zh needs one of these fonts: No Such Font"):
        plot.draw([tmp_path / "a"], tmp_path / "b.png", "zh")


def test_a_loss_that_is_not_of_tokens_has_no_unit(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    pairs = [{"step": 30, "val_accuracy": 0.7}, {"step": 30, "val_accuracy": 0.9}]
    plot.draw([run(tmp_path / "dpo", [*rows()[:-1], *pairs])], tmp_path / "dpo.png")
    loss, _, accuracy, _ = figures[0].axes
    assert loss.get_ylabel() == "training loss" and accuracy.lines[0].get_xydata().tolist() == [[30, 0.9]]


def test_an_objective_is_drawn_towards_its_optimum(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    learned = [{"step": i, "objective": 0.1 * i, "optimum": 0.8} for i in range(1, 6)]
    plot.draw(
        [run(tmp_path / "grpo", [*rows(5)[:-1], *learned, {"step": 5, "objective": 0.6, "optimum": 0.9}])],
        tmp_path / "a.png",
    )
    reward, _ = figures[0].axes  # and no loss, which says nothing of such a run
    assert reward.lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.6])  # the last of a step
    assert reward.lines[1].get_ydata() == [0.9, 0.9] and reward.lines[1].get_label() == "optimum 0.900"
    assert reward.get_ylim()[1] > 0.9 and "KL" in reward.get_ylabel()


def test_several_runs_share_a_floor_and_keep_apart(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    runs = [run(tmp_path / "x" / "pretrain", rows()), run(tmp_path / "y" / "pretrain", rows(200, start=9))]
    plot.draw(runs, tmp_path / "both.png")
    loss, _, score, _ = figures[0].axes
    labels = list(loss.get_legend_handles_labels()[1])
    assert labels == [str(path) for path in runs]  # the same folder name twice: the whole path tells them apart
    assert len(score.lines) == 3  # two runs, one floor


def test_floors_of_several_corpora_say_whose_they_are(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    other = [*rows()[:-1], {"step": 30, "val_bpb": 3.0}]  # of a text whose floor nobody knows
    plot.draw([run(tmp_path / "pretrain", rows()), run(tmp_path / "mine", other)], tmp_path / "both.png")
    assert figures[0].axes[2].get_legend_handles_labels()[1] == ["pretrain", "mine", "floor 1.200 (pretrain)"]


def test_a_name_in_letters_that_no_font_has_is_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot.draw([run(tmp_path / "\U00012000", rows())], tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", ["r$x^$", "_hidden", "a\x1b[2J", "$"])
def test_any_name_of_a_run_is_shown_as_it_is(tmp_path, monkeypatch, name):
    """$ begins a formula, an underscore at the start keeps a name out of the legend."""
    figures = drawn(monkeypatch)
    plot.draw([run(tmp_path / name, rows())], tmp_path / "curve.png")
    (shown,) = {text.get_text() for text in figures[0].axes[0].get_legend().get_texts()}
    assert shown.replace("\\$", "$").strip() == visible(name)


def test_without_bytes_or_validation_less_is_drawn(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plot.draw([run(tmp_path / "a", rows(bpb=False))], tmp_path / "a.png")
    plot.draw([run(tmp_path / "b", rows()[:-1])], tmp_path / "b.png")
    assert "nats a token" in figures[0].axes[2].get_ylabel() and figures[0].axes[2].lines[0].get_ydata() == [3.0]
    assert len(figures[1].axes) == 2


def test_a_run_without_bits_per_byte_has_its_score_beside_one_that_knows_them(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plot.draw([run(tmp_path / "pretrain", rows()), run(tmp_path / "sft", rows(bpb=False))], tmp_path / "both.png")
    _, _, in_bytes, _, in_nats, _ = figures[0].axes
    assert in_bytes.get_legend_handles_labels()[1] == ["pretrain", "floor 1.200"]
    assert in_nats.get_legend_handles_labels()[1] == ["sft"]
    assert in_nats.lines[0].get_xydata().tolist() == [[30, 3.0]] and "nats" in in_nats.get_ylabel()
    assert in_nats.lines[0].get_color() == figures[0].axes[0].lines[1].get_color()


def test_smoothing_is_a_running_mean():
    assert plot.smoothed([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


def test_a_torn_last_line_and_a_lost_loss_do_no_harm(tmp_path):
    folder = run(tmp_path / "a", [{"step": 1, "loss": 2.0, "time_s": 1}, {"step": 2, "loss": None, "time_s": 2}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert plot.series(plot.read_metrics(folder), "loss") == ([1], [1], [2.0])


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    good = run(tmp_path / "good", rows())
    with pytest.raises(UserError, match="no such file"):
        plot.draw([tmp_path / "none"], tmp_path / "a.png")
    with pytest.raises(UserError, match="holds no step yet"):
        plot.draw([run(tmp_path / "empty", [])], tmp_path / "a.png")
    for content in (b"garbage", b'{"step": 1, "lo', b"{}", b"\xff"):
        (tmp_path / "empty" / "metrics.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="holds no step yet"):
            plot.draw([tmp_path / "empty"], tmp_path / "a.png")
    (tmp_path / "text").write_text("hello\nworld\n")
    with pytest.raises(UserError, match="line 1: not a row"):
        plot.draw([tmp_path / "text"], tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot be written"):
        plot.draw([good], tmp_path / "text" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"\[plot\]"):
        plot.draw([good], tmp_path / "a.png")


@pytest.mark.parametrize(
    "row",
    [
        '{"step": "1", "loss": 2}',
        '{"step": true, "loss": 2}',
        '{"step": 1, "loss": "2"}',
        '{"step": 1, "loss": [2]}',
        '{"step": 1, "loss": 2, "time_s": {}}',
        '{"step": 1, "val_bpb": 1e300}',
        '{"step": 1, "val_bpb": 1, "floor_bpb": NaN}',
        '{"step": -1}',
        "[1]",
        "[" * 50_000,
    ],
    ids=range(10),
)
def test_a_row_whose_numbers_are_none_is_named_by_its_line(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 3}}\n{row}\n{{"step": 2, "loss": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a row of metrics"):
        plot.read_metrics(tmp_path)


def test_held_out_pairs_are_drawn_with_the_floor_of_noisy_labels(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    scores = [{"step": 30, "heldout_accuracy": 0.8, "heldout_nll": 0.4, "floor_nll": 0.325}]
    last = {"step": 30, "heldout_accuracy": 0.8, "heldout_nll": 0.4, "ece": 0.02}  # the same without its floor
    plot.draw([run(tmp_path / "reward", [*rows()[:-1], *scores, last])], tmp_path / "reward.png")
    nll, accuracy = figures[0].axes[2], figures[0].axes[4]
    assert nll.lines[-1].get_label() == "floor 0.325" and nll.get_ylim()[0] < 0.325
    assert "pairs" in nll.get_ylabel() and accuracy.lines[0].get_ydata().tolist() == [0.8]


def test_each_benchmark_of_each_run_is_a_curve(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    scores = [{"step": i, "acc/arc_easy": 0.1 * i, "acc_norm/arc_easy": 0.9, "acc/mmlu": 0.25} for i in (1, 2)]
    plot.draw([run(tmp_path / "a", [*rows(3), *scores])], tmp_path / "a.png")
    plot.draw([tmp_path / "a", run(tmp_path / "b", [*rows(3), {"step": 3, "acc/arc_easy": 0.5}])], tmp_path / "ab.png")
    alone, together = (figure.axes[4] for figure in figures)
    assert {line.get_label(): line.get_ydata().tolist() for line in alone.lines} == {
        "arc_easy": [0.1, 0.2],
        "mmlu": [0.25, 0.25],
    }
    assert [line.get_label() for line in together.lines] == ["a, arc_easy", "a, mmlu", "b, arc_easy"]
    with pytest.raises(UserError, match="line 1: not a row of metrics"):
        plot.read_metrics(run(tmp_path / "c", [{"step": 1, "acc/arc_easy": "high"}, {"step": 2, "loss": 1.0}]))


def test_a_font_that_was_installed_since_matplotlib_looked_is_found(monkeypatch):
    import matplotlib
    from matplotlib import font_manager

    new = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    monkeypatch.setattr(plot, "CHINESE_FONTS", ("DejaVu Sans",))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(new), str(Path(__file__))])
    assert plot.chinese_fonts() == ["DejaVu Sans"]


@pytest.mark.parametrize("name", ["Microsoft YaHei", "Hiragino Sans GB", "Noto Sans CJK JP"])
def test_a_chinese_font_of_each_system_will_do(monkeypatch, name):
    from matplotlib import font_manager

    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font_manager.FontEntry(name=name)])
    assert plot._fonts("zh") == ["DejaVu Sans", name]
