"""Where a score is read, whatever the padding; reward models from folders, and what is none."""

import pytest
import torch

from minillm.alignment.reward_model import is_reward_model, last_scores, load_reward_model, score_scale, text_lengths
from minillm.alignment.value import share_equal_weights
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.datasets.batch import Batch
from minillm.tokenizer.train import train_tokenizer
from minillm.tuning import folders, peft_format
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig
from tests.minillm.model_options import build


def rows(texts: list[list[int]], n_prompt: int, pad: int) -> Batch:
    """Texts as right-padded rows, their tokens after the prompt learned."""
    width = max(map(len, texts)) + 2
    tokens = torch.full((len(texts), width), pad)
    mask = torch.zeros(len(texts), width - 1, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
        mask[row, n_prompt - 1 : len(text) - 1] = True
    x = tokens[:, :-1].clone()
    for row, text in enumerate(texts):
        x[row, len(text) - 1] = pad  # the last token is a target, and no input
    return Batch(x, tokens[:, 1:], mask)


TEXTS = [[1, 7, 8, 9, 10, 2], [1, 7, 8, 11, 2], [1, 7, 8, 12, 13, 14, 15, 2]]


@pytest.mark.parametrize("pad", [3, 2], ids=["pad", "pad is eos"])
def test_a_score_is_read_at_the_last_token_by_length(pad):
    model = build(score_head=True)
    batch = rows(TEXTS, 3, pad)
    lengths = text_lengths(batch)
    assert lengths.tolist() == [6, 5, 8]
    alone = torch.stack([model(torch.tensor([text]))[0, -1] for text in TEXTS])
    torch.testing.assert_close(last_scores(model, batch, lengths), alone, atol=1e-5, rtol=0)


def test_an_answer_that_was_cut_is_read_at_its_last_token():
    model = build(score_head=True)
    batch = rows([[1, 7, 8, 9], [1, 7, 8, 9, 2, 2]], 3, 2)  # the first one never ended; its padding is eos
    lengths = text_lengths(batch)
    assert lengths.tolist() == [4, 6]
    alone = model(torch.tensor([[1, 7, 8, 9]]))[0, -1]
    torch.testing.assert_close(last_scores(model, batch, lengths)[0], alone, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    texts = ["the cat sees the dog", "a bird hears the river"], ["one two three four five six seven eight"]
    folder = tmp_path_factory.mktemp("tokenizers")
    return [train_tokenizer(lines * 20, 362, folder / str(number)) for number, lines in enumerate(texts)]


def save(folder, tokenizer, **change):
    folder.mkdir()
    huggingface.save_model(build(vocab_size=400, **change), folder, special_ids=tokenizer.special_ids)
    tokenizer.save(folder)
    return folder


def test_a_reward_model_is_loaded_frozen(tokenizers, tmp_path):
    folder = save(tmp_path / "reward", tokenizers[0], score_head=True)
    model = load_reward_model(folder, tokenizer=tokenizers[0])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert is_reward_model(folder) and score_scale(folder) is None


def test_what_is_no_reward_model_for_these_answers_is_refused(tokenizers, tmp_path):
    language_model = save(tmp_path / "policy", tokenizers[0])
    with pytest.raises(UserError, match=r"policy: is a language model \(LlamaForCausalLM\) and no reward model"):
        load_reward_model(language_model)
    assert not is_reward_model(language_model)
    reward_model = save(tmp_path / "reward", tokenizers[0], score_head=True)
    with pytest.raises(UserError, match="another tokenizer than the model whose answers it is to judge"):
        load_reward_model(reward_model, tokenizer=tokenizers[1])
    with pytest.raises(UserError, match=r"another prompt format .* --template"):
        load_reward_model(reward_model, tokenizer=tokenizers[0], template="simple")
    tokenizers[0].save(reward_model, template="simple")
    load_reward_model(reward_model, tokenizer=tokenizers[0], template="simple")


def test_an_adapter_that_is_not_merged_shares_its_base_with_a_policy(tokenizers, tmp_path):
    base = save(tmp_path / "base", tokenizers[0])
    reward_model = huggingface.load_model(base)
    reward_model.give_score_head(seed=3)
    adapter = attach(reward_model, TuningConfig("lora"))
    adapter.base_folder, adapter.base_sha256 = base, folders.base_sha256(base)
    torch.nn.init.normal_(reward_model.layers[0].mlp.up_proj.lora_B.weight)
    (tmp_path / "adapter").mkdir()
    peft_format.save_adapter(adapter, tmp_path / "adapter")

    policy = huggingface.load_model(base)
    attach(policy, TuningConfig("lora"))
    apart = load_reward_model(tmp_path / "adapter", tokenizer=tokenizers[0], merged=False)
    n_bytes = sum(p.nbytes for p in huggingface.load_model(base).parameters())
    head = 0 if policy.config.tie_embeddings else policy.lm_head.weight.nbytes
    assert share_equal_weights(apart, policy) == n_bytes - head
    merged = load_reward_model(tmp_path / "adapter", tokenizer=tokenizers[0])
    tokens = torch.tensor(TEXTS[2])[None]
    torch.testing.assert_close(apart(tokens), merged(tokens), atol=1e-5, rtol=1e-5)
