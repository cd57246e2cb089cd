"""Sentences that search: their words, and whether a vocabulary has them."""

from lib.errors import InputError


def words_of(vocab, sentence):
    """The tokens of a sentence that have a letter or a digit."""
    return [token for token in vocab.tokenize(sentence) if any(map(str.isalnum, token))]


def knows_a_word(vocab, sentence):
    """Whether the vocabulary has at least one of the sentence's words."""
    return any(word in vocab.word2idx for word in words_of(vocab, sentence))


def check_query(vocab, sentence, flag):
    """Print the words of a sentence that are not in the vocabulary.

    Raises InputError, naming the flag, where the sentence has no word or none that the vocabulary has.
    """
    words = list(dict.fromkeys(words_of(vocab, sentence)))
    if not words:
        raise InputError(f"{flag} {sentence!r}: expected at least one word")
    if not knows_a_word(vocab, sentence):
        named = ", ".join(words)[:200]
        raise InputError(f"{flag}: none of its words is in the vocabulary ({named}), expected at least one")
    if unknown := [word for word in words if word not in vocab.word2idx]:
        print(f"not in the vocabulary, read as <unk>: {', '.join(unknown)}")
