"""Preference files (answers to one prompt, and which is better) become batches for reward models and the DPO family.

Step by step: a row of a file becomes conversations and pairs of them (preference_forms.py); each conversation becomes
token ids, its last answer learned (fitting.py); what cannot be compared is dropped and counted; a batch holds the
answers of some prompts as rows, and the pairs as numbers of rows.

No answer is ever cut: one without its end would teach that answers end there. What does not fit is dropped, and with it
every answer that was compared with it alone.
"""

import hashlib
import json
import math
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.base.errors import UserError
from minillm.datasets.batch import Batch, sent
from minillm.datasets.files.row_files import RowFiles
from minillm.datasets.fitting import encode_messages
from minillm.datasets.instructions import collate
from minillm.datasets.packing import shuffled
from minillm.datasets.preference_forms import Preference, preference

MOST_NOISE = 0.5  # beyond it most labels would be wrong
DROPPED = ("equal answers", "duplicates", "empty answers", "too long", "prompts differ", "equal scores")
NOISE = 0x6E6F697365  # key of the draws of label noise, apart from those of the order


class Answers(NamedTuple):
    """The answers at some data positions, N of them, and P pairs of them.

    batch: one conversation a row, padded on the right, mask True on the last answer's tokens and the piece that ends
    it. chosen, rejected: (P,) int64, rows of the batch. weight: (P,) fp32, 1 / (pairs of the same prompt), so that each
    prompt weighs 1. margin: (P,) fp32, by how much the chosen is better, 0 if not said. label: (N,) bool, whether an
    answer is wanted; None for pairs. number: (N,) int64, of the answer among all of the data, at which precomputed
    values are kept. kinds: P texts, the fault of the rejected ("": not said); with labels N texts.

    Where no sample is left (all positions beyond the end), N is 1: a row of padding, number −1, without a pair.
    """

    batch: Batch
    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    margin: Tensor
    label: Tensor | None
    number: Tensor
    kinds: list[str]

    def to(self, device: torch.device) -> "Answers":
        return Answers(self.batch.to(device), *(sent(tensor, device) for tensor in self[1:-1]), self.kinds)

    def with_places(self) -> "Answers":
        """The answers with the places of their tokens: see `Batch.with_places`."""
        return self._replace(batch=self.batch.with_places())


def unpaired(answers: Answers) -> Answers:
    """Pairs as single answers with a label (KTO): wanted if chosen more often than rejected, unwanted if less often.

    An answer that is both equally often, the middle one of three, is left out. Answers with labels stay as they are.
    """
    if answers.label is not None:
        return answers
    n_answers = len(answers.number)
    balance = torch.zeros(n_answers, dtype=torch.int64, device=answers.number.device)
    balance.index_add_(0, answers.chosen, torch.ones_like(answers.chosen))
    balance.index_add_(0, answers.rejected, -torch.ones_like(answers.rejected))
    kept = balance.ne(0) | answers.number.lt(0)  # a row of padding stays
    kind_of = dict(zip(answers.rejected.tolist(), answers.kinds, strict=True))
    kinds = [kind_of.get(row, "") for row in kept.nonzero().flatten().tolist()]
    none = answers.chosen[:0]
    batch = Batch(*(None if tensor is None else tensor[kept] for tensor in answers.batch))
    label = balance[kept] > 0
    return Answers(batch, none, none, answers.weight[:0], answers.margin[:0], label, answers.number[kept], kinds)


class PreferenceRows:
    """Preference files as batches, epoch after epoch. A sample, which a data position means, is a prompt's answers.

    All is read and tokenized once and kept as ids, 4 bytes a token. The sample at a position is a pure function of
    (seed, position): epoch e = position // rows_per_epoch is shuffled by (seed, e). `kinds`: the kinds of fault there
    are. `fingerprint`: of the files' lines and the noise; `answers_fingerprint`: of the answers' ids, on which
    precomputed values depend.
    """

    def __init__(
        self,
        paths: str | Path | list[str | Path],
        tokenizer,
        seq_len: int,
        *,
        seed: int = 0,
        template: str = "auto",
        label_noise: float = 0.0,
        **reading,
    ):
        """paths: files as `open_rows` reads them. seq_len: the positions of a row. template: as `encode_chat` takes.
        label_noise: with this probability, drawn from the seed and the pair's number, chosen and rejected change places
        (or a label becomes its opposite). reading: on_bad_line and encoding, see `Reading`. Raises UserError.
        """
        if seq_len < 1:
            raise UserError(f"--seq_len {seq_len}: a row needs at least 1 position; raise it")
        if not 0 <= label_noise <= MOST_NOISE:
            raise UserError(f"--label_noise {label_noise}: the share of swapped pairs is from 0 to {MOST_NOISE}")
        tokenizer.encode_chat([{"role": "user", "content": ""}], template=template)  # raises if the template is unknown
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.template = template
        self.label_noise = label_noise
        self.files = RowFiles(paths, **reading)
        self.counts = self.files.counts
        self.first_texts = self.files.first_texts
        self.order: tuple[int, np.ndarray] | None = None  # of the last epoch asked for

        self._scan()
        self._add_noise()
        if not self.rows_per_epoch:
            remedy = "; raise --seq_len" if self.counts["too long"] else ""
            raise UserError(f"{self.files.names}: nothing left to compare ({self.summary()}){remedy}")
        if self.has_labels and self.label.all() == self.label.any():
            only, other = ("wanted", "unwanted") if self.label.all() else ("unwanted", "wanted")
            raise UserError(
                f"{self.files.names}: every answer is {only}; learning from labels needs both kinds, add {other} ones"
            )

    @property
    def n_answers(self) -> int:
        """How many answers the data has: one more than the largest `number`."""
        return len(self.n_prompt)

    @property
    def has_labels(self) -> bool:
        """Whether the answers are single ones with labels, not pairs."""
        return len(self.label) > 0

    @property
    def n_pairs(self) -> int:
        return len(self.better)

    def total_rows(self, epochs: float) -> int:
        """How many samples these epochs have, rounded up: the `end` of a run."""
        return math.ceil(epochs * self.rows_per_epoch)

    def batch(self, positions: np.ndarray, end: int | None = None) -> Answers:
        """The answers at these data positions; one at or beyond `end` has none.

        positions: (B,) int. The rows are as wide as the longest, rounded up to 8.
        """
        samples = [self._sample_at(p) for p in np.asarray(positions).tolist() if end is None or p < end]
        numbers = _ranges(self.first_answer, samples)  # (N,)
        pairs = _ranges(self.first_pair, samples)  # (P,)
        row_of = {number: row for row, number in enumerate(numbers.tolist())}
        pairs_of = np.diff(self.first_pair)[samples]  # (B,)

        def rows_of(answers: np.ndarray) -> Tensor:
            return torch.tensor([row_of[number] for number in answers[pairs].tolist()], dtype=torch.int64)

        of_each = numbers if self.has_labels else pairs  # what `kinds` names: answers, or pairs
        return Answers(
            self._rows(numbers.tolist()),
            rows_of(self.better),
            rows_of(self.worse),
            torch.from_numpy((1 / np.repeat(pairs_of, pairs_of)).astype(np.float32)),
            torch.from_numpy(self.margin[pairs]),
            torch.from_numpy(self.label[numbers] if samples else np.zeros(1, bool)) if self.has_labels else None,
            torch.from_numpy(numbers if samples else np.array([-1])),
            [self.kinds[code] for code in self.kind[of_each].tolist()],
        )

    def longest(self, positions: np.ndarray) -> np.ndarray:
        """Tokens of the longest conversation of the sample at each of these data positions: (B,) int64."""
        lengths = np.diff(self.begin)  # of each answer with its prompt
        samples = [self._sample_at(p) for p in np.asarray(positions).tolist()]
        return np.array([lengths[self.first_answer[s] : self.first_answer[s + 1]].max() for s in samples], np.int64)

    def _rows(self, numbers: list[int]) -> Batch:
        """Answers as rows of a batch; without any, one row of padding."""
        rows = []
        for number in numbers:
            ids = self.ids[self.begin[number] : self.begin[number + 1]]
            learn = np.arange(len(ids)) >= self.n_prompt[number]
            rows.append([(ids, learn)])
        longest = max([1, *(len(ids) - 1 for [(ids, _)] in rows)])
        width = min(self.seq_len, 8 * math.ceil(longest / 8))
        return collate(rows or [[]], width, self.tokenizer.pad_id, documents=False)

    def _sample_at(self, position: int) -> int:
        epoch, row = divmod(position, self.rows_per_epoch)
        if self.order is None or self.order[0] != epoch:
            self.order = epoch, shuffled(self.rows_per_epoch, self.seed, epoch)
        return int(self.order[1][row])

    def summary(self) -> str:
        """One line: rows, samples and pairs kept, what was dropped, contradictions, whether the longer is chosen."""
        counts = self.counts
        kept = f"{self.n_pairs:,} pairs of {self.rows_per_epoch:,} prompts"
        if self.has_labels:
            n_wanted = int(self.label.sum())
            kept = f"{n_wanted:,} wanted and {self.n_answers - n_wanted:,} unwanted answers"
        dropped = [f"{counts[why]:,} dropped ({why})" for why in DROPPED if counts[why]]
        if counts["bad rows"]:
            dropped.append(f"{counts['bad rows']:,} bad rows skipped")
        line = (
            f"{counts['rows']:,} rows: {kept} kept, {', '.join(dropped) or '0 dropped'}, 0 cut; "
            f"{counts['contradictions']:,} contradictions; {len(self.ids):,} tokens"
        )
        if self.n_pairs:
            lengths = np.diff(self.begin) - self.n_prompt  # tokens of each answer
            longer = (lengths[self.better] > lengths[self.worse]).mean()
            as_long = (lengths[self.better] == lengths[self.worse]).mean()
            line += f"; the chosen is longer in {longer:.1%}, as long in {as_long:.1%}"
            if n_margins := int((self.margin > 0).sum()):
                line += f"; {n_margins:,} with a margin"
        if self.label_noise:
            line += f"; {self.n_swapped:,} labels swapped (--label_noise {self.label_noise:g})"
        line += self.files.keys_not_used()
        if self.rows_per_epoch and counts["too long"] > (self.n_pairs or self.n_answers):
            line += "\nmore are too long than are kept: in training, a longer --seq_len keeps more"
        return line

    # ---- The first pass.

    def _scan(self) -> None:
        """Reads every row; sets the arrays below, `kinds`, and the fingerprints."""
        self.seen: set[bytes] = set()  # digests of pairs
        self.families: set[str] = set()  # what the rows say under "family"
        self.kind_codes: dict[str, int] = {}
        self.ids = array("i")  # of all answers, each with its prompt
        self.begin = array("q", [0])  # of each answer in ids, and the end
        self.n_prompt = array("i")  # of each answer: how many of its ids come before it
        self.label = array("b")  # of each answer, if there are labels
        self.first_answer = array("q", [0])  # of each sample, and the end
        self.first_pair = array("q", [0])  # of each sample, and the end
        self.better, self.worse = array("q"), array("q")  # answers of each pair
        self.margin = array("f")  # of each pair
        self.kind = array("i")  # of each pair, or with labels of each answer: its number in `kinds`

        self.files.scan(self._read, "preferences")

        del self.seen
        self.kinds = list(self.kind_codes)
        for name in ("ids", "begin", "n_prompt", "first_answer", "first_pair", "better", "worse", "margin", "kind"):
            setattr(self, name, np.array(getattr(self, name)))
        self.label = np.array(self.label, dtype=bool)
        self.rows_per_epoch = len(self.first_answer) - 1
        noise = f"{self.label_noise} {self.seed}" if self.label_noise else ""
        self.fingerprint = hashlib.sha256(f"{self.files.fingerprint} {noise}".encode()).hexdigest()
        self.answers_fingerprint = hashlib.sha256(self.ids.tobytes() + self.begin.tobytes()).hexdigest()

    def _read(self, row: object, place: tuple) -> None:
        """Keeps what a row says, as far as it can be compared; counts the rest."""
        unused: set[str] = set()
        found = preference(row, unused)
        has_label = found.label is not None
        if len(self.first_answer) > 1 and has_label != bool(self.label):
            raise UserError("some rows are pairs and others single answers with a label; give them in two runs")
        encoded = [encode_messages(talk, self.tokenizer, self.template) for talk in found.talks]

        # nothing is kept before this line, so that a bad row leaves no trace
        if isinstance(row.get("family"), str):
            self.families.add(row["family"])
            unused.discard("family")
        self.files.not_used.update(sorted(unused))
        self.counts["equal scores"] += found.n_ties
        self.counts["turns"] = max(
            self.counts["turns"], *(sum(message["role"] == "user" for message in talk) for talk in found.talks)
        )
        self.files.keep_texts([message["content"] for message in found.talks[0]], place[0])
        self.files.keep_texts([talk[-1]["content"] for talk in found.talks[1:]], place[0])
        pairs = [pair for pair in found.pairs if self._is_kept(found, encoded, *pair[:2])]
        used = sorted({answer for pair in pairs for answer in pair[:2]})
        if has_label and self._is_kept(found, encoded, 0, 0):
            used = [0]
            self.label.append(found.label)
        if used:
            self._keep(found, encoded, used, pairs)

    def _is_kept(self, found: Preference, encoded: list[tuple], better: int, worse: int) -> bool:
        """Whether a pair (or, with better = worse, one answer with a label) can be learned from; counts why not."""
        chosen, rejected = found.talks[better], found.talks[worse]
        answers = [chosen[-1]["content"].strip(), rejected[-1]["content"].strip()]
        prompt = json.dumps(chosen[:-1])
        # one digest for the pair, one for the same pair the other way round
        this, other = (_digest(prompt, *texts) for texts in (answers, answers[::-1]))
        if found.label is not None:
            this, other = (_digest(prompt, answers[0], str(label)) for label in (found.label, not found.label))
        why = None
        if chosen[:-1] != rejected[:-1]:
            why = "prompts differ"
        elif not all(answers):
            why = "empty answers"
        elif better != worse and answers[0] == answers[1]:
            why = "equal answers"
        elif any(len(encoded[answer][0]) > self.seq_len + 1 for answer in (better, worse)):
            why = "too long"
        elif this in self.seen:
            why = "duplicates"
        if why:
            self.counts[why] += 1
            return False
        self.counts["contradictions"] += other in self.seen
        self.seen.add(this)
        return True

    def _keep(self, found: Preference, encoded: list[tuple], used: list[int], pairs: list[tuple]) -> None:
        """Adds a sample: the answers `used`, and the pairs of them."""
        number_of = {}
        for answer in used:
            ids, learn = encoded[answer]
            number_of[answer] = len(self.n_prompt)
            self.ids.extend(ids.tolist())
            self.begin.append(len(self.ids))
            self.n_prompt.append(int(np.argmax(learn)))  # where the answer begins
        for better, worse, margin in pairs:
            self.better.append(number_of[better])
            self.worse.append(number_of[worse])
            self.margin.append(margin)
        code = self.kind_codes.setdefault(found.kind, len(self.kind_codes))
        self.kind.extend([code] * (len(pairs) or 1))
        self.first_answer.append(len(self.n_prompt))
        self.first_pair.append(len(self.better))

    def _add_noise(self) -> None:
        """Swaps the answers of a share of the pairs, or turns labels around, by (seed, number)."""
        n = self.n_answers if self.has_labels else self.n_pairs
        raw = np.random.PCG64([self.seed % (1 << 64), NOISE]).random_raw(n)
        is_swapped = raw / 2.0**64 < self.label_noise
        self.n_swapped = int(is_swapped.sum())
        if self.has_labels:
            self.label ^= is_swapped
        else:
            pairs = np.where(is_swapped, self.worse, self.better), np.where(is_swapped, self.better, self.worse)
            self.better, self.worse = pairs


def _digest(*texts: str) -> bytes:
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()


def _ranges(begins: np.ndarray, samples: list[int]) -> np.ndarray:
    """begins[s], begins[s] + 1, … begins[s + 1] − 1 for each of the samples, one after another, int64."""
    ranges = [np.arange(begins[sample], begins[sample + 1]) for sample in samples]
    return np.concatenate([np.zeros(0, dtype=np.int64), *ranges])
