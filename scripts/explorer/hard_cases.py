"""The queries whose positives the models rank most differently."""

import threading
from concurrent.futures import Future

import numpy as np

from evaluation import rank_both, score_shards
from lib.web import Refused
from scripts.explorer.images import partners

MAX_GROUPS = 1000  # images with their captions that are compared, spread over the split
MAX_CASES = 30  # that are shown, of sentences and of images


def start(explorer):
    """A Future of compare(explorer), in a thread that Ctrl-C does not wait for. It raises Refused where that fails."""
    future = Future()

    def run():
        try:
            future.set_result(compare(explorer))
        except Exception as error:  # a thread has no caller to tell
            future.set_exception(Refused(500, f"The comparison failed: {error}"))

    threading.Thread(target=run, daemon=True).start()
    return future


def compare(explorer):
    """The hardest cases of an Explorer's models, sentences, then images, and how many were compared."""
    n_images, n_captions = explorer.n_images, len(explorer.captions)
    n = min(n_images, n_captions)
    groups = np.unique(np.linspace(0, n - 1, min(n, MAX_GROUPS)).astype(int)).tolist()
    images, captions = ([i for group in groups for i in partners(group, n, m)] for m in (n_images, n_captions))
    ranks, cases = [], []
    for collection in explorer.collections:
        regions, words = collection.tensor(collection.images[images]), collection.words_of(captions)
        model, lens = collection.model, collection.lens[captions]
        ranks.append(rank_both(score_shards((regions,), (words, lens), model.score, model.device))[1])
    for way, queries in (("rti", captions), ("rt", images)):
        by_model = np.stack([found[way][0] + 1 for found in ranks])  # models × queries
        ratios = by_model.max(0) / by_model.min(0)  # 1 to 10 is like 10 to 100
        for query in np.argsort(-ratios, kind="stable")[:MAX_CASES]:
            if ratios[query] > 1:
                sentence = explorer.captions[queries[query]] if way == "rti" else None
                image = partners(queries[query], n_captions, n_images)[0] if sentence else queries[query]
                about = {"ranks": by_model[:, query].astype(int).tolist(), "sentence": sentence}
                cases.append(about | explorer.look(image))
    return {"cases": cases, "images": len(images), "captions": len(captions)}
