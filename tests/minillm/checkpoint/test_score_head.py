"""Reward models' folders against transformers' AutoModelForSequenceClassification, both ways, and what is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minillm.base.errors import UserError
from minillm.checkpoint import gguf, huggingface
from minillm.checkpoint.architectures import from_hf, to_hf
from minillm.checkpoint.huggingface import load_config, load_model, open_folder, save_model
from tests.minillm.model_options import build, tokens_of

PAD = 3
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
CASES = {"Llama": {}, "Qwen2": dict(qkv_bias=True), "Qwen3": dict(qk_norm=True), "Mistral": dict(window=5)}


def rows_of_two_lengths() -> torch.Tensor:
    """Two texts without pad, of 12 and 8 tokens, the second padded on the right: (2, 12)."""
    tokens = tokens_of(2, 12)
    tokens[tokens == PAD] = PAD + 1
    tokens[1, 8:] = PAD
    return tokens


def load_reward_model(folder):
    return load_model(folder, config=load_config(folder, with_score_head=True)).eval()


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_same_scores(name, tmp_path):
    model, tokens = build(score_head=True, **CASES[name]), rows_of_two_lengths()
    save_model(model, tmp_path, special_ids=IDS)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [f"{name}ForSequenceClassification"]
    assert (written["id2label"], written["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info

    # at the last token that is no padding: in a batch, and one by one
    ours = model(tokens)[[0, 1], [11, 7]]  # (2,)
    torch.testing.assert_close(theirs(tokens).logits[:, 0], ours, atol=1e-5, rtol=0)
    for row, length in ((0, 12), (1, 8)):
        single = tokens[row : row + 1, :length]
        torch.testing.assert_close(theirs(single).logits[:, 0], ours[row : row + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_ours_reads_theirs(name, tied, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        num_labels=1,
        pad_token_id=PAD,
    )
    theirs = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = rows_of_two_lengths()
    ours = load_reward_model(tmp_path)(tokens)[[0, 1], [11, 7]]  # (2,)
    torch.testing.assert_close(ours, theirs(tokens).logits[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [dict(positions="learned"), dict(qk_norm=True, qkv_bias=True)])
def test_options_of_our_own_come_back_with_the_head(change, tmp_path):
    model, tokens = build(score_head=True, **change), tokens_of(2, 12)
    save_model(model, tmp_path, special_ids=IDS)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MinillmForSequenceClassification"]
    assert torch.equal(load_reward_model(tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize("eos", [PAD, [2, PAD]])
def test_a_pad_token_that_ends_texts_is_left_out(eos, tmp_path):
    """transformers would read the score before the end of the text; without a pad token it refuses batches."""
    model, tokens = build(score_head=True), rows_of_two_lengths()
    save_model(model, tmp_path, special_ids=IDS | {"eos_token_id": eos})
    assert "pad_token_id" not in json.loads((tmp_path / "config.json").read_text())
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="padding token"):
        theirs(tokens)
    torch.testing.assert_close(theirs(tokens[:1]).logits[:, 0], model(tokens)[:1, -1], atol=1e-5, rtol=0)


def test_a_reward_model_is_no_language_model_and_the_reverse(tmp_path):
    for name, score_head in (("reward", True), ("language", False)):
        (tmp_path / name).mkdir()
        save_model(build(score_head=score_head), tmp_path / name)
    for read in (load_config, load_model, open_folder):
        with pytest.raises(UserError, match=r"reward: is a reward model \(LlamaForSequenceClassification\)"):
            read(tmp_path / "reward")
    with pytest.raises(UserError, match=r"language: is a language model \(LlamaForCausalLM\) and no reward model"):
        load_config(tmp_path / "language", with_score_head=True)
    with pytest.raises(UserError, match=r"language: is a language model"):
        load_model(tmp_path / "language", config=load_config(tmp_path / "reward", with_score_head=True))
    with pytest.raises(UserError, match="reward: is a reward model"):
        load_model(tmp_path / "reward", config=load_config(tmp_path / "language"))
    assert load_config(tmp_path / "reward", with_score_head=None).score_head


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(id2label={"0": "bad", "1": "good"}), "with 2 labels: a reward model has one score"),
        (dict(id2label=None), "with 2 labels"),  # as transformers takes it
        (dict(id2label=None, num_labels=5), "with 5 labels"),
        (dict(id2label=[1]), r"id2label is \[1\]"),
        (dict(architectures="LlamaForSequenceClassification"), "architectures is"),
    ],
)
def test_other_classifiers_are_refused(change, words, tmp_path):
    model = build(score_head=True)
    save_model(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=words):
        load_config(tmp_path, with_score_head=True)


def test_one_label_by_number_is_taken():
    written = to_hf(build(score_head=True).config)
    del written["id2label"]
    assert from_hf(written | {"num_labels": 1}).score_head


def test_a_head_with_a_bias_or_of_a_language_model_is_refused_by_name(tmp_path):
    save_model(build(score_head=True), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights and weights["score.weight"].shape == (1, 32)
    for extra in ("score.bias", "lm_head.weight"):
        save_file(weights | {extra: torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"{extra} is not expected"):
            load_reward_model(tmp_path)


def test_gguf_has_no_place_for_scores(tmp_path):
    weights = huggingface.weights_of(build(score_head=True))
    config = build(score_head=True).config
    stored = huggingface.StoredModel(config, torch.float32, lambda key, dtype: weights[key])
    with pytest.raises(UserError, match=r"no place for a model with score_head True"):
        gguf.write_file(stored, None, tmp_path / "m.gguf", torch.float32)
