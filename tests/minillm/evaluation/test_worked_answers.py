import pytest
import torch

from minillm.base.errors import UserError
from minillm.evaluation import worked_answers
from minillm.evaluation.worked_answers import continued, last_number, marked_number, same_number

PROMPTS = ["Question: Who has the ball?\nAnswer:", "Question: 谁有cat?\nAnswer:", "Who has the apple? " * 20]


def test_the_continuation_is_transformers_greedy_one(home):
    """Of the last tokens of each prompt, as many as an answer leaves room for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = home.path / "out" / "sft" / "step-00000003"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = continued(home.model, home.tokenizer, PROMPTS, 60, longest=12)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt)["input_ids"][-48:]
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :].tolist()
        assert text == home.tokenizer.decode(made)


def test_an_answer_ends_before_the_next_question(home, monkeypatch):
    (text,) = continued(home.model, home.tokenizer, PROMPTS[:1], 60, longest=12)
    monkeypatch.setattr(worked_answers, "ENDS", (text[4:6],))
    (cut,) = continued(home.model, home.tokenizer, PROMPTS[:1], 60, longest=12)
    assert text[4:6] not in cut and text.startswith(cut)


def test_a_prompt_needs_room(home):
    with pytest.raises(UserError, match="--seq_len 12: an answer may have 12 tokens"):
        continued(home.model, home.tokenizer, PROMPTS, 12, longest=12)


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("It is 3.\n#### 1,234", "1,234", "1,234"),
        ("#### -5 and then $7", "-5", "$7"),
        ("Tom has $1,200.50 now.", "[invalid]", "$1,200.50"),
        ("nothing", "[invalid]", "[invalid]"),
        ("####5", "[invalid]", "5"),
        ("a 3. b", "[invalid]", "3."),
    ],
)
def test_numbers_are_found(text, marked, last):
    assert marked_number(text) == marked
    assert last_number(text) == last


def test_numbers_compare_without_their_signs():
    assert same_number("$1,200.", " so it is\n#### 1200")
    assert not same_number("12", "#### 1200") and not same_number("[invalid]", "#### 1200")
