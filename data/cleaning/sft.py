"""Rows of instructions and conversations: mended, then judged by rules of their own.

Each rule was tried on 20,465 real rows (docs/en/cleaning.md): those that were mostly right there drop a row, those that
were often wrong only flag it. Length is no rule: “法国的首都是什么？” is a good prompt, and “4” a good answer.
"""

import itertools
import re

import numpy as np

from data.cleaning.reading import Raw, Unreadable, row_of, writable
from data.cleaning.text import words
from data.cleaning.text.characters import code_points, repeated_grams
from data.cleaning.text.masks import mask
from data.cleaning.text.normalise import normalise, without_code
from minillm.base.errors import UserError
from minillm.datasets.messages import ASSISTANT, SYSTEM, USER, conversations

# ---- Words of the rules. What begins with a line begins with its own spaces, [^\S\n]*: with \s* each line of a run of
# empty ones would go through the rest of the run.

PLACEHOLDER = re.compile(
    r"\W*(?:无输入|没有输入|无需输入|不需要输入|无内容|无附加输入|无输出|no ?input|no ?output|n/?a|none|null)\W*",
    re.IGNORECASE,
)
PAGE = re.compile(r"<(?:!doctype|html|head|body|div|p|a|span|ul|table|script|form|input|h[1-6])\b", re.IGNORECASE)
LAST_LINE = re.compile(r"\n[^\n]*$")
NEXT_INSTRUCTION = re.compile(
    r"\n[^\S\n]*\d{1,3}\s*[.、]\s*(?:说明|指令|instruction)\s*[:：].*", re.IGNORECASE | re.DOTALL
)
TRANSLATED_CODE = re.compile(
    r"\b(?:def|class|function)\s+[\w\u4e00-\u9fff]+（|对于范围内的"
    r"|^[^\S\n]*(?:返回|打印|导入) ?[(（]?[\w\u4e00-\u9fff]+[)）]?[^\S\n]*$"
    r"|^[^\S\n]*(?:如果|否则|对于).{1,30}[:：][^\S\n]*\n\s++\S+\s*=",
    re.MULTILINE,
)
DEFINITION = re.compile(r"\b(?:def|class|function|import|for|while|print)\b")
LINK = re.compile(r"(?:https?://|www\.)[!-~]+")
IDENTITY = re.compile(
    r"我(?:是|叫)\W{0,2}(?:chatgpt|gpt-?\d|文心一言|通义千问|claude)|我[^。\n]{0,20}由\W?(?:openai|百度|阿里)\W?(?:训练|开发|研发)"
    r"|\bI(?:'m| am) (?:chatgpt|gpt-?\d|claude)"
    r"|\bI\b[^.\n]{0,40}(?:trained|developed|created) by (?:openai|anthropic|google)",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\W*(?:(?:对不起|抱歉|很抱歉|sorry)\W{0,3}(?:但)?(?:I'm sorry)?\W{0,3})?"
    r"(?:作为(?:一个|一名)?\s?(?:AI|人工智能)|as an? (?:AI|artificial))",
    re.IGNORECASE,
)
PICTURE = re.compile(
    r"(?:这|下面的?|以下|附|上)(?:张|幅|图)?(?:图片|照片|图像)"
    r"|(?:this|the (?:following|attached)) (?:image|picture|photo)",
    re.IGNORECASE,
)
NO_PICTURE = re.compile(r"https?://|!\[")
ROLE_IN_ANSWER = re.compile(r"^[^\S\n]*(?:用户|助手|人类|human|user|assistant)\s*[:：]", re.IGNORECASE | re.MULTILINE)
ANSWER_AS_PROMPT = re.compile(r"\s*(?:答|答案|answer)\s*[:：]", re.IGNORECASE)
OTHER_LANGUAGE = re.compile(
    r"翻译|译成|译为|英文|英语|单词|字母|代码|程序|函数|脚本|正则|公式|名字|缩写|translat|english|chinese|code|function|regex|python|sql|html",
    re.IGNORECASE,
)
HANZI = re.compile("[\u4e00-\u9fff]")
LATIN = re.compile("[A-Za-z]{2,}")
LIST_OR_CODE = re.compile(r"^[^\S\n]*(?:[-*•|#>]|\d+[.、)）]|```|    )", re.MULTILINE)
ENDS = tuple("。！？.!?…”\"’'）)】》」』]}`~*；;:：|")
DAMAGED = re.compile("[\ufffd\x80-\x9f\ue000-\uf8ff]")

FEW = 15  # characters beside a link that ask for nothing that could be answered without it
REPEATED_FROM = 60  # characters
MOST_REPEATED = 0.45  # of an answer's runs of 12 characters
LONG_ECHO = 8  # characters
TRUNCATED_FROM, LAST_LINE_FROM = 60, 25  # characters


# ---- One row.


def mended(raw: Raw, masks: bool) -> dict:
    """A row as it is kept on the disk: mended, with the reason to drop it if there is one, and with flags.

    text: the whole conversation; prompt: what the user says in it; context: what else leads to its last answer, the
    system's messages and earlier answers.
    """
    document = {
        "file": raw.file,
        "number": raw.number,
        "text": "",
        "prompt": "",
        "context": "",
        "row": {},
        "mended": [],
        "size": 0,
    }
    document |= {"flags": [], "is_whole": True}
    try:
        row = writable(row_of(raw), document["mended"])
        document["size"] = len(str(row).encode())
        document["row"] = _mended_row(row, document["mended"], masks)
        document["flags"] += ["personal_data"] if "personal_data" in document["mended"] else []
        found = [_in_our_form(conversation) for conversation in conversations(document["row"])]
    except Unreadable as problem:
        return document | {"bad": problem.args}
    except UserError as problem:
        return document | {"bad": ("form", str(problem)[:200])}
    document["text"] = "\n".join(message["content"] for messages in found for message in messages)
    document["prompt"] = "\n".join(m["content"] for messages in found for m in messages if m["role"] == USER)
    document["context"] = "\n".join(m["content"] for messages in found for m in messages[:-1] if m["role"] != USER)
    for messages in found:
        reason = why_dropped(messages)
        if reason:
            return document | {"bad": reason}
        document["flags"] += [flag for flag in flags(messages) if flag not in document["flags"]]
    return document


def _in_our_form(conversation: list[dict]) -> list[dict]:
    """The messages with their role and content alone."""
    return [{"role": message["role"], "content": message["content"]} for message in conversation]


def _mended_row(value, done: list[str], masks: bool, key: str = ""):
    """The row with every text in it mended; done: gets the names of what was mended."""
    if isinstance(value, dict):
        role = str(value.get("role", value.get("from", "")))
        return {
            k: _mended_row(v, done, masks, f"{role}.{k}" if role and k in ("content", "value") else k)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [_mended_row(item, done, masks, key) for item in value]
    if not isinstance(value, str) or key in ("role", "from", "id"):
        return value
    text, names = (value, []) if PAGE.search(value) else normalise(value, has_markup=False)
    if masks:
        text, n_masked = mask(text)
        names += ["personal_data"] if n_masked else []
    is_answer = key.startswith(("assistant", "gpt")) or key in ("output", "response", "answer", "completion")
    changed = _without_next_instruction(text) if is_answer else _without_placeholder(text, key)
    names += ["next_instruction" if is_answer else "placeholder"] if changed != text else []
    done += [name for name in names if name not in done]
    return changed if names else value


def _without_next_instruction(text: str) -> str:
    """An answer up to where the next instruction of a list begins."""
    match = NEXT_INSTRUCTION.search(text)
    return text[: match.start()].rstrip() if match else text


def _without_placeholder(text: str, key: str) -> str:
    """A prompt's field without the words for “no input”, which stand alone or in its last line."""
    if key in ("input", "context") and PLACEHOLDER.fullmatch(text):
        return ""
    last = LAST_LINE.search(text)
    return text[: last.start()] if last and PLACEHOLDER.fullmatch(last[0]) else text


# ---- Rules.


def why_dropped(messages: list[dict]) -> tuple[str, str] | None:
    """(reason, in words) for which a conversation cannot be learned from; None if there is none."""
    roles = [message["role"] for message in messages if message["role"] != SYSTEM]
    if len(roles) < 2 or roles != [USER, ASSISTANT] * (len(roles) // 2):
        return "roles", f"the roles are {', '.join(roles)[:80] or 'none'}, not user and assistant in turn"
    prompts = [message["content"] for message in messages if message["role"] == USER]
    answers = [message["content"] for message in messages if message["role"] == ASSISTANT]
    for answer in answers:
        if not answer.strip() or (PLACEHOLDER.fullmatch(answer) and len(answer) > 3):
            return "empty_answer", "an answer is empty or says that there is none"
        if IDENTITY.search(answer):
            return "identity", f"the answer speaks as another model: {IDENTITY.search(answer)[0]}"
        if TRANSLATED_CODE.search(answer) and DEFINITION.search(answer):
            return (
                "translated_code",
                f"code whose keywords were translated: {TRANSLATED_CODE.search(answer)[0].strip()[:40]}",
            )
        if _repeats(answer):
            return "repetition", "the answer repeats itself"
    if any(ANSWER_AS_PROMPT.match(prompt) for prompt in prompts):
        return "swapped", "the prompt is an answer"
    for text in (*prompts, *answers):
        if _is_damaged(text):
            return "damaged", "characters were lost or read in a wrong encoding"
    for prompt in prompts:
        rest = LINK.sub("", prompt)
        if rest != prompt and len(rest.strip()) < FEW:
            return "link", "the prompt is about a link"
    return None


def _repeats(text: str) -> bool:
    text = without_code(text)
    points, borders = code_points([text])
    return (
        len(text) >= REPEATED_FROM and "```" not in text and float(repeated_grams(points, borders)[0]) > MOST_REPEATED
    )


def _is_damaged(text: str) -> bool:
    n_lost = len(DAMAGED.findall(text))
    latin_1 = sum("\xa1" <= character <= "\xff" for character in text)
    return n_lost > 0.01 * len(text) or latin_1 > 0.15 * max(len(text), 20) or any(m in text for m in words.MOJIBAKE)


def flags(messages: list[dict]) -> list[str]:
    """What may be wrong with a conversation, and too often is not."""
    found = []
    for before, message in itertools.pairwise(messages):
        if message["role"] != ASSISTANT:
            continue
        prompt, answer = before["content"], message["content"]
        tests = {
            "refusal": REFUSAL.match(answer),
            "picture": PICTURE.search(prompt) and not NO_PICTURE.search(prompt),
            "echo": len(prompt.strip()) >= LONG_ECHO and _starts_with(answer, prompt),
            "truncated": is_truncated(answer),
            "language": _is_of_other_language(prompt, answer),
            "role_in_answer": ROLE_IN_ANSWER.search(answer) and not ROLE_IN_ANSWER.search(prompt),
        }
        found += [name for name, holds in tests.items() if holds]
    return found


def _starts_with(answer: str, prompt: str) -> bool:
    """Whether an answer begins with its whole prompt and says little more, or the same again."""
    return answer.strip().startswith(prompt.strip())


def is_truncated(answer: str) -> bool:
    """Whether an answer stops in a sentence, or in a block of code."""
    if answer.count("```") % 2:
        return True
    text = answer.rstrip()
    last = text.rpartition("\n")[2]
    if len(text) < TRUNCATED_FROM or len(last) < LAST_LINE_FROM or text.endswith(ENDS):
        return False
    return not LIST_OR_CODE.search(text)


def _is_of_other_language(prompt: str, answer: str) -> bool:
    """Whether prompt and answer are of different languages, and the prompt does not ask for that."""
    if OTHER_LANGUAGE.search(prompt.replace("用中文", "")) or PAGE.search(answer) or "```" in answer:
        return False
    n_hanzi = np.array([len(HANZI.findall(text)) for text in (prompt, answer)])
    n_latin = np.array([len(LATIN.findall(text)) for text in (prompt, answer)])
    is_chinese, is_latin = n_hanzi > 2 * n_latin, n_latin > 2 * n_hanzi
    is_long = (n_hanzi + n_latin)[1] >= 5
    return bool(is_long and ((is_chinese[0] and is_latin[1]) or (is_latin[0] and is_chinese[1])))
