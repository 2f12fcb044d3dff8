"""Every format that is read, damaged in every way, through every command that reads it: loaded, or one line.

Each case runs in a child of its own: it must end by itself, in time, below a limit of memory, with status 0, or with 2
and one line; and nothing outside its folder may change. The seed of a case is its number, so that
one that fails can be run again alone.
"""

import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data.prepare import prepare
from minillm.__main__ import COMMANDS
from minillm.__main__ import main as minillm
from minillm.base.command_line import parse
from minillm.base.process import run_script
from minillm.checkpoint import huggingface, train_state
from minillm.checkpoint.any_format import open_model
from minillm.checkpoint.gguf import write_file
from minillm.datasets.instructions import InstructionRows
from minillm.datasets.preferences import PreferenceRows
from minillm.datasets.prompts import PromptRows
from minillm.datasets.token_bins import TokenBins
from minillm.distributed.ranks import Ranks
from minillm.evaluation.validation import read_bits
from minillm.generation.completion import generate
from minillm.model.transformer import Transformer
from minillm.tokenizer import byte_bpe, edit
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer
from minillm.training.config import TrainingConfig
from minillm.tuning import peft_format
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig
from tests.minillm.tuning import tiny
from tests.mutations import copy_of, mutate, snapshot

SECONDS = 60  # that a case may take on a busy machine
MEMORY = 400 << 20  # bytes that reading may take; the program itself with torch has some 600 MB
WORDS = ["the", "red", "fox", "狐狸", "gave", "小明", "a", "hat", "and", "3", "apples", "to", "her", "friend", ".", "?"]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children by fork")


# ---- what is read


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A small folder of each kind."""
    pytest.importorskip("gguf")
    for module in COMMANDS.values():  # once, not in each child
        importlib.import_module(module)
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    pyplot.figure()
    home = tmp_path_factory.mktemp("fuzz") / "home"
    home.mkdir()
    torch.set_num_threads(1)  # a forked child has no threads of its parent
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=30)) for _ in range(60)]
    (home / "said.txt").write_text("hat\n")  # to `chat`
    (home / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    rows = [{"instruction": text, "input": "", "output": "a hat"} for text in texts[:8]]
    pairs = [{"prompt": "Who?", "chosen": "Tom", "rejected": rejected, "margin": 0.5} for rejected in ("Ann", "Tim")]
    pairs += [{"prompt": "Who?", "responses": ["Tom", "Ann"], "scores": [2, 1.5]}]
    pairs += [
        {"chosen": f"\n\nHuman: Who?\n\nAssistant: {name}", "rejected": "Human: Who?\n\nAssistant: I"} for name in "AB"
    ]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (home / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    # tokenizers of both kinds, and models of both forms with them
    pieces = train_tokenizer(texts, 400, home / "pieces")
    byte_level = write_byte_level(home / "byte_level")
    model = tiny.base(vocab_size=400, max_seq_len=64)
    weights = huggingface.weights_of(model)
    stored = huggingface.StoredModel(model.config, torch.float32, lambda key, dtype: weights[key].to(dtype))
    for name, tokenizer, shard in (("model", pieces, None), ("sharded", byte_level, 20_000)):
        (home / name).mkdir()
        huggingface.write_folder(stored, home / name, max_shard_size=shard)
        tokenizer.save(home / name)
    (home / "adapters").mkdir()
    for tune in ("lora", "prefix"):
        fresh = huggingface.load_model(home / "model")
        adapter = attach(fresh, TuningConfig(tune=tune, **({"n_virtual": 3} if tune == "prefix" else {})))
        (home / "adapters" / tune).mkdir()
        peft_format.save_adapter(adapter, home / "adapters" / tune)
    write_file(*open_model(str(home / "model")), home / "model.gguf", torch.float32)

    # data, a checkpoint, what else is read
    prepare([home / "texts.txt"], home / "data", tokenizer=home / "pieces", val_fraction=0.2, workers=1)
    n_documents = TokenBins(home / "data", "val").n_documents
    np.save(home / "data" / "val_bits.npy", np.linspace(90, 110, n_documents))
    checkpoint = train_state.Checkpoint(
        model=huggingface.weights_to_write(model),
        write_beside=lambda folder: huggingface.write_config(model.config, folder, {}, torch.float32),
        state={"fingerprints": {"data": "x"}, "config": {"init_from": None}, "time_s": 1.0, "scaler": {}},
        optimizers=[stepped(model)],
        named_parameters=dict(model.named_parameters()),
    )
    train_state.save(home / "run", 2, Ranks(0, 1, torch.device("cpu")), checkpoint).finish()
    (home / "run" / "step-00000002" / "manifest.json").unlink()  # which would find all damage by itself
    (home / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "time_s": 0.5}\n{"step": 2, "val_bpb": 3}\n')
    speed = {"device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "flops_per_token": 7_000_000}
    (home / "speed.json").write_text(json.dumps({**speed, "tokens_per_s": {"minillm": 5e6, "minillm, compiled": 6e6}}))
    (home / "options.toml").write_text('data = "data"\nsteps = 3\nlr = 0.1\n')
    pruned, id_map = edit.prune(pieces, texts)
    edit.save(pruned, home / "pruned", pieces, id_map)
    return home


def write_byte_level(folder: Path) -> Tokenizer:
    """A tokenizer.json of 400 ids: bytes, pairs of letters, bos and eos."""
    pairs = list(itertools.islice(itertools.product("etaoinshrdlu", repeat=2), 142))
    pieces = [*byte_bpe.byte_characters(), *("".join(pair) for pair in pairs)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    control = {"<s>": 398, "</s>": 399}
    folder.mkdir()
    vocabulary = byte_bpe.ByteBPE(ids, pairs, "gpt-2", {}, nfc=False, words_first=False)
    (folder / "tokenizer.json").write_bytes(byte_bpe.write(vocabulary, control, bos="<s>"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(folder)


def stepped(model: Transformer) -> torch.optim.Optimizer:
    """AdamW with a state."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def command(line: str):
    """A reader that runs `python -m minillm` with this line."""
    return partial(minillm, line.split())


def tokenize(folder: str) -> None:
    """All that a tokenizer is asked for."""
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.prompt_ids("the red fox, 狐狸")
    assert max(ids, default=0) < tokenizer.vocab_size
    tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.vocab_size - 1])
    tokenizer.encode_chat([{"role": "user", "content": "a hat"}])
    tokenizer.save(Path("saved"))
    Tokenizer.load("saved")


def read_data() -> None:
    for split in ("train", "val"):
        bins = TokenBins("data", split)
        assert bins.read(0, min(100, bins.n_tokens)).max() < bins.vocab_size
        bins.identity()
    read_bits(bins)


def prepare_again() -> None:
    prepare([Path("texts.txt")], Path("data"), tokenizer=Path("pieces"), val_fraction=0.2, workers=1)
    TokenBins("data", "train")


def resume() -> None:
    folder = Path("run/step-00000002")
    model = huggingface.load_model(folder)
    train_state.read_state(folder)
    train_state.restore_optimizers(folder, [stepped(model)], dict(model.named_parameters()))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def compute(path: str) -> None:
    """The logits of a model in any format are finite, or generation refuses them."""
    stored, _ = open_model(path)
    model = Transformer(stored.config)
    for name, parameter in model.named_parameters():
        parameter.data = stored.read(huggingface.export_name(name), torch.float32)
    model.build_rotation()
    generate(model, [list(range(8))], 1)


MODEL = ["model/config.json", "model/model.safetensors", "model/tokenizer.model", "model/tokenizer_config.json"]
SHARDED = ["sharded/config.json", "sharded/model.safetensors.index.json", "sharded/model-00001-of-*.safetensors"]
SHARDED += ["sharded/tokenizer.json"]
LORA, PREFIX = (
    [f"adapters/{tune}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")]
    for tune in ("lora", "prefix")
)
STEP, ID_MAP = "run/step-00000002", "pruned/id_map.json"
READERS = {  # what is run → files of which one is damaged
    "generate": (command("generate --model model --prompt fox --max_new_tokens 3"), MODEL),
    "generate, shards": (command("generate --model sharded --prompt fox --max_new_tokens 3"), SHARDED),
    "generate, LoRA": (command("generate --model adapters/lora --base model --prompt fox --max_new_tokens 3"), LORA),
    "generate, prefix": (
        command("generate --model adapters/prefix --base model --prompt a --max_new_tokens 3"),
        PREFIX,
    ),
    "chat": (command("chat --model sharded --max_new_tokens 3"), SHARDED),
    "eval": (command("eval --model model --data texts.txt"), [*MODEL, "texts.txt"]),
    "merge": (command("merge --model model --adapter adapters/lora --out merged"), LORA),
    "info": (command("info --model model"), MODEL),
    "import": (command("import --model model.gguf --out imported"), ["model.gguf"] * 3),
    "export": (command("export --model model --format gguf --out exported.gguf"), MODEL),
    "resize": (
        command("resize --model model --tokenizer pruned --id_map pruned/id_map.json --out smaller"),
        ["pruned/*"],
    ),
    "plan": (command("plan --preset tiny --gpus 2 --batch_size 64 --measured speed.json"), ["speed.json"]),
    "plot": (command("plot run --out curve.png"), ["run/metrics.jsonl"]),
    "GGUF": (partial(compute, "model.gguf"), ["model.gguf"] * 3),
    "weights": (partial(compute, "model"), MODEL[:2]),
    "tokenizer.model": (partial(tokenize, "pieces"), ["pieces/*"]),
    "tokenizer.json": (partial(tokenize, "byte_level"), ["byte_level/*.json"]),
    "bins": (read_data, ["data/meta.json"] * 3 + ["data/*.bin", "data/val-00000.sizes", "data/val_bits.npy"]),
    "prepare": (prepare_again, ["data/meta.json"] * 3 + ["data/*.bin", "data/tokenizer.model", "texts.txt"]),
    "resume": (resume, [f"{STEP}/resume/train_state.json", f"{STEP}/resume/optimizer.safetensors"]),
    "--config": (lambda: parse(TrainingConfig, "", ["--config", "options.toml"]), ["options.toml"]),
    "rows": (lambda: InstructionRows("rows.jsonl", Tokenizer.load("pieces"), 64).batch(range(2)), ["rows.jsonl"]),
    "preferences": (
        lambda: PreferenceRows("pairs.jsonl", Tokenizer.load("pieces"), 64).batch(range(2)),
        ["pairs.jsonl"],
    ),
    "prompts": (lambda: PromptRows("rows.jsonl", Tokenizer.load("pieces"), 96).rows(range(2)), ["rows.jsonl"]),
}


# ---- a case


def run_case(home: Path, scratch: Path, number: int) -> tuple[str, str, str]:
    """Reader, damage and outcome of the case with this number: loaded, refused, or what went wrong."""
    draw = random.Random(number)
    name = list(READERS)[number % len(READERS)]
    read, patterns = READERS[name]
    with copy_of(home, scratch / "case") as folder:
        outside = scratch / "outside"
        outside.mkdir()
        (outside / "canary").write_text("x")
        damaged = draw.choice(sorted(folder.glob(draw.choice(patterns))))
        how = mutate(damaged, outside, draw)
        before = snapshot(outside)
        outcome = in_a_child(read, folder)
        if snapshot(outside) != before or {path.name for path in scratch.iterdir()} != {"case", "outside", "log"}:
            outcome = "changed what is outside its folder"
        shutil.rmtree(outside)
    return name, f"{damaged.relative_to(folder)}: {how}", outcome


def in_a_child(read, folder: Path) -> str:
    """How reading in this folder ends."""
    log = folder.parent / "log"
    before_kib = resident_kib()  # pytest may have grown large; the child begins with all of it
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.chdir(folder)
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdin = Path("said.txt").open()  # noqa: SIM115
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - pytest's own may hold text already
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            status = run_script(lambda: read() and None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status, used = os.wait4(pid, 0)
    text = log.read_bytes().decode(errors="replace")
    taken_kib = used.ru_maxrss - before_kib
    if taken_kib << 10 > MEMORY:
        return f"took {taken_kib >> 10} MiB"
    if os.WIFSIGNALED(status):
        return f"ended by signal {os.WTERMSIG(status)}"
    last = text.rstrip("\n").rpartition("\n")[2]
    if os.WEXITSTATUS(status) == 0:
        return "loaded"
    if os.WEXITSTATUS(status) != 2 or "Traceback" in text or not last.startswith("error: "):
        return f"status {os.WEXITSTATUS(status)}: {text[-1500:]}"
    if len(last) > 5000 or not last.isprintable():
        return f"said badly: {last[:300]!r}"
    return "refused"


def resident_kib() -> int:
    """KiB of memory that this process has at present."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def run_cases(home: Path, scratch: Path, numbers) -> Counter:
    """Outcomes by reader; fails with all that went wrong."""
    outcomes, wrong = Counter(), []
    for number in numbers:
        name, damage, outcome = run_case(home, scratch, number)
        outcomes[name, outcome if outcome in ("loaded", "refused") else "wrong"] += 1
        if outcome not in ("loaded", "refused"):
            wrong.append(f"case {number}, {name}, {damage}: {outcome}")
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)
    return outcomes


@pytest.mark.parametrize("name", READERS)
def test_what_is_whole_is_read(home, tmp_path, name):
    with copy_of(home, tmp_path / "case") as folder:
        assert in_a_child(READERS[name][0], folder) == "loaded", (tmp_path / "log").read_text()


def test_damaged_files_are_loaded_or_refused_in_one_line(home, tmp_path):
    outcomes = run_cases(home, tmp_path, range(2 * len(READERS)))
    assert {name for name, _ in outcomes} == set(READERS)


@pytest.mark.slow
def test_thousands_of_damaged_files(home, tmp_path, request):
    """Ten thousand of them with `-m slow`, a thousand with all other tests."""
    count = 10_000 if request.config.option.markexpr == "slow" else 1_000
    outcomes = run_cases(home, tmp_path, range(count))
    for name in READERS:  # the table of docs/en/checkpoint.md
        print(f"| {name} | {outcomes[name, 'loaded']:,} | {outcomes[name, 'refused']:,} |")
