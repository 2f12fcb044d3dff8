"""Rows of instructions: what is mended, dropped, flagged and left alone."""

import json

import pytest

from data import clean
from data.cleaning import sft
from data.cleaning.reading import Raw
from minillm.base.errors import UserError

LONG = "长江发源于唐古拉山脉，流经青海、西藏、四川、云南、重庆、湖北、湖南、江西、安徽、江苏和上海，全长六千三百多公里"
LONG += "，流域面积一百八十万平方"


def row(prompt: str, answer: str, **more) -> dict:
    return {"instruction": prompt, "output": answer, **more}


def mended(value) -> dict:
    return sft.mended(Raw(1, "row", value, 0), masks=True)


@pytest.mark.parametrize(
    "value",
    [
        row("法国的首都是什么？", "巴黎"),
        row("三乘以三减去五等于几？只写数字。", "4"),
        row("改正错别字，没有就原样返回。", "今天天气很好。", input="今天天气很好。"),
        row("把这句话翻译成英文：他昨天没有来。", "He did not come yesterday, so we waited for him."),
        row("用 Python 写一个函数。", "def f(n):\n    return n + 1"),
        row("写一个最简单的网页。", "<!DOCTYPE html>\n<html><body><b>你好</b> &lt;</body></html>"),
        row("解释 GPT-3。", "GPT-3 是由 OpenAI 开发的语言模型，它由大量文本训练而成。"),
        row("画流程图。", "```\n" + "+----+\n|    |\n" * 20 + "```"),
        row("教我进别人的邮箱。", "很抱歉，我不能帮助你进入他人的邮箱，这侵犯隐私。"),
        row("列出五种水果。", "1. 苹果\n2. 香蕉\n3. 橙子\n4. 葡萄\n5. 西瓜"),
        {
            "messages": [
                {"role": r, "content": c}
                for r, c in (("system", "友善。"), ("user", "谢谢"), ("assistant", "不客气。"))
            ]
        },
    ],
)
def test_good_rows_stay_as_they_are(value):
    document = mended(value)
    assert "bad" not in document and document["row"] == value
    assert not document["flags"] and not document["mended"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (row("写一个标题。", "  \n　"), "empty_answer"),
        (row("画一座房屋。", "&lt;nooutput&gt;"), "empty_answer"),
        (row("你是谁开发的？", "我是ChatGPT，由OpenAI训练的大型语言模型。"), "identity"),
        (row("写阶乘。", "def 阶乘（数字）：\n  结果 = 1\n  返回 结果"), "translated_code"),
        (row("给我建议。", "要多读书，" * 30), "repetition"),
        (row("总结：https://www.example.com/2010/07/05/phone.html", "文章介绍了一款手机。"), "link"),
        (row("说说减肥。", "每天\ufffd\ufffd走\ufffd\ufffd，少吃"), "damaged"),
        (row("答：水的沸点是一百摄氏度。", "问：水的沸点是多少？"), "swapped"),
        ({"messages": [{"role": "user", "content": "在吗"}, {"role": "user", "content": "喂"}]}, "roles"),
        ({"title": "x"}, "form"),
        ([1], "unreadable"),
    ],
)
def test_bad_rows_are_dropped_for_their_reason(value, reason):
    assert mended(value)["bad"][0] == reason


@pytest.mark.parametrize(
    ("value", "flag"),
    [
        (row("写一首关于孤独的诗。", "作为一个人工智能语言模型，我没有情感。"), "refusal"),
        (row("描述下面这张图片里的人。", "有人在跑步。"), "picture"),
        (row("请解释什么是区块链技术。", "请解释什么是区块链技术。它是一种账本。"), "echo"),
        (row("介绍一下长江。", LONG), "truncated"),
        (row("请用中文介绍北京的历史。", "Beijing has a history of more than three thousand years."), "language"),
        (row("今天星期几？", "星期三。\n用户：那明天呢？\n助手：星期四。"), "role_in_answer"),
        (row("写寄件备注。", "电话13900000001，请轻放。"), "personal_data"),
    ],
)
def test_doubtful_rows_are_flagged_and_kept(value, flag):
    document = mended(value)
    assert document["flags"] == [flag] and "bad" not in document


def test_rows_are_mended_before_they_are_judged():
    assert mended(row("比大小。", "3 &lt; 5&nbsp;好"))["row"]["output"] == "3 < 5 好"
    assert mended(row("讲故事。\n无输入", "从前有一个人。"))["row"]["instruction"] == "讲故事。"
    assert mended(row("讲故事。", "从前有一个人。", input="没有输入。"))["row"]["input"] == ""
    assert mended(row("列出水果。", "苹果、梨。\n11. 说明：写诗"))["row"]["output"] == "苹果、梨。"


def test_a_file_of_rows_is_cleaned(tmp_path):
    rows = [row("列出五种常见的水果。", "苹果、香蕉、梨。"), row("列出五种常见的水果：", "橙子、葡萄、西瓜。")]
    passage = "水的沸点在标准大气压下是一百摄氏度，高原上气压低，沸点也低。"
    rows += [
        row("概括这一段。", "气压低则沸点低。", input=passage),
        row("翻译这一段。", "Water boils at 100.", input=passage),
    ]
    rows += [row(f"What is the opposite of '{word}'?", answer) for word, answer in (("thin", "thick"), ("fat", "slim"))]
    rows += [row("写一个标题。", ""), row("谢谢", "不客气。")]
    shared_line = "这是许多回答里都有的一行，它不是网页的页脚。"
    rows += [row(f"问题：{word}是什么？", f"{word}，见下。\n{shared_line}") for word in "天地玄黄宇宙洪荒日月盈昃"]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    config = clean.Config(input=(str(tmp_path / "rows.json"),), out=str(tmp_path / "out"), sft=True, workers=1)
    result = clean.clean(config)
    assert {name: counts["documents"] for name, counts in result["by_reason"].items()} == {
        **{"near_duplicate": 1, "empty_answer": 1}
    }
    lines = (tmp_path / "out" / "kept-00000.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["output"] for line in lines] == [rows[i]["output"] for i in (0, 2, 3, 4, 5, *range(7, 20))]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rules", "mine.toml", "mine.toml"),
        ("languages", ("zh", "ja"), "zh ja"),
        ("recurring", 0, "0"),
        ("field", "body", "body"),
        ("split", "blank", "blank"),
    ],
)
@pytest.mark.parametrize("more", [{"input": ("rows.jsonl",), "out": "out"}, {"explain": "rows.jsonl:1"}])
def test_options_that_conversations_make_no_use_of_are_refused(name, value, said, more):
    with pytest.raises(UserError, match=f"--{name} {said}: means nothing with --sft"):
        clean.Config(sft=True, **more, **{name: value})


def test_the_next_step_is_that_of_rows(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "Name a river.", "output": "The Nile."}))
    out = str(tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["", "--sft", "true", "--input", str(tmp_path / "rows.jsonl"), "--out", out])
    clean.main()
    assert capsys.readouterr().out.endswith(f"next: python train_sft.py --data {out}/kept-00000.jsonl\n")
    assert (tmp_path / "out" / "kept-00000.jsonl").exists()


def test_a_row_is_explained(tmp_path):
    rows = [row("写寄件备注。", "电话13900000001，&lt;轻放。"), row("写一个标题。", ""), row("谢谢", "不客气。")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = [clean.explain(clean.Config(explain=f"{tmp_path / 'rows.jsonl'}:{n}", sft=True)) for n in (1, 2, 3)]
    assert said[0].splitlines() == [
        *("写寄件备注。⏎电话[phone]，<轻放。", "mended: entities, personal_data", "flags: personal_data"),
        "kept, unless it is a copy",
    ]
    assert said[1].endswith("dropped as empty_answer: an answer is empty or says that there is none")
    assert said[2].splitlines() == ["谢谢⏎不客气。", "kept, unless it is a copy"]


def talk(*contents: str, system: str = "") -> dict:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


def test_the_same_prompt_in_another_context_is_no_copy(tmp_path):
    long = "把下面这段话改写得更口语化一些，保留所有的数字，不要超过一百个字，也不要加任何解释，只写改写之后的文字"
    good = [
        talk("Translate: good morning", "Bonjour", system="Answer in French."),
        talk("Translate: good morning", "Guten Morgen", system="Answer in German."),
        talk("Translate: good morning", "早上好"),
        talk("猜一个数。", "五十。", "大了。", "二十五。"),
        talk("猜一个数。", "四十。", "大了。", "二十。"),
        *(talk(f"{long}。\n{long[::-1]}", answer, system=f"{long}，{answer}。") for answer in "甲乙"),
    ]
    copies = [
        talk("Translate: Good morning!", "Salut", system="answer in  french."),
        talk("猜一个数！", "五十。", "大了！", "三十。"),
        talk(f"{long}：\n{long[::-1]}", "丙", system=f"{long}，甲。"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps([*good, *copies]))
    config = clean.Config(input=(str(tmp_path / "rows.json"),), out=str(tmp_path / "out"), sft=True, workers=1)
    assert clean.clean(config)["by_reason"]["near_duplicate"]["documents"] == len(copies)
    lines = (tmp_path / "out" / "kept-00000.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["messages"] for line in lines] == [row["messages"] for row in good]
    dropped = (tmp_path / "out" / "dropped" / "near_duplicate.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["cleaning"]["of"].rpartition(":")[2] for line in dropped] == ["1", "4", "6"]
