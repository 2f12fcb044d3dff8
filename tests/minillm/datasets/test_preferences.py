"""Files of preferences become batches of answers and pairs of them."""

import hashlib
import json

import numpy as np
import pytest
import torch

from minillm.base.errors import UserError
from minillm.datasets.preferences import PreferenceRows, unpaired
from minillm.datasets.prompts import PromptRows
from minillm.tokenizer.train import train_tokenizer
from tests.minillm.datasets.test_instructions import ASSISTANT, BOS, EOS, PAD, SYSTEM, USER, Numbers, talk, write_jsonl


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def labelled(prompt, completion, label, **more):
    return {"prompt": prompt, "completion": completion, "label": label, **more}


@pytest.fixture
def read(tmp_path):
    def read(rows, seq_len=16, **options) -> PreferenceRows:
        return PreferenceRows(write_jsonl(tmp_path / "rows.jsonl", rows), Numbers(), seq_len, **options)

    return read


def in_file_order(data: PreferenceRows) -> list[int]:
    """Data positions of the samples of the first epoch, in the order of the file."""
    return sorted(range(data.rows_per_epoch), key=lambda position: data.batch([position]).number.min())


# ---- a batch, by hand


@pytest.mark.parametrize("pad_id", [PAD, EOS])  # masks go by length, so a pad that is the eos does no harm
def test_a_pair_by_hand(read, monkeypatch, pad_id):
    monkeypatch.setattr(Numbers, "pad_id", pad_id)
    answers = read([pair("1 2", "3 4 5", "6", margin=0.5, kind="wrong")]).batch([0])
    x, y, mask, documents = answers.batch[:4]
    assert x.tolist() == [[BOS, USER, 1, 2, ASSISTANT, 3, 4, 5], [BOS, USER, 1, 2, ASSISTANT, 6, pad_id, pad_id]]
    assert y.tolist() == [[USER, 1, 2, ASSISTANT, 3, 4, 5, EOS], [USER, 1, 2, ASSISTANT, 6, EOS, pad_id, pad_id]]
    assert mask.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0]]
    assert documents is None and answers.label is None and answers.kinds == ["wrong"]
    pair_of_it = (answers.chosen, answers.rejected, answers.weight, answers.margin, answers.number)
    assert [t.tolist() for t in pair_of_it] == [[0], [1], [1.0], [0.5], [0, 1]]
    assert [t.dtype for t in pair_of_it] == [torch.int64, torch.int64, torch.float32, torch.float32, torch.int64]


def test_only_the_last_answer_of_a_conversation_is_learned(read):
    rows = [{"chosen": talk("1", "2", "3", "4", system="7"), "rejected": talk("1", "2", "3", "5", system="7")}]
    data = read(rows)
    x, y, mask, _ = data.batch([0]).batch[:4]
    ids = [BOS, SYSTEM, 7, USER, 1, ASSISTANT, 2, EOS, USER, 3, ASSISTANT, 4]
    assert x[0, : len(ids)].tolist() == ids
    assert y[mask].tolist() == [4, EOS, 5, EOS] and data.counts["turns"] == 2


def test_all_answers_of_a_prompt_are_in_one_sample(read):
    data = read([{"prompt": "1", "responses": ["2", "3", "4"]}, pair("5", "6", "7")])
    answers = data.batch(in_file_order(data))
    assert answers.chosen.tolist() == [0, 0, 1, 3] and answers.rejected.tolist() == [1, 2, 2, 4]
    torch.testing.assert_close(answers.weight, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1]))
    assert answers.batch.x.shape[0] == data.n_answers == 5
    both = data.batch(in_file_order(data)[::-1])  # rows of the batch in the order asked for, the numbers stay
    assert both.number.tolist() == [3, 4, 0, 1, 2] and both.chosen.tolist() == [0, 2, 2, 3]


def test_scores_make_pairs_and_margins(read):
    data = read([{"prompt": "1", "responses": ["2", "3", "4"], "scores": [1, 3, 3]}])
    answers = data.batch([0])
    assert answers.batch.y[answers.batch.mask].tolist() == [2, EOS, 3, EOS]  # the tie is in no pair
    assert (answers.chosen.tolist(), answers.rejected.tolist(), answers.margin.tolist()) == ([1], [0], [2.0])
    assert "1 dropped (equal scores)" in data.summary() and "1 with a margin" in data.summary()


def test_positions_beyond_the_end_have_no_sample(read):
    data = read([pair("1", "2", "3"), pair("4", "5", "6")])
    assert len(data.batch([0, 1], end=1).number) == 2
    answers = data.batch([2, 3], end=2)
    assert answers.batch.x.tolist() == [[PAD] * 8] and not answers.batch.n_targets()
    assert answers.number.tolist() == [-1] and not len(answers.chosen) and not len(answers.weight)
    assert unpaired(answers).number.tolist() == [-1]
    labels = read([labelled("1", "2", True), labelled("1", "3", False)]).batch([0], end=0)
    assert labels.number.tolist() == [-1] and labels.label.tolist() == [False]


# ---- labels


def test_single_answers_have_labels(read):
    data = read([labelled("1", "2", True, kind="a"), labelled("3", "4", False), labelled("5", "6 7", True)])
    answers = data.batch(in_file_order(data))
    assert answers.label.tolist() == [True, False, True] and answers.kinds == ["a", "", ""]
    assert not len(answers.chosen) and answers.number.tolist() == [0, 1, 2]
    assert unpaired(answers) is answers
    assert "2 wanted and 1 unwanted answers kept" in data.summary()


def test_pairs_become_single_answers(read):
    data = read([{"prompt": "1", "responses": ["2", "3", "4"], "kind": "k"}, pair("5", "6", "7")])
    answers = unpaired(data.batch(in_file_order(data)))
    assert answers.number.tolist() == [0, 2, 3, 4]  # 3 is better than one and worse than another
    assert answers.label.tolist() == [True, False, True, False] and answers.kinds == ["", "k", "", ""]
    assert answers.batch.y[answers.batch.mask].tolist() == [2, EOS, 4, EOS, 6, EOS, 7, EOS]


@pytest.mark.parametrize(("label", "only"), [(True, "wanted"), (False, "unwanted")])
def test_labels_of_one_kind_alone_are_refused(read, label, only):
    with pytest.raises(UserError, match=f"every answer is {only}; learning from labels needs both kinds"):
        read([labelled("1", "2", label), labelled("3", "4", label)])


def test_pairs_and_labels_do_not_mix(read):
    for rows in ([pair("1", "2", "3"), labelled("1", "2", True)], [labelled("1", "2", True), pair("1", "2", "3")]):
        with pytest.raises(UserError, match="row 2: some rows are pairs and others single answers"):
            read(rows)


# ---- what is dropped


DAMAGED = {
    "equal answers": [pair("1", "2", " 2\n")],
    "empty answers": [pair("1", "2", ""), pair("1", " ", "3"), labelled("1", "", False)],
    "too long": [pair("1", "2 " * 13, "3"), pair("1", "2", "3 " * 13), pair("1 " * 14, "2", "3")],
    "prompts differ": [{"chosen": talk("1", "9", "2", "3"), "rejected": talk("1", "8", "2", "3")}],
    "equal scores": [{"prompt": "1", "responses": ["2", "3"], "scores": [1, 1]}],
}


@pytest.mark.parametrize(("why", "row"), [(why, row) for why, rows in DAMAGED.items() for row in rows])
def test_what_cannot_be_compared_is_dropped_on_both_sides(read, why, row):
    good = [labelled("4", "5", True), labelled("4", "6", False)] if "label" in row else [pair("4", "5", "6")]
    data = read([row, *good])
    assert data.rows_per_epoch == len(good) and data.n_answers == 2
    assert f"1 dropped ({why})" in data.summary()
    with pytest.raises(UserError, match=rf"nothing left to compare .*1 dropped \({why}\)"):
        read([row])


@pytest.mark.parametrize(
    ("good", "too_long"),
    [
        ([pair("4", "5", "6")], pair("{}", "2 " * 13, "3")),
        ([labelled("4", "5", True), labelled("4", "6", False)], labelled("{}", "2 " * 13, True)),
    ],
)
def test_it_is_said_when_more_is_too_long_than_is_kept(read, good, too_long):
    longer = [too_long | {"prompt": str(number)} for number in range(1, len(good) + 2)]
    said = "\nmore are too long than are kept: in training, a longer --seq_len keeps more"
    assert read([*longer, *good]).summary().endswith(said)
    assert said not in read([*longer[:-1], *good]).summary()
    with pytest.raises(UserError) as refusal:
        read(longer)
    assert "\n" not in str(refusal.value)


def test_the_longest_answer_that_fits_is_whole(read):
    y, mask = read([pair("1", "2 " * 12, "3")]).batch([0]).batch[1:3]  # bos, role, 1, role, 12 tokens, eos: 16 + 1
    assert y.shape == (2, 16) and mask[0].sum() == 13 and y[0, -1] == EOS


def test_a_ranked_list_loses_only_what_does_not_fit(read):
    data = read([{"prompt": "1", "responses": ["2", "3 " * 13, "4", ""]}])
    answers = data.batch([0])
    assert answers.batch.y[answers.batch.mask].tolist() == [2, EOS, 4, EOS] and answers.weight.tolist() == [1.0]
    assert "2 dropped (empty answers)" not in data.summary() and "3 dropped (empty answers)" in data.summary()
    assert "2 dropped (too long)" in data.summary()
    with pytest.raises(UserError, match=r"nothing left to compare .*1 dropped \(too long\).*; raise --seq_len"):
        read([pair("1", "2", "3 " * 13)])


def test_duplicates_are_dropped_and_contradictions_counted(read):
    rows = [pair("1", "2", "3"), pair("1", "2 ", "3"), pair("1", "3", "2"), pair("4", "2", "3"), pair("1", "2", "5")]
    data = read(rows)
    assert data.rows_per_epoch == 4
    assert "1 dropped (duplicates), 0 cut; 1 contradictions" in data.summary()
    data = read([labelled("1", "2", True), labelled("1", "2", True), labelled("1", "2", False)])
    assert data.n_answers == 2 and "1 dropped (duplicates), 0 cut; 1 contradictions" in data.summary()


def test_the_summary_says_whether_the_longer_is_chosen(read):
    rows = [pair("1", "2 3", "4"), pair("1", "2", "4 5"), pair("1", "5", "6"), pair("1", "7", "8 9", note="n")]
    expected = (
        "4 rows: 4 pairs of 4 prompts kept, 0 dropped, 0 cut; 0 contradictions; 51 tokens; "
        "the chosen is longer in 25.0%, as long in 25.0%; keys not used: note (1 rows)"
    )
    assert read(rows).summary() == expected


def test_a_bad_row_is_named_or_counted(read):
    rows = [pair("1", "2", "3"), {"prompt": "1"}, pair("4", "5", "6")]
    with pytest.raises(UserError, match=r"rows.jsonl, row 2: its keys are prompt; .* give --on_bad_line skip"):
        read(rows)
    data = read(rows, on_bad_line="skip")
    assert data.rows_per_epoch == 2 and "2 rows: 2 pairs of 2 prompts kept, 1 bad rows skipped" in data.summary()


# ---- label noise, order, fingerprints


MANY = [pair(f"{i // 90 + 1} {i % 90 + 10}", "1", "2", kind="ab"[i % 2]) for i in range(500)]


def chosen_texts(data: PreferenceRows, positions) -> list[int]:
    """The first token of the chosen answer at each position."""
    answers = data.batch(positions)
    first = answers.batch.mask.int().argmax(1)
    return answers.batch.y[answers.chosen, first[answers.chosen]].tolist()


def test_label_noise_swaps_a_share_by_seed_and_number(read):
    data, again, other = (read(MANY, label_noise=0.1, seed=seed) for seed in (5, 5, 6))
    positions = np.arange(500)
    swapped = [text == 2 for text in chosen_texts(data, positions)]
    assert sum(swapped) == data.n_swapped and abs(data.n_swapped - 50) < 20  # 3 σ
    assert f"{data.n_swapped} labels swapped (--label_noise 0.1)" in data.summary()
    by_number = dict(zip((data.batch(positions).number[::2] // 2).tolist(), swapped, strict=True))
    epoch_2 = again.batch(positions + 500)
    swapped_2 = [text == 2 for text in chosen_texts(again, positions + 500)]
    assert by_number == dict(zip((epoch_2.number[::2] // 2).tolist(), swapped_2, strict=True))
    assert other.n_swapped != data.n_swapped or chosen_texts(other, positions) != chosen_texts(data, positions)
    assert data.fingerprint == again.fingerprint != read(MANY, seed=5).fingerprint
    with pytest.raises(UserError, match=r"--label_noise 0.6: the share of swapped pairs is from 0 to 0.5"):
        read(MANY, label_noise=0.6)


def test_label_noise_turns_labels_around(read):
    rows = [labelled(str(i), "1", i % 2 == 0) for i in range(400)]
    clean, noisy = read(rows), read(rows, label_noise=0.25)
    n_turned = int((clean.label != noisy.label).sum())
    assert n_turned == noisy.n_swapped and abs(n_turned - 100) < 30


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own(read):
    data = read(MANY[:60], seed=1)
    first, second = (data.batch(np.arange(60) + 60 * epoch).number.tolist() for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(120)) and first != second
    again = read(MANY[:60], seed=1)
    assert again.batch(np.arange(70, 80)).number.tolist() == second[20:40]  # whatever was asked for before
    assert data.total_rows(1.5) == 90 and data.kinds == ["a", "b"]
    assert read(MANY[:60], seed=2).batch(np.arange(60)).number.tolist() != first


def test_the_fingerprints_say_what_they_are_of(read, tmp_path):
    rows = [pair("1", "2", "3"), pair("1", "4 5 6", "7", note="n")]
    data = read(rows)
    lines = hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    assert data.files.fingerprint == lines != data.fingerprint
    assert read([rows[0], pair("1", "4 5 6", "7")]).answers_fingerprint == data.answers_fingerprint
    assert read(rows, seq_len=6).answers_fingerprint != data.answers_fingerprint  # the longer pair is dropped
    assert read(rows, template="simple").answers_fingerprint != data.answers_fingerprint


def test_the_same_from_json_and_csv(read, tmp_path):
    rows = [pair("1", "2", "3", margin=1.0), pair("4", "5", "6", margin=None)]
    expected = read(rows).batch([0, 1])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected,margin\n1,2,3,1.0\n4,5,6,\n")
    for name in ("rows.json", "rows.csv"):
        got = PreferenceRows(tmp_path / name, Numbers(), 16).batch([0, 1])
        assert torch.equal(got.batch.x, expected.batch.x) and torch.equal(got.margin, expected.margin)


def test_limits(read):
    with pytest.raises(UserError, match="--seq_len 0: a row needs at least 1 position"):
        read(MANY[:1], seq_len=0)


# ---- with a tokenizer of text

TALES = [f"Who has the {thing}? Tom has the {thing}. 谁有{thing}？" for thing in ("ball", "cat", "apple")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TALES * 30, 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("template", ["chat", "simple"])
def test_prompt_and_answer_are_encoded_apart(tmp_path, tokenizer, template):
    rows = [pair("Who has the", " ball", " balls, Tom"), {"prompt": "Wh", "chosen": "o", "rejected": "om"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = PreferenceRows(path, tokenizer, 64, template=template)
    prompts = PromptRows(path, tokenizer, 64, template=template)
    asked = {prompt.number: prompt.ids for prompt in prompts.rows(np.arange(2))}
    answers = data.batch(in_file_order(data))
    x, y, mask, _ = answers.batch[:4]
    for row, number in enumerate(answers.number.tolist()):
        first = int(mask[row].int().argmax())
        text = rows[number // 2][("chosen", "rejected")[number % 2]]
        assert x[row, : first + 1].tolist() == asked[number // 2]  # what the model is asked with, whatever the answer
        assert y[row, mask[row]].tolist() == [*tokenizer.encode(text), tokenizer.eos_id]


def test_any_template_of_a_folder_ends_both_answers_alike(tmp_path, tokenizer):
    pytest.importorskip("jinja2")
    text = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    own = tokenizer.with_settings(add_bos=True, chat_template=text)
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("Who has the ball?", "Tom", "Tom has the cat.")])
    y, mask = PreferenceRows(path, own, 64).batch([0]).batch[1:3]
    assert [y[row][mask[row]][-1].item() for row in (0, 1)] == [own.eos_id] * 2
    assert [own.decode(y[row][mask[row]].tolist()) for row in (0, 1)] == ["Tom", "Tom has the cat."]
