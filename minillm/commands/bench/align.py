"""Speed of alignment beside trl's: drawing answers for GRPO, and a step of DPO.

    python -m minillm bench align                                             random weights and prompts
    python -m minillm bench align --model out/sft --data data/bundled/requests_heldout.jsonl

Both sides have the same weights, prompts and number of answers. trl's side is its own GRPOTrainer with transformers'
`generate`, and its own DPOTrainer's loss; the reference's log-probabilities are known on both. First both must compute
the same, then they are timed in turns, in seconds of the processor's time.

Our answers come with their log-probabilities. trl finds these by a pass of its own where answers serve more than one
step (`num_iterations`, `steps_per_generation`), so its side is timed without that pass and with it ("log p").
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.alignment.log_probs import answer_log_probs, loss_through_log_probs
from minillm.alignment.rollouts import RolloutConfig, Rollouts, roll_out
from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.base.printing import log_line
from minillm.commands.bench.measure import REPEATS, machine, medians, random_model, transformers_twin
from minillm.commands.model_options import load_folder
from minillm.datasets.batch import Batch
from minillm.datasets.prompts import PromptRows
from minillm.generation.load import find_model
from minillm.model.config import PRESETS
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from minillm.training import optim
from minillm.training.step import clip
from minillm.tuning.virtual_tokens import context_of

PAD, EOS, BOS = 0, 1, 2
BETA = 0.1  # of DPO
PROMPT_LEN = 48  # of random prompts
ENDING = 32  # every so many ids of the vocabulary one ends an answer, so that answers end after about as many tokens


@dataclass(frozen=True)
class Config(Options):
    model: str | None = option(None, "run or model folder of your own; none: random weights in the shape of --preset")
    data: str | None = option(None, "the prompts that --model answers, as train_grpo.py takes them")
    preset: str | None = option(None, "the shape of random weights; none: tiny", tuple(PRESETS))
    prompts: int = option(16, "prompts of a rollout, and pairs of a DPO step", at_least=1)
    group_size: int = option(8, "answers to each prompt", at_least=2)
    prompt_len: int | None = option(None, "tokens of a random prompt; none: 48", at_least=1)
    max_new_tokens: int = option(96, "most tokens of an answer", at_least=1)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.model is None:
            if self.data is not None:
                problems.append(f"--data {self.data}: is for a model of your own; give --model")
            return problems
        if self.data is None:
            problems.append("--model: give its prompts by --data, for example data/bundled/requests_heldout.jsonl")
        for name in ("preset", "prompt_len"):
            value = getattr(self, name)
            if value is not None:
                problems.append(f"--{name} {value}: is about random weights and prompts; leave it out beside --model")
        return problems


class Task(NamedTuple):
    """What both sides are given."""

    name: str
    model: Transformer
    prompts: list[list[int]]
    ends: list[int]  # an answer ends with the first of these
    pad: int = PAD


def run(config: Config) -> None:
    trl = import_trl()

    # the same model and prompts for both sides
    task = own_task(config) if config.model else random_task(config)
    longest = max(len(prompt) for prompt in task.prompts)
    most = task.model.config.max_seq_len - longest
    if config.max_new_tokens > most:
        raise UserError(f"--max_new_tokens {config.max_new_tokens}: after a prompt of {longest} tokens at most {most}")
    twin, version = transformers_twin(task.model)
    twin.generation_config.eos_token_id = task.ends
    versions = f"{machine(torch.device('cpu'))}, {version}, trl {trl.__version__}"
    print(f"{task.name}: {n_parameters(task.model.config):,} parameters, {versions}")
    print(f"{torch.get_num_threads()} thread(s), medians of {REPEATS}", flush=True)

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of what transformers means to remove
        rollouts = compare_rollouts(config, task, _grpo_trainer(config, trl, twin, task, folder))
        compare_dpo(task, trl, twin, rollouts, folder)


def random_task(config: Config) -> Task:
    """Random weights and prompts; answers end at any of several ids, so their lengths differ."""
    preset = config.preset or "tiny"
    model = random_model(preset)
    vocab_size = model.config.vocab_size
    shape = (config.prompts, config.prompt_len or PROMPT_LEN)
    prompts = torch.randint(BOS + 1, vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return Task(preset, model, prompts.tolist(), [EOS, *range(ENDING, vocab_size, ENDING)])


def own_task(config: Config) -> Task:
    """A trained model and prompts for it, in its prompt format."""
    model, tokenizer, folder = load_folder(find_model(config.model, log=log_line), None, "cpu", "float32")
    seq_len = context_of(model)
    if config.max_new_tokens >= seq_len:
        raise UserError(f"--max_new_tokens {config.max_new_tokens}: leaves no room for a prompt in {seq_len}")
    rows = PromptRows(config.data, tokenizer, seq_len, room=config.max_new_tokens)
    if rows.rows_per_epoch < config.prompts:
        raise UserError(f"--prompts {config.prompts}: {config.data} has {rows.rows_per_epoch}")
    prompts = [prompt.ids for prompt in rows.rows(range(config.prompts))]
    ends = list(tokenizer.stop_ids())
    pad = next(i for i in range(model.config.vocab_size) if i not in ends)  # trl's side takes any id that ends nothing
    return Task(str(folder), model, prompts, ends, pad)


def import_trl() -> ModuleType:
    """trl, with errors as its only messages. Raises `UserError` without it."""
    try:
        import datasets
        import trl
    except ImportError:
        raise UserError('bench align needs trl: pip install -e ".[align]"') from None
    datasets.disable_progress_bars()
    return trl


# ---- drawing answers


def compare_rollouts(config: Config, task: Task, trainer) -> Rollouts:
    """Time both sides drawing a group of answers to each prompt; returns ours."""
    model, prompts = task.model, task.prompts
    drawing = RolloutConfig(config.group_size, config.max_new_tokens, 1.0, tuple(task.ends), task.pad, seed=0)
    texts = [_text(prompt) for prompt in prompts for _ in range(config.group_size)]
    n_tokens = {"minillm": [], "trl": [], "trl, log p": []}

    def ours() -> Rollouts:
        rollouts = roll_out(model, prompts, range(len(prompts)), len(n_tokens["minillm"]), drawing)
        n_tokens["minillm"].append(int(rollouts.batch.mask.sum()))
        return rollouts

    def theirs(name: str = "trl") -> tuple[list[list[int]], list[list[int]]]:
        prompt_ids, answers, *_ = trainer._generate(texts)
        n_tokens[name].append(sum(map(len, answers)))
        return prompt_ids, answers

    def theirs_with_log_probs() -> None:
        _their_log_probs(trainer, task.pad, *theirs("trl, log p"))

    # do both read the same prompts, and give the same probabilities to the same answers?
    rollouts = ours()
    prompt_ids, _ = theirs()
    if prompt_ids != [prompt for prompt in prompts for _ in range(config.group_size)]:
        raise UserError("the two sides do not read the same prompts, so their speed does not compare")
    _check_log_probs(trainer, rollouts)

    for counts in n_tokens.values():
        counts.clear()
    sides = {"minillm": ours, "trl": theirs, "trl, log p": theirs_with_log_probs}
    seconds = medians(sides, clock=time.process_time)
    mean_length = sum(map(len, prompts)) / len(prompts)
    print(f"{config.prompts} × {config.group_size} answers to prompts of {mean_length:.0f} tokens")
    speed = {}
    for name, counts in n_tokens.items():
        mean = sum(counts) / len(counts)
        speed[name] = mean / seconds[name]
        length = mean / len(texts)
        note = "with log-probabilities"
        if name != "minillm":
            note = f"minillm is {speed['minillm'] / speed[name]:.2f} x as fast"
        print(f"  {name:<10}{speed[name]:10,.0f} tok/CPU s   {length:5.1f} tokens an answer   {note}", flush=True)
    return rollouts


def _their_log_probs(trainer, pad: int, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """The pass by which trl's trainer finds the log-probabilities of answers that serve more than one step."""
    n_before = max(map(len, prompts))
    n_after = max(map(len, answers))
    tokens = torch.full((len(prompts), n_before + n_after), pad)  # prompts end where all answers begin
    seen = torch.zeros_like(tokens)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        place = slice(n_before - len(prompt), n_before + len(answer))
        tokens[row, place] = torch.tensor(prompt + answer)
        seen[row, place] = 1
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(trainer.model, tokens, seen, n_after)


def _check_log_probs(trainer, rollouts: Rollouts) -> None:
    """Raise `UserError` unless trl's trainer gives our answers the log-probabilities that we drew them with."""
    x, y, mask, _ = rollouts.batch[:4]
    tokens = torch.cat((x, y[:, -1:]), 1)  # (N, T + 1)
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, tokens, torch.ones_like(tokens), logits_to_keep=y.shape[1]
        )[0]
    worst = float((found - rollouts.log_probs)[mask].abs().max())
    if worst > 1e-3:
        raise UserError(f"the two sides' log-probabilities differ by {worst:.1e}, so their speed does not compare")


def _grpo_trainer(config: Config, trl: ModuleType, twin, task: Task, folder: str):
    """trl's GRPO loop on the CPU, in fp32, with transformers' `generate`."""
    import datasets

    settings = trl.GRPOConfig(
        folder,
        per_device_train_batch_size=config.prompts * config.group_size,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        **_plain_settings(),
    )
    data = datasets.Dataset.from_dict({"prompt": [_text(prompt) for prompt in task.prompts]})
    tokenizer = _word_tokenizer(task)

    def no_reward(completions: list, **_) -> list[float]:
        return [0.0] * len(completions)

    return trl.GRPOTrainer(twin, no_reward, settings, data, processing_class=tokenizer)


def _plain_settings() -> dict:
    return dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True)


def _text(ids: list[int]) -> str:
    """Ids as the words of `_word_tokenizer`."""
    return " ".join(f"w{i:06}" for i in ids)


def _word_tokenizer(task: Task):
    """A tokenizer of transformers whose words are the ids themselves."""
    import tokenizers
    import transformers

    vocabulary = {_text([i]): i for i in range(task.model.config.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, _text([task.pad])))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": _text([task.pad]), "eos_token": _text([task.ends[0]])}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


# ---- a step of DPO


def compare_dpo(task: Task, trl: ModuleType, twin, rollouts: Rollouts, folder: str) -> None:
    """Time a step of DPO on both sides: forward and backward, clipping and AdamW. Pairs: two answers to each prompt."""
    chosen = torch.cat([(rollouts.prompt == p).nonzero()[0] for p in rollouts.prompt.unique()])  # (P,)
    rows = torch.cat((chosen, chosen + 1))  # (2 P,), the chosen, then the rejected
    batch = Batch(*(None if tensor is None else tensor[rows] for tensor in rollouts.batch))
    reference = answer_log_probs(task.model, batch).sum(1)  # (2 P,)
    ours = _our_step(task.model, batch, reference)
    sides = {"minillm": ours, "trl": _their_step(trl, twin, task, batch, reference, folder)}
    losses = [step() for step in sides.values()]
    if abs(losses[0] - losses[1]) > 1e-4:
        raise UserError(f"the two sides compute other losses ({losses}), so their speed does not compare")

    seconds = medians(sides, clock=time.process_time)
    print(f"a step of DPO on {len(chosen)} pairs, {batch.x.numel():,} tokens with padding, β {BETA}")
    for name in sides:
        ratio = f"minillm is {seconds['trl'] / seconds['minillm']:.2f} x as fast" if name == "trl" else ""
        print(f"  {name:<10}{batch.x.numel() / seconds[name]:10,.0f} tok/CPU s   {ratio}", flush=True)


def _our_step(model: Transformer, batch: Batch, reference: Tensor) -> Callable[[], float]:
    optimizers = optim.build_optimizers(model, "adamw", lr=1e-6, weight_decay=0.0)

    def loss_of(log_probs: Tensor) -> Tensor:
        chosen, rejected = (log_probs.sum(1) - reference).chunk(2)  # (P,) each
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def step() -> float:
        loss = loss_through_log_probs(model, batch, loss_of)
        loss.backward()
        clip(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return float(loss)

    return step


def _their_step(trl: ModuleType, twin, task: Task, batch: Batch, reference: Tensor, folder: str) -> Callable[[], float]:
    import datasets

    # their batch of the same tokens, through their own collator
    pairs = []
    tokens = torch.cat((batch.x, batch.y[:, -1:]), 1)  # (2 P, T + 1)
    ends = [int(mask.nonzero()[-1]) + 2 for mask in batch.mask]  # one past the answer's last token
    begins = [int(mask.nonzero()[0]) + 1 for mask in batch.mask]
    texts = [row[:end].tolist() for row, end in zip(tokens, ends, strict=True)]
    n_pairs = len(texts) // 2
    for i in range(n_pairs):
        j = n_pairs + i
        pair = {"prompt_ids": texts[i][: begins[i]], "chosen_ids": texts[i][begins[i] :]}
        pair |= {"rejected_ids": texts[j][begins[j] :]}
        pair |= {"ref_chosen_logps": float(reference[i]), "ref_rejected_logps": float(reference[j])}
        pairs.append(pair)
    settings = trl.DPOConfig(
        folder, per_device_train_batch_size=n_pairs, beta=BETA, precompute_ref_log_probs=True, **_plain_settings()
    )
    end = _text([task.ends[0]])  # any rows: the trainer wants some
    prompts = {"prompt": [end] * 2, "chosen": [end] * 2, "rejected": [end] * 2}
    data = datasets.Dataset.from_dict(prompts)
    trainer = trl.DPOTrainer(twin, None, settings, train_dataset=data, processing_class=_word_tokenizer(task))
    inputs = trainer.data_collator(pairs)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def step() -> float:
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step
