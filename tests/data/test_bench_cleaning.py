"""The speed of cleaning is measured, whichever other tools are installed."""

from data.bench_cleaning import Config, measure

OTHERS = ["datasketch,", "datatrove,", "datatrove,"]


def test_cleaning_is_measured_step_by_step(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "老周坐在码头的石阶上，慢慢地补一张旧网，雾便散了。"}\n' * 20, encoding="utf-8"
    )
    measure(Config(data=str(tmp_path / "a.jsonl")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("20 documents")
    assert [line.split()[0] for line in lines[1:]] == ["mending", "features", "signatures", "together", *OTHERS]
