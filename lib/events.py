"""TensorBoard's event files."""

import os
from contextlib import suppress

# tensorboard_logger needs this before protobuf is first imported
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")

import tensorboard_logger


class Events(tensorboard_logger.Logger):
    """TensorBoard's events in a folder; with is_dummy nowhere. An error in writing them names the folder."""

    def log_value(self, *args, **more):
        if not self.is_dummy:  # which would keep them in memory
            super().log_value(*args, **more)

    def _write_event(self, event):
        try:
            super()._write_event(event)
        except OSError as error:
            error.filename = self.logdir
            raise

    def __del__(self):
        with suppress(OSError):  # of the same full disk
            super().__del__()
