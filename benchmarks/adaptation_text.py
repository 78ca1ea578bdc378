"""English text from Debian packages as tokens, for ``adaptation_gpu.py``; documents held out.

    apt-get download anarchism bible-kjv bible-kjv-text r-cran-janeaustenr linux-doc-6.12 \
        python3.11-doc postgresql-doc-15
    for f in *.deb; do dpkg-deb -x "$f" "x/${f%%_*}"; done
    python benchmarks/adaptation_text.py x MODEL.gguf OUT

writes ``OUT/tokens.npz`` (uint16: ``train [n, length]``, ``test_<source>`` flat) and the tokenizer.
One of Austen's novels, the last tenth of the Bible and every tenth document elsewhere are held out.
"""

from __future__ import annotations

import argparse
import gzip
import random
import re
import struct
import subprocess
import zlib
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from adaptation_model import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORTEST = 2000  # shorter documents are left out [characters]
PART = 400_000  # the Bible is one text: cut into documents [characters]
HELD_OUT_NOVEL = 0


@dataclass(frozen=True)
class Document:
    """One text."""

    source: str
    held_out: bool
    text: str


class PlainText(HTMLParser):
    """The text of a page, one line per block."""

    SKIPPED = frozenset(["script", "style", "nav", "head", "svg"])
    BLOCKS = frozenset(
        "p div li h1 h2 h3 h4 h5 h6 tr pre br dt dd table ul ol section blockquote".split()  # noqa: SIM905
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Begin a line at a block."""
        self.depth += tag in self.SKIPPED
        self.parts.append("\n" if tag in self.BLOCKS else "")

    def handle_endtag(self, tag: str) -> None:
        """End a line at a block."""
        self.depth -= tag in self.SKIPPED and self.depth > 0
        self.parts.append("\n" if tag in self.BLOCKS else "")

    def handle_data(self, data: str) -> None:
        """Keep visible text."""
        self.parts.append("" if self.depth else data)


def read(path: Path) -> str:
    """Return a file's text, whether compressed or HTML."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf8", "replace")
    if path.suffix != ".html":
        return text
    page = PlainText()
    page.feed(text)
    return re.sub(r"\n\s*\n+", "\n\n", "".join(page.parts))


def novels(path: Path) -> Iterator[str]:
    """Read an R lazy-load database of character vectors: one novel each."""
    data = path.read_bytes()
    place = 0
    while place < len(data):
        stream = zlib.decompressobj()
        raw = stream.decompress(data[place + 4 :])
        place = len(data) - len(stream.unused_data)
        at = raw.find(b"\0\0\0\x10") + 8
        (count,) = struct.unpack(">I", raw[at - 4 : at])
        lines = []
        for _ in range(count):
            (size,) = struct.unpack(">I", raw[at + 4 : at + 8])
            size = 0 if size == 0xFFFFFFFF else size
            lines.append(raw[at + 8 : at + 8 + size].decode("utf8", "replace"))
            at += 8 + size
        yield "\n".join(lines)


def documents(root: Path) -> Iterator[Document]:
    """Return every document of the unpacked packages."""
    library = "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for number, text in enumerate(novels(root / library)):
        yield Document("austen", number == HELD_OUT_NOVEL, text)
    program, data = root / "bible-kjv/usr/bin/bible", root / "bible-kjv-text/usr/lib"
    command = [str(program), "-p", str(data), "-f", "gen1:1-rev22:21"]
    verses = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    verses = re.sub(r"(?m)^\S+ ", "", verses)
    for start in range(0, len(verses), PART):
        yield Document("kjv", start >= 0.9 * len(verses) - PART, verses[start : start + PART])
    pages = {
        "faq": "anarchism/usr/share/doc/anarchism/html/*.html",
        "linux": "linux-doc-6.12/**/_sources/**/*.txt",
        "python": "python3.11-doc/**/_sources/**/*.txt",
        "postgres": "postgresql-doc-15/**/*.html",
    }
    for source, pattern in pages.items():
        files = [p for p in sorted(root.glob(pattern)) if "translations" not in p.parts]
        texts = dict.fromkeys(read(path) for path in files if path.is_file())
        for number, text in enumerate(t for t in texts if len(t) >= SHORTEST):
            yield Document(source, number % 10 == 9, text)


def main() -> None:
    """Tokenise, hold out, pack, shuffle, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, help="folder of unpacked packages")
    parser.add_argument("model", type=Path, help="a GGUF file, for its tokenizer")
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=8192, help="training sequences [tokens]")
    parser.add_argument("--sequences", type=int, default=1024)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    train: dict[str, list[list[int]]] = {}
    test: dict[str, list[list[int]]] = {}
    for document in documents(arguments.root):
        ids = [*tokenizer(document.text.strip()).input_ids, tokenizer.eos_token_id]
        (test if document.held_out else train).setdefault(document.source, []).append(ids)
    rng, rows = random.Random(0), []
    for texts in train.values():
        rng.shuffle(texts)
        stream = list(chain.from_iterable(texts))
        whole = len(stream) // arguments.length * arguments.length
        rows += list(np.array(stream[:whole], np.uint16).reshape(-1, arguments.length))
    rng.shuffle(rows)
    print({f"train {name}": sum(map(len, texts)) for name, texts in train.items()})
    print({f"test {name}": sum(map(len, texts)) for name, texts in test.items()})
    print(f"{len(rows)} sequences of {arguments.length}, {arguments.sequences} of them taken")
    arrays = {
        f"test_{name}": np.array([*chain.from_iterable(texts)], np.uint16)
        for name, texts in test.items()
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(arguments.out)
    np.savez_compressed(
        arguments.out / "tokens.npz", train=np.stack(rows[: arguments.sequences]), **arrays
    )


if __name__ == "__main__":
    main()
