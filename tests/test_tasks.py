"""The built-in tasks keep the protocol, a user's task is held against it, every refusal says what to do."""

import gzip
import os
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.tasks import BUILT_IN, Context, build, check_data, check_options, factory, fashion_mnist
from slowmo_mpi.tasks.quadratic import gaussians

ALONE = Context(rank=0, ranks=1, seed=0)


def refusal(call, *arguments, kind=SlowmoError):
    with pytest.raises(kind) as error:
        call(*arguments)
    assert error.value.hint
    return str(error.value)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write mine.py into a fresh working directory; Python's path and modules are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(source, name="mine"):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


# The loader


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_model_is_built_without_data_from_the_global_generator(name):
    def weights(seed):
        torch.manual_seed(seed)
        task = build(name, {}, Context(rank=0, ranks=2, seed=0, data="/nowhere"))
        return torch.cat([p.detach().flatten() for p in task.model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert name == "quadratic" or not torch.equal(weights(1), weights(2))


def test_importing_the_loader_does_not_import_torch():
    code = "import sys, slowmo_mpi.tasks; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


MINE = """
    import torch

    class Numbers:
        def __len__(self):
            return 8
        def batch(self, indices):
            return indices.float().unsqueeze(1)

    class Mine:
        def __init__(self, width=2):
            self.model = torch.nn.Linear(1, width)
            self.train, self.test = Numbers(), None
        def loss(self, model, batch):
            value = model(batch).square().mean()
            return value, {"rms": value.detach().sqrt()}

    def make(context, *, width: int, scale: float = 1.0, on: bool = False, tag: str = "", any=None):
        return Mine(width)
"""


def test_a_users_factory_in_the_working_directory(user_module):
    user_module(MINE)
    task = build("mine:make", {"width": 3, "any": [1]}, ALONE)
    check_data("mine:make", task)
    loss, shown = task.loss(task.model, task.train.batch(torch.arange(4)))
    assert loss.requires_grad and set(shown) == {"rms"} and task.model.out_features == 3


def test_a_class_is_a_factory_too(user_module):
    user_module(MINE + "\n    class Made(Mine):\n        def __init__(self, context): super().__init__()\n")
    assert build("mine:Made", {}, ALONE).test is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fashon-mnist", "Did you mean 'fashion-mnist'?"),
        ("Digits", "Did you mean 'digits'?"),
        ("wmt", '"package.module:factory"'),
        ("./mine.py:make", '"mine:make"'),
        ("mine:", "not of the form"),
        (":make", "not of the form"),
        ("absent_module:make", "There is no module 'absent_module'"),
        ("mine.deeper:make", "There is no module 'mine.deeper'"),
        ("mine:maek", "Did you mean 'make'?"),
        ("mine:NUMBER", "is an int, not a factory"),
        ("mine:no_context", "does not take the context"),
        ("mine:takes_data", "context.data"),
    ],
)
def test_names_that_are_no_task(user_module, name, words):
    user_module(MINE)
    with open("mine.py", "a") as file:
        file.write("\nNUMBER = 3\ndef no_context(*, width=1): ...\ndef takes_data(context, data): ...\n")
    assert words in refusal(check_options, name, {}, kind=UsageError)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1 / 0", "raised ZeroDivisionError on import: division by zero"),
        ("import absent_dependency", "raised ModuleNotFoundError on import"),
        ("raise SystemExit(3)", "raised SystemExit on import: 3"),
        ("def (", "raised SyntaxError on import"),
    ],
)
def test_a_module_that_raises_on_import(user_module, line, words):
    user_module(f"\n\n{line}\n")
    message = refusal(factory, "mine:make", kind=UsageError)
    assert words in message and "python -c 'import mine'" in message
    if "SyntaxError" not in words:
        assert "mine.py, line 3" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs task.width"),
        (
            {"width": 1, "widht": 2},
            "task.widht = 2 is not a key of the task 'mine:make'. Did you mean 'width'?",
        ),
        ({"width": 1, "zzz": "a"}, "width, scale, on, tag, any"),
        ({"width": "3"}, 'task.width = "3" is not a whole number'),
        ({"width": 3.0}, "task.width = 3.0 is not a whole number"),
        ({"width": True}, "task.width = true is not a whole number"),
        ({"width": 1, "scale": True}, "task.scale = true is not a number"),
        ({"width": 1, "scale": "big"}, 'task.scale = "big" is not a number'),
        ({"width": 1, "on": 1}, "task.on = 1 is not true or false"),
        ({"width": 1, "tag": 1}, "task.tag = 1 is not text in quotes"),
    ],
)
def test_options_are_held_against_the_signature(user_module, options, words):
    user_module(MINE)
    assert words in refusal(check_options, "mine:make", options, kind=UsageError)
    check_options("mine:make", {"width": 1, "scale": 2, "on": True, "tag": "a", "any": 3.5})


def test_annotations_as_text_literals_and_open_ended_keys(user_module):
    user_module("""
        from __future__ import annotations
        from typing import TYPE_CHECKING, Literal
        if TYPE_CHECKING:
            from nowhere import Context
        def choice(context, *, kind: Literal["one", "two"] = "one", width: int = 1, **others): ...
        def unresolvable(context: Context, *, width: int = 1): ...
    """)
    check_options("mine:choice", {"kind": "two", "anything": 1})
    assert 'Set task.kind to "one" or "two"' in refusal(check_options, "mine:choice", {"kind": "tow"})
    assert "whole number" in refusal(check_options, "mine:choice", {"width": "1"})
    check_options("mine:unresolvable", {"width": 1})
    assert "whole number" in refusal(check_options, "mine:unresolvable", {"width": "1"})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("None", "returned None"),
        ("{}", "returned a dict without model, train, test, loss"),
        ("Broken(drop='test')", "without test. A task without test data sets test = None."),
        ("Broken(model=lambda x: x)", "is a function, not a torch.nn.Module"),
        ("Broken(model=torch.nn.ReLU())", "has no parameter to train"),
        ("Broken(loss=1.0)", "is a float, not a function"),
        ("Broken(loss=lambda batch: 0)", "does not take (model, batch)"),
        ("Broken(train=None)", "are a NoneType without len() and batch(indices)"),
        ("Broken(train=[1, 2])", "train samples of the task 'mine:make' are a list"),
        ("Broken(test=torch.zeros(3))", "test samples of the task 'mine:make' are a Tensor"),
        ("Broken(train=Empty())", "has 0 train samples"),
        ("Broken(test=Empty())", "set test = None"),
    ],
)
def test_what_a_factory_returns_is_held_against_the_protocol(user_module, body, words):
    user_module(
        MINE.replace("    def make(", "    def unused(")
        + """
    class Broken(Mine):
        def __init__(self, drop=None, **changes):
            super().__init__()
            for key, value in changes.items():
                setattr(self, key, value)
            if drop:
                delattr(self, drop)

    class Empty(Numbers):
        def __len__(self):
            return 0

    def make(context):
        return """
        + body
    )
    assert words in refusal(build, "mine:make", {}, ALONE)


def test_lazy_data_is_left_alone_by_build_and_checked_by_check_data(user_module):
    user_module(
        MINE
        + """
    class Lazy(Mine):
        test = None
        def __init__(self, context):
            self.model = torch.nn.Linear(1, 1)
        @property
        def train(self):
            raise OSError("the disk is away")
    """
    )
    task = build("mine:Lazy", {}, ALONE)
    with pytest.raises(OSError, match="the disk is away"):
        check_data("mine:Lazy", task)


# The quadratic


def quadratic(rank=0, ranks=1, seed=0, **options):
    return build("quadratic", {"dtype": "float64", **options}, Context(rank, ranks, seed))


def test_quadratic_gradient_is_A_x_minus_b_plus_mean_noise():
    task = quadratic(rank=1, ranks=3, dim=5, condition=7.0, noise=2.0)
    exact = quadratic(rank=1, ranks=3, dim=5, condition=7.0, noise=0.0)
    indices = torch.tensor([3, 99, 2**20 - 1])
    noise = task.train.batch(indices) - exact.train.batch(indices)
    loss, shown = task.loss(task.model, task.train.batch(indices))
    loss.backward()
    x = task.model.x.detach()
    torch.testing.assert_close(task.model.x.grad, task.eigenvalues * (x - task.b) + noise)
    assert not any(value.requires_grad for value in shown.values())
    assert noise.abs().max() > 0

    def f(y):
        return 0.5 * torch.dot(y - task.b, task.eigenvalues * (y - task.b))

    expected = f(x) - f(task.optimum) + torch.dot(noise, x - task.optimum)
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_quadratic_optimum_is_the_mean_of_all_ranks(ranks):
    tasks = [quadratic(rank, ranks, heterogeneity=3.0, noise=0.0) for rank in range(ranks)]
    mean_b = torch.stack([task.b for task in tasks]).mean(dim=0)
    torch.testing.assert_close(mean_b, tasks[0].optimum, rtol=0, atol=1e-14)
    assert all(torch.equal(task.model.x, tasks[0].model.x) for task in tasks)
    assert torch.equal(tasks[0].optimum, quadratic(0, 9).optimum)
    # The ranks' mean loss is f(x) - f(x*), which is also the loss on the test sample.
    losses = [task.loss(task.model, task.train.batch(torch.tensor([0])))[0] for task in tasks]
    loss, shown = tasks[0].loss(tasks[0].model, tasks[0].test.batch(torch.tensor([0])))
    torch.testing.assert_close(torch.stack(losses).mean(), loss)
    torch.testing.assert_close(shown["excess"], loss.detach())


def test_quadratic_spectrum_start_and_heterogeneity():
    task = quadratic(rank=2, ranks=8, dim=4000, condition=100.0, heterogeneity=2.0, start=3.0)
    assert task.eigenvalues.min() == 1 and task.eigenvalues.max() == pytest.approx(100)
    ratios = task.eigenvalues[1:] / task.eigenvalues[:-1]
    torch.testing.assert_close(ratios, ratios[0].expand_as(ratios))
    _, shown = task.loss(task.model, task.test.batch(torch.tensor([0])))
    assert shown["distance"].item() == pytest.approx(9.0)
    # Centring takes 1/8 of the variance; 4000 draws give the deviation to 1 %, 5 sigma is 6 %.
    assert (task.b - task.optimum).std().item() == pytest.approx(2.0 * (7 / 8) ** 0.5, rel=0.06)


def test_quadratic_is_minimised_by_gradient_descent():
    task = quadratic(dim=6, noise=0.0, condition=4.0)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.3)
    for step in range(200):
        optimizer.zero_grad()
        task.loss(task.model, task.train.batch(torch.tensor([step])))[0].backward()
        optimizer.step()
    torch.testing.assert_close(task.model.x.detach(), task.optimum, rtol=0, atol=1e-12)


def test_noise_is_a_function_of_seed_and_sample_alone():
    indices = torch.tensor([5, 7, 11])
    one, other = quadratic(0, 4, heterogeneity=0.0), quadratic(3, 4, heterogeneity=0.0)
    assert torch.equal(one.train.batch(indices), other.train.batch(indices))
    apart = torch.stack([one.train.batch(indices[i : i + 1]) for i in range(3)]).mean(dim=0)
    torch.testing.assert_close(one.train.batch(indices), apart)
    reseeded = quadratic(0, 4, seed=1, heterogeneity=0.0)
    assert not torch.equal(one.train.batch(indices), reseeded.train.batch(indices))


@pytest.mark.parametrize("key", [0, 2**64 - 1, 12345])
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_noise_is_gaussian_and_independent(key, dim):
    count = 2**16
    values = gaussians(key, np.arange(count), dim)
    assert values.shape == (count, dim) and np.isfinite(values).all()
    # Standard errors are 1, sqrt(2) and sqrt(96) over sqrt(count) for moments 1, 2 and 4: margins of 6 sigma.
    margin = 6 / count**0.5
    assert np.abs(values.mean(axis=0)).max() < margin
    assert np.abs((values**2).mean(axis=0) - 1).max() < margin * 2**0.5
    assert np.abs((values**4).mean(axis=0) - 3).max() < margin * 96**0.5
    across = values.T @ values / count - np.eye(dim) * (values**2).mean(axis=0)
    assert np.abs(across).max() < margin  # coordinates
    for lag in (1, 2, 64):
        assert np.abs(values[lag:].T @ values[:-lag] / count).max() < margin  # samples
    assert abs((np.abs(values) < 1).mean() - 0.682689) < 6 * (0.683 * 0.317 / (count * dim)) ** 0.5


def test_noise_of_a_batch_falls_with_its_size():
    task = quadratic(dim=64, noise=3.0)
    means = torch.stack([task.train.batch(torch.arange(16 * k, 16 * k + 16)) for k in range(1000)])
    assert means.std().item() == pytest.approx(3.0 / 4, rel=0.03)  # 64,000 values: 6 sigma is 1.7 %


def test_quadratic_float32_and_values_without_meaning():
    assert build("quadratic", {}, ALONE).model.x.dtype == torch.float32
    assert quadratic(dim=1).model.x.shape == (1,)
    for options in ({"dim": 0}, {"condition": 0.5}, {"noise": -1}, {"start": float("nan")}):
        (key,) = options
        assert f"task.{key} = " in refusal(build, "quadratic", options, ALONE, kind=UsageError)
    assert 'Set task.dtype to "float32" or "float64"' in refusal(check_options, "quadratic", {"dtype": "f4"})


# Images


def test_digits_learn_in_a_few_epochs():
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    task = build("digits", {"hidden": 32}, ALONE)
    check_data("digits", task)
    assert (len(task.train), len(task.test)) == (1500, 297)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9)
    for step in range(15 * 15):
        optimizer.zero_grad()
        task.loss(task.model, task.train.batch((torch.arange(100) + 100 * step) % 1500))[0].backward()
        optimizer.step()
    _, shown = task.loss(task.model, task.test.batch(torch.arange(297)))
    assert shown["accuracy"] > 0.93


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refusal(lambda: build("digits", {}, ALONE).train)


def write_fashion(folder, images=6, labels=6, largest=9, side=28, pack=gzip.compress, suffix=".gz"):
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for split in ("train", "t10k"):
        pixels = struct.pack(">4B3I", 0, 0, 8, 3, images, side, side) + random.bytes(images * side * side)
        classes = struct.pack(">4BI", 0, 0, 8, 1, labels) + bytes([largest] * labels)
        (folder / f"{split}-images-idx3-ubyte{suffix}").write_bytes(pack(pixels))
        (folder / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(classes))
    return folder


def fashion(folder, **options):
    return build("fashion-mnist", options, Context(0, 1, 0, data=str(folder)))


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bytes, "")])
def test_fashion_mnist_from_a_folder(tmp_path, pack, suffix):
    task = fashion(write_fashion(tmp_path / "it's a; folder", pack=pack, suffix=suffix), width=2)
    check_data("fashion-mnist", task)
    pixels, labels = task.train.batch(torch.tensor([0, 5]))
    assert pixels.dtype == torch.float32 and pixels.shape[0] == 2 and labels.tolist() == [9, 9]
    loss, shown = task.loss(task.model, (pixels, labels))
    loss.backward()
    assert all(p.grad is not None for p in task.model.parameters()) and 0 <= shown["accuracy"] <= 1


def test_fashion_mnist_damaged_or_missing(tmp_path):
    message = refusal(lambda: fashion(tmp_path / "absent").train)
    assert "There is no folder" in message and "apt-get install dataset-fashion-mnist" in message
    (tmp_path / "bare").mkdir()
    assert "holds neither train-images-idx3-ubyte nor" in refusal(lambda: fashion(tmp_path / "bare").test)

    def damaged(**change):
        return refusal(lambda: fashion(write_fashion(tmp_path / "damaged", **change)).train)

    assert "6 images and train-labels-idx1-ubyte.gz 5 labels" in damaged(labels=5)
    assert "the label 10, where 0 to 9" in damaged(largest=10)
    assert "images of 27 x 27" in damaged(side=27)
    assert "damaged gzip" in damaged(pack=lambda content: gzip.compress(content)[:-8])
    assert "task.width = 0" in refusal(build, "fashion-mnist", {"width": 0}, ALONE, kind=UsageError)


def test_fashion_mnist_itself():
    if not os.path.isdir(fashion_mnist.DEBIAN_FOLDER) and not os.environ.get("SLOWMO_CI"):
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    torch.manual_seed(0)
    task = build("fashion-mnist", {}, ALONE)
    check_data("fashion-mnist", task)
    assert (len(task.train), len(task.test)) == (60_000, 10_000)
    assert torch.bincount(task.train.labels.long()).tolist() == [6000] * 10
    pixels = task.train.pixels.float()
    assert pixels.mean().item() == pytest.approx(fashion_mnist.MEAN, abs=0.01)
    assert pixels.std().item() == pytest.approx(fashion_mnist.STD, abs=0.01)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for step in range(60):
        optimizer.zero_grad()
        task.loss(task.model, task.train.batch(torch.arange(64 * step, 64 * step + 64)))[0].backward()
        optimizer.step()
    task.model.eval()
    with torch.no_grad():
        _, shown = task.loss(task.model, task.test.batch(torch.arange(1000)))
    assert shown["accuracy"] > 0.7
