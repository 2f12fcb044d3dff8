"""A step's loss from log-probabilities, on the two pairs of test_losses.py and on lists of ranked answers."""

import pytest
import torch

from minillm.alignment.preferences.losses import LOSSES
from minillm.alignment.preferences.step import Measured, Objective, Totals, counts, loss_of, shares
from minillm.datasets.batch import Batch
from minillm.datasets.preferences import Answers
from tests.minillm.alignment.preferences.test_losses import (
    POLICY_CHOSEN,
    POLICY_REJECTED,
    REF_CHOSEN,
    REF_REJECTED,
)

NO_Z = torch.zeros(())


def fixture(tokens=(POLICY_CHOSEN[0], POLICY_REJECTED[0], POLICY_CHOSEN[1], POLICY_REJECTED[1])):
    """(answers w1 l1 w2 l2 as rows, their log-probabilities (4, 4))."""
    log_probs = torch.zeros(len(tokens), 4)
    mask = torch.zeros(len(tokens), 4, dtype=torch.bool)
    for row, values in enumerate(tokens):
        log_probs[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = True
    none = torch.zeros(len(tokens), 4, dtype=torch.long)
    pairs = torch.tensor([0, 2]), torch.tensor([1, 3])
    answers = Answers(
        Batch(none, none, mask), *pairs, torch.ones(2), torch.zeros(2), None, torch.arange(len(tokens)), ["", ""]
    )
    return answers, log_probs


def reference_sums() -> torch.Tensor:
    rows = (REF_CHOSEN[0], REF_REJECTED[0], REF_CHOSEN[1], REF_REJECTED[1])
    return torch.tensor([sum(row) for row in rows])


def parts_of(answers: Answers, ref_sums: torch.Tensor, log_probs: torch.Tensor):
    """The two pairs as micro-batches of one pair each."""
    for pair in range(2):
        rows = slice(2 * pair, 2 * pair + 2)
        batch = Batch(*(None if tensor is None else tensor[rows] for tensor in answers.batch))
        one = torch.tensor([0]), torch.tensor([1]), torch.ones(1), torch.zeros(1)
        yield Answers(batch, *one, None, answers.number[rows], [""]), ref_sums[rows], log_probs[rows]


@pytest.mark.parametrize(
    ("name", "sft_weight", "value"),
    [("sigmoid", 0.0, 0.6826768539), ("sigmoid", 1.0, 1.3326768539), ("sft", 1.0, 0.65), ("orpo", 1.0, 0.6990547936)],
)
def test_values_of_a_step_in_one_and_in_two_micro_batches(name, sft_weight, value):
    objective = Objective(LOSSES[name], LOSSES[name].defaults, sft_weight)
    answers, log_probs = fixture()
    ref_sums = reference_sums() if objective.loss.has_reference else torch.zeros(4)
    n_losses, n_chosen_tokens, _ = counts([answers], of_pairs=True)
    assert (n_losses, n_chosen_tokens) == (2, 5)
    totals = Totals(n_losses, n_chosen_tokens)

    leaf = log_probs.clone().requires_grad_()
    whole = loss_of(objective, answers, ref_sums, totals, NO_Z, Measured(objective))(leaf) / n_losses
    assert whole.item() == pytest.approx(value, rel=1e-6)
    whole.backward()

    cut = 0.0
    gradients = []
    measured = Measured(objective)
    for part, refs, values in parts_of(answers, ref_sums, log_probs):
        leaf_of_part = values.clone().requires_grad_()
        loss = loss_of(objective, part, refs, totals, NO_Z, measured)(leaf_of_part) / n_losses
        loss.backward()
        cut += loss.item()
        gradients.append(leaf_of_part.grad)
    assert cut == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(torch.cat(gradients), leaf.grad)

    # both parts of the loss are known, if it has two
    facts = measured.means(lambda *values: list(values))
    if sft_weight:
        assert facts["sft_loss"] == pytest.approx(0.65, rel=1e-6)
        assert facts["preference_loss"] + sft_weight * facts["sft_loss"] == pytest.approx(value, rel=1e-6)
    else:
        assert not {"sft_loss", "preference_loss"} & facts.keys()


def test_parts_of_a_loss_of_single_answers():
    answers, log_probs = fixture()
    labelled = answers._replace(label=torch.tensor([True, False, True, False]))
    objective = Objective(LOSSES["kto"], LOSSES["kto"].defaults, 0.5)
    n_losses, n_chosen_tokens, _ = counts([labelled], of_pairs=False)
    measured = Measured(objective)
    loss = loss_of(objective, labelled, reference_sums(), Totals(n_losses, n_chosen_tokens), NO_Z, measured)
    value = float(loss(log_probs)) / n_losses
    facts = measured.means(lambda *values: list(values))
    assert facts["preference_loss"] + 0.5 * facts["sft_loss"] == pytest.approx(value, rel=1e-6)


def test_what_is_logged():
    answers, log_probs = fixture()
    measured = Measured(Objective(LOSSES["sigmoid"], LOSSES["sigmoid"].defaults, sft_weight=0.0))
    measured.add(answers, log_probs.sum(1), reference_sums(), torch.tensor(1.0))
    facts = measured.means(lambda *values: list(values))
    wanted = {"rewards_chosen": 0.025, "rewards_rejected": 0.0, "margins": 0.025, "accuracy": 0.5}
    wanted |= {"plain_accuracy": 1.0, "logps_chosen": -1.625, "logps_rejected": -3.0}
    wanted |= {"length_chosen": 2.5, "length_rejected": 3.0}
    assert facts == pytest.approx(wanted, abs=1e-6)


def test_ranked_answers_weigh_as_one_prompt():
    answers, _ = fixture()
    # one prompt whose answers 0 > 1 > 2 give three pairs
    ranked = answers._replace(
        chosen=torch.tensor([0, 0, 1]), rejected=torch.tensor([1, 2, 2]), weight=torch.full((3,), 1 / 3)
    )
    share = shares(ranked)
    torch.testing.assert_close(share.chosen, torch.tensor([2 / 3, 1 / 3, 0, 0]))
    torch.testing.assert_close(share.rejected, torch.tensor([0, 1 / 3, 2 / 3, 0]))
    assert counts([ranked], of_pairs=True)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_ranked_pairs_does_not_matter(name):
    if LOSSES[name].of_pairs is None:
        return
    answers, _ = fixture()
    batch = Batch(*(None if tensor is None else tensor.repeat(2, 1)[:5] for tensor in answers.batch))
    # the answers 0 > 1 > 2 to one prompt, 3 > 4 to another
    better, worse = torch.tensor([0, 0, 1, 3]), torch.tensor([1, 2, 2, 4])
    weight = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1])
    log_probs, ref_sums = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) - 2, torch.zeros(5)
    objective = Objective(LOSSES[name], LOSSES[name].defaults, sft_weight=0.0)
    found = []
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        ranked = Answers(
            batch, better[order], worse[order], weight[order], torch.zeros(4), None, torch.arange(5), [""] * 4
        )
        found.append(loss_of(objective, ranked, ref_sums, Totals(2, 1), NO_Z, Measured(objective))(log_probs).item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_padding_counts_as_no_answer():
    answers, _ = fixture()
    labelled = answers._replace(label=torch.tensor([True, False, True, False]), number=torch.tensor([0, 1, 2, -1]))
    share = shares(labelled)
    assert share.chosen.tolist() == [1, 0, 1, 0] and share.rejected.tolist() == [0, 1, 0, 0]
    assert counts([labelled], of_pairs=False)[0] == 3
