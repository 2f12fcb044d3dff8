"""llama2.c's format against a reader, a forward pass and a tokenizer written here from its description alone."""

import dataclasses
import struct

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.base.errors import UserError
from minillm.checkpoint import huggingface, llama2c
from minillm.checkpoint.huggingface import StoredModel
from minillm.model.config import ModelConfig, RopeScaling
from minillm.model.size import n_parameters
from minillm.tokenizer.edit import from_pieces
from minillm.tokenizer.tokenizer import Tokenizer

CONFIG = ModelConfig(vocab_size=300, dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=40, max_seq_len=32)


class Reference:
    """A model of that format: numbers in the file's order, rotation of neighbouring pairs by complex numbers."""

    def __init__(self, data: bytes):
        self.dim, self.ffn, self.layers, self.heads, self.kv_heads, vocab, self.length = struct.unpack("<7i", data[:28])
        self.vocab, self.head = abs(vocab), self.dim // self.heads
        self.numbers, self.at = np.frombuffer(data[28:], "<f4").astype(np.float64), 0
        kv, n = self.kv_heads * self.head, self.layers
        self.embedding = self.take(self.vocab, self.dim)
        self.norm1 = self.take(n, self.dim)
        self.wq, self.wk, self.wv = (
            self.take(n, self.dim, self.dim),
            self.take(n, kv, self.dim),
            self.take(n, kv, self.dim),
        )
        self.wo, self.norm2 = self.take(n, self.dim, self.dim), self.take(n, self.dim)
        self.w1, self.w2, self.w3 = (
            self.take(n, *shape) for shape in ((self.ffn, self.dim), (self.dim, self.ffn), (self.ffn, self.dim))
        )
        self.last_norm = self.take(self.dim)
        self.turn = self.take(self.length, self.head // 2) + 1j * self.take(self.length, self.head // 2)
        self.out = self.embedding if vocab > 0 else self.take(self.vocab, self.dim)
        assert self.at == len(self.numbers)

    def take(self, *shape: int) -> np.ndarray:
        begin, self.at = self.at, self.at + int(np.prod(shape))
        return self.numbers[begin : self.at].reshape(shape)

    def rotated(self, x: np.ndarray) -> np.ndarray:
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * self.turn[: len(x), None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    def logits(self, ids: list[int]) -> np.ndarray:
        def norm(x, weight):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

        x, t = self.embedding[ids], len(ids)
        hidden = np.triu(np.full((t, t), -np.inf), 1)
        for i in range(self.layers):
            h = norm(x, self.norm1[i])
            q = self.rotated((h @ self.wq[i].T).reshape(t, self.heads, self.head))
            k = self.rotated((h @ self.wk[i].T).reshape(t, self.kv_heads, self.head))
            v = (h @ self.wv[i].T).reshape(t, self.kv_heads, self.head)
            k, v = (y.repeat(self.heads // self.kv_heads, 1) for y in (k, v))
            scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(self.head) + hidden
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + np.einsum("hts,shd->thd", weights, v).reshape(t, self.dim) @ self.wo[i].T
            h = norm(x, self.norm2[i])
            gate = h @ self.w1[i].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ self.w3[i].T)) @ self.w2[i].T
        return norm(x, self.last_norm) @ self.out.T


def stored(config: ModelConfig) -> StoredModel:
    """Weights far from their usual scale, where a wrong formula shows."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
        for key, shape in huggingface.shapes_of(config).items()
    }
    return StoredModel(config, torch.float32, lambda key, dtype: weights[key].to(dtype))


def load(model: StoredModel, folder):
    folder.mkdir(exist_ok=True)
    huggingface.write_folder(model, folder)
    return huggingface.load_model(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_computes_the_same_in_the_reference(tied, tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    model, ids = stored(config), [3, 77, 5, 5, 299, 12, 8]
    llama2c.write_file(model, tmp_path / "model.bin")
    theirs = Reference((tmp_path / "model.bin").read_bytes()).logits(ids)
    ours = load(model, tmp_path / "folder")(torch.tensor([ids]))[0].detach()
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_made_by_hand_is_read_as_the_reference_reads_it(tied, tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    header = struct.pack("<7i", 24, 40, 2, 4, 2, 300 if tied else -300, 32)
    draw = np.random.default_rng(1)
    angle = np.arange(32)[:, None] * 10_000.0 ** -(np.arange(0, 6, 2) / 6)
    size = n_parameters(config) - (0 if tied else 300 * 24)
    weights = draw.normal(0, 0.3, size).astype("<f4")
    tables = [np.cos(angle).astype("<f4"), np.sin(angle).astype("<f4")]
    head = b"" if tied else draw.normal(0, 0.3, 300 * 24).astype("<f4").tobytes()
    data = header + weights.tobytes() + b"".join(table.tobytes() for table in tables) + head
    (tmp_path / "model.bin").write_bytes(data)
    model = llama2c.open_file(tmp_path / "model.bin")
    assert model.config == config
    ids = [1, 200, 3, 40, 5, 60]
    ours = load(model, tmp_path / "folder")(torch.tensor([ids]))[0].detach()
    np.testing.assert_allclose(ours.numpy(), Reference(data).logits(ids), atol=2e-4)
    llama2c.write_file(model, tmp_path / "again.bin")
    again = np.frombuffer((tmp_path / "again.bin").read_bytes()[28:], "<f4")
    np.testing.assert_allclose(again, np.frombuffer(data[28:], "<f4"), rtol=0, atol=1e-5)  # tables differ by rounding


# ---- the vocabulary


def reference_encode(data: bytes, n: int, text: str) -> list[int]:
    """llama2.c's tokenizer: a space, then characters or their bytes + 3, then the best pair again and again."""
    vocab, scores, at = [], [], 4
    for _ in range(n):
        score, length = struct.unpack_from("<fi", data, at)
        vocab.append(data[at + 8 : at + 8 + length])
        scores.append(score)
        at += 8 + length
    look = {piece: i for i, piece in reversed(list(enumerate(vocab)))}
    ids = [look[b" "]] if text else []
    for character in text:
        piece = character.encode()
        ids += [look[piece]] if piece in look else [byte + 3 for byte in piece]
    while True:
        best, place = -1e10, None
        for i in range(len(ids) - 1):
            merged = look.get(vocab[ids[i]] + vocab[ids[i + 1]])
            if merged is not None and scores[merged] > best:
                best, place, new = scores[merged], i, merged
        if place is None:
            return ids
        ids[place : place + 2] = [new]


def tokenizer_file() -> tuple[bytes, int]:
    """A vocabulary in which pieces overlap and compete; "中" has a piece, "国" only bytes."""
    learnt = [
        " t",
        "he",
        " the",
        "in",
        "er",
        " a",
        "th",
        "re",
        "  ",
        "    ",
        "ing",
        "中 ",
        " the re",
        "there",
        "aa",
        "aaa",
    ]
    single = sorted(set("abcdefghijklmnopqrstuvwxyz ,.'中é") | set("<>0x"))
    pieces = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)] + [(f"<0x{b:02X}>", 0.0) for b in range(256)]
    pieces += [(piece, -float(i)) for i, piece in enumerate(learnt + single)]
    rows = [struct.pack("<fi", score, len(p.encode())) + p.encode() for p, score in pieces]
    return struct.pack("<i", 9) + b"".join(rows), len(pieces)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama2c") / "tokenizer.bin"
    data, n = tokenizer_file()
    path.write_bytes(data)
    return llama2c.read_tokenizer(path, n), data, n, path


@pytest.mark.parametrize(
    "text",
    ["there in the  re", "", " ", "     a", "中 国 é", "there there, ing", "a\nb\tc", "aaaaaaaa", "<0x41><s>", "a▁a"],
)
def test_text_is_cut_as_llama2c_cuts_it(vocabulary, text):
    tokenizer, data, n, _ = vocabulary
    assert tokenizer.encode(text) == reference_encode(data, n, text)


@given(text=st.text("theringa ,中国é<0x>\n", max_size=40))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_is_cut_as_llama2c_cuts_it(vocabulary, text):
    tokenizer, data, n, _ = vocabulary
    ids = tokenizer.encode(text)
    assert ids == reference_encode(data, n, text) and tokenizer.decode(ids) == text


def test_a_vocabulary_goes_both_ways_and_texts_begin_with_bos(vocabulary, tmp_path):
    tokenizer, data, n, _ = vocabulary
    llama2c.write_tokenizer(tokenizer, tmp_path / "again.bin", n)
    again = (tmp_path / "again.bin").read_bytes()
    assert again[4:] == data[4:]
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.start_id) == (1, 2, 1)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("there in the  re", "中 国 é", "a\nb", "  a"):
        assert theirs(text).input_ids == [1, *loaded.encode(text)]


def test_rows_without_a_piece_are_padded_and_never_used(vocabulary, tmp_path):
    tokenizer, data, n, _ = vocabulary
    llama2c.write_tokenizer(tokenizer, tmp_path / "padded.bin", n + 3)
    padded = (tmp_path / "padded.bin").read_bytes()
    assert padded[4:].startswith(data[4:]) and padded[:4] == struct.pack("<i", len(f"[PAD{n}]"))
    for text in ("there in the  re", f"[PAD{n}] a[PAD{n + 1}]", ""):
        assert reference_encode(padded, n + 3, text) == reference_encode(data, n, text) == tokenizer.encode(text)
    again = llama2c.read_tokenizer(tmp_path / "padded.bin", n + 3)
    assert (again.vocab_size, again.sha256) == (n, tokenizer.sha256)
    for rows in (n + 2, n + 4):
        with pytest.raises(UserError, match="more than the model's" if rows < n + 3 else "damaged at piece"):
            llama2c.read_tokenizer(tmp_path / "padded.bin", rows)


def test_padding_is_not_joined_of_pieces_that_spell_it(tmp_path):
    pieces = [("<unk>", 0.0, "UNKNOWN"), ("<s>", 0.0, "CONTROL"), ("</s>", 0.0, "CONTROL")]
    pieces += [(f"<0x{b:02X}>", 0.0, "BYTE") for b in range(256)]
    pieces += [(p, -1.0 - i, "NORMAL") for i, p in enumerate(["[PAD27", "7]", *"▁[PAD]27", "[P", "AD", "[PAD", "27"])]
    made = from_pieces(pieces, {"bos": 1, "eos": 2}, dummy_prefix=True, source="made")
    llama2c.write_tokenizer(made, tmp_path / "t.bin", 280)
    ids = reference_encode((tmp_path / "t.bin").read_bytes(), 280, "[PAD277]")
    assert ids == made.encode("[PAD277]") and max(ids) < len(pieces)


def test_a_vocabulary_that_llama2c_would_use_wrongly_is_refused(tmp_path):
    pieces = [("<unk>", 0.0, "UNKNOWN"), ("<s>", 0.0, "CONTROL"), ("</s>", 0.0, "CONTROL"), ("<pad>", 0.0, "CONTROL")]
    pieces += [(f"<0x{b:02X}>", 0.0, "BYTE") for b in range(256)] + [("▁", -1.0, "NORMAL")]
    ids = {"bos": 1, "eos": 2}
    for rows, prefix, words in ((pieces, True, "ids 3 to 258"), (pieces[:3] + pieces[4:], False, "a space before")):
        with pytest.raises(UserError, match=words):
            made = from_pieces(rows, ids, dummy_prefix=prefix, source="made")
            llama2c.write_tokenizer(made, tmp_path / "t.bin", len(rows))


# ---- what is refused


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d[:20], "shorter than the header"),
        (lambda d: d[:-4], r"has [\d,]+ bytes, but its header .* asks for"),
        (lambda d: d + b"1234", "asks for"),
        (lambda d: struct.pack("<i", 25) + d[4:], "no llama2.c model"),
        (lambda d: struct.pack("<3i", 24, 40, 2**24) + d[12:], "asks for"),
        (lambda d: struct.pack("<3i", 24, 40, 2**30) + d[12:], "no llama2.c model"),
        (lambda d: struct.pack("<3i", 24, 40, -2) + d[12:], "no llama2.c model"),
        (lambda d: b"24ka" + d[4:], "newer format"),
    ],
)
def test_a_damaged_file_is_refused_unread(damage, words, tmp_path):
    llama2c.write_file(stored(CONFIG), tmp_path / "model.bin")
    (tmp_path / "bad.bin").write_bytes(damage((tmp_path / "model.bin").read_bytes()))
    with pytest.raises(UserError, match=words):
        llama2c.open_file(tmp_path / "bad.bin")


def test_nan_is_named(tmp_path):
    llama2c.write_file(stored(CONFIG), tmp_path / "model.bin")
    data = bytearray((tmp_path / "model.bin").read_bytes())
    data[28:32] = struct.pack("<f", float("nan"))
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"embed_tokens\.weight holds 1 of"):
        load(llama2c.open_file(tmp_path / "model.bin"), tmp_path / "folder")


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d + b"1", lambda d: b"", lambda d: d[:8] + b"\xff" * 90]
)
def test_a_damaged_vocabulary_is_refused(damage, vocabulary, tmp_path):
    _, data, n, _ = vocabulary
    (tmp_path / "bad.bin").write_bytes(damage(data))
    with pytest.raises(UserError, match=r"bad\.bin"):
        llama2c.read_tokenizer(tmp_path / "bad.bin", n)


@pytest.mark.parametrize(
    "change",
    [
        dict(rope_theta=5e5),
        dict(norm_eps=1e-6),
        dict(qk_norm=True),
        dict(qkv_bias=True),
        dict(window=8),
        dict(head_dim=8),
        dict(softcap=30.0),
        dict(positions="learned"),
        dict(rope_scaling=RopeScaling("linear", 2.0, 16)),
    ],
)
def test_what_the_format_cannot_say_is_refused_by_name(change, tmp_path):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(UserError, match=next(iter(change))):
        llama2c.write_file(stored(config), tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())
