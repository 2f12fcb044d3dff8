"""Lesson 3: attention by hand, and what the heads of a trained model look at.

    python docs/course/attention.py        # after python train_pretrain.py

Computes attention by hand, compares it with the model's own, tells where each head looks, and what it costs to
take that head away.
"""

import math

import lesson
import numpy as np
import torch
from torch import Tensor

from minillm.datasets import TokenBins, TokenWindows
from minillm.tokenizer import Tokenizer

SHADES = " .:-=+*#%@"


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs (T, D) and weights (T, T) of one head. q, k, v: (T, D). documents: (T,), the one each token is of."""
    scores = q @ k.T / math.sqrt(q.shape[-1])  # (T, T): how well each query fits each key
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)  # right of the diagonal: later tokens
    if documents is not None:
        hidden |= documents[:, None] != documents[None, :]  # and those of other documents
    scores = scores.masked_fill(hidden, -math.inf)
    weights = scores.softmax(-1)  # each row sums to 1
    return weights @ v, weights


class Watched:
    """A model whose layers tell with which queries, keys and values they attend."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.seen, self.without = model, [], None
        for number, layer in enumerate(model.layers):
            layer.self_attn.attend = self._attend(number, layer.self_attn.attend)

    def _attend(self, number: int, own):
        def attend(q, k, v, spans, ends):
            out = own(q, k, v, spans, ends)  # (B, T, H, D)
            self.seen.append((q, k, v, out))
            if self.without and self.without[0] == number:
                out = out.clone()
                out[:, :, self.without[1]] = 0  # this head has nothing to say
            return out

        return attend

    def loss(self, batch, without: tuple[int, int] | None = None) -> float:
        """Nats a token; without: (layer, head) that is taken away."""
        self.seen, self.without = [], without
        with torch.no_grad():
            nats = self.model(batch.x, batch.y, mask=batch.mask, documents=batch.documents)
            return float(nats) / batch.n_targets()


def where(weights: Tensor, tokens: Tensor) -> list[float]:
    """Shares of the attention that go to the first token, to the token itself, to the one before, and to equal ones.

    weights: (T, T). tokens: (T,).
    """
    equal = (tokens[:, None] == tokens[None, :]).tril(-2)
    shares = [weights[2:, 0], weights.diagonal()[2:], weights.diagonal(-1)[1:], (weights * equal).sum(-1)[2:]]
    return [float(share.mean()) for share in shares]


def main() -> None:
    chosen = lesson.options(__doc__)
    model = lesson.trained_model("out/pretrain", chosen)
    tokenizer = Tokenizer.load(chosen.data)
    windows = TokenWindows([(TokenBins(chosen.data, "val"), 1.0)], seq_len=64, seed=0, documents=True)
    batch = windows.batch(np.arange(16))
    watched = Watched(model)
    loss = watched.loss(batch)
    seen = watched.seen
    print(f"{loss:.3f} nats a token on 16 windows of 64 tokens\n")

    # each head: is our attention the model's, where does it look, and what if it were not there
    print("layer head   first  itself  before  equal   loss without it")
    largest = 0.0
    for layer, (q, k, v, out) in enumerate(seen):
        group = q.shape[2] // k.shape[2]  # query heads that share a key and value head
        for head in range(q.shape[2]):
            places = []
            for row in range(len(q)):
                keys, values = k[row, :, head // group], v[row, :, head // group]
                by_hand, weights = attention(q[row, :, head], keys, values, batch.documents[row])
                largest = max(largest, float((by_hand - out[row, :, head]).abs().max()))
                places.append(where(weights, batch.x[row]))
            shares = "".join(f"{share:8.2f}" for share in np.mean(places, axis=0))
            print(f"{layer:5} {head:4}{shares}  {watched.loss(batch, (layer, head)) - loss:+12.3f}")
    print(f"\nlargest difference from the model's own attention: {largest:.0e}")

    # one head of the first layer as a picture: rows are tokens, columns what they look at
    q, k, v, _ = seen[0]
    _, weights = attention(q[0, :24, 0], k[0, :24, 0], v[0, :24, 0], batch.documents[0, :24])
    for token, row in zip(batch.x[0, :24].tolist(), weights, strict=True):
        picture = "".join(SHADES[min(int(10 * weight), 9)] for weight in row.tolist())
        print(f"{tokenizer.decode([token]).strip()!r:>14} {picture}")


if __name__ == "__main__":
    lesson.run(main)
