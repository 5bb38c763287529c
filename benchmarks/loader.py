"""How fast images are decoded and augmented, per core, from a folder and from a packed file, by processes and threads.

    python benchmarks/loader.py [--images 600] [--seconds 8] [--repeat 3] [--out benchmarks/NAME.json]

The images are made from the two photographs that scikit-learn ships, cut at random, 500x375 pixels, JPEG quality 92.
Every way takes its turn in each repetition; medians. The random-resized crop to 224x224, batches of 32.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image, features
from sklearn.datasets import load_sample_images

from slowmo_mpi import simulate
from slowmo_mpi.data import decode, pack
from slowmo_mpi.data.images import source
from slowmo_mpi.data.loader import Images

BATCH, SIDE = 32, 224


def make(folder: Path, images: int) -> float:
    """A folder of so many training images and a tenth as many for validation; the mean bytes of one."""
    photographs = [Image.fromarray(x) for x in load_sample_images().images]
    chance, sizes = random.Random(0), []
    for split, number in (("train", images), ("val", images // 10)):
        for i in range(number):
            photograph = photographs[i % 2]
            share = chance.uniform(0.75, 1.0)
            w, h = int(photograph.width * share), int(photograph.height * share)
            x, y = chance.randint(0, photograph.width - w), chance.randint(0, photograph.height - h)
            part = photograph.resize((500, 375), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
            out = io.BytesIO()
            part.save(out, "JPEG", quality=92)
            place = folder / split / f"n{i % 10:08}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"n{i % 10:08}_{i}.JPEG").write_bytes(out.getvalue())
            sizes.append(len(out.getvalue()))
    return statistics.mean(sizes)


def by_loader(place: Path, workers: int, seconds: float) -> float:
    """Images per second out of the loader, the processes' start not counted."""
    images = Images(source(place, "train"), SIDE, 0, True, workers)
    chance = torch.Generator().manual_seed(0)
    order = ((e, torch.randint(len(images), (BATCH,), generator=chance)) for e in count())
    stream = images.batches(order)
    for _ in range(4):
        next(stream)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(stream)
        done += BATCH
    rate = done / (time.perf_counter() - started)
    stream.close()
    return rate


def by_cpu(place: Path, seconds: float) -> float:
    """Images per second of CPU time, decoded by this process: what one whole core does, whatever runs beside it."""
    found, decoder = source(place, "train"), decode.Decoder(bytearray(3 * SIDE * SIDE), SIDE, 0)
    started, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        decoder.do(found.task(0, 0, done % len(found.labels)))
        done += 1
    decoder.close()
    return done / (time.process_time() - cpu)


def by_threads(place: Path, threads: int, seconds: float) -> float:
    """The same work on threads of this process."""
    found, local = source(place, "train"), threading.local()
    ends = time.perf_counter() + seconds

    def one(number: int) -> int:
        if time.perf_counter() > ends:
            return 0
        if not hasattr(local, "decoder"):
            local.decoder = decode.Decoder(bytearray(3 * SIDE * SIDE), SIDE, 0)
        return not local.decoder.do(found.task(0, 0, number % len(found.labels))).fault

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(one, range(int(seconds * 3000))))
    return done / (time.perf_counter() - started)


def python_beside(work: Callable[[threading.Event], None] | None, seconds: float) -> float:
    """Rounds per second of a loop in pure Python, such as a training loop between its kernels, beside `work`."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,)) if work else None
    if thread:
        thread.start()
        time.sleep(1.0)
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        rounds += 1
    stop.set()
    if thread:
        thread.join()
    return rounds / seconds


def decoding_thread(place: Path) -> Callable[[threading.Event], None]:
    found = source(place, "train")

    def work(stop: threading.Event) -> None:
        decoder = decode.Decoder(bytearray(3 * SIDE * SIDE), SIDE, 0)
        for i in count():
            if stop.is_set():
                return
            decoder.do(found.task(0, 0, i % len(found.labels)))

    return work


def decoding_process(place: Path) -> Callable[[threading.Event], None]:
    """One decoder that is kept busy by a thread, which mostly waits."""

    def work(stop: threading.Event) -> None:
        images = Images(source(place, "train"), SIDE, 0, True, 1)
        stream = images.batches((e, torch.arange(BATCH)) for e in count())
        while not stop.is_set():
            next(stream)
        stream.close()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder, file = Path(made) / "net", Path(made) / "net.h5"
        mean_bytes = make(folder, options.images)
        packing = simulate(1, lambda comm: pack.pack(folder, file, comm, print))[0]
        seconds = options.seconds
        ways: dict[str, Callable[[], float]] = {
            f"{name}, {workers} process{'es' if workers > 1 else ''}": _bind(by_loader, place, workers, seconds)
            for name, place in (("folder", folder), ("packed", file))
            for workers in (1, 2)
        }
        ways |= {
            f"{name}, per second of CPU time": _bind(by_cpu, place, seconds)
            for name, place in (("folder", folder), ("packed", file))
        }
        ways |= {f"packed, {n} thread{'s' if n > 1 else ''}": _bind(by_threads, file, n, seconds) for n in (1, 2)}
        ways |= {
            "python alone, rounds/s": lambda: python_beside(None, 2.0),
            "python beside a decoding process": lambda: python_beside(decoding_process(file), 2.0),
            "python beside a decoding thread": lambda: python_beside(decoding_thread(file), 2.0),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeat):
            for name, way in ways.items():
                taken[name].append(way())
                print(f"{name:<36}{taken[name][-1]:>14,.1f}", flush=True)
        copied = sum(packing.images.values()) / packing.copy_s
        result: dict[str, Any] = {
            "image_bytes": mean_bytes, "libjpeg_turbo": features.version("libjpeg_turbo"), "cores": os.cpu_count(),
            "load_average": os.getloadavg(), "pack_copy_images_per_s": copied,
            "median": {name: statistics.median(rates) for name, rates in taken.items()}, "all": taken,
        }  # fmt: skip
    print(json.dumps(result["median"], indent=2))
    print(f"packing: {copied:.0f} images/s copied (and decoded at 1/8), 1 rank, 4 threads")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _bind(way: Callable[..., float], *arguments: Any) -> Callable[[], float]:
    return lambda: way(*arguments)


if __name__ == "__main__":
    main()
