"""Tasks for worker processes, in a module that is imported quickly."""

import os
import signal
import threading
import time

import numpy as np


class KillsItsProcess:
    """A task that kills its process, if its number is 5."""

    def __init__(self, number):
        self.number = number

    def __call__(self):
        time.sleep(0.01)
        if self.number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.number, os.getpid()

    def split(self):
        return [self]

    def join(self, results):
        return results[0]

    def name(self):
        return f"task {self.number}"


def add_arrays(lengths):
    return np.zeros(lengths[0]) + np.zeros(lengths[1])


def return_a_lock():
    return threading.Lock()
