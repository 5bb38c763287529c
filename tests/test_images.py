"""Images in their real formats, made small: CIFAR-10's binary files, folders of JPEGs, the packed file; the models."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import begin, go_on, lines, same_files
from worlds import Real

from slowmo_mpi import config, presets, simulate, tasks
from slowmo_mpi.data import NOT_COUNTED, decode, loader, pack
from slowmo_mpi.data.images import source
from slowmo_mpi.data.loader import Images
from slowmo_mpi.errors import DONE, SlowmoError, UsageError
from slowmo_mpi.models.resnet import resnet18, resnet50
from slowmo_mpi.tasks import Context
from slowmo_mpi.tasks.cifar10 import ARCHIVE, NAMES, TRAIN
from slowmo_mpi.tasks.classification import Classification

LIMIT_S = 120
CLASSES = 3
SOON_S = 30


# ---- the data ----
def write_cifar(folder: Path, images: int = 24) -> Path:
    """Six files of so many images; the class can be seen: it is how bright they are."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for name in (*TRAIN, "test_batch.bin"):
        labels = chance.integers(0, 10, (images, 1))
        pixels = chance.integers(0, 80, (images, 3072)) + 17 * labels
        np.hstack([labels, pixels]).astype(np.uint8).tofile(folder / name)
    (folder / NAMES).write_text("airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n")
    return folder


def jpeg(number: int, label: int) -> bytes:
    chance = np.random.default_rng(number)
    pixels = chance.integers(0, 60, (32 + number % 9, 40, 3)) + 90 * np.eye(3)[label % 3]
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_folder(folder: Path, train: int = 14, val: int = 5) -> Path:
    for split, count in (("train", train), ("val", val)):
        for label in range(CLASSES):
            place = folder / split / f"n{label:08}"
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"n{label:08}_{i:02}.JPEG").write_bytes(jpeg(100 * label + i + 1000 * (split == "val"), label))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "net")


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    file = folder.parent / "net.h5"
    simulate(1, packing, folder, file)
    return file


def packing(comm: Any, folder: Path, file: Path, tell: Callable[[str], None] = print) -> pack.Packing:
    return pack.pack(folder, file, comm, tell)


def images(place: Path, workers: int = 0, augment: bool = True, seed: int = 5) -> Images:
    return Images(source(place, "train"), 24, seed, augment, workers)


def order(samples: int, *epochs: int, batch: int = 6) -> list[tuple[int, torch.Tensor]]:
    return [(e, torch.arange(k, min(k + batch, samples))) for e in epochs for k in range(0, samples, batch)]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


# ---- the models ----
def test_the_resnets_are_those_of_the_literature() -> None:
    """Parameters as in He et al. and torchvision; the stride of a bottleneck in its 3x3; last scales at 0."""
    small, large = resnet18(), resnet50()
    assert sum(p.numel() for p in small.parameters()) == 11_173_962
    assert sum(p.numel() for p in large.parameters()) == 25_557_032
    names = list(large.state_dict())
    assert names[0] == "conv1.weight" and names[-2:] == ["fc.weight", "fc.bias"] and len(names) == 320
    assert "layer3.5.bn3.running_var" in names and "layer4.0.downsample.1.weight" in names
    first: Any = large.layer2[0]
    assert first.conv1.stride == (1, 1) and first.conv2.stride == (2, 2)
    for model in (small, large):
        scales = [block.last_scale for stage in range(1, 5) for block in getattr(model, f"layer{stage}")]  # type: ignore
        assert not any(scale.any() for scale in scales) and len(scales) == (8 if model is small else 16)
    assert resnet18(7, 4, channels=1)(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    assert resnet50(5, 2)(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


# ---- CIFAR-10 ----
def cifar(place: Path, **options: Any) -> Any:
    return tasks.build("cifar10", {"width": 4, **options}, Context(0, 1, 5, str(place)))


def test_cifar_is_read_as_it_is_written(tmp_path: Path) -> None:
    """Label, red, green, blue, row by row; also where the folder that the archive makes is inside the one given."""
    folder = write_cifar(tmp_path / ARCHIVE)
    data = np.fromfile(folder / TRAIN[1], np.uint8)
    pixels, labels = cifar(tmp_path).train.batch(torch.tensor([24 + 2]))
    assert labels.tolist() == [data[2 * 3073]]
    assert pixels.shape == (1, 3, 32, 32) and pixels[0, 1, 3, 7] == data[2 * 3073 + 1 + 1024 + 3 * 32 + 7]
    assert len(cifar(folder).train) == 120 and len(cifar(folder).test) == 24


def test_cifar_is_augmented_as_is_usual(tmp_path: Path) -> None:
    """A crop of the padded image, perhaps mirrored; anew in each epoch; of seed, epoch and image alone."""
    task = cifar(write_cifar(tmp_path / ARCHIVE))
    plain, _ = task.train.batch(torch.arange(120))
    (one, labels), (two, _) = tasks.batches(task.train, [(0, torch.arange(120)), (1, torch.arange(120))])
    assert torch.equal(labels, task.train.batch(torch.arange(120))[1])
    assert not torch.equal(one, two)
    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4))
    found = []
    for image, moved in zip(padded, one, strict=True):
        views = {(y, x, f): image[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9) for f in (0, 1)}
        found += [k for k, v in views.items() if torch.equal(v.flip(-1) if k[2] else v, moved)]
    assert len(found) == 120
    assert {y for y, _, _ in found} == {x for _, x, _ in found} == set(range(9)) and {f for *_, f in found} == {0, 1}
    shuffled = torch.randperm(120)
    assert torch.equal(next(tasks.batches(task.train, [(1, shuffled)]))[0], two[shuffled])
    assert torch.equal(next(tasks.batches(task.test, [(1, torch.arange(24))]))[0], task.test.batch(torch.arange(24))[0])


def cut(place: Path, size: int) -> None:
    with place.open("r+b") as file:
        file.truncate(size)


CIFAR_FAULTS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: cut(f / TRAIN[2], 3073 * 20 + 5), r"data_batch_3.bin is cut short: 61465 bytes .* 3073"),
    (lambda f: cut(f / TRAIN[4], 3073 * 20), r"data_batch_5.bin holds 20 images, and data_batch_1.bin 24"),
    (lambda f: cut(f / "test_batch.bin", 0), r"test_batch.bin is cut short: 0 bytes"),
    (lambda f: cut(f / "test_batch.bin", 3073 * 20), r"test_batch.bin holds 20 images, and data_batch_1.bin 24"),
    (lambda f: (f / TRAIN[3]).unlink(), r"There is no file .*data_batch_4.bin"),
    (lambda f: (f / NAMES).unlink(), r"has no batches.meta.txt"),
    (lambda f: ((f / NAMES).rename(f / "x"), (f / TRAIN[0]).rename(f / "data_batch_1")), r"the Python version"),
    (lambda f: (f / NAMES).write_text("a\n" * 100), r"names 100 classes, and CIFAR-10 has 10"),
    (lambda f: (f / TRAIN[1]).write_bytes(bytes([12]) * 3073), r"data_batch_2.bin has the label 12"),
    (lambda f: f.rename(f.with_name("elsewhere")), r"There is no folder .*" + ARCHIVE),
]


@pytest.mark.parametrize("damage, words", CIFAR_FAULTS, ids=[words for _, words in CIFAR_FAULTS])
def test_damaged_cifar_is_one_clear_error(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    folder = write_cifar(tmp_path / ARCHIVE)
    damage(folder)
    with pytest.raises(SlowmoError, match=words) as error:
        tasks.check_data("cifar10", cifar(folder))
    assert "task.data" in error.value.hint


# ---- decoding ----
def test_batches_are_the_same_whoever_decodes(folder: Path, packed: Path) -> None:
    """In the rank or in processes, from the folder or the packed file, in whatever order samples are asked for."""
    asked = order(42, 0, 3)
    first = list(images(folder).batches(asked))
    assert first[0][0].shape == (6, 3, 24, 24) and first[0][0].dtype == torch.uint8
    assert first[0][0].is_contiguous(memory_format=torch.channels_last)
    assert [y for _, labels in first[:7] for y in labels.tolist()] == [c for c in range(3) for _ in range(14)]
    for place, workers in ((folder, 1), (folder, 3), (packed, 0), (packed, 2)):
        assert same(first, images(place, workers).batches(asked)), (place, workers)
    assert not same(first[:7], first[7:]), "each epoch has its own crops"
    assert not same(first, images(folder, seed=6).batches(asked))
    shuffled = torch.randperm(42)
    (everything, _), (mixed, _) = images(folder).batches([(3, torch.arange(42)), (3, shuffled)])
    assert torch.equal(everything[shuffled], mixed)


def test_random_crops_are_of_all_sizes_and_mirrored_half_of_the_time() -> None:
    """Red tells how far right a pixel was, green how far down: so each crop's place can be read off."""
    wide, high, side = 250, 200, 25
    y, x = np.mgrid[:high, :wide]
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    shares, ratios, mirrored = [], [], []
    for n in range(400):
        found = np.frombuffer(decode.crop(image, side, random.Random(n)), np.uint8).reshape(side, side, 3).astype(float)
        across, down = (found[0, -1, 0] - found[0, 0, 0], found[-1, 0, 1] - found[0, 0, 1])
        w, h = (abs(d) * side / (side - 1) for d in (across, down))
        shares.append(w * h / (wide * high))
        ratios.append(w / h)
        mirrored.append(across < 0)
    assert 0.07 < min(shares) < 0.12 and 0.9 < max(shares) < 1.02 and 0.4 < np.mean(shares) < 0.55  # few large ones fit
    assert 0.72 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.4
    assert 160 < sum(mirrored) < 240


def test_the_centre_is_what_resizing_and_cutting_gives(folder: Path) -> None:
    one = images(folder, augment=False)
    with Image.open(one.source.name(0)) as image:
        ratio = 24 * 256 / 224 / min(image.size)
        large = image.resize([round(s * ratio) for s in image.size], Image.Resampling.BILINEAR)
    x, y = (large.width - 24) // 2, (large.height - 24) // 2
    wanted = torch.from_numpy(np.asarray(large)[y : y + 24, x : x + 24].copy()).permute(2, 0, 1)
    pixels, _ = one.batch(torch.tensor([0]))
    assert (pixels[0].float() - wanted.float()).abs().mean() < 8  # the border falls between pixels
    assert same([one.batch(torch.arange(4))], one.batches([(9, torch.arange(4))]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_counted_and_replaced(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    place = write_folder(tmp_path / "net")
    whole = list(images(place).batches(order(42, 1)))
    broken = sorted((place / "train" / "n00000001").iterdir())[0]  # sample 14
    cut(broken, 400)
    one = images(place, workers)
    with caplog.at_level(logging.WARNING):
        found = list(one.batches(order(42, 1)))
    assert one.broken == {14} and len(caplog.records) == 1
    assert str(broken) in caplog.text and "1 so far" in caplog.text
    instead = next(images(place).batches([(1, torch.tensor([15]))]))
    for k, (before, after) in enumerate(zip(whole, found, strict=True)):
        if k == 2:  # samples 12 to 17
            assert torch.equal(after[0][2], instead[0][0]) and after[1][2] == instead[1][0]
            after[0][2] = before[0][2]
        assert same([before], [after])
    for name in ("n00000000_03.JPEG", "n00000000_04.JPEG"):
        (place / "train" / "n00000000" / name).write_bytes(b"no JPEG")
    with pytest.raises(SlowmoError, match=r"2 of \d+ images cannot be decoded, the last one .*JPEG: "):
        list(images(place, workers).batches(order(42, 1)))


def test_what_stands_for_a_broken_image_is_not_counted_in_testing(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "net")
    cut(sorted((place / "train" / "n00000001").iterdir())[0], 400)  # sample 14
    _, labels = images(place, augment=False).batch(torch.arange(12, 18))
    assert labels.tolist() == [0, 0, NOT_COUNTED, 1, 1, 1]
    task = Classification(torch.nn.Identity(), lambda: pytest.fail("no data are read"))
    logits = torch.eye(3)[[0, 0, 1, 1, 1, 2]]
    sums = task.evaluate(task.model, (logits, labels))
    assert sums["samples"] == 5 and sums["accuracy"] == 4
    kept = [0, 1, 3, 4, 5]
    wanted = torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")
    assert sums["loss"] == pytest.approx(float(wanted))


def test_hidden_files_are_no_images_and_a_link_that_leads_nowhere_is_a_broken_one(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "net")
    here = place / "train" / "n00000001"
    (here / "._n00000001_00.JPEG").write_bytes(b"of a Mac")
    assert len(source(place, "train").labels) == 42
    first = sorted(here.glob("n*"))[0]
    first.unlink()
    first.symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"net is a folder.*"):
        simulate(1, packing, place, place)
    result = simulate(1, packing, place, tmp_path / "net.h5")[0]
    assert result.broken == 1 and result.images == {"train": 41, "val": 15}


def test_too_many_broken_images_are_told_early(tmp_path: Path) -> None:
    """A rank that sees few of many images does not go on until it has met one in a hundred of all."""
    place = write_folder(tmp_path / "net", 1, 1)
    one = images(place)
    found: Any = one.source
    many = 300_000 // CLASSES
    one.source = dataclasses.replace(found, names=np.tile(found.names, many), labels=np.tile(found.labels, many))
    (place / "train" / "n00000001" / "n00000001_00.JPEG").write_bytes(b"no JPEG")
    with pytest.raises(SlowmoError, match=r"\d\d of \d\d images cannot be decoded"):
        list(one.batches(order(600, 1)))
    (place / "train" / "n00000000" / "n00000000_00.JPEG").unlink()
    (place / "train" / "n00000002" / "n00000002_00.JPEG").unlink()
    with pytest.raises(SlowmoError, match=r"1 of 1 images cannot be decoded"):  # and there is none to take its place
        list(images(place).batches(order(1, 1)))


def test_a_decoder_that_dies_is_an_error(folder: Path) -> None:
    stream = images(folder, 2).batches(order(42, *range(100)))
    next(stream)
    pids = decoders()
    assert len(pids) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # the rank's, not theirs
        os.kill(pids[0], number)
    next(stream)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(SlowmoError, match=rf"Process {pids[0]}, which decodes images, was killed by signal 9"):
        for _ in stream:
            time.sleep(0.01)
    assert not decoders()


def test_a_decoder_that_hangs_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "STUCK_S", 1.0)
    monkeypatch.setattr(loader, "END_S", 0.5)
    stream = images(folder, 1).batches(order(42, *range(100)))
    next(stream)
    os.kill(decoders()[0], signal.SIGSTOP)
    with pytest.raises(SlowmoError, match=r"No image was decoded for \d s"):
        list(stream)
    assert not decoders()


RANK = """
import os, sys, torch
from pathlib import Path
from slowmo_mpi.data.images import source
from slowmo_mpi.data.loader import Images

stream = Images(source(Path(sys.argv[1]), "train"), 24, 5, True, 2).batches((0, torch.arange(6)) for _ in range(99))
next(stream)
os.kill(os.getpid(), 9)
"""


def test_decoders_end_with_their_stream_and_with_their_rank(folder: Path, environment: dict[str, str]) -> None:
    """The fixture sees to it that no process of the rank that kills itself is left."""
    stream = images(folder, 2).batches(order(42, *range(100)))
    next(stream)
    stream.close()
    assert not decoders()
    done = subprocess.run([sys.executable, "-c", RANK, str(folder)], env=environment, timeout=LIMIT_S, check=False)
    assert done.returncode == -signal.SIGKILL


def decoders() -> list[int]:
    """This process's."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"decode.py" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return sorted(found)


# ---- wrong folders ----
def imagenet(place: Path, **options: Any) -> Any:
    small = {"classes": CLASSES, "image": 24, "width": 2, "workers": 0}
    return tasks.build("imagenet", small | options, Context(0, 1, 5, str(place)))


def loosen(split: Path) -> None:
    """Take the images out of their folders of classes."""
    for image in [*split.glob("*/*")]:
        image.rename(split / image.name)
    for place in [*split.iterdir()]:
        if place.is_dir():
            place.rmdir()


FOLDER_FAULTS: list[tuple[Callable[[Path], Any], str, str]] = [
    (lambda f: f.rename(f.with_name("x")), r"There is no .*net", "task.data"),
    (lambda f: (f / "val").rename(f / "valid"), r"has no folder val", "train/ and val/"),
    (lambda f: loosen(f / "val"), r"val holds images, but not in folders of their classes", "val/n01440764/"),
    (lambda f: [p.unlink() for p in f.glob("train/*/*")], r"class folders and no images", ".jpeg"),
    (lambda f: (f / "train/n00000009").mkdir(), r"classes of .* differ: n00000009 is in train or in val alone", "same"),
    (lambda f: [(f / s / "n00000009").mkdir() for s in ("train", "val")], r"has 4 classes, .* made for 3",
     "task.classes=4"),
]  # fmt: skip


@pytest.mark.parametrize("damage, words, hint", FOLDER_FAULTS, ids=[words for _, words, _ in FOLDER_FAULTS])
def test_a_wrong_folder_is_one_clear_error(
    tmp_path: Path, damage: Callable[[Path], Any], words: str, hint: str
) -> None:
    place = write_folder(tmp_path / "net", 2, 1)
    damage(place)
    with pytest.raises(SlowmoError, match=words) as error:
        tasks.check_data("imagenet", imagenet(place))
    assert hint in error.value.hint


@pytest.mark.parametrize("key", ["classes", "image", "width", "workers"])
def test_numbers_without_a_meaning(key: str) -> None:
    with pytest.raises(UsageError, match=rf"task.{key} = -1 is less than"):
        imagenet(Path("."), **{key: -1})


# ---- packing ----
def test_a_packed_file_holds_the_images_as_they_were(folder: Path, packed: Path) -> None:
    files = sorted((folder / "train").glob("*/*"))
    with h5py.File(packed) as file:
        group = file["train"]
        names = [n.decode() for n in group["name"][:]]
        assert names == [str(f.relative_to(folder / "train")) for f in files]
        for i in (0, 17, 41):
            start, size = int(group["offset"][i]), int(group["size"][i])
            assert group["bytes"][start : start + size].tobytes() == files[i].read_bytes()
        assert group["label"][:].tolist() == [c for c in range(3) for _ in range(14)]
        assert [n.decode() for n in file["classes"][:]] == [f"n{c:08}" for c in range(3)]
        assert group["bytes"].chunks is None
    assert not packed.with_name("net.h5.part").exists()


def test_packing_by_many_is_packing_by_one(folder: Path, packed: Path, tmp_path: Path) -> None:
    simulate(3, packing, folder, tmp_path / "by-3.h5")
    with h5py.File(packed) as one, h5py.File(tmp_path / "by-3.h5") as other:
        for split in ("train", "val"):
            for name in one[split]:
                assert np.array_equal(one[split][name][:], other[split][name][:])
    with pytest.raises(UsageError, match=r"by-3.h5 already"):
        simulate(1, packing, folder, tmp_path / "by-3.h5")


KILLED = """
import os, sys
from pathlib import Path
from slowmo_mpi import simulate
from slowmo_mpi.data import pack

plain, seen = pack.check, []

def check(data):
    seen.append(1)
    if len(seen) > 20:
        os.kill(os.getpid(), 9)
    return plain(data)

pack.check, pack.THREADS = check, 1
simulate(1, lambda comm: pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), comm, print))
"""


def test_packing_goes_on_where_it_was_killed(folder: Path, packed: Path, tmp_path: Path) -> None:
    """What was copied stays, is not copied again, and the file is that of a packing in one go."""
    file, part = tmp_path / "net.h5", tmp_path / "net.h5.part"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(file)], timeout=LIMIT_S, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL and part.exists() and not file.exists()
    with pytest.raises(SlowmoError, match=r"net.h5 is not packed to its end"):
        tasks.check_data("imagenet", imagenet(file))
    with h5py.File(part) as found:
        assert (found["train/checksum"][:] > 0).sum() == 20
    told: list[str] = []
    result = simulate(1, packing, folder, file, told.append)[0]
    assert told[0].startswith("going on with 42 train + 15 val images")
    sizes = [f.stat().st_size for f in sorted(folder.glob("*/*/*"))]
    assert result.images == {"train": 42, "val": 15} and result.bytes == sum(sizes)
    assert result.copied_bytes == sum(sizes[20:])
    with h5py.File(packed) as one, h5py.File(file) as other:
        assert np.array_equal(one["train/bytes"][:], other["train/bytes"][:])


def test_packing_leaves_broken_images_out(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "net")
    broken = place / "train" / "n00000001" / "n00000001_02.JPEG"
    cut(broken, 500)
    told: list[str] = []
    result = simulate(2, packing, place, tmp_path / "net.h5", told.append)[0]
    assert result.broken == 1 and result.images == {"train": 41, "val": 15}
    assert [line for line in told if str(broken) in line]
    found, whole = source(tmp_path / "net.h5", "train"), source(place, "train")
    assert len(found.labels) == 41 and found.labels.tolist() == np.delete(whole.labels, 16).tolist()
    assert found.name(16) == f"train/n00000001/n00000001_03.JPEG in {tmp_path / 'net.h5'}"
    (place / "val" / "n00000000" / "n00000000_00.JPEG").write_bytes(b"")
    with pytest.raises(SlowmoError, match=r"2 of 57 images in .*net are broken"):
        simulate(2, packing, place, tmp_path / "again.h5", told.append)


def test_packing_begins_anew_where_it_was_killed_at_the_tables(folder: Path, packed: Path, tmp_path: Path) -> None:
    whole, part = packed.read_bytes(), tmp_path / "net.h5.part"
    for there in (0, 100, 800, 2500):
        part.write_bytes(whole[:there] + bytes(len(whole) - there))
        told: list[str] = []
        simulate(1, packing, folder, tmp_path / "net.h5", told.append)
        assert told[0].startswith("packing 42 train + 15 val images")
        (tmp_path / "net.h5").unlink()


def test_a_split_of_empty_images_is_one_clear_error(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "net", 1, 1)
    for image in (place / "val").glob("*/*"):
        cut(image, 0)
    with pytest.raises(SlowmoError, match=r"val holds class folders and only empty images"):
        simulate(1, packing, place, tmp_path / "net.h5")


def test_packing_is_read_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that gives other bytes than were written is found out, and a second packing mends it."""
    file, plain = tmp_path / "net.h5", pack._Copier.sync

    def faulty(copier: Any) -> None:
        plain(copier)
        if copier._checksum(30) and not struck:
            struck.append(os.pwrite(copier._fd, b"???", int(copier._starts[30]) + 100))

    struck: list[int] = []
    monkeypatch.setattr(pack._Copier, "sync", faulty)
    with pytest.raises(SlowmoError, match=r"1 images in .* have other bytes than were written"):
        simulate(2, packing, folder, file)
    result = simulate(1, packing, folder, file)[0]
    assert result.images == {"train": 42, "val": 15} and 0 < result.copied_bytes < 0.05 * result.bytes


def test_a_damaged_packed_file(packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "net.h5"
    data = bytearray(packed.read_bytes())
    task = source(packed, "train").task(0, 0, 7)
    data[task.offset + task.size // 2] ^= 1  # the JPEG still decodes: its checksum tells
    copy.write_bytes(data)
    one = images(copy)
    list(one.batches(order(42, 0)))
    assert one.broken == {7}
    copy.write_bytes(data[:-1000])
    with pytest.raises(SlowmoError, match=r"net.h5 (is cut short|cannot be read as HDF5)"):
        source(copy, "val")
    copy.write_bytes(b"no HDF5")
    with pytest.raises(SlowmoError, match=r"cannot be read as HDF5"):
        source(copy, "train")
    with h5py.File(copy, "w"):
        pass
    with pytest.raises(SlowmoError, match=r"is no file of images"):
        source(copy, "train")


def test_slowmo_data_pack(folder: Path, packed: Path, mpirun: str, environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slowmo_mpi", "data", "pack", str(folder), str(tmp_path / "p.h5"), "-n", "2"]
    done = subprocess.run(command, env=environment, timeout=LIMIT_S, capture_output=True, text=True, check=False)
    assert done.returncode == DONE, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'p.h5'}: 42 train + 15 val images of 3 classes, ")
    assert "copied" in done.stderr and "/s; read back" in done.stderr
    with h5py.File(packed) as one, h5py.File(tmp_path / "p.h5") as other:
        assert np.array_equal(one["train/bytes"][:], other["train/bytes"][:])


# ---- the recipes, end to end ----
SHORT = ["run.epochs=2", "run.log_every=3", "slowmo.tau=2", "checkpoint.every=1", "checkpoint.keep=100"]


@pytest.mark.parametrize("world", ["mpi-4"], indirect=True)
@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_a_recipe_runs_and_resumes_to_the_bit(world: Real, name: str, packed: Path, tmp_path: Path) -> None:
    """What `slowmo init` gives, on 4 real ranks, with checkpoints; imagenet's workers are of two ranks each.

    Resumed in the middle of an epoch: model, checkpoint and metrics as in one go.
    """
    if name == "cifar10":
        place = write_cifar(tmp_path / "cifar")
        own = ["task.width=4", "task.batch_size=6", "task.label_smoothing=0.1"]  # 5 steps per epoch
    else:
        place, own = packed, ["task.classes=3", "task.image=32", "task.width=2", "task.workers=1", "task.batch_size=2"]
        own += ["run.worker=2"]
    wanted = config.parse(presets.commented(name), "a test", [*SHORT, f"task.data={place}", *own])
    whole, here = tmp_path / "whole", tmp_path / "here"
    for made in (whole, here):
        made.mkdir()
    last = world.run(begin, wanted, whole)[0]
    assert {"loss", "accuracy", "accuracy_min"} <= set(last) and ("top5" in last) == (name == "cifar10")
    records = lines(whole)
    steps = records[-1]["step"]
    assert steps == 10 and [r["step"] for r in records if r["kind"] == "eval"] == [5, 10]
    world.run(go_on, wanted, here, whole / "checkpoints/step-00000003.h5")
    timed = {"input_share"}
    shown = [[{k: v for k, v in r.items() if k not in timed} for r in found] for found in (lines(here), records)]
    assert shown[0] == [r for r in shown[1] if r["step"] > 3]
    same_files(whole / "checkpoints/step-00000010.h5", here / "checkpoints/step-00000010.h5")
    models = [torch.load(made / "model.pt", weights_only=True) for made in (whole, here)]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
