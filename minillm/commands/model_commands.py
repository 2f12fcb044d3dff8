"""`python -m minillm generate | chat | eval`: using a trained model."""

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from minillm.base.device import DTYPES, pick_device
from minillm.base.errors import UnsupportedError, UserError
from minillm.checkpoint import huggingface, run_folder, train_state
from minillm.datasets.questions import read_questions
from minillm.datasets.text_files import BOUNDARIES
from minillm.datasets.token_bins import TokenBins
from minillm.distributed.ranks import Ranks
from minillm.evaluation import answers
from minillm.evaluation.validation import Validation, read_text
from minillm.generation import completion
from minillm.generation.sampling import Sampling
from minillm.model.size import n_parameters
from minillm.tokenizer.chat_template import TEMPLATES
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import kernel_check
from minillm.tuning import folders, peft_format
from minillm.tuning.virtual_tokens import context_of

DEFAULT_RUNS = ("out/sft", "out/pretrain")


def add_parsers(command: Callable[[Callable, str], argparse.ArgumentParser]) -> None:
    """Add the three commands; command(function, name): makes a parser."""
    sub = command(run_generate, "generate")
    _model_options(sub)
    _sampling_options(sub)
    sub.add_argument("--prompt", required=True, help="the text to continue; -: standard input less a last newline")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    sub = command(run_chat, "chat")
    _model_options(sub)
    _sampling_options(sub)
    sub.add_argument("--system", help="what the model is told before the first question")
    sub.add_argument("--turns", type=int, help="questions it sees at once; default: 1 if taught so, else all that fit")
    _template_option(sub)
    sub = command(run_eval, "eval")
    _model_options(sub)
    _template_option(sub)
    sub.add_argument(
        "--data", required=True, help="folder of bins, text (.txt .jsonl .json .parquet) or questions (.jsonl .json)"
    )
    sub.add_argument("--split", default="blank", choices=BOUNDARIES, help="where texts in a .txt end")
    sub.add_argument("--field", default="text", help="the key that holds a text in .jsonl, .json or .parquet")
    sub.add_argument("--seq_len", type=int, help="tokens of a window; default: as the model was trained")
    sub.add_argument("--max_tokens", type=int, help="evaluate the first documents up to this many tokens; default 2^20")
    sub.add_argument("--limit", type=int, help="ask only this many questions, the first")
    sub.add_argument("--max_new_tokens", type=int, default=answers.LONGEST_ANSWER, help="longest answer in tokens")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="run or model folder; default: the newest of out/sft, else of out/pretrain")
    parser.add_argument("--base", help="the base of an adapter given by --model; default: where the adapter says")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights; default: as stored")


def _template_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--template", default="auto", choices=TEMPLATES, help="prompt format")


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=int, default=200, help="at most this many new tokens (default 200)")
    words = {
        "temperature": "0: always the most probable token",
        "top_k": "the k most probable; 0: all",
        "top_p": "the fewest most probable that sum to p; 0: the best one, 1: all",
        "min_p": "at least this share of the best one's probability; 0: all",
        "repetition_penalty": "above 1: tokens already there become less likely",
        "seed": "same seed, same text",
    }
    for field in dataclasses.fields(Sampling):
        text = f"{words[field.name]} (default {field.default})"
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=text)


def _sampling(args) -> Sampling:
    return Sampling(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling)})


def _load(args) -> tuple:
    """(model, tokenizer, folder) of --model or the newest checkpoint."""

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    named = args.model or next((name for name in DEFAULT_RUNS if run_folder.step_folders(name)), None)
    if named is None:
        raise UserError(
            f"no checkpoint in {' or '.join(DEFAULT_RUNS)}: train one (python train_pretrain.py) or give --model"
        )
    folder = run_folder.resolve_checkpoint(named, log=tell)
    device = pick_device(args.device)
    bits = peft_format.read_config(folder)[1]["bits"] if folders.is_adapter(folder) else None
    kernel_check.check_kernels(Ranks(0, 1, device), tell, base_bits=bits)
    dtype = DTYPES[args.dtype] if args.dtype else None
    if dtype is None and device.type == "cpu":
        dtype = torch.float32  # half precision is slow on most CPUs
    if folders.is_adapter(folder):
        model, base = folders.load_adapted(folder, args.base, device=device, dtype=dtype, merged=True)
        tokenizer = folders.tokenizer_of(folder, base)
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


def _print_stream(stream, said: list[str]) -> completion.Completion:
    """Print a stream's pieces as they come, and append them to `said`; returns what the stream returns."""
    while True:
        try:
            said.append(next(stream))
        except StopIteration as end:
            return end.value
        print(said[-1], end="", flush=True)


def run_generate(args) -> None:
    """Continue a text; prints the continuation alone, as it comes."""
    if args.prompt == "-":
        sys.stdin.reconfigure(errors="surrogateescape")  # so that the tokenizer reports what is not UTF-8
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt  # `echo` ends in a newline
    sampling = _sampling(args)
    if "" in args.stop:
        raise UserError("--stop '': every text begins with it, so none would be printed; give a text, or leave it out")
    model, tokenizer, _ = _load(args)
    ids = [tokenizer.start_id, *tokenizer.encode(prompt)]
    how = dict(sampling=sampling, stop_ids=[tokenizer.eos_id], stop_strings=args.stop)
    done = _print_stream(completion.stream(model, tokenizer, ids, args.max_new_tokens, **how), [])
    print()
    if done.reason == "context":
        print(f"(stopped: the model's context of {context_of(model)} tokens is full)", file=sys.stderr)


def run_chat(args) -> None:
    """Talk with a model: answers come token by token. An empty line or Ctrl-D ends, /new forgets what was said."""
    sampling = _sampling(args)
    model, tokenizer, folder = _load(args)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    print(f"{folder} ({n_parameters(model.config):,} parameters); an empty line ends, /new starts over")
    turns = args.turns
    if turns is None and _state(folder).get("turns") == 1:
        turns = 1
        print("(it was taught single questions, so it is shown each alone; --turns N shows it the last N)")
    messages = list(opening)
    sys.stdin.reconfigure(errors="replace")  # one line that is not UTF-8 must not end the chat
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
        if "\ufffd" in question:
            print("(that line is not UTF-8, so it was not asked: set the terminal or file to UTF-8 and ask again)")
            continue
        before, messages = messages, [*messages, {"role": "user", "content": question}]
        if turns is not None:
            del messages[len(opening) : max(len(opening), len(messages) - 2 * turns + 1)]
        ids, forgotten = _fit(tokenizer, messages, _template(args, folder), context_of(model), len(opening))
        if len(ids) >= context_of(model):
            print(f"(not asked: its {len(ids)} tokens fill the context of {context_of(model)}; say it in fewer words)")
            messages = before
            continue
        if forgotten:
            print(f"(the context of {context_of(model)} tokens is full: {forgotten} earlier messages forgotten)")
        said: list[str] = []
        stops = tokenizer.stop_ids(_template(args, folder))
        stream = completion.stream(model, tokenizer, ids, args.max_new_tokens, sampling=sampling, stop_ids=stops)
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C cuts an answer short
            done = _print_stream(stream, said)
            if done.reason != "stop":
                print(
                    f" … ({'--max_new_tokens reached' if done.reason == 'length' else 'the context is full'})", end=""
                )
        print()
        messages.append({"role": "assistant", "content": "".join(said)})


def _fit(tokenizer, messages: list[dict], template: str, context: int, opening: int) -> tuple[list[int], int]:
    """Ids of the conversation, and how many messages were dropped, earliest first.

    It is shortened to at most half the context. The last question stays whole, even if it alone does not fit.
    """
    dropped = 0
    while True:
        ids, _ = tokenizer.encode_chat(messages, template=template, add_generation_prompt=True)
        if len(ids) <= context // 2 or len(messages) <= opening + 1:
            return ids, dropped
        del messages[opening : opening + 2]  # a question and its answer
        dropped += 2


def _state(folder: Path) -> dict:
    """A checkpoint's training state; empty for a folder without one."""
    return train_state.read_state(folder) if (folder / "resume").is_dir() else {}


def _template(args, folder: Path) -> str:
    """The prompt format: --template, else the one that the checkpoint was trained with."""
    return args.template if args.template != "auto" else _state(folder).get("config", {}).get("template", "auto")


def run_eval(args) -> None:
    """Score a model: loss, perplexity and bits per byte on texts, exact match on instruction files."""
    path = Path(args.data)
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder")
    model, tokenizer, folder = _load(args)
    print(f"{folder} on {path}")
    if _is_questions(path):
        for name in ("max_tokens", "seq_len"):
            if (value := getattr(args, name)) is not None:
                raise UserError(f"--{name} {value}: is about texts, and {path} holds questions; say --limit")
        questions = read_questions(path, args.limit)
        how = dict(template=_template(args, folder), max_new_tokens=args.max_new_tokens)
        scores = answers.exact_match(model, tokenizer, questions, **how)
        print(f"exact match, greedy answers:\n{answers.table(scores)}")
        return
    if args.limit is not None:
        raise UserError(f"--limit {args.limit}: counts questions, and {path} holds texts; say --max_tokens")
    bins = path.is_dir() and (path / "meta.json").is_file()
    if bins and TokenBins(path, "val").meta["tokenizer_sha256"] != tokenizer.sha256:
        raise UserError(f"--data {path}: prepared with another tokenizer than the model's; evaluate the text itself")
    texts = TokenBins(path, "val") if bins else read_text(path, tokenizer, split=args.split, field=args.field)
    trained = _state(folder).get("config", {})
    seq_len = args.seq_len or min(trained.get("seq_len", 1024), context_of(model))
    if seq_len > context_of(model):
        raise UserError(f"--seq_len {seq_len}: must lie from 1 to the model's context, {context_of(model)}")
    alone = trained.get("document_attention", True)  # each document on its own, unless trained otherwise
    validation = Validation(texts, tokenizer, seq_len, args.max_tokens or 1 << 20, alone)
    ranks = Ranks(0, 1, next(model.parameters()).device)
    scores = validation.scores(model, ranks, contextlib.nullcontext())
    print(f"  documents       {validation.part.n_documents:,} ({int(validation.part.mask.sum()):,} tokens)")
    print(f"  loss            {scores['val_loss']:.4f} nats a token")
    print(f"  perplexity      {math.exp(min(scores['val_loss'], 700)):.3f} a token")
    if "val_bpb" in scores:
        print(f"  bits per byte   {scores['val_bpb']:.4f}")
    elif validation.no_bytes:
        print(f"  bits per byte   not given: {validation.no_bytes}")
    if "floor_bpb" in scores:
        print(f"  floor           {scores['floor_bpb']:.4f} ± {scores['floor_error']:.4f} (of these very documents)")


def _is_questions(path: Path) -> bool:
    """Whether a file holds conversations rather than texts, by its first row."""
    if path.is_dir() or not path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return False
    try:
        return bool(read_questions(path, 1))
    except UnsupportedError:  # a row without the keys of a conversation
        return False
