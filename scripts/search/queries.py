"""Sentences that search: their words, and whether a vocabulary has them."""

from lib.errors import InputError


def words_of(vocab, sentence):
    """The different tokens of a sentence that have a letter or a digit, in their order: {word: whether known}."""
    words = [token for token in vocab.tokenize(sentence) if any(map(str.isalnum, token))]
    return {word: word in vocab.word2idx for word in words}


def check_query(vocab, sentence, flag):
    """Print the words of a sentence that are not in the vocabulary.

    Raises InputError, naming the flag, where the sentence has no word or none that the vocabulary has.
    """
    words = words_of(vocab, sentence)
    if not any(words.values()):
        found = ", ".join(words)[:200] or "no word"
        raise InputError(f"{flag}: found {found}, expected at least one word of the vocabulary")
    if unknown := [word for word, known in words.items() if not known]:
        print(f"not in the vocabulary, read as <unk>: {', '.join(unknown)}")
