"""Virtual tokens: n trained vectors before each document, while the model stays as it is.

    prompt    the vectors are embeddings                                Lester et al. 2021, arXiv:2104.08691
    ptuning   embeddings that a small network makes                     Liu et al. 2021, arXiv:2103.10385
    prefix    the vectors are keys and values, some for each layer      Li & Liang 2021, arXiv:2101.00190

To the layers all three are the same: a cache that is filled already. A prefix is trained keys and values; those of
trained embeddings are computed by one pass of the model over the n vectors, which see no text and so are the same for
all rows. The model itself knows nothing of this. `attach_virtual` gives it the vectors as a module, and a hook, which
hands that cache to each forward pass that comes without one; generation fills its own cache with them (`fill`). Each
row then is one text: rows of several documents are refused, since every document would need virtual tokens of its own.
A sliding window treats virtual tokens like others: they leave it in their turn.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.distributed.rows import own_heads
from minillm.distributed.shards import full, gather, is_sharded
from minillm.model.config import ModelConfig
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer

ENCODERS = {"prefix": ("none", "mlp"), "prompt": ("none",), "ptuning": ("mlp", "lstm", "none")}  # the first: default
PEFT_TYPES = {"prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING", "ptuning": "P_TUNING"}


class FilledCache:
    """The same n tokens before every row, in place of a `KVCache`: gradients reach them, and no text is stored."""

    stores = False
    seen = None
    ends = None

    def __init__(self, keys: list[Tensor], values: list[Tensor]):
        """keys, values: for each layer (1, n, K, D)."""
        self.keys, self.values = keys, values
        self.longest = keys[0].shape[1]

    def reach(self, n_tokens: int) -> int:
        """One past the last position of T tokens of text."""
        return self.longest + n_tokens

    def reserve(self, n_tokens: int) -> slice:
        """The positions of T tokens of text."""
        return slice(self.longest, self.longest + n_tokens)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values of the virtual tokens and of the text: (B, n + T, K, D)."""
        before = [tensors[layer].to(k.dtype).expand(len(k), -1, -1, -1) for tensors in (self.keys, self.values)]
        return torch.cat((before[0], k), 1), torch.cat((before[1], v), 1)

    def advance(self, n_tokens: int) -> None:
        """Nothing was stored."""


class Collector:
    """Keeps the keys and values that each layer computes, with their gradients, in place of a `KVCache`."""

    stores = True
    ends = None
    seen = None

    def __init__(self):
        self.keys: list[Tensor] = []  # for each layer (B, T, K, D)
        self.values: list[Tensor] = []

    def reach(self, n_tokens: int) -> int:
        """One past the last position of T tokens."""
        return n_tokens

    def reserve(self, n_tokens: int) -> slice:
        """The positions of T tokens."""
        return slice(n_tokens)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's k and v, and return them."""
        self.keys.append(k)
        self.values.append(v)
        return k, v

    def advance(self, n_tokens: int) -> None:
        """Nothing follows."""


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

    def keys_values(self, model: Transformer) -> tuple[list[Tensor], list[Tensor]]:
        """The model's keys and values of the virtual tokens, for each layer (1, n, K, D)."""
        table = self.table()
        if self.kind != "prefix":
            collector = Collector()
            embeddings = table.to(model.norm.weight.dtype)[None]  # (1, n, C)
            model.through_layers(embeddings, cache=collector)
            return collector.keys, collector.values
        shape = (1, self.n, self.config.n_layers, 2, self.config.n_kv_heads, self.config.head_dim)
        layers = own_heads(model, table.view(shape)).unbind(2)
        return [layer[:, :, 0] for layer in layers], [layer[:, :, 1] for layer in layers]

    def fill(self, model: Transformer, cache: KVCache) -> None:
        """Put them into all rows of an empty cache."""
        gather(model)
        cache.reserve(self.n)
        for layer, (k, v) in enumerate(zip(*self.keys_values(model), strict=True)):
            cache.update(layer, k, v)
        cache.advance(self.n)

    @torch.no_grad()
    def start_from(self, model: Transformer, ids: list[int]) -> None:
        """Begin with what these n tokens would be to the model: their embeddings, or their keys and values."""
        weight = model.embed_tokens.weight
        tokens = torch.tensor([ids], device=weight.device)  # (1, n)
        if self.kind != "prefix":
            self.embedding.weight.copy_(model.embed_tokens(tokens)[0])
            return
        training, collector = model.training, Collector()
        model.eval().hidden(tokens, cache=collector)
        model.train(training)
        pairs = [t for pair in zip(collector.keys, collector.values, strict=True) for t in pair]  # each (1, n, K, D)
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

    @torch.no_grad()
    def peft_tensors(self) -> dict[str, Tensor]:
        """PEFT's adapter_model.safetensors: the table (n, width) only, since the encoder is not needed to use it.

        If the encoder is sharded, every rank must call this.
        """
        return {"prompt_embeddings": self._whole().table().clone()}

    def _whole(self) -> "VirtualTokens":
        """The same vectors and encoder, of which this rank holds everything."""
        if not any(is_sharded(parameter) for parameter in self.parameters()):
            return self
        whole = VirtualTokens(self.config, self.kind, self.n, self.encoder, self.hidden)
        whole.to(self.embedding.weight.device)
        for ours, theirs in zip(whole.parameters(), self.parameters(), strict=True):
            ours.copy_(full(theirs))
        return whole

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


def virtual_tokens(model: nn.Module) -> VirtualTokens | None:
    """The virtual tokens that a model computes with now; None: it has none."""
    return model._modules.get("virtual")


def context_of(model: Transformer) -> int:
    """How many tokens of text the model can read and write: max_seq_len minus its virtual tokens."""
    virtual = virtual_tokens(model)
    return model.config.max_seq_len - (0 if virtual is None else virtual.n)


def _put_before_text(model: Transformer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """What a forward pass is given, with the virtual tokens as its cache: a hook that runs before it."""
    virtual = virtual_tokens(model)
    if virtual is None or kwargs.get("cache") is not None:
        return None
    if kwargs.get("documents") is not None:
        raise UserError(
            f"{virtual.n} virtual tokens stand before one text a row, and these rows hold several documents: "
            "give each a row of its own (`Batch.one_text_a_row`)"
        )
    return args, kwargs | {"cache": FilledCache(*virtual.keys_values(model))}


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
    if (there := virtual_tokens(model)) is not None:
        raise UserError(f"the model has {there.n} virtual tokens already; load the base again")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        virtual = VirtualTokens(model.config, kind, n_virtual, encoder, hidden or model.config.dim)
        random_ids = torch.randint(model.config.vocab_size, (n_virtual,)).tolist()
    virtual.to(model.norm.weight.device)
    if encoder == "none":
        virtual.start_from(model, random_ids)
    model.virtual = virtual
    if _put_before_text not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_put_before_text, with_kwargs=True)
    return virtual
