"""Reward models: one number for a conversation, read at its last token.

    tokens of prompt and answer → states after the last norm → score at the last token, by its number (r)

That place is counted from the length of the text. To look for the last token that is not padding, as other programs
do, reads the token before the end of every text where padding and end are the same id.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface, run_folder, train_state
from minillm.datasets.batch import Batch
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning import folders, peft_format
from minillm.tuning.virtual_tokens import context_of


def load_reward_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    *,
    tokenizer: Tokenizer | None = None,
    template: str = "auto",
    merged: bool = True,
    longest: int = 0,
    remedy: str = "--seq_len",
) -> Transformer:
    """The reward model of a run, a model folder or an adapter, in fp32, frozen, in evaluation mode.

    tokenizer: whose ids it will be given, in the prompt format `template`. merged: an adapter is folded into its base;
    else its base stays as it is, so that another model over the same base can share it. longest: tokens of a prompt and
    its answer that it will be given; remedy: the option by which they become fewer. Raises `UserError` for a language
    model, and for a reward model with another tokenizer or prompt format, or a shorter context.
    """
    folder = run_folder.resolve_checkpoint(folder)
    model, own_tokenizer = open_reward_model(folder, None, device, torch.float32, merged)
    if tokenizer is not None and own_tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"{folder}: the reward model has another tokenizer than the model whose answers it is to judge; train one "
            "from that model"
        )
    if tokenizer is not None and not _write_alike(tokenizer, template, own_tokenizer):
        raise UserError(
            f"{folder}: the reward model reads another prompt format ({own_tokenizer.resolve_template('auto')}) than "
            f"the model answers in ({tokenizer.resolve_template(template)}); give the same --template to both"
        )
    if longest > context_of(model):
        raise UserError(
            f"{folder}: the reward model reads at most {context_of(model)} tokens, and a prompt with its answer may "
            f"have {longest}; lower {remedy}"
        )
    return model


def _write_alike(tokenizer: Tokenizer, template: str, other: Tokenizer) -> bool:
    """Whether a conversation has the same ids in a prompt format and in another folder's own."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return tokenizer.encode_chat(talk, template=template)[0] == other.encode_chat(talk)[0]


def open_reward_model(
    folder: Path, base: str | None, device: torch.device | str, dtype: torch.dtype | None, merged: bool = True
) -> tuple[Transformer, Tokenizer]:
    """The reward model of a folder, frozen, and its tokenizer; an adapter is folded into its base if `merged`.

    base: an adapter's, if it is not where the adapter says. dtype: of the weights; None: as they are stored. Raises
    `UserError` for a language model.
    """
    if folders.is_adapter(folder):
        how = dict(device=device, dtype=dtype, merged=merged, with_score_head=True)
        model, base_folder = folders.load_adapted(folder, base, **how)
        tokenizer = folders.tokenizer_of(folder, base_folder)
    else:
        config = huggingface.load_config(folder, with_score_head=True)
        model = huggingface.load_model(folder, device=device, dtype=dtype, config=config)
        tokenizer = Tokenizer.load(folder)
    huggingface.check_vocabulary(model.config, tokenizer, folder)
    return model.eval().requires_grad_(False), tokenizer


def is_reward_model(folder: Path) -> bool:
    """Whether a model folder or an adapter's folder is a reward model's."""
    if folders.is_adapter(folder):
        return folders.is_of_reward_model(folders.read_config(folder)[0])
    return huggingface.load_config(folder, with_score_head=None).score_head


def score_scale(folder: str | Path) -> tuple[float, float] | None:
    """Mean and standard deviation of the scores on its training data; None for a folder that does not record them.

    The mean is that of the answers that were preferred, so (r − mean) / std is 0 for the usual good answer, whatever
    constant training, which sees differences alone, has left in r (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).
    Raises `UserError` for scores without a spread, by which nothing can be divided.
    """
    folder = run_folder.resolve_checkpoint(folder)
    if not (folder / "resume").is_dir():
        return None
    scale = train_state.read_state(folder).get("score_scale")
    if scale is None:
        return None
    if not scale["std"] > 0:
        raise UserError(
            f"{folder}: this reward model gives all answers of its training data the same score, {scale['mean']:g}; "
            "train it again, on other pairs or with another --lr"
        )
    return scale["mean"], scale["std"]


def weights_fingerprint(folder: str | Path) -> str:
    """Of a reward model's weights, or of its adapter's: by it a run knows whether its reward is still the same."""
    folder = run_folder.resolve_checkpoint(folder)
    if folders.is_adapter(folder):
        return files.sha256(folder / peft_format.WEIGHTS)
    return folders.base_sha256(folder)


def text_lengths(batch: Batch) -> Tensor:
    """Tokens of each row's text, up to the last token that its mask learns: (B,) int64."""
    places = torch.arange(batch.y.shape[1], device=batch.y.device)  # (T,)
    last = (places * batch.mask).amax(dim=1)  # (B,), in y; y[t] is token t + 1
    return last + 2


def last_scores(model: nn.Module, batch: Batch, lengths: Tensor) -> Tensor:
    """The score of each row's text at its last token, (B,) fp32: see `all_scores`.

    lengths: (B,) int64, tokens of each text, the last of which is a target of the batch (`text_lengths`).
    """
    return at_last(all_scores(model, batch), lengths)


def all_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The score at every token of each row, (B, T + 1) fp32.

    model: one with a score head, or what `parallelize` makes of it. batch: a text a row, padded on the right.
    """
    return model(batch.tokens())


def at_last(scores: Tensor, lengths: Tensor) -> Tensor:
    """The scores (B, T + 1) at the last of so many (B,) tokens: (B,)."""
    return scores.gather(1, lengths[:, None] - 1).squeeze(1)
