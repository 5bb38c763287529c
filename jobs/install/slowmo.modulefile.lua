-- An example for Lmod: `module load slowmo-mpi` in place of `source .venv/bin/activate`. README.md says where to put it.

-- EDIT: the folder in which bin/setup made .venv, and the modules that were loaded then; none for the MPI from pip.
local checkout = "/path/to/slowmo-mpi"
local modules = { "openmpi", "hdf5-parallel" }

help("Decentralised PyTorch training over MPI, with SlowMo. Type: slowmo --help, slowmo doctor.")
whatis("Name: slowmo-mpi")
whatis("Version: 0.1.0")

depends_on(unpack(modules))
-- A module's PYTHONPATH would lend its packages (a serial h5py, say) to the virtual environment.
unsetenv("PYTHONPATH")
setenv("VIRTUAL_ENV", pathJoin(checkout, ".venv"))
prepend_path("PATH", pathJoin(checkout, ".venv", "bin"))
