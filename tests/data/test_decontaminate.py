"""Rows of benchmarks in texts: the runs that numpy finds are those of plain sets of words."""

import random

import pytest

from data import decontaminate
from data.decontaminate import RUN, SHORTEST, build_index, found_in, tokens_of

ZH = "小明每天早上吃三个鸡蛋然后去学校上课他的朋友叫小红"
EN = "Janet has 16 ducks that lay eggs, and she sells the rest of them at the market every day"


def plain_tokens(text: str) -> list[str]:
    """The oracle's tokens of Chinese and English text: one character after another."""
    tokens = []
    word = ""
    for character in f"{text.lower()} ":
        is_alone = "\u4e00" <= character <= "\u9fff"
        if character.isalnum() and not is_alone:
            word += character
            continue
        tokens += [word] if word else []
        tokens += [character] if is_alone else []
        word = ""
    return tokens


def plainly_found(rows: list[str], text: str) -> list[int]:
    tokens = plain_tokens(text)
    found = []
    for number, row in enumerate(rows):
        own = plain_tokens(row)
        length = min(RUN, len(own))
        if length < SHORTEST:
            continue
        runs = {tuple(own[i : i + length]) for i in range(len(own) - length + 1)}
        if any(tuple(tokens[i : i + length]) in runs for i in range(len(tokens) - length + 1)):
            found.append(number)
    return found


def words(text: str) -> list[str]:
    tokens = tokens_of(text)
    return ["".join(map(chr, tokens.codes[begin:end])) for begin, end in zip(tokens.begins, tokens.ends, strict=True)]


def test_tokens_are_words_and_single_chinese_characters():
    assert words("Don't  STOP: 3,5 GPT4模型，Ｆｕｌｌ") == ["don", "t", "stop", "3", "5", "gpt4", "模", "型", "full"]
    assert words("cafe\u0301") == words("CAFÉ") == ["café"]
    assert words("カタカナ हिन्दी") == ["カ", "タ", "カ", "ナ", "हिन्दी"]
    assert words("") == words(" …") == []


@pytest.mark.parametrize("task", [f"{EN}.", ZH * 2])
def test_what_all_rows_begin_with_tells_of_none_of_them(task):
    """It would call every row found, and each text that has it would be compared with all of them."""
    few, many = decontaminate.MOST_ROWS, decontaminate.MOST_ROWS + 1
    rows = [f"{task} What did number {n} do on the last day of all, and with whom, and why?" for n in range(many)]
    index = build_index(rows)
    asked = f"A text. {rows[7]} And more."
    assert [[match.row for match in found] for found in found_in(index, [task, asked, ""])] == [[], [7], []]
    assert index.too_short == [] and build_index([task] * many).too_short == list(range(many))
    assert len(found_in(build_index(rows[:few]), [task])[0]) == few  # the questions about one passage


@pytest.mark.parametrize("at_once", [64, 1 << 19])
def test_found_is_what_plain_sets_of_words_find(monkeypatch, at_once):
    monkeypatch.setattr(decontaminate, "CHARACTERS_AT_ONCE", at_once)
    monkeypatch.setattr(decontaminate, "OVERLAP", 200)
    draw = random.Random(0)
    vocabulary = ["a", "b", "cd", "x1", "红", "楼", "梦", "？", ","]

    def text(n: int) -> str:
        return "".join(draw.choice(vocabulary) + draw.choice(["", " ", "\n"]) for _ in range(n))

    texts = [text(draw.randrange(0, 300)) for _ in range(60)]
    rows = [text(draw.randrange(1, 40)) for _ in range(40)]
    for _ in range(40):  # parts of texts, so that there is something to be found
        begin = draw.randrange(200)
        rows.append(draw.choice(texts)[begin : begin + draw.randrange(8, 60)])
    found = found_in(build_index(rows), texts)
    assert [[match.row for match in matches] for matches in found] == [plainly_found(rows, text) for text in texts]
    assert any(found)


def test_thirteen_tokens_count_and_twelve_do_not():
    index = build_index([ZH, EN])
    assert [match.row for match in found_in(index, [f"从前，{ZH[3 : 3 + RUN]}。"])[0]] == [0]
    assert found_in(index, [f"从前，{ZH[3 : 2 + RUN]}。"]) == [[]]
    (match,) = found_in(index, [f"We know: {EN.upper().replace(' ', '  ')}!"])[0]
    assert match.run == "janet has 16 ducks that lay eggs and she sells the rest of"


def test_short_rows_are_found_whole_and_very_short_ones_never():
    index = build_index(["How is a whetstone used?", "dresser", ["", "What is a gene made of"]])
    assert index.too_short == [1]
    assert [m.row for m in found_in(index, ["she asked how is a WHETSTONE used, then left; dresser"])[0]] == [0]
    assert found_in(index, ["how is a whetstone"]) == [[]]
    assert [m.row for m in found_in(index, ["so what is a gene made of?"])[0]] == [2]


def test_a_run_does_not_go_over_the_end_of_a_text():
    words_of_row = EN.split()
    halves = [" ".join(words_of_row[:7]), " ".join(words_of_row[7:])]
    assert found_in(build_index([EN]), halves) == [[], []]
    assert found_in(build_index([]), halves) == [[], []]


def test_the_run_is_shown_as_it_reads():
    (match,) = found_in(build_index(["在 Python 里怎样打印 3 个数字"]), ["问：在Python里怎样打印3个数字？"])[0]
    assert match.run == "在 python 里怎样打印 3 个数字"
