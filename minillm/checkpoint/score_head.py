"""Reward and value models on disk: transformers' …ForSequenceClassification with one label, a score.

Beside the weights of the layers such a folder holds `score.weight` (1, C) and no head of a language model; transformers
reads the score of a text at its last token that is not `pad_token_id`.
"""

from pathlib import Path

from minillm.base.errors import UserError

LANGUAGE_MODEL, SEQUENCE_CLASSIFIER = "ForCausalLM", "ForSequenceClassification"


def classifier_name(architecture: str) -> str:
    """LlamaForCausalLM → LlamaForSequenceClassification."""
    return architecture.replace(LANGUAGE_MODEL, SEQUENCE_CLASSIFIER)


def is_classifier(written: dict) -> bool:
    """Whether a config.json is that of a model with a score head. Raises `UserError` if it has more than one score."""
    named = written.get("architectures") or ()
    if not any(name.endswith(SEQUENCE_CLASSIFIER) for name in named):
        return False
    labels = written.get("id2label") or {}
    n_labels = len(labels) or written.get("num_labels") or 2  # transformers' own default
    if n_labels != 1:
        raise UserError(f"{named[0]} with {n_labels} labels: a reward model has one score, so one label")
    return True


def with_one_label(written: dict) -> dict:
    """A language model's config.json made that of the same model with a score head.

    A pad token that also ends texts is left out: transformers would take the end of a text for padding and read the
    score one token too early. Without one it refuses batches.
    """
    ends = written.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    labelled = written | {
        "architectures": [classifier_name(name) for name in written["architectures"]],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    if labelled.get("pad_token_id") in ends:
        labelled.pop("pad_token_id", None)
    return labelled


def check_head(has_score_head: bool, wanted: bool | None, folder: str | Path, written: dict) -> None:
    """Raise `UserError` for a reward model where a language model is wanted, and the reverse; None: either will do."""
    name = ", ".join(written.get("architectures") or ()) or written.get("model_type")
    if has_score_head and wanted is False:
        raise UserError(
            f"{folder}: is a reward model ({name}), which gives a score and no text; give the language model, such as "
            "the one that it was trained from"
        )
    if wanted and not has_score_head:
        raise UserError(
            f"{folder}: is a language model ({name}) and no reward model (…{SEQUENCE_CLASSIFIER}); train one from it "
            f"by train_reward.py"
        )
