"""Without a GPU, kernels run on the CPU through Triton's interpreter; it must be asked for before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
