"""Blocks of 8 and 4 bits against the gguf package, whose own results have the bits of llama.cpp's."""

import gguf
import numpy as np
import pytest
import torch

from minillm.base.errors import UserError
from minillm.checkpoint import gguf_file
from minillm.checkpoint.gguf_blocks import PACK


def theirs(weights: torch.Tensor, kind: str) -> np.ndarray:
    return gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("size", [1.0, 1e4, 1e-3, 1e-7], ids=str)  # the last: scales that float16 holds in few bits
def test_the_bits_are_those_of_the_package(kind, size):
    weights = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)) * size
    weights[3] = 0.0  # blocks of zeros
    weights[5] = torch.tensor([1.0, -1.0]).repeat(64)  # two of the largest magnitude
    weights[6] = -weights[5]
    weights[7] = torch.arange(128) * size / 64  # halves between two steps
    np.testing.assert_array_equal(PACK[kind](weights).numpy(), theirs(weights, kind))


@pytest.mark.parametrize("kind", PACK)
def test_any_shape_of_rows(kind):
    weights = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    packed = PACK[kind](weights)
    assert packed.shape[:2] == (2, 3)
    np.testing.assert_array_equal(packed.numpy(), theirs(weights.float(), kind))


@pytest.mark.parametrize("kind", PACK)
def test_what_is_written_reads_back_as_the_package_reads_it(kind, tmp_path):
    weights = torch.randn(6, 96)
    gguf_file.write(
        tmp_path / "m.gguf", {"general.architecture": "llama"}, {"w": ((6, 96), kind)}, lambda name: weights
    )
    (stored,) = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert stored.tensor_type.name == kind and stored.shape.tolist() == [96, 6]
    expected = gguf.quants.dequantize(theirs(weights, kind), stored.tensor_type)
    _, entries = gguf_file.read_header(tmp_path / "m.gguf")
    np.testing.assert_array_equal(entries["w"].read(torch.float32).numpy(), expected)
    step = weights.abs().amax(1) / (120 if kind == "Q8_0" else 7)
    assert ((torch.from_numpy(expected) - weights).abs() <= step[:, None]).all()


@pytest.mark.parametrize(("kind", "largest"), [("Q8_0", 1e7), ("Q4_0", 1e6)])
def test_weights_beyond_the_scales_are_refused_by_name(kind, largest, tmp_path):
    weights = torch.full((2, 32), largest)
    with pytest.raises(UserError, match=r"w: weights up to 1e\+0[67] are beyond the scales of a block"):
        gguf_file.write(
            tmp_path / "m.gguf", {"general.architecture": "llama"}, {"w": ((2, 32), kind)}, lambda _: weights
        )
