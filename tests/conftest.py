"""Without a GPU kernels run on the CPU through Triton's interpreter, which must be asked for before it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
