import hashlib
import json

import numpy as np
import pytest
import torch

from minillm.base.errors import UserError
from minillm.datasets import token_bins
from minillm.datasets.batch import Batch, documents_in
from minillm.datasets.token_bins import TokenBins, parse_mixture
from minillm.datasets.windows import MIXTURE_SLOTS, TokenWindows, permute, slots_of, validation_part

EOS = 2


def write_bins(folder, files: dict[str, list[np.ndarray]], dtype="uint16", vocab_size=1000, **changes):
    """A prepared folder, written by hand as the format says."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"dtype": dtype, "vocab_size": vocab_size, "eos_id": EOS, "tokenizer_sha256": "x", "files": {}}
    for split, arrays in files.items():
        meta["files"][split] = []
        for i, tokens in enumerate(arrays):
            name = f"{split}-{i:05}.bin"
            np.asarray(tokens).astype("<u2" if dtype == "uint16" else "<u4").tofile(folder / name)
            meta["files"][split].append({"name": name, "tokens": len(tokens), "documents": 1})
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))
    return folder


def windows(folder, seq_len, **options):
    return TokenWindows([(TokenBins(folder, "train"), 1.0)], seq_len, **{"seed": 0, **options})


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 100, 1000, 4097])
@pytest.mark.parametrize("key", [0, 7, 1 << 100])
def test_permutation_is_a_bijection_and_pointwise(n, key):
    whole = permute(np.arange(n), n, key)
    assert sorted(whole) == list(range(n))
    assert [int(permute(np.array([i]), n, key)[0]) for i in range(0, n, 97)] == whole[::97].tolist()


def test_permutation_looks_random():
    """Neighbours land anywhere: mean gap and fixed points as for a random permutation of 10,000 (n/3 and 1)."""
    n = 10_000
    whole = permute(np.arange(n), n, 5)
    assert abs(np.abs(np.diff(whole)).mean() / (n / 3) - 1) < 0.03
    assert (whole == np.arange(n)).sum() < 8
    assert (permute(np.arange(n), n, 6) == whole).sum() < 8


def test_y_is_x_shifted_and_every_token_is_a_target_once(tmp_path):
    tokens = np.arange(3, 3 + 41)  # 40 targets: 5 windows of 8
    data = windows(write_bins(tmp_path / "d", {"train": [tokens]}), 8)
    assert data.n_windows == 5
    batch = data.batch(np.arange(5))
    assert batch.x.dtype == batch.y.dtype == torch.int64 and batch.mask is None and batch.documents is None
    assert torch.equal(batch.y, batch.x + 1)
    assert sorted(batch.y.flatten().tolist()) == list(range(4, 44))


def test_the_tail_of_a_file_is_not_lost(tmp_path):
    files = [np.arange(3, 3 + 12), np.arange(100, 100 + 30)]
    data = windows(write_bins(tmp_path / "d", {"train": files}), 8)
    targets = set(data.batch(np.arange(data.n_windows)).y.flatten().tolist())
    assert targets == set(range(4, 15)) | set(range(101, 130))


def test_windows_run_on_over_the_ends_of_files_since_format_2(tmp_path):
    """Files are cut between documents, so how the texts are shared out to files makes no difference."""
    tokens = np.arange(3, 3 + 50)
    whole = windows(write_bins(tmp_path / "one", {"train": [tokens]}), 8, seed=1)
    for cuts in ([1, 2], [10, 11, 30], [7, 49], list(range(1, 50))):
        folder = write_bins(tmp_path / f"{len(cuts)}{cuts[0]}", {"train": np.split(tokens, cuts)}, format=2)
        pieces = windows(folder, 8, seed=1)
        assert pieces.n_windows == whole.n_windows == 7
        assert torch.equal(pieces.batch(np.arange(14)).x, whole.batch(np.arange(14)).x)
        assert torch.equal(pieces.batch(np.arange(14)).y, whole.batch(np.arange(14)).y)


def test_a_bad_id_of_large_bins_is_named_by_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(token_bins, "SCANNED_TOKENS", 10)
    folder = write_bins(tmp_path / "d", {"train": [np.arange(3, 23), np.array([5, 6, 2000, 7])]}, format=2)
    with pytest.raises(UserError, match=r"train-00001\.bin: token 2 is 2000, but the vocabulary has 1000"):
        windows(folder, 23).batch(np.array([0]))


def test_a_folder_of_a_later_version_is_refused(tmp_path):
    folder = write_bins(tmp_path / "d", {"train": [np.arange(3, 23)]}, format=3)
    with pytest.raises(UserError, match="format 3 is newer than this minillm"):
        TokenBins(folder, "train")


def test_order_is_a_pure_function_of_seed_and_position(tmp_path):
    folder = write_bins(tmp_path / "d", {"train": [np.arange(3, 900)]})
    a, b = windows(folder, 4, seed=3), windows(folder, 4, seed=3)
    whole = a.batch(np.arange(600)).x  # more than two epochs of 224 windows
    assert torch.equal(whole[500:510], b.batch(np.arange(500, 510)).x)
    assert not torch.equal(whole, windows(folder, 4, seed=4).batch(np.arange(600)).x)
    n = a.n_windows
    assert sorted(whole[:n, 0].tolist()) == sorted(whole[n : 2 * n, 0].tolist())
    assert whole[:n].tolist() != whole[n : 2 * n].tolist()  # another order in the second epoch


def test_mixture_holds_its_shares_and_visits_every_window(tmp_path):
    a = write_bins(tmp_path / "a", {"train": [np.arange(3, 3 + 401)]})
    b = write_bins(tmp_path / "b", {"train": [np.arange(500, 500 + 401)]})
    pairs = [(TokenBins(p, "train"), w) for p, w in parse_mixture(f"{a}:3,{b}:1")]
    data = TokenWindows(pairs, 4, seed=1)
    first = data.batch(np.arange(MIXTURE_SLOTS)).x[:, 0]
    assert int((first >= 500).sum()) == MIXTURE_SLOTS // 4
    assert len(set(first[first >= 500].tolist())) == MIXTURE_SLOTS // 4  # none of them twice
    some = data.batch(np.arange(2 * MIXTURE_SLOTS)).x[:, 0]
    assert len(set(some[some >= 500].tolist())) == 100  # two blocks give 128 of b: each of its 100 windows
    assert torch.equal(data.batch(np.array([300, 20])).x, data.batch(np.arange(400)).x[[300, 20]])


@pytest.mark.parametrize("names, border, left_out", [("a", 130, 0), ("ba", 512, 0), ("ba", 300, 212)])
def test_a_source_of_the_decay_too_goes_on_where_it_was(tmp_path, names, border, left_out):
    """No window of `a` comes again before the others have come, but for those left out at the end of a block."""
    sizes = {"a": 1000, "b": 10, "c": 50}  # windows
    bins = {}
    for name, n_windows in sizes.items():
        tokens = np.arange(8 * n_windows + 1) % 900 + 3
        bins[name] = TokenBins(write_bins(tmp_path / name, {"train": [tokens]}), "train")
    before = TokenWindows([(bins[name], 1 / len(names)) for name in names], 8, seed=3)
    after = TokenWindows([(bins["c"], 0.5), (bins["a"], 0.5)], 8, seed=3, after=(before, border))

    read = {name: [] for name in bins}  # windows of each source in the order of the run
    for mixed, windows_of, positions in ((names, before, (0, border)), ("ca", after, (border, border + 1024))):
        for source, window in zip(*windows_of.locate(np.arange(*positions)), strict=True):
            read[mixed[source]].append(int(window))
    assert len(set(read["a"])) == len(read["a"]) > border // 2 + 500
    assert set(np.bincount(read["c"][:128]).tolist()) == {2, 3}  # two epochs of 50 and a part of one
    n_left_out = before.turns_before(border)[names.index("a")] - len(read["a"]) + 512
    assert 0 <= n_left_out <= left_out

    # a pure function of the position
    whole = after.batch(np.arange(border, border + 20)).x
    assert torch.equal(whole[7:11], after.batch(np.arange(border + 7, border + 11)).x)


def test_data_of_the_decay_has_the_tokenizer_of_the_rest(tmp_path):
    tokens = np.arange(3, 44)
    before = windows(write_bins(tmp_path / "a", {"train": [tokens]}), 8)
    other = TokenBins(write_bins(tmp_path / "b", {"train": [tokens]}, tokenizer_sha256="y"), "train")
    with pytest.raises(UserError, match="another tokenizer"):
        TokenWindows([(other, 1.0)], 8, seed=0, after=(before, 16))


def test_small_shares_have_larger_blocks():
    assert slots_of([0.75, 0.25]).tolist() == [0, 192, 256]
    assert slots_of([1 - 1 / 400, 1 / 400]).tolist() == [0, 255, 256]  # rounded, as it always was
    slots = slots_of([0.999, 0.001])
    assert slots[-1] == 8192 and np.diff(slots)[1] == 8
    with pytest.raises(UserError, match="raise its weight"):
        slots_of([1 - 1e-6, 1e-6])


def test_a_share_does_not_depend_on_the_order_of_sources():
    """In a block of 256 a share of 0.001 would get a slot, four times its due, wherever the rounded sums fall so."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        shares = rng.dirichlet(np.full(4, 0.4)) + 1e-4
        shares /= shares.sum()
        order = rng.permutation(4)
        for at in (np.arange(4), order):
            slots = np.diff(slots_of(shares[at].tolist()))
            off = np.abs(slots / slots.sum() - shares[at])
            assert (off * slots.sum() <= 1.0 + 1e-9).all() and slots.all()
    for shares in ([0.5995, 0.001, 0.3995], [0.001, 0.5995, 0.3995], [0.50195, 0.0001, 0.49795]):
        slots = np.diff(slots_of(shares))
        smallest = int(np.argmin(shares))
        assert abs(slots[smallest] / slots.sum() / shares[smallest] - 1) < 0.15


@pytest.mark.parametrize("other", [{"vocab_size": 1001}, {"tokenizer_sha256": "y"}, {"eos_id": 3}])
def test_mixture_of_two_tokenizers_is_refused(tmp_path, other):
    a = write_bins(tmp_path / "a", {"train": [np.arange(100)]})
    b = write_bins(tmp_path / "b", {"train": [np.arange(100)]}, **other)
    with pytest.raises(UserError, match=r"b: prepared with another tokenizer or --wrap than .*a; mix"):
        TokenWindows([(TokenBins(a, "train"), 0.5), (TokenBins(b, "train"), 0.5)], 4, seed=0)


@pytest.mark.parametrize("text", ["", "a:0", "a:-1,b:2", ","])
def test_bad_mixtures(text):
    with pytest.raises(UserError, match="--data"):
        parse_mixture(text)


def test_parse_mixture():
    assert [(str(p), w) for p, w in parse_mixture("x/a:3, y:1")] == [("x/a", 0.75), ("y", 0.25)]
    assert [(str(p), w) for p, w in parse_mixture("x")] == [("x", 1.0)]


def test_documents_begin_with_the_eos_before_them(tmp_path):
    x = np.array([[5, 6, EOS, 7, EOS, EOS, 8]])
    assert documents_in(x, EOS).tolist() == [[0, 0, 1, 1, 2, 3, 3]]
    folder = write_bins(tmp_path / "d", {"train": [np.array([5, 6, EOS, 7, 8, EOS, 9, 9, 9])]})
    batch = windows(folder, 8, documents=True).batch(np.array([0]))
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]] and batch.documents.dtype == torch.int32


def test_one_text_a_row():
    x = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    batch = Batch(x, x + 20, mask, torch.tensor([[3, 3, 4, 6], [0, 0, 0, 0]], dtype=torch.int32))
    apart = batch.one_text_a_row()
    assert apart.x.tolist() == [[5, 6, 0, 0], [7, 0, 0, 0], [8, 0, 0, 0], [9, 10, 11, 12]]
    assert torch.equal(apart.y, torch.where(apart.x > 0, apart.x + 20, 0))
    assert apart.mask.int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1]]
    assert apart.documents is None and [t.dtype for t in apart[:3]] == [t.dtype for t in batch[:3]]
    unmasked = Batch(x, x, None, batch.documents).one_text_a_row()  # all of it targets, but not the padding
    assert unmasked.mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    whole = Batch(x, x)  # nothing known of documents: a row is one
    assert whole.one_text_a_row() is whole
    parts = apart.split(3)
    assert [len(part.x) for part in parts] == [3, 1] and parts[1].x.tolist() == [[9, 10, 11, 12]]
    assert parts[0].documents is None and torch.equal(torch.cat([part.mask for part in parts]), apart.mask)


def test_validation_part_is_whole_documents_each_target_once(tmp_path):
    documents = [[10, 11, EOS], [12, EOS], [13, 14, 15, 16, EOS], [17, 18, 19, EOS]]
    folder = write_bins(tmp_path / "d", {"train": [np.arange(100)], "val": [np.concatenate(documents)]})
    part = validation_part(TokenBins(folder, "val"), seq_len=4, max_tokens=12)
    assert part.n_documents == 3  # the fourth would need 14
    targets = part.rows[:, 1:][part.mask]
    assert targets.tolist() == [10, 11, EOS, 12, EOS, 13, 14, 15, 16, EOS]
    assert part.rows[0, 0] == EOS  # the first document too begins after an end
    batches = list(part.batches(2, documents=False, start_id=EOS))
    assert sum(b.n_targets() for b in batches) == 10 and len(batches) == 2


def test_the_validation_part_goes_on_over_the_files_of_a_split(tmp_path):
    documents = [np.array([*range(10, 10 + n), EOS]) for n in (2, 1, 4, 3, 2)]
    one = write_bins(tmp_path / "one", {"train": [], "val": [np.concatenate(documents)]})
    several = write_bins(tmp_path / "several", {"train": [], "val": [*documents]})
    for n_tokens in (2, 3, 5, 11, 16, 100):
        whole, pieced = (validation_part(TokenBins(folder, "val"), 4, n_tokens) for folder in (one, several))
        assert (whole.rows == pieced.rows).all() and (whole.mask == pieced.mask).all(), n_tokens
        assert whole.n_documents == pieced.n_documents
    assert pieced.n_documents == 5


def test_the_sample_of_a_split_tells_another_content_whatever_the_files(tmp_path):
    """Of 5,000 tokens every fourth counts, over all files as of one; that is what a raw .bin's identity always held."""
    tokens = np.random.default_rng(0).integers(3, 1000, 5000).astype("<u2")
    expected = hashlib.sha256(tokens[::4].tobytes()).hexdigest()
    for cuts in ([], [1], [2, 3, 5], [1000, 2001, 4998]):
        folder = write_bins(tmp_path / f"{cuts}", {"train": np.split(tokens, cuts)})
        assert TokenBins(folder, "train").sample() == expected
    raw = tmp_path / "raw.bin"
    np.append(tokens, np.ones(50, dtype="<u2")).tofile(raw)  # of which the last hundredth is for validation
    assert TokenBins(raw, "train", dtype="uint16", vocab_size=1000).identity()["sha256"] == expected

    # a file whose end never came has its size all the same, and the same meta.json
    torn = np.where(np.arange(5000) < 4990, tokens, 0)
    bins = TokenBins(write_bins(tmp_path / "torn", {"train": [torn]}), "train")
    assert bins.sample() != expected and bins.identity() == TokenBins(tmp_path / "[]", "train").identity()


def test_one_token_of_a_raw_bin_is_too_little_to_validate_on(tmp_path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "x.bin")
    bins = TokenBins(tmp_path / "x.bin", "val", dtype="uint16", vocab_size=1000)
    with pytest.raises(UserError, match=r"x\.bin: 1 token to validate on leaves no target; raise --eval_tokens"):
        validation_part(bins, seq_len=4, max_tokens=1)
    assert validation_part(bins, seq_len=4, max_tokens=2).mask.sum() == 1


BOS = 1
WRAPPED = [[BOS, 10, 11, EOS], [BOS, 12, EOS], [BOS, 13, 14, 15, 16, EOS], [BOS, 17, 18, 19, EOS]]


def test_documents_that_begin_with_bos(tmp_path):
    """X and Y are shifted as ever; bos is a document's first input, and eos belongs to the document it ends."""
    stream = np.concatenate(WRAPPED)
    folder = write_bins(tmp_path / "d", {"train": [stream]}, wrap="bos_eos", bos_id=BOS)
    batch = windows(folder, len(stream) - 1, documents=True).batch(np.array([0]))
    assert batch.x[0].tolist() == stream[:-1].tolist() and batch.y[0].tolist() == stream[1:].tolist()
    assert batch.documents[0].tolist() == [1] * 4 + [2] * 3 + [3] * 6 + [4] * 4
    assert batch.mask[0].tolist() == [token != BOS for token in stream[1:]]  # bos is given, so nothing to predict
    for document, ids in zip(range(1, 5), WRAPPED, strict=True):
        seen = batch.x[0][batch.documents[0] == document].tolist()
        assert seen == ids[: len(seen)]  # begins with its bos, sees nothing of another
    other = write_bins(tmp_path / "e", {"train": [stream]})
    with pytest.raises(UserError, match="another tokenizer or --wrap"):
        TokenWindows([(TokenBins(folder, "train"), 0.5), (TokenBins(other, "train"), 0.5)], 4, seed=0)


def test_validation_of_documents_that_begin_with_bos(tmp_path):
    """The same targets as of documents without: bos is none."""
    folder = write_bins(tmp_path / "d", {"val": [np.concatenate(WRAPPED)], "train": []}, wrap="bos_eos", bos_id=BOS)
    plain = [ids[1:] for ids in WRAPPED]
    without = write_bins(tmp_path / "without", {"val": [np.concatenate(plain)], "train": []})
    for n_tokens in range(3, 16):
        parts = [validation_part(TokenBins(path, "val"), 4, n_tokens) for path in (folder, without)]
        assert len({part.n_documents for part in parts}) == 1, n_tokens
        assert len({tuple(part.rows[:, 1:][part.mask]) for part in parts}) == 1, n_tokens
    part = validation_part(TokenBins(folder, "val"), seq_len=4, max_tokens=12)
    targets = part.rows[:, 1:][part.mask]
    assert part.n_documents == 3 and part.rows[0, 0] == BOS
    assert targets.tolist() == [10, 11, EOS, 12, EOS, 13, 14, 15, 16, EOS]
    assert [b.documents.tolist() for b in part.batches(9, True, BOS)] == [[[1, 1, 1, 1], [1, 1, 1, 2], [0, 0, 0, 0]]]


def test_uint32(tmp_path):
    folder = write_bins(tmp_path / "d", {"train": [np.array([70000, 1, 2, 3, 69999])]}, "uint32", vocab_size=70001)
    assert windows(folder, 4).batch(np.array([0])).x[0, 0] == 70000


@pytest.mark.parametrize("highest", [300, 65_000, 100_277, 151_936])
def test_a_foreign_bin_of_another_dtype_than_said_is_refused(tmp_path, highest):
    ids = np.random.default_rng(0).integers(0, highest, 5000)
    ids.astype("<u4").tofile(tmp_path / "32.bin")
    assert TokenBins(tmp_path / "32.bin", "train", dtype="uint32", vocab_size=highest).n_tokens == 4950
    with pytest.raises(UserError, match=r"32\.bin: looks like uint32: of its uint16 every second is at most [0-3]"):
        TokenBins(tmp_path / "32.bin", "train", dtype="uint16", vocab_size=min(highest, 65_536))
    if highest > 1 << 16:
        with pytest.raises(UserError, match=f"{highest:,} ids do not fit into uint16"):
            TokenBins(tmp_path / "32.bin", "train", dtype="uint16", vocab_size=highest)
        return
    ids.astype("<u2").tofile(tmp_path / "16.bin")
    with pytest.raises(UserError, match="or has another dtype"):
        TokenBins(tmp_path / "16.bin", "train", dtype="uint32", vocab_size=highest)


@pytest.mark.parametrize("kind", ["text", "padded", "few ids", "tiny", "one-token documents", "zeros", "ones first"])
def test_a_foreign_bin_of_uint16_is_read_whatever_is_in_it(tmp_path, kind):
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 50_000, 3000)
    if kind == "padded":
        ids[20:] = 0
        ids[1:20:2] = 0
    elif kind == "few ids":
        ids %= 5
    elif kind == "tiny":
        ids = np.array([500, 0, 600, 1, 700])
    elif kind == "one-token documents":
        ids[1::2] = 2
    elif kind == "zeros":
        ids[:] = 0
    elif kind == "ones first":
        ids[::2] = 1
    ids.astype("<u2").tofile(tmp_path / "16.bin")
    assert TokenBins(tmp_path / "16.bin", "train", dtype="uint16", vocab_size=50_000).arrays[0][0] == ids[0]


def test_a_foreign_bin_is_described_on_the_command_line(tmp_path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "x.bin")
    train = TokenBins(tmp_path / "x.bin", "train", dtype="uint16", vocab_size=1000)
    val = TokenBins(tmp_path / "x.bin", "val", dtype="uint16", vocab_size=1000)
    assert (train.n_tokens, val.n_tokens) == (990, 10) and val.arrays[0][0] == 990
    with pytest.raises(UserError, match="--data_dtype"):
        TokenBins(tmp_path / "x.bin", "train")


def damaged(tmp_path, how):
    folder = write_bins(tmp_path / "d", {"train": [np.arange(3, 103)]})
    file = folder / "train-00000.bin"
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "odd":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-2])
    elif how == "bad id":
        np.where(np.arange(100) == 77, 1000, 5).astype("<u2").tofile(file)
    elif how == "no meta":
        (folder / "meta.json").unlink()
    elif how == "torn meta":
        (folder / "meta.json").write_text('{"dtype": "uint16", "fi')
    elif how == "no split":
        write_bins(folder, {"train": []})
    return folder


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "missing"),
        ("empty", "0 bytes"),
        ("odd", "199 bytes"),
        ("cut", "198 bytes, but meta.json says 100 tokens"),
        ("bad id", "token 77 is 1000"),
        ("no meta", "never finished"),
        ("torn meta", "damaged: not valid JSON"),
        ("no split", "no train split"),
    ],
)
def test_damaged_data_is_refused_when_opened(tmp_path, how, said):
    with pytest.raises(UserError, match=said) as caught:
        TokenBins(damaged(tmp_path, how), "train")
    assert str(tmp_path) in str(caught.value)


def test_fewer_tokens_than_a_window(tmp_path):
    folder = write_bins(tmp_path / "d", {"train": [np.arange(8)]})
    with pytest.raises(UserError, match="8 tokens are fewer than one window of 8"):
        windows(folder, 8)
    assert windows(folder, 7).n_windows == 1


def test_absent_data_names_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"prepare\.py"):
        TokenBins(tmp_path / "nowhere", "train")


def test_a_vocabulary_is_no_data(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match=r"holds a tokenizer and no token bins; .* --input … --tokenizer "):
        TokenBins(tmp_path, "train")


@pytest.mark.parametrize("name", ["mine.txt", "mine.jsonl.gz", "folder"])
def test_text_in_place_of_token_bins_is_sent_to_prepare(tmp_path, name):
    if name == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    else:
        (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=rf"prepare\.py --input .*{name}"):
        TokenBins(tmp_path / name, "train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(dtype="float64"), "dtype is 'float64': choose one of uint16, uint32"),
        (dict(vocab_size=True), "vocab_size is True, not a whole number"),
        (dict(vocab_size=8.0), "vocab_size is 8.0, not a whole number"),
        (dict(files=[]), r"files is \[\], not an object"),
        (dict(files={"train": {}}), r"train is \{\}, not a list of objects"),
        (
            dict(files={"train": [{"name": "../x.bin", "tokens": 1, "documents": 1}]}),
            "not a file of this folder; refused",
        ),
        (dict(files={"train": [{"name": "x.bin", "tokens": -1, "documents": 1}]}), "tokens is -1: must be at least 0"),
        (dict(files={"train": [{"name": "x.bin", "tokens": 1}]}), "documents is missing"),
        (dict(eos_id=10**9), "eos_id is 1000000000: must be 0 to"),
        (dict(format="2"), "format is '2', not a whole number"),
    ],
    ids=range(10),
)
def test_each_value_of_meta_json_is_of_its_kind_and_range(tmp_path, change, words):
    folder = write_bins(tmp_path / "data", {"train": [range(100)]})
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(UserError, match=words):
        TokenBins(folder, "train")
