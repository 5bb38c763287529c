"""How tensors travel: staged and direct messages on a device that takes its time, and groups of ranks."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import Real, Simulated

from slowmo_mpi import SlowmoError, simulate
from slowmo_mpi.comm import Communicator, Endpoint, transport
from slowmo_mpi.comm.transport import PAST, Direct, Flight, Host, Late, Pool, StagedReceive, StagedSend
from slowmo_mpi.errors import UsageError

CHUNK_BYTES = 64
SIZES = [0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 1000]  # around one, two and three chunks


class Stream:
    """Work in order: (a condition to wait for, what is done then)."""

    def __init__(self) -> None:
        self.work: deque[tuple[Callable[[], bool], Callable[[], Any]]] = deque()
        self.begun = self.ended = 0

    def add(self, ready: Callable[[], bool], do: Callable[[], Any]) -> int:
        self.work.append((ready, do))
        self.begun += 1
        return self.begun

    def step(self) -> None:
        if self.work and self.work[0][0]():
            self.work.popleft()[1]()
            self.ended += 1


class SlowEvent:
    def __init__(self, device: Slow, stream: Stream):
        self.device, self.stream, self.at = device, stream, stream.begun

    def happened(self) -> bool:
        return self.stream.ended >= self.at

    def query(self) -> bool:
        self.device.tick()
        return self.happened()


class Slow(Host):
    """Like a GPU on CPU tensors: what is queued is done later, a little whenever somebody asks."""

    def __init__(self, seed: int = 0, pace: float = 0.3):
        self.random, self.pace = random.Random(seed), pace
        self.compute, self.outward, self.inward = Stream(), Stream(), Stream()
        self.made: list[Tensor] = []

    def tick(self) -> None:
        for stream in (self.compute, self.outward, self.inward):
            if self.random.random() < self.pace:
                stream.step()

    def kernel(self, do: Callable[[], Any]) -> None:
        self.compute.add(lambda: True, do)

    def mark(self) -> SlowEvent:
        return SlowEvent(self, self.compute)

    def copy(self, target: Tensor, source: Tensor, after: Any) -> SlowEvent:
        host = {memory.untyped_storage().data_ptr() for memory in self.made}
        stream = self.outward if target.untyped_storage().data_ptr() in host else self.inward
        stream.add(getattr(after, "happened", lambda: True), lambda: super(Slow, self).copy(target, source, PAST))
        return SlowEvent(self, stream)

    def wait(self, event: Any) -> None:
        while not event.query():  # the kernels of a CPU are done at once, so they must wait at once
            pass

    def memory(self, size_bytes: int) -> Tensor:
        self.made.append(super().memory(size_bytes))
        return self.made[-1]


class Wire:
    """MPI as the messages see it: matches sends and receives by key and order, and reads memory late."""

    def __init__(self, seed: int = 0, pace: float = 0.3):
        self.random, self.pace = random.Random(seed), pace
        self.sends: dict[Hashable, deque[Parcel]] = defaultdict(deque)
        self.receives: dict[Hashable, deque[Parcel]] = defaultdict(deque)
        self.posted = 0
        self.stuck = False

    def send(self, key: Hashable) -> Callable[[Tensor], Parcel]:
        return lambda memory: self.post(self.sends[key], memory, key)

    def receive(self, key: Hashable) -> Callable[[Tensor], Parcel]:
        return lambda memory: self.post(self.receives[key], memory, key)

    def post(self, queue: deque[Parcel], memory: Tensor, key: Hashable) -> Parcel:
        self.posted += 1
        parcel = Parcel(self, memory, key)
        queue.append(parcel)
        return parcel


class Parcel:
    """A request of that MPI."""

    def __init__(self, wire: Wire, memory: Tensor, key: Hashable):
        self.wire, self.memory, self.key, self.arrived = wire, memory, key, False

    def Test(self) -> bool:
        wire = self.wire
        sends, receives = wire.sends[self.key], wire.receives[self.key]
        if not wire.stuck and sends and receives and wire.random.random() < wire.pace:
            sent, received = sends.popleft(), receives.popleft()
            assert sent.memory.numel() == received.memory.numel()  # both ends cut alike
            received.memory.copy_(sent.memory)
            sent.arrived = received.arrived = True
        return self.arrived


def content(seed: int, size: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def staged(kind: type[Late], pool: Pool, payload: Tensor, post: Any, key: Hashable) -> Late:
    return kind(pool, payload, post, key, CHUNK_BYTES)


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_arrives_whatever_the_order_of_events(seed: int) -> None:
    """Many messages at once, several with one key; kernels make payloads late, and use the targets late."""
    chance = random.Random(seed)
    device, wire, flight = Slow(seed, chance.choice([0.1, 0.9])), Wire(seed, chance.choice([0.1, 0.9])), Flight()
    pool = Pool(device)
    wanted, got, messages = [], [], []
    for k in range(24):
        key = k % 5
        size = chance.choice(SIZES)
        wanted.append(content(k, size))
        payload, target = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        device.kernel(lambda payload=payload, k=k: payload.copy_(wanted[k]))
        device.kernel(lambda target=target: target.fill_(7))  # the last use of the memory that is received into
        got.append(target)
        out, back = (Direct, Direct) if key == 4 else (StagedSend, StagedReceive)
        messages += [(out, payload, wire.send(key), ("out", key)), (back, target, wire.receive(key), ("in", key))]
    posted = [flight.add_late(staged(kind, pool, tensor, post, key)) for kind, tensor, post, key in messages]
    for _ in range(200_000):
        if flight.done(posted):
            break
    assert flight.done(posted) and not flight._kept and not flight._late
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert pool.idle_bytes == sum(m.numel() for idle in pool._idle.values() for m, _ in idle)
    assert pool.idle_bytes == len(device.made) * transport.SMALLEST_BYTES  # all of it came back
    assert len(device.made) <= transport.DEPTH * len(posted)


@pytest.mark.parametrize("kind", [StagedSend, Direct])
def test_a_send_waits_for_the_kernels_before_it_and_no_others(kind: type[Late]) -> None:
    device, wire, flight = Slow(pace=1.0), Wire(), Flight()
    payload, go = torch.zeros(3, dtype=torch.uint8), False
    device.compute.add(lambda: go, lambda: payload.fill_(9))
    message = flight.add_late(staged(kind, Pool(device), payload, wire.send(0), 0))
    device.compute.add(lambda: False, lambda: None)  # never ends
    assert not any(flight.done([message]) for _ in range(100)) and wire.posted == 0
    go = True
    while not wire.posted:
        flight.done([message])
    assert wire.sends[0][0].memory.tolist() == [9, 9, 9]


def test_a_direct_receive_waits_for_the_last_use_of_its_memory() -> None:
    device, wire, flight = Slow(pace=1.0), Wire(), Flight()
    message = None
    device.compute.add(lambda: message is not None, lambda: None)
    message = flight.add_late(Direct(Pool(device), torch.zeros(3), wire.receive(0), 0))
    assert wire.posted == 0
    while not wire.posted:
        flight.done([message])


def test_a_staged_receive_waits_on_the_device_for_the_last_use_of_its_memory() -> None:
    device, wire, flight = Slow(pace=1.0), Wire(pace=1.0), Flight()
    target, go = torch.zeros(3, dtype=torch.uint8), False
    device.compute.add(lambda: go, lambda: target.fill_(7))
    receive = flight.add_late(staged(StagedReceive, Pool(device), target, wire.receive(0), 0))
    wire.send(0)(torch.full((3,), 9, dtype=torch.uint8))
    while not receive.through:
        flight.done([])
    for _ in range(100):
        device.tick()
    assert target.tolist() == [0, 0, 0]
    go = True
    assert flight.done([receive]) and target.tolist() == [9, 9, 9]


def test_one_chunk_is_copied_while_another_is_on_the_wire() -> None:
    device, wire, flight = Slow(pace=1.0), Wire(pace=1.0), Flight()
    wire.stuck = True
    send = flight.add_late(staged(StagedSend, Pool(device), content(0, 5 * CHUNK_BYTES), wire.send(0), 0))
    for _ in range(100):
        assert not flight.done([send])
    assert wire.posted == transport.DEPTH and device.outward.begun == device.outward.ended == transport.DEPTH
    got = torch.zeros(5 * CHUNK_BYTES, dtype=torch.uint8)
    receive = flight.add_late(staged(StagedReceive, Pool(device), got, wire.receive(0), 1))
    wire.stuck = False
    while not flight.done([send, receive]):
        pass
    assert torch.equal(got, content(0, 5 * CHUNK_BYTES)) and wire.posted == 10


def test_messages_with_one_key_are_posted_in_order_and_others_pass() -> None:
    device, wire, flight = Slow(pace=1.0), Wire(), Flight()
    wire.stuck = True
    pool = Pool(device)
    long, short, other = (
        flight.add_late(staged(StagedSend, pool, content(k, size), wire.send(key), key))
        for k, (size, key) in enumerate([(3 * CHUNK_BYTES, "a"), (1, "a"), (1, "b")])
    )
    for _ in range(100):
        assert not flight.done([long, short, other])
    assert [p.memory.numel() for p in wire.sends["a"]] == [CHUNK_BYTES] * transport.DEPTH  # not the short one
    assert other.posted and not short.posted


def test_what_is_not_asked_for_moves_on_too() -> None:
    """A rank that waits for one message still sends the others."""
    device, wire, flight = Slow(), Wire(), Flight()
    got = torch.zeros(1000, dtype=torch.uint8)
    send = flight.add_late(staged(StagedSend, Pool(device), content(3, 1000), wire.send(0), 0))
    receive = flight.add_late(staged(StagedReceive, Pool(device), got, wire.receive(0), 1))
    while not flight.done([receive]):
        pass
    assert torch.equal(got, content(3, 1000)) and not send.done
    flight.finish(1.0)
    assert send.done and not flight._kept


def test_memory_is_used_again_once_its_copy_has_ended_and_little_lies_idle() -> None:
    device = Slow(pace=0.0)
    pool = Pool(device)
    memory = pool.take(100)
    pool.give(memory, device.copy(torch.zeros(4096, dtype=torch.uint8), memory, PAST))
    assert pool.take(100) is not memory  # it is being read
    device.inward.step()
    assert pool.take(4096) is memory and pool.idle_bytes == 0
    assert pool.take(4097).numel() == 8192
    large = transport.KEPT_BYTES // 2
    for _ in range(4):
        pool.give(torch.empty(large, dtype=torch.uint8), PAST)
    assert pool.idle_bytes == transport.KEPT_BYTES
    assert pool.take(large).numel() == large and pool.idle_bytes == large


# ---- over MPI ----
def late(comm: Communicator, how: str, seed: int = 1) -> Communicator:
    """A communicator whose CPU tensors travel as a slow GPU's would."""
    other = Communicator(comm.mpi, timeout=15.0, device="cpu", transport="staged")
    other.stage_bytes = CHUNK_BYTES
    if how != "staged":
        other._direct = how == "slow and direct"
        other._flight._pools[other.device] = Pool(Slow(seed + comm.rank))
    return other


HOW = ["staged", "slow and staged", "slow and direct"]


def exchanges(comm: Communicator, how: str) -> bool:
    """Many at once, of sizes around the chunk's, tested late and out of order."""
    comm = late(comm, how)
    m, posted = comm.size, []
    for k, size in enumerate([*SIZES, *SIZES]):
        to = sorted({(comm.rank + d) % m for d in (1, 2)} - {comm.rank})
        sources = sorted({(comm.rank - d) % m for d in (1, 2)} - {comm.rank})
        posted.append((k, size, sources, comm.exchange(content(100 * k + comm.rank, size), to, sources)))
    for k, size, sources, exchange in reversed(posted):
        exchange.test()
        for source, got in zip(sources, exchange.wait(), strict=True):
            assert torch.equal(got, content(100 * k + source, size))
    return True


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("world", ["mpi-2", "mpi-3"], indirect=True)
def test_exchanges_of_all_sizes(world: Real, how: str) -> None:
    assert all(world.run(exchanges, how))


def collectives(comm: Communicator, how: str) -> bool:
    comm = late(comm, how)
    comm.chunk_bytes = 96
    m = comm.size
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for length in (0, 1, m + 1, 24, 63, 64, 65, 1000):

            def of(rank: int, length: int = length, dtype: torch.dtype = dtype) -> Tensor:
                return (torch.arange(length) % 7 + rank).to(dtype)

            total = sum((of(r) for r in range(m)), torch.zeros(length, dtype=dtype))
            assert torch.equal(comm.all_reduce_(of(comm.rank)), total)
            assert torch.equal(comm.reduce_scatter_(of(comm.rank)), total[comm.shard(length)])
            y = torch.full((length,), -1.0).to(dtype)
            y[comm.shard(length)] = total[comm.shard(length)]
            assert torch.equal(comm.all_gather_(y), total)
            assert torch.equal(comm.broadcast_(of(comm.rank)), of(0))
    return True


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("world", ["mpi-2", "mpi-3"], indirect=True)
def test_collectives_on_chunks(world: Real, how: str) -> None:
    assert all(world.run(collectives, how))


def strided(comm: Communicator) -> str:
    try:
        comm._isend(torch.zeros(4, 4).t(), comm.rank, 0)
    except ValueError as error:
        return str(error)
    return "sent"


def by_mpi(comm: Communicator) -> list[Any]:
    x = torch.arange(5.0, dtype=torch.float64) + comm.rank
    requests = comm._all_reduce_by_mpi(x)
    while not comm._done(requests):
        comm._pause(0.0)
    return [x.tolist(), comm._all_reduce_by_mpi(x.bfloat16()), late(comm, "staged")._all_reduce_by_mpi(x)]


@pytest.mark.parametrize("world", ["mpi-2"], indirect=True)
def test_what_mpi_gets_and_what_not(world: Real) -> None:
    assert all("must be contiguous" in said for said in world.run(strided))
    assert world.run(by_mpi) == [[[1.0, 3.0, 5.0, 7.0, 9.0], None, None]] * 2


# ---- groups ----
def groups(comm: Endpoint) -> tuple[Any, ...]:
    """Both groups, and all ranks, exchange at once under the same tags; and a group is split again."""
    color = comm.rank % 2
    group = comm.split(color)
    members = list(range(color, comm.size, 2))
    assert (group.rank, group.size) == (members.index(comm.rank), len(members))
    assert group.host == comm.host and group.timeout == comm.timeout and group.device == comm.device
    assert group.gather(comm.rank) == members
    posted = []
    for k in range(3):
        comm._operations = group._operations = k  # the same tag for both
        for each in (comm, group):
            if each.size > 1:
                right, left = (each.rank + 1) % each.size, (each.rank - 1) % each.size
                posted.append((each, k, each.exchange(torch.full((9,), 10.0 * comm.rank + k), [right], [left])))
    for each, k, exchange in reversed(posted):
        left = (each.rank - 1) % each.size
        sender = left if each is comm else members[left]
        assert exchange.wait()[0].tolist() == [10.0 * sender + k] * 9
    later = [each.gather_later(bytes([comm.rank])) for each in (group, comm, group)]
    wanted = [bytes([r]) for r in members]
    assert [g.wait() for g in later] == [wanted, [bytes([r]) for r in range(comm.size)], wanted]
    assert torch.equal(group.all_reduce_(torch.full((100,), float(comm.rank))), torch.full((100,), float(sum(members))))
    half = group.split(group.rank // 2)
    return comm.gather(tuple(half.gather(comm.rank))), group.local_size, half.local_rank


def test_groups_keep_apart(world: Simulated | Real) -> None:
    for rank, (halves, local_size, local_rank) in enumerate(world.run(groups)):
        members = list(range(rank % 2, world.ranks, 2))
        at = members.index(rank)
        assert halves[rank] == tuple(members[at - at % 2 : at - at % 2 + 2])
        assert local_size == len(members) and local_rank == at % 2


def parts(comm: Communicator) -> bool:
    """A part travels as the whole does, and messages of the part move on while the whole is waited for."""
    comm = late(comm, "slow and staged")
    part = comm.split(comm.rank // 2)
    assert part.stage_bytes == CHUNK_BYTES and part.transport == "staged" and part._flight is comm._flight
    x = content(comm.rank, 1000)
    inner = part.exchange(x, [r for r in range(part.size) if r != part.rank], [])
    wanted = [r for r in range(part.size) if r != part.rank]
    outer = comm.exchange(x, [(comm.rank + 1) % comm.size], [(comm.rank - 1) % comm.size])
    assert torch.equal(outer.wait()[0], content((comm.rank - 1) % comm.size, 1000))
    tag = part._operations
    got = [torch.zeros_like(x) for _ in wanted]
    requests = [part._irecv(into, source, tag) for into, source in zip(got, wanted, strict=True)]
    while not comm._done(requests):  # asked of the whole
        comm._pause(0.0)
    inner.wait()
    first = comm.rank // 2 * 2
    assert all(torch.equal(into, content(first + source, 1000)) for into, source in zip(got, wanted, strict=True))
    other = comm.duplicate(5.0)
    assert other.transport == "staged" and other._flight is not comm._flight and other.timeout == 5.0
    return bool(other.gather(True))


@pytest.mark.parametrize("world", ["mpi-3", "mpi-4"], indirect=True)
def test_parts_of_a_staged_communicator(world: Real) -> None:
    assert all(world.run(parts))


def places(comm: Endpoint) -> tuple[Any, ...]:
    across = comm.split(comm.local_rank)
    return comm.host, comm.local_rank, comm.local_size, (across.local_rank, across.local_size, across.gather(comm.host))


def test_simulated_hosts() -> None:
    assert simulate(5, places, ranks_per_host=2) == [
        ("host0", 0, 2, (0, 1, ["host0", "host1", "host2"])),
        ("host0", 1, 2, (0, 1, ["host0", "host1"])),
        ("host1", 0, 2, (0, 1, ["host0", "host1", "host2"])),
        ("host1", 1, 2, (0, 1, ["host0", "host1"])),
        ("host2", 0, 1, (0, 1, ["host0", "host1", "host2"])),
    ]
    assert simulate(2, places)[1] == ("this process", 1, 2, (0, 1, ["this process"]))


def crossed(comm: Endpoint) -> None:
    """Rank 0 waits for an agreement while rank 1 needs it for an operation begun before."""
    x = torch.ones(1000)
    begun = comm.start_all_reduce(x, algorithm="ring")
    if comm.rank:
        begun.wait()
    comm.barrier()
    assert begun.wait()[0] == comm.size


def test_an_agreement_moves_on_what_is_under_way() -> None:
    simulate(3, crossed)


# ---- the choice ----
def mpich(answer: int) -> Callable[..., int]:
    def query(kind: int, found: Any) -> int:
        found._obj.value = answer if kind == 0 else 1 - answer
        return 0

    return query


@pytest.mark.parametrize(
    "functions, version, environment, wanted",
    [
        ({}, "Intel MPI 2021", {}, None),
        ({"MPIX_Query_cuda_support": lambda: 1}, "Open MPI v5.0.11", {}, True),
        ({"MPIX_Query_cuda_support": lambda: 0}, "Open MPI v5.0.11", {}, False),
        ({"MPIX_Query_cuda_support": lambda: -1}, "MVAPICH", {}, False),
        ({"MPIX_GPU_query_support": mpich(1)}, "MPICH Version: 5.0.2", {}, True),
        ({"MPIX_GPU_query_support": mpich(0)}, "MPICH Version: 5.0.2", {}, False),
        ({"MPIX_GPU_query_support": lambda *_: 17}, "MPICH Version: 5.0.2", {}, False),
        ({"MPIX_GPU_query_support": mpich(1)}, "MPI VERSION : CRAY MPICH version 8.1.25", {}, False),
        ({}, "MPI VERSION : CRAY MPICH version 8.1.25", {"MPICH_GPU_SUPPORT_ENABLED": "1"}, True),
    ],
)  # fmt: skip
def test_what_mpi_says_of_cuda(functions: Any, version: str, environment: dict[str, str], wanted: bool | None) -> None:
    assert transport.claims_cuda(SimpleNamespace(**functions), version, environment) is wanted


def chooses(comm: Communicator, wanted: str, says: list[bool | None], works: list[bool]) -> tuple[str, str]:
    """The choice on a CPU that plays the GPU; where it does not work, bytes do not come."""
    comm = Communicator(comm.mpi, timeout=15.0, device="cpu", transport="staged")
    receive = comm._irecv
    if not works[comm.rank]:
        comm._irecv = lambda payload, *to: receive(payload.clone(), *to)  # type: ignore[method-assign]
    try:
        found = comm._choose(wanted, says[comm.rank])
    except SlowmoError as error:
        return "error", str(error)
    assert not comm._plain and not comm._direct
    return found


@pytest.mark.parametrize("world", ["mpi-2"], indirect=True)
@pytest.mark.parametrize(
    "wanted, says, works, chosen, reason",
    [
        ("auto", [True, True], [True, True], "direct", "an exchange proved"),
        ("auto", [True, False], [True, True], "staged", "says that it does not"),
        ("auto", [None, True], [True, True], "staged", "does not say"),
        ("direct", [False, None], [True, True], "direct", "an exchange proved"),
        ("staged", [True, True], [True, True], "staged", "was asked for"),
        ("auto", [True, True], [True, False], "staged", "arrived damaged on rank 1"),
        ("direct", [True, True], [True, False], "error", "Leave the transport at auto"),
    ],
)
def test_the_transport_that_is_chosen(
    world: Real, wanted: str, says: Any, works: list[bool], chosen: str, reason: str
) -> None:
    for found, why in world.run(chooses, wanted, says, works):
        assert found == chosen and reason in why, (found, why)


def described(comm: Communicator) -> tuple[Any, ...]:
    staged = Communicator(comm.mpi, timeout=15.0, transport="staged", device="cpu")
    try:
        Communicator(comm.mpi, transport="pigeon")
    except UsageError as error:
        wrong = str(error)
    return comm.transport, comm.transport_reason, comm.warnings, staged.transport, wrong


@pytest.mark.parametrize("world", ["mpi-2"], indirect=True)
def test_the_transport_is_told(world: Real) -> None:
    for transport_, reason, warnings, staged_, wrong in world.run(described):
        assert (transport_, reason, warnings, staged_) == ("direct", "the tensors live in host memory", [], "staged")
        assert "There is no transport 'pigeon'" in wrong and "staged" in wrong
