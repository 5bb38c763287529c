"""Progress: who polls while the model computes.

A large message moves only inside MPI calls, so somebody has to make some while the gradient is computed. Hooks do it
between the layers, on the thread that trains: they cost nothing where nothing is under way, but come only as often
as layers end. A thread does it twice per millisecond, whatever the model does, and needs a core now and then.
"""

from __future__ import annotations

import atexit
import threading
import time
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .core import Endpoint

WAYS = ("auto", "hooks", "thread")
INTERVAL_S = 5e-4  # of the thread's polls
LEAST_S = 2e-4  # between two polls by hooks: many small layers need not all poll


def begin(way: str, model: nn.Module, comm: Endpoint) -> Hooks | Thread:
    """Have somebody poll while the model computes, until it is closed.

    auto: hooks for a model on the CPU, where a thread would take time from the one that computes; a thread for one on
    a GPU, whose layers only queue work. A thread needs an MPI that several threads may use. (Inside a compiled model
    no hook polls: choose the thread.)
    """
    if way == "thread" and not comm.allows_threads:
        raise UsageError("This MPI does not allow progress by a thread.", "Choose progress = hooks.")
    if way == "auto":
        way = "thread" if comm.allows_threads and comm.device.type == "cuda" else "hooks"
    return Thread(comm) if way == "thread" else Hooks(model, comm)


class Hooks:
    """Polls after every layer's forward and after every parameter's gradient. `close` removes them."""

    def __init__(self, model: nn.Module, comm: Endpoint):
        self._comm = comm
        self._last_s = 0.0
        layers = [module for module in model.modules() if not any(True for _ in module.children())]
        trained = [p for p in model.parameters() if p.requires_grad]
        self._hooks = [module.register_forward_hook(self._poll) for module in layers]
        self._hooks += [p.register_post_accumulate_grad_hook(self._poll) for p in trained]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _poll(self, *_: Any) -> None:
        if torch.compiler.is_compiling():  # else the graph would break after every layer
            return
        if self._comm.busy:
            now = time.perf_counter()
            if now - self._last_s > LEAST_S:
                self._comm.poll()
                self._last_s = now


class Thread:
    """Polls in a thread of its own, as long as something is under way. `close` ends it."""

    def __init__(self, comm: Endpoint):
        self._comm = comm
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before MPI ends

    def _run(self) -> None:
        if self._comm.device.type == "cuda":
            torch.cuda.set_device(self._comm.device)  # each thread has its own
        while not self._stopped.wait(INTERVAL_S if self._comm.busy else 4 * INTERVAL_S):
            self._comm.poll()

    def close(self) -> None:
        atexit.unregister(self.close)
        self._stopped.set()
        self._thread.join()
