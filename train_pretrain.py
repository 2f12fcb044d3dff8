"""Pretrain a language model, from scratch or starting from another.

    python train_pretrain.py                                        the bundled corpus, a tiny model, minutes
    python train_pretrain.py --data data/mine --preset 124m --out out/mine
    torchrun --nproc_per_node 8 train_pretrain.py --data data/mine --preset 1b --batch_size 512 --micro_batch_size 8
    python train_pretrain.py --data data/mine --init_from DIR --tune freeze --train_layers embed,head --out out/stage1

Run the same command again to go on where it stopped. Read from top to bottom: configuration, data, model,
optimizer, the loop.
"""

import dataclasses
import math
import shlex
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data import bundled
from minillm.base.command_line import parse
from minillm.base.device import autocast, peak_flops, pick_dtype
from minillm.base.errors import UserError
from minillm.base.options import option, optional_copy
from minillm.base.process import run_script
from minillm.checkpoint import huggingface, train_state
from minillm.datasets.token_bins import TokenBins, parse_mixture
from minillm.datasets.windows import TokenWindows
from minillm.distributed import ranks as distributed
from minillm.distributed.parallelize import gradients_synced, parallelize
from minillm.evaluation.validation import Validation
from minillm.generation.completion import generate
from minillm.generation.sampling import Sampling
from minillm.model import config, ops
from minillm.model.memory import check_memory
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import kernel_check, optim, run, starting_model
from minillm.training.config import TrainingConfig, schedule, summary
from minillm.training.progress import duration
from minillm.training.schedule import lr_at, set_lr
from minillm.training.step import clip, seed_step
from minillm.tuning import folders, options

SHAPE = "shape of the model (what is not given is the preset's, or that of --init_from)"
# --dim, --n_layers and so on: ModelConfig's own fields, so that a field added there is an option here
ShapeOptions = optional_copy(config.ModelConfig, group=SHAPE, leave_out=("vocab_size", "dropout"))


@dataclass(frozen=True)
class Config(ShapeOptions, options.TuningConfig, TrainingConfig):
    data: str = option("data/bundled", "folder of token bins, or a mixture FOLDER:WEIGHT,FOLDER:WEIGHT,…", group="run")
    out: str = option("out/pretrain", "the run's folder: checkpoints, metrics.jsonl, curve.png", group="run")
    data_dtype: str | None = option(None, "dtype of a raw .bin made elsewhere", ("uint16", "uint32"), group="data")
    data_vocab_size: int | None = option(None, "vocabulary size of a raw .bin made elsewhere", at_least=1, group="data")
    document_attention: bool | None = option(
        None,
        "attention stays inside documents; none: if they are shorter than half a sequence on average",
        group="data",
    )
    preset: str = option("tiny", "shape of a new model", tuple(config.PRESETS), group=SHAPE)
    rope_scaling: str | None = option(
        None,
        "stretch rotary positions: linear:FACTOR, yarn:FACTOR or llama3:FACTOR",
        group=SHAPE,
    )


def main() -> int:
    cfg = parse(Config, __doc__)
    ranks = distributed.start(cfg.device, cfg.timeout_s)
    micro_batch_size = distributed.micro_batch(cfg.batch_size, cfg.micro_batch_size, ranks.world)
    cfg = dataclasses.replace(cfg, micro_batch_size=micro_batch_size)
    ops.select(cfg.impl)
    kernels_settled = kernel_check.begin(ranks, base_bits=cfg.base_bits)

    # data: token bins, and the tokenizer beside them
    if cfg.data == bundled.FOLDER and ranks.main:
        bundled.build(Path(cfg.data))
    ranks.barrier()
    mixture = parse_mixture(cfg.data)
    raw = dict(dtype=cfg.data_dtype, vocab_size=cfg.data_vocab_size)
    bins = [(TokenBins(path, "train", **raw), share) for path, share in mixture]
    if cfg.document_attention is None:
        short = all(0 < b.mean_document < cfg.seq_len / 2 for b, _ in bins)
        cfg = dataclasses.replace(cfg, document_attention=short)
    windows = TokenWindows(bins, cfg.seq_len, seed=cfg.seed, documents=cfg.document_attention)
    first = bins[0][0]
    tokenizer = Tokenizer.load(first.path) if first.meta else None
    held_out = TokenBins(first.path, "val", **raw)
    validation = Validation(held_out, tokenizer, cfg.seq_len, cfg.eval_tokens, cfg.document_attention)

    # the run: its folder, and the checkpoint to go on from
    init = starting_model.find_init(cfg)
    model_config = shape(cfg, first.vocab_size, init)
    check_memory(cfg, model_config, ranks.device)
    cfg = starting_model.choose_optimizer(cfg, model_config.dim)
    fingerprints = {
        "data": train_state.fingerprint([b.identity() for b, _ in bins], [w for _, w in bins]),
        "batch size, sequence length or seed": train_state.fingerprint(cfg.batch_size, cfg.seq_len, cfg.seed),
        "tokenizer": first.meta.get("tokenizer_sha256", ""),
        "architecture": train_state.fingerprint(huggingface.to_hf(model_config)),
        **folders.fingerprints(cfg, init),
    }
    this = run.Run(cfg, ranks, fingerprints)
    if this.finished:
        this.say(f"{this.folder} has finished its {this.start_step} steps; to go on, raise --steps\n{this.draw()}")
        this.say(f"next: {next_command(cfg, tokenizer)}")
        distributed.stop()
        return 0
    this.say(summary(cfg))
    if validation.no_bytes:
        this.say(f"no bits per byte: {validation.no_bytes}")

    # the model: resumed, started from another, or new
    kernels_settled()
    source = this.source or init
    if source:
        model = starting_model.load_model(cfg, model_config, init, this.source, ranks.device)
        this.say(f"weights from {source}")
    else:
        model = Transformer(model_config)
        model.init_weights(cfg.seed)
        model = model.to(ranks.device)
    model.checkpoint_activations = cfg.checkpoint_activations
    status = train(cfg, this, model, windows, validation, tokenizer)
    distributed.stop()
    return status


def next_command(cfg: Config, tokenizer: Tokenizer | None) -> str:
    """What to try after this run. A model of a raw .bin has no tokenizer, so it can neither read nor write text."""
    out = shlex.quote(cfg.out)
    if tokenizer is None:
        return f"python -m minillm plot {out}"
    if cfg.tune == "full":
        return "python train_sft.py" + ("" if cfg.out == Config.out else f" --init_from {out}")
    if cfg.mergeable:
        merged = shlex.quote(f"{cfg.out}-merged")
        return f"python -m minillm merge --model {shlex.quote(cfg.init_from)} --adapter {out} --out {merged}"
    return f"python -m minillm eval --model {out} --data {shlex.quote(cfg.data)}"


def shape(cfg: Config, vocab_size: int, init: Path | None) -> config.ModelConfig:
    """The model's shape: the preset's, or that of --init_from, with the options given on top."""
    names = [f.name for f in dataclasses.fields(config.ModelConfig)]
    given = {name: value for name in names if (value := getattr(cfg, name, None)) is not None}
    changed = sorted(given.keys() - {"dropout"})
    if cfg.tune != "full" and init is None:
        raise UserError(f"--tune {cfg.tune}: trains a part of an existing model; give it by --init_from")
    if cfg.tune != "full" and changed:
        raise UserError(f"--tune {cfg.tune}: its base keeps its shape, so leave out --{', --'.join(changed)}")
    if init is not None and cfg.preset != Config.preset:
        raise UserError(f"--preset {cfg.preset}: the model of --init_from has its shape already; leave it out")
    base = None if init is None else huggingface.load_config(init)
    context = config.PRESETS[cfg.preset]["max_seq_len"] if base is None else base.max_seq_len
    if cfg.rope_scaling:
        gone = starting_model.init_is_gone(cfg)  # then `init` is the run's own checkpoint, which is stretched already
        original = base.rope_scaling.original_max_seq_len if gone and base.rope_scaling else context
        given["rope_scaling"] = config.parse_rope_scaling(cfg.rope_scaling, original)
    if base is None:
        given.setdefault("max_seq_len", max(context, cfg.seq_len))
        chosen = config.preset(cfg.preset, vocab_size=vocab_size, **given)
    else:
        chosen = dataclasses.replace(base, **given)
        huggingface.check_parameters(chosen, init)
        starting_model.check_tokenizer(init, cfg.data)
    if chosen.vocab_size < vocab_size:
        raise UserError(
            f"--init_from {init}: its embedding has {chosen.vocab_size} ids, fewer than {cfg.data} "
            f"({vocab_size}); give data made with the model's own tokenizer"
        )
    # though attention may stay inside documents, one of them may fill a whole row
    if cfg.seq_len + cfg.placeholders > chosen.max_seq_len:
        room = f" and --n_virtual {cfg.placeholders}" if cfg.placeholders else ""
        how = (
            f"extend the context by --max_seq_len {cfg.seq_len} (see --rope_scaling)" if init else "raise --max_seq_len"
        )
        raise UserError(
            f"--seq_len {cfg.seq_len}{room}: the model's longest context is {chosen.max_seq_len} tokens, and a row may "
            f"be all one document; lower it, or {how}"
        )
    return chosen


def train(cfg: Config, this: run.Run, model, windows, validation, tokenizer) -> int:
    ranks, n_targets = this.ranks, cfg.batch_size * cfg.seq_len
    dtype = pick_dtype(cfg.dtype, ranks.device)
    optimizers = optim.build_optimizers(model, cfg.optimizer, lr=cfg.lr, weight_decay=cfg.weight_decay)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
    this.restore(model, optimizers, scaler)
    this.check_disk(model)
    trained = parallelize(model, ranks, cfg.compile)
    flops, peak = starting_model.flops_per_token(model, cfg.seq_len), peak_flops(ranks.device, dtype)
    this.say(f"{starting_model.describe_parameters(model)}, {flops / 1e6:.1f} MFLOP a token")
    this.say(ops.describe(ranks.device))
    this.say(f"{windows.n_windows:,} windows of {cfg.seq_len} tokens; {cfg.steps * n_targets:,} tokens to train on")

    for step in range(this.start_step + 1, cfg.steps + 1):
        begun = time.monotonic()
        lr = lr_at(step - 1, **schedule(cfg))
        set_lr(optimizers, lr)
        seed_step(cfg.seed, step, ranks.rank)
        nats = torch.zeros((), device=ranks.device)
        micro_batches = ranks.micro_batches(step - 1, cfg.batch_size, cfg.micro_batch_size)
        for i, positions in enumerate(micro_batches):
            batch = windows.batch(positions).with_placeholders(model.n_virtual).to(ranks.device)
            with gradients_synced(trained, i == len(micro_batches) - 1):
                with autocast(ranks.device, dtype):
                    loss = trained(batch.x, batch.y, mask=batch.mask, documents=batch.documents)
                # the mean over all targets of the global batch; DDP averages over the ranks, hence their number
                scaler.scale(loss * (ranks.world / n_targets)).backward()
            nats += loss.detach()
        grad_norm = clip(model, optimizers, scaler, cfg.grad_clip)
        loss = ranks.sum(float(nats))[0] / n_targets
        if this.check_finite(step, loss, grad_norm):
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)

        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        this.finish_step(row, n_targets / (time.monotonic() - begun), peak, flops)
        stop = this.stop_requested()
        if this.due(step, cfg.eval_every):
            scores = validation.scores(model, ranks, autocast(ranks.device, dtype))
            this.record({"step": step, **scores})
            this.progress.say(f"step {step}: " + ", ".join(f"{name} {score:.4f}" for name, score in scores.items()))
        if stop or this.due(step, cfg.save_every):
            this.save(step, model, optimizers, scaler, tokenizer)
        if stop:
            this.say(f"stopped by signal {stop} after step {step}; the same command goes on from there")
            return 128 + stop
    this.close()
    if ranks.main:
        conclude(this, model, scores, tokenizer)
    return 0


def conclude(this: run.Run, model: Transformer, scores: dict, tokenizer: Tokenizer | None) -> None:
    """Print the result: validation, a sample, where things are, and what to do next."""
    said = f"validation: {scores['val_loss']:.4f} nats a token, perplexity {math.exp(min(scores['val_loss'], 700)):.2f}"
    if "val_bpb" in scores:
        said += f", {scores['val_bpb']:.3f} bits per byte"
    if "floor_bpb" in scores:
        said += f"; floor {scores['floor_bpb']:.3f} ± {scores['floor_error']:.3f}"
    this.say(said)
    if tokenizer is not None:
        model.eval()
        sampling = Sampling(temperature=0.8, top_p=0.95)
        length = min(100, model.config.max_seq_len - 1)
        sample = generate(model, [[tokenizer.start_id]], length, sampling=sampling, stop_ids=[tokenizer.eos_id])
        text = tokenizer.decode(sample[0].tokens) or "(nothing: the first token already ended the text)"
        this.say(f"a sample:\n{textwrap.indent(text, '  ')}")
    this.say(f"trained for {duration(this.took)}; checkpoint {this.newest()}; {this.draw()}")
    this.say(f"next: {next_command(this.cfg, tokenizer)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
