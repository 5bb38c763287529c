"""Worlds to run a program in: N simulated ranks in this process, or N real ranks under mpirun.

`world.run(program, *args)` calls `program(comm, *args)` on every rank and gives back what each returned, by rank.
Starting ranks costs seconds, so a real world is started once and serves many programs: this file, run as a script
under mpirun, is the server. A program that fails or hangs ends its world, and the next one gets a new one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WAIT_S = 15.0  # of the ranks for each other
PROGRAM_S = 120.0  # for a program, and for the start


class RankError(Exception):
    """A program failed on a rank; the text is that rank's traceback."""


class Simulated:
    """N ranks in this process."""

    def __init__(self, ranks: int):
        self.ranks = ranks

    def run(self, program: Callable[..., Any], *args: Any) -> list[Any]:
        from slowmo_mpi import simulate

        return simulate(self.ranks, program, *args)


class Real:
    """N processes under mpirun, kept between programs."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self._job: subprocess.Popen[bytes] | None = None
        self._connections: list[Connection] = []

    def run(self, program: Callable[..., Any], *args: Any) -> list[Any]:
        if self._job is None:
            self._start()
        request = pickle.dumps((program, args))
        for connection in self._connections:
            connection.send_bytes(request)
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {c: r for r, c in enumerate(self._connections)}
        try:
            while waiting:
                ready = wait(list(waiting), PROGRAM_S)
                if not ready:
                    raise RankError(f"ranks {sorted(waiting.values())} did not answer in {PROGRAM_S} s")
                for connection in ready:
                    answers[waiting.pop(connection)] = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            self.stop()
            raise RankError("a rank died") from None
        except RankError:
            self.stop()
            raise
        failed = [r for r in range(self.ranks) if not answers[r][0]]
        if failed:
            self.stop()
            raise RankError("\n".join(f"rank {r}:\n{answers[r][1]}" for r in failed))
        return [answers[r][1] for r in range(self.ranks)]

    def _start(self) -> None:
        from slowmo_mpi.launch import mpirun_command

        folder = tempfile.mkdtemp(prefix="slowmo-world-")
        address = f"{folder}/s"
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        command = mpirun_command(self.ranks, [sys.executable, str(HERE / "worlds.py"), address])
        try:
            with Listener(address, "AF_UNIX", backlog=self.ranks) as listener:
                listener._listener._socket.settimeout(PROGRAM_S)  # type: ignore[attr-defined]
                self._job = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
                found: dict[int, Connection] = {}
                for _ in range(self.ranks):
                    connection = listener.accept()
                    found[connection.recv()] = connection
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._connections = [found[r] for r in range(self.ranks)]

    def stop(self) -> None:
        """End the ranks: by closing their connections, and if that is not enough by force."""
        for connection in self._connections:
            connection.close()
        self._connections = []
        if self._job is not None:
            try:
                self._job.wait(10.0)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._job.pid, signal.SIGKILL)
                self._job.wait()
            self._job = None


def serve(address: str) -> None:
    """One rank: run what the test process sends until it hangs up."""
    import torch

    from slowmo_mpi import Communicator

    torch.set_num_threads(1)
    comm = Communicator(timeout=WAIT_S, device="cpu")
    with Client(address, "AF_UNIX") as connection:
        connection.send(comm.rank)
        while True:
            while not connection.poll(0.02):  # MPI may owe a peer the last word about a message: see to it meanwhile
                comm.mpi.Iprobe()
            try:
                program, args = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                answer = (True, program(comm, *args))
            except BaseException:
                answer = (False, traceback.format_exc())
            connection.send_bytes(pickle.dumps(answer))
            if not answer[0]:
                comm.abort(1)


if __name__ == "__main__":
    serve(sys.argv[1])
