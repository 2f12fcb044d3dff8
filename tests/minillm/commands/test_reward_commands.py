"""What the commands do with a reward model: eval judges pairs by it, generate takes the best of n, others refuse it."""

import dataclasses
import json

import pytest
import torch

from minillm.alignment import rewards
from minillm.base import files
from minillm.checkpoint import huggingface
from minillm.generation.completion import generate
from minillm.generation.sampling import Sampling
from minillm.model.transformer import Transformer

SAMPLED = ("--max_new_tokens", "8", "--seed", "5", "--temperature", "1", "--prompt", "Tom?")


@pytest.fixture(scope="module")
def reward_model(home) -> Transformer:
    """A reward model of random weights in out/reward, as large as the language model in out/sft."""
    model = Transformer(dataclasses.replace(home.model.config, score_head=True))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def fill(folder):
        huggingface.save_model(model, folder, special_ids=home.tokenizer.special_ids)
        home.tokenizer.save(folder)

    files.write_folder(home.path / "out" / "reward" / "step-00000001", fill)
    pairs = [{"prompt": f"Tom {n}", "chosen": "yes", "rejected": "no no", "kind": "ab"[n % 2]} for n in range(7)]
    (home.path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    return model.eval()


def score_of(home, model: Transformer, question: str, answer: str) -> float:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, _ = home.tokenizer.encode_chat(messages)
    with torch.no_grad():
        return float(model(torch.tensor([ids]))[0, -1])


def test_eval_judges_pairs_by_kind(home, reward_model, call):
    status, out, err = call("eval", "--model", "out/reward", "--data", "pairs.jsonl")
    assert status == 0, err
    right = [
        score_of(home, reward_model, f"Tom {n}", "yes") > score_of(home, reward_model, f"Tom {n}", "no no")
        for n in range(7)
    ]
    assert "out/reward/step-00000001 on pairs.jsonl" in out
    assert f"({sum(right[0::2])}/4)" in out and f"({sum(right[1::2])}/3)" in out and f"({sum(right)}/7)" in out
    assert "expected calibration error" in out and "the longer one would win 0.0%" in out
    limited = call("eval", "--model", "out/reward", "--data", "pairs.jsonl", "--limit", "1")[1]
    assert "/1)" in limited and "/7)" not in limited


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("eval --model out/reward --data pairs.jsonl --seq_len 8", "--seq_len 8: is about texts"),
        ("eval --model out/reward --data pairs.jsonl --field story", "--field story: is about texts"),
        ("eval --model out/reward", "_heldout.jsonl: is not written yet; run python data/bundled.py, or give other"),
        ("eval --model out/reward --max_new_tokens 9", "_heldout.jsonl holds preferences; leave it out"),
        ("eval --model out/sft", "--data is needed"),
        ("eval --model out/sft --data nowhere", "no such file"),
    ],
)
def test_what_eval_cannot_do_is_said(arguments, words, reward_model, call):
    status, _, err = call(*arguments.split())
    assert status == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "generate --prompt Tom --model out/reward",
        "chat --model out/reward",
        "export --model out/reward --out m.gguf --format gguf",
        "export --model out/reward --out new --format hf",
        "info --model out/reward",
        "resize --model out/reward --tokenizer tokenizer --id_map map --out new",
    ],
)
def test_who_wants_a_language_model_refuses_it_by_name(arguments, reward_model, call):
    status, _, err = call(*arguments.split())
    assert status == 2, err
    assert "out/reward/step-00000001: is a reward model (LlamaForSequenceClassification)" in err


def test_the_best_of_n_is_the_answer_with_the_highest_score(home, reward_model, call):
    status, out, err = call(
        *("generate", "--best_of", "6", "--reward", "out/reward", *SAMPLED),
    )
    assert status == 0, err
    prompt, _ = home.tokenizer.encode_chat([{"role": "user", "content": "Tom?"}], add_generation_prompt=True)
    completions = generate(
        home.model, [prompt] * 6, 8, sampling=Sampling(temperature=1.0, seed=5), stop_ids=home.tokenizer.stop_ids()
    )
    scores = []
    for completion in completions:
        end = [home.tokenizer.eos_id] if completion.reason == "stop" else []
        with torch.no_grad():
            scores.append(float(reward_model(torch.tensor([[*prompt, *completion.tokens, *end]]))[0, -1]))
    best = completions[scores.index(max(scores))]
    assert out == home.tokenizer.decode(best.tokens) + "\n"
    assert f"(reward {max(scores):.3f}, the highest of 6; their mean {sum(scores) / 6:.3f}" in err


def test_a_function_may_be_the_judge(home, reward_model, call):
    (home.path / "mine.py").write_text("def longest(prompts, answers, rows):\n    return [len(a) for a in answers]\n")
    one = call("generate", "--best_of", "1", "--reward", "mine.py:longest", *SAMPLED)[1]
    status, out, err = call("generate", "--best_of", "6", "--reward", "mine.py:longest", *SAMPLED)
    assert status == 0 and len(out) >= len(one), err


def test_answers_to_be_judged_end_before_a_stop_text(home, reward_model, call):
    (home.path / "long.py").write_text("def long(prompts, answers, rows):\n    return [len(a) for a in answers]\n")
    asked = ("generate", "--best_of", "4", "--reward", "long.py:long", *SAMPLED)
    whole = call(*asked)[1].removesuffix("\n")
    stop = whole[len(whole) // 2]
    status, out, err = call(*asked, "--stop", stop)
    assert status == 0 and len(out) > 1 and stop not in out.removesuffix("\n"), err
    assert f"(reward {len(out) - 1:.3f}, the highest of 4" in err  # what is judged is what is printed
    asked = ("generate", "--best_of", "1", "--reward", "out/reward", *SAMPLED)
    stop = call(*asked)[1][3]
    status, out, err = call(*asked, "--stop", stop)
    assert status == 0 and len(out) <= 4 and "length" not in err, err
    assert f"(reward {score_of(home, reward_model, 'Tom?', out.removesuffix(chr(10))):.3f}" in err


def test_the_reward_means_what_it_means_in_training(home, reward_model, call, monkeypatch):
    """Sums of models and functions, and scores on the scale that a reward model's training recorded."""
    (home.path / "mine.py").write_text("def size(prompts, answers, rows):\n    return [len(a) for a in answers]\n")

    def best(reward: str) -> tuple[float, str, str]:
        status, out, err = call("generate", "--best_of", "1", "--reward", reward, *SAMPLED)
        assert status == 0, err
        return float(err.partition("(reward ")[2].partition(",")[0]), out, err

    raw, out, err = best("out/reward")
    assert "records no scale of its scores" in err
    size = len(out.removesuffix("\n"))
    assert best("0.5*out/reward,2*mine.py:size")[0] == pytest.approx(0.5 * raw + 2 * size, abs=2e-3)
    monkeypatch.setattr(rewards, "score_scale", lambda folder: (raw - 3, 2.0))
    scaled, _, err = best("out/reward")
    assert scaled == pytest.approx(1.5, abs=2e-3) and "no scale" not in err


def test_a_reward_model_must_read_the_longest_answer_there_can_be(home, reward_model, call):
    """Its own context counts, of which nothing that stands before a text is left to it."""
    short = Transformer(dataclasses.replace(reward_model.config, max_seq_len=30))

    def fill(folder):
        huggingface.save_model(short, folder, special_ids=home.tokenizer.special_ids)
        home.tokenizer.save(folder)

    files.write_folder(home.path / "out" / "short" / "step-00000001", fill)
    prompt, _ = home.tokenizer.encode_chat([{"role": "user", "content": "Tom?"}], add_generation_prompt=True)
    asked = ("generate", "--prompt", "Tom?", "--best_of", "2", "--reward", "out/short", "--max_new_tokens")
    assert call(*asked, str(30 - len(prompt)))[0] == 0
    status, _, err = call(*asked, str(31 - len(prompt)))
    assert status == 2 and "reads at most 30 tokens" in err and err.rstrip().endswith("lower --max_new_tokens")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--best_of 4", "--best_of and --reward: each needs the other"),
        ("--reward out/reward", "--best_of and --reward: each needs the other"),
        ("--best_of 4 --reward out/reward --temperature 0", "--temperature 0: all answers would be the same"),
        ("--template simple", "--template simple: is for --best_of"),
        ("--best_of 4 --reward out/sft", "is a language model (LlamaForCausalLM) and no reward model"),
        ("--best_of 65537 --reward out/reward", "--best_of 65537"),
        ("--best_of 4 --reward best", "is neither one of"),
    ],
)
def test_what_has_no_best_is_refused(arguments, words, reward_model, call):
    status, _, err = call("generate", "--prompt", "Tom", *arguments.split())
    assert status == 2 and words in err and err.count("\n") == 1, err
