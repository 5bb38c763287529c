"""The graphs: each family against its dense matrices, and every refusal against its reason."""

import math

import numpy as np
import pytest

from slowmo_mpi.errors import UsageError
from slowmo_mpi.topology import FAMILIES, Edge, Topology, describe, files, load

SPECS = [
    *FAMILIES,
    "base:k=2",
    "base:k=3",
    "equidyn:eta=1",
    "equidyn:eta=0.7,seed=3",
    "hierarchical:node=1",
    "matching:seed=5",
    "grid:rows=1",
    "torus:rows=1",
]
REFUSES = {
    "hypercube": lambda n: n & (n - 1) != 0,
    "bipartite-exponential": lambda n: n > 1 and n % 2 == 1,
}
SYMMETRIC = {
    "ring-bidirectional",
    "bipartite-exponential",
    "hypercube",
    "grid",
    "torus",
    "star",
    "complete",
    "matching",
    "base",
}


def family(spec):
    return spec.partition(":")[0]


def graphs():
    for spec in SPECS:
        for n in range(1, 18):
            if not REFUSES.get(family(spec), lambda n: False)(n):
                yield pytest.param(spec, n, id=f"{spec}-{n}")


def table(*steps, ranks):
    return Topology("t", ranks, tuple(tuple(Edge(*edge) for edge in step) for step in steps))


def write(tmp_path, text):
    path = tmp_path / "graph.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# Every family


@pytest.mark.parametrize(("spec", "n"), list(graphs()))
def test_columns_sum_to_one_and_the_tables_agree_with_the_matrix(spec, n):
    graph = load(spec, n)
    assert graph.name == spec and graph.ranks == n and graph.period == len(graph.steps) >= 1
    for k in range(graph.period):
        dense = graph.matrix(k)
        assert dense.shape == (n, n) and dense.dtype == np.float64
        np.testing.assert_allclose(dense.sum(axis=0), 1, rtol=0, atol=1e-12)
        rebuilt = np.zeros((n, n))
        for rank in range(n):
            rebuilt[rank, rank] = graph.self_weight(k, rank)
            assert graph.self_weight(k, rank) > 0
            for peer, weight in graph.receives(k, rank):
                rebuilt[rank, peer] = weight
                assert (rank, weight) in graph.sends(k, peer)
            assert list(graph.receives(k, rank)) == sorted(graph.receives(k, rank))
            assert rank not in dict(graph.sends(k, rank))
            assert graph.sends(k + graph.period, rank) == graph.sends(k, rank)
        np.testing.assert_array_equal(rebuilt, dense)
        np.testing.assert_allclose(graph.mix(k, np.eye(n)), dense, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("spec", "n"), list(graphs()))
def test_push_sum_in_z_form_equals_the_matrices_and_keeps_the_mass(spec, n):
    """z += rw/(w+rw) (rz - z), w += rw on each message, against X <- P X, W <- P W, Z = X / W."""
    graph = load(spec, n)
    rng = np.random.default_rng(17 * n)
    z, w = rng.standard_normal(n), np.ones(n)
    x, mass = z.copy(), w.copy()
    total = x.sum()
    for k in range(2 * graph.period + 1):
        sent_z, sent_w = z.copy(), w.copy()
        w = np.array([graph.self_weight(k, i) * sent_w[i] for i in range(n)])
        for i in range(n):
            for peer, weight in graph.receives(k, i):
                arriving = weight * sent_w[peer]
                z[i] += arriving / (w[i] + arriving) * (sent_z[peer] - z[i])
                w[i] += arriving
        dense = graph.matrix(k)
        x, mass = dense @ x, dense @ mass
        np.testing.assert_allclose(w, mass, rtol=0, atol=1e-12)
        np.testing.assert_allclose(z, x / mass, rtol=0, atol=1e-11)
        assert abs(w.sum() - n) < 1e-12 * n
        assert abs((w * z).sum() - total) < 1e-11


@pytest.mark.parametrize(("spec", "n"), list(graphs()))
def test_flags_and_rates_are_those_of_the_dense_matrices(spec, n):
    graph = load(spec, n)
    matrices = [graph.matrix(k) for k in range(graph.period)]
    assert graph.symmetric == all(np.allclose(m, m.T, rtol=0, atol=1e-12) for m in matrices)
    assert graph.doubly_stochastic == all(np.allclose(m.sum(axis=1), 1, rtol=0, atol=1e-9) for m in matrices)
    if family(spec) in SYMMETRIC:
        assert graph.symmetric
    assert graph.doubly_stochastic  # true of every family; only files may be otherwise
    product = np.linalg.multi_dot([*reversed(matrices), np.eye(n)])
    np.testing.assert_allclose(graph.cycle, product, rtol=0, atol=1e-13)
    assert 0 <= graph.contraction < 1
    assert graph.spectral_gap == 1 - graph.contraction
    if graph.contraction > 0.05:  # below, a solver's own error on nilpotent blocks is as large
        second = sorted(np.abs(np.linalg.eigvals(product)))[-2]
        assert graph.contraction == pytest.approx(second, abs=1e-6)


@pytest.mark.parametrize(("spec", "n"), list(graphs()))
def test_steps_to_average_is_the_first_step_within_the_tolerance(spec, n):
    graph = load(spec, n)
    steps = graph.steps_to_average(1e-3)
    errors = [error for error, _ in zip(graph.errors(), range(steps + 1), strict=False)]
    assert errors[steps] <= 1e-3
    assert steps == 0 or errors[steps - 1] > 1e-3
    if n > 1:
        assert graph.steps_to_average(1e-3, limit=steps - 1) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_one_rank_keeps_everything(name):
    graph = load(name, 1)
    assert all(edges == (Edge(0, 0, 1.0),) for edges in graph.steps)
    assert graph.period == 1 and graph.symmetric and graph.contraction == 0 and graph.steps_to_average() == 0


@pytest.mark.parametrize("name", REFUSES)
@pytest.mark.parametrize("n", range(1, 18))
def test_a_family_refuses_other_numbers_with_a_reason(name, n):
    if not REFUSES[name](n):
        assert load(name, n).ranks == n
        return
    with pytest.raises(UsageError, match=f"{n}") as refusal:
        load(name, n)
    assert "base" in refusal.value.hint  # what to use instead
    assert not FAMILIES[name].admits.startswith("any")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_registry_documents_every_family(name):
    entry = FAMILIES[name]
    assert entry.name == name and entry.doc and entry.admits and entry.build.__doc__
    for parameter in entry.parameters:
        assert parameter.doc
        with pytest.raises(UsageError, match=parameter.name) as refusal:
            load(f"{name}:{parameter.name}=-1", 8)
        assert f"{name}:{parameter.name}=" in refusal.value.hint


@pytest.mark.parametrize("name", FAMILIES)
def test_large_graphs_load_and_answer(name):
    graph = load(name, 256)
    assert graph.sends(3, 255) and graph.receives(3, 255) and 0 <= graph.contraction < 1


# What the papers claim


@pytest.mark.parametrize("n", range(1, 65))
def test_exponential_is_exact_after_a_cycle_only_for_powers_of_two(n):
    """i -> i + 2^k reaches every distance 0..2^L - 1 once: each rank once iff n = 2^L."""
    far = np.abs(load("exponential", n).cycle - 1 / n).max()
    assert (far < 1e-15) == (n & (n - 1) == 0)


@pytest.mark.parametrize(("n", "error"), [(3, 0.167), (5, 0.075), (6, 0.083), (7, 0.107), (12, 0.042)])
def test_exponential_error_after_a_cycle(n, error):
    assert np.abs(load("exponential", n).cycle - 1 / n).max() == pytest.approx(error, abs=5e-4)


def test_exponential_sends_where_the_paper_says():
    graph = load("exponential", 6)
    assert [graph.sends(k, 4) for k in range(4)] == [((5, 0.5),), ((0, 0.5),), ((2, 0.5),), ((5, 0.5),)]


@pytest.mark.parametrize(("n", "distances"), [(2, [[1]]), (4, [[1, 2]]), (8, [[1, 2], [1, 4], [2, 4]])])
def test_two_peer_exponential_deals_the_distances_around(n, distances):
    graph = load("exponential-two-peer", n)
    assert [[peer for peer, _ in graph.sends(k, 0)] for k in range(graph.period)] == distances


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("n", range(1, 65))
def test_base_is_exact_short_and_narrow_for_any_number(n, k):
    graph = load(f"base:k={k}", n)
    np.testing.assert_allclose(graph.cycle, np.full((n, n), 1 / n), rtol=0, atol=1e-12)
    assert graph.symmetric and graph.doubly_stochastic
    assert graph.period <= 2 * math.log(n, k + 1) + 2 + 1e-9
    degrees = [len(graph.sends(step, rank)) for step in range(graph.period) for rank in range(n)]
    assert max(degrees) <= k
    assert graph.steps_to_average(1e-12) <= graph.period


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
def test_base_of_a_power_of_two_is_as_short_as_a_hypercube(n):
    assert load("base", n).period == load("hypercube", n).period == n.bit_length() - 1


def test_hypercube_and_complete_are_exact():
    assert np.abs(load("hypercube", 16).cycle - 1 / 16).max() < 1e-15
    assert load("complete", 7).steps_to_average() == 1


@pytest.mark.parametrize("n", [2, 3, 4, 9, 16])
@pytest.mark.parametrize("eta", [0.5, 1])
def test_equidyn_is_a_shift_by_the_papers_weights(n, eta):
    graph = load(f"equidyn:eta={eta}", n)
    for k in range(graph.period):
        [(peer, weight)] = graph.sends(k, 0)
        assert weight == pytest.approx(eta * (n - 1) / n)
        for rank in range(n):
            assert graph.sends(k, rank) == (((rank + peer) % n, weight),)
            assert graph.self_weight(k, rank) == pytest.approx(1 - eta + eta / n)


@pytest.mark.parametrize("n", range(2, 18))
def test_matching_pairs_all_but_one_of_an_odd_number(n):
    graph = load("matching", n)
    assert graph.period == 4 * math.ceil(math.log2(n))
    for k in range(graph.period):
        partners = [graph.sends(k, rank) for rank in range(n)]
        assert sum(not partner for partner in partners) == n % 2
        assert all(len(partner) <= 1 for partner in partners)
    assert load("matching", n) == graph


def test_seeds_make_other_tables():
    assert load("matching:seed=1", 8).steps != load("matching:seed=2", 8).steps
    assert load("equidyn:seed=1", 16).steps != load("equidyn:seed=2", 16).steps


def test_hierarchical_averages_in_the_node_then_between_equal_local_ranks():
    graph = load("hierarchical:node=3", 12)
    assert graph.period == 4
    for k in (0, 2):
        assert graph.sends(k, 4) == ((3, 1 / 3), (5, 1 / 3))
    assert graph.sends(1, 4) == ((7, 0.5),) and graph.sends(3, 4) == ((10, 0.5),)
    assert load("hierarchical:node=12", 12).steps == load("complete", 12).steps
    assert load("hierarchical", 16).sends(1, 0) == ((8, 0.5),)
    with pytest.raises(UsageError, match="node=5 does not divide 12") as refusal:
        load("hierarchical:node=5", 12)
    assert "1, 2, 3, 4, 6, 12" in refusal.value.hint


def test_grid_and_torus_neighbours():
    grid, torus = load("grid", 12), load("torus", 12)  # 3 x 4
    assert [peer for peer, _ in grid.sends(0, 5)] == [1, 4, 6, 9]
    assert [peer for peer, _ in grid.sends(0, 0)] == [1, 4]
    assert [peer for peer, _ in torus.sends(0, 0)] == [1, 3, 4, 8]
    assert dict(grid.sends(0, 0))[1] == 1 / 4  # rank 0 has two neighbours, rank 1 three
    np.testing.assert_array_equal(load("torus", 7).matrix(0) > 0, load("ring-bidirectional", 7).matrix(0) > 0)
    assert [peer for peer, _ in load("grid:rows=2", 12).sends(0, 0)] == [1, 6]
    with pytest.raises(UsageError, match="rows=5 does not divide 12"):
        load("grid:rows=5", 12)


def test_bipartite_pairs_even_with_odd_at_odd_distances():
    graph = load("bipartite-exponential", 12)
    assert [graph.sends(k, 0)[0][0] for k in range(graph.period)] == [1, 3, 5, 9]
    for k in range(graph.period):
        assert all((rank + graph.sends(k, rank)[0][0]) % 2 == 1 for rank in range(12))


# Files


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_own_files_are_good_and_found_from_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = describe(path)
    graph = load(path.name, about["ranks"])
    assert about["description"]
    assert graph.steps == load(str(path), about["ranks"]).steps
    assert graph.steps == load(f"topologies/{path.name}", about["ranks"]).steps


def test_own_files_do_what_their_comments_say():
    assert {path.name for path in files()} >= {"two-racks.toml", "star.toml", "torus.toml"}
    assert load("two-racks.toml", 8).contraction == pytest.approx(3 / 4)
    assert load("torus.toml", 9).steps_to_average(1e-12) == 2
    star = load("star.toml", 5)
    assert not star.symmetric and not star.doubly_stochastic
    assert any(describe(path)["ranks"] == 4 for path in files())


def test_a_file_in_the_configs_folder_and_self_weights(tmp_path):
    path = write(tmp_path, "ranks = 2\n[[step]]\nedges = [[0, 1, 0.25], [1, 0, 0.5], [1, 1, 0.5]]\n")
    graph = load("graph.toml", 2, folder=tmp_path)
    assert graph.steps == load(path, 2).steps
    assert (graph.self_weight(0, 0), graph.self_weight(0, 1)) == (0.75, 0.5)
    np.testing.assert_array_equal(graph.matrix(0), [[0.75, 0.5], [0.25, 0.5]])
    assert graph.contraction == pytest.approx(0.25)


STEP = "ranks = 3\n[[step]]\nedges = "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (STEP + "[[0, 1, 0.5], [1, 0, 0.5]]", "rank 2 can never hear from rank 0"),
        (STEP + "[[1, 0, 0.5], [2, 0, 0.5], [2, 1, 0.1]]", "rank 1 can never hear from rank 0"),
        (STEP + "[[0, 1, 0.5], [0, 2, 0.5], [1, 0, 0.5]]", "step 0 of 0-0: rank 0 sends 1 and keeps nothing"),
        (STEP + "[[0, 1, 0.7], [0, 2, 0.5]]", "rank 0 sends 1.2 and keeps nothing"),
        (STEP + "[[0, 1, 0.5], [0, 0, 0.3], [1, 2, 0.5], [2, 0, 0.5]]", "rank 0 keeps and sends sums to 0.8"),
        (STEP + "[[0, 3, 0.5]]", "edge 0 -> 3 names rank 3"),
        (STEP + "[[-1, 0, 0.5]]", "names rank -1"),
        (STEP + "[[0, 1, nan]]", "edge 0 -> 1 has weight nan"),
        (STEP + "[[0, 1, inf]]", "has weight inf"),
        (STEP + "[[0, 1, -0.5]]", "has weight -0.5"),
        (STEP + "[[0, 1, 0]]", "has weight 0"),
        (STEP + "[[0, 1, 0.2], [0, 1, 0.2]]", "edge 0 -> 1 is there 2 times"),
        (STEP + "[[0, 1, 1e-13], [1, 0, 1e-13], [1, 2, 0.3], [2, 1, 0.3]]", "hardly mixes"),
        (STEP + "[[0, 1]]", r"\[0, 1\] is not an edge"),
        (STEP + '[[0, 1, "half"]]', "is not an edge"),
        (STEP + "[[0, true, 0.5]]", "is not an edge"),
        (STEP + "[[0, 1, 0.5]", "not valid TOML"),
        ("ranks = 3\n[[step]]\nedge = []", "step 0: a step has one key"),
        ("ranks = 3\nstep = [1]", "step 0: a step has one key"),
        ("ranks = 3\n", "has no .*step"),
        ("ranks = 3\nstpe = 1\n", "unknown key 'stpe'"),
        ("[[step]]\nedges = []", "does not say for how many ranks"),
        ('ranks = "3"\n', "does not say for how many ranks"),
        ("ranks = 4\n[[step]]\nedges = []", "made for 4 ranks, and there are 3"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path, text, reason):
    with pytest.raises(UsageError, match=reason) as refusal:
        load(write(tmp_path, text), 3)
    assert refusal.value.hint and refusal.value.exit_code == 2


def test_the_step_of_a_fault_is_named(tmp_path):
    good = "[[0, 1, 0.5], [1, 2, 0.5], [2, 0, 0.5]]"
    text = f"ranks = 3\n[[step]]\nedges = {good}\n[[step]]\nedges = [[1, 2, 2.5]]\n"
    with pytest.raises(UsageError, match=r"step 1 of 0-1: rank 1 sends 2\.5"):
        load(write(tmp_path, text), 3)


def test_edges_of_different_steps_connect_together(tmp_path):
    text = "ranks = 3\n" + "".join(f"[[step]]\nedges = [[{i}, {(i + 1) % 3}, 0.5]]\n" for i in range(3))
    assert load(write(tmp_path, text), 3).contraction < 1


def test_a_table_made_by_hand_is_checked_too():
    with pytest.raises(UsageError, match="rank 1 sends 0 and keeps nothing"):
        table([(0, 0, 0.5), (0, 1, 0.5)], ranks=2)
    with pytest.raises(UsageError, match="no steps"):
        Topology("t", 2, ())
    with pytest.raises(UsageError, match="0 ranks"):
        load("ring", 0)


# Names


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("exponentail", "Did you mean 'exponential'?"),
        ("hyper-cube", "Did you mean 'hypercube'?"),
        ("xyzzy", "Choose one of exponential, "),
        ("base:q=2", "Type base or base:k=1"),
        ("hierarchical:nodes=2", "Did you mean 'node'?"),
        ("base:k=two", "base:k=2"),
        ("base:k=0", "base:k=2"),
        ("base:k=1.5", "base:k=2"),
        ("equidyn:eta=0", "equidyn:eta=0.5"),
        ("equidyn:eta=nan", "equidyn:eta=0.5"),
        ("equidyn:eta=1.01", "equidyn:eta=0.5"),
        ("base:k", "Type base or base:k=1"),
        ("base:", "Type base or base:k=1"),
        ("base:k=1,k=2", "Keep one k="),
        ("ring:k=1", "ring alone"),
        ("no-such-file.toml", "slowmo topology list"),
        ("two-rakcs.toml", "Did you mean 'two-racks.toml'?"),
    ],
)
def test_a_wrong_name_says_what_to_type(spec, says):
    with pytest.raises(UsageError) as refusal:
        load(spec, 8)
    assert says in refusal.value.hint
    key = spec.partition(":")[2].partition("=")[0]
    assert key in refusal.value.message


def test_a_table_cannot_be_changed():
    graph = load("ring", 3)
    with pytest.raises(AttributeError):
        graph.ranks = 4
    with pytest.raises(TypeError):
        graph.steps[0][0] = Edge(0, 0, 1.0)
