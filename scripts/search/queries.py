"""Sentences that search: their words, and the words that a vocabulary lacks."""

from lib.errors import InputError


def words_of(vocab, sentence):
    """The tokens of a sentence that have a letter or a digit."""
    return [token for token in vocab.tokenize(sentence) if any(map(str.isalnum, token))]


def unknown_words(vocab, sentence):
    """The different words of a sentence that are not in the vocabulary, in the sentence's order."""
    return [word for word in dict.fromkeys(words_of(vocab, sentence)) if word not in vocab.word2idx]


def knows_a_word(vocab, sentence):
    """Whether the vocabulary has at least one of the sentence's words."""
    return any(word in vocab.word2idx for word in words_of(vocab, sentence))


def check_query(vocab, sentence, flag):
    """The words of a sentence that are not in the vocabulary.

    Raises InputError, naming the flag, where the sentence has no word or none that the vocabulary has.
    """
    words = words_of(vocab, sentence)
    if not words:
        raise InputError(f"{flag} {sentence!r}: expected at least one word")
    if not knows_a_word(vocab, sentence):
        named = ", ".join(dict.fromkeys(words))
        raise InputError(f"{flag}: none of its words is in the vocabulary ({named[:200]}), expected at least one")
    return unknown_words(vocab, sentence)


def unknown_note(words):
    """A line about words that are not in the vocabulary, '' without any."""
    return f"not in the vocabulary, read as <unk>: {', '.join(words)}" if words else ""
