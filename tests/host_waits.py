"""Where a step would wait for a GPU, found without one: a script's run in which some tensors count as on the device.

Those are the model's, what is sent to the device, and all that is computed from these. The host waits when it reads
one, when it asks how many of its numbers are not zero, when it sends a tensor otherwise than by `sent`, and when it
exchanges numbers with other ranks.
"""

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tests import launch

READS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__}
READS |= {Tensor.__index__, Tensor.nonzero, torch.nonzero, Tensor.unique, torch.unique, torch.masked_select}


class HostWaits(TorchFunctionMode):
    """Counts waits by the place in the project that causes them."""

    def __init__(self):
        super().__init__()
        self.of_steps: list[Counter] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_on_device = any(hasattr(tensor, "on_device") for tensor in given)
        is_sent = func is Tensor.to and any(isinstance(each, torch.device) for each in (*args, *kwargs.values()))
        index = tree_leaves(args[1]) if func in (Tensor.__getitem__, Tensor.__setitem__) else []
        by_mask = any(isinstance(each, Tensor) and each.dtype == torch.bool for each in index)
        if (func in READS or by_mask) if is_on_device else is_sent:
            self.note()
        found = func(*args, **kwargs)
        if (is_sent or func is Tensor.cpu) and found is args[0]:  # on a real GPU it would be another
            found = found.clone()
        if is_sent or (is_on_device and func not in READS):
            for tensor in tree_leaves((found, args[0] if func is Tensor.__setitem__ else None)):
                if isinstance(tensor, Tensor):
                    tensor.on_device = True
        return found

    def note(self, what: str = "") -> None:
        """Count a wait of the innermost function of the project, unless that is `sent`."""
        frame = sys._getframe(1)
        while "/tests/" in frame.f_code.co_filename or not frame.f_code.co_filename.startswith(str(launch.ROOT)):
            frame = frame.f_back
        if frame.f_code.co_name != "sent":
            self.of_steps[-1][f"{what}{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1


def run(script: str, arguments: str, output: str) -> None:
    """Run train_<script>.py in this process, and write down the waits of each step."""
    from minillm.distributed.ranks import Ranks
    from minillm.training.run import Run

    waits, plain_steps = HostWaits(), Run.steps

    def steps(run, state):
        with waits:
            for step in plain_steps(run, state):
                for model in (state.model, *(other.model for other in state.beside.values())):
                    for tensor in (*model.parameters(), *model.buffers(), state.loss_sum):
                        tensor.on_device = True
                waits.of_steps.append(Counter())
                yield step

    def counted(exchange):
        def call(*args):
            waits.note("ranks: ")
            return exchange(*args)

        return call

    Run.steps = steps
    Ranks.sum, Ranks.maxima = counted(Ranks.sum), counted(Ranks.maxima)
    torch.set_num_threads(1)
    waits.of_steps.append(Counter())  # of what comes before the first step
    sys.argv = [script, *arguments.split()]
    try:
        runpy.run_path(str(launch.ROOT / f"train_{script}.py"), run_name="__main__")
    finally:
        Path(output).write_text(json.dumps(waits.of_steps), encoding="utf-8")
