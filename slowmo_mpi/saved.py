"""A worker's state as a tree of numbers and tensors, and back: everything that moves the trajectory.

    step round phase begun w rate_sums last_rates peak_rates      numbers, as in `State`
    z                {dtype: (d,)}                                the de-biased parameters
    anchor, u        {dtype: this rank's 1/m of (d,)}             the slow state; all of it without exact average
    in_flight        phase, age, sent, weight                     an exchange that is some steps old, and the packet
    packet           {dtype: (d,)}                                that was sent (it is posted again on resume)
    error            {dtype: (d,)}                                what rounding took from averages; 0 outside this
    error_parts      number                                       rank's part, one of so many
    gradient_error   {bucket: (n,)}                               what rounding took from gradients
    late             rates                                        with a delayed average: the mean way of the last
    displacement     {dtype: this rank's 1/m of (d,)}             round, waited for, and the rates it was gone at;
    ahead            {dtype: this rank's 1/m of (d,)}             what taking it in will add to x0 (for readers only)
    optimizer        state by parameter, groups                   buffers, step counts, rates
    buffers, frozen  {name: tensor}                               of the model
    modules          what modules with `get_extra_state` give
    rng              torch's, CUDA's of the rank's device, numpy's global one, Python's

An exchange that was posted since the last step has changed nothing yet but w and phase: it is told as not yet posted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .average import ahead, statistics
from .checkpoint.read import Checkpoint
from .checkpoint.store import attributes_of
from .checkpoint.tree import Packed, Share, pack
from .comm import Endpoint
from .errors import SlowmoError
from .flat import FlatParameters
from .state import Late

if TYPE_CHECKING:
    from .worker import SlowMo

NUMBERS = ("step", "round", "phase", "begun", "w", "rate_sums", "last_rates", "peak_rates")
AVERAGED = ("z", "anchor", "u", "error", "gradient_error", "optimizer", "optimizer_other")  # for other ranks


def state_of(worker: SlowMo) -> dict[str, Any]:
    """The tree. Its tensors are the worker's own, not copies."""
    worker.settle()
    s = worker.state
    tree: dict[str, Any] = {name: getattr(s, name) for name in NUMBERS}
    tree["model"] = s.flat.fingerprint()
    tree["z"] = by_type(s.flat, s.flat.buffers)
    for key, vectors in (("anchor", [x.x0 for x in s.slow]), ("u", [x.u for x in s.slow])):
        tree[key] = by_type(s.flat, [_share(worker, v, b) for v, b in zip(vectors, s.flat.buffers, strict=False)])
    if s.late is not None:
        tree["late"] = s.late.rates
        for key, vectors in (("displacement", s.late.wait()), ("ahead", [ahead(worker, i) for i in range(len(s.z))])):
            tree[key] = by_type(s.flat, [_share(worker, v, b) for v, b in zip(vectors, s.flat.buffers, strict=True)])
    tree |= {kind: {name: _whole(worker, kind, name, e) for name, e in s.errors[kind].items()} for kind in s.errors}
    tree["error_parts"] = worker.team.ranks
    tree["in_flight"] = None
    if flight := s.in_flight:
        if flight.age == 0:
            tree |= {"w": flight.packet.weight, "phase": flight.phase, "begun": s.step - 1}
        else:
            tree["in_flight"] = {
                "phase": flight.phase, "age": flight.age, "sent": flight.sent, "weight": flight.packet.weight,
            }  # fmt: skip
            tree["packet"] = by_type(s.flat, flight.packet.vectors)
    names: dict[Any, str] = {p: name for name, p in worker.model.named_parameters()}
    tree["optimizer"] = {
        "kind": type(worker.optimizer).__name__,
        "state": {names[p]: dict(state) for p, state in worker.optimizer.state.items()},
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in worker.optimizer.param_groups],
    }
    tree["buffers"] = dict(worker.model.named_buffers())
    tree["frozen"] = frozen(worker)
    tree["modules"] = {name: module.get_extra_state() for name, module in _with_extra_state(worker)}
    tree["rng"] = _random_state(worker.comm.device)
    return tree


def restore(worker: SlowMo, tree: Mapping[str, Any]) -> None:
    """Put a worker where the tree says. On all ranks together: messages in flight are posted again.

    Raises: SlowmoError where the tree is another model's.
    """
    worker.settle()
    s = worker.state
    if tree["model"] != s.flat.fingerprint():
        raise SlowmoError(
            "The state to load is of another model: its parameters differ in name, order, shape or optimizer group.",
            "Build the model and the optimizer as they were when it was saved.",
        )
    if s.in_flight is not None:  # of the life that ends here
        for exchange in s.in_flight.exchanges:
            exchange.wait()
        s.in_flight = None
    if s.late is not None:
        s.late.wait()
        s.late = None
    if tree.get("late") and worker.average != "delayed":
        raise SlowmoError(
            "The state to load has a round's average on its way, and this worker does not delay averages.",
            'Make it with average="delayed" (slowmo.average).',
        )
    for name in NUMBERS:
        setattr(s, name, tree[name])
    for b, saved in zip(s.flat.buffers, tree["z"].values(), strict=True):
        b.copy_(saved)
    for key in ("anchor", "u"):
        mine = [x.x0 if key == "anchor" else x.u for x in s.slow]
        if len(tree[key]) != len(mine):
            raise SlowmoError(
                f"The state to load has {'a' if tree[key] else 'no'} slow state, and this worker has "
                f"{'one' if mine else 'none'}.",
                "Give tau as it was when it was saved (tau = 0 has no slow state).",
            )
        for vector, b, saved in zip(mine, s.flat.buffers, tree[key].values(), strict=False):  # tau = 0: none
            vector.copy_(_own(worker, saved, b))
    if tree.get("late"):
        told = zip(s.slow, tree["displacement"].values(), s.flat.buffers, strict=True)
        s.late = Late(tree["late"], means=[torch.empty_like(x.x0).copy_(_own(worker, d, b)) for x, d, b in told])
    for kind in s.errors:
        for name, error in s.errors[kind].items():
            saved = tree.get(kind, {}).get(name)
            if saved is None:  # nothing was rounded before
                error.zero_()
            else:
                error.copy_(saved[worker.team.part(saved)] if kind == "error" else saved)
    _restore_optimizer(worker, tree["optimizer"])
    for name, tensors in (("buffers", dict(worker.model.named_buffers())), ("frozen", frozen(worker))):
        _copy_into(name, tensors, tree[name])
    for name, module in _with_extra_state(worker):
        module.set_extra_state(tree["modules"][name])
    if tree["rng"] is not None:
        _set_random_state(tree["rng"], worker.comm.device)
    if tree["in_flight"] and not worker.base.communicates:
        raise SlowmoError(
            f"The state to load has messages in flight, and {type(worker.base).__name__} exchanges none.",
            "Change the base algorithm at a round's boundary.",
        )
    if tree["in_flight"]:
        worker.base.post_again(s, worker.team.across, **tree["in_flight"], vectors=list(tree["packet"].values()))
    elif s.step > 0:
        worker.post()


def for_rank(checkpoint: Checkpoint, comm: Endpoint) -> dict[str, Any]:
    """The tree of this rank, of a checkpoint of as many ranks or, at a round's boundary, of another number of them.

    On another number: z is the workers' average sum(w z) / m, messages in flight included (at a boundary all are
    equal); slow state as it is (without exact average: the mean); what rounding took is the mean, since only that
    counts; the optimizer's floating-point buffers are the mean over workers where all have the same ones.
    Everything else rank i has from the old rank i mod m; push-sum weights are 1; random streams are not restored (rng
    is None). Averages are taken in float64, on all ranks together.
    """
    ranks = checkpoint.ranks
    if ranks == comm.size:
        return checkpoint.tree(comm.rank)
    told = [json.loads(checkpoint.text(r)) for r in range(ranks)]
    same_optimizer = all(t["optimizer"]["state"] == told[0]["optimizer"]["state"] for t in told)
    averaged: dict[str, Tensor] = {}
    for name, (_, shape) in checkpoint.datasets.items():
        kind, flying = name.split("/")[0], False
        of_kind = {"z": "w", "error": "error_parts"}.get(kind)
        terms = {name: [t[of_kind] if of_kind else 1.0 for t in told]}
        if kind == "z" and told[0]["in_flight"]:  # also where z is the same everywhere: what is in flight is older
            flying, terms[name.replace("z/", "packet/")] = True, [t["in_flight"]["sent"] for t in told]
        if flying or (len(shape) == 2 and kind in AVERAGED):
            if kind.startswith("optimizer") and not same_optimizer:
                continue
            averaged[name] = _mean(checkpoint, terms, comm)
    tree = checkpoint.tree(comm.rank % ranks, averaged)
    return tree | {"w": 1.0, "in_flight": None, "begun": tree["step"] - 1, "rng": None}


def _mean(checkpoint: Checkpoint, terms: Mapping[str, list[float]], comm: Endpoint) -> Tensor:
    """1 / ranks * the sum over vectors and ranks r of terms[vector][r] * row r; of whole numbers: row 0.

    Each rank computes its share of the columns.
    """
    name = next(iter(terms))
    first, columns = checkpoint.vector(name, 0, slice(0, 0)), checkpoint.datasets[name][1][-1]
    if not first.dtype.is_floating_point:
        return checkpoint.vector(name, 0)
    mean = torch.zeros(columns, dtype=first.dtype)
    mine = comm.shard(columns)
    total = torch.zeros(mine.stop - mine.start, dtype=torch.float64)
    for vector, weights in terms.items():
        for r, weight in enumerate(weights):
            total.add_(checkpoint.vector(vector, r, mine).double(), alpha=weight)
    mean[mine] = total.div_(checkpoint.ranks).to(mean.dtype)
    return comm.all_gather_(mean, "average of a checkpoint")


def pack_all(worker: SlowMo, extra: Mapping[str, Any] | None) -> Packed:
    """What a checkpoint of this rank holds: its state and the caller's `extra`."""
    try:
        return pack(state_of(worker) | {"extra": dict(extra or {})}, worker.state.flat)
    except SlowmoError as error:  # perhaps this rank's alone, and the others are on their way to write
        return Packed("", {}, (error.message, error.hint))


def describe(worker: SlowMo, layout: str, config: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes and tables of a checkpoint: where each parameter lies, and what the model's state_dict is made of."""
    s = worker.state
    entries = list(zip(s.flat.entries, s.flat.parameters, strict=True))
    tables = {
        "layout/name": [e.name for e, _ in entries],
        "layout/vector": [str(p.dtype).removeprefix("torch.") for _, p in entries],
        "layout/start": np.array([e.start for e, _ in entries]),
        "layout/shape": [json.dumps(list(p.shape)) for _, p in entries],
        "layout/strides": [json.dumps(list(p.stride())) for _, p in entries],
    }
    sources: dict[int, str] = {id(t): f"frozen:{name}" for name, t in frozen(worker).items()}
    sources |= {id(p): f"trained:{e.name}" for e, p in entries}
    sources |= {id(b): f"buffers:{name}" for name, b in worker.model.named_buffers()}
    model = {k: sources[id(t)] for k, t in worker.model.state_dict(keep_vars=True).items() if id(t) in sources}
    tables |= {"model/key": list(model), "model/source": list(model.values())}
    tables["model/averaged"] = [name for name, _ in statistics(worker.model)]
    return attributes_of(s.step, s.round, worker.comm.size, layout, config), tables


def load(worker: SlowMo, checkpoint: Checkpoint, optimizer: bool = True) -> dict[str, Any]:
    """Put the worker where the checkpoint is; the `extra` that was saved with it.

    optimizer: False leaves the optimizer as it is, for one of another kind.
    Raises: SlowmoError where it is of another model, or of another number of ranks in the middle of a round.
    """
    _, tables = describe(worker, "", "")
    for name, mine in tables.items():
        theirs = checkpoint.table(name)
        if name.startswith("layout/") and list(theirs) != list(mine):
            names = checkpoint.table("layout/name"), tables["layout/name"]
            differ = [n for n in dict.fromkeys(names[0] + names[1]) if (n in names[0]) != (n in names[1])]
            if not differ:
                differ = [n for n, a, b in zip(names[1], theirs, mine, strict=True) if a != b]
            raise SlowmoError(
                f"{checkpoint.path} is of another model: parameter {differ[0]} differs ({name.split('/')[1]}).",
                "Build the model and the optimizer as they were when it was written.",
            )
    tau, ranks = worker.tau, worker.comm.size
    if ranks != checkpoint.ranks and tau and checkpoint.step % tau:
        raise SlowmoError(
            f"{checkpoint.path} was written by {checkpoint.ranks} ranks in the middle of a round (step "
            f"{checkpoint.step}, tau {tau}); {ranks} ranks can go on from a round's boundary only.",
            f"Start {checkpoint.ranks} ranks, or give a checkpoint of a step that is a multiple of {tau}.",
        )
    tree = for_rank(checkpoint, worker.comm)
    if not optimizer:
        tree["optimizer"] = state_of(worker)["optimizer"]
    worker.load_state_dict(tree)
    return tree["extra"]


def frozen(worker: SlowMo) -> dict[str, Tensor]:
    """The parameters that are not trained."""
    trained = set(map(id, worker.state.flat.parameters))
    return {name: p for name, p in worker.model.named_parameters() if id(p) not in trained}


def _with_extra_state(worker: SlowMo) -> list[tuple[str, nn.Module]]:
    plain = nn.Module.get_extra_state
    return [(n, m) for n, m in worker.model.named_modules() if type(m).get_extra_state is not plain]


def by_type(flat: FlatParameters, vectors: list[Any]) -> dict[str, Any]:
    """One vector per buffer, by the name of the buffer's type."""
    return {str(b.dtype).removeprefix("torch."): v for b, v in zip(flat.buffers, vectors, strict=False)}


def _whole(worker: SlowMo, kind: str, name: str, error: Tensor) -> Tensor:
    """An error as a whole flat vector, 0 where this rank has no part of it; those of gradients are whole."""
    if kind != "error" or worker.team.ranks == 1:
        return error
    b = by_type(worker.state.flat, worker.state.flat.buffers)[name]
    whole = error.new_zeros(b.numel())
    whole[worker.team.part(b)] = error
    return whole


def _share(worker: SlowMo, vector: Tensor, b: Tensor) -> Tensor | Share:
    """What this rank tells of the slow state of flat vector b: its own part, where the ranks share it."""
    if worker.average == "none":
        return vector
    kept, told = worker.share_of(b), worker.saved_share_of(b)
    return Share(vector[told.start - kept.start : told.stop - kept.start], told, b.numel())


def _own(worker: SlowMo, saved: Tensor | Share, b: Tensor) -> Tensor:
    """The part that this rank keeps of what was told of the slow state of flat vector b."""
    if isinstance(saved, Share):  # of `state_dict`, on every rank its own part
        whole = saved.part.new_empty(saved.total)
        whole[saved.here] = saved.part
        worker.team.across.all_gather_(whole[worker.team.part(b)], "slow state")
        saved = whole
    return saved[worker.share_of(b)]


def _restore_optimizer(worker: SlowMo, saved: Mapping[str, Any]) -> None:
    optimizer, device = worker.optimizer, worker.comm.device
    if saved["kind"] != type(optimizer).__name__:
        raise SlowmoError(
            f"The state to load has buffers of {saved['kind']}, and the optimizer is {type(optimizer).__name__}.",
            "Make the optimizer that it was saved with.",
        )
    parameters: dict[str, Any] = dict(worker.model.named_parameters())

    def home(p: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.shape == p.shape and value.ndim:
            return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
        was_on_device = getattr(value, "on_device", value.device.type != "cpu")
        return value.detach().to(device if was_on_device else "cpu", copy=True)

    state = {
        parameters[n]: {k: home(parameters[n], v) for k, v in entries.items()} for n, entries in saved["state"].items()
    }
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in values.items():
            if isinstance(group.get(key), Tensor):
                group[key].copy_(torch.as_tensor(value))
            else:
                group[key] = value.clone() if isinstance(value, Tensor) else value


def _copy_into(what: str, mine: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in saved.items()}:
        raise SlowmoError(
            f"The state to load is of another model: its {what} differ in names or shapes.",
            "Build the model as it was when it was saved.",
        )
    for name, tensor in mine.items():
        tensor.copy_(saved[name])


def _random_state(device: torch.device) -> dict[str, Any]:
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = legacy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, keys.astype(np.int64), position, has_gauss, cached],
        "python": [version, np.array(words, dtype=np.int64), gauss],
    }


def _set_random_state(saved: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(saved["torch"].clone())
    if device.type == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"].clone(), device)
    kind, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, keys.astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(int(w) for w in words), gauss))
