"""Speed of alignment beside trl's: drawing answers for GRPO, and a step of DPO.

Both sides have the same weights, prompts and number of answers. trl's side is its own GRPOTrainer with transformers'
`generate`, and its own DPOTrainer's loss; the reference's log-probabilities are known on both. First both must compute
the same, then they are timed in turns, in seconds of the processor's time.
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.alignment.log_probs import answer_log_probs, loss_through_log_probs
from minillm.alignment.rollouts import RolloutConfig, Rollouts, roll_out
from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.commands.bench.measure import REPEATS, machine, medians, random_model, transformers_twin
from minillm.datasets.batch import Batch
from minillm.model.config import PRESETS
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from minillm.training import optim
from minillm.training.step import clip

PAD, EOS, BOS = 0, 1, 2
BETA = 0.1  # of DPO
ENDING = 32  # every so many ids of the vocabulary one ends an answer, so that answers end after about as many tokens


@dataclass(frozen=True)
class Config(Options):
    preset: str = option("tiny", "the model's shape", tuple(PRESETS))
    prompts: int = option(16, "prompts of a rollout, and pairs of a DPO step", at_least=1)
    group_size: int = option(8, "answers to each prompt", at_least=2)
    prompt_len: int = option(48, "tokens of a prompt", at_least=1)
    max_new_tokens: int = option(96, "most tokens of an answer", at_least=1)


def run(config: Config) -> None:
    trl = import_trl()

    # a model of random weights, on both sides; answers end at any of several ids, so their lengths differ
    device = torch.device("cpu")
    model = random_model(config.preset)
    vocab_size = model.config.vocab_size
    if config.prompt_len + config.max_new_tokens > model.config.max_seq_len:
        raise UserError(f"--prompt_len and --max_new_tokens: together at most {model.config.max_seq_len}")
    twin, version = transformers_twin(model)
    ends = [EOS, *range(ENDING, vocab_size, ENDING)]
    twin.generation_config.eos_token_id = ends
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(BOS + 1, vocab_size, (config.prompts, config.prompt_len), generator=generator).tolist()
    versions = f"{machine(device)}, {version}, trl {trl.__version__}"
    print(f"{config.preset}: {n_parameters(model.config):,} parameters, {versions}")
    print(f"{torch.get_num_threads()} thread(s), medians of {REPEATS}", flush=True)

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of what transformers means to remove
        rollouts = compare_rollouts(config, model, _grpo_trainer(config, trl, twin, prompts, folder), prompts, ends)
        compare_dpo(model, trl, twin, rollouts, folder)


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


def compare_rollouts(
    config: Config, model: Transformer, trainer, prompts: list[list[int]], ends: list[int]
) -> Rollouts:
    """Time both sides drawing a group of answers to each prompt; returns ours."""
    drawing = RolloutConfig(config.group_size, config.max_new_tokens, 1.0, tuple(ends), PAD, seed=0)
    texts = [_text(prompt) for prompt in prompts for _ in range(config.group_size)]
    n_tokens = {"minillm": [], "trl": []}

    def ours() -> Rollouts:
        rollouts = roll_out(model, prompts, range(len(prompts)), len(n_tokens["minillm"]), drawing)
        n_tokens["minillm"].append(int(rollouts.batch.mask.sum()))
        return rollouts

    def theirs() -> tuple[list[list[int]], list[list[int]]]:
        prompt_ids, answers, *_ = trainer._generate(texts)
        n_tokens["trl"].append(sum(map(len, answers)))
        return prompt_ids, answers

    # do both read the same prompts, and give the same probabilities to the same answers?
    rollouts = ours()
    prompt_ids, _ = theirs()
    if prompt_ids != [prompt for prompt in prompts for _ in range(config.group_size)]:
        raise UserError("the two sides do not read the same prompts, so their speed does not compare")
    _check_log_probs(trainer, rollouts)

    for counts in n_tokens.values():
        counts.clear()
    seconds = medians({"minillm": ours, "trl": theirs}, clock=time.process_time)
    print(f"{config.prompts} × {config.group_size} answers to prompts of {config.prompt_len} tokens")
    speed = {}
    for name, counts in n_tokens.items():
        mean = sum(counts) / len(counts)
        speed[name] = mean / seconds[name]
        length = mean / len(texts)
        ratio = speed[name] / speed["minillm"] if name == "minillm" else speed["minillm"] / speed[name]
        note = "with log-probabilities" if name == "minillm" else f"minillm is {ratio:.2f} x as fast"
        print(f"  {name:<10}{speed[name]:10,.0f} tok/CPU s   {length:5.1f} tokens an answer   {note}", flush=True)
    return rollouts


def _check_log_probs(trainer, rollouts: Rollouts) -> None:
    """Raise `UserError` unless trl's trainer gives our answers the log-probabilities that we drew them with."""
    x, y, mask, _ = rollouts.batch
    tokens = torch.cat((x, y[:, -1:]), 1)  # (N, T + 1)
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, tokens, torch.ones_like(tokens), logits_to_keep=y.shape[1]
        )[0]
    worst = float((found - rollouts.log_probs)[mask].abs().max())
    if worst > 1e-3:
        raise UserError(f"the two sides' log-probabilities differ by {worst:.1e}, so their speed does not compare")


def _grpo_trainer(config: Config, trl: ModuleType, twin, prompts: list[list[int]], folder: str):
    """trl's GRPO loop on the CPU, in fp32, with transformers' `generate`."""
    import datasets

    settings = trl.GRPOConfig(
        folder,
        per_device_train_batch_size=config.prompts * config.group_size,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        **_plain_settings(),
    )
    data = datasets.Dataset.from_dict({"prompt": [_text(prompt) for prompt in prompts]})
    tokenizer = _word_tokenizer(twin.config.vocab_size)

    def no_reward(completions: list, **_) -> list[float]:
        return [0.0] * len(completions)

    return trl.GRPOTrainer(twin, no_reward, settings, data, processing_class=tokenizer)


def _plain_settings() -> dict:
    return dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True)


def _text(ids: list[int]) -> str:
    """Ids as the words of `_word_tokenizer`."""
    return " ".join(f"w{i:06}" for i in ids)


def _word_tokenizer(vocab_size: int):
    """A tokenizer of transformers whose words are the ids themselves."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({_text([i]): i for i in range(vocab_size)}, _text([PAD])))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": _text([PAD]), "eos_token": _text([EOS]), "bos_token": _text([BOS])}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


# ---- a step of DPO


def compare_dpo(model: Transformer, trl: ModuleType, twin, rollouts: Rollouts, folder: str) -> None:
    """Time a step of DPO on both sides: forward and backward, clipping and AdamW. Pairs: two answers to each prompt."""
    chosen = torch.cat([(rollouts.prompt == p).nonzero()[0] for p in rollouts.prompt.unique()])  # (P,)
    rows = torch.cat((chosen, chosen + 1))  # (2 P,), the chosen, then the rejected
    batch = Batch(*(None if tensor is None else tensor[rows] for tensor in rollouts.batch))
    reference = answer_log_probs(model, batch).sum(1)  # (2 P,)
    sides = {"minillm": _our_step(model, batch, reference), "trl": _their_step(trl, twin, batch, reference, folder)}
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


def _their_step(trl: ModuleType, twin, batch: Batch, reference: Tensor, folder: str) -> Callable[[], float]:
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
    prompts = {"prompt": [_text([BOS])] * 2, "chosen": [_text([EOS])] * 2, "rejected": [_text([PAD])] * 2}
    data = datasets.Dataset.from_dict(prompts)
    trainer = trl.DPOTrainer(
        twin, None, settings, train_dataset=data, processing_class=_word_tokenizer(twin.config.vocab_size)
    )
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
