"""Files of tensors: the same bytes as safetensors' own writer, divided by size, read in parts."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minillm.checkpoint import tensor_files, tensor_writer
from minillm.checkpoint.tensor_files import DTYPES


def kinds(tensors: dict[str, torch.Tensor]) -> dict[str, tensor_writer.Kind]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}


def write(folder: Path, planned: list[tensor_writer.TensorFile], tensors: dict[str, torch.Tensor]) -> list[dict]:
    return [tensor_writer.write_file(folder, file, [tensors[key] for key in file.keys]) for file in planned]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_tensors_are_written_byte_by_byte_as_safetensors_writes_them(tmp_path, metadata):
    tensors = {f"{name}/é": torch.arange(3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"b/step": torch.tensor(2.0), "a": torch.ones(2, 3), "none": torch.ones(0, 4)}
    (file,) = tensor_writer.plan_tensors("optimizer", kinds(tensors), metadata=metadata)
    write(tmp_path, [file], tensors)
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    assert file.name == "optimizer.safetensors"
    assert (tmp_path / file.name).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_nothing_is_a_file_as_well(tmp_path):
    write(tmp_path, tensor_writer.plan_tensors("optimizer", {}), {})
    assert tensor_files.load_tensors(tmp_path / "optimizer.safetensors") == {}


@pytest.mark.parametrize("limit", [1, 40, 48, 100, 10**9])
def test_files_of_a_limited_size_hold_the_same_tensors_in_their_order(tmp_path, limit):
    tensors = {f"t{i}": torch.full((i, 4), float(i)) for i in (3, 1, 2, 1 + 1)}
    planned = tensor_writer.plan_weights({key: t.shape for key, t in tensors.items()}, torch.float32, limit)
    write(tmp_path, planned, tensors)
    assert [key for file in planned for key in file.keys] == list(tensors)
    assert all(file.n_bytes <= limit or len(file.keys) == 1 for file in planned)
    tensor_writer.write_index(tmp_path, planned)
    if len(planned) > 1:
        index = json.loads((tmp_path / tensor_files.INDEX).read_text())
        assert index["metadata"] == {"total_parameters": 4 * 6, "total_size": 16 * 6}
    places = tensor_files.find_weights(tmp_path)
    assert all(torch.equal(places[key].read(), tensor) for key, tensor in tensors.items())


def test_an_entry_of_the_manifest_is_that_of_what_was_to_be_written(tmp_path):
    tensors = {"a": torch.arange(5.0)}
    (file,) = tensor_writer.plan_tensors("x", kinds(tensors))
    (entry,) = write(tmp_path, [file], tensors)
    path = tmp_path / file.name
    tensor_writer.check_written(path, entry)
    data = path.read_bytes()
    for wrong in (data[:-1], data[:-1] + b"\1"):
        path.write_bytes(wrong)
        with pytest.raises(OSError, match="reads otherwise than it was written"):
            tensor_writer.check_written(path, entry)


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (4, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_part_of_a_tensor_is_that_of_the_whole(tmp_path, monkeypatch, shape, dtype):
    monkeypatch.setattr(tensor_files, "PIECE", 4)
    whole = torch.arange(math.prod(shape)).view(shape).to(dtype)
    save_file({"other": torch.ones(3), "x": whole}, tmp_path / "model.safetensors")
    place = tensor_files.find_weights(tmp_path)["x"]
    parts_of = [[slice(a, b) for a in range(size + 1) for b in range(a, size + 1, 2)] for size in shape]
    for part in itertools.islice(itertools.product(*parts_of), 0, None, 3):
        read = place.read(torch.float32, part)
        assert torch.equal(read, whole[part].float()) and read.shape == whole[part].shape


def n_bytes_read() -> int:
    """What this process has read of files so far, as the system counts."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
@pytest.mark.parametrize(
    ("part", "n_numbers"),
    [
        ((slice(0, 500), slice(0, 300)), 500 * 300),
        ((slice(100, 201), slice(0, 300)), 101 * 300),
        ((slice(0, 500), slice(100, 200)), 500 * 100),
        ((slice(7, 7), slice(0, 300)), 0),
    ],
)
def test_no_other_byte_is_read_than_those_of_the_part(tmp_path, part, n_numbers):
    save_file({"x": torch.ones(500, 300)}, tmp_path / "model.safetensors")
    place = tensor_files.find_weights(tmp_path)["x"]
    before = n_bytes_read()
    place.read(part=part)
    asking = 500  # bytes that reading the counter itself takes, at most
    assert 4 * n_numbers <= n_bytes_read() - before <= 4 * n_numbers + asking
