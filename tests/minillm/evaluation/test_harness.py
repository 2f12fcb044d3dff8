"""Every benchmark beside lm-evaluation-harness itself.

Its own task files, with our rows in place of what they would load, and its own model class on our folder: the texts of
all requests must be equal, the log-likelihoods within 1e-3, the shares and their errors exactly.
"""

import math
from pathlib import Path

import pytest

from minillm.evaluation.benchmark_files import read_tasks
from minillm.evaluation.benchmark_scores import Done, ask, values_of
from tests.minillm.evaluation.benchmark_rows import EXAMS, HUB, write_all, write_rows

TASK_FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "mmlu": "mmlu/default/mmlu_college_physics.yaml",
    "cmmlu": "cmmlu/cmmlu_agronomy.yaml",
    "ceval": "ceval/ceval-valid_law.yaml",
}
MAX_LEN = 64


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval")


def exam_row(name: str, row: tuple) -> dict:
    """A row of an exam as Hugging Face has it."""
    if name == "mmlu":
        return {"question": row[0], "choices": list(row[1:5]), "answer": "ABCD".index(row[5])}
    names = ("question", *"ABCD", "answer") if name == "ceval" else ("Question", *"ABCD", "Answer")
    return dict(zip(names, row, strict=True))


def their_files(name: str, folder: Path) -> dict[str, str]:
    """The files of each split, as the harness is to load them."""
    if name in HUB:
        rows = {
            "asked": [row | {"row": number} for number, row in enumerate(HUB[name][1])],
            "train": [row | {"row": -1} for row in reversed(HUB[name][1])],  # none is equal to one that is asked
        }
        paths = {split: str(write_rows(folder / f"{name}-{split}.jsonl", rows[split])) for split in rows}
        return {"train": paths["train"], "validation": paths["asked"], "test": paths["asked"]}
    files = {}
    for split, rows in EXAMS.items():
        path = write_rows(folder / f"{name}-{split}.jsonl", [exam_row(name, row) for row in rows])
        files[split] = str(path)
    return files | {"val": files["test"]}


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 1])
def test_texts_scores_and_shares_are_those_of_the_harness(harness, home, tmp_path, monkeypatch, shots):
    import datasets
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in TASK_FILES:
        task = {"include": str(Path(harness.__file__).parent / "tasks" / TASK_FILES[name]), "task": f"ours_{name}"}
        task |= {"dataset_path": "json", "dataset_name": None, "tag": None}
        task["dataset_kwargs"] = {"data_files": their_files(name, tmp_path / "rows")}
        (tmp_path / f"{name}.yaml").write_text(yaml.dump(task))
    folder = home.path / "out" / "sft" / "step-00000003"
    theirs = harness.simple_evaluate(
        HFLM(pretrained=str(folder), device="cpu", batch_size=4, max_length=MAX_LEN, dtype="float32"),
        tasks=[f"ours_{name}" for name in TASK_FILES],
        num_fewshot=shots,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=100,
    )

    write_all(tmp_path / "eval")
    for name in TASK_FILES:
        (task,) = read_tasks(name, tmp_path / "eval", shots, None)
        scores = ask(home.model, home.tokenizer, task, MAX_LEN, Done(None, ""))
        samples = sorted(theirs["samples"][f"ours_{name}"], key=lambda sample: sample["doc_id"])
        for question, its_scores, sample in zip(task.questions, scores, samples, strict=True):
            asked = [tuple(arguments) for arguments in sample["arguments"]]
            assert [tuple(request) for request in question.requests] == asked
            answered = [response[0] for response in sample["resps"]]
            for score, (nats, is_greedy) in zip(its_scores, answered, strict=True):
                assert score.nats == pytest.approx(float(nats), abs=1e-3)
                assert score.is_greedy == (str(is_greedy) == "True")
        results = theirs["results"][f"ours_{name}"]
        for metric, (value, error) in values_of(task.questions, scores, task.benchmark.metrics).items():
            assert results[f"{metric},none"] == pytest.approx(value, rel=1e-3)
            if metric != "perplexity":  # its error is drawn at random there
                theirs_error = results[f"{metric}_stderr,none"]
                assert math.isnan(error) if theirs_error == "N/A" else theirs_error == pytest.approx(error)
