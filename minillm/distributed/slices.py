"""What tensor parallelism leaves of a layer's weights on a rank: those of its own heads and channels.

    q, k, v, gate, up   W (out, in) by rows: each rank computes some of the outputs, from all inputs
    o, down             by columns: each takes some of the inputs, and the ranks' outputs are added up

An adapter is divided like the weight it adapts. Of W + BA, B is cut where W is cut by rows, and A where W is cut by
columns; the other one stays whole on every rank (`divided_with`). So an adapter needs no exchange that its base does
not need. A tensor that stays whole takes part in only a part of the layer's work, so each rank has a part of its
gradient; `fsdp.clip` adds up these parts.
"""

import dataclasses
from functools import partial

from torch import Tensor, nn

from minillm.distributed.exchanges import sum_on_all
from minillm.distributed.rows import RowParts, sublayers

PROJECTIONS = {  # of a layer: how each one's weight (out, in) is divided
    "self_attn": {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1},
    "mlp": {"gate_proj": 0, "up_proj": 0, "down_proj": 1},
}


def slice_weights(model: nn.Module, parts: RowParts) -> dict[str, int]:
    """Keep of each layer's matrices what belongs to this rank, in place.

    Returns parameter → the dimension in which it is divided; one that is whole is not named.
    """
    divided = {}
    for number, layer in enumerate(model.layers):
        for name, (path, module) in sublayers(layer).items():
            for projection, dim in PROJECTIONS[name].items():
                dims = _keep_part(module.get_submodule(projection), dim, parts)
                divided |= {f"layers.{number}.{path}.{projection}.{tensor}": cut for tensor, cut in dims.items()}

        # the heads that are left
        _, attention = sublayers(layer)["self_attn"]
        config, n_parts = attention.config, parts.layout.tensor
        heads = dict(n_heads=config.n_heads // n_parts, n_kv_heads=config.n_kv_heads // n_parts)
        attention.config = dataclasses.replace(config, **heads)
        model.cache_config = attention.config
    return divided


def _keep_part(linear: nn.Module, dim: int, parts: RowParts) -> dict[str, int]:
    """Keep this rank's rows (dim 0) or columns (1) of a linear layer: plain, quantized, or in an adapter's hands."""
    index, n_parts = parts.tensor_index, parts.layout.tensor
    side = "out_features" if dim == 0 else "in_features"
    setattr(linear, side, getattr(linear, side) // n_parts)

    # an adapter, and the layer inside it
    if hasattr(linear, "divided_with"):
        if dim == 1 and hasattr(linear, "added_up"):
            linear.added_up = partial(sum_on_all, group=parts.tensor_group)
        inside = _keep_part(linear.base_layer, dim, parts)
        own = _sliced(linear, linear.divided_with(dim), index, n_parts)
        return own | {f"base_layer.{name}": cut for name, cut in inside.items()}

    # a base that is frozen in few bits, or torch's own layer
    own = {"bias": 0} if dim == 0 else {}
    if hasattr(linear, "keep_part"):
        linear.keep_part(dim, index, n_parts)
    else:
        own["weight"] = dim
    return _sliced(linear, own, index, n_parts)


def _sliced(module: nn.Module, dims: dict[str, int], index: int, n_parts: int) -> dict[str, int]:
    """Put in place of each named tensor of a module its part; returns the dimension of each parameter among them."""
    of_parameters = {}
    for path, dim in dims.items():
        owner = module.get_submodule(path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        whole: Tensor | None = getattr(owner, name)
        if whole is None:
            continue
        part = whole.detach().chunk(n_parts, dim)[index].clone()
        if isinstance(whole, nn.Parameter):
            part = nn.Parameter(part, whole.requires_grad)
            of_parameters[path] = dim
        setattr(owner, name, part)
    return of_parameters
