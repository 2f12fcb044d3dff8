"""Virtual tokens: n trained vectors before each document, while the model stays as it is.

    prompt    the vectors are embeddings                                Lester et al. 2021, arXiv:2104.08691
    ptuning   embeddings that a small network makes                     Liu et al. 2021, arXiv:2103.10385
    prefix    the vectors are keys and values, some for each layer      Li & Liang 2021, arXiv:2101.00190

The data puts n placeholders before each document (`chat_data.collate`, `Batch.with_placeholders`, `generate.prefill`),
so that documents, positions and the cache need no knowledge of virtual tokens. What the model computes at these
positions is overwritten: the embeddings, or each layer's keys and values after the rotation. With a prefix, nothing
reads the output at a placeholder, and it has no loss; so where each row is one document, the model skips the
placeholders and puts the prefix before each layer's keys and values. A sliding window treats them like other tokens:
they leave it in their turn.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.model.config import ModelConfig
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer

ENCODERS = {"prefix": ("none", "mlp"), "prompt": ("none",), "ptuning": ("mlp", "lstm", "none")}  # the first: default
PEFT_TYPES = {"prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING", "ptuning": "P_TUNING"}


class VirtualTokens(nn.Module):
    """The vectors of n virtual tokens: a table, or an encoder's output for a smaller table."""

    def __init__(self, config: ModelConfig, kind: str, n: int, encoder: str, hidden: int):
        """encoder: one of ENCODERS[kind]; hidden: its width. Initialized as torch does: the table from N(0, 1)."""
        super().__init__()
        self.config, self.kind, self.n, self.encoder, self.hidden = config, kind, n, encoder, hidden
        prefix = kind == "prefix"
        self.dim = config.n_kv_heads * config.head_dim if prefix else config.dim
        self.width = 2 * config.n_layers * self.dim if prefix else self.dim  # numbers per virtual token
        self.embedding = nn.Embedding(n, self.width if encoder == "none" else self.dim)
        self.lstm = self.mlp = None
        if encoder == "lstm":
            self.lstm = LSTM(self.dim, hidden)
            self.mlp = _mlp(nn.ReLU, 2 * hidden, 2 * hidden, self.width)
        elif encoder == "mlp":
            inner = (nn.Tanh, self.dim, hidden) if prefix else (nn.ReLU, self.dim, hidden, hidden)
            self.mlp = _mlp(*inner, self.width)

    def table(self) -> Tensor:
        """The vectors (n, width): embeddings (n, C), or keys and values of each layer in turn (n, L·2·K·D)."""
        table = self.embedding.weight if self.lstm is None else self.lstm(self.embedding.weight)
        return table if self.mlp is None else self.mlp(table)

    def forward(self, x: Tensor, positions: Tensor | None):
        """The embeddings x (B, T, C) with the placeholders overwritten; and a function that does so in the layers.

        positions: (T,) or (B, T) int64, inside each document: placeholders are those below n. None: each row is one
        document, and a prefix's placeholders are left out: (B, T − n, C). The function is None, or for a prefix
        (layer, k, v) → (k, v), each (B, T, K, D).
        """
        if self.kind == "prefix" and positions is None:
            table = self.table().view(1, self.n, self.config.n_layers, 2, self.config.n_kv_heads, -1)
            return x[:, self.n :], partial(_before, table)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        chosen = positions[..., None] == torch.arange(self.n, device=x.device)  # (T, n) or (B, T, n)
        table = self.table()
        if self.kind != "prefix":
            return overwritten(x, table, chosen), None
        return x, partial(_keys_values, chosen, table.view(self.n, self.config.n_layers, 2, self.dim))

    @torch.no_grad()
    def start_from(self, model: Transformer, ids: list[int]) -> None:
        """Begin with what these n tokens would be to the model: their embeddings, or their keys and values."""
        weight = model.embed_tokens.weight
        tokens = torch.tensor([ids], device=weight.device)  # (1, n)
        if self.kind != "prefix":
            self.embedding.weight.copy_(model.embed_tokens(tokens)[0])
            return
        cache = KVCache(model.config, 1, self.n, device=weight.device, dtype=weight.dtype)
        training = model.training
        model.eval().hidden(tokens, cache=cache)
        model.train(training)
        pairs = [t for pair in zip(cache.keys, cache.values, strict=True) for t in pair]  # each (1, n, K, D)
        self.embedding.weight.copy_(torch.cat(pairs, 2).reshape(self.n, self.width))

    def peft_config(self) -> dict:
        """PEFT's adapter_config.json for these tokens; the name of the base is left None."""
        heads = self.config.n_kv_heads if self.kind == "prefix" else self.config.n_heads
        common = dict.fromkeys(("auto_mapping", "base_model_name_or_path", "modules_to_save", "revision")) | dict(
            inference_mode=True,
            num_attention_heads=heads,
            num_layers=self.config.n_layers,
            num_transformer_submodules=1,
            num_virtual_tokens=self.n,
            peft_type=PEFT_TYPES[self.kind],
            task_type="CAUSAL_LM",
            token_dim=self.dim,
        )
        own = {
            "prefix": dict(encoder_hidden_size=self.hidden, init_weights=None, prefix_projection=self.encoder == "mlp"),
            "prompt": dict.fromkeys(("prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"))
            | dict(prompt_tuning_init="RANDOM"),
            "ptuning": dict(
                encoder_dropout=0.0,
                encoder_hidden_size=self.hidden,
                encoder_num_layers=2,
                encoder_reparameterization_type="LSTM" if self.encoder == "lstm" else "MLP",
            ),
        }
        return common | own[self.kind]

    def peft_tensors(self) -> dict[str, Tensor]:
        """PEFT's adapter_model.safetensors: the table (n, width) only, since the encoder is not needed to use it."""
        return {"prompt_embeddings": self.table().detach().clone()}

    def load_peft(self, tensors: dict[str, Tensor]) -> None:
        """Become the saved table, without an encoder, which is not saved. Raises `UserError` for other shapes."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {"prompt_embeddings": (self.n, self.width)}:
            raise UserError(
                f"the adapter holds {shapes}, but {self.n} virtual tokens ({self.kind}) of this model are "
                f"prompt_embeddings of {(self.n, self.width)}: it belongs to another base"
            )
        here = self.embedding.weight
        self.embedding.weight = nn.Parameter(tensors["prompt_embeddings"].to(here.device, here.dtype, copy=True))
        self.encoder, self.lstm, self.mlp = "none", None, None


class LSTM(nn.Module):
    """Two bidirectional layers, (n, C) → (n, 2·hidden), as nn.LSTM, which torch.compile cannot trace."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.weights = nn.ParameterList(nn.LSTM(dim, hidden, num_layers=2, bidirectional=True).parameters())

    def forward(self, x: Tensor) -> Tensor:
        start = x.new_zeros(4, 1, self.hidden)  # the states before the first token: layers × directions, a batch of 1
        how = dict(has_biases=True, num_layers=2, dropout=0.0, bidirectional=True, batch_first=False)
        with torch.autocast(x.device.type, enabled=False):  # on CUDA it would use fp16, whatever autocast's dtype
            return torch.lstm(x[:, None], (start, start), list(self.weights), train=self.training, **how)[0][:, 0]


def _mlp(activation: type[nn.Module], *sizes: int) -> nn.Sequential:
    """Linear layers of these sizes, with the activation between them."""
    modules = [m for pair in pairwise(sizes) for m in (nn.Linear(*pair), activation())]
    return nn.Sequential(*modules[:-1])


def overwritten(x: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
    """x (B, T, …) with rows[i] at each position where chosen[…, i] is True; rows (n, N), chosen (T, n) or (B, T, n).

    The rows are placed by a product with a 0/1 matrix: no shape depends on the data, and the backward pass sums in a
    fixed order, which that of a gather would not.
    """
    placed = (chosen.to(rows.dtype) @ rows).to(x.dtype)  # (T, N) or (B, T, N)
    return torch.where(chosen.any(-1, keepdim=True), placed, x.flatten(2)).view_as(x)


def _keys_values(chosen: Tensor, table: Tensor, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's k and v (B, T, K, D) with the prefix put into them; table: (n, L, 2, K·D)."""
    return overwritten(k, table[:, layer, 0], chosen), overwritten(v, table[:, layer, 1], chosen)


def _before(table: Tensor, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's k and v (B, T − n, K, D) with the prefix before them, (B, T, K, D); table: (1, n, L, 2, K, D)."""
    pair = zip(table[:, :, layer].unbind(2), (k, v), strict=True)
    k, v = (torch.cat((own.to(x.dtype).expand(x.shape[0], -1, -1, -1), x), 1) for own, x in pair)
    return k, v


def attach_virtual(
    model: Transformer,
    kind: str,
    n_virtual: int,
    *,
    encoder: str | None = None,
    hidden: int | None = None,
    seed: int = 0,
) -> VirtualTokens:
    """Give the model virtual tokens, `model.virtual`, in fp32 on its device; the caller freezes the rest.

    kind: prefix, prompt or ptuning. encoder: what computes the table during training, see ENCODERS (None: the first).
    hidden: its width (None: C). Without an encoder they start as random tokens of the vocabulary (`start_from`). All
    draws depend on the seed alone. Raises `UserError` for a kind, encoder or number that is not possible.
    """
    choices, longest = ENCODERS.get(kind), model.config.max_seq_len - 1
    if choices is None:
        raise UserError(f"virtual tokens of kind {kind!r}: choose one of {', '.join(ENCODERS)}")
    encoder = encoder or choices[0]
    if encoder not in choices:
        raise UserError(f"{kind} tuning with encoder {encoder!r}: choose one of {', '.join(choices)}")
    if not 1 <= n_virtual <= longest:
        raise UserError(f"--n_virtual {n_virtual}: must be 1 to {longest}, since text has to fit behind them")
    if model.virtual is not None:
        raise UserError(f"the model has {model.n_virtual} virtual tokens already; load the base again")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        virtual = VirtualTokens(model.config, kind, n_virtual, encoder, hidden or model.config.dim)
        random_ids = torch.randint(model.config.vocab_size, (n_virtual,)).tolist()
    virtual.to(model.embed_tokens.weight.device)
    if encoder == "none":
        virtual.start_from(model, random_ids)
    model.virtual = virtual
    return virtual
