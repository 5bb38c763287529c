"""English-German sentence pairs from the message catalogs that Debian packages install, as the task wmt16 reads them.

    python benchmarks/translation_data.py data/catalogs                  # of the packages that are installed here
    python benchmarks/translation_data.py data/catalogs --download       # and of some more, 163 MB
    slowmo data vocab data/catalogs --size 8000

A catalog (gettext .mo) holds the English messages of a program and their translations. A message with plural forms
gives two pairs: singular and plural. Mark-up, line breaks and the mark of a shortcut ("_Open", "&Open") are taken out.
Left out are messages in which a format ("%s", "{name}") is not in both languages, that are not translated, hold no
words or more than 60, or are more than twice as long (and 20 characters longer) in one language; and lists of names
(iso-codes). An English message comes once, with its first translation. Which of train, valid and test it belongs to is
decided by a checksum of its letters, so that the same message of two programs is never in two of them, and more
packages move no message from one to another.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import html
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

INSTALLED = [Path("/usr/share/locale"), Path("/usr/share/locale-langpack")]
PACKAGES = """
    audacity-data binutils-common brasero-common bleachbit cinnamon-l10n coreutils darktable devscripts
    evolution-common filezilla-common gcc-12-locales gettext gimp-data git glade gnome-control-center-data
    gnucash-common gnumeric-common gnupg-l10n gramps k3b-data kate5-data kdenlive-data kmymoney-common
    krita-l10n libgphoto2-l10n libgtk-3-common libgtk-4-common libreoffice-l10n-de lyx-common mc-data mutt
    nautilus-data pidgin-data poedit-common python3-django roundcube-core rosegarden shotwell-common
    system-config-printer-common wordpress-l10n wx3.2-i18n xfce4-settings
""".split()  # noqa: SIM905 (a list of so many strings is a page)
HELD_OUT = 3  # percent for valid, and for test
FORMAT = re.compile(
    r"%(?:\d+\$)?[-+ #0]*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh|h|ll|l|z|j|t|L)?[a-zA-Z]"  # C: %s, %-3d, %1$lu
    r"|%\(\w+\)[sd]|%\d+|\{\w*\}"  # Python, Qt
)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
SHORTCUT = re.compile(r"(?<!\w)_(?=[^\W_]+(?!\w))|[&~](?=\w)")  # not the underscore of some_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for train.en, train.de, valid.*, test.*")
    parser.add_argument("--download", action="store_true", help="also fetch PACKAGES with apt-get; installs nothing")
    arguments = parser.parse_args()
    seen: dict[str, tuple[str, str]] = {}  # by the English side's key: one translation each, the first
    with tempfile.TemporaryDirectory() as scratch:
        folders = INSTALLED + (download(Path(scratch)) if arguments.download else [])
        found = (path for folder in folders for path in folder.rglob("de/LC_MESSAGES/*.mo"))
        catalogs = sorted(path for path in found if not path.name.startswith("iso_"))  # names of languages, countries
        table = collections.Counter[str]()
        for path in catalogs:
            for english, german in messages(path):
                pair = clean(english), clean(german)
                if why := unfit(*pair):
                    table[why] += 1
                elif (name := key(pair[0])) in seen:
                    table["seen before"] += 1
                else:
                    seen[name] = pair
                    table["taken"] += 1
    if not seen:
        sys.exit("translation_data: no German catalogs here. Type --download, or: apt-get install gcc-12-locales")
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
    for name, pair in sorted(seen.items()):
        splits[split(name)].append(pair)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, pairs in splits.items():
        for side, language in enumerate(("en", "de")):
            text = "".join(f"{pair[side]}\n" for pair in pairs)
            (arguments.out / f"{name}.{language}").write_text(text, encoding="utf-8")
    print(f"{len(catalogs)} catalogs: {dict(table.most_common())}")
    words = sum(len(pair[0].split()) for pair in seen.values())
    counts = ", ".join(f"{len(pairs):,} {name}" for name, pairs in splits.items())
    print(f"{arguments.out}: {counts}; {words:,} English words")


def download(scratch: Path) -> list[Path]:
    """The folders of PACKAGES' catalogs, unpacked in `scratch`; a package that cannot be had is named and left out."""
    for package in PACKAGES:
        got = subprocess.run(
            ["apt-get", "download", "-q", package], cwd=scratch, capture_output=True, timeout=300, check=False
        )
        if got.returncode:
            print(f"no package {package}: {got.stderr.decode(errors='replace').strip()[-100:]}", file=sys.stderr)
    for file in scratch.glob("*.deb"):
        place = scratch / file.stem
        place.mkdir()
        tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", file], capture_output=True, timeout=300, check=True).stdout
        subprocess.run(
            ["tar", "-x", "-C", place, "--wildcards", "*/de/LC_MESSAGES/*.mo"],
            input=tar, capture_output=True, timeout=300, check=False,  # a package may have none
        )  # fmt: skip
        file.unlink()
    return [scratch]


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """(English, German) of every message of a catalog; none of a file that is no catalog.

    The format: a header of seven 32-bit words, then tables of (length, offset) of originals and translations; a
    message with plural forms is text of several parts, NUL between them; the first message, "", holds the charset.
    """
    data = path.read_bytes()
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        return
    _, count, originals, translations = struct.unpack_from(f"{order}4I", data, 4)
    charset = "ascii"
    for i in range(count):
        sides = []
        for table in (originals, translations):
            length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * i)
            sides.append(data[offset : offset + length])
        if not sides[0]:
            found = re.search(rb"charset=([\w-]+)", sides[1])
            charset = found[1].decode() if found else charset
            continue
        try:
            english, german = (side.decode(charset).split("\0") for side in sides)
        except (UnicodeDecodeError, LookupError):
            continue
        yield english[0].rpartition("\4")[2], german[0]  # before \4 stands the context
        if len(english) > 1 and len(german) > 1:
            yield english[1], german[-1]


def clean(text: str) -> str:
    """A message as a sentence: no mark-up, no shortcut, single spaces."""
    text = html.unescape(TAG.sub(" ", text))
    text = re.sub(r"\(&\w\)", "", text)  # "Datei (&D)"
    text = SHORTCUT.sub("", text)
    return " ".join(text.split())


def unfit(english: str, german: str) -> str:
    """Why the pair is left out; "" if it is not."""
    if not english or not german:
        return "empty"
    if english == german:
        return "not translated"
    if not re.search(r"[A-Za-z]{2}", FORMAT.sub("", english)) or not re.search(r"\w{2}", FORMAT.sub("", german)):
        return "no words"
    if sorted(FORMAT.findall(english)) != sorted(FORMAT.findall(german)):
        return "other formats"
    if max(len(english.split()), len(german.split())) > 60:
        return "too long"
    short, long = sorted((len(english), len(german)))
    if long > 2 * short and long - short > 20:
        return "other lengths"
    return ""


def key(english: str) -> str:
    """What two messages share that are one for a test: letters and formats, not case, digits, punctuation."""
    return re.sub(r"[\W\d_]+", " ", english.lower()).strip() or english


def split(name: str) -> str:
    """The split of the pairs of this key: by a checksum, so that it is the same whatever else there is."""
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 100
    return "test" if percent < HELD_OUT else "valid" if percent < 2 * HELD_OUT else "train"


if __name__ == "__main__":
    main()
