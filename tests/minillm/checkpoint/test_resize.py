"""A model with another vocabulary computes the same where nothing changed."""

import json
import shutil

import pytest
import torch

from minillm import __main__
from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface, resize
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import edit
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer

ENGLISH = ["the cat sat on the mat and the dog sat on the log\nhello hello world"] * 30
CHINESE = ["床前明月光，疑是地上霜。举头望明月，低头思故乡。", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"] * 30


def model_folder(path, tokenizer, tied):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=16, n_layers=2, n_heads=2, ffn_dim=24, max_seq_len=64, tie_embeddings=tied
    )
    model = Transformer(config)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1 + (p.dim() == 1))
    path.mkdir(parents=True)
    huggingface.save_model(model, path)
    tokenizer.save(path)
    return model


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    home = tmp_path_factory.mktemp("vocabularies")
    base, more = train_tokenizer(ENGLISH, 390, home / "en"), train_tokenizer(CHINESE, 440, home / "zh")
    merged = edit.merge(base, more)
    edit.save(merged.tokenizer, home / "merged", base, merged.id_map)
    edit.save(*(lambda made, ids: (made, home / "pruned", base, ids))(*edit.prune(base, ["the cat sat"])))
    return home, base


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("start", "multiple"), [("mean", 1), ("mean", 64), ("mean_all", 64), ("normal", 64)])
def test_logits_over_kept_ids_are_equal_on_text_without_new_pieces(vocabularies, tmp_path, tied, start, multiple):
    home, base = vocabularies
    before = model_folder(tmp_path / "old", base, tied)
    merged = home / "merged"
    resize.resize_folder(
        tmp_path / "old", merged, merged / "id_map.json", tmp_path / "new", start=start, multiple=multiple
    )
    after, new = huggingface.load_model(tmp_path / "new"), Tokenizer.load(tmp_path / "new")
    assert after.config.vocab_size % multiple == 0 and after.config.vocab_size >= new.vocab_size
    ids = torch.tensor([new.encode("the cat and the dog")])
    assert ids[0].tolist() == base.encode("the cat and the dog")
    kept = slice(0, base.vocab_size)
    assert torch.equal(after.embed_tokens.weight[kept], before.embed_tokens.weight)
    assert torch.equal(after.lm_head.weight[kept], before.lm_head.weight)
    # to rounding: some processors sum the product of a head with more rows in another order
    torch.testing.assert_close(after(ids)[..., kept], before(ids), rtol=1e-5, atol=1e-6)
    assert (after.lm_head.weight is after.embed_tokens.weight) == tied
    piece = next(i for i in range(base.vocab_size, new.vocab_size) if len(new.model.proto.pieces[i].piece) > 1)
    parts = base.encode(new.model.proto.pieces[piece].piece)
    for name in ("embed_tokens", "lm_head"):
        table, old = getattr(after, name).weight, getattr(before, name).weight
        expected = old[parts].mean(0) if start == "mean" else old.mean(0)
        torch.testing.assert_close(
            table[piece], expected, atol=1e-6 if start != "normal" else 5 * float(old.std()), rtol=0
        )


def test_a_pruned_models_logits_are_the_old_ones_sliced(vocabularies, tmp_path):
    home, base = vocabularies
    before = model_folder(tmp_path / "old", base, tied=False)
    pruned = home / "pruned"
    resize.resize_folder(tmp_path / "old", pruned, pruned / "id_map.json", tmp_path / "new", start="mean", multiple=1)
    after, new = huggingface.load_model(tmp_path / "new"), Tokenizer.load(tmp_path / "new")
    ids = json.loads((pruned / "id_map.json").read_text())["new_id_of_old"]
    kept = [old for old, new_id in enumerate(ids) if new_id >= 0]
    text = "the cat sat"
    torch.testing.assert_close(
        after(torch.tensor([new.encode(text)])), before(torch.tensor([base.encode(text)]))[..., kept], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("start", resize.STARTS)
def test_where_new_rows_start(start):
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    out = resize.resize_rows(table, [[3], [1, 2], []], 4, start)
    assert torch.equal(out[0], table[3]) and out.shape == (4, 8)
    torch.testing.assert_close(out[3], table.mean(0))
    if start == "mean":
        torch.testing.assert_close(out[1], (table[1] + table[2]) / 2)
    elif start == "mean_all":
        torch.testing.assert_close(out[1], table.mean(0))
    else:
        assert not torch.equal(out[1], out[2]) and (out[1] - table.mean(0)).abs().max() < 5 * table.std()


def test_the_command_and_its_faults(vocabularies, tmp_path, monkeypatch, capsys):
    home, base = vocabularies
    model_folder(tmp_path / "old", base, tied=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")

    def call(**given):
        options = dict(model=tmp_path / "old", tokenizer=home / "merged", id_map=home / "merged" / "id_map.json")
        options |= dict(out=tmp_path / "new") | given
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr("sys.argv", ["minillm", "resize", *arguments])
        return __main__.main()

    for given, said in (
        (dict(tokenizer=home / "zh"), "not the one that .*; `vocab merge` or `prune` with the model as --base makes"),
        (dict(id_map=home / "pruned" / "id_map.json"), "not the one that"),
        (dict(id_map=home / "merged" / "tokenizer.vocab"), "no id map"),
        (dict(id_map=home / "none.json"), "no such file; it is no id map that vocab merge"),
        (dict(model=adapter), "an adapter, and no model; merge it into its base first"),
        (dict(pad_to_multiple=0), "--pad_to_multiple 0"),
    ):
        with pytest.raises(UserError, match=said):
            call(**given)
        assert not (tmp_path / "new").exists()
    assert call(tokenizer=home / "merged" / "tokenizer.model") == 0 and "rows kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already"):
        call()
    beside = [
        "--model",
        tmp_path / "old",
        "--tokenizer",
        home / "merged" / "tokenizer.model",
        "--out",
        tmp_path / "too",
    ]
    monkeypatch.setattr("sys.argv", ["minillm", "resize", *map(str, beside)])
    assert __main__.main() == 0 and (tmp_path / "too" / "model.safetensors").exists()


def test_of_a_run_the_newest_checkpoint_is_taken(vocabularies, tmp_path):
    home, base = vocabularies
    for step, tied in ((2, True), (10, False)):
        model_folder(tmp_path / str(step), base, tied)
        files.write_folder(
            tmp_path / "run" / f"step-{step:08d}",
            lambda folder, whole=tmp_path / str(step): shutil.copytree(whole, folder, dirs_exist_ok=True),
        )
    given = (home / "merged", home / "merged" / "id_map.json")
    resize.resize_folder(tmp_path / "run", *given, tmp_path / "of_run", start="mean", multiple=1)
    resize.resize_folder(tmp_path / "10", *given, tmp_path / "of_step", start="mean", multiple=1)
    name = "model.safetensors"
    assert (tmp_path / "of_run" / name).read_bytes() == (tmp_path / "of_step" / name).read_bytes()


def test_transformers_reads_the_result(vocabularies, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home, base = vocabularies
    model_folder(tmp_path / "old", base, tied=True)
    merged = home / "merged"
    resize.resize_folder(tmp_path / "old", merged, merged / "id_map.json", tmp_path / "new", start="mean", multiple=8)
    ours, theirs = huggingface.load_model(tmp_path / "new"), AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    ids = AutoTokenizer.from_pretrained(tmp_path / "new")("明月 the cat", add_special_tokens=False, return_tensors="pt")
    assert ids["input_ids"][0].tolist() == Tokenizer.load(tmp_path / "new").encode("明月 the cat")
    torch.testing.assert_close(theirs(ids["input_ids"]).logits, ours(ids["input_ids"]), atol=1e-5, rtol=0)
