"""The queries whose positives the models rank most differently."""

import threading

import numpy as np

from evaluation import rank_both, score_shards
from scripts.explorer.images import partners

MAX_GROUPS = 1000  # images with their captions that are compared, spread over the split
MAX_CASES = 30  # that are shown, of sentences and of images


class HardCases:
    """The comparison of an Explorer's models, in a thread that starts when it is first asked for.

    answer: {"cases", "images", "captions"}, None until then, or {"failure": the reason}.
    """

    def __init__(self, explorer):
        self.explorer, self.answer, self.thread = explorer, None, None
        self.lock = threading.Lock()

    def ask(self):
        """The answer, None while the comparison runs."""
        with self.lock:
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, daemon=True)
                self.thread.start()
        return self.answer

    def _run(self):
        try:
            self.answer = self._compare()
        except Exception as error:  # a thread has no caller to tell
            self.answer = {"failure": f"The comparison failed: {error}"}

    def _compare(self):
        n_images, n_captions = self.explorer.n_images, len(self.explorer.captions)
        n = min(n_images, n_captions)
        groups = np.unique(np.linspace(0, n - 1, min(n, MAX_GROUPS)).astype(int)).tolist()
        images, captions = ([i for group in groups for i in partners(group, n, m)] for m in (n_images, n_captions))
        ranks = [rank_both(score(collection, images, captions))[1] for collection in self.explorer.collections]
        cases = []
        for way, queries in (("rti", captions), ("rt", images)):
            by_model = np.stack([found[way][0] + 1 for found in ranks])  # models × queries
            ratios = by_model.max(0) / by_model.min(0)  # 1 to 10 is like 10 to 100
            for query in np.argsort(-ratios, kind="stable")[:MAX_CASES]:
                if ratios[query] > 1:
                    about = {"ranks": by_model[:, query].astype(int).tolist(), "ratio": float(ratios[query])}
                    cases.append(about | self._query(way, queries[query]))
        return {"cases": cases, "images": len(images), "captions": len(captions)}

    def _query(self, way, index):
        """The image of a case, and its sentence where that is the query."""
        explorer = self.explorer
        if way == "rt":
            return {"sentence": None, **explorer.look(index)}
        image = partners(index, len(explorer.captions), explorer.n_images)[0]
        return {"sentence": explorer.captions[index], **explorer.look(image)}


def score(collection, images, captions):
    """A collection's scores (images, captions) of the images and captions of these indices."""
    regions, words = collection.tensor(collection.images[images]), collection.words_of(captions)
    return score_shards((regions,), (words, collection.lens[captions]), collection.model.score, collection.model.device)
