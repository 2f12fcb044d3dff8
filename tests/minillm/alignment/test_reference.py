from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minillm.alignment.log_probs import answer_log_probs
from minillm.alignment.reference import Reference, make_reference
from minillm.base.errors import UserError
from minillm.checkpoint.huggingface import save_model
from minillm.distributed.ranks import Ranks
from minillm.training.starting_model import Start
from minillm.tuning import folders
from minillm.tuning.adapter import active_adapter, attach, merge, switched_off
from minillm.tuning.options import TuningConfig
from tests.minillm.alignment.test_log_probs import SHAPE, make_batch, make_model

ALONE = Ranks(0, 1, torch.device("cpu"))
UNDIVIDED = dict(shard="1", tensor_parallel=1, context_parallel=1)


def disturb(model) -> None:
    """Train a little: change all trained parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)


TUNES = {
    "lora": TuningConfig("lora"),
    "dora": TuningConfig("dora"),
    "ia3": TuningConfig("ia3"),
    "adapter": TuningConfig("adapter"),
    "prefix": TuningConfig("prefix", n_virtual=3),
    "ptuning": TuningConfig("ptuning", n_virtual=3),
    "lora and the embedding in full": TuningConfig("lora", modules_to_save="embed_tokens,lm_head"),
    "freeze": TuningConfig("freeze", train_layers="last:1"),
    "full": None,
}


@pytest.mark.parametrize("tune", TUNES)
def test_the_reference_stays_what_the_run_started_from(tune, tmp_path):
    model, batch = make_model(SHAPE), make_batch()
    before = answer_log_probs(model, batch, temperature=0.8)
    folder = tmp_path / "base"
    folder.mkdir()
    save_model(model, folder)
    options = TUNES[tune]
    if options is not None:
        adapter = attach(model, options, seed=1, keep_base=False)
        adapter.base_folder, adapter.base_sha256 = folder, folders.base_sha256(folder)
    training_config = SimpleNamespace(
        init_from=str(folder), tune="full" if options is None else options.tune, **UNDIVIDED
    )
    reference = make_reference(training_config, Start(folder, model.config, None), model, ALONE)
    shares_weights = tune not in ("full", "freeze", "lora and the embedding in full")
    assert (reference.frozen is None) == shares_weights

    disturb(model)
    after = answer_log_probs(model, batch, temperature=0.8)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(reference.log_probs(batch, 0.8), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer_log_probs(model, batch, temperature=0.8), after, rtol=0, atol=0)


def test_an_adapter_over_another_base_is_refused(tmp_path):
    model = make_model(SHAPE)
    folder = tmp_path / "base"
    folder.mkdir()
    save_model(model, folder)
    adapter = attach(model, TuningConfig("lora"), keep_base=False)
    adapter.base_folder, adapter.base_sha256 = tmp_path / "other", "0" * 64
    training_config = SimpleNamespace(init_from=str(folder), tune="lora")
    with pytest.raises(UserError, match="is not the base of the adapter"):
        make_reference(training_config, Start(folder, model.config, None), model, ALONE)


def test_a_reference_that_is_gone_is_asked_for(tmp_path):
    training_config = SimpleNamespace(init_from=str(tmp_path / "gone"), tune="full")
    with pytest.raises(UserError, match="is gone, and it is the reference"):
        make_reference(training_config, Start(tmp_path, SHAPE, None), make_model(SHAPE), ALONE)


def test_a_model_without_an_adapter_is_no_reference_of_itself():
    with pytest.raises(ValueError, match="base of an adapter"):
        Reference(make_model(SHAPE))


def test_a_merged_adapter_is_merged_again_after_it_was_off():
    model, batch = make_model(SHAPE), make_batch()
    before = answer_log_probs(model, batch)
    attach(model, TuningConfig("lora"), seed=1)
    disturb(model)
    merge(model)
    merged = answer_log_probs(model, batch)
    with switched_off(model):
        assert active_adapter(model) is None
        torch.testing.assert_close(answer_log_probs(model, batch), before, rtol=0, atol=0)
    assert active_adapter(model).merged
    torch.testing.assert_close(answer_log_probs(model, batch), merged, rtol=0, atol=0)
    assert np.isfinite(merged.numpy()).all()
