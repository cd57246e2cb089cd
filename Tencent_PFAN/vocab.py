"""Captions and vocabularies of Tencent-News: ASCII-only lower-casing, unknown words are id 0, names with `_sent`.

python Tencent_PFAN/vocab.py --data_path ./data --data_name tencent_data   writes ./vocab/tencent_data_sent_vocab.json
"""

import os
import string
from functools import partial

if not __package__:
    import _root  # noqa: F401

import vocab as root
from lib.errors import run
from vocab import from_txt, serialize_vocab  # noqa: F401 (SCAN's names)

LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def lower_ascii(text):
    """Lower-case A…Z only: the published vocabulary holds words such as Φ and Ⅲ."""
    return text.translate(LOWER)


def tokenize(caption):
    """The root's tokenize with only A…Z lower-cased."""
    return root.tokenize(caption, lower_ascii)


def caption_file(folder, split):
    """Name of a split's caption file: SPLIT_sent_caps.txt, or SPLIT_caps.txt where only that lies in folder."""
    names = f"{split}_sent_caps.txt", f"{split}_caps.txt"
    return next((name for name in names if os.path.isfile(os.path.join(folder, name))), names[0])


class Vocabulary(root.Vocabulary):
    """The root's Vocabulary as the published models were trained with it: an unknown word gets id 0, <pad>."""

    command, suffix = "Tencent_PFAN/vocab.py", "_sent_vocab.json"
    data_name, unknown = "tencent_data", "<pad>"
    lower = staticmethod(lower_ascii)

    @classmethod
    def caption_files(cls, folder):
        return [caption_file(folder, split) for split in root.SPLITS]

    @classmethod
    def of(cls, vocab):
        """The words of any vocabulary under the rules of this one."""
        new = cls(vocab.segment)
        new.word2idx, new.idx2word, new.idx = vocab.word2idx, vocab.idx2word, vocab.idx
        new.path = getattr(vocab, "path", "")
        return new


annotations = {"tencent_data": [f"{split}_sent_caps.txt" for split in root.SPLITS]}


# the root's functions with this Vocabulary
build_vocab = partial(root.build_vocab, kind=Vocabulary)
deserialize_vocab = partial(root.deserialize_vocab, kind=Vocabulary)
main = partial(root.main, kind=Vocabulary)

if __name__ == "__main__":
    run(main)
