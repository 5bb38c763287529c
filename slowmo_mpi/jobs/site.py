"""What a site is like: scheduler, launcher, network, modules, read from a TOML file, strictly."""

from __future__ import annotations

import dataclasses
import shutil
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import shipped
from ..config import toml_value
from ..errors import UsageError, did_you_mean

SCHEDULERS = ("slurm", "pbs", "torque", "none")
LAUNCHERS = ("srun", "openmpi", "hydra", "pals", "slowmo")


def key(default: Any, doc: str, choices: tuple[str, ...] = ()) -> Any:
    """A key of a site profile: its default, what it means, the values it takes."""
    metadata = {"doc": doc, "choices": choices}
    if isinstance(default, list | dict):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Site:
    """A site profile. Every key may be left out."""

    description: str = key("", "what this is, in a line")
    scheduler: str = key("slurm", "who starts jobs; none: a plain script in the foreground", SCHEDULERS)
    launcher: str = key(
        "srun",
        "who starts ranks: srun; openmpi: Open MPI's mpirun; hydra: mpiexec of MPICH and Intel MPI; pals: mpiexec of "
        "HPE PALS; slowmo: `slowmo train -n` on one machine",
        LAUNCHERS,
    )
    mpi: str = key(
        "", "srun --mpi=: pmix (Open MPI), pmi2 (MPICH, Intel MPI), cray_shasta (Cray MPICH); empty: the site's"
    )
    launcher_options: list[str] = key([], "further words for the launcher")
    partition: str = key("", "partition (Slurm) or queue (PBS)")
    account: str = key("", "account or project that pays")
    time: str = key("", 'time limit of a job, such as "4h" or "04:00:00"')
    warning: str = key("2m", "so long before the time limit the run stops, with a checkpoint")
    directives: list[str] = key([], "further lines for the scheduler, without #SBATCH or #PBS")
    cores_per_node: int = key(
        0, "cores of a node that ranks share; 0: the scheduler's default for each rank, no binding"
    )
    gpus_per_node: int = key(0, "GPUs of a node; each rank gets one")
    ranks_per_node: int = key(0, "ranks on a node; 0: one per GPU, or one")
    memory_gb: int = key(0, "memory asked for on each node, in GB; 0: the scheduler's default")
    modules: list[str] = key([], "modules to load, in this order")
    setup: list[str] = key([], "lines of bash that run after the modules, as they are")
    environment: dict[str, str] = key({}, "variables for all ranks; $NAME stands for a variable of the job")
    venv: str = key("", "virtual environment; empty: the one that slowmo job runs in")
    image: str = key("", "Apptainer image that holds slowmo, in place of a virtual environment")
    binds: list[str] = key([], "folders that the container sees, each FOLDER or OUTSIDE:INSIDE")
    apptainer_options: list[str] = key([], "further words for apptainer exec, such as --nv")
    scratch: str = key("", "folder where run folders are made, such as $SCRATCH; empty: where slowmo job was called")
    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if (self.launcher == "slowmo") != (self.scheduler == "none"):
            raise UsageError(
                f'launcher = "{self.launcher}" does not go with scheduler = "{self.scheduler}".',
                'launcher = "slowmo" starts ranks on one machine, without a scheduler; a scheduler wants another.',
            )
        if self.launcher == "srun" and self.scheduler != "slurm":
            raise UsageError(
                f'launcher = "srun" is Slurm\'s; scheduler is "{self.scheduler}".',
                'Write launcher = "openmpi", "hydra" or "pals".',
            )
        if self.image and self.venv:
            raise UsageError("image and venv exclude each other.", "Delete one of them.")


def names() -> list[str]:
    """The profiles that come with slowmo."""
    return sorted(path.stem for path in (shipped.folder("jobs") / "sites").glob("*.toml"))


def usual() -> str:
    """The profile for whoever names none: by the scheduler whose command is here. Raises: UsageError."""
    if shutil.which("sbatch"):
        return "slurm"
    if shutil.which("qsub"):
        raise UsageError(
            "There is a qsub here; whether it is PBS or Torque, and what its nodes are like, only a profile can say.",
            "Type --site pbs or --site torque, or give a file of yours; set SLOWMO_SITE to keep it.",
        )
    return "laptop"


def load(spec: str) -> Site:
    """The profile of this name among ours, or in the file `spec`. Raises: UsageError."""
    path = Path(spec) if spec.endswith(".toml") else shipped.folder("jobs") / "sites" / f"{spec}.toml"
    if not path.is_file():
        raise UsageError(
            f"There is no site profile {spec!r}.{did_you_mean(spec, names())}",
            f"Give a file that ends in .toml, or one of {', '.join(names())}.",
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"Site profile {path} is not valid TOML: {error}.", "Mend that line; strings need quotes."
        ) from None
    except OSError as error:
        raise UsageError(f"Site profile {path} cannot be read: {error.strerror}.", "Check its permissions.") from None
    site = parse(table, str(path))
    object.__setattr__(site, "name", path.stem)
    return site


def parse(table: dict[str, Any], source: str = "the profile") -> Site:
    """A profile from what a TOML file holds. Raises: UsageError, naming the key and what to write."""
    fields = {f.name: f for f in dataclasses.fields(Site) if f.init}
    types = typing.get_type_hints(Site)
    for name, value in table.items():
        if name not in fields:
            raise UsageError(
                f"{name} is not a key of a site profile ({source}).{did_you_mean(name, fields)}",
                f"The keys are: {', '.join(fields)}.",
            )
        _check(name, types[name], fields[name].metadata["choices"], value, source)
    return Site(**table)


# Job scripts' own, which are set before and used after a site's variables.
RESERVED = ("workdir", "folder", "config", "job", "task", "settings", "warned")
_WORDS = {
    str: "a string",
    int: "a whole number, 0 or more",
    list[str]: "a list of strings",
    dict[str, str]: "a table of strings",
}


def _check(name: str, wanted: Any, choices: tuple[str, ...], value: Any, source: str) -> None:
    plain = typing.get_origin(wanted) or wanted
    right = isinstance(value, plain) and not isinstance(value, bool)
    if plain is int:
        right = right and value >= 0
    if plain in (list, dict) and right:
        right = all(isinstance(v, str) for v in (value.values() if plain is dict else value))
    if not right:
        raise UsageError(f"{name} = {toml_value(value)} is not {_WORDS[wanted]} ({source}).", "Mend it there.")
    if choices and value not in choices:
        raise UsageError(
            f'{name} = "{value}" is not known ({source}).{did_you_mean(value, choices)}',
            f"{name} is one of: {', '.join(choices)}.",
        )
    if name == "environment":
        for variable in value:
            if not (variable.isascii() and variable.isidentifier()):
                raise UsageError(f"{variable!r} cannot name a variable ({source}).", "Use letters, digits and _.")
            if variable in RESERVED:
                raise UsageError(f"{variable} is a variable of the job's script itself ({source}).", "Choose another.")
