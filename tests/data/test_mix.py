"""Shares of sources against numbers worked out by hand, and the string that training takes."""

import re

import numpy as np
import pytest

from data import mix
from minillm.base.errors import UserError
from minillm.datasets.token_bins import TokenBins, parse_mixture
from minillm.datasets.windows import TokenWindows, slots_of
from tests import launch

SIZES = np.array([100, 30, 10, 2, 0.3])


@pytest.mark.parametrize(
    "alpha, shares",
    [
        (1.0, [0.703, 0.211, 0.070, 0.014, 0.002]),
        (0.5, [0.485, 0.266, 0.153, 0.069, 0.027]),
        (0.3, [0.373, 0.260, 0.187, 0.115, 0.065]),
        (0.0, [0.2] * 5),
    ],
)
def test_temperature(alpha, shares):
    np.testing.assert_allclose(mix.by_temperature(SIZES, alpha), shares, atol=6e-4)


def test_unimax_is_alike_up_to_the_cap():
    shares = mix.unimax(SIZES, 50, 4)
    np.testing.assert_allclose(shares, [0.272, 0.272, 0.272, 0.160, 0.024], atol=6e-4)
    np.testing.assert_allclose(shares * 50 / SIZES, [0.14, 0.45, 1.36, 4, 4], atol=6e-3)
    np.testing.assert_allclose(mix.unimax(SIZES[::-1], 50, 4), shares[::-1])
    with pytest.raises(UserError, match=r"read 4 times are only 569\.2"):
        mix.unimax(SIZES, 600, 4)


def test_unimax_in_whole_slots_reads_none_more_often():
    """A share of half a slot is not rounded up to one, which would be twice as often."""
    rng = np.random.default_rng(0)
    for number in range(60):
        sizes = 10 ** rng.uniform(5, 9, int(rng.integers(2, 8)))
        n_tokens = 4 * sizes.sum() * rng.uniform(0.1, 0.8)
        if number == 0:
            sizes, n_tokens = np.array([1e6, 9e8, 9e8]), 2e9
        shares, most = mix.unimax(sizes, n_tokens, 4), 4 * sizes / n_tokens
        slots = mix.slots_up_to(shares, most)
        assert (slots / slots.sum() <= most * (1 + 1e-9)).all(), sizes
        read = np.diff(slots_of((slots / slots.sum()).tolist()))
        assert np.array_equal(read * slots.sum(), slots * read.sum())  # training makes the same shares of it
        assert (slots / slots.sum() >= 0.4 * shares).all()


def test_what_repeating_is_worth():
    assert mix.worth(0.5) == 0.5 and mix.worth(1) == 1
    assert mix.worth(4) == pytest.approx(3.73, abs=0.01)  # of 4 passes nearly 4
    assert mix.worth(1000) == pytest.approx(16.39)  # never more than 1 + R*


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    here = tmp_path_factory.mktemp("sources")
    return [str(launch.write_corpus(here / name)) for name in ("a", "b")]


def printed(folders, capsys, monkeypatch, *options: str) -> str:
    monkeypatch.setattr("sys.argv", ["mix.py", "--data", ",".join(folders), *options])
    mix.main()
    return capsys.readouterr().out


def test_the_printed_string_is_what_training_takes(folders, capsys, monkeypatch):
    text = printed([f"{folders[0]}:999", f"{folders[1]}:1"], capsys, monkeypatch, "--tokens", "1e6")
    mixture = parse_mixture(re.search(r"^--data (\S+)$", text, re.MULTILINE)[1])
    assert mixture[1][1] == pytest.approx(1 / 1000, rel=0.05)
    windows = TokenWindows([(TokenBins(path, "train"), share) for path, share in mixture], 16, seed=0)
    sources, _ = windows.locate(np.arange(3 * 8192))
    assert (sources == 1).mean() == 8 / 8192 == mixture[1][1]
    n_tokens = TokenBins(folders[0], "train").n_tokens
    assert f"{1e6 * mixture[0][1] / n_tokens:6.2f}" in text and "repeated more than 4 times" in text


def test_printed_weights_give_the_shares_that_were_printed():
    """Rounded to slots, the smallest share may ask for another block, in which the others are rounded again."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 5):
        for _ in range(200):
            shares = rng.dirichlet(np.full(n, 0.3)) + 1e-4
            slots = mix.whole_slots(shares / shares.sum())
            read = np.diff(slots_of((slots / slots.sum()).tolist()))
            assert np.array_equal(read * slots.sum(), slots * read.sum())


def test_bad_options(folders, capsys, monkeypatch, tmp_path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "raw.bin")
    with pytest.raises(UserError, match=r"--data \S+raw\.bin: a file; give folders of token bins"):
        printed([*folders, str(tmp_path / "raw.bin")], capsys, monkeypatch)
    for options, message in (
        (("--alpha", "0.5", "--max_epochs", "4"), "give one"),
        (("--max_epochs", "4"), "give --tokens"),
    ):
        with pytest.raises(UserError, match=message):
            printed(folders, capsys, monkeypatch, *options)
    with pytest.raises(UserError, match="has weights already"):
        printed([f"{folders[0]}:3", folders[1]], capsys, monkeypatch, "--alpha", "1")
