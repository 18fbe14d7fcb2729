"""Batches of the training loop that do something before one of them is made."""

from klbox_jax.data.loader import train_batches


class ActingBatches:
    """Calls `action` before batch `number`, counted from 1."""

    def __init__(self, batches, number, action):
        self.batches, self.left, self.action = batches, number, action

    def __next__(self):
        self.left -= 1
        if self.left == 0:
            self.action()
        return next(self.batches)

    def close(self):
        self.batches.close()


def acting_train_batches(number, action):
    """A replacement of `loop.train_batches`."""
    return lambda *arguments, **options: ActingBatches(train_batches(*arguments, **options), number, action)
