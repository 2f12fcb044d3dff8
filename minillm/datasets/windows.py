"""Windows of token bins as shifted X/Y pairs, in an order that is a pure function of the seed.

A data position is a number: position p always means the same window, whatever the number of ranks and
however often the run was stopped, because the order is computed (a keyed permutation), not stored.
"""

import math
from typing import NamedTuple

import numpy as np

from minillm.base.errors import UserError
from minillm.datasets.batch import Batch, documents_in, shifted
from minillm.datasets.best_fit import PackedDocuments
from minillm.datasets.token_bins import TokenBins

MIXTURE_SLOTS = 256  # each block of this many windows has a mixture's exact shares, unless one of them is smaller
MOST_SLOTS = 1 << 20
SLOTS_OF_SMALLEST = 8  # at least, where blocks are larger


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A permutation of range(n), keyed by any integer, evaluated only where asked.

    A four-round Feistel network over the smallest even number of bits that holds n; values outside
    the range go through it again until they are inside ("cycle walking", Black & Rogaway 2002).

    index: int array of values in [0, n); returns int64 of the same shape.
    """
    # A number is two halves of equal bits, (left, right). A round gives (right, left ^ f(right)), which can be undone
    # whatever f is; so four rounds, each with a key of its own, permute all numbers of so many bits.
    half_bits = max(1, math.ceil((n - 1).bit_length() / 2))
    half_mask = np.uint64((1 << half_bits) - 1)
    round_keys = np.random.SeedSequence(key % (1 << 128)).generate_state(4, np.uint64)
    numbers = np.array(index, dtype=np.uint64)
    outside = np.ones(numbers.shape, dtype=bool)  # not yet in [0, n)
    while outside.any():
        left = numbers[outside] >> np.uint64(half_bits)
        right = numbers[outside] & half_mask
        for round_key in round_keys:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)  # an odd factor spreads every bit upwards
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed >> np.uint64(32)) & half_mask
            left, right = right, left ^ mixed
        numbers[outside] = (left << np.uint64(half_bits)) | right
        outside = numbers >= np.uint64(n)
    return numbers.astype(np.int64)


class TokenWindows:
    """The pretraining set: windows of seq_len + 1 tokens, overlapping by one, so that every token is a target once,
    except bos, which is always given (see `is_target`).

    (The last window of a stream is moved back to end with it, so a few targets there occur twice per epoch.)
    """

    def __init__(
        self,
        mixture: list[tuple[TokenBins, float]],
        seq_len: int,
        *,
        seed: int,
        documents: bool = False,
        best_fit: bool = False,
        after: "tuple[TokenWindows, int] | None" = None,
    ):
        """mixture: opened bins with shares that sum to one. seq_len: T in tokens. documents: number the
        documents in each batch, so that attention stays inside them. best_fit: instead of windows, rows of whole
        documents, always numbered (see `PackedDocuments`). after: the windows that the run has read before, and the
        first position that it reads of these; a source of both goes on where it was.
        """
        self.sources = [bins for bins, _ in mixture]
        self.shares = [share for _, share in mixture]
        self.streams = [bins.streams() for bins in self.sources]
        self.seq_len = seq_len
        self.seed = seed
        self.documents = documents
        for bins, streams in zip(self.sources, self.streams, strict=True):
            for stream in streams:
                n_tokens = stream.end - stream.begin
                if n_tokens < seq_len + 1:
                    raise UserError(f"{stream.name}: {n_tokens} tokens are fewer than one window of {seq_len} + 1")
            first = after[0].sources[0] if after else self.sources[0]
            if bins.ids() != first.ids():
                raise UserError(
                    f"{bins.path}: prepared with another tokenizer or --wrap than {first.path}; mix like with like"
                )
            if documents and bins.eos_id is None:
                raise UserError(f"{bins.path}: the end-of-document id is unknown, so --document_attention cannot be")
        self.packed = [PackedDocuments(bins, seq_len) for bins in self.sources] if best_fit else []
        # The number of the first window in each stream, for each source, and the number of all: [0, w0, w0 + w1, …].
        self.edges = [np.array([0, packed.n_rows]) for packed in self.packed]
        for streams in self.streams if not best_fit else ():
            n_windows = [math.ceil((stream.end - stream.begin - 1) / seq_len) for stream in streams]
            self.edges.append(np.cumsum([0, *n_windows]))
        self.slots = slots_of(self.shares)

        # what each source's order is keyed by, and how many of its windows were read before
        self.order_keys = list(range(len(mixture)))
        self.turns_done = np.zeros(len(mixture), dtype=np.int64)
        self.first_position = 0
        if after is not None:
            self._go_on(*after)

    def _go_on(self, before: "TokenWindows", first_position: int) -> None:
        """Sets `first_position`, and of each source where it goes on: that of `before` in the same folder, or anew."""
        self.first_position = first_position
        turns = before.turns_before(first_position)
        numbers = {bins.path.resolve(): number for number, bins in enumerate(before.sources)}
        for number, bins in enumerate(self.sources):
            known = numbers.get(bins.path.resolve())
            if known is None:
                self.order_keys[number] = len(before.sources) + number
            else:
                self.order_keys[number] = before.order_keys[known]
                self.turns_done[number] = turns[known]

    def turns_before(self, position: int) -> np.ndarray:
        """How many turns of each source are used up before a position, (n sources,) int64.

        Of a mixture those of each block that was begun: a block shuffles its turns, so those not read are left out.
        """
        if len(self.sources) == 1:
            return np.array([position])
        n_slots = int(self.slots[-1])
        return math.ceil(position / n_slots) * np.diff(self.slots)

    def identity(self) -> tuple[list[dict], list[float]]:
        """What identifies the data: each source's identity, and their shares."""
        return [bins.identity() for bins in self.sources], self.shares

    @property
    def n_windows(self) -> int:
        """Windows in one pass over every source."""
        return int(sum(edges[-1] for edges in self.edges))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, window in that source) of each position: int64 arrays of the same shape, (B,)."""
        sources, turns = self._deal(positions - self.first_position)  # (B,), (B,)
        turns = turns + self.turns_done[sources]
        windows = np.empty_like(positions)
        for source in np.unique(sources):
            of_source = sources == source
            windows[of_source] = self._shuffle(int(source), turns[of_source])
        return sources, windows

    def _deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source each position reads, and its turn: how many positions before it read the same source.

        Of a:3,b:1 each block of 256 positions, shuffled, gives slots 0 … 191 to a and the rest to b. So if position
        256 + 5 has slot 200, it reads b, whose turns 64 … 127 are in this block: turn 64 + 200 − 192.
        """
        if len(self.sources) == 1:
            return np.zeros_like(positions), positions
        n_slots = int(self.slots[-1])  # of a block
        blocks, places = np.divmod(positions, n_slots)
        keys = [_key(self.seed, 1, block) for block in blocks]
        slots = np.array([permute(place, n_slots, key) for place, key in zip(places, keys, strict=True)])
        sources = np.searchsorted(self.slots, slots, side="right") - 1
        return sources, blocks * np.diff(self.slots)[sources] + slots - self.slots[sources]

    def _shuffle(self, source: int, turns: np.ndarray) -> np.ndarray:
        """The window that each turn of a source reads: each epoch permutes the windows differently.

        Of 100 windows, turn 99 reads π₀(99), turn 100 reads π₁(0), turn 203 reads π₂(3).
        """
        n_windows = int(self.edges[source][-1])
        epochs, windows = np.divmod(turns, n_windows)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            key = _key(self.seed, 2, epoch, self.order_keys[source])
            windows[in_epoch] = permute(windows[in_epoch], n_windows, key)
        return windows

    def batch(self, positions: np.ndarray) -> Batch:
        """The windows at these positions, (B,) int64: a pure function of seed and positions."""
        if self.packed:
            return self._packed_batch(np.asarray(positions))
        rows = np.empty((len(positions), self.seq_len + 1), dtype=np.int64)  # (B, T + 1)
        for row, source, window in zip(rows, *self.locate(np.asarray(positions)), strict=True):
            row[:] = self._window(int(source), int(window))
        documents = documents_in(rows[:, :-1], self.sources[0].start_id) if self.documents else None  # (B, T)
        mask = is_target(rows, self.sources[0])  # (B, T)
        return shifted(rows, mask, documents)

    def _packed_batch(self, positions: np.ndarray) -> Batch:
        """The rows of whole documents at these positions, (B,). No target is in another piece than its input."""
        rows = [self.packed[source].row(number) for source, number in zip(*self.locate(positions), strict=True)]
        tokens, pieces, is_room = (np.stack(each) for each in zip(*rows, strict=True))  # (B, T + 1) each
        mask = (pieces[:, 1:] == pieces[:, :-1]) & ~is_room[:, 1:]  # (B, T)
        return shifted(tokens, mask, pieces[:, :-1])

    def _window(self, source: int, window: int) -> np.ndarray:
        """The tokens of one window of a source, (T + 1,)."""
        number = int(np.searchsorted(self.edges[source], window, side="right")) - 1  # of its stream
        stream = self.streams[source][number]
        begin = stream.begin + (window - int(self.edges[source][number])) * self.seq_len
        last_begin = stream.end - (self.seq_len + 1)
        return self.sources[source].read(min(begin, last_begin), self.seq_len + 1)


def slots_of(shares: list[float]) -> np.ndarray:
    """The first slot that each source has of a block, and the number of slots, (n + 1,) int64.

    A block has MIXTURE_SLOTS; where the smallest share comes to less than half of one, or would get none beside the
    others, so many, a power of two, that it has about SLOTS_OF_SMALLEST. Raises UserError for a share that is too small
    for any block.
    """
    sums = np.cumsum([0.0, *shares])
    slots = np.round(sums * MIXTURE_SLOTS).astype(np.int64)
    if min(shares) * MIXTURE_SLOTS >= 0.5 and np.diff(slots).all():
        return slots
    n_slots = 1 << math.ceil(math.log2(SLOTS_OF_SMALLEST / min(shares)))
    if n_slots > MOST_SLOTS:
        raise UserError(
            f"--data: a share of {min(shares):.1g} is below {SLOTS_OF_SMALLEST}/{MOST_SLOTS:,} and would hardly be "
            "drawn; raise its weight"
        )
    return np.round(sums * n_slots).astype(np.int64)


def is_target(rows: np.ndarray, bins: TokenBins) -> np.ndarray | None:
    """Which targets of rows (B, T + 1) are to be predicted: (B, T) bool, False for the bos that documents begin with.

    A bos is always given, so it carries no information. None: documents begin without, and every target counts.
    """
    if bins.start_id == bins.eos_id:
        return None
    return rows[:, 1:] != bins.start_id


class ValidationPart(NamedTuple):
    """A fixed part of the validation split, as whole documents."""

    rows: np.ndarray  # (n, T + 1) int64: windows that overlap by one
    mask: np.ndarray  # (n, T) bool: True on the targets of those documents
    n_documents: int

    def batches(self, rows_per_batch: int, documents: bool, start_id: int | None):
        """Batches of up to so many rows. documents: number the documents, which begin with start_id."""
        for i in range(0, len(self.rows), rows_per_batch):
            rows = self.rows[i : i + rows_per_batch]
            numbers = documents_in(rows[:, :-1], start_id) if documents else None  # (B, T)
            yield shifted(rows, self.mask[i : i + rows_per_batch], numbers)


def validation_part(bins: TokenBins, seq_len: int, max_tokens: int) -> ValidationPart:
    """The first whole documents of up to `max_tokens` targets, over all files, every token a target exactly once.

    An eos is put before the first document, as there is one before every other. Where documents begin with bos, none
    is needed, and bos is no target (`is_target`), so that either way the same documents are taken. If no eos is known,
    or the first document alone is longer, the part is simply the first tokens. Raises `UserError` for a part without a
    target.
    """
    # The first tokens of all files, end to end.
    begins_with_bos = bins.start_id != bins.eos_id
    pieces = []
    room = 2 * max_tokens if begins_with_bos else max_tokens  # a document has an eos too
    for tokens in bins.arrays:
        pieces.append(tokens[:room])
        room -= len(pieces[-1])
    tokens = np.concatenate(pieces).astype(np.int64)
    if begins_with_bos:
        n_targets = np.cumsum(tokens != bins.start_id)
        tokens = tokens[n_targets <= max_tokens]

    # Up to the end of the last whole document, and with what comes before the first.
    n_documents = 0
    if bins.eos_id is not None:
        ends = np.flatnonzero(tokens == bins.eos_id)
        if len(ends):
            tokens = tokens[: ends[-1] + 1]
            n_documents = len(ends)
        if not begins_with_bos:
            tokens = np.concatenate([[bins.eos_id], tokens])
    if len(tokens) < 2:
        needed = "raise --eval_tokens (of eval, --max_tokens)"
        raise UserError(f"{bins.path}: {len(tokens)} token to validate on leaves no target; {needed}")

    # As windows that overlap by one, the last one filled up with zeros that are no targets.
    n_rows = math.ceil((len(tokens) - 1) / seq_len)
    padded = np.zeros(n_rows * seq_len + 1, dtype=np.int64)
    padded[: len(tokens)] = tokens
    rows = np.lib.stride_tricks.sliding_window_view(padded, seq_len + 1)[::seq_len].copy()  # (n_rows, T + 1)
    target_numbers = np.arange(1, n_rows * seq_len + 1).reshape(n_rows, seq_len)  # in `tokens`
    mask = target_numbers < len(tokens)  # (n_rows, T)
    if begins_with_bos:
        mask &= is_target(rows, bins)
    return ValidationPart(rows, mask, n_documents)


def _key(*parts: int) -> int:
    """One integer from a few, each below 2³²."""
    key = 0
    for part in parts:
        key = (key << 32) | (int(part) & 0xFFFFFFFF)
    return key
