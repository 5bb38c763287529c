"""The sampler is a pure function of the step: disjoint, complete, the same for any number of ranks."""

import random

import pytest
import torch

from slowmo_mpi.errors import UsageError
from slowmo_mpi.tasks.sampler import Shards, share


def ranks_of(samples, ranks, batch_size, seed=0):
    return [Shards(samples, ranks, rank, batch_size, seed) for rank in range(ranks)]


@pytest.mark.parametrize(("samples", "ranks", "batch_size"), [(24, 3, 4), (100, 4, 7), (7, 1, 7), (50, 5, 1)])
def test_an_epoch_is_disjoint_and_leaves_less_than_a_step_over(samples, ranks, batch_size):
    shards = ranks_of(samples, ranks, batch_size)
    steps = shards[0].steps_per_epoch
    assert steps == samples // (ranks * batch_size)
    for epoch in (0, 3):
        seen = [int(i) for shard in shards for k in range(steps) for i in shard.indices(epoch * steps + k)]
        assert len(seen) == len(set(seen)) == steps * ranks * batch_size > samples - ranks * batch_size
        assert set(seen) <= set(range(samples))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_share_the_global_batch_that_one_rank_would_see(ranks):
    alone = Shards(1000, 1, 0, 12, seed=5)
    together = ranks_of(1000, ranks, 12 // ranks, seed=5)
    assert together[0].steps_per_epoch == alone.steps_per_epoch
    for step in (0, 1, alone.steps_per_epoch - 1, alone.steps_per_epoch, 1000):
        assert torch.equal(torch.cat([shard.indices(step) for shard in together]), alone.indices(step))


def test_any_order_of_steps_gives_the_same_indices():
    one = Shards(200, 2, 1, 8, seed=3)
    in_order = [one.indices(step) for step in range(60)]
    steps = list(range(60))
    random.Random(0).shuffle(steps)
    other = Shards(200, 2, 1, 8, seed=3)
    assert all(torch.equal(other.indices(step), in_order[step]) for step in steps)


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        return Shards(64, 1, 0, 64, seed).indices(number).tolist()

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0), epoch(1, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_indices_are_int64_and_the_callers_own():
    shard = Shards(40, 2, 0, 5, seed=0)
    first = shard.indices(0)
    assert first.dtype == torch.int64 and first.shape == (5,)
    kept = first.clone()
    first.zero_()
    assert torch.equal(shard.indices(0), kept)


def test_epoch_of_a_step():
    shard = Shards(40, 2, 0, 5, seed=0)
    assert [shard.at(step)[0] for step in (0, 3, 4, 8)] == [0, 0, 1, 2]


def test_too_few_samples_name_the_numbers():
    with pytest.raises(UsageError) as error:
        Shards(100, 4, 0, 32, seed=0)
    assert "128" in error.value.message and "100" in error.value.message
    assert "task.batch_size to 25" in error.value.hint
    with pytest.raises(UsageError, match="Start 3 ranks or fewer"):
        Shards(3, 4, 0, 1, seed=0)


def test_refuses_what_no_rank_can_be():
    with pytest.raises(UsageError, match="batch_size = 0"):
        Shards(10, 1, 0, 0, seed=0)
    with pytest.raises(ValueError, match="rank 2"):
        Shards(10, 2, 2, 1, seed=0)
    with pytest.raises(ValueError, match="before the first"):
        Shards(10, 1, 0, 1, seed=0).indices(-1)


def test_going_on_is_as_if_it_had_not_ended():
    """From any step, with as many ranks: the same samples, the same times to the bit, the same end."""
    whole = Shards(103, 2, 1, 5, seed=3)
    for step in range(0, 35):
        on = Shards(103, 2, 1, 5, seed=3, start=(step, *whole.at(step)))
        for later in range(step, step + 25):
            assert torch.equal(on.indices(later), whole.indices(later))
            assert (on.time(later), on.at(later)) == (whole.time(later), whole.at(later))
        for epochs in range(whole.at(step)[0], 6):
            assert on.steps(epochs) == max(whole.steps(epochs), step)


def test_another_number_of_ranks_goes_on_in_the_same_epoch():
    """What is left of the epoch is shared out anew: no sample comes twice, and less than a step is left over."""
    before = ranks_of(103, 4, 3)
    seen = [int(i) for shard in before for step in range(5) for i in shard.indices(step)]
    assert before[0].at(5) == (0, 60)
    after = [Shards(103, 3, rank, 4, 0, start=(5, 0, 60)) for rank in range(3)]
    assert [s.steps(1) for s in after] == [5 + 43 // 12] * 3
    seen += [int(i) for shard in after for step in range(5, 8) for i in shard.indices(step)]
    assert len(seen) == len(set(seen)) == 60 + 36
    assert after[0].at(8) == (1, 0) and after[0].time(8) == 1.0 and after[0].steps(3) == 8 + 2 * (103 // 12)
    assert after[0].time(5) == pytest.approx(60 / 12 / (103 // 12))


@pytest.mark.parametrize("samples", [0, 1, 3, 10, 10_000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shares_are_disjoint_complete_and_even(samples, ranks):
    shares = [share(samples, ranks, rank) for rank in range(ranks)]
    assert [i for part in shares for i in part] == list(range(samples))
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1
