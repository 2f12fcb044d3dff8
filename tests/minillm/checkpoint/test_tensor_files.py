"""Weights are read strictly: what lies there may be broken or hostile."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.checkpoint import tensor_files, tensor_writer
from tests.minillm.checkpoint.test_train_state import read_weights, refused


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5, "zip", "old torch"])
def test_a_pickle_in_disguise_is_refused_and_not_run(tmp_path, protocol):
    file, struck = tmp_path / "model.safetensors", tmp_path / "struck"
    if protocol == "zip":
        torch.save(Bomb(struck), file)
    elif protocol == "old torch":
        torch.save(Bomb(struck), file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(pickle.dumps(Bomb(struck), protocol=protocol))
    text = refused(lambda: read_weights(tmp_path))
    assert str(file) in text and ("a pickle" in text or protocol == 0)
    assert not struck.exists()


def raw(path: Path, header, body: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)


TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        ({"a": {**TWO, "shape": [3]}}, b"\0" * 8, None),  # shape and bytes disagree
        ({"a": TWO}, b"\0" * 7, None),  # truncated
        ({"a": TWO}, b"\0" * 9, None),  # more than the header tells
        ({"a": TWO, "b": TWO}, b"\0" * 8, None),  # two tensors over the same bytes
        ({"a": {**TWO, "data_offsets": [8, 0]}}, b"\0" * 8, None),
        ({"a": {**TWO, "shape": [1 << 62, 8]}}, b"\0" * 8, None),
        ({"a": {**TWO, "dtype": "F33"}}, b"\0" * 8, None),
        ({"a": TWO}, b"\0" * 8, 1 << 60),  # header longer than the file
        (b'{"a": {"dtype": "F32"', b"", None),
        (b'{"a": %s, "a": %s}' % ((json.dumps(TWO).encode(),) * 2), b"\0" * 8, None),  # twice in one header
        (b"\xff\xfe", b"", None),
        (b"", b"", None),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, body, length):
    raw(tmp_path / "model.safetensors", header, body, length)
    text = refused(lambda: read_weights(tmp_path))
    assert str(tmp_path / "model.safetensors") in text
    raw(tmp_path / "model.safetensors", {"a": TWO}, b"\0" * 8)
    assert [(name, tensor.tolist()) for name, tensor in read_weights(tmp_path).items()] == [("a", [0.0, 0.0])]


def test_every_truncation_of_a_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(3, dtype=torch.bfloat16)}, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        refused(lambda: tensor_files.load_tensors(file))


def shards(folder: Path, weight_map: dict, **files: dict) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / tensor_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read_one_tensor_at_a_time(tmp_path):
    places = {"x": "one.safetensors", "y": "two.safetensors", "z": "one.safetensors"}
    shards(tmp_path, places, one={"x": torch.ones(1), "z": torch.ones(2)}, two={"y": torch.ones(3)})
    assert {name: len(tensor) for name, tensor in read_weights(tmp_path).items()} == {"x": 1, "y": 3, "z": 2}


def test_all_that_is_wrong_with_shards_is_listed_before_anything_is_read(tmp_path):
    places = {"x": "one.safetensors", "gone": "one.safetensors", "y": "two.safetensors", "w": "three.safetensors"}
    shards(tmp_path, places, one={"x": torch.ones(1), "y": torch.ones(1)}, two={"y": torch.ones(3)})
    text = refused(lambda: read_weights(tmp_path))
    for part in (
        "gone is missing from one.safetensors",
        "y in one.safetensors is not in the index",
        "y is in one.safetensors and in two.safetensors",
        "three.safetensors: no such file",
    ):
        assert part in text


def test_of_ten_thousand_missing_shards_the_first_are_named(tmp_path):
    shards(tmp_path, {f"t{i}": f"{i:05}.safetensors" for i in range(10_000)})
    text = refused(lambda: read_weights(tmp_path))
    assert "00000.safetensors: no such file" in text and text.endswith("…") and len(text) < 20_000


@pytest.mark.parametrize(
    "place",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors", "..", "", "x.bin"],
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, place):
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
    shards(inside, {"x": place})
    text = refused(lambda: read_weights(inside))
    assert "refused" in text and tensor_files.INDEX in text


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused_and_the_hubs_links_are_read(tmp_path):
    inside, hub = tmp_path / "model", tmp_path / "hub" / "snapshots" / "abc"
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    for folder, place in ((inside, tmp_path), (hub, tmp_path / "hub" / "blobs")):
        folder.mkdir(parents=True)
        save_file({"x": torch.ones(1)}, place / "weights")
        (folder / "x.safetensors").symlink_to(place / "weights")
        shards(folder, {"x": "x.safetensors"})
    assert "'x.safetensors': not a file of this folder; refused" in refused(lambda: read_weights(inside))
    assert list(tensor_files.find_weights(hub)) == ["x"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"x": 5}}',
        '{"weight_map": {"x": null}}',
        '{"weight_map": {"a": "s", "a": "t"}}',
        "",
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / tensor_files.INDEX).write_text(text)
    assert tensor_files.INDEX in refused(lambda: read_weights(tmp_path))


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 19280])  # in bytes: what pickles and zips begin by
def test_a_header_as_long_as_a_pickle_begins_is_read(tmp_path, length):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.arange(3.0)}, file)
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    file.write_bytes(length.to_bytes(8, "little") + data[8 : 8 + n].ljust(length) + data[8 + n :])
    assert torch.equal(tensor_files.load_tensors(file)["x"], torch.arange(3.0))


def test_a_folder_without_weights_names_the_pickle_beside(tmp_path):
    assert "no such file" in refused(lambda: read_weights(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin, a pickle" in refused(lambda: read_weights(tmp_path))
    (tmp_path / "model.safetensors").mkdir()
    refused(lambda: read_weights(tmp_path))
    refused(lambda: read_weights(tmp_path / "nowhere"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_nan_is_named_by_tensor(dtype):
    tensor = torch.tensor([[1.0, float("nan")], [2.0, float("nan")]]).to(dtype)
    text = refused(lambda: tensor_files.check_finite("layers.3.w", tensor, "out/x"))
    assert "out/x: layers.3.w holds 2 of 4" in text
    tensor_files.check_finite("layers.3.w", torch.ones(4).to(dtype), "out/x")
    text = refused(lambda: tensor_files.check_finite("ids", torch.ones(4, dtype=torch.int64), "out/x"))
    assert "out/x: ids holds whole numbers (torch.int64)" in text


def test_float16_that_is_too_narrow_is_not_called_damage():
    stored = torch.tensor([1.0, 1e5, -7e4])
    text = refused(lambda: tensor_files.check_finite("w", stored.half(), "out/x", stored.to))
    assert text == "out/x: w holds 2 of 3 values beyond float16's 65,504; choose --dtype bfloat16 or float32"
    stored[0] = torch.nan
    for dtype in (torch.float16, torch.bfloat16):
        text = refused(lambda dtype=dtype: tensor_files.check_finite("w", stored.to(dtype), "out/x", stored.to))
        assert "values that are not finite; take an earlier checkpoint" in text


def test_tensors_that_do_not_match_are_all_listed():
    expected = {"a": torch.Size([2, 3]), "b": (4,), "c": (5,)}
    text = refused(lambda: tensor_files.match_tensors(expected, {"a": (3, 2), "b": (4,), "d": (1,)}, "m"))
    assert text == "m: does not fit the model: c is missing; d is not expected; a is (3, 2), expected (2, 3)"
    tensor_files.match_tensors(expected, dict(expected), "m")


@pytest.mark.parametrize("dtype", tensor_files.DTYPES.values(), ids=tensor_files.DTYPES)
def test_safetensors_reads_what_is_written_tensor_by_tensor_and_we_read_it_in_pieces(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE", 7)
    given = {"b": torch.arange(24).view(2, 3, 4), "a": torch.tensor(3), "empty": torch.zeros(0, 4)}
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    shapes = {name: tensor.shape for name, tensor in given.items()}
    tensor_writer.write_weights(tmp_path, shapes, dtype, lambda name: given[name])
    theirs = load_file(tmp_path / "model.safetensors")
    for name, place in tensor_files.find_weights(tmp_path).items():
        assert place.shape == given[name].shape and place.dtype == theirs[name].dtype == dtype
        assert torch.equal(place.read().float(), given[name].float())
        assert torch.equal(theirs[name].float(), given[name].float())
        assert torch.equal(place.read(torch.float32), given[name].to(torch.float32))


def test_a_file_that_shrinks_after_its_header_was_read_is_named(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / "model.safetensors")
    places = tensor_files.find_weights(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-8])
    assert "ends before its tensors do" in refused(lambda: places["x"].read())
