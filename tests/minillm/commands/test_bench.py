"""No times here: that both sides are what they ought to be, and that the table is complete."""

import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from minillm.base.errors import UserError
from minillm.commands.bench import align, busy, data, evaluate, generate, serve, train, tune
from minillm.commands.bench import on_ranks as of_ranks
from minillm.commands.bench.measure import alone_on_gpu, transformers_twin
from minillm.distributed.ranks import Ranks
from minillm.generation import completion
from minillm.model import config
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning import peft_format
from tests.forked_ranks import on_ranks
from tests.minillm.evaluation.benchmark_rows import write_all


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The preset a few thousand parameters small, and its vocabulary."""
    shape = config.ModelConfig(
        vocab_size=40, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=32, max_seq_len=64, tie_embeddings=True
    )
    monkeypatch.setattr(config, "preset", lambda name, **changes: shape)


def test_every_method_has_its_row(capsys):
    tune.run(tune.Config(device="cpu", rows=2, seq_len=8))
    printed = capsys.readouterr().out.splitlines()[5:]
    rows = {line[2:18].strip(): line[18:].split() for line in printed}
    assert rows.keys() == tune.METHODS.keys()
    with_peft = {"full", "lora", "dora", "ia3", "prefix", "prompt", "ptuning"}
    assert {name for name, row in rows.items() if len(row) == 6} == with_peft
    assert {name for name, row in rows.items() if len(row) == 3} == rows.keys() - with_peft
    assert rows["lora"][0] == str(2 * 8 * (2 * 32 + 2 * 24 + 3 * 48)).replace("4096", "4,096")
    assert rows["ia3"][0] == str(2 * (8 + 8 + 32)) and rows["prompt"][0] == str(16 * 16)


def test_the_adapters_count_in_the_losses_that_are_compared():
    x = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = {
        name: [side.loss().item() for side in tune._sides("tiny", options, x, torch.float32).values()]
        for name, options in tune.METHODS.items()
    }
    for name in ("lora", "dora", "ia3", "prefix", "prompt", "ptuning"):
        assert losses[name][0] == pytest.approx(losses[name][1], rel=1e-5)
        assert abs(losses[name][0] / losses["full"][0] - 1) > 1e-4, name


def test_sides_that_differ_are_not_timed(monkeypatch):
    describe = peft_format.describe
    monkeypatch.setattr(peft_format, "describe", lambda adapter: describe(adapter) | {"lora_alpha": 17})
    with pytest.raises(UserError, match=r"lora: losses .* do not compare"):
        tune.run(tune.Config(device="cpu", rows=2, seq_len=8))


def test_what_autograd_keeps_is_counted_once():
    w, x = torch.nn.Parameter(torch.ones(3, 4)), torch.ones(5, 4)
    layer = torch.nn.ParameterList([w])

    def loss():
        y = x @ w.T  # keeps x
        return (y * y).sum()  # keeps y, twice

    side = tune.Side.of(layer, loss, torch.float32)
    side.step()
    numbers = 3 * w.numel() + w.numel() + x.numel() + 15  # weights, two moments; gradient; x; y
    assert side.memory() == 4 * numbers + 4  # AdamW counts its steps


def test_a_sequence_that_leaves_no_room_is_refused():
    with pytest.raises(UserError, match="--seq_len 49: choose 2 to 48"):
        tune.run(tune.Config(device="cpu", rows=1, seq_len=49))


def names(printed: str) -> list[str]:
    """The sides of a comparison, from the lines with their speed."""
    return [line.split("  ")[1] for line in printed.splitlines() if " tok/s" in line]


def test_a_training_step_stands_beside_plain_pytorch_and_gpt_2(capsys, monkeypatch):
    config = train.Config(device="cpu", rows=2, seq_len=8, vocab_size=40)
    train.run(config)
    printed = capsys.readouterr().out
    ours, plain, theirs = names(printed)
    assert (plain, ours) == ("plain PyTorch", "minillm") and theirs.startswith("GPT-2, ")
    assert printed.count(" x plain PyTorch\n") == 3
    plain_loss = train.plain_loss
    monkeypatch.setattr(train, "plain_loss", lambda *inputs: 1.01 * plain_loss(*inputs))
    with pytest.raises(UserError, match="the two sides compute other losses"):
        train.run(config)


def test_generation_stands_beside_transformers(capsys, monkeypatch):
    config = generate.Config(device="cpu", new_tokens=4)
    generate.run(config)
    printed = capsys.readouterr().out
    assert names(printed)[:2] == ["minillm", "transformers"] and "1.00 x transformers\n" in printed
    with pytest.raises(UserError, match="--new_tokens 33: choose 1 to 32"):
        generate.run(generate.Config(device="cpu", new_tokens=33))
    monkeypatch.setattr(completion, "generate", lambda *_: [completion.Completion([1, 2, 3, 4], "length")])
    with pytest.raises(UserError, match="do not choose the same tokens"):
        generate.run(config)


def test_generation_is_measured_without_transformers_too(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    generate.run(generate.Config(device="cpu", new_tokens=4))
    printed = capsys.readouterr().out
    assert names(printed)[0] == "minillm" and "  transformers: the benchmark needs transformers" in printed
    assert " x transformers" not in printed


@pytest.fixture
def no_gpus_memory(monkeypatch):
    """What is measured alone on a GPU is measured here, with no memory to be read."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)


def raising(*words):
    raise torch.OutOfMemoryError(*words)


def test_on_a_gpu_each_side_is_given_when_it_is_measured(capsys, no_gpus_memory):
    built = []
    sides = [("minillm", lambda: built.append("minillm") or int), ("plain", lambda: built.append("plain") or int)]
    measured = alone_on_gpu([*sides, ("theirs", partial(raising, "no\nroom")), ("last", lambda: int)], warm_ups=1)
    assert next(measured)[0] == "minillm" and built == ["minillm"]
    assert [name for name, *_ in measured] == ["plain", "last"]
    assert capsys.readouterr().out == "  theirs: OutOfMemoryError: no room\n"
    measured = alone_on_gpu([("minillm", raising), *sides[1:]], warm_ups=1)
    assert next(measured)[0] == "plain"
    with pytest.raises(UserError, match="minillm: failed, see above"):
        next(measured)


def test_a_side_that_fails_leaves_the_others_speed(capsys, monkeypatch, no_gpus_memory):
    monkeypatch.setattr(train, "in_turns", partial(alone_on_gpu, warm_ups=1))
    monkeypatch.setattr(train.Sides, "_on_cpu", lambda self: [("GPT-2", raising)])
    train.run(train.Config(device="cpu", rows=2, seq_len=8, vocab_size=40))
    printed = capsys.readouterr().out
    assert names(printed) == ["minillm", "plain PyTorch"] and "  GPT-2: OutOfMemoryError" in printed
    assert printed.count(" x plain PyTorch\n") == 2


def test_on_a_gpu_ours_come_first_and_nothing_is_built_before_its_turn(monkeypatch):
    monkeypatch.setattr(train, "transformers_twin", lambda model: pytest.fail("built before its turn"))
    sides = train.Sides(None, SimpleNamespace(is_cuda=True), None, torch.float32)
    found = [name for name, _ in sides.builders()]
    assert found[:4] == ["minillm", "minillm, compiled", "plain PyTorch", "plain PyTorch, compiled"]
    assert len(found) == 7 and found[-1].endswith(", Liger")


def test_the_same_model_of_transformers_is_made_where_ours_is():
    with torch.device("meta"):
        model = Transformer(config.preset("tiny"))
    twin, _ = transformers_twin(model)
    assert {tensor.device.type for tensor in (*twin.parameters(), *twin.buffers())} == {"meta"}


def test_reading_is_counted_in_tokens(capsys, monkeypatch):
    monkeypatch.setattr(data, "medians", lambda sides: {name: 0.5 for name, side in sides.items() if side() is None})
    data.run(data.Config(tokens=5000, rows=2000, seq_len=10))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("5,000 tokens of uint16, batches of 2000 × 10") and second.startswith(
        "  2 million tokens/s"
    )


def test_a_run_stands_beside_its_neighbours(capsys):
    busy.run(busy.Config(rows=2, seq_len=8, neighbours=(1,), seconds=0.01, repeats=1))
    _, _, head, *rows = capsys.readouterr().out.splitlines()
    assert all(name in head for name in busy.SIDES)
    assert [row.split()[0] for row in rows] == ["0", "1"]
    assert all(row.count(" tok/s (") == 2 for row in rows) and "(100%)" in rows[0]


def test_many_requests_have_a_line_for_each_number_of_clients(capsys):
    lengths = dict(longest_prompt=20, longest_answer=20, requests=5)
    serve.run(serve.Config(concurrency=(1, 3), repeats=2, gguf="none", transformers=False, bits=8, **lengths))
    title, _, head, *rows = capsys.readouterr().out.splitlines()
    assert "ours in 8 bits" in title and "between tokens" in head
    assert [row.split()[:2] for row in rows] == [["1", "minillm"], ["3", "minillm"]]
    assert all(row.split()[5] == "1.00" and row.count(" / ") == 4 for row in rows)


def test_every_token_of_every_request_is_timed():
    asked = [serve.Asked([1, 2, 3], n_new) for n_new in (8, 11, 9)]
    measured = serve.ours(serve.random_model("tiny"))(asked, 2)
    assert (measured.n_requests, measured.n_tokens) == (3, 28)
    assert (len(measured.to_first), len(measured.between)) == (3, 25)
    clock = serve.Clock(asked)
    with pytest.raises(UserError, match="request 0: 0 tokens came in place of 8"):
        clock.measured()


def test_llama_cpp_and_room_for_answers_are_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    lengths = dict(longest_prompt=20, longest_answer=20)
    with pytest.raises(UserError, match="pip install xllamacpp, or --gguf none"):
        serve.run(serve.Config(transformers=False, **lengths))
    with pytest.raises(UserError, match="together at most 64"):
        serve.run(serve.Config(longest_prompt=40, longest_answer=40))


@pytest.mark.parametrize(
    ("n_threads", "n_neighbours", "n_cores", "share"),
    [(2, 0, 2, 1.0), (2, 1, 2, 2 / 3), (2, 8, 2, 1 / 5), (1, 1, 2, 1.0), (4, 4, 16, 1.0), (16, 16, 16, 0.5)],
)
def test_the_fair_share(n_threads, n_neighbours, n_cores, share):
    assert busy.fair_share(n_threads, n_neighbours, n_cores) == pytest.approx(share)


def test_neighbours_end_with_the_benchmark():
    with pytest.raises(KeyboardInterrupt), busy.busy_neighbours(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in processes)


def test_benchmarks_stand_beside_the_harness(home, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    given = evaluate.Config(
        model=str(home.path / "out" / "sft"),
        tasks="arc_easy,copa",
        task_data=str(write_all(tmp_path)),
        shots=1,
        repeats=1,
        device="cpu",
    )
    evaluate.run(given)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[:2] for row in rows] == [["arc_easy", "10"], ["copa", "4"], ["together", "14"]]
    seconds = [[float(value) for value in row[2:4]] for row in rows]
    assert seconds[2] == pytest.approx([sum(side[:2]) for side in zip(*seconds, strict=True)], abs=0.011)
    monkeypatch.setattr(evaluate, "LARGEST_DIFFERENCE", -1)
    with pytest.raises(UserError, match="arc_easy: the two sides differ by"):
        evaluate.run(given)


def test_benchmarks_without_the_harness_say_what_to_install(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    given = evaluate.Config(model=str(home.path / "out" / "sft"), task_data=str(write_all(tmp_path)), device="cpu")
    with pytest.raises(UserError, match=r'pip install -e "\.\[harness\]"'):
        evaluate.run(given)
    with pytest.raises(UserError, match="holds no benchmark with choices"):
        evaluate.run(evaluate.Config(model=given.model, task_data=str(tmp_path / "none"), device="cpu"))


def test_alignment_without_trl_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"needs trl: pip install -e \"\.\[align\]\""):
        align.run(align.Config())


def test_alignment_beside_trl(capsys, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(align, "ENDING", 10)
    align.run(align.Config(prompts=2, group_size=2, prompt_len=5, max_new_tokens=6))
    printed = capsys.readouterr().out
    assert printed.count("tok/CPU s") == 5 and printed.count("x as fast") == 3


@pytest.fixture
def own(home, tmp_path) -> dict:
    """A trained model and three prompts, as options of `bench align`."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b c d"}\n{"prompt": "e"}\n')
    return dict(model=str(home.path / "out" / "sft"), data=str(prompts), group_size=2, max_new_tokens=6)


def test_both_sides_get_an_own_model_its_prompts_and_its_ends(own):
    task = align.own_task(align.Config(prompts=2, **own))
    tokenizer = Tokenizer.load(task.name)
    assert "out/sft/step-" in task.name and task.ends == list(tokenizer.stop_ids()) and task.pad not in task.ends
    messages = [[{"role": "user", "content": text}] for text in ("a", "b c d", "e")]
    known = [tokenizer.encode_chat(message, add_generation_prompt=True)[0] for message in messages]
    first, second = task.prompts
    assert first != second and first in known and second in known
    with pytest.raises(UserError, match=r"--prompts 4: .*prompts.jsonl has 3"):
        align.own_task(align.Config(prompts=4, **own))


def test_alignment_of_an_own_model_beside_trl(own, capsys):
    pytest.importorskip("trl")
    align.run(align.Config(prompts=2, **own))
    printed = capsys.readouterr().out
    assert "out/sft/step-" in printed and printed.count("tok/CPU s") == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(data="prompts.jsonl"), "--data prompts.jsonl: .*give --model"),
        (dict(model="out/sft"), "give its prompts by --data"),
        (dict(model="out/sft", data="prompts.jsonl", preset="tiny"), "--preset tiny: .*beside --model"),
        (dict(model="out/sft", data="prompts.jsonl", prompt_len=8), "--prompt_len 8: .*beside --model"),
    ],
)
def test_alignment_refuses_options_that_would_do_nothing(options, words):
    with pytest.raises(UserError, match=words):
        align.Config(**options)


def test_time_of_communication_counts_once_and_what_computing_hides_does_not():
    assert of_ranks.length([(0, 4), (1, 2), (3, 6), (10, 11)]) == 7
    assert of_ranks.length([]) == 0
    talking = [(0, 10), (5, 15), (30, 31)]
    assert of_ranks.talked_and_exposed(talking, [(2, 8), (14, 20)]) == (16, 2 + 6 + 1)
    assert of_ranks.talked_and_exposed(talking, []) == (16, 16)
    assert of_ranks.talked_and_exposed(talking, [(-5, 40)]) == (16, 0)


def test_of_many_ranks_the_extremes_are_listed():
    of_all = [[2**30, 0.5, 0.1]] * 100
    of_all[7], of_all[40], of_all[60] = [3 * 2**30, 0.5, 0.1], [2**30, 0.9, 0.1], [2**30, 0.5, 0.0]
    lines = of_ranks.table(of_all)
    assert [line.split()[0] for line in lines[1:]] == ["0", "7", "40", "60"]
    assert lines[2].split() == ["7", "3.00", "GiB", "50.0%", "10.0%"]


def _talks(rank: int) -> None:
    """A step that talks for most of its time, since rank 1 comes late; and one that does not talk."""
    ranks = Ranks(rank, 2, torch.device("cpu"))
    numbers = torch.zeros(10)

    def late() -> None:
        time.sleep(0.2 * ranks.rank)
        dist.all_reduce(numbers)

    talking, exposed = of_ranks.communication(ranks, late)
    if ranks.main:
        assert 0.8 < talking <= 1.01 and 0.8 < exposed <= talking + 1e-9
    assert of_ranks.communication(ranks, lambda: torch.ones(100) @ torch.ones(100)) == (0, 0)


def test_waiting_for_others_is_communication(tmp_path):
    on_ranks(2, tmp_path, _talks)


def test_options_of_ranks_are_refused_on_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="--shard 2 --compile true: for several ranks; start them by torchrun"):
        train.run(train.Config(shard="2", compile=True))
