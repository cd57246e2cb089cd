"""Captions and vocabularies of Tencent-News: ASCII-only lower-casing, unknown words are id 0, names with `_sent`.

python Tencent_PFAN/vocab.py --data_path ./data --data_name tencent_data   writes ./vocab/tencent_data_sent_vocab.json
"""

import os
import string

if not __package__:
    import _root  # noqa: F401

import vocab as root
from lib.errors import run

LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
SUFFIX = "_sent_vocab.json"


def lower_ascii(text):
    """Lower-case A…Z only: the published vocabulary holds words such as Φ and Ⅲ."""
    return text.translate(LOWER)


def tokenize(caption):
    """The root's tokenize with only A…Z lower-cased."""
    return root.tokenize(caption, lower_ascii)


class Vocabulary(root.Vocabulary):
    """The root's Vocabulary as the published models were trained with it: an unknown word gets id 0, <pad>."""

    lower = staticmethod(lower_ascii)

    def __init__(self):
        super().__init__(unknown="<pad>")

    @classmethod
    def of(cls, vocab):
        """The words of any vocabulary under the rules of this one."""
        new = cls()
        new.word2idx, new.idx2word, new.idx, new.segment = vocab.word2idx, vocab.idx2word, vocab.idx, vocab.segment
        new.path = getattr(vocab, "path", "")
        return new


def deserialize_vocab(src):
    """Read a Vocabulary from a JSON file. Raises InputError for what is not one."""
    if not os.path.isfile(src):
        name, folder = os.path.basename(src).removesuffix(SUFFIX), os.path.dirname(src) or "."
        command = f"python Tencent_PFAN/vocab.py --data_path DATA_PATH --data_name {name} --vocab_path {folder}"
        raise root.NoVocabularyError(
            f"{src}: no such vocabulary; name its folder with --vocab_path, or make it with: {command}"
        )
    return Vocabulary.of(root.deserialize_vocab(src))


def read_vocab(opt):
    """The Vocabulary that opt's vocab_path and data_name lead to."""
    return deserialize_vocab(os.path.join(opt.vocab_path, opt.data_name + SUFFIX))


def caption_file(folder, split):
    """Name of a split's caption file: SPLIT_sent_caps.txt, or SPLIT_caps.txt where only that lies in folder."""
    names = f"{split}_sent_caps.txt", f"{split}_caps.txt"
    return next((name for name in names if os.path.isfile(os.path.join(folder, name))), names[0])


def caption_files(folder):
    """Names of the caption files from which a vocabulary is built."""
    return [caption_file(folder, split) for split in root.SPLITS]


def main():
    root.main("Tencent_PFAN/vocab.py", "tencent_data", SUFFIX, caption_files, tokenize)


if __name__ == "__main__":
    run(main)
