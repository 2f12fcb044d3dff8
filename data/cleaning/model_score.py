"""How well a model of one's own predicts a text: bits per byte, by which the middle of a pile is told from its ends.

    bits per byte = Σ −log2 p(token | the tokens before it) / UTF-8 bytes of the text

Loops and templates have few bits, damaged text and foreign languages many; CCNet (Wenzek et al. 2020, arXiv:1911.00359)
sorts the web so. Of a long text the beginning is scored, in windows as long as those that the model was trained on, of
which each begins with the last token of the one before.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minillm.base.device import pick_device
from minillm.base.errors import UserError
from minillm.base.files import sha256
from minillm.checkpoint.huggingface import check_vocabulary, load_model
from minillm.checkpoint.run_folder import resolve_checkpoint
from minillm.datasets.batch import shifted
from minillm.model.loss import target_log_probs
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer

BEGINNING = 400  # characters of a text that are scored
TOKENS_AT_ONCE = 2048
UNKNOWN_LENGTH = 512  # tokens of a window, of a model that does not say how long those of its training were


class ModelScore(NamedTuple):
    """Scores texts by the model in a folder. key: a checksum of the model and of what computes."""

    folder: Path
    key: str
    name: str = "bits_per_byte"

    @staticmethod
    def of(path: str) -> "ModelScore":
        """By the model of a run or a model folder. Raises UserError for what is none."""
        folder = resolve_checkpoint(path)
        if (folder / "adapter_config.json").exists():
            raise UserError(f"--score_model {path}: an adapter; make a model of it first: python -m minillm merge")
        names = ("config.json", "tokenizer.model", "tokenizer.json", "*.safetensors")
        files = sorted(file for name in names for file in folder.glob(name))
        sums = [sha256(file) for file in files]
        computes = pick_device("auto").type
        return ModelScore(folder, hashlib.sha256("|".join([*sums, computes]).encode()).hexdigest()[:12])

    def workers(self, most: int) -> int:
        """How many processes to use of so many: a GPU serves one."""
        return most if pick_device("auto").type == "cpu" else 1

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Bits per byte of each text, (n,) float32; NaN for an empty one.

        One thread computes, so that the number of processes changes no bit of the result, and four decimals are kept,
        since the last bits depend on which texts are read together.
        """
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return bits_per_byte(*_loaded(self.folder), texts).round(4)
        finally:
            torch.set_num_threads(n_threads)


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[Transformer, Tokenizer]:
    """The model of a folder, in evaluation mode, and its tokenizer; each process loads them once."""
    device = pick_device("auto")
    model = load_model(folder, device=device, dtype=torch.float32 if device.type == "cpu" else None)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(model.config, tokenizer, folder)
    return model.eval(), tokenizer


def bits_per_byte(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Bits per byte of the beginning of each text, (n,) float32; NaN for an empty one."""
    beginnings = [text[:BEGINNING] for text in texts]
    n_bytes = np.array([len(text.encode()) for text in beginnings], np.float64)
    seq_len = model.config.trained_seq_len or min(UNKNOWN_LENGTH, model.config.max_seq_len)
    windows = []  # (number of its text, tokens: seq_len + 1 of them or fewer)
    for number, ids in enumerate(tokenizer.encode_many(beginnings)):
        tokens = [tokenizer.start_id, *ids]
        windows += [(number, tokens[i : i + seq_len + 1]) for i in range(0, len(tokens) - 1, seq_len)]
    windows.sort(key=lambda window: len(window[1]))

    nats = np.zeros(len(texts))
    for batch in _batches(windows):
        numbers = np.array([number for number, _ in batch])
        nats += np.bincount(numbers, _nats(model, [tokens for _, tokens in batch]), len(texts))
    return np.where(n_bytes > 0, nats / math.log(2) / np.maximum(n_bytes, 1), np.nan).astype(np.float32)


def _batches(windows: list[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
    """The windows, sorted by length, in batches of at most TOKENS_AT_ONCE tokens with what fills them up."""
    batch: list[tuple[int, list[int]]] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window[1]) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def _nats(model: Transformer, rows: list[list[int]]) -> np.ndarray:
    """−ln p of the targets of each row together, (B,) float64; the first token of a row is no target."""
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int64)  # (B, T + 1)
    mask = np.zeros((len(rows), width - 1), bool)  # (B, T)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        mask[number, : len(row) - 1] = True
    batch = shifted(tokens, mask).to(model.embed_tokens.weight.device)
    hidden = model.hidden(batch.x)[batch.mask]  # (n targets, C)
    log_probs, _ = target_log_probs(hidden, model.lm_head.weight, batch.y[batch.mask], softcap=model.config.softcap)
    owners = np.repeat(np.arange(len(rows)), mask.sum(1))
    return np.bincount(owners, -log_probs.cpu().double().numpy(), len(rows))
