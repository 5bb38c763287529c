"""The restart under the next forward pass: the same bits as the blocking one, whatever the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from worlds import Real, Simulated

from slowmo_mpi import DPSGD, OSGP, SGP, Local, SlowMo
from slowmo_mpi.comm import Endpoint
from slowmo_mpi.errors import UsageError


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 6))


class Attention(nn.Module):
    """Reads its child's weights without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unsqueeze(0)
        return self.attention(x, x, x, need_weights=False)[0]


class Early(nn.Module):
    """Uses a weight of the last layer before anything is called, and has a parameter that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 30), nn.Linear(30, 6)
        self.unused = nn.Parameter(torch.ones(50))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.last.weight @ self.last.weight.t())
        return self.last(torch.tanh(self.first(x)))


MODELS = {"plain": Plain, "attention": Attention, "early": Early}
BASES: dict[str, Any] = {"local": Local(), "sgp": SGP(), "dpsgd": DPSGD(), "osgp": OSGP(delay=1)}


def trains(comm: Endpoint, model_name: str, base: str, overlap: bool) -> tuple[list[Tensor], int]:
    torch.manual_seed(0)
    model = MODELS[model_name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    worker = SlowMo(model, optimizer, comm, BASES[base], tau=3, beta=0.5, sharded=True, overlap=overlap)
    generator = torch.Generator().manual_seed(comm.rank)
    arriving = 0
    for step in range(14):
        arriving += worker.is_restarting
        if step == 9:  # right after an outer step, by a way that is not the model's forward
            with worker.averaged():
                model(torch.ones(5, 6))
        optimizer.zero_grad()
        model(torch.randn(5, 6, generator=generator)).square().mean().backward()
        worker.step()
    worker.drain()
    return [p.detach().clone() for p in model.parameters()], arriving


@pytest.mark.parametrize("base", sorted(BASES))
@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("world", ["simulated-3", "mpi-3", "mpi-4"], indirect=True)
def test_the_same_bits_as_without_overlap(world: Simulated | Real, model: str, base: str) -> None:
    plain, overlapped = (world.run(trains, model, base, overlap) for overlap in (False, True))
    for (a, _), (b, arriving) in zip(plain, overlapped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert arriving == 4, "the new anchor was not on its way when step() returned"


def only_inside(comm: Endpoint) -> str:
    model = nn.Linear(3, 3)
    try:
        SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, SGP(), overlap=True)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", ["simulated-2"], indirect=True)
def test_overlap_needs_shards(world: Simulated) -> None:
    assert all("sharded" in message for message in world.run(only_inside))
