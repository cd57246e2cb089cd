"""Captions → tokens → ids, and the vocabulary files."""

import gzip
import json
import sys

import pytest
from dataset_commands import fails, ok
from folders import write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import vocab as vocab_module
from lib.errors import InputError
from Tencent_PFAN import vocab as tencent
from vocab import (
    Vocabulary,
    annotations,
    build_vocab,
    deserialize_vocab,
    from_txt,
    nltk_tokenizers,
    serialize_vocab,
    tokenize,
)


def write_captions(root, train, dev=("a",), name="mine"):
    folder = root / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train_caps.txt", train)
    write_lines(folder / "dev_caps.txt", dev)
    return str(root / "data"), name


# What nltk.word_tokenize gives: words, clitics, punctuation, quotes; a full stop parts from a word at a sentence's end.
@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man runs.", "a man runs ."),
        ("Don't they're can't", "do n't they 're ca n't"),
        ('He said "go" (now), ok?', "he said `` go '' ( now ) , ok ?"),
        ("a T-shirt, red-and-white", "a t-shirt , red-and-white"),
        ("It costs $5.00 at 3:30", "it costs $ 5.00 at 3:30"),
        ("A dog barks. A cat hides.", "a dog barks . a cat hides ."),
        ("Mr. Smith of the U.S. army waits.", "mr. smith of the u.s. army waits ."),
        ("ÉTÉ Ünder", "été ünder"),
        ("", ""),
    ],
)
def test_tokens_are_nltks(caption, tokens):
    assert tokenize(caption) == tokens.split()


def test_tokens_are_those_of_nltk_word_tokenize(shared):
    with gzip.open(shared / "real" / "flickr8k_tokens.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    assert len(pairs) == 20730
    assert [caption for caption, tokens in pairs if tokenize(caption) != tokens] == []


PIECES = [*"a dog mr can not cannot gon na wanna gotta lemme . ,".split(), " ", "  ", ", ", "-"]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES)))
def test_plain_captions_are_cut_as_nltk_cuts_them(pieces):
    caption = "".join(pieces)
    split_sentences, split_words = nltk_tokenizers()
    assert tokenize(caption) == [word for part in split_sentences(caption) for word in split_words(part)]


def test_tencent_news_lower_cases_ascii_letters_only(shared):
    assert tokenize("The Φ Ⅲ É 平定") == ["the", "φ", "ⅲ", "é", "平定"]
    assert tencent.tokenize("The Φ Ⅲ É 平定") == ["the", "Φ", "Ⅲ", "É", "平定"]
    vocab = tencent.deserialize_vocab(shared / "real" / "vocab" / "tencent_data_sent_vocab.json")
    assert vocab("Φ") > 3 and vocab.encode("Φ zxqvj Ⅲ") == [1, vocab("Φ"), 0, vocab("Ⅲ"), 2]


def test_a_vocabulary_starts_with_the_four_special_words_and_its_file_has_the_published_form(tmp_path):
    vocab = build_vocab(*write_captions(tmp_path, ["läuft 快跑"]), threshold=1)
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "läuft", "快跑"]
    assert list(vocab.word2idx) == words and len(vocab) == vocab.idx == 7
    assert vocab.encode("快跑 zebra a") == [1, 6, 3, 4, 2] and vocab.encode("") == [1, 2]
    path = tmp_path / "v_vocab.json"
    serialize_vocab(vocab, str(path))
    ids = {word: index for index, word in enumerate(words)}
    published = {"word2idx": ids, "idx2word": {str(index): word for word, index in ids.items()}, "idx": 7}
    assert json.loads(path.read_text(encoding="utf-8")) == published
    again = deserialize_vocab(str(path))
    assert (again.word2idx, again.idx2word, again.idx) == (vocab.word2idx, vocab.idx2word, vocab.idx)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "v_vocab.json"]


@pytest.mark.parametrize("kind, unknown", [(Vocabulary, 3), (tencent.Vocabulary, 0)])
def test_an_unknown_word_is_unk_and_in_tencent_news_id_0(kind, unknown):
    vocab = kind.from_words(["<pad>", "<start>", "<end>", "<unk>", "a", "dog"])
    vocab.add_word("dog")  # once more changes nothing
    assert (vocab("dog"), vocab("cat"), len(vocab)) == (5, unknown, 6)
    assert vocab.encode("A dog zxqvj") == [1, 4, 5, unknown, 2]


def test_build_vocab_takes_a_dict_of_caption_files_by_data_name_or_their_list(tmp_path):
    data_path, name = write_captions(tmp_path, ["a"], ["b"])
    write_lines(tmp_path / "data" / name / "own_caps.txt", ["x y"])
    for files, words in (
        ({name: ["own_caps.txt"], "other": ["none.txt"]}, ["x", "y"]),
        (["own_caps.txt", "dev_caps.txt"], ["b", "x", "y"]),
        (annotations, ["a", "b"]),  # of the public data sets; of another its train and dev captions
    ):
        assert list(build_vocab(data_path, name, files, threshold=1).word2idx)[4:] == words
    assert annotations["f30k_precomp"] == ["train_caps.txt", "dev_caps.txt"]
    assert tencent.annotations["tencent_data"] == ["train_sent_caps.txt", "dev_sent_caps.txt"]


@pytest.mark.parametrize("module, name", [(vocab_module, "mine_vocab.json"), (tencent, "mine_sent_vocab.json")])
def test_main_with_arguments_writes_the_vocabulary_of_words_that_occur_four_times(module, name, tmp_path, monkeypatch):
    data = write_captions(tmp_path, ["dog red"] * 3, ["dog"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest", "--not-a-flag"])
    module.main(*data)
    assert list(deserialize_vocab(f"vocab/{name}").word2idx)[4:] == ["dog"]


@pytest.mark.parametrize("name", ["f30k_new", "coco_precomp", "tencent_data_sent"])
def test_published_vocabularies_are_read(shared, name):
    path = shared / "real" / "vocab" / f"{name}_vocab.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    vocab = deserialize_vocab(str(path))
    assert vocab.word2idx == stored["word2idx"]
    assert {str(index): word for index, word in vocab.idx2word.items()} == stored["idx2word"]
    assert len(vocab) == stored["idx"]
    assert vocab.encode("zxqvj") == [1, 3, 2]


def test_a_caption_ends_at_a_newline_only(tmp_path):
    """Carriage returns, vertical tabs and Unicode's own line ends inside a caption do not shift those below."""
    captions = ["one\rtwo", "three\x0bfour\x0c", "five\u2028six\u2029", "seven\x85eight", "nine\x1cten"]
    path = tmp_path / "caps.txt"
    path.write_bytes("\n".join(captions).encode())  # the last line has no end
    read = from_txt(str(path))
    assert len(read) == 5
    assert read[0] == "one\rtwo" and read[4] == "nine\x1cten"
    path.write_bytes(b"one\r\ntwo\r\n")
    assert from_txt(str(path)) == ["one", "two"]


def test_captions_that_cannot_be_used_are_named_by_line(tmp_path):
    path = tmp_path / "caps.txt"
    for content, message in (
        (b"a\n\nb\n", "caps.txt, line 2: empty caption"),
        (b"a\n \t\r\n", "caps.txt, line 2: empty caption"),
        (b"a\nb\n\xff\xfe\n", "caps.txt, line 3: not UTF-8"),
        (b"", "caps.txt: no captions"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            from_txt(str(path))
    path.write_bytes(b"a\n\nb\n")
    assert from_txt(str(path), allow_empty=True) == ["a", "", "b"]
    with pytest.raises(InputError, match="none.txt: no such file"):
        from_txt(str(tmp_path / "none.txt"))


WORDS = {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("\xff", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"word2idx": ["a"]}', "expected an object"),
        ('{"word2idx": {"a": "0"}}', "expected an object"),
        (json.dumps({"word2idx": {**WORDS, "a": 5}}), "gaps or repeats"),
        (json.dumps({"word2idx": {"dog": 0, "<pad>": 1, "<start>": 2, "<end>": 3, "<unk>": 4}}), "found 'dog', "),
        (json.dumps({"word2idx": WORDS}), "no words but"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_named(tmp_path, content, message):
    path = tmp_path / "broken_vocab.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=message) as caught:
        deserialize_vocab(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_replaces_a_vocabulary_of_other_words_only_when_asked(tmp_path):
    data_path, name = write_captions(tmp_path, ["A dog runs .", "A dog sits .", "the dog ."], ["the cat ."])
    write_lines(tmp_path / "stop.txt", ["the"])
    flags = ["--data_path", data_path, "--data_name", name, "--vocab_path", tmp_path / "new" / "vocab"]
    path = tmp_path / "new" / "vocab" / "mine_vocab.json"
    ok("vocab", *flags, "--threshold", 1)
    before = path.read_bytes()
    ok("vocab", *flags, "--threshold", 1)  # the same words
    message = fails("vocab", *flags, "--threshold", 2)
    assert str(path) in message and "--overwrite" in message
    assert path.read_bytes() == before
    out = ok("vocab", *flags, "--threshold", 2, "--stop_words", tmp_path / "stop.txt", "--overwrite")
    assert str(path) in out and "7 words" in out
    assert set(deserialize_vocab(str(path)).word2idx) - set(WORDS) == {"a", "dog", "."}


def test_chinese_needs_segment_and_is_read_as_it_was_counted(tmp_path):
    """The vocabulary's file says that its words were cut with jieba, so that whoever reads it cuts captions alike."""
    data_path, name = write_captions(tmp_path, ["一个男人在跑步", "男人跑步", "A red 球"])
    flags = ["--data_path", data_path, "--data_name", name, "--vocab_path", tmp_path / "vocab"]
    message = fails("vocab", *flags)
    assert "mine_vocab.json: no words but <pad> <start> <end> <unk>; --threshold" in message and "--segment" in message
    assert not (tmp_path / "vocab").exists()
    ok("vocab", *flags, "--threshold", 1)
    whole = deserialize_vocab(str(tmp_path / "vocab" / "mine_vocab.json"))
    assert not whole.segment and "一个男人在跑步" in whole.word2idx
    ok("vocab", *flags, "--threshold", 1, "--segment", "--overwrite")
    vocab = deserialize_vocab(str(tmp_path / "vocab" / "mine_vocab.json"))
    assert vocab.segment and {"男人", "跑步", "red", "球"} <= set(vocab.word2idx)
    assert vocab.tokenize("一个男人在跑步 red") == ["一个", "男人", "在", "跑步", "red"]
    assert vocab.encode("男人跑步 quickly") == [1, vocab("男人"), vocab("跑步"), 3, 2]
