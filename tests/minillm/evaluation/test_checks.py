"""Reward functions: what each gives, and that whatever goes wrong in one is said."""

import threading

import pytest

from minillm.base.errors import UserError
from minillm.evaluation.checks import RewardFunction, load_term, split_terms, weighted_sum


def load_reward(spec: str, time_limit_s: float = 60.0) -> RewardFunction:
    """The function that `spec` means, as `Rewards` makes it of terms that are no models."""
    return weighted_sum([(weight, load_term(term, time_limit_s)) for weight, term in split_terms(spec)])


def values(spec: str, answers: list[str], right: str | None = None, time_limit_s: float = 60.0, **row) -> list[float]:
    """What the function that `spec` means gives to answers of one prompt."""
    row = row if right is None else {"answer": right, **row}
    n = len(answers)
    return load_reward(spec, time_limit_s)(["q"] * n, answers, [row] * n)


@pytest.mark.parametrize(
    ("spec", "right", "answers", "expected"),
    [
        ("exact", "Red cat.", ["Red cat", " Red  cat. ", "red cat", ""], [1, 1, 0, 0]),
        ("number", "72", ["so 3 + 69 = 72.", "72 or 73", "1,072", "none", "", "72.0", "７２"], [1, 0, 0, 0, 0, 1, 1]),
        ("number", "-1,072.50", ["it is −1072.5", "1072.5"], [1, 0]),
        ("words", "a, b and c", ["c b a", "a、b和c", "a b"], [1, 1, 0]),
        (r"format:<think>.*</think>\s*\d+", None, ["<think>a\nb</think> 7", "7", "<think></think>7 "], [1, 0, 0]),
        ("format:a{1,2},3", None, ["aa,3", "a"], [1, 0]),
        ("length:4", None, ["", "abcd", "abcde", "abcdef", "abcdefgh", "a" * 99], [1, 1, 0.75, 0.5, 0, 0]),
        ("0.7*number,0.3*length:4", "7", ["7", "8", "7  7", "000000000000007"], [1, 0.3, 1, 0.7]),
        ("number, length:2", "7", ["7", "8888"], [2, 0]),
        ("-.5*number", "7", ["7", "8"], [-0.5, 0]),
        ("2*format:a,b,0.5*words", "a b", ["a,b", "b,a"], [2.5, 0.5]),
    ],
)
def test_each_function_by_hand(spec, right, answers, expected):
    assert values(spec, answers, right) == pytest.approx(expected)


def test_the_rule_of_the_row():
    assert values("check", ["it is 7", "7"], "7", check="number") == [1, 1]
    assert values("check", ["it is 7", "7"], "7") == [0, 1]
    with pytest.raises(UserError, match=r"reward check: row 1 of 1 \('q'\): check 'story' is none of exact"):
        values("check", ["7"], "7", check="story")


def test_terms_are_split_where_one_begins():
    assert split_terms("0.5*out/reward, 0.5*my.py:f") == [(0.5, "out/reward"), (0.5, "my.py:f")]
    assert split_terms("format:[a,b]{1,3},length:9") == [(1, "format:[a,b]{1,3}"), (1, "length:9")]
    assert split_terms("a.py:f,exact,b.py:g") == [(1, "a.py:f"), (1, "exact"), (1, "b.py:g")]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "a term is empty"),
        ("number,0.3*", "a term is empty"),
        ("numbers", "--reward numbers: is neither one of exact, number, words, check, format, length nor file.py"),
        ("length", "--reward length: give length:N, N in characters"),
        ("length:0", "--reward length:0: give a number of characters from 1 up"),
        ("length:x", "give a number of characters"),
        ("format", "--reward format: give format:REGEX"),
        ("format:(", "--reward format:(: no regular expression (missing ), unterminated subpattern"),
        ("number:3", "--reward number:3: number takes nothing after a colon"),
        ("nowhere.py:f", "--reward nowhere.py:f: there is no such file"),
        ("out/reward", "--reward out/reward: is neither"),
    ],
)
def test_a_text_that_means_no_function_is_refused(spec, reason):
    with pytest.raises(UserError) as error:
        load_reward(spec)
    assert reason in str(error.value)


def test_a_row_without_a_right_answer_is_named():
    reward = load_reward("number")
    with pytest.raises(UserError, match=r"reward number: row 2 of 2 \('b'\): the row has no right answer"):
        reward(["a", "b"], ["1", "2"], [{"answer": "1"}, {}])


# ---- the user's own


@pytest.fixture
def own(tmp_path):
    """own(body): --reward for a function with this body."""

    def own(body: str, arguments: str = "prompts, answers, rows", before: str = "") -> str:
        path = tmp_path / "own.py"
        path.write_text(f"import math, time\n{before}\ndef reward({arguments}):\n    {body}\n")
        return f"{path}:reward"

    return own


def test_a_function_of_the_user_gets_all_it_needs(own, tmp_path):
    (tmp_path / "beside_own.py").write_text("BONUS = 1\n")
    spec = own(
        "return [len(p) + len(a) + r['n'] + BONUS for p, a, r in zip(prompts, answers, rows)]",
        before="from beside_own import BONUS",
    )
    assert load_reward(spec)(["a", "bb"], ["", "c"], [{"n": 10}, {"n": 20}]) == [12, 24]
    assert values(f"0.5*{spec},length:9", ["ab"], n=0) == [0.5 * 4 + 1]


def test_what_it_changes_changes_nothing_for_other_answers_and_terms(own):
    """Answers to one prompt share its row."""
    spec = own(
        "taken = [(answers.pop(0), row['tags'].append(1), len(row['tags'])) for row in rows]\n"
        "    prompts.clear()\n"
        "    return [tags for *_, tags in taken]"
    )
    row = {"answer": "a", "tags": []}
    for _ in range(2):
        assert load_reward(f"{spec},0.5*exact")(["q", "q"], ["a", "b"], [row, row]) == [1.5, 1]
    assert row == {"answer": "a", "tags": []}


def test_its_file_may_have_dataclasses(own):
    kept = "from dataclasses import dataclass\n@dataclass\nclass Kept:\n    n: 'int' = 2"
    assert values(own("return [Kept().n] * 2", before=kept), ["a", "b"]) == [2, 2]


@pytest.mark.parametrize("made", ["[0.5, True]", "(0.5, 1)", "numpy.array([0.5, 1])", "torch.tensor([0.5, 1])"])
def test_values_may_be_of_several_types(own, made):
    assert values(own(f"return {made}", before="import numpy, torch"), ["a", "b"]) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return 1 / 0", "it raised ZeroDivisionError: division by zero in line 4 of own.py, called with 2 answers"),
        ("raise SystemExit(3)", "it raised SystemExit: 3 in line 4"),
        ("return [0.0, math.nan]", "row 2 of 2 ('q'): the value is nan, not a finite number, for the answer 'b'"),
        ("return [math.inf, 0]", "row 1 of 2 ('q'): the value is inf"),
        ("return [1.0]", "returned 1 values for 2 answers; one for each is needed"),
        ("return [1.0] * 3", "returned 3 values for 2 answers"),
        ("return None", "returned NoneType, not a list of 2 numbers"),
        ("return 1.0", "returned float, not a list of 2 numbers"),
        ("return {'a': 1, 'b': 2}", "returned dict, not"),
        ("return ['1', 1]", "row 1 of 2 ('q'): the value is '1', not a finite number"),
        ("return [1, None]", "row 2 of 2 ('q'): the value is None"),
        ("return [1, [2]]", "row 2 of 2 ('q'): the value is [2]"),
        ("return [1, -1e300]", "row 2 of 2 ('q'): the value is -1e+300, beyond 1e+15"),
        ("return [1, 10 ** 400]", "row 2 of 2 ('q'): the value is 1000"),
    ],
)
def test_whatever_it_does_wrong_is_said(own, body, reason):
    spec = own(body)
    with pytest.raises(UserError) as error:
        values(spec, ["a", "b"])
    assert str(error.value).startswith(f"reward {spec}: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        "while True: pass",
        "\n    try:\n        time.sleep(60)\n    except Exception:\n        return [0, 0]",
        "\n    try:\n        time.sleep(60)\n    except:\n        time.sleep(60)",
        "\n    try:\n        time.sleep(60)\n    except:\n        return [0, 0]",
    ],
)
def test_one_that_never_returns_is_stopped(own, body):
    with pytest.raises(UserError, match=r"it took more than 0.1 s, called with 2 answers, the first to 'q'"):
        values(own(body), ["a", "b"], time_limit_s=0.1)


def test_a_regular_expression_that_never_ends_is_stopped_and_the_row_named():
    with pytest.raises(UserError, match=r"row 2 of 2 \('q'\): it took more than 0.1 s, for the answer 'aaa"):
        values("format:(a+)+b", ["ab", "a" * 99], time_limit_s=0.1)


def test_a_function_can_be_called_from_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(values("length:1", ["a"])))
    thread.start()
    thread.join()
    assert results == [[1.0]]


@pytest.mark.parametrize(
    ("arguments", "before", "reason"),
    [
        ("answers", "", "it must take (prompts, answers, rows), but too many positional arguments"),
        ("a, b, c, d", "", "it must take (prompts, answers, rows), but missing a required argument: 'd'"),
        ("a, b, c", "import no_such_module", "the file cannot be run (it raised ModuleNotFoundError: No module named"),
        ("a, b, c", "raise SystemExit(0)", "the file cannot be run (it raised SystemExit: 0 in line 2 of own.py)"),
        ("a, b, c", "time.sleep(9)", "the file cannot be run (it took more than 0.1 s)"),
        ("a, b, c", "def (", "SyntaxError: invalid syntax (own.py, line 2))"),
        ("a, b, c", "if True:\nx = 1", "line 2 (own.py, line 3))"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_once(own, arguments, before, reason):
    with pytest.raises(UserError) as error:
        load_reward(own("return []", arguments, before), time_limit_s=0.1)
    assert reason in str(error.value)


def test_a_missing_function_is_refused_with_those_there_are(own):
    spec = own("return []")
    with pytest.raises(UserError, match="the file has no such function; it has reward"):
        load_reward(spec.replace(":reward", ":score"))
