"""Merging and pruning vocabularies: what must not change does not, and every id is accounted for."""

import json
import random

import pytest
import transformers
from sentencepiece import sentencepiece_model_pb2 as proto

from minillm.base.errors import UserError
from minillm.tokenizer import edit, measure
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import Kind, train_tokenizer

ENGLISH = ["the cat sat on the mat and the dog sat on the log, in 2024 or 1999; iPhone 15.\nhello hello world"] * 30
CHINESE = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。iPhone 16",
] * 30


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An English vocabulary that puts a space before each text, as Llama's does."""
    made = train_tokenizer(ENGLISH, 400, tmp_path_factory.mktemp("en"))
    model = proto.ModelProto.FromString(made.model.data)
    model.normalizer_spec.add_dummy_prefix = True
    return Tokenizer(model.SerializeToString(), "base")


@pytest.fixture(scope="module")
def chinese(tmp_path_factory):
    return train_tokenizer(CHINESE, 440, tmp_path_factory.mktemp("zh"))


def random_lines(seed: int, letters: str, n: int = 300) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(letters) for _ in range(rng.randint(0, 30))) for _ in range(n)]


def test_merging_keeps_ids_and_changes_no_text_without_new_pieces(base, chinese):
    done = edit.merge(base, chinese)
    new = done.tokenizer
    assert done.id_map == list(range(base.vocab_size)) and len(done.added) > 20
    assert [p.piece for p in new.model.proto.pieces[: base.vocab_size]] == [p.piece for p in base.model.proto.pieces]
    for line in ENGLISH[:1] + random_lines(0, "the cat sodg 0123.,\n😀é"):
        assert new.encode(line) == base.encode(line)
    for line in CHINESE[:2] + random_lines(1, "床前明月光the 12"):
        assert new.decode(new.encode(line)) == base.decode(base.encode(line))
    assert len(new.encode(CHINESE[0])) < len(base.encode(CHINESE[0])) / 3
    assert measure.unreachable(new, done.added) == []
    assert done.already_there + len(done.added) + sum(map(len, done.refused.values())) == chinese.vocab_size


def test_the_common_rule_changes_old_text(base, tmp_path):
    """Numbers learnt as one piece come first everywhere: why the safe rule is the default."""
    numbers = train_tokenizer(["2024 cats 1999 dogs 2024"] * 50, 380, tmp_path, kind=Kind(split_digits=False))
    common, safe = edit.merge(base, numbers, "common"), edit.merge(base, numbers)
    line = "in 2024"
    assert common.tokenizer.encode(line) != base.encode(line) == safe.tokenizer.encode(line)
    assert safe.added == [] and "holds an ASCII character" in safe.refused


def test_a_piece_that_an_older_merge_prevents_is_refused(base):
    """With 光明 in the base, 月光 + 明 can never meet: 月光明 is made of 月 and 光明 unless its union is known."""
    model = proto.ModelProto.FromString(base.model.data)
    lowest = min(p.score for p in model.pieces if p.type == p.NORMAL)
    for i, piece in enumerate(("光明",)):
        model.pieces.add(piece=piece, score=lowest - 1 - i, type=1)
    old = Tokenizer(model.SerializeToString(), "old")
    model = proto.ModelProto.FromString(base.model.data)
    for i, piece in enumerate(("月光", "月光明天")):  # 月光 + 明天 needs 明天, which is nowhere; 光明 comes first
        model.pieces.add(piece=piece, score=lowest - 1 - i, type=1)
    done = edit.merge(old, Tokenizer(model.SerializeToString(), "more"))
    assert done.added == ["月光"]
    assert done.refused["unreachable: an older merge comes before"] == ["月光明天"]


def test_compare_counts_what_changed(base, chinese):
    done = edit.merge(base, chinese)
    counts = measure.compare(base, done.tokenizer, done.added, [ENGLISH[0], CHINESE[0]])
    assert counts["lines"] == 3 and counts["without"] == 2 and counts["changed"] == 0
    assert counts["new_tokens"] < counts["old_tokens"]
    other = measure.compare(base, chinese, done.added, [ENGLISH[0]])
    assert other["changed"] == 2  # it sees a change where there is one


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_pruning_keeps_how_the_texts_are_cut(model_type, tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(300)]
    texts = [
        " ".join(rng.choices(words[:60], k=12)) + "\n" + " ".join(rng.choices(words[60:], k=12)) for _ in range(200)
    ]
    full = train_tokenizer(texts, 500, tmp_path, kind=Kind(model_type))
    keep = [p.piece for p in full.model.proto.pieces if p.type == p.NORMAL][-1:]
    used = [text.split("\n")[0] for text in texts]
    pruned, id_map = edit.prune(full, used, keep)
    assert 300 < pruned.vocab_size < full.vocab_size - 10
    for text in used:
        assert pruned.encode(text) == [id_map[i] for i in full.encode(text)]
    assert pruned.decode(pruned.encode(texts[0] + "月😀")) == texts[0] + "月😀"
    for old, new in enumerate(id_map):
        assert new == -1 or pruned.model.proto.pieces[new].piece == full.model.proto.pieces[old].piece
    assert sorted(i for i in id_map if i >= 0) == list(range(pruned.vocab_size))
    assert (pruned.bos_id, pruned.eos_id) == (id_map[full.bos_id], id_map[full.eos_id])
    assert keep[0] in [p.piece for p in pruned.model.proto.pieces]
    with pytest.raises(UserError, match="--keep 'zzz'"):
        edit.prune(full, used, ["zzz"])


def test_merges_of_a_piece_by_hand():
    scores = {"a": -9, "b": -9, "c": -9, "ab": -1, "bc": -2, "abc": -3, "cab": -4, "cabc": -5}
    assert edit.merges_of("abc", scores) == {"a", "b", "c", "ab", "abc"}
    assert edit.merges_of("cabc", scores) == {"a", "b", "c", "ab", "abc", "cabc"}  # abc before cab


def test_what_is_written(base, chinese, tmp_path):
    done = edit.merge(base, chinese)
    out = tmp_path / "new"
    edit.save(done.tokenizer, out, base, done.id_map)
    again, described = Tokenizer.load(out), json.loads((out / "id_map.json").read_text())
    assert again.sha256 == done.tokenizer.sha256 == described["new_sha256"]
    assert described["new_id_of_old"] == done.id_map and described["old_sha256"] == base.sha256
    assert len((out / "tokenizer.vocab").read_text(encoding="utf-8").splitlines()) == again.vocab_size
    with pytest.raises(UserError, match="is there already"):
        edit.save(done.tokenizer, out)


def test_transformers_cuts_the_merged_vocabulary_alike(base, chinese, tmp_path):
    from transformers import AutoTokenizer

    done = edit.merge(base, chinese)
    edit.save(done.tokenizer, tmp_path / "new", base, done.id_map)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    for line in [*CHINESE[:2], *ENGLISH[0].split("\n"), *random_lines(2, "床前明月光the 12", 50)]:
        assert theirs.encode(line, add_special_tokens=False) == done.tokenizer.encode(line), line


def test_scripts_are_counted(chinese):
    found = measure.scripts(chinese)
    assert found["byte"] == 256 and found["cjk"] > 40 and sum(found.values()) == chinese.vocab_size
    pieces = {"▁le": "latin", "ª": "other", "µm": "other", "ˇ": "other", "ж": "cyrillic", "한": "hangul"}
    pieces |= {"7": "digit", "▁": "space", "。": "sign"}
    assert {piece: measure._script(piece) for piece in pieces} == pieces


def test_only_bpe_can_be_merged(base, tmp_path):
    unigram = train_tokenizer(ENGLISH, 363, tmp_path, kind=Kind("unigram"))
    with pytest.raises(UserError, match="--add: a BPE vocabulary is needed"):
        edit.merge(base, unigram)
    with pytest.raises(UserError, match="--rule odd"):
        edit.merge(base, base, "odd")


def test_a_vocabulary_from_pieces_cuts_as_the_one_they_are_from(base):
    types = {number: name for name, number in proto.ModelProto.SentencePiece.Type.items()}
    pieces = [(p.piece, p.score, types[p.type]) for p in base.model.proto.pieces]
    made = edit.from_pieces(pieces, {"bos": 1, "eos": 2, "pad": 3}, dummy_prefix=True, source="made")
    assert (made.bos_id, made.eos_id, made.pad_id) == (1, 2, 3)
    for line in [*ENGLISH[:1], "明月", "  a  b", *random_lines(5, "the cat,é\n1")]:
        assert made.encode(line) == base.encode(line) and made.decode(made.encode(line)) == line
    for wrong in (pieces + pieces[-1:], [*pieces[:-1], (pieces[300][0], 0.0, "NORMAL")]):
        with pytest.raises(UserError, match="made: "):
            edit.from_pieces(wrong, {"bos": 1, "eos": 2}, dummy_prefix=True, source="made")


def test_bos_before_each_text_and_a_chat_template_are_for_other_programs(base, tmp_path):
    assert base.start_id == base.bos_id
    made = base.with_settings(add_bos=False).with_settings(add_bos=True, chat_template="{{ messages }}")
    made.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.start_id == loaded.bos_id and loaded.chat_template == "{{ messages }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat").input_ids == [1, *base.encode("the cat")] and theirs.chat_template == "{{ messages }}"
