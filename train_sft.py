"""Teach a pretrained model to follow instructions.

    python train_sft.py                                        newest checkpoint of out/pretrain, bundled instructions
    python train_sft.py --data my.jsonl --init_from out/mine --out out/mine-sft --epochs 3
    torchrun --nproc_per_node 8 train_sft.py --data my.jsonl --init_from TinyLlama-1.1B --batch_size 64
    python train_sft.py --tune lora --out out/sft-lora         few new parameters over a frozen model

Data: .jsonl or .json rows of instruction/input/output, messages, or conversations. Only answers (and the end of an
answer) are learned. Run the same command again to go on where it stopped.
"""

import dataclasses
import shlex
import sys
import time
from dataclasses import dataclass

import torch

from data import bundled
from minillm.base import device
from minillm.base.command_line import parse
from minillm.base.device import peak_flops
from minillm.base.errors import UserError
from minillm.base.options import option
from minillm.base.process import run_script
from minillm.checkpoint import huggingface, train_state
from minillm.datasets.instructions import InstructionRows
from minillm.datasets.questions import read_questions
from minillm.distributed import ranks as distributed
from minillm.distributed.parallelize import gradients_synced, parallelize
from minillm.evaluation import answers
from minillm.evaluation.validation import answer_loss
from minillm.model import ops
from minillm.model.memory import check_memory
from minillm.model.transformer import Transformer
from minillm.tokenizer.chat_template import TEMPLATES
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import kernel_check, optim, run, starting_model
from minillm.training.config import TrainingConfig, schedule, summary
from minillm.training.progress import duration
from minillm.training.schedule import lr_at, set_lr
from minillm.training.step import clip, seed_step
from minillm.tuning import folders, options
from minillm.tuning.adapter import merged


@dataclass(frozen=True)
class Config(options.TuningConfig, TrainingConfig):
    data: str = option(f"{bundled.FOLDER}/sft_train.jsonl", "instruction file(s), separated by commas", group="run")
    out: str = option("out/sft", "the run's folder: checkpoints, metrics.jsonl, curve.png", group="run")
    init_from: str = option("out/pretrain", "model folder or run to start from", group="run")
    steps: int | None = option(
        None, "optimizer steps; none: as many as --epochs need", at_least=1, group="length and batch"
    )
    epochs: float = option(
        2.5, "passes over the data, if --steps is not given", at_least=0.001, at_most=1e6, group="length and batch"
    )
    seq_len: int = option(256, "tokens per row; longer examples are cut", at_least=1, group="length and batch")
    batch_size: int = option(8, "rows per optimizer step, over all ranks", at_least=1, group="length and batch")
    lr: float | None = option(
        None,
        "peak learning rate; none: a quarter of what pretraining takes, or what suits the adapter",
        at_least=0,
        group="optimizer",
    )
    template: str = option(
        "auto",
        "prompt format; auto: the model folder's own, else chat if there are role pieces",
        TEMPLATES,
        group="instructions",
    )
    packing: bool = option(True, "several examples in a row, attention kept inside each", group="instructions")
    on_bad_line: str = option(
        "error", "what to do with a line that cannot be read", ("error", "skip"), group="instructions"
    )
    eval_data: str | None = option(
        None,
        "held-out instructions to answer before and after; none: the bundled ones, if used",
        group="instructions",
    )
    eval_rows: int = option(800, "how many of them to answer", at_least=1, group="instructions")


def main() -> int:
    cfg = parse(Config, __doc__)
    ranks = distributed.start(cfg.device, cfg.timeout_s)
    micro_batch_size = distributed.micro_batch(cfg.batch_size, cfg.micro_batch_size, ranks.world)
    cfg = dataclasses.replace(cfg, micro_batch_size=micro_batch_size)
    ops.select(cfg.impl)
    kernels_settled = kernel_check.begin(ranks, base_bits=cfg.base_bits)

    # the model to start from, and its tokenizer
    init = starting_model.find_init(cfg)
    model_config = dataclasses.replace(huggingface.load_config(init), dropout=cfg.dropout)
    tokenizer = Tokenizer.load(init)
    check_memory(cfg, model_config, ranks.device)
    cfg = starting_model.choose_optimizer(cfg, model_config.dim, share=1 / 4)
    if cfg.seq_len > model_config.max_seq_len:
        raise UserError(f"--seq_len {cfg.seq_len}: the model's longest context is {model_config.max_seq_len}")

    # data: rows of instructions, packed, with a mask on what is learned
    if cfg.data == Config.data and ranks.main:
        bundled.build()
    ranks.barrier()
    paths = [path.strip() for path in cfg.data.split(",") if path.strip()]
    if not paths:
        raise UserError(f"--data {cfg.data}: names no file; give one or more .jsonl or .json files, by commas")
    how = dict(seed=cfg.seed, template=cfg.template, packing=cfg.packing, on_bad_line=cfg.on_bad_line)
    how |= dict(n_virtual=cfg.placeholders)
    rows = InstructionRows(paths, tokenizer, cfg.seq_len, **how)
    length = "epochs" if cfg.steps is None else "steps"  # the option that sets the run's length
    end = last_row(cfg, rows)
    cfg = dataclasses.replace(cfg, steps=-(-end // cfg.batch_size))  # the last batch may be short
    held_out = cfg.eval_data or (f"{bundled.FOLDER}/sft_heldout.jsonl" if cfg.data == Config.data else None)
    questions = read_questions(held_out, cfg.eval_rows) if held_out else []
    held_rows = InstructionRows(held_out, tokenizer, cfg.seq_len, **how) if held_out else None

    # the run: its folder, and the checkpoint to go on from
    fingerprints = {
        "data": train_state.fingerprint(rows.fingerprint, tokenizer.resolve_template(cfg.template)),
        "batch size, sequence length or seed": train_state.fingerprint(
            cfg.batch_size, cfg.seq_len, cfg.seed, cfg.packing
        ),
        "tokenizer": tokenizer.sha256,
        "architecture": train_state.fingerprint(huggingface.to_hf(model_config)),
        **folders.fingerprints(cfg, init),
    }
    this = run.Run(cfg, ranks, fingerprints, turns=rows.counts["turns"])
    if this.finished:
        this.say(f"{this.folder} has finished its {this.start_step} steps; to go on, raise --{length}\n{this.draw()}")
        this.say(f"next: {next_command(cfg.out)}")
        distributed.stop()
        return 0
    this.say(f"{summary(cfg)}\n{rows.summary()}")
    kernels_settled()
    model = starting_model.load_model(cfg, model_config, init, this.source, ranks.device)
    model.checkpoint_activations = cfg.checkpoint_activations
    this.say(f"weights from {this.source or init}")

    def ask() -> dict:
        with merged(model):
            return answers.exact_match(model, tokenizer, questions, template=cfg.template)

    before = this.once("before.json", ask) if questions else {}
    status = train(cfg, this, model, rows, end, held_rows, tokenizer)
    if status == 0 and ranks.main:
        conclude(this, before or {}, ask() if questions else {})
    distributed.stop()
    return status


def last_row(cfg: Config, rows: InstructionRows) -> int:
    """The position in the order of rows at which the run ends: after --epochs, or after --steps whole batches.

    Where --steps says what follows from --epochs, as in a run's options.toml, the last batch is as short.
    """
    end = rows.total_rows(cfg.epochs)
    if cfg.steps in (None, -(-end // cfg.batch_size)):
        return end
    return cfg.steps * cfg.batch_size


def next_command(out: str) -> str:
    """What to try after this run."""
    return "python -m minillm chat" + ("" if out == Config.out else f" --model {shlex.quote(out)}")


def train(cfg: Config, this: run.Run, model: Transformer, rows, end: int, held_rows, tokenizer) -> int:
    ranks, dtype = this.ranks, device.pick_dtype(cfg.dtype, this.ranks.device)
    optimizers = optim.build_optimizers(model, cfg.optimizer, lr=cfg.lr, weight_decay=cfg.weight_decay)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
    this.restore(model, optimizers, scaler)
    this.check_disk(model)
    trained = parallelize(model, ranks, cfg.compile)
    flops, peak = starting_model.flops_per_token(model, cfg.seq_len), peak_flops(ranks.device, dtype)
    this.say(f"{starting_model.describe_parameters(model)}; {cfg.steps} steps; {ops.describe(ranks.device)}")

    for step in range(this.start_step + 1, cfg.steps + 1):
        begun = time.monotonic()
        lr = lr_at(step - 1, **schedule(cfg))
        set_lr(optimizers, lr)
        seed_step(cfg.seed, step, ranks.rank)
        micro_batches = ranks.micro_batches(step - 1, cfg.batch_size, cfg.micro_batch_size)
        batches = [rows.batch(positions, end) for positions in micro_batches]
        # the number of targets differs from step to step: count those of all ranks before the first backward
        n_targets, n_tokens = ranks.sum(sum(b.n_targets() for b in batches), sum(b.x.numel() for b in batches))
        nats = torch.zeros((), device=ranks.device)
        for i, batch in enumerate(batches):
            batch = batch.to(ranks.device)
            with gradients_synced(trained, i == len(batches) - 1):
                with device.autocast(ranks.device, dtype):
                    loss = trained(batch.x, batch.y, mask=batch.mask, documents=batch.documents)
                scaler.scale(loss * (ranks.world / n_targets)).backward()  # DDP averages over the ranks
            nats += loss.detach()
        grad_norm = clip(model, optimizers, scaler, cfg.grad_clip)
        loss = ranks.sum(float(nats))[0] / n_targets
        if this.check_finite(step, loss, grad_norm):
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)

        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        this.finish_step(row, n_tokens / (time.monotonic() - begun), peak, flops)
        stop = this.stop_requested()
        if held_rows and this.due(step, cfg.eval_every):
            autocast = device.autocast(ranks.device, dtype)
            scores = answer_loss(model, held_rows, cfg.eval_tokens, ranks, autocast)
            this.record({"step": step, **scores})
            this.progress.say(f"step {step}: held-out answers {scores['val_loss']:.4f} nats a token")
        if stop or this.due(step, cfg.save_every):
            this.save(step, model, optimizers, scaler, tokenizer)
        if stop:
            this.say(f"stopped by signal {stop} after step {step}; the same command goes on from there")
            return 128 + stop
    this.close()
    return 0


def conclude(this: run.Run, before: dict, after: dict) -> None:
    """Print the result; before, after: family → (exact answers, questions)."""
    if after:
        right, asked = map(sum, zip(*after.values(), strict=True))
        this.record({"step": this.cfg.steps, "exact_match": right / asked})
        this.say(f"exact answers to {asked} held-out questions, before → after:")
        before, after = answers.with_total(before), answers.with_total(after)
        for family, (right, asked) in after.items():
            was = f"{before[family][0] / before[family][1]:6.1%}" if family in before else "not asked"
            this.say(f"  {family:<16} {was} → {right / asked:6.1%}   ({right}/{asked})")
    this.say(f"trained for {duration(this.took)}; checkpoint {this.newest()}; {this.draw()}")
    this.say(f"next: {next_command(this.cfg.out)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
