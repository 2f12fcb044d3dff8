"""Training few parameters of a frozen model: LoRA, DoRA, IA3, bottleneck adapters, virtual tokens, some layers only.

attach.py puts an adapter into a model and takes it out, peft_format.py reads and writes its files, folders.py finds
its base; the methods themselves are in lora.py, ia3.py, adapter.py and virtual.py. See docs/tuning.md.
"""

from minillm.tuning.attach import Adapter, active_adapter, attach, merge, merged, remove_adapter, set_adapter, unmerge
from minillm.tuning.folders import base_sha256, is_adapter, load_adapted, merge_folder, tokenizer_of
from minillm.tuning.options import TuningConfig
from minillm.tuning.peft_format import load_adapter, read_tensors, save_adapter
from minillm.tuning.training import (
    choose_optimizer,
    describe_parameters,
    fingerprints,
    flops_per_token,
    load_model,
    n_trained,
)

__all__ = [
    "Adapter",
    "TuningConfig",
    "active_adapter",
    "attach",
    "base_sha256",
    "choose_optimizer",
    "describe_parameters",
    "fingerprints",
    "flops_per_token",
    "is_adapter",
    "load_adapted",
    "load_adapter",
    "load_model",
    "merge",
    "merge_folder",
    "merged",
    "n_trained",
    "read_tensors",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "tokenizer_of",
    "unmerge",
]
