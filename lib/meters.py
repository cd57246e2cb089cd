"""Running averages of what a training step reports, printed and written to TensorBoard; SCAN's names."""


class AverageMeter:
    """A value and its running average."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.val = self.avg = self.sum = 0
        self.count = 0

    def update(self, val, n=0):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / (0.0001 + self.count)

    def __str__(self):
        return f"{self.val}" if self.count == 0 else f"{self.val:.4f} ({self.avg:.4f})"


class LogCollector:
    """Named meters, printed in one line and written to TensorBoard."""

    def __init__(self):
        self.meters = {}

    def update(self, k, v, n=0):
        self.meters.setdefault(k, AverageMeter()).update(v, n)

    def __str__(self):
        return "  ".join(f"{k} {v}" for k, v in self.meters.items())

    def tb_log(self, tb_logger, prefix="", step=None):
        for k, v in self.meters.items():
            tb_logger.log_value(prefix + k, v.val, step=step)
