"""GGUF files against the gguf package's own reader and writer, and against headers that claim too much."""

import struct
import sys

import gguf
import numpy as np
import pytest
import torch

from minillm.base.errors import UserError
from minillm.checkpoint import gguf_file

METADATA = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.count": 7,
    "a.size": 1e-5,
    "a.text": "中文",
    "a.counts": [1, -2, 3],
    "a.sizes": [0.5, -1.0],
    "a.texts": ["", "x", "▁"],
}
WEIGHTS = {"one": torch.arange(5.0), "two": torch.randn(3, 7), "three": torch.randn(4, 64)}


@pytest.fixture
def written(tmp_path):
    """A file of ours, of three dtypes, none of whose sizes is a multiple of the alignment."""
    dtypes = {"one": torch.float32, "two": torch.float16, "three": torch.bfloat16}
    kinds = {"one": "F32", "two": "F16", "three": "BF16"}
    tensors = {name: (tuple(t.shape), kinds[name]) for name, t in WEIGHTS.items()}
    gguf_file.write(tmp_path / "m.gguf", METADATA, tensors, WEIGHTS.__getitem__)
    return tmp_path / "m.gguf", dtypes


def test_the_package_reads_what_we_write(written):
    path, dtypes = written
    reader = gguf.GGUFReader(path)
    read = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert read.pop("a.size") == np.float32(1e-5)
    assert read == {name: value for name, value in METADATA.items() if name != "a.size"}
    for tensor in reader.tensors:
        expected = WEIGHTS[tensor.name].to(dtypes[tensor.name])
        assert tuple(tensor.shape[::-1]) == tuple(expected.shape)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values, expected.float().numpy())


def test_we_read_what_we_write(written):
    path, dtypes = written
    metadata, entries = gguf_file.read_header(path)
    assert {name: metadata[name] for name in METADATA} == METADATA
    for name, entry in entries.items():
        torch.testing.assert_close(entry.read(dtypes[name]), WEIGHTS[name].to(dtypes[name]), rtol=0, atol=0)


def write_by_the_package(path, weight: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    """A file with other kinds of metadata than we write, and with a tensor of this type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint64("a.long", 1 << 40)
    writer.add_array("a.list", [1.5, 2.5])
    writer.add_tensor("first", np.ones(3, np.float32))
    writer.add_tensor("w", weight, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_we_read_what_the_package_writes(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("minillm.checkpoint.tensor_files.PIECE", 100)  # so that a tensor takes several pieces
    kind = gguf.GGMLQuantizationType[kind]
    weight = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    packed = gguf.quants.quantize(weight, kind)
    write_by_the_package(tmp_path / "m.gguf", packed, kind)
    metadata, entries = gguf_file.read_header(tmp_path / "m.gguf")
    assert metadata["a.long"] == 1 << 40 and metadata["a.list"] == [1.5, 2.5]
    expected = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    torch.testing.assert_close(entries["w"].read(torch.float32), expected, rtol=0, atol=0)
    torch.testing.assert_close(entries["w"].read(torch.bfloat16), expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "MXFP4"])
def test_we_read_types_that_the_package_only_reads(kind, tmp_path, monkeypatch):
    """Any bytes are blocks of these types, with scales that are now and then not finite."""
    monkeypatch.setattr("minillm.checkpoint.tensor_files.PIECE", 600)
    kind = gguf.GGMLQuantizationType[kind]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(0).integers(0, 256, (5, 512 // block_size * block_bytes), np.uint8)
    write_by_the_package(tmp_path / "m.gguf", packed, kind)
    _, entries = gguf_file.read_header(tmp_path / "m.gguf")
    assert entries["w"].shape == (5, 512)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    torch.testing.assert_close(entries["w"].read(torch.float32), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["I32", "I8", "F64"])
def test_types_that_cannot_become_numbers_are_refused_by_name(kind, tmp_path):
    dtype = {"I32": np.int32, "I8": np.int8, "F64": np.float64}[kind]
    write_by_the_package(tmp_path / "m.gguf", np.ones((2, 32), dtype), gguf.GGMLQuantizationType[kind])
    with pytest.raises(UserError, match=rf"m\.gguf: holds tensors of type {kind}, which is not supported"):
        gguf_file.read_header(tmp_path / "m.gguf")


def test_a_file_for_big_endian_machines_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("w", np.ones(3, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UserError, match="big-endian"):
        gguf_file.read_header(tmp_path / "m.gguf")


def test_a_tensor_that_was_cut_since_the_header_was_read_is_named(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    write_by_the_package(tmp_path / "m.gguf", gguf.quants.quantize(np.ones((4, 32), np.float32), kind), kind)
    _, entries = gguf_file.read_header(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"m\.gguf: ends before its tensors do"):
        entries["w"].read(torch.float32)


def test_a_file_cut_anywhere_is_refused(written, tmp_path):
    data = written[0].read_bytes()
    for end in range(0, len(data) - 32, 3):
        (tmp_path / "cut.gguf").write_bytes(data[:end])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            gguf_file.read_header(tmp_path / "cut.gguf")


def test_no_wrong_byte_of_the_header_ends_in_a_traceback(written, tmp_path):
    data = written[0].read_bytes()
    for at in range(data.index(b"three") + 45):
        for value in (0x00, 0xFF):
            (tmp_path / "bad.gguf").write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            try:
                _, entries = gguf_file.read_header(tmp_path / "bad.gguf")
                for entry in entries.values():
                    entry.read(torch.float32)
            except UserError as problem:
                assert "bad.gguf" in str(problem) and "\n" not in str(problem)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (struct.pack("<QQ", 1 << 60, 0), "asks for more"),
        (struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 0, 1 << 60), "asks for more"),
        (struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 9, 3), "asks for more"),
        (struct.pack("<QQQ1sI", 0, 1, 1, b"a", 77), r"77\)? is not a valid GGUFValueType"),
        (struct.pack("<QQQ1sIQ2s", 0, 1, 1, b"a", 8, 2, b"\xff\xfe"), "'utf-8' codec can't decode"),
        (struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"a", 1, 1 << 50, 0, 0), "asks for more"),
        (struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"a", 1, 4, 999, 0), r"999\)? is not a valid GGMLQuantizationType"),
        (struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"a", 1, 5, 8, 0), "is not a multiple of Q8_0 block size"),
        (
            struct.pack("<QQ", 2, 0) + struct.pack("<Q1sIQIQ", 1, b"a", 1, 1, 0, 0) * 2 + bytes(64),
            "duplicated tensor",
        ),
    ],
)
def test_a_header_that_claims_what_is_not_there_is_refused_at_once(body, words, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + body)
    with pytest.raises(UserError, match=words):
        gguf_file.read_header(tmp_path / "bad.gguf")


@pytest.mark.parametrize("limit", ["MOST_VALUES", "MOST_BYTES"])
def test_a_header_of_more_than_any_model_needs_is_refused(limit, written, tmp_path, monkeypatch):
    """An array in a large file, as long as the file: each of its values would become an object in memory."""
    array = struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 0, 5000)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + array + bytes(5000))
    assert len(gguf_file.read_header(tmp_path / "bad.gguf")[0]["a"]) == 5000
    monkeypatch.setattr(gguf_file, limit, 2000)
    with pytest.raises(UserError, match=r"bad\.gguf: its header is wrong: above .* more than any model needs"):
        gguf_file.read_header(tmp_path / "bad.gguf")
    assert gguf_file.read_header(written[0])  # tensors do not count


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    body = struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"a", 1, 32, 8, 0) + bytes(100)
    (tmp_path / "q.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + body)
    with pytest.raises(UserError, match=r"pip install -e \"\.\[gguf\]\""):
        gguf_file.read_header(tmp_path / "q.gguf")
    with pytest.raises(UserError, match=r"pip install -e \"\.\[gguf\]\""):
        gguf_file.write(tmp_path / "m.gguf", METADATA, {}, WEIGHTS.__getitem__)
    assert not (tmp_path / "m.gguf").exists()
