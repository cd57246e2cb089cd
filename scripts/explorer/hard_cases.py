"""The queries whose right answer the models rank most differently."""

import math
import threading

import numpy as np
import torch

from evaluation import rank_both, score_shards

MAX_GROUPS = 1000  # of images and captions that are compared, spread over the split
MAX_CASES = 30  # that are shown, of sentences and of images
CAPTION_BLOCK = 64  # captions between two reports of progress


class HardCases:
    """The comparison of an Explorer's models, in a thread that starts when it is first asked for.

    answer: {"state": new, running, done or the reason of a failure, "share": of the work done, "cases": list}.
    """

    def __init__(self, explorer):
        self.explorer, self.groups = explorer, explorer.groups
        self.lock = threading.Lock()
        self.answer = {"state": "new", "share": 0.0, "cases": []}

    def ask(self):
        """The answer so far; starts the comparison of two or more models."""
        with self.lock:
            if self.answer["state"] == "new" and len(self.explorer.collections) > 1:
                self.answer["state"] = "running"
                threading.Thread(target=self._run, daemon=True).start()
        return self.answer

    def _run(self):
        try:
            self._compare()
        except Exception as error:  # a thread has no caller to tell
            self.answer = {**self.answer, "state": f"The comparison failed: {error}"}

    def _compare(self):
        n = len(self.groups)
        chosen = np.unique(np.linspace(0, n - 1, min(n, MAX_GROUPS)).astype(int)).tolist()
        images = [i for group in chosen for i in self.groups.images(group)]
        captions = [i for group in chosen for i in self.groups.captions(group)]
        ranks = []
        for number, collection in enumerate(self.explorer.collections):
            sims = self._score(collection, images, captions, number)
            ranks.append({way: found[0] + 1 for way, found in rank_both(sims)[1].items()})
        counts = {"pictures": len(images), "captions": len(captions)}
        self.answer = {"state": "done", "share": 1.0, "cases": self._cases(ranks, images, captions), **counts}

    def _score(self, collection, images, captions, number):
        """Scores (images, captions) of the model of that number; notes the progress."""
        sims = np.empty((len(images), len(captions)), dtype=np.float32)
        regions = collection.tensor(collection.images[images])
        for start in range(0, len(captions), CAPTION_BLOCK):
            block = captions[start : start + CAPTION_BLOCK]
            words = torch.cat([collection.caption(i) for i in block]), collection.lens[block]
            scores = score_shards((regions,), words, collection.model.score, collection.model.device)
            sims[:, start : start + CAPTION_BLOCK] = scores
            done = number + (start + len(block)) / len(captions)
            self.answer = {**self.answer, "share": done / len(self.explorer.collections)}
        return sims

    def _cases(self, ranks, images, captions):
        """Sentences, then images, by the ratio of their largest and smallest rank: 1 to 10 is like 10 to 100."""
        cases = []
        for way, indices in (("rti", captions), ("rt", images)):
            by_model = np.stack([found[way] for found in ranks])  # models × queries
            spread = np.log(by_model.max(0)) - np.log(by_model.min(0))
            for query in np.argsort(-spread, kind="stable")[:MAX_CASES]:
                if spread[query] > 0:
                    about = {"ranks": by_model[:, query].astype(int).tolist(), "ratio": math.exp(spread[query])}
                    cases.append({**about, **self._query(way, indices[query])})
        return cases

    def _query(self, way, index):
        """The image of a case, and its sentence where that is the query."""
        image = index if way == "rt" else self.groups.images(self.groups.of_caption(index))[0]
        text = self.explorer.captions[index] if way == "rti" else None
        return {"sentence": text, "image": image, **self.explorer.look(image)}
