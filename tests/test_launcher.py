"""What launchers say, by tables true to their documentation, and by real ones; where the ranks are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slowmo_mpi.comm.launcher import Launch, check_world, launched
from slowmo_mpi.comm.placement import Place, check_devices, fold, numbers, ranges, warnings
from slowmo_mpi.errors import SlowmoError, UsageError

OPENMPI, MPICH = "Open MPI v5.0.11", "MPICH Version: 4.0.2"

# ---- claims: one table per launcher, rank 5 of 8, the second of two ranks on its host ----
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURMD_NODENAME": "n3",
}  # fmt: skip
DAEMONS = {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURMD_NODENAME": "n3",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "1", "OMPI_UNIVERSE_SIZE": "8", "PMIX_RANK": "5",
    "PMIX_NAMESPACE": "prterun-n1-1@1",
}  # fmt: skip
HYDRA = {"PMI_FD": "9", "PMI_SIZE": "8", "PMI_RANK": "5", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {
    "PALS_RANKID": "5", "PALS_NODEID": "2", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2", "PALS_DEPTH": "8",
    "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2", "PMI_CONTROL_PORT": "20000",
}  # fmt: skip
SHASTA = {"PALS_RANKID": "5", "PALS_NODEID": "2", "PALS_LOCAL_RANKID": "1", "PMI_RANK": "5", "PMI_SIZE": "8"}
MVAPICH = {
    "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2", "PMI_ID": "5", "PMI_SIZE": "8", "PMI_RANK": "5",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "launcher", "local", "node", "pmix"),
    [
        (OPEN_MPI, "Open MPI's mpirun", (1, 2), "", True),
        (OPEN_MPI | DAEMONS, "Open MPI's mpirun", (1, 2), "n3", True),
        (HYDRA, "mpiexec (Hydra: MPICH, Intel MPI)", (1, 2), "", False),
        (HYDRA | {"I_MPI_ROOT": "/opt/intel"}, "mpiexec (Hydra: MPICH, Intel MPI)", (1, 2), "", False),
        (HYDRA | DAEMONS, "mpiexec (Hydra: MPICH, Intel MPI)", (1, 2), "n3", False),
        (STEP, "srun", (1, 2), "n3", False),
        (STEP | {"PMIX_RANK": "5", "PMIX_NAMESPACE": "slurm.pmix.7.0"}, "srun", (1, 2), "n3", True),
        (STEP | {"PMI_FD": "9", "PMI_RANK": "5", "PMI_SIZE": "8"}, "srun", (1, 2), "n3", False),
        (STEP | SHASTA, "srun", (1, 2), "n3", False),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),1,1"}, "srun", (1, 1), "n3", False),
        (PALS, "mpiexec (PALS)", (1, 2), "", False),
        (MVAPICH, "MVAPICH's mpirun", (1, 2), "", False),
        ({"PMI_SIZE": "8", "PMI_RANK": "5"}, "mpiexec (Hydra or its like)", (-1, 0), "", False),
    ],
)
def test_what_a_launcher_claims(
    environment: dict[str, str], launcher: str, local: tuple[int, int], node: str, pmix: bool
) -> None:
    assert launched(environment) == Launch(launcher, 8, 5, *local, node, pmix)


def test_aprun_does_not_say_how_many() -> None:
    claim = launched({"ALPS_APP_PE": "5", "ALPS_APP_DEPTH": "1"})
    assert claim == Launch("aprun", 0, 5)
    check_world(claim, 8, MPICH)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,  # the script of sbatch
        STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell, on the node
        {"PMI_SIZE": "three", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
    ],
)
def test_nobody_has_launched_this(environment: dict[str, str]) -> None:
    assert launched(environment) is None


# ---- launchers and MPIs that do not belong together ----
@pytest.mark.parametrize(
    ("claim", "joined", "library", "words"),
    [
        (Launch("srun", 8, 5), 1, OPENMPI, ["each is alone", "same PMI", "srun --mpi=pmix", "--mpi=list"]),
        (Launch("srun", 8, 5, pmix=True), 1, OPENMPI, ["PMIx", "`mpirun` in place of `srun`"]),
        (Launch("srun", 8, 5), 1, MPICH, ["srun --mpi=pmi2"]),
        (Launch("srun", 8, 5), 1, "Intel(R) MPI Library 2021.9", ["srun --mpi=pmi2", "I_MPI_PMI_LIBRARY"]),
        (Launch("srun", 8, 5), 1, "CRAY MPICH version 8.1.28", ["srun --mpi=cray_shasta"]),
        (Launch("Open MPI's mpirun", 8, 5), 1, MPICH, ["belongs to another MPI", "slowmo train -n N", "MPICH Version"]),
        (Launch("mpiexec (Hydra: MPICH, Intel MPI)", 8, 5), 1, OPENMPI, ["another MPI", "slowmo train -n N"]),
        (Launch("mpiexec (PALS)", 8, 5), 1, OPENMPI, ["--no-binary=mpi4py"]),
        (Launch("srun", 8, 5), 4, OPENMPI, ["only 4 meet"]),
    ],
)
def test_a_wrong_combination_is_named(claim: Launch, joined: int, library: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as told:
        check_world(claim, joined, library)
    for word in [f"{claim.launcher} started 8 processes", *words, "slowmo doctor"]:
        assert word in str(told.value)


def test_a_right_combination_is_none() -> None:
    check_world(None, 1, OPENMPI)
    check_world(Launch("srun", 8, 5), 8, OPENMPI)


JOIN = """
from slowmo_mpi.comm.launcher import check_world, launched, load_mpi
MPI = load_mpi()
try:
    check_world(launched(), MPI.COMM_WORLD.Get_size(), MPI.Get_library_version())
    print("joined", MPI.COMM_WORLD.Get_size())
except Exception as error:
    print("refused", " ".join(str(error).split()))
"""


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False
    )


@pytest.mark.parametrize("launcher", ["mpirun.openmpi", "mpiexec.mpich"])
def test_the_systems_launcher_with_this_mpi(launcher: str, mpirun: str, environment: dict[str, str]) -> None:
    """Two ranks that join, or two that are told: never two that train alone."""
    from slowmo_mpi.launch import mpirun_version

    path = shutil.which(launcher)
    if path is None:
        pytest.skip(f"there is no {launcher} here")
    ours = "Open MPI" if "Open" in mpirun_version(mpirun) else "MPICH"
    done = run([path, "-n", "2", sys.executable, "-c", JOIN], environment)
    said = [line for line in done.stdout.splitlines() if line.startswith(("joined", "refused"))]
    if ("openmpi" in launcher) == (ours == "Open MPI"):
        assert said == ["joined 2"] * 2, done.stderr
    else:
        assert len(said) == 2 and all("started 2 processes" in line and "each is alone" in line for line in said), said


HANG = """
import os, time
import slowmo_mpi.comm.launcher as launcher
if launcher.launched().rank == 1:
    time.sleep(600)
launcher.WAITING_S, launcher.LOST_S = 0.5, 1.5
launcher.load_mpi()
"""


def test_a_rank_that_never_starts_mpi_is_told_of(mpirun: str, environment: dict[str, str]) -> None:
    """The others hang in MPI_Init, which holds Python's lock."""
    done = run([mpirun, "-n", "2", sys.executable, "-c", HANG], environment)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("slowmo: ")]
    assert len(told) == 2, done.stderr
    assert "Rank 0 of 2 on" in told[0] and "has waited 0 s for the others in MPI_Init" in told[0]
    assert "It is ended." in told[1] and "A rank is missing or late" in done.stderr


# ---- where the ranks are ----
def place(
    rank: int, host: str = "n1", leader: int = 0, of: int = 2, cores: str = "0-7", gpu: str = "", **more
) -> Place:
    return Place(rank, host, leader, rank - leader, of, more.pop("claim", None), cores, gpu, **more)


def test_ranks_on_the_same_core_are_told() -> None:
    same = [place(0, cores="0"), place(1, cores="0"), place(2, "n2", 2, cores="0"), place(3, "n2", 2, cores="0")]
    assert warnings(same, 8) == [
        "2 ranks are bound to core 0 of n[1-2], and take turns there: see --bind-to, --cpus-per-task."
    ]
    assert warnings([place(0, cores="0"), place(1, cores="1")], 8) == []
    assert warnings([place(0, cores="0,8"), place(1, cores="0,8")], 16) == []  # two threads of a core
    assert warnings([place(r, of=16, cores="0-7") for r in range(16)], 8) == []  # not bound, only too many


def test_gpus_that_are_shared_are_told() -> None:
    def on(*gpus: str, seen: int) -> list[str]:
        return warnings([place(r, of=len(gpus), gpu=g, gpus=seen) for r, g in enumerate(gpus)], 8)

    assert on("a", "b", seen=2) == []
    assert on("a", "b", seen=1) == []  # one GPU per task, each of them cuda:0
    assert on("a", "a", seen=1) == ["2 ranks share 1 GPU on n1."]
    assert on("a", "b", "a", "b", seen=2) == ["4 ranks share 2 GPUs on n1."]
    assert on("a", "a", seen=4) == ["2 ranks share 1 GPU of 4 on n1."]


def test_ranks_in_containers_of_their_own_are_told() -> None:
    claims = [Launch("srun", 2, r, r, 2) for r in range(2)]
    apart = [place(r, f"c{r}", r, 1, gpu="a", gpus=4, claim=claims[r]) for r in range(2)]
    same, memory = warnings(apart, 8)
    assert same.startswith("Ranks 0-1 on c[0-1] have the same GPU, but share no memory")
    assert memory.startswith("srun says that it started 2 ranks on c[0-1], and MPI that 1 shares memory there")


def test_a_rank_without_a_gpu_among_ranks_with_one_is_an_error() -> None:
    check_devices([place(0), place(1)])
    check_devices([place(0, gpu="a"), place(1, gpu="b")])
    with pytest.raises(SlowmoError, match=r"Rank 1 on n1 see no GPU") as told:
        check_devices([place(0, gpu="a"), place(1)])
    assert "CUDA_VISIBLE_DEVICES" in told.value.hint


def test_numbers_and_names_are_folded() -> None:
    assert ranges([3, 0, 1, 2, 8]) == "0-3,8"
    assert numbers("0-3,8") == [0, 1, 2, 3, 8]
    assert ranges([]) == "" and numbers("") == []
    assert fold(["n1", "n2", "n4"]) == "n[1-2,4]"
    assert fold(["n008", "n009", "n010"]) == "n[008-010]"
    assert fold(["login", "x1c0", "x1c1"]) == "login, x1c[0-1]"
    assert fold(["n1"]) == "n1" and fold([]) == ""


CORES = """
from slowmo_mpi.comm import Communicator
comm = Communicator()
if comm.rank == 0:
    print(comm.places[1].local_rank, comm.places[1].cores, comm.warnings)
"""


def test_real_ranks_on_one_core(mpirun: str, environment: dict[str, str], tmp_path: Path) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core cannot be the wrong one")
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}})\n{CORES}"
    done = run([mpirun, "-n", "2", sys.executable, "-c", code], environment)
    assert done.stdout.startswith(f"1 {core} ['2 ranks are bound to core {core} of "), done.stderr
