"""Captions of the demo's scenes: sentences that say what is where."""

from scripts.demo.scenes import COLOURS, GROUNDS, KINDS, SIZES, one_of

PLACES = {  # (row, column)
    (0, 0): ("in the top left corner", "at the top left", "in the upper left"),
    (0, 1): ("at the top", "near the top edge", "up at the top"),
    (0, 2): ("in the top right corner", "at the top right", "in the upper right"),
    (1, 0): ("on the left", "at the left edge", "on the left side"),
    (1, 1): ("in the middle", "in the centre", "at the center"),
    (1, 2): ("on the right", "at the right edge", "on the right side"),
    (2, 0): ("in the bottom left corner", "at the bottom left", "in the lower left"),
    (2, 1): ("at the bottom", "near the bottom edge", "down at the bottom"),
    (2, 2): ("in the bottom right corner", "at the bottom right", "in the lower right"),
}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher than"),
    "below": ("below", "under", "lower than"),
}
VERBS = ("is", "sits", "lies", "appears", "stands")
OPENERS = ("there is", "this picture shows", "the image shows", "we see", "a drawing of") + 5 * ("",)


def relation(a, b):
    """How object a lies to object b ("left", "right", "above", "below"), or None where it lies askew."""
    dx, dy = b["centre"][0] - a["centre"][0], b["centre"][1] - a["centre"][1]
    if abs(dx) > 1.6 * abs(dy):
        return "left" if dx > 0 else "right"
    if abs(dy) > 1.6 * abs(dx):
        return "above" if dy > 0 else "below"
    return None


def named(names, first):
    """The synonyms whose first is given."""
    return next(words for words in names if words[0] == first)


def noun(rng, o, article="a"):
    """An object by colour and kind, sometimes with its size."""
    words = [one_of(rng, named(COLOURS, o["colour"])), one_of(rng, named(KINDS, o["kind"]))]
    if rng.random() < 0.4:
        words.insert(0, one_of(rng, named(SIZES, o["size"])))
    if article == "a" and words[0] == "orange":
        article = "an"
    return " ".join([article, *words])


def place(rng, o):
    return one_of(rng, PLACES[tuple(o["place"])])


def noun_and_place(rng, o):
    return f"{noun(rng, o)} {place(rng, o)}"


def clause(rng, o):
    return f"{noun(rng, o, one_of(rng, ('a', 'the')))} {one_of(rng, VERBS)} {place(rng, o)}"


def caption(rng, scene):
    """One sentence about three objects of a scene, most with the place where they are."""
    objects = [scene["objects"][i] for i in rng.permutation(len(scene["objects"]))[:3]]
    pairs = [(a, b) for a in objects for b in objects if a is not b and relation(a, b)]
    form = rng.choice(4, p=(0.35, 0.2, 0.2, 0.25))
    if form == 0:
        parts = [noun_and_place(rng, o) for o in objects]
        text = f"{one_of(rng, OPENERS)} {', '.join(parts[:-1])} and {parts[-1]}"
    elif form == 1:
        parts = [clause(rng, o) for o in objects]
        text = f"{parts[0]}, {parts[1]} {one_of(rng, ('and', 'while'))} {parts[2]}"
    elif form == 2 or not pairs:
        first, *rest = objects
        parts = [noun_and_place(rng, o) for o in rest]
        text = f"{place(rng, first)} {one_of(rng, ('there is', 'is', 'we see'))} {noun(rng, first)}, with "
        text += ", ".join(parts[:-1]) + f" and {parts[-1]}"
    else:
        a, b = one_of(rng, pairs)
        c = next(o for o in objects if o is not a and o is not b)
        text = f"{noun(rng, a, one_of(rng, ('a', 'the')))} {place(rng, a)} {one_of(rng, VERBS)} "
        text += f"{one_of(rng, RELATIONS[relation(a, b)])} {noun(rng, b)}, and {clause(rng, c)}"
    if rng.random() < 0.1:
        text += f" on a {one_of(rng, named(GROUNDS, scene['background']))} background"
    text = text.strip()
    return text[0].upper() + text[1:] + "."
