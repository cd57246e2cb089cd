"""Ctrl-C and SIGTERM end training between two steps, where its state can be resumed."""

import signal
import threading
from contextlib import contextmanager

from lib import distributed


class StopTraining(KeyboardInterrupt):
    """Raised between two steps; its argument is the signal's number. The state at this point can be resumed."""


class GracefulStop:
    """In its context Ctrl-C and SIGTERM are noted in `signal`, and training ends after the current step.

    In `resting` training ends at once, and a second signal always ends it at once. Several processes must end at the
    same step, so they always finish it. Python handles signals in the main thread only: elsewhere this does nothing.
    """

    def __init__(self):
        self.signal, self.handlers, self.model_rests = None, {}, False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        second, self.signal = self.signal, number
        if distributed.world_size() == 1 and (self.model_rests or second):
            raise (StopTraining if self.model_rests else KeyboardInterrupt)(number)

    @contextmanager
    def resting(self):
        """The context in which the model does not change."""
        self.model_rests = True
        try:
            yield
        finally:
            self.model_rests = False

    def wait(self, batches):
        """The batches of an iterable; between them the model rests."""
        batches = iter(batches)
        while True:
            with self.resting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def check(self):
        """Raise StopTraining in all processes where a signal came to one of them."""
        if distributed.any_process(self.signal):
            raise StopTraining(self.signal or signal.SIGTERM)
