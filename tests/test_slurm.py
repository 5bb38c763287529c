"""Jobs under a real Slurm (benchmarks/slurmlab.py), from `slowmo job --submit` to the end of the run.

Whatever happens to a job, the run's numbers must come out as if nothing had. The stories do not depend on the
machine's speed: a run dawdles in its first lives, so that what is done to it always comes in mid-run, and hurries in
the last. One cluster for all, in which three long stories go on beside the others: h1 and h2 are never lost, h4 is, h5
takes its place, and h6 is given away and back.

Links are slow enough that it is not the machine's load which limits them: `slowmo doctor` looks at them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_resume import begin, lines

from slowmo_mpi import config, simulate
from slowmo_mpi.errors import SlowmoError

if TYPE_CHECKING:
    from slurmlab import Cluster

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LIMIT_S = 400  # of a story; on an idle machine none takes a quarter of it
PACED = """
import os, time
from slowmo_mpi.tasks.quadratic import quadratic


def make(context, *, slow_lives: int = 0, useless: bool = False):
    if useless:
        os._exit(75)
    task = quadratic(context)
    loss, dawdles = task.loss, int(os.environ.get("SLURM_RESTART_COUNT", 0)) < slow_lives

    def paced(model, batch):
        time.sleep(0.15 * dawdles)
        return loss(model, batch)

    task.loss = paced
    return task
"""
STEPS, EVERY = 400, 20
CONFIG = f"""
[run]
name = "a story"
steps = {STEPS}
log_every = 50
[task]
name = "paced:make"
[optimizer]
lr = 0.01
momentum = 0.9
[slowmo]
tau = 12
[checkpoint]
every = {EVERY}
"""
# TCP alone, as between hosts. Not OMPI_MCA_mpi_yield_when_idle, though ranks outnumber cores: under a Linux 6.18 ranks
# that call sched_yield in a loop, each in a session of its own, can stop the whole machine for minutes.
# Two stories are enough for doctor, whom a job does not ask again once it has been content.
SITE = """
scheduler = "slurm"
{launcher}
setup = [{setup}]
[environment]
OMPI_ALLOW_RUN_AS_ROOT = "1"
OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = "1"
OMPI_MCA_pml = "ob1"
OMPI_MCA_btl = "tcp,self"
OMPI_MCA_btl_tcp_if_include = "e0"
"""
SITES = {
    "srun": 'launcher = "srun"\nmpi = "pmix"',
    "srun-four": 'launcher = "srun"\nmpi = "pmix"',
    "srun-pair": 'launcher = "srun"\nmpi = "pmix"\ndirectives = ["--nodelist=h1,h2"]',
    "srun-slow": 'launcher = "srun"\nmpi = "pmix"\ndirectives = ["--nodelist=h1,h2,h5,h6"]',
    "srun-last": 'launcher = "srun"\nmpi = "pmix"\ndirectives = ["--nodelist=h6"]',
    "srun-alone": 'launcher = "srun"\nmpi = "none"\ndirectives = ["--nodelist=h1,h2"]',
    "mpirun-pair": 'launcher = "openmpi"\ndirectives = ["--nodelist=h1,h2"]',
}
ASKED = ("srun", "srun-alone", "srun-slow")  # doctor is, here


class Story:
    """A job submitted by `slowmo job`, and what becomes of it."""

    def __init__(self, cluster: Cluster, place: Path, site: str, *words: str, **settings: Any):
        place.mkdir()
        (place / "paced.py").write_text(PACED)
        (place / "run.toml").write_text(CONFIG)
        setup = "" if site in ASKED else "'touch \"$folder/doctor.txt\"'"
        (place / f"{site}.toml").write_text(SITE.format(launcher=SITES[site], setup=setup))
        path = os.pathsep.join(p for p in (str(place), os.environ.get("PYTHONPATH")) if p)
        flags = [word for k, v in settings.items() for word in ("--set", f"task.{k}={json.dumps(v)}")]
        self.cluster = cluster
        self.job = cluster.submit(
            [sys.executable, "-m", "slowmo_mpi", "job", "run.toml", "--site", f"{site}.toml", "--submit",
             *flags, *words],
            cwd=place, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        (self.folder,) = (place / "runs").glob("*-job-*")

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    @property
    def run(self) -> Path:
        """The run folder; one, however many lives the run had."""
        (folder,) = (p.parent for p in self.folder.glob("*/manifest.json"))
        return folder

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.run / "manifest.json").read_text())

    def ends(self) -> list[dict[str, Any]]:
        """The attempts that came to their own end, as job.jsonl has them."""
        records = [json.loads(line) for line in (self.folder / "job.jsonl").read_text().splitlines()]
        return [r for r in records if r["event"] == "ended"]

    def status(self) -> dict[str, Any]:
        """What `slowmo job status` says of it."""
        done = self.cluster.run([sys.executable, "-m", "slowmo_mpi", "job", "status", str(self.folder), "--json"])
        assert done.returncode == 0, done.stderr
        (status,) = json.loads(done.stdout)
        return status

    def until(self, true: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not true():
            assert time.monotonic() < deadline, f"{what}: not in {LIMIT_S} s\n{self.cluster.job(self.job)}\n{self.log}"
            time.sleep(0.2)

    def under_way(self, life: int = 1) -> None:
        """Wait until this life has written a checkpoint of its own."""
        self.until(lambda: self.log.count("run folder") >= life, f"life {life}")
        before = self.checkpoints()
        self.until(lambda: self.checkpoints() - before, f"a checkpoint of life {life}")

    def checkpoints(self) -> set[str]:
        return {path.name for path in self.folder.glob("*/checkpoints/step-*.h5")}

    def ended(self, state: str = "COMPLETED") -> dict[str, str]:
        """Wait for the job's end, which must be this one."""
        try:
            job = self.cluster.wait(self.job, limit_s=LIMIT_S)
        except SlowmoError as error:
            pytest.fail(f"{error}\n{self.log}")
        assert job["JobState"] == state, self.log
        return job


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The cluster; where none can be made the tests skip, but in CI that is a failure."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from slurmlab import Cluster
    finally:
        sys.path.remove(str(BENCHMARKS))
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Cluster(nodes=6, rate="100mbit"))
        except SlowmoError as error:
            if os.environ.get("SLOWMO_CI"):
                raise
            pytest.skip(str(error))
        yield made


# The long stories: begun first, asked for last.
@pytest.fixture(scope="module")
def time_limit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A limit of one minute, of which 15 s are for the warning."""
    place = tmp_path_factory.mktemp("slurm") / "job"
    return Story(cluster, place, "srun-pair", "--nodes=2", "--ranks-per-node=2", "--time=1m", slow_lives=2)


@pytest.fixture(scope="module")
def useless(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A job that stops early each time, without a step done."""
    return Story(cluster, tmp_path_factory.mktemp("slurm") / "job", "srun-pair", "--nodes=2", useless=True)


@pytest.fixture(scope="module")
def lost_node(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A job on h1 to h4, and h4 loses its power."""
    place = tmp_path_factory.mktemp("slurm") / "job"
    story = Story(cluster, place, "srun-four", "--nodes=4", slow_lives=1)
    story.under_way()
    assert story.manifest["hosts"] == ["h1", "h2", "h3", "h4"]
    cluster.power_off("h4")
    return story


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of four ranks that nothing happens to."""
    place = tmp_path_factory.mktemp("undisturbed")
    (place / "paced.py").write_text(PACED)
    sys.path.insert(0, str(place))
    simulate(4, begin, config.parse(CONFIG, "a test"), place)
    sys.path.remove(str(place))
    return place


def same_as(undisturbed: Path, run: Path) -> None:
    assert lines(run) == lines(undisturbed)
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (undisturbed, run)]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])


def test_doctor_meets_four_nodes_under_srun_and_the_run_is_that_of_simulated_ranks(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    story = Story(cluster, tmp_path / '$(touch it); it\'s "a" folder', "srun", "--nodes=4")
    story.ended()  # it would not have trained after a fault
    doctor = (story.folder / "doctor.txt").read_text()
    assert "4 ranks on 4 hosts" in doctor and "h[1-4]" in doctor, doctor
    assert story.manifest["hosts"] == ["h1", "h2", "h3", "h4"]
    same_as(undisturbed, story.run)


@pytest.mark.usefixtures("time_limit", "useless")
def test_srun_without_mpi_is_named_before_anything_is_trained(cluster: Cluster, tmp_path: Path) -> None:
    story = Story(cluster, tmp_path / "job", "srun-alone", "--nodes=2")
    story.ended("FAILED")
    assert "--mpi=" in story.log, story.log
    assert not list(story.folder.glob("*/manifest.json"))


@pytest.mark.usefixtures("lost_node")
def test_a_sweep_is_a_job_array(cluster: Cluster, tmp_path: Path) -> None:
    story = Story(cluster, tmp_path / "job", "srun-pair", "--nodes=2", "--array=slowmo.beta=0.0,0.5")
    for task in ("1", "2"):
        assert cluster.wait(f"{story.job}_{task}", limit_s=LIMIT_S)["JobState"] == "COMPLETED", story.log
        (manifest,) = story.folder.glob(f"{task}/*/manifest.json")
        assert json.loads(manifest.read_text())["result"] == "done"
        assert config.load(str(manifest.with_name("config.toml")), ()).slowmo.beta == (0.0, 0.5)[int(task) - 1]


def test_mpirun_hands_on_the_warning_and_loses_a_daemon(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """The first life is warned; the second loses all that it has on a node, while Slurm lives on there and sees no
    fault. (Open MPI 5's mpirun then ends with code 0.)"""
    story = Story(
        cluster, tmp_path / "job", "mpirun-pair", "--nodes=2", "--ranks-per-node=2", "--time=1h", slow_lives=2
    )
    story.under_way()
    cluster.ask("scancel", "--batch", "--signal=USR1", story.job)
    story.until(lambda: story.ends(), "the end of the first life")
    story.under_way(life=2)
    cluster.kill_ranks("h2", story.job)
    story.ended()
    same_as(undisturbed, story.run)
    first, second, last = (end["exit_code"] for end in story.ends())
    assert first == 75 and second not in (0, 75) and last == 0
    assert story.manifest["lives"][0]["reason"] == "SIGUSR1"


def test_a_more_urgent_job_takes_a_node_and_gives_it_back(cluster: Cluster, tmp_path: Path) -> None:
    story = Story(cluster, tmp_path / "job", "srun-last", "--ranks-per-node=2", slow_lives=1)
    story.under_way()
    urgent = ["--partition=urgent", "--exclusive", "--nodelist=h6", "--wrap=true", "--output=/dev/null"]
    cluster.wait(cluster.submit(["sbatch", "--parsable", *urgent]))
    assert story.ended()["Restarts"] == "1"
    assert story.manifest["result"] == "done" and story.manifest["resumed_at_step"] >= EVERY
    assert story.manifest["lives"][0]["reason"] == "SIGTERM"


def test_scancel_ends_a_job_with_a_checkpoint_and_for_good(cluster: Cluster, tmp_path: Path) -> None:
    story = Story(cluster, tmp_path / "job", "srun-last", "--ranks-per-node=2", slow_lives=9)
    story.under_way()
    status = story.status()
    assert (status["job"], status["state"], status["steps"]) == (story.job, "RUNNING", STEPS)
    assert status["checkpoint_step"] >= EVERY and status["run"] == str(story.run)
    cluster.ask("scancel", story.job)
    story.ended("CANCELLED")
    story.until(lambda: "reason" in story.manifest, "the last checkpoint")
    assert story.manifest["reason"] == "SIGTERM"
    assert f"step-{story.manifest['step']:08}.h5" in story.checkpoints()


def test_attempts_that_come_no_further_are_limited(useless: Story) -> None:
    useless.ended("FAILED")
    assert [end["exit_code"] for end in useless.ends()] == [75, 75, 75]
    assert "3 attempts came no further than step 0" in useless.log


def test_a_node_that_loses_its_power_is_replaced(lost_node: Story, undisturbed: Path) -> None:
    """Nobody tells the ranks: Slurm misses the node, ends what is left, and starts the job with the spare one."""
    assert lost_node.ended()["Restarts"] == "1"
    assert "Node failure on h4" in lost_node.log
    assert lost_node.manifest["hosts"] == ["h1", "h2", "h3", "h5"]
    assert lost_node.manifest["resumed_at_step"] >= EVERY
    same_as(undisturbed, lost_node.run)


def test_a_time_limit_far_too_short_is_only_a_matter_of_time(time_limit: Story, undisturbed: Path) -> None:
    """Slurm's own warning before its own limit."""
    job = time_limit.ended()
    same_as(undisturbed, time_limit.run)
    *stopped, last = time_limit.ends()
    assert len(stopped) >= 2 and {end["exit_code"] for end in stopped} == {75} and last["exit_code"] == 0
    assert job["Restarts"] == str(len(stopped))
    assert {life["reason"] for life in time_limit.manifest["lives"]} == {"SIGUSR1"}
    steps = [end["step"] for end in time_limit.ends()]
    assert steps == sorted(set(steps))


def test_a_slow_link_is_named_and_nothing_is_trained(cluster: Cluster, tmp_path: Path) -> None:
    cluster.slow_down("h6", "10mbit")
    story = Story(cluster, tmp_path / "job", "srun-slow", "--nodes=4")
    story.ended("FAILED")
    assert [(end["exit_code"], end["step"]) for end in story.ends()] == [(3, 0)]
    assert "h6 is slow: sends 1 MB/s" in story.log and "nothing was trained" in story.log, story.log
    assert not list(story.folder.glob("*/manifest.json"))
