"""Training few parameters of a frozen model: LoRA, DoRA, IA3, bottleneck adapters, virtual tokens, some layers only.

adapter.py puts an adapter into a model and takes it out, peft_format.py reads and writes its files, folders.py finds
its base; the methods themselves are in lora.py, ia3.py, bottleneck.py and virtual_tokens.py. See docs/en/tuning.md.
"""

from minillm.tuning.adapter import attach, merge
from minillm.tuning.options import TuningConfig
from minillm.tuning.peft_format import load_adapter

__all__ = ["TuningConfig", "attach", "load_adapter", "merge"]
