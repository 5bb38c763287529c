# ruff: noqa: F403, F405
# The names come from Spack, which runs this file; ../../../../../README.md says how to install with it.

from pathlib import Path

from spack.package import *
from spack_repo.builtin.build_systems.python import PythonPackage


class PySlowmoMpi(PythonPackage):
    """Decentralised PyTorch training over MPI: SlowMo over AllReduce-SGD, Local SGD, D-PSGD, SGP or OSGP."""

    license("Apache-2.0")

    # The source is the checkout that this file is in: what is committed on its branch main, or, after
    # `spack develop --path CHECKOUT py-slowmo-mpi@0.1.0` in an environment, its files as they are.
    git = Path(__file__).resolve().parents[7].as_uri()
    version("0.1.0", branch="main")

    variant("digits", default=True, description="The task `digits` (scikit-learn ships the images)")
    variant("plot", default=True, description="Pictures of graphs and runs")
    variant("tensorboard", default=False, description="TensorBoard event files")
    variant("translation", default=False, description="The task `wmt16`: vocabularies and BLEU")

    depends_on("py-setuptools@77:", type="build")
    depends_on("python@3.11:", type=("build", "run"))
    depends_on("mpi", type="run")  # its mpirun, on PATH

    with default_args(type="run"):
        depends_on("py-click@8.1:")
        depends_on("py-h5py@3.10: +mpi")
        depends_on("py-jinja2@3.1:")
        depends_on("py-mpi4py@4.0:")
        depends_on("py-numpy@1.26:")
        depends_on("py-pillow@10:")
        depends_on("py-safetensors@0.4:")
        depends_on("py-torch@2.3:")
        depends_on("py-tqdm@4.66:")
        depends_on("py-xxhash@3.4:")

        depends_on("py-scikit-learn@1.3:", when="+digits")
        depends_on("py-matplotlib@3.8:", when="+plot")
        depends_on("py-tensorboard@2.15:", when="+tensorboard")
        depends_on("py-sacrebleu@2.0:", when="+translation")
        depends_on("py-sentencepiece@0.2:", when="+translation")
