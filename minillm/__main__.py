"""The commands around training: `python -m minillm generate|chat|eval|merge|plot|info|bench …` (each with --help)."""

import argparse
import contextlib
import dataclasses
import math
import sys
from pathlib import Path

import torch

from minillm import (
    UserError,
    bench,
    bench_tune,
    checkpoint,
    config,
    distributed,
    evaluate,
    generate,
    huggingface,
    plot,
    port_commands,
    quant,
    resize,
    run,
    selfcheck,
    training,
    tuning,
    vocab_commands,
)
from minillm.data import TokenBins
from minillm.tokenizer import Tokenizer
from minillm.validation import Validation

DEFAULT_RUNS = ("out/sft", "out/pretrain")


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    return args.command(args) or 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m minillm", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(function, name: str) -> argparse.ArgumentParser:
        text = function.__doc__
        sub = commands.add_parser(name, help=text.split("\n")[0], description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        return sub

    sub = command(run_generate, "generate")
    _model_options(sub)
    _sampling_options(sub)
    sub.add_argument("--prompt", required=True, help="the text to continue; - reads it from standard input")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    sub = command(run_chat, "chat")
    _model_options(sub)
    _sampling_options(sub)
    sub.add_argument("--system", help="what the model is told before the first question")
    _template_option(sub)
    sub = command(run_eval, "eval")
    _model_options(sub)
    _template_option(sub)
    sub.add_argument(
        "--data", required=True, help="folder of token bins, a text (.txt .parquet), or questions (.jsonl)"
    )
    sub.add_argument("--split", default="blank", choices=("blank", "lines", "file"), help="where texts in a .txt end")
    sub.add_argument("--field", default="text", help="the key that holds a text in .jsonl, .json or .parquet")
    sub.add_argument("--seq_len", type=int, help="tokens of a window; default: as the model was trained")
    sub.add_argument(
        "--max_tokens", type=int, default=1 << 20, help="evaluate the first documents up to so many tokens"
    )
    sub.add_argument("--limit", type=int, help="ask only the first so many questions")
    sub.add_argument("--max_new_tokens", type=int, default=evaluate.LONGEST_ANSWER, help="longest answer in tokens")
    sub = command(run_plot, "plot")
    sub.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl")
    sub.add_argument("--out", help="PNG to write; default: curve.png in the run's folder, curves.png here for several")
    _info_options(command(run_info, "info"))
    text = "train, merge, prune or inspect a vocabulary"
    vocab_commands.add_parsers(commands.add_parser("vocab", help=text, description=text, allow_abbrev=False), _Parser)
    _add_surgery(command)
    port_commands.add_parsers(command)
    sub = command(run_bench, "bench")
    sub.add_argument("what", choices=("generate", "train", "tune", "data"), help="what to measure")
    sub.add_argument("--preset", default="tiny", choices=tuple(config.PRESETS), help="the model's shape (default tiny)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    sub.add_argument("--rows", type=int, default=8, help="train, tune: sequences of a step (default 8)")
    sub.add_argument("--seq_len", type=int, default=256, help="train, tune: tokens of a sequence (default 256)")
    sub.add_argument("--vocab_size", type=int, help="train: entries of the vocabulary (default: the preset's usual)")
    return parser


def _add_surgery(command) -> None:
    """The commands that make one model folder of another."""
    sub = command(run_resize, "resize")
    sub.add_argument("--model", required=True, help="run or model folder whose tokenizer is the old one")
    sub.add_argument("--tokenizer", required=True, help="the new one: folder or .model that vocab merge or prune wrote")
    sub.add_argument("--id_map", help="id_map.json; default: the one beside the new tokenizer")
    sub.add_argument("--out", required=True, help="new model folder")
    sub.add_argument("--start", default="mean", choices=resize.STARTS, help="new rows: mean of the old sub-tokens, …")
    sub.add_argument("--pad_to_multiple", type=int, default=1, help="of the number of rows (GPUs like 64)")
    sub = command(run_merge, "merge")
    sub.add_argument("--model", required=True, help="the adapter's base: run or model folder")
    sub.add_argument("--adapter", required=True, help="run or folder that holds the adapter, of minillm or PEFT")
    sub.add_argument("--out", required=True, help="new model folder")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="run or model folder; default: the newest of out/sft, else of out/pretrain")
    parser.add_argument("--base", help="the base of an adapter given by --model; default: where the adapter says")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", choices=tuple(training.DTYPES), help="of the weights; default: as stored")


def _info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(config.PRESETS), help="a preset's shape")
    parser.add_argument("--model", help="a run or model folder's shape, in place of a preset's")
    parser.add_argument("--vocab_size", type=int, help="ids; default: GPT-2's 50257, small presets less")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence; default: the model's context")
    parser.add_argument("--micro_batch_size", type=int, default=8, help="sequences in one forward pass (default 8)")
    parser.add_argument(
        "--lora_rank", type=int, help="add the memory of training adapters of this rank on a frozen base"
    )
    parser.add_argument("--base_bits", type=int, choices=quant.BITS, help="of that base (default: 32)")


def _template_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--template", default="auto", choices=("auto", "chat", "simple"), help="prompt format")


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=int, default=200, help="at most so many new tokens (default 200)")
    words = {
        "temperature": "0: always the most probable token",
        "top_k": "the k most probable; 0: all",
        "top_p": "the fewest most probable that sum to p; 0: the best one, 1: all",
        "min_p": "at least this share of the best one's probability; 0: all",
        "repetition_penalty": "above 1: tokens already there become less likely",
        "seed": "same seed, same text",
    }
    for field in dataclasses.fields(generate.Sampling):
        text = f"{words[field.name]} (default {field.default})"
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=text)


def _sampling(args) -> generate.Sampling:
    return generate.Sampling(**{f.name: getattr(args, f.name) for f in dataclasses.fields(generate.Sampling)})


def _load(args) -> tuple:
    """(model, tokenizer, folder) of --model or the newest checkpoint."""

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    named = args.model or next((name for name in DEFAULT_RUNS if run.step_folders(name)), None)
    if named is None:
        raise UserError(
            f"no checkpoint in {' or '.join(DEFAULT_RUNS)}: train one (python train_pretrain.py) or give --model"
        )
    folder = run.resolve_checkpoint(named, log=tell)
    device = distributed.pick_device(args.device)
    selfcheck.check_kernels(distributed.Ranks(0, 1, device), tell)
    dtype = training.DTYPES[args.dtype] if args.dtype else None
    if dtype is None and device.type == "cpu":
        dtype = torch.float32  # half precision is slow on most CPUs
    if tuning.is_adapter(folder):
        model, base = tuning.load_adapted(folder, args.base, device=device, dtype=dtype, merged=True)
        tokenizer = tuning.tokenizer_of(folder, base)
    elif args.base:
        raise UserError(f"--base {args.base}: {folder} is a model of its own and no adapter; leave --base out")
    else:
        model, tokenizer = huggingface.load_model(folder, device=device, dtype=dtype), Tokenizer.load(folder)
    model.eval()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, more than the model's {model.config.vocab_size}"
        )
    return model, tokenizer, folder


def _print_stream(pieces) -> generate.Completion:
    """Print pieces as they come; returns what the stream returns."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            return end.value


def run_generate(args) -> None:
    """Continue a text; prints the continuation alone, as it comes."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    sampling = _sampling(args)
    model, tokenizer, _ = _load(args)
    ids = [tokenizer.start_id, *tokenizer.encode(prompt)]
    done = _print_stream(
        generate.stream(
            model,
            tokenizer,
            ids,
            args.max_new_tokens,
            sampling=sampling,
            stop_ids=[tokenizer.eos_id],
            stop_strings=args.stop,
        )
    )
    print()
    if done.reason == "context":
        print(f"(stopped: the model's context of {model.context} tokens is full)", file=sys.stderr)


def run_chat(args) -> None:
    """Talk with a model: answers come token by token. An empty line or Ctrl-D ends, /new forgets what was said."""
    sampling = _sampling(args)
    model, tokenizer, folder = _load(args)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    print(f"{folder} ({model.config.n_parameters():,} parameters); an empty line ends, /new starts anew")
    messages = list(opening)
    while True:
        try:
            question = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question.strip():
            return
        if question.strip() == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        ids, forgotten = _fit(tokenizer, messages, _template(args, folder), model.context, len(opening))
        if forgotten:
            print(f"(the context of {model.context} tokens is full: {forgotten} earlier messages forgotten)")
        said: list[str] = []
        stream = generate.stream(
            model, tokenizer, ids, args.max_new_tokens, sampling=sampling, stop_ids=[tokenizer.eos_id]
        )
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C cuts an answer short
            done = _print_stream(_remembered(stream, said))
            if done.reason != "stop":
                print(
                    f" … ({'--max_new_tokens reached' if done.reason == 'length' else 'the context is full'})", end=""
                )
        print()
        messages.append({"role": "assistant", "content": "".join(said)})


def _remembered(stream, said: list[str]):
    """The stream itself, its pieces also put into `said`."""
    while True:
        try:
            said.append(next(stream))
        except StopIteration as end:
            return end.value
        yield said[-1]


def _fit(tokenizer, messages: list[dict], template: str, context: int, opening: int) -> tuple[list[int], int]:
    """Ids of the conversation, and how many messages were dropped from it, earliest first, to leave half the context.

    A question longer than that alone keeps as much as the context allows; `generate` refuses what does not fit.
    """
    dropped = 0
    while True:
        ids, _ = tokenizer.encode_chat(messages, template=template, add_generation_prompt=True)
        if len(ids) <= context // 2 or len(messages) <= opening + 1:
            return ids, dropped
        del messages[opening : opening + 2]  # a question and its answer
        dropped += 2


def _trained(folder: Path) -> dict:
    """The configuration a checkpoint was trained with; empty for a folder that does not say."""
    return checkpoint.read_state(folder)["config"] if (folder / "resume").is_dir() else {}


def _template(args, folder: Path) -> str:
    """The prompt format: as asked for, else the one that the checkpoint was taught with."""
    return args.template if args.template != "auto" else _trained(folder).get("template", "auto")


def run_eval(args) -> None:
    """Score a model: loss, perplexity and bits per byte on texts, exact match on instruction files."""
    path = Path(args.data)
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder")
    model, tokenizer, folder = _load(args)
    print(f"{folder} on {path}")
    if _is_questions(path):
        questions = evaluate.read_questions(path, args.limit)
        scores = evaluate.exact_match(
            model, tokenizer, questions, template=_template(args, folder), max_new_tokens=args.max_new_tokens
        )
        print(f"exact match, greedy answers:\n{evaluate.table(scores)}")
        return
    bins = path.is_dir() and (path / "meta.json").is_file()
    if bins and TokenBins(path, "val").meta["tokenizer_sha256"] != tokenizer.sha256:
        raise UserError(f"--data {path}: prepared with another tokenizer than the model's; evaluate the text itself")
    texts = TokenBins(path, "val") if bins else evaluate.read_text(path, tokenizer, split=args.split, field=args.field)
    trained = _trained(folder)
    usual = min(trained.get("seq_len", 1024), model.context)
    seq_len = usual if args.seq_len is None else args.seq_len
    if not 1 <= seq_len <= model.context:
        raise UserError(f"--seq_len {seq_len}: must lie from 1 to the model's context, {model.context}")
    alone = trained.get("document_attention", True)  # each document on its own, unless trained otherwise
    validation = Validation(texts, tokenizer, seq_len, args.max_tokens, alone)
    ranks = distributed.Ranks(0, 1, next(model.parameters()).device)
    scores = validation.scores(model, ranks, contextlib.nullcontext())
    print(f"  documents       {validation.part.n_documents:,} ({int(validation.part.mask.sum()):,} tokens)")
    print(f"  loss            {scores['val_loss']:.4f} nats a token")
    print(f"  perplexity      {math.exp(min(scores['val_loss'], 700)):.3f} a token")
    if "val_bpb" in scores:
        print(f"  bits per byte   {scores['val_bpb']:.4f}")
    if "floor_bpb" in scores:
        print(f"  floor           {scores['floor_bpb']:.4f} ± {scores['floor_error']:.4f} (of these very documents)")


def _is_questions(path: Path) -> bool:
    """Whether a file holds conversations rather than texts: asked of its first row."""
    if path.is_dir() or not path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return False
    try:
        return bool(evaluate.read_questions(path, 1))
    except UserError as problem:
        if "known are" in str(problem):  # keys of no conversation: a row of text
            return False
        raise


def run_plot(args) -> None:
    """Draw loss and validation curves of one or several runs into a PNG."""
    single = Path(args.runs[0])
    folder = single if single.is_dir() else single.parent
    out = Path(args.out) if args.out else folder / "curve.png" if len(args.runs) == 1 else Path("curves.png")
    print(plot.draw(args.runs, out))


def run_info(args) -> None:
    """Parameters, FLOPs a token, and memory for training and generation, by formula."""
    if bool(args.preset) == bool(args.model):
        raise UserError("info: give either --preset NAME or --model DIR")
    if args.model:
        shape = huggingface.load_config(run.resolve_checkpoint(args.model))
    else:
        shape = config.preset(args.preset, vocab_size=args.vocab_size or bench.VOCABULARY.get(args.preset, 50_257))
    seq_len, rows = shape.max_seq_len if args.seq_len is None else args.seq_len, args.micro_batch_size
    if seq_len < 1 or rows < 1:
        raise UserError(f"--seq_len {seq_len}, --micro_batch_size {rows}: both must be at least 1")
    if args.base_bits is not None and args.lora_rank is None:
        raise UserError(
            f"--base_bits {args.base_bits}: this is the base of adapters; give their rank too (--lora_rank)"
        )
    if args.lora_rank is not None and args.lora_rank < 1:
        raise UserError(f"--lora_rank {args.lora_rank}: must be at least 1")
    n = shape.n_parameters()
    flops = shape.flops_per_token(seq_len)
    print("\n".join(f"  {name:<16}{value}" for name, value in dataclasses.asdict(shape).items() if value is not None))
    print(f"\nparameters          {n:,}")
    print(f"FLOPs a token       {flops / 1e6:,.1f} M to train at {seq_len} tokens, {flops / 3e6:,.1f} M forward")
    state = 16 * n  # fp32: weights, gradients, and AdamW's two moments
    print(f"training            {_bytes(state)} of state: weights, gradients and AdamW's two moments, fp32")
    for name, size in (("float32", 4), ("bfloat16", 2)):
        kept, least = activations(shape, rows, seq_len, size)
        print(
            f"  + {name:<16}{_bytes(kept)} of activations at {rows} × {seq_len} tokens; "
            f"{_bytes(least)} with --checkpoint_activations"
        )
    for name, size in (("float32", 4), ("bfloat16", 2)):
        cache = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * seq_len * size
        print(f"generation {name:<9}{_bytes(n * size)} of weights + {_bytes(cache)} of cache for {seq_len} tokens")
    if args.lora_rank is not None:
        _print_adapters(shape, args.base_bits, args.lora_rank, rows, seq_len)


def _print_adapters(shape: config.ModelConfig, bits: int | None, rank: int, rows: int, seq_len: int) -> None:
    """Memory for training adapters on a frozen base, item by item."""
    items = quant.memory_estimate(shape, bits, rank, rows, seq_len)
    print(f"\nLoRA, {rows} × {seq_len} tokens in bfloat16 with --checkpoint_activations")
    print("\n".join(f"  {name:<30}{_bytes(size):>10}" for name, size in {**items, "all": sum(items.values())}.items()))


def _bytes(n: float) -> str:
    """A size in GB, or in MB below a tenth of one."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def activations(shape: config.ModelConfig, rows: int, seq_len: int, size: int) -> tuple[float, float]:
    """Bytes that the backward pass needs kept, and the same when each layer is recomputed from its input.

    Counted per layer and token, for attention that never stores its scores: the inputs of two norms and their
    outputs, queries, keys and values before and after rotation, attention's output, and gate, up and their
    product. The loss keeps logits of the rows it handles at once; they are not counted. size: bytes of a number.
    """
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    layer = 4 * shape.dim + 3 * q + 3 * kv + 4 * shape.ffn_dim
    tokens = rows * seq_len * size
    return tokens * (shape.n_layers * layer + 2 * shape.dim), tokens * (shape.n_layers * shape.dim + layer)


def run_resize(args) -> None:
    """Give a model another vocabulary: embedding and head follow the mapping of ids, new pieces get a start."""
    given = Path(args.tokenizer)
    id_map = args.id_map or (given if given.is_dir() else given.parent) / "id_map.json"
    print(
        resize.resize_folder(
            args.model, args.tokenizer, id_map, args.out, start=args.start, multiple=args.pad_to_multiple
        )
    )


def run_merge(args) -> None:
    """Fold an adapter into its base: a plain model folder, for whatever knows no adapters."""
    print(tuning.merge_folder(args.model, args.adapter, args.out))


def run_bench(args) -> None:
    """Measure speed beside other tools on this machine, both sides in one process."""
    if args.what == "data":
        bench.bench_data()
    elif args.what == "generate":
        bench.bench_generate(args.preset, args.device)
    elif min(args.rows, args.seq_len, args.vocab_size or 1) < 1:
        raise UserError("--rows, --seq_len and --vocab_size must be at least 1")
    elif args.what == "tune":
        bench_tune.bench_tune(args.preset, args.device, args.rows, args.seq_len)
    else:
        bench.bench_train(args.preset, args.device, args.rows, args.seq_len, args.vocab_size)


if __name__ == "__main__":
    sys.exit(run.run_script(main))
