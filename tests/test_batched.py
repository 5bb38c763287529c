"""compute.vmap: the gradients of all simulated ranks at once are those of each on its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import begin
from torch import Tensor, nn
from torch.nn import functional

from slowmo_mpi import batched, config, simulate
from slowmo_mpi.comm.simulated import SimulatedCommunicator
from slowmo_mpi.errors import UsageError

RANKS = 3


class Net(nn.Module):
    """A layer of each kind that a small network has, a frozen and an unused parameter among them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.normal = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * 36, 5)
        self.frozen = nn.Parameter(torch.full((5,), 2.0), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.normal(self.convolution(x)))
        return self.linear(x.flatten(1)) * self.frozen


class Labels:
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch[0])
        return functional.cross_entropy(logits, batch[1]), {"largest": logits.detach().max()}


def test_gradients_and_buffers_are_those_of_each_rank_alone() -> None:
    def program(comm: SimulatedCommunicator) -> None:
        torch.manual_seed(comm.rank)
        together = Net()
        alone = copy.deepcopy(together)
        batch = (torch.randn(6, 1, 6, 6), torch.randint(0, 5, (6,)))
        for _ in range(2):  # gradients add up
            loss, metrics = batched.gradients(comm, Labels(), together, batch, parts=2)  # type: ignore[arg-type]
            expected, shown = Labels().loss(alone, batch)
            (expected / 2).backward()
            torch.testing.assert_close(loss, expected.detach())
            torch.testing.assert_close(metrics, shown)
        for p, q in zip(together.parameters(), alone.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            torch.testing.assert_close(p.grad, q.grad)
        torch.testing.assert_close(dict(together.named_buffers()), dict(alone.named_buffers()))

    simulate(RANKS, program)


def test_batches_of_different_shapes_are_named() -> None:
    def program(comm: SimulatedCommunicator) -> None:
        batch = (torch.zeros(1 + comm.rank, 1, 6, 6), torch.zeros(1 + comm.rank, dtype=torch.long))
        batched.gradients(comm, Labels(), Net(), batch)  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="one shape"):
        simulate(RANKS, program)


@pytest.mark.parametrize("base", ["allreduce", "local", "dpsgd", "sgp", "osgp"])
def test_a_run_is_the_same_to_rounding(tmp_path: Path, base: str) -> None:
    models, graph = [], "ring-bidirectional" if base == "dpsgd" else "exponential"
    for vmap in ("false", "true"):
        text = f"""
            run = {{ steps = 14, log_every = 7 }}
            task = {{ name = "digits", batch_size = 16 }}
            optimizer = {{ lr = 0.05, momentum = 0.9, clip_norm = 0.5 }}
            base = {{ algorithm = "{base}", topology = "{graph}" }}
            slowmo = {{ tau = 4 }}
            compute = {{ vmap = {vmap}, accumulate = 2 }}
        """
        (tmp_path / vmap).mkdir()
        simulate(RANKS, begin, config.parse(text, "a test"), tmp_path / vmap)
        models.append(torch.load(tmp_path / vmap / "model.pt", weights_only=True))
    torch.testing.assert_close(models[0], models[1], rtol=1e-4, atol=1e-5)
