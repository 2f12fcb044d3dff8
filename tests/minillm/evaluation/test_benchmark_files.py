import pytest

from minillm.base.errors import MissingError, UserError
from minillm.evaluation.benchmark_files import read_tasks
from minillm.evaluation.benchmarks import BENCHMARKS
from tests.minillm.evaluation.benchmark_rows import EXAMS, HUB, write_all, write_rows, write_table

ROWS = HUB["arc_easy"][1]


def test_every_benchmark_is_found(tmp_path):
    write_all(tmp_path)
    names = {name: [task.name for task in read_tasks(name, tmp_path, 0, None)] for name in BENCHMARKS}
    exams = {"mmlu": ["mmlu_college_physics"], "cmmlu": ["cmmlu_agronomy"], "ceval": ["ceval_law"]}
    assert names == {name: [name] for name in BENCHMARKS} | exams


def test_examples_come_before_each_question_and_the_introduction_before_them(tmp_path):
    (task,) = read_tasks("mmlu", write_all(tmp_path), 1, 1)
    assert task.questions[0].requests[3] == (
        "The following are multiple choice questions (with answers) about college physics.\n\n"
        "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
        "Who has it?\nA. Tom\nB. the cat\nC. ball\nD. apple\nAnswer:",
        " D",
    )
    assert (task.shots, len(task.questions), task.n_all) == (1, 1, 2)
    (task,) = read_tasks("cmmlu", tmp_path, 0, None)
    assert (
        task.questions[0]
        .requests[0]
        .context.startswith("以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\nWho")
    )


@pytest.mark.parametrize("name", ["ARC-Easy-Test.jsonl", "ARC-V1/ARC-Easy/test-00000-of-00001.jsonl", "test/all.jsonl"])
def test_a_split_is_named_by_the_file_or_its_folder(tmp_path, name):
    write_rows(tmp_path / "arc_easy" / name, ROWS)
    write_rows(tmp_path / "arc_easy" / "other" / "ARC-Easy-Train.jsonl", ROWS[:1])
    (task,) = read_tasks("arc_easy", tmp_path, 1, None)
    assert len(task.questions) == 3 and task.questions[1].requests[0].context.startswith("Question: Who has the ball?")


def test_parquet_in_several_parts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for number, rows in enumerate([ROWS[:2], ROWS[2:]]):
        path = tmp_path / "arc_easy" / "ARC-Easy" / f"test-0000{number}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (task,) = read_tasks("arc_easy", tmp_path, 0, None)
    assert [question.right for question in task.questions] == [0, 2, 2]


def test_a_subject_may_be_a_folder(tmp_path):
    rows = [{"question": q, "choices": choices, "answer": "ABCD".index(a)} for q, *choices, a in EXAMS["test"]]
    for subject in ("anatomy", "virology"):
        write_rows(tmp_path / "mmlu" / subject / "test-00000-of-00001.jsonl", rows)
    assert [task.name for task in read_tasks("mmlu", tmp_path, 0, None)] == ["mmlu_anatomy", "mmlu_virology"]


def test_labels_in_a_file_of_their_own(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "label"} for row in HUB["piqa"][1]]
    write_rows(tmp_path / "piqa" / "valid.jsonl", rows)
    labels = tmp_path / "piqa" / "valid-labels.lst"
    labels.write_text("1\n0\n")
    (task,) = read_tasks("piqa", tmp_path, 0, None)
    assert [question.right for question in task.questions] == [1, 0]
    labels.write_bytes(b"\xef\xbb\xbf0\r\n1\r\n")
    assert [question.right for question in read_tasks("piqa", tmp_path, 0, None)[0].questions] == [0, 1]
    labels.write_bytes(b"\xff1\n")
    with pytest.raises(UserError, match=r"valid-labels\.lst: .*can't decode"):
        read_tasks("piqa", tmp_path, 0, None)
    labels.write_text("1\n")
    with pytest.raises(UserError, match="2 rows, but 1 labels"):
        read_tasks("piqa", tmp_path, 0, None)


def test_what_is_missing_is_said_with_its_source(tmp_path):
    with pytest.raises(MissingError, match=r"hellaswag: no file of the split .* put it there from https://"):
        read_tasks("hellaswag", tmp_path, 0, None)
    write_all(tmp_path)
    with pytest.raises(MissingError, match="3 examples in files of the split train, too few for --shots 4"):
        read_tasks("arc_easy", tmp_path, 4, None)
    with pytest.raises(UserError, match="2 examples in files of the split test, too few for --shots 3"):
        read_tasks("lambada_openai", tmp_path, 3, None)
    with pytest.raises(
        UserError, match="2 examples in files of the split dev of college_physics, too few for --shots 3"
    ):
        read_tasks("mmlu", tmp_path, 3, None)


def test_what_could_be_read_in_two_ways_is_refused(tmp_path):
    for name in ("ARC-Easy-Test.jsonl", "ARC-Challenge-Test.jsonl"):
        write_rows(tmp_path / "arc_easy" / name, ROWS)
    with pytest.raises(UserError, match=r"ARC-Challenge-Test.jsonl, ARC-Easy-Test.jsonl all seem to be the split test"):
        read_tasks("arc_easy", tmp_path, 0, None)
    write_rows(tmp_path / "mmlu" / "all" / "test-00000-of-00001.jsonl", ROWS)
    with pytest.raises(UserError, match="a file of all subjects"):
        read_tasks("mmlu", tmp_path, 0, None)
    write_table(tmp_path / "ceval" / "val" / "cooking_val.csv", EXAMS["test"], ["question", *"ABCD", "answer"])
    with pytest.raises(UserError, match="'cooking' is no subject"):
        read_tasks("ceval", tmp_path, 0, None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test-00001-of-00002.jsonl"], "of 2 parts of the split test.* only test-00001-of-00002.jsonl is there"),
        (["test-00000-of-00003.jsonl", "test-00001-of-00003.jsonl"], "of 3 parts .* add the others"),
        (["test-00000-of-00001.jsonl", "test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl"], "all seem to be"),
        (["test-00000-of-00001.jsonl", "test-00000-of-00001.json"], "all seem to be"),
        (["test-00000-of-00001.jsonl", "test.jsonl"], "all seem to be"),
        (["test-00000-of-00002.jsonl", "more/test-00001-of-00002.jsonl"], "all seem to be"),
    ],
)
@pytest.mark.parametrize("folder", ["arc_easy", "mmlu/virology"])
def test_a_split_is_read_whole_and_once(tmp_path, folder, names, message):
    for name in names:
        write_rows(tmp_path / folder / name, ROWS[:1])
    if folder != "arc_easy" and "more" in names[-1]:
        return  # a folder is a subject of its own
    with pytest.raises(UserError, match=message):
        read_tasks(folder.partition("/")[0], tmp_path, 0, None)


def test_what_a_folder_of_training_holds_is_no_test(tmp_path):
    """MMLU's data.tar has auxiliary_train/mc_test.csv, which is no subject."""
    for name in ("test/anatomy_test.csv", "dev/anatomy_dev.csv", "auxiliary_train/mc_test.csv", "train/my_dev.csv"):
        write_table(tmp_path / "mmlu" / name, EXAMS["test"], None)
    assert [task.name for task in read_tasks("mmlu", tmp_path, 1, None)] == ["mmlu_anatomy"]
    write_rows(tmp_path / "arc_easy" / "train_test" / "ARC-Easy-Test.jsonl", ROWS)
    assert len(read_tasks("arc_easy", tmp_path, 0, None)) == 1


def test_a_wrong_row_is_named(tmp_path):
    write_rows(tmp_path / "arc_easy" / "test.jsonl", [ROWS[0], {**ROWS[1], "answerKey": "9"}])
    with pytest.raises(UserError, match=r"test.jsonl, row 2: answerKey '9'"):
        read_tasks("arc_easy", tmp_path, 0, None)
