"""`--bits` and `--compile` of the commands that use a trained model."""

import json

import pytest

from minillm.checkpoint import huggingface
from minillm.generation import compiled_step
from minillm.generation.completion import generate
from minillm.model import packed
from minillm.model.quant import quantize_for_generation
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig
from minillm.tuning.peft_format import save_adapter

pytestmark = pytest.mark.skipif(not packed.can_pack(8), reason="torch lacks these products here")


def test_generate_computes_with_rounded_weights(home, call):
    model = huggingface.load_model(home.path / "out" / "sft" / "step-00000003").eval()
    quantize_for_generation(model, 8)
    asked = ["generate", "--prompt", "Tom has", "--max_new_tokens", "12", "--temperature", "0", "--bits", "8"]
    (expected,) = generate(model, [[1, *home.tokenizer.encode("Tom has")]], 12, stop_ids=[2])
    assert call(*asked)[1] == home.tokenizer.decode(expected.tokens) + "\n"


def test_a_compiled_step_gives_the_same_text(home, call, monkeypatch):
    monkeypatch.setattr(compiled_step, "BACKEND", "aot_eager")
    asked = ["generate", "--prompt", "Tom has", "--max_new_tokens", "12", "--temperature", "0"]
    _, plain, _ = call(*asked)
    status, text, remarks = call(*asked, "--compile")
    assert status == 0 and text == plain and "compiling a step" in remarks
    status, _, error = call(*asked[:3], "--best_of", "2", "--reward", "length", "--compile")
    assert status == 2 and "--compile: is for one answer" in error


def test_eval_prints_their_price(home, call):
    losses = {}
    for bits in ((), ("--bits", "16"), ("--bits", "8"), ("--bits", "4")):
        status, out, err = call("eval", "--data", "text.txt", *bits)
        assert status == 0, err
        losses[bits] = float(out.split("bits per byte")[1].split()[0])
        assert ("weights         of linear layers in" in out) == bool(bits)
    assert len({losses[bits] for bits in ((), ("--bits", "8"), ("--bits", "4"))}) == 3  # 16 may lose no digit shown
    assert max(losses.values()) < 1.1 * min(losses.values())


def test_benchmarks_that_are_remembered_are_not_taken_for_those_of_other_bits(home, call):
    """The weights that a model's scores were remembered under are those before rounding, and the bits."""
    folder = home.path / "data" / "eval" / "copa"
    folder.mkdir(parents=True)
    rows = [{"premise": "Tom ran.", "choice1": "He was late.", "choice2": "He slept.", "question": "cause", "label": 0}]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for bits in ((), ("--bits", "8")):
        status, _, err = call("eval", "--tasks", "copa", "--out", "scores.json", *bits)
        assert status == 0, err
    lines = (home.path / "scores.json.done.jsonl").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line]) == 2


@pytest.mark.parametrize("kind", ["adapter", "prompt", "prefix", "lora"])
def test_adapters_that_are_not_merged_have_bits_unless_they_stand_between_the_layers(home, call, kind, tmp_path):
    base = home.path / "out" / "sft" / "step-00000003"
    model = huggingface.load_model(base)
    save_adapter(attach(model, TuningConfig(tune=kind)), tmp_path)
    status, _, err = call(
        *("generate", "--model", str(tmp_path), "--base", str(base), "--prompt", "Tom", "--bits", "8"),
        *("--max_new_tokens", "3"),
    )
    if kind == "adapter":
        assert status == 2 and f"--bits 8: {tmp_path} is an adapter of kind adapter, which cannot be merged" in err
    else:
        assert status == 0, err


def test_what_has_no_bits_is_refused(home, call):
    status, _, err = call("generate", "--prompt", "Tom", "--bits", "3")
    assert status == 2 and "--bits" in err and "16, 8, 4" in err
