"""Mending, cutting, masking and measuring single texts, against what a reader expects of them."""

import random
import unicodedata

import numpy as np
import pytest

from data.cleaning import reading
from data.cleaning.rules import decide, read_rules
from data.cleaning.text import characters
from data.cleaning.text.features import LANGUAGES, NAMES, features, languages
from data.cleaning.text.lines import cut_lines, cut_recurring, line_hashes, recurring
from data.cleaning.text.masks import is_identity_number, mask
from data.cleaning.text.normalise import normalise
from minillm.base.errors import UserError

ZH = "清晨的河面上浮着一层薄雾，渔船还没有出港。老周坐在码头的石阶上，慢慢地补一张旧网。"
EN = "The boats had not left the harbour yet. Old Zhou sat on the stone steps and mended a net."
ODE = "采薇采薇，薇亦作止。曰归曰归，岁亦莫止。靡室靡家，玁狁之故。不遑启居，玁狁之故。"


def measured(text: str, **known: float) -> dict[str, float]:
    row = [[known.get(name, 0) for name in ("cut", "personal", "damaged", "stub")]]
    return dict(zip(NAMES, features([text], np.array(row, float))[0].tolist(), strict=True))


def reason(text: str) -> str | None:
    rules = read_rules()
    (number,) = decide(rules, np.array([list(measured(text).values())]))
    return rules[number].name if number >= 0 else None


# ---- normalise


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("\ufeff你好\u200b世界\u00a0a", "你好世界 a", "invisible"),
        ("a\r\nb\rc", "a\nb\nc", "line_ends"),
        ("3 &amp;lt; 5&nbsp;ok", "3 < 5 ok", "entities"),
        ("ａｂｃ１２，！", "abc12，！", "full_width"),
        ("e\u0301te\u0301", "été", "nfc"),
        ("好" + "\u0326" * 40 + "的", "好的", "stacked_marks"),
        ("第 一 条 为 了 加 强 管 理 ，制 定 本 办 法 。", "第一条为了加强管理，制定本办法。", "spaced_hanzi"),
        ("Itâ€™s what weâ€™ve seen â€” all of it", "It’s what we’ve seen — all of it", "mojibake"),
        ("H<sub>2</sub>O 与<ruby>密钥<rt>key</rt></ruby>", "H2O 与密钥（key）", "inline_tags"),
        ('一<font color="red">红<b>字</b></font>，<B>粗</B>字', "一红字，粗字", "inline_tags"),
        ("第一行<br>第二行<br/>\n<i><b>斜粗</b></i>", "第一行\n第二行\n\n斜粗", "inline_tags"),
        ("a\x07b", "ab", "controls"),
    ],
)
def test_what_can_be_mended_is_mended_and_named(before, after, what):
    assert normalise(before) == (after, [what])
    assert normalise(after) == (after, [])


@pytest.mark.parametrize(
    "text",
    [
        ZH,
        EN,
        "“是吗？”……（完）：！",
        "Ünïted à la carte, “Ã©” is odd",
        "我 爱 Python 和 C",
        "a && b; AT&T",
        "  两格\n\n缩进",
        "HTML <ruby> 标签\n用 <b> 标签把字变粗，用 <br /> 换行，用<i>标签把字变斜。",
        "Put it between <b> and </b>, or end the line with a <br> tag; the <rt> element holds a reading.",
        'echo "Hello<br />World"\nprint("<b>5</b>")\ndocument.write("a<br>b");',
        "<p>这是<b>粗体</b>文本。</p>\n<td>H<sub>2</sub>O</td>",
        "if (a<b>c) return; x = a<i>b",
        "<html>\n<b>\n<br>\n</b>\n</html>",
        "<abbr>\n<b>\n\n<big>\n<br>\n<center>",
    ],
)
def test_good_text_stays_as_it_is(text):
    assert normalise(text) == (text, [])


def test_text_read_as_latin_1_is_read_again():
    assert normalise(ZH.encode().decode("latin-1"))[0] == ZH


def test_code_is_left_alone():
    text = "看代码：\n```html\n<b>&lt;p&gt;</b>\n----\n```\n完"
    assert normalise(text)[0] == text and cut_lines(text)[0] == text


# ---- masks


def test_personal_data_is_masked_and_counted():
    text = "电话 13912345678，信箱 li.ming@mail.cn，证号 11010519491231002X，+44 20 7946 0018。"
    masked, n = mask(text)
    assert n == 4 and masked == "电话 [phone]，信箱 [mail]，证号 [id]，[phone]。"
    others = "圆周率 3.14159265358979，版本 2.13912345678，订单 20231391234567890，12356 与 110"
    assert mask(others) == (others, 0)


def test_the_check_digit_of_identity_numbers():
    assert is_identity_number("11010519491231002X")  # the example in GB 11643-1999
    assert not is_identity_number("110105194912310021")


# ---- lines


def test_boilerplate_is_cut_and_text_is_not():
    page = f"首页 | 关于我们 | 联系我们\n{ZH}\n上一篇：秋天\n版权所有 某公司 京ICP备12345号\nhttps://example.com/a\n----\n![图](a.png)"
    text, n_cut, n_links = cut_lines(page)
    assert text == ZH and n_cut > 30 and n_links > 10
    assert cut_lines("见[文档](https://example.com/x)的说明")[0] == "见文档的说明"
    for good in (ZH, EN, "He went\nhome.\nThen he said “more”.", "a[0](x)", "| a | b |\n|---|---|\n| 1 | 2 |"):
        assert cut_lines(good) == (good, 0, 0)


def test_recurring_lines_are_counted_by_document_and_cut():
    footer = "本站内容由网友上传，如有侵权请联系我们删除。"
    texts = [f"{ZH}第{i}篇，各不相同。\n{footer}\n{footer}" for i in range(10)]
    hashes = [np.array(line_hashes(text), np.uint64) for text in texts]
    for at_once in (1 << 20, 3):  # in one part of the range, and in many
        found = recurring(lambda: hashes, 10, at_once)
        assert len(found) == 1 and not len(recurring(lambda: hashes, 11, at_once))
    assert cut_recurring(texts[3], set(found.tolist())) == (f"{ZH}第3篇，各不相同。", 0, 2 * len(footer))
    mostly_footer = f"短\n{footer}"
    assert cut_recurring(mostly_footer, set(found.tolist())) == (mostly_footer, 0, 0)
    assert line_hashes(footer) == []  # a document of one line: copies of it are copies


def cut_where_all_share(shared: str, n: int = 10) -> str:
    """What is left of `shared` in one of n documents that all hold it between sentences of their own."""
    texts = [f"{ZH}第{i}篇，各不相同。\n{shared}\n第{i}篇到这里为止，后面没有了。" for i in range(n)]
    hashes = [np.array(line_hashes(text), np.uint64) for text in texts]
    cut = cut_recurring(texts[7], set(recurring(lambda: hashes, 10).tolist())).text
    assert cut.startswith(ZH) and cut.endswith("后面没有了。")
    return "\n".join(cut.split("\n")[1:-1]).strip("\n")


@pytest.mark.parametrize(
    "menu",
    [
        "推荐文章\n留言小本\n编程语言\n操作系统\n数据库",
        "\t\tHTML\n\t\tCSS\n\n\t\tJavaScript\n\t\tSQL\n\t\t更多",
        "2013年12月 (5)\n2013年11月 (3)\n2013年10月 (8)\n2013年09月 (1)",
        "\t\t本站内容仅用于学习，我们不保证它的正确性。",
    ],
)
def test_menus_are_cut_whatever_the_length_of_their_lines(menu):
    assert cut_where_all_share(menu) == ""
    assert cut_where_all_share(menu, n=9) == menu.strip("\n")


@pytest.mark.parametrize(
    "shared",
    [
        "是的。\n不是。\n“走吧！”\n为什么？\n好。",
        "床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。",
        "更多内容\n作者简介",  # too few lines for a menu
        '<script type="text/javascript">\nvar oldest = items[0];\nshow(oldest)\n</script>\n</body>\n</html>',
        "    try:\n        import numpy\n    except ImportError:\n        raise NotImplementedError\n    return None",
        "#include <stdio.h>\nint main(void)\n{\n    return EXIT_SUCCESS;\n}",
        "| 属性 | 描述 |\n|---|---|\n| name | 规定控件的名称，可以省略 |\n| value | 规定控件的值 |",
        "这篇文章的第一段写得很长，它讲了作者为什么要写这篇文章，以及读者能从里面学到些什么样的东西。",
    ],
)
def test_lines_of_texts_that_recur_are_kept(shared):
    assert cut_where_all_share(shared) == shared


def test_long_sentences_are_cut_where_five_times_as_many_documents_hold_them():
    notice = "本站的全部内容只供学习和交流之用，我们不保证它们都是正确的，也不对使用它们造成的任何损失负责。"
    assert cut_where_all_share(notice, n=49) == notice
    assert cut_where_all_share(notice, n=50) == ""


def test_a_page_that_is_a_menu_stays_whole():
    menu = "推荐文章\n留言小本\n编程语言\n操作系统\n数据库"
    hashes = set(line_hashes(menu))
    assert cut_recurring(f"{menu}\n短", hashes) == (f"{menu}\n短", 0, 0)
    assert cut_recurring(f"{menu}\n{ZH}", hashes).text == ZH  # also where the menu is most of it
    assert cut_recurring(f"{menu * 9}\n{ZH}", hashes).text.endswith(ZH)


# ---- characters and features, against Python's own loops


def test_kinds_of_characters_by_their_names_in_unicode():
    counts = characters.kind_counts(*_points(["aé我龘かハ한Яα1。,★\ufffd\ue000 ", ""]), 2)
    got = {name: int(n) for name, n in zip(characters.KINDS, counts[0], strict=True) if n}
    expected = {"latin": 1, "latin_1": 1, "function_hanzi": 1, "rare_hanzi": 1, "kana": 2, "hangul": 1, "cyrillic": 1}
    expected |= {"other_letter": 1, "digit": 1, "end_mark": 1, "punctuation": 1, "symbol": 1, "damaged": 2, "space": 1}
    assert got == expected and counts[1].sum() == 0
    table = characters.kind_table()
    letters = [characters.KIND[name] for name in characters.LETTERS]
    for point in random.Random(0).sample(range(0x20000), 5000):
        is_letter = unicodedata.category(chr(point))[0] == "L"
        assert (table[point] in letters) == (is_letter or chr(point) == "〇"), hex(point)


def _points(texts):
    points, borders = characters.code_points(texts)
    return points, characters.owners(borders)


def test_repeated_grams_and_runs_as_counted_one_by_one():
    rng = random.Random(1)
    texts = ["".join(rng.choices("甲乙", k=rng.randrange(0, 90))) for _ in range(60)] + [ZH * 3, "", "哈" * 50]
    points, borders = characters.code_points(texts)
    shares = characters.repeated_grams(points, borders)
    runs = characters.longest_run(points, borders)
    for text, share, run in zip(texts, shares, runs, strict=True):
        grams = [text[i : i + 12] for i in range(len(text) - 11)]
        assert share == pytest.approx(1 - len(set(grams)) / len(grams) if grams else 0)
        longest = max((n for n in range(1, 60) if any(c * n in text for c in set(text))), default=0)
        assert run == (longest if longest > 2 else 0)


@pytest.mark.parametrize("sign", ["0", "f", "！", "哈", "/"])
def test_a_long_run_is_measured_against_the_length(sign):
    shuffled = [random.Random(i) for i in range(40)]
    article = "\n".join(f"{''.join(rng.sample(ZH + EN, 60))}。" for rng in shuffled)  # 2,500 characters
    assert reason(f"{article}\n{sign * 60}\n{ZH}") is None
    assert reason(f"{ZH}{sign * 40}") == (None if sign == "/" else "longest_run")  # slashes are a ruler in code


def test_each_kind_of_bad_text_has_its_reason():
    garbled = ZH.encode().decode("gb18030", "replace")
    assert reason(garbled) in ("damaged", "rare_hanzi", "mojibake")
    assert reason("锟斤拷" * 9) == "mojibake"
    assert reason("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。") == "kana"
    assert reason("В начале июля, в чрезвычайно жаркое время, под вечер, один человек вышел.") == "cyrillic"
    assert reason("iphone case, leather cover, cheap glass, screen protector, " * 3) == "english_words"
    assert reason("★☆★☆★☆ 欢迎光临 ◆◇◆◇◆◇★☆★☆★☆") == "symbols"
    assert reason("加微信：abc123456，日赚五百，兼职名额有限，先到先得，当天日结。") == "sales"
    assert reason(ZH * 9) == "repeated_grams"
    assert reason("13.25 14.08 13.97 12.66 15.21 14.33") == "digits"


@pytest.mark.parametrize(
    "text", [ZH, EN, ODE, "月落乌啼霜满天，江枫渔火对愁眠。", "“去吗？”\n“去。”\n“那走吧。”", "水的沸点是一百摄氏度。"]
)
def test_good_text_is_kept(text):
    assert reason(text) is None


FORM = '<form action="a.php">\n<input type="text" name="q">\n<input type="submit" value="提交">\n</form>'
ABOUT_FORMS = (
    "下面是一个最简单的表单，里面有一个文本框和一个按钮：\n{}\n浏览器把用户写的内容发给服务器，由那里的程序来处理。"
)
STYLED = '<p style="text-indent:2em;"><span style="font-size:14px;">{}</span></p>'
SHEET = ".nav{float:left;width:980px}.nav li{display:inline;padding:4px}a:hover{color:#f60}#foot{clear:both}"
SCRIPT = "var q = q || [];\nq.push(['_account', 'UA-0']);\n(function() {\n  document.body.append(window.ga);\n})();"


@pytest.mark.parametrize(
    "text",
    [
        ABOUT_FORMS.format(FORM),
        ABOUT_FORMS.format("\n".join(f"<{name}>" for name in ("a", "abbr", "area", "base", "br", "form"))),
        "用 <b> 标签可以把字变粗，用 <i> 标签可以把字变斜，而要在一行里换到下一行，就要用到 <br /> 这个标签。\n" + FORM,
        "\n".join(f"<{name}>" for name in ("abbr", "area", "base", "basefont", "blockquote", "button", "canvas"))
        + "\n<fieldset> 标签把表单里相关的元素放在一起，浏览器在它们周围画一个框，框上还可以写一个标题。\n"
        + FORM,
        "The <td> tag makes a cell of a table, and a row of cells stands in a <tr>:\n<tr>\n  <td>1</td>\n</tr>",
        f"样式表由规则组成，每条规则先写选择器，再写属性和值。把鼠标移到链接上，颜色就变了，试试看：\n{SHEET}",
        "闭包是一个函数和它出生时的环境，环境里的变量在函数返回之后还在，所以下面的计数不会归零：\n" + SCRIPT,
    ],
)
def test_a_lesson_on_pages_is_kept_with_its_examples(text):
    assert reason(text) is None


@pytest.mark.parametrize("language", ["Java", "C", "Go", "Rust"])
def test_code_of_languages_with_braces_is_no_code_of_pages(language):
    lines = {
        "Java": "public String get{0}() {{\n  if (this.{0} == null) {{\n    load();\n  }}\n  return {0};\n}}",
        "C": "static int get{0}(struct row *r) {{\n  while (r->next) {{\n    r = r->next;\n  }}\n  return r->{0};\n}}",
        "Go": "func (r *Row) Get{0}() string {{\n  for i := range r.All() {{\n    use(i)\n  }}\n  return r.{0}\n}}",
        "Rust": "fn get{0}(&self) -> u32 {{\n  if self.has({0}) {{\n    self.load()\n  }}\n  self.{0}\n}}",
    }[language]
    code = "\n".join(lines.format(name) for name in ("name", "age", "city", "zip", "mail", "phone", "note"))
    assert measured(code)["page_code"] == 0
    assert measured(SHEET)["page_code"] > 3.5


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("".join(map(STYLED.format, ZH.split("，"))), "tags"),
        ("\n".join(map(STYLED.format, ZH.split("，"))), "tags"),
        (f"<!doctype html>\n<html>\n<body>\n{STYLED.format(ZH)}\n{FORM}\n</body>\n</html>", "tags"),
        (f'{ZH}<a class="more" href="/a/1234.html" target="_blank">更多</a>', "tags"),
        (f"{SHEET}\n{SCRIPT}", "page_code"),
        (f"首页\n{SHEET}\n{SCRIPT}\n{SHEET}", "page_code"),
    ],
)
def test_what_is_left_of_a_page_is_dropped(text, rule):
    assert reason(text) == rule


def test_a_feature_that_says_nothing_holds_for_no_rule():
    values = measured(ZH)
    assert np.isnan(values["english_words"]) and np.isnan(values["function_hanzi"])
    assert np.isnan(measured(EN)["repeated_grams"])  # shorter than 100 characters


def test_languages_by_script():
    texts = [ZH, EN, "これはペンです。", "안녕하세요", "Привет, мир", "你好 world", "สวัสดีชาวโลก"]
    names = ("zh", "en", "ja", "ko", "ru", "zh", "other")
    assert [LANGUAGES[i] for i in languages(texts)] == list(names)


# ---- rules


def test_a_file_changes_single_rules(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[digits]\nbelow = 0.1\n[short]\ndo = "flag"\n[kana]\ndo = "nothing"\n')
    rules = {rule.name: rule for rule in read_rules(file)}
    assert (rules["digits"].above, rules["digits"].below) == (None, 0.1)
    assert rules["short"].do == "flag" and "kana" not in rules
    assert "kana" not in {rule.name for rule in read_rules(None, ("zh", "ja"))}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[digit]\nabove=1", "digits"),
        ("[digits]\nover=1", "above"),
        ('[digits]\nabove="x"', "number"),
        ('[digits]\ndo="x"', "drop"),
    ],
)
def test_a_wrong_rule_is_named(tmp_path, text, words):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_rules(file)


# ---- reading


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "big5", "utf-16"])
def test_encodings_are_recognized(encoding):
    text = "臺北的冬天並不算冷，只是雨多。巷口的麵攤一年四季都開著。" if encoding == "big5" else ZH
    assert reading.decoded(text.encode(encoding)) == text


def test_bytes_of_no_encoding_are_not_guessed():
    noise = bytes(random.Random(2).choices(range(128, 256), k=400))
    with pytest.raises(reading.Unreadable):
        reading.decoded(noise)
    assert reading.decoded(ZH.encode() + b"\xff" + ZH.encode()) == ZH + "\ufffd" + ZH
