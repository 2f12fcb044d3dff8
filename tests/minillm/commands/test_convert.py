"""`python -m minillm import` and `export`, as a person types them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import save_file

from minillm import __main__
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.model.config import ModelConfig, RopeScaling
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from minillm.tokenizer.edit import from_pieces
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer

ROOT = Path(__file__).parents[3]
BASE = ModelConfig(vocab_size=400, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=64)
TOKENS = torch.arange(2, 52).view(2, 25) * 7


def command(line: str) -> None:
    __main__.main(line.split())


def make(folder: Path, config: ModelConfig) -> Transformer:
    """A folder of this model, with weights far from their usual scale."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (p.dim() == 1))
    folder.mkdir()
    huggingface.save_model(model, folder, special_ids={"bos_token_id": 1, "eos_token_id": 2})
    return model.eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with tokenizers: ours, and one as Llama's, which puts a space before each text."""
    home = tmp_path_factory.mktemp("port")
    train_tokenizer(["The cat sat on the mat.\n床前明月光，疑是地上霜。"] * 30, 395, home / "ours")
    pieces = [("<unk>", 0.0, "UNKNOWN"), ("<s>", 0.0, "CONTROL"), ("</s>", 0.0, "CONTROL")]
    pieces += [(f"<0x{b:02X}>", 0.0, "BYTE") for b in range(256)]
    pieces += [(p, -float(i), "NORMAL") for i, p in enumerate(["▁t", "he", "▁the", *"▁abcdehst"])]
    pieces += [(chr(0x4E00 + i), -100.0 - i, "NORMAL") for i in range(400 - len(pieces))]  # one for each row
    made = from_pieces(pieces, {"bos": 1, "eos": 2}, dummy_prefix=True, source="made")
    made.with_settings(add_bos=True).save(home / "llama")
    return home


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_through_every_format_and_back_nothing_changes(home, tied, tmp_path, capsys):
    config = dataclasses.replace(BASE, tie_embeddings=tied)
    expected = make(tmp_path / "start", config)(TOKENS)
    tokenizer = Tokenizer.load(home / "llama")
    tokenizer.save(tmp_path / "start")
    command(f"import --model {tmp_path}/start --out {tmp_path}/b")
    command(f"export --model {tmp_path}/b --format gguf --out {tmp_path}/c.gguf")
    assert ", 400 pieces\n" in capsys.readouterr().out
    command(f"export --model {tmp_path}/c.gguf --format hf --out {tmp_path}/d --max_shard_size 30KB")
    command(f"import --model {tmp_path}/d --out {tmp_path}/e")
    for folder in ("b", "d", "e"):
        torch.testing.assert_close(huggingface.load_model(tmp_path / folder)(TOKENS), expected, rtol=0, atol=0)
        again = Tokenizer.load(tmp_path / folder)
        assert again.encode("the bath, 明") == tokenizer.encode("the bath, 明") and again.start_id == 1
        assert huggingface.read_config(tmp_path / folder)["bos_token_id"] == 1
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert theirs("the bath, 明").input_ids == [1, *tokenizer.encode("the bath, 明")]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d", attn_implementation="eager")
    torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_padded_vocabulary_comes_back_as_long_as_it_was(home, tied, tmp_path):
    """Rows up to a multiple of 64, without a piece each."""
    config = dataclasses.replace(BASE, vocab_size=448, tie_embeddings=tied)
    expected = make(tmp_path / "start", config)(TOKENS)
    Tokenizer.load(home / "llama").save(tmp_path / "start")
    folder = "start"
    for name in ("a.gguf", "b.gguf"):
        command(f"export --model {tmp_path}/{folder} --format gguf --out {tmp_path}/{name}")
        folder = f"{name}-back"
        command(f"import --model {tmp_path}/{name} --out {tmp_path}/{folder}")
        model, tokenizer = huggingface.load_model(tmp_path / folder), Tokenizer.load(tmp_path / folder)
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=0)
        assert (model.config.vocab_size, tokenizer.vocab_size) == (448, 400)
        assert model.config.tie_embeddings == tied
        assert tokenizer.sha256 == Tokenizer.load(home / "llama").sha256


SHAPES = {
    "llama": dataclasses.replace(BASE, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 32)),
    "mistral": dataclasses.replace(BASE, window=8, tie_embeddings=False),
    "qwen2": dataclasses.replace(BASE, qkv_bias=True, rope_scaling=RopeScaling("yarn", 4.0, 16)),
    "qwen3": dataclasses.replace(BASE, qk_norm=True, head_dim=16, tie_embeddings=False),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_transformers_loads_what_is_sharded_and_converted(kind, dtype, tmp_path):
    model = make(tmp_path / "start", SHAPES[kind])
    command(f"export --model {tmp_path}/start --format hf --dtype {dtype} --max_shard_size 20KB --out {tmp_path}/out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    n, size = n_parameters(SHAPES[kind]), getattr(torch, dtype).itemsize
    assert index["metadata"] == {"total_parameters": n, "total_size": n * size}
    assert huggingface.open_folder(tmp_path / "out").dtype == getattr(torch, dtype)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert theirs.config.model_type == kind
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = huggingface.load_model(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), rtol=0, atol=1e-4)
    for name, weight in model.state_dict().items():
        rounded = weight.to(getattr(torch, dtype)).float()
        torch.testing.assert_close(ours.state_dict()[name], rounded, rtol=0, atol=0)


def test_it_is_said_whose_tokenizer_was_taken(home, tmp_path, capsys):
    make(tmp_path / "start", BASE)
    command(f"export --model {tmp_path}/start --format gguf --out {tmp_path}/a.gguf")
    assert "no tokenizer (--tokenizer names one to take)" in capsys.readouterr().out
    command(f"export --model {tmp_path}/start --tokenizer {home}/llama --format gguf --out {tmp_path}/b.gguf")
    assert f"400 pieces of {home}/llama" in capsys.readouterr().out


def test_a_tokenizer_that_is_not_read_is_left_out_and_the_weights_come(tmp_path, capsys):
    make(tmp_path / "start", BASE)
    (tmp_path / "start/tokenizer.json").write_text('{"model": {"type": "Picture"}}')
    with pytest.raises(UserError, match=r"of the kind 'Picture' .* can only be pretrained on"):
        Tokenizer.load(tmp_path / "start")
    command(f"import --model {tmp_path}/start --out {tmp_path}/out")
    assert "the tokenizer is left out:" in capsys.readouterr().out
    assert huggingface.load_model(tmp_path / "out").config == BASE


def test_quantised_weights_become_float32(tmp_path):
    """A file that the gguf package wrote with 8-bit weights."""
    model = make(tmp_path / "start", dataclasses.replace(BASE, qkv_bias=True))
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "qwen2")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    with torch.no_grad():
        for key, tensor in huggingface.weights_of(model).items():
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if tensor.dim() == 1 or tensor.shape[-1] % 32:
                writer.add_tensor(name, tensor.numpy())
                continue
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(tensor.numpy(), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))  # the model is rounded alike
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    command(f"import --model {tmp_path}/q.gguf --out {tmp_path}/out")
    again = huggingface.load_model(tmp_path / "out")
    assert again.embed_tokens.weight.dtype == torch.float32
    torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=0, atol=1e-5)


# ---- memory

MEASURE = """
import sys, threading
from pathlib import Path
import torch
from minillm import __main__ as commands
from minillm.checkpoint import huggingface

def megabytes(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field)) / 1024

def peak(function):
    for name in ("small", "other"):
        function(name)  # libraries are loaded at first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = megabytes("VmRSS")
    kept = function("large")
    return megabytes("VmHWM") - before

def convert(source, options, target):
    def go(size):
        commands.main(f"export --model {size}{source} --out {size}{target} {options}".split())
    return go

torch.set_num_threads(1)
print("load", peak(huggingface.load_model))
print("bfloat16", peak(lambda size: huggingface.load_model(size, dtype=torch.bfloat16)))
print("shards", peak(convert("", "--format hf --dtype bfloat16 --max_shard_size 20MB", "-bf16")))
print("gguf", peak(convert("", "--format gguf --dtype float16", ".gguf")))
print("back", peak(convert(".gguf", "--format hf --dtype float32", "-back")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_memory_holds_a_tenth_more_than_the_model_and_a_conversion_never_holds_it(tmp_path):
    large = ModelConfig(vocab_size=4000, dim=512, n_layers=6, n_heads=8, ffn_dim=1408)
    for name, config in (("small", BASE), ("other", BASE), ("large", large)):
        (tmp_path / name).mkdir()
        model = Transformer(config)
        huggingface.save_model(model, tmp_path / name)
    del model
    # what is freed is given back at once, so that one measurement does not live on what another left
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    peaks = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines() if len(line.split()) == 2}
    size = n_parameters(large) * 4 / 2**20
    assert size > 75
    assert 0.9 * size < peaks["load"] <= 1.1 * size, peaks
    assert 0.4 * size < peaks["bfloat16"] <= 0.55 * size, peaks
    assert max(peaks["shards"], peaks["gguf"], peaks["back"]) <= 0.2 * size, peaks


# ---- what is refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import --model {home}/nowhere --out {out}", "nowhere: no such file or folder"),
        ("import --model {home}/start --out {home}/start", "start: is there already"),
        ("import --model {home}/ours --out {out}", "no config.json"),
        ("import --model {home}/pickle.bin --out {out}", "a pickle, which could run code"),
        ("import --model {home}/start/model.safetensors --out {out}", "give the folder that it is in"),
        (
            "import --model {home}/start/config.json --out {out}",
            "config.json: no model in a known format",
        ),
        ("import --model {home}/outside --out {out}", "not a file of this folder; refused"),
        ("import --model {home}/shardless --out {out}", "model-00002-of-00002.safetensors: no such file"),
        ("import --model {home}/cut --out {out}", "truncated or no safetensors file"),
        ("import --model {home}/deep --out {out}", "10,000,000 layers, as config.json says"),
        ("import --model {home}/words --out {out}", "damaged"),
        (
            "import --model {home}/odd --out {out}",
            "odd/tokenizer.model .*cut short|odd/tokenizer.model .*no SentencePiece",
        ),
        (
            "import --model {home}/start --tokenizer {home}/no.model --out {out}",
            "no.model: no such file",
        ),
        ("import --model {home}/nan --out {out}", "model.norm.weight holds 1 of 32 values that are not finite"),
        ("export --model {home}/nan --format gguf --out {out}", "not finite"),
        ("import --model {home}/start --out {out} --max_shard_size lots", "--max_shard_size lots"),
        ("export --model {home}/start --tokenizer {home}/large --format hf --out {out}", "400 rows for a tokenizer of"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(broken, tmp_path, line, words):
    with pytest.raises(UserError, match=words) as caught:
        command(line.format(home=broken, out=tmp_path / "out"))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def broken(home):
    """Folders that are wrong each in one way."""
    make(home / "start", BASE)
    (home / "pickle.bin").write_bytes(b"\x80\x02}q\x00.")
    train_tokenizer(["The cat sat on the mat. 0123456789 and more and longer words again"] * 30, 410, home / "large")
    config = json.loads((home / "start/config.json").read_text())
    data = (home / "start/model.safetensors").read_bytes()
    index = {"weight_map": {"model.norm.weight": "../start/model.safetensors"}}
    two = {
        "weight_map": {key: f"model-0000{1 + ('1' in key)}-of-00002.safetensors" for key in huggingface.shapes_of(BASE)}
    }
    contents = {
        "outside": {"config.json": config, "model.safetensors.index.json": index},
        "shardless": {"config.json": config, "model.safetensors.index.json": two},
        "cut": {"config.json": config, "model.safetensors": data[:-7]},
        "deep": {"config.json": config | {"num_hidden_layers": 10**7}, "model.safetensors": data},
        "words": {"config.json": config | {"hidden_size": "wide"}, "model.safetensors": data},
        "odd": {"config.json": config, "model.safetensors": data, "tokenizer.model": b"damaged"},
        "nan": {"config.json": config},
    }
    for name, files in contents.items():
        (home / name).mkdir()
        for file, content in files.items():
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            (home / name / file).write_bytes(text)
    weights = huggingface.weights_of(huggingface.load_model(home / "start"))
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, home / "nan/model.safetensors")
    return home


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@torch.no_grad()
def test_matrices_go_into_blocks_and_come_back_rounded(home, kind, tmp_path, capsys):
    """Rows of the feed-forward network's last matrix have 48 numbers: no whole blocks of 32."""
    make(tmp_path / "start", BASE)
    Tokenizer.load(home / "llama").save(tmp_path / "start")
    command(f"export --model {tmp_path}/start --format gguf --type {kind} --out {tmp_path}/m.gguf")
    told = capsys.readouterr().out
    assert "2 matrices stay in float16, as model.layers.0.mlp.down_proj.weight" in told
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_q.weight"] == kind.upper()
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_norm.weight"] == "F32"
    assert reader.fields["general.file_type"].contents() == {"q8_0": 7, "q4_0": 2}[kind]

    # what comes back is what transformers reads from the same file
    command(f"import --model {tmp_path}/m.gguf --out {tmp_path}/back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    ours = huggingface.load_model(tmp_path / "back")
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)
    assert Tokenizer.load(tmp_path / "back").encode("the bath") == Tokenizer.load(home / "llama").encode("the bath")


def test_blocks_are_gguf_alone_and_say_how_weights_are_written(tmp_path):
    make(tmp_path / "start", BASE)
    with pytest.raises(UserError, match="--type q8_0: is for --format gguf"):
        command(f"export --model {tmp_path}/start --format hf --type q8_0 --out {tmp_path}/x")
    with pytest.raises(UserError, match="--dtype float32: --type q4_0 says already"):
        command(f"export --model {tmp_path}/start --format gguf --type q4_0 --dtype float32 --out {tmp_path}/x")
