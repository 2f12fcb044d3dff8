"""An English model learns Chinese: a vocabulary, its merge, surgery, further pretraining, instructions, a chat.

    python docs/chinese.py                                     on the bundled corpus; nothing else is needed
    python docs/chinese.py --quick                             the same in two minutes, to see that all of it runs
    python docs/chinese.py --tokenizer mistral.model --english shakespeare.txt --chinese novels.jsonl.gz \
        --rare poems.jsonl.gz --instructions alpaca.jsonl      on texts of yours

Prints each command before it runs, so each can be given by hand. The same is done without the surgery, where the old
vocabulary spells Chinese in bytes: on the same text, for comparison. Numbers come to OUT/results.json, a plot to
OUT/chinese.png. Run again, it goes on where it was stopped. docs/chinese.md tells what came of it.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from data import bundled
from data.world.questions import tasks
from data.world.texts import documents
from minillm.base.command_line import Parser
from minillm.base.process import run_script
from minillm.training import plot

HAN, LATIN = re.compile("[\u4e00-\u9fff]"), re.compile("[A-Za-z]")


@dataclass(frozen=True)
class Size:
    """How much is done: MB of text read in each language, epochs of instructions, pieces, a model's shape; and how."""

    english: float
    chinese: float
    epochs: float
    pieces: int
    shape: dict
    seq_len: int = 128
    answer_len: int = 256
    batch: int = 16  # sequences of a step that learns Chinese; of little text, small steps learn more
    stage2: str = "lora"


TINY = dict(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=128)
BUNDLED, BUNDLED_QUICK = Size(1.5, 1, 1, 1500, {}), Size(0.3, 0.15, 0.25, 700, TINY, 64)
TEXTS, TEXTS_QUICK = Size(0.8, 0.6, 0.5, 8000, {}, 128, 384, 4), Size(0.1, 0.1, 0.1, 8000, TINY, 128, 384, 4)
STAGE1 = dict(tune="freeze", train_layers="embed,head")
STAGE2 = {  # another seed: another order, not the text of the first stage once more
    "lora": dict(tune="lora", lora_rank=16, modules_to_save="embed_tokens,lm_head", seed=1),
    "full": dict(tune="full", seed=1),
}
SHARES = {"stage1": 0.3, "stage2": 0.7}  # of the text


# ---- commands ----------------------------------------------------------------------------------------------------


def execute(arguments: list[str], said: str) -> tuple[int, str]:
    """Run python with these arguments; show and return what it prints. said: for its standard input."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    printed = []
    with subprocess.Popen([sys.executable, *arguments], env=env, **pipes) as process:
        process.stdin.write(said)
        process.stdin.close()
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)
    return process.returncode, "".join(printed)


def run(command: str, *values, said: str = "", once: bool = False, **options) -> str:
    """Run a command of the project's with `--name value …` for each option, and return what it printed.

    once: leave it out if its --out is there. Ends the script if the command fails.
    """
    arguments = [*command.split(), *map(str, values)]
    for name, value in options.items():
        arguments += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    if once and Path(options["out"]).exists():
        print(f"{options['out']}: there already")
        return ""
    status, printed = execute(arguments, said)
    if status:
        sys.exit(status)
    return printed


def number(pattern: str, printed: str) -> float:
    """The number that stands where the pattern has its group."""
    return float(re.search(pattern, printed)[1].replace(",", ""))


def bits_per_byte(model: Path, bins: Path, size: Size) -> float:
    return number(r"bits per byte +([\d.]+)", run("-m minillm eval", model=model, data=bins, seq_len=size.seq_len))


def steps_for(megabytes: float, bins: Path, tokens_of_step: int) -> int:
    """Steps that read so much of a text."""
    meta = json.loads((bins / "meta.json").read_text())
    tokens = sum(file["tokens"] for file in meta["files"]["train"])
    return math.ceil(megabytes * 1e6 * tokens / meta["bytes"]["train"] / tokens_of_step)


# ---- texts -------------------------------------------------------------------------------------------------------


@dataclass
class Texts:
    """Files of text and of instructions, and what the models are asked in the end."""

    english: list[Path]
    chinese: list[Path]
    instructions: Path
    prompt: str
    question: str
    tokenizer: Path | None = None  # None: learnt from the English text
    rare: list[Path] | None = None  # text whose rare characters get pieces, too
    questions: Path | None = None  # held out, to count right answers


def bundled_texts(out: Path, size: Size) -> Texts:
    """The English and the Chinese part of the bundled corpus, without its translations, and its Chinese questions."""
    english, chinese, wanted, written = [], [], 2.2e6 * max(size.english, size.chinese), 0
    for text, _ in documents(bundled.SEEDS["train"]):
        if written > wanted:
            break
        if not (HAN.search(text) and LATIN.search(text)):
            (chinese if HAN.search(text) else english).append({"text": text})
            written += len(text.encode())
    asked = {}
    for split, count in (("train", 4000), ("heldout", 200)):
        rows = (row for row in tasks(0, split) if row["lang"] == "zh" and row["family"] != "translate")
        asked[split] = list(itertools.islice(rows, count))
    out.mkdir(parents=True, exist_ok=True)
    files = {"english": english, "chinese": chinese, **asked}
    for name, rows in files.items():
        bundled.write_lines(out / f"{name}.jsonl", rows)
    paths = {name: out / f"{name}.jsonl" for name in files}
    question = next(row["instruction"] for row in asked["heldout"] if not row["input"])
    return Texts([paths["english"]], [paths["chinese"]], paths["train"], "星期四", question, questions=paths["heldout"])


# ---- the way -----------------------------------------------------------------------------------------------------


def vocabularies(texts: Texts, size: Size, out: Path) -> tuple[Path, Path]:
    """The old vocabulary, and the same with the Chinese pieces behind."""
    learn = "-m minillm vocab train"
    old = texts.tokenizer or out / "vocab-english"
    if texts.tokenizer is None:
        run(learn, input=texts.english, vocab_size=size.pieces, out=old, once=True)
    chinese = out / "vocab-chinese"
    run(learn, input=texts.chinese, vocab_size=size.pieces, out=chinese, compare=old, once=True)
    if texts.rare:
        rare, both = out / "vocab-rare", out / "vocab-chinese-rare"
        run(learn, input=texts.rare, vocab_size=size.pieces, character_coverage=0.9999, out=rare, once=True)
        run("-m minillm vocab merge", base=chinese, add=rare, out=both, once=True)
        chinese = both
    new = out / "vocab-merged"
    corpus = [*texts.chinese, *texts.english]
    run("-m minillm vocab merge", base=old, add=chinese, corpus=corpus, out=new, once=True)
    return old, new


def characters_per_token(tokenizer: Path, texts: Texts) -> dict[str, float]:
    """Of each kind of text, and the number of pieces."""
    found = {}
    for name in ("chinese", "rare", "english"):
        if files := getattr(texts, name):
            printed = run("-m minillm vocab inspect", tokenizer, corpus=files)
            found[name] = number(r"([\d.]+) characters per token", printed)
    return {"pieces": int(number(r": ([\d,]+) pieces", printed)), **found}


def pretrain(bins: Path, megabytes: float, size: Size, batch: int, **options) -> None:
    """Train a model on so much of a text."""
    steps = steps_for(megabytes, bins, batch * size.seq_len)
    shape = dict(batch_size=batch, seq_len=size.seq_len, document_attention="true", warmup_steps=steps // 10)
    often = dict(eval_every=max(1, steps // 4), eval_tokens=1 << 30)
    run("train_pretrain.py", data=bins, steps=steps, **shape, **often, **options)


def fold_in(adapter: Path, base: Path) -> Path:
    """The folder of a model with the adapter that was trained over it merged in."""
    merged = adapter.with_name(f"{adapter.name}-merged")
    run("-m minillm merge", model=base, adapter=adapter, out=merged, once=True)
    return merged


def seconds_of(training: Path) -> float:
    """Of a run, its validations but the last included."""
    return plot.series(plot.read_metrics(training), "loss")[1][-1]


def learn_chinese(model: Path, english: Path, chinese: Path, texts: Texts, size: Size, out: Path, more: dict) -> dict:
    """Two stages of pretraining on Chinese and one on instructions; bits per byte and seconds after each.

    model: to begin with; english, chinese: token bins for its vocabulary; more: options of both training scripts.
    """
    models, seconds = {"start": model}, [0.0]
    for name, how in (("stage1", STAGE1), ("stage2", STAGE2[size.stage2])):
        pretrain(chinese, SHARES[name] * size.chinese, size, size.batch, init_from=model, out=out / name, **how, **more)
        model = models[name] = out / name if how["tune"] == "full" else fold_in(out / name, model)
    answers = dict(data=texts.instructions, epochs=size.epochs, seq_len=size.answer_len, batch_size=size.batch // 2)
    run("train_sft.py", tune="lora", **answers, **more, init_from=model, out=out / "instructions")
    model = models["instructions"] = fold_in(out / "instructions", model)
    seconds += [seconds_of(out / name) for name in (*SHARES, "instructions")]
    found = {
        name: {
            "chinese": bits_per_byte(folder, chinese, size),
            "english": bits_per_byte(folder, english, size),
            "seconds": round(spent, 1),
        }
        for (name, folder), spent in zip(models.items(), seconds, strict=True)
    }
    if texts.questions:
        printed = run("-m minillm eval", model=model, data=texts.questions)
        found["instructions"]["exact match"] = number(r"total +([\d.]+)%", printed) / 100
    sampling = dict(temperature=0.7, top_p=0.9, seed=1)
    run("-m minillm generate", model=models["stage2"], prompt=texts.prompt, max_new_tokens=100, **sampling)
    run("-m minillm chat", model=model, max_new_tokens=120, said=f"{texts.question}\n", **sampling)
    return found


def prepare(files: list[Path], tokenizer: Path, out: Path) -> Path:
    run("data/prepare.py", input=files, tokenizer=tokenizer, out=out)
    return out


def whole(texts: Texts, size: Size, out: Path, more: dict) -> dict:
    """All of it; returns the numbers."""
    old, new = vocabularies(texts, size, out)
    results = {"old vocabulary": characters_per_token(old, texts), "new vocabulary": characters_per_token(new, texts)}

    english = prepare(texts.english, old, out / "english-old")
    base = out / "english-model"
    pretrain(english, size.english, size, 16, out=base, max_seq_len=512, **size.shape, **more)
    results["English model's seconds"] = round(seconds_of(base), 1)

    resized = out / "resized"
    run("-m minillm resize", model=base, tokenizer=new, out=resized, once=True)
    both = (prepare(getattr(texts, name), new, out / f"{name}-new") for name in ("english", "chinese"))
    results["with surgery"] = learn_chinese(resized, *both, texts, size, out / "with", more)

    chinese = prepare(texts.chinese, old, out / "chinese-old")
    results["without surgery"] = learn_chinese(base, english, chinese, texts, size, out / "without", more)
    return results


# ---- what came of it ---------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """The numbers for the terminal."""
    lines = ["characters per token"]
    for name in ("old vocabulary", "new vocabulary"):
        pieces, *rest = results[name].items()
        lines.append(f"  {name}, {pieces[1]:,} pieces: " + ", ".join(f"{text} {value:.3f}" for text, value in rest))
    for way in ("without surgery", "with surgery"):
        lines.append(f"{way:<18}  Chinese  English  bits per byte, seconds of training")
        for name, row in results[way].items():
            lines.append(f"  {name:<16}{row['chinese']:9.3f}{row['english']:9.3f}{row['seconds']:9.0f}")
        if "exact match" in row:
            lines.append(f"  held-out questions answered exactly: {row['exact match']:.1%}")
    return "\n".join(lines)


def draw(results: dict, size: Size, out: Path) -> Path:
    """Bits per byte on Chinese text against text read and against tokens trained on, both ways."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for way, colour in zip(("without", "with"), plot.COLOURS, strict=False):
        read, tokens = [0.0], [0.0]
        scores = [results[f"{way} surgery"]["start"]["chinese"]]
        for name, share in SHARES.items():
            rows = plot.read_metrics(out / way / name)
            steps, _, found = plot.series(rows, "val_bpb")
            read += [read[-1] + share * size.chinese * step / rows[-1]["step"] for step in steps]
            tokens += [tokens[-1] + size.batch * size.seq_len * step / 1000 for step in steps]
            scores += found
        for axis, x in zip(axes, (read, tokens), strict=True):
            axis.plot(x, scores, "o-", markersize=4, color=colour, label=f"{way} surgery")
    axes[0].set(xlabel="Chinese text read, MB", ylabel="bits per byte, held-out Chinese", yscale="log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[1].set(xlabel="the same in tokens, thousands")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out / "chinese.png", dpi=110)
    return out / "chinese.png"


def build_parser() -> argparse.ArgumentParser:
    about = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=about)
    files = dict(type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the English model's vocabulary (.model)")
    parser.add_argument("--english", help="texts of the English model", **files)
    parser.add_argument("--chinese", help="texts to learn Chinese from", **files)
    parser.add_argument("--rare", help="texts whose rare characters get pieces, too", **files)
    parser.add_argument("--instructions", type=Path, metavar="FILE", help="Chinese questions and answers")
    parser.add_argument("--prompt", default="却说", help="to go on from, at the end (default 却说)")
    parser.add_argument("--question", default="怎样才能睡得好？", help="to answer (default 怎样才能睡得好？)")
    parser.add_argument("--out", type=Path, default=Path("out/chinese"), help="folder (default out/chinese)")
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the text is read")
    parser.add_argument("--stage2", default="lora", choices=STAGE2, help="what is trained in the second stage")
    parser.add_argument("--quick", action="store_true", help="as little as shows that all of it runs")
    parser.add_argument("--dtype", default="auto", help="of training's matrix products, e.g. bfloat16")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    own = (args.tokenizer, args.english, args.chinese, args.instructions)
    if any((*own, args.rare)) and not all(own):
        parser.error("of texts of yours give all: --tokenizer, --english, --chinese and --instructions")
    if not Path("train_pretrain.py").exists():
        parser.error("run this from minillm's folder: python docs/chinese.py")
    sizes = (TEXTS, TEXTS_QUICK) if any(own) else (BUNDLED, BUNDLED_QUICK)
    size = dataclasses.replace(sizes[args.quick], stage2=args.stage2)
    size = dataclasses.replace(size, english=size.english * args.scale, chinese=size.chinese * args.scale)
    if any(own):
        named = dict(tokenizer=args.tokenizer, rare=args.rare)
        texts = Texts(args.english, args.chinese, args.instructions, args.prompt, args.question, **named)
    else:
        texts = bundled_texts(args.out / "texts", size)
    results = whole(texts, size, args.out, {"dtype": args.dtype})
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results)}\n{args.out / 'results.json'}")
    if importlib.util.find_spec("matplotlib"):
        print(draw(results, size, args.out))


if __name__ == "__main__":
    sys.exit(run_script(main))
