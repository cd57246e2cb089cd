"""Caption → tokens → word ids, and the vocabulary files.

python vocab.py --data_path ./data --data_name f30k_precomp    writes ./vocab/f30k_precomp_vocab.json
"""

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

from tqdm import tqdm

from lib.constants import SPECIAL
from lib.errors import InputError, brief, run
from lib.files import make_folder, read_lines, write_lines
from lib.segmentation import segment

SPLITS = ("train", "dev")  # what a vocabulary is built from

# nltk.word_tokenize finds sentence ends with a downloaded model. These abbreviations, which do not end a sentence,
# replace the model: the tokens were the same on 20,730 of 20,730 captions.
ABBREVIATIONS = (
    "mr mrs ms dr st jr sr prof gen col capt lt sgt rev gov sen rep no vs etc inc co corp ltd "
    "e.g i.e u.s u.k d.c a.m p.m"
)


@cache
def nltk_tokenizers() -> tuple[Callable, Callable]:
    """NLTK's functions that split text into sentences and a sentence into words.

    Loaded where a caption needs them: NLTK imports SciPy, which takes a third of a command's start.
    """
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS.split())
    return PunktSentenceTokenizer(parameters).tokenize, NLTKWordTokenizer().tokenize


# Letters, commas, hyphens and one full stop, without the words that NLTK cuts in two: 95 % of the captions of
# Flickr8k, which NLTK takes 400 µs each for.
SIMPLE = re.compile(r"(?!.*\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b)(?:[a-z ]|,(?= )|-(?!-))*\.?")
MOSTLY_UNKNOWN = 0.5  # above this share of unknown words the vocabulary is probably of another data set


def tokenize(caption: str, lower: Callable[[str], str] = str.lower) -> list[str]:
    """Split a caption (str) into a list of str, the tokens of nltk.word_tokenize(lower(caption))."""
    caption = lower(caption)
    if SIMPLE.fullmatch(caption):
        return caption.replace(".", " .").replace(",", " ,").split()
    split_sentences, split_words = nltk_tokenizers()
    return [token for sentence in split_sentences(caption) for token in split_words(sentence)]


class Vocabulary:
    """The words of a data set and their ids; a call with a word returns its id.

    word2idx: str → int. idx2word: int → str. idx: number of words. segment: whether Chinese text is cut into words with
    jieba. path: the file that it was read from.
    """

    # what a variant replaces
    command, suffix = "vocab.py", "_vocab.json"  # what makes a file, and the end of its name, after the data set's
    data_name = "f30k_precomp"  # the command's default
    unknown = "<unk>"  # the word whose id stands for all words outside the vocabulary
    lower = staticmethod(str.lower)

    def __init__(self, segment=False):
        self.word2idx = {}
        self.idx2word = {}
        self.idx = 0
        self.segment, self.path = segment, ""

    @classmethod
    def from_words(cls, words, segment=False):
        """The vocabulary of words (list of str) in the order of their ids."""
        vocab = cls(segment)
        for word in words:
            vocab.add_word(word)
        return vocab

    @classmethod
    def read(cls, opt):
        """The vocabulary that opt's vocab_path and data_name lead to. Raises as deserialize_vocab."""
        path, folder = cls.file(opt.vocab_path, opt.data_name), os.path.join(opt.data_path, opt.data_name)
        if not os.path.exists(path) and not os.path.isdir(folder):
            raise InputError(f"{folder}: no such data set, and no vocabulary {path}; see --data_path and --data_name")
        return deserialize_vocab(path, cls)

    @classmethod
    def file(cls, vocab_path, data_name):
        """Path of a data set's vocabulary file."""
        return os.path.join(vocab_path, os.path.normpath(data_name) + cls.suffix)

    @classmethod
    def caption_files(cls, folder):
        """Names of the caption files in a data set's folder from which its vocabulary is built."""
        return [f"{split}_caps.txt" for split in SPLITS]

    def add_word(self, word):
        if word not in self.word2idx:
            self.word2idx[word] = self.idx
            self.idx2word[self.idx] = word
            self.idx += 1

    def __call__(self, word):
        return self.word2idx.get(word, self.word2idx[self.unknown])

    def __len__(self):
        return len(self.word2idx)

    def tokenize(self, caption):
        """Split a caption (str) into a list of str, as the captions were split that the vocabulary was made from."""
        return tokenize(" ".join(segment(caption)) if self.segment else caption, self.lower)

    def encode(self, caption):
        """Ids (list of int) of `<start>` tokens `<end>` for a caption (str)."""
        return [self(word) for word in ("<start>", *self.tokenize(caption), "<end>")]


def word_list(vocab: Any) -> list[str]:
    """The words of a vocabulary in the order of their ids."""
    return sorted(vocab.word2idx, key=vocab.word2idx.__getitem__)


def checkpoint_vocab(path: str, checkpoint: dict, opt: Any, kind: type[Vocabulary] = Vocabulary) -> Vocabulary:
    """The vocabulary of a checkpoint, which lies at path.

    opt: names the file. kind: the class of the vocabulary. A checkpoint with words needs no file; where there is one,
    it must hold the same words. Raises InputError that names the checkpoint, the file and the first word that differs.
    """
    words, segment = checkpoint.get("words"), checkpoint.get("segment", False)
    file = kind.file(opt.vocab_path, opt.data_name)
    if words is not None and not os.path.exists(file):
        return kind.from_words(words, segment)
    vocab = deserialize_vocab(file, kind)  # not kind.read: the scoring server has no data set
    if words is None:
        return vocab
    for i, (word, found) in enumerate(zip_longest(words, word_list(vocab))):
        if word != found:
            raise InputError(
                f"{path}: made with another vocabulary, of {len(words)} words, than {vocab.path}, one of {len(vocab)}: "
                f"id {i} is {word!r:.40}, found {found!r:.40}"
            )
    if vocab.segment != segment:
        raise InputError(f"{path}: made with{'' if segment else 'out'} --segment, unlike {vocab.path}")
    return vocab


def checkpoint_words(path: str, checkpoint: dict, opt: Any, kind: type[Vocabulary] = Vocabulary) -> list[str]:
    """The words of a checkpoint, which lies at path; an older one's are in the vocabulary of its data set.

    Raises InputError where there is no such file under opt's vocab_path, or none of the right size.
    """
    if checkpoint.get("words") is not None:
        return checkpoint["words"]
    name, n = checkpoint["opt"].data_name, len(checkpoint["model"][1]["embed.weight"])
    vocab = deserialize_vocab(kind.file(opt.vocab_path, name), kind)
    if len(vocab) != n:
        raise InputError(
            f"{path}: holds no words, and --vocab_path {opt.vocab_path} has no vocabulary of {name} with {n} words"
        )
    return word_list(vocab)


def unknown_words_message(path: str, unknown: int, words: int) -> str | None:
    """A sentence where most words of a caption file are not in the vocabulary, else None.

    path: the caption file. unknown, words: how many of how many of its words, or of a sample's.
    """
    if unknown <= MOSTLY_UNKNOWN * words:
        return None
    return (
        f"{path}: {100 * unknown / words:.0f} % of the words are not in the vocabulary, was it made from other "
        "captions? (vocab.py makes one; Chinese that is not cut into words needs --segment)"
    )


def serialize_vocab(vocab: Any, dest: str) -> None:
    """Write a Vocabulary as JSON to the file dest, whole or not at all."""
    stored = {"word2idx": vocab.word2idx, "idx2word": vocab.idx2word, "idx": vocab.idx}
    if vocab.segment:
        stored["segment"] = True
    write_lines(dest, [json.dumps(stored)])


def deserialize_vocab(src: str, kind: type[Vocabulary] = Vocabulary) -> Vocabulary:
    """Read a Vocabulary of a class from a JSON file. Raises InputError for what is not one."""
    try:
        with open(src, encoding="utf-8") as file:
            stored = json.load(file)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{src}: not a vocabulary, expected JSON ({error})") from None
    except FileNotFoundError:
        name, folder = os.path.basename(src).removesuffix(kind.suffix), os.path.dirname(src) or "."
        command = f"python {kind.command} --data_path DATA_PATH --data_name {name} --vocab_path {folder}"
        raise InputError(
            f"{src}: no such vocabulary; name its folder with --vocab_path, or make it with: {command}"
        ) from None
    words = stored.get("word2idx") if isinstance(stored, dict) else None
    if not isinstance(words, dict) or not all(type(index) is int for index in words.values()):
        raise InputError(f"{src}: not a vocabulary, expected an object with word2idx (word → id), idx2word and idx")
    ordered = sorted(words, key=words.__getitem__)
    if [words[word] for word in ordered] != list(range(len(words))):
        raise InputError(f"{src}: ids with gaps or repeats, expected 0 to {len(words) - 1}")
    if tuple(ordered[: len(SPECIAL)]) != SPECIAL:
        found = ", ".join(map(brief, ordered[: len(SPECIAL)]))
        raise InputError(f"{src}: found {found}, expected {', '.join(SPECIAL)} to have the ids 0 to 3")
    check_vocab(src, words)
    vocab = kind.from_words(ordered, stored.get("segment") is True)
    vocab.path = os.fspath(src)
    return vocab


def check_vocab(path: str, words: Collection[str]) -> None:
    """Raise InputError that names path where a vocabulary holds nothing but the special words."""
    if len(words) <= len(SPECIAL):
        raise InputError(
            f"{path}: no words but {' '.join(SPECIAL)}; --threshold keeps rarer words, and Chinese that is not cut "
            "into words needs --segment"
        )


def from_txt(txt: str, allow_empty: bool = False) -> list[str]:
    """The captions in a file: UTF-8, a caption a line, lines ending at \\n only. Returns a list of str.

    Raises InputError naming the line for an empty caption (unless allow_empty) or one that is not UTF-8.
    """
    captions = read_lines(txt)
    if not allow_empty and "" in captions:
        raise InputError(f"{txt}, line {captions.index('') + 1}: empty caption (--allow_empty_captions accepts it)")
    if not captions:
        raise InputError(f"{txt}: no captions, expected one a line")
    return captions


# The caption files of the public data sets; of any other, Vocabulary.caption_files.
annotations = {name: [f"{split}_caps.txt" for split in SPLITS] for name in ("coco_precomp", "f30k_precomp")}


def build_vocab(
    data_path: str,
    data_name: str,
    caption_file: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    threshold: int = 4,
    drop: Iterable[str] = (),
    allow_empty: bool = False,
    segment: bool = False,
    kind: type[Vocabulary] = Vocabulary,
) -> Vocabulary:
    """Count the words of a data set's captions and keep those that occur at least threshold times.

    caption_file: names under data_path/data_name, or a dict of such lists by data_name, such as `annotations`; None
    means kind.caption_files. drop: words to leave out. segment: cut Chinese text into words with jieba. kind: the class
    of the vocabulary. Ids follow the words' alphabetical order, after the four special ones.
    """
    folder = os.path.join(data_path, data_name)
    if isinstance(caption_file, Mapping):
        caption_file = caption_file.get(data_name)
    counter, vocab = Counter(), kind(segment)
    for name in caption_file or kind.caption_files(folder):
        captions = from_txt(os.path.join(folder, name), allow_empty)
        for caption in tqdm(captions, desc=name, unit="caption", disable=None):
            counter.update(vocab.tokenize(caption))
    for word in SPECIAL:
        vocab.add_word(word)
    for word in sorted(word for word, count in counter.items() if count >= threshold and word not in set(drop)):
        vocab.add_word(word)
    return vocab


def main(data_path: str | None = None, data_name: str | None = None, kind: type[Vocabulary] = Vocabulary) -> None:
    """Write ./vocab/NAME_vocab.json of a data set, with SCAN's threshold of 4; without arguments as the flags say.

    kind: the class of the vocabulary.
    """
    parser = argparse.ArgumentParser(
        description="Build the vocabulary of a data set from its train and dev captions.",
        epilog=f"example: python {kind.command} --data_path ./data --data_name {kind.data_name}",
    )
    add = parser.add_argument
    add("--data_path", default=data_path or "./data/", help="folder of the data sets (default: %(default)s)")
    add("--data_name", default=data_name or kind.data_name, help="data set, a folder there (default: %(default)s)")
    add("--vocab_path", default="./vocab/", help=f"where NAME{kind.suffix} goes (default: %(default)s)")
    add("--threshold", type=int, default=4, help="least count of a word (default: %(default)s)")
    add("--stop_words", metavar="FILE", help="words to drop, one a line (none are dropped without it)")
    add("--segment", action="store_true", help="cut Chinese text into words with jieba")
    add("--allow_empty_captions", action="store_true", help="accept empty caption lines")
    add("--overwrite", action="store_true", help="replace a vocabulary of other words")
    opt = parser.parse_args(None if data_path is None and data_name is None else [])
    dest = kind.file(opt.vocab_path, opt.data_name)
    drop = from_txt(opt.stop_words) if opt.stop_words else ()
    options = opt.threshold, drop, opt.allow_empty_captions, opt.segment, kind
    vocab = build_vocab(opt.data_path, opt.data_name, None, *options)
    check_vocab(dest, vocab.word2idx)
    make_folder(os.path.dirname(dest) or ".")
    if os.path.exists(dest) and not opt.overwrite:  # checkpoints may have been trained with it
        there = deserialize_vocab(dest, kind)
        if there.word2idx != vocab.word2idx:
            found = f"is a vocabulary of {len(there)} words, not the {len(vocab)} found now"
            raise InputError(f"{dest}: {found} (--overwrite replaces it)")
    serialize_vocab(vocab, dest)
    print(f"{dest}: {len(vocab)} words that occur at least {opt.threshold} times")


if __name__ == "__main__":
    run(main)
