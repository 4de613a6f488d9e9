"""Makes corpus.txt.xz, the text that the embedded model learns from, out of four public-domain sources.

    bible -f -l0 gen1:1-rev22:21 > kjv.txt        # the program of Debian's bible-kjv
    python3 scripts/train/make_corpus.py --kjv kjv.txt --austen Rdata.rdb --devil devil.dict.dz --jargon jargon.dict.dz

| source | Debian package, file | why it is public domain (the package's copyright file says so) |
|---|---|---|
| King James Bible, 1611 | bible-kjv-text, /usr/lib/bible.data | copyright expired |
| Jane Austen's six novels, 1811-1818 | r-cran-janeaustenr, .../janeaustenr/data/Rdata.rdb | the author died in 1817 |
| Ambrose Bierce, The Devil's Dictionary, 1911 | dict-devil, /usr/share/dictd/devil.dict.dz | copyright expired |
| The Jargon File 4.4.7 | dict-jargon, /usr/share/dictd/jargon.dict.dz | "This document is in the public domain" |

The result is UTF-8 text: a paragraph (in the Bible a verse) is a line, and a form feed alone on a line separates
documents (a chapter, or a dictionary entry). Verse numbers, headings, title pages, cross-reference braces,
pronunciations, listings and addresses are left out; typographic quotes and dashes become ASCII.
"""

import argparse
import gzip
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "\u00a0": " ", "\t": " "}
)


def clean(text: str) -> str:
    """One paragraph on one line in plain ASCII punctuation, without the underscores that mark emphasis."""
    text = text.translate(ASCII).replace("_", "")
    return re.sub(r"\s+", " ", text).strip()


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines that are not blank."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def read_kjv(path: Path) -> Iterator[list[str]]:
    """A chapter a document, a verse a paragraph; an input line is `Ge1:1 In the beginning ...`."""
    chapter = ""
    verses: list[str] = []
    for line in path.read_text(encoding="latin-1").splitlines():
        label, _, verse = line.partition(" ")
        if label.partition(":")[0] != chapter:
            if verses:
                yield verses
            chapter, verses = label.partition(":")[0], []
        verses.append(clean(verse))
    yield verses


def r_strings(record: bytes) -> list[str]:
    """The character vector of one serialised R object (XDR, version 3).

    Header: `X\\n`, three version integers, the length and name of the encoding; then a STRSXP (flags, count) of
    CHARSXPs (flags, byte length, bytes). Source: R Internals, "Serialization Formats".
    """
    assert record[:2] == b"X\n", "not an XDR serialisation"
    at = 2 + 12
    at += 4 + struct.unpack_from(">i", record, at)[0]
    flags, count = struct.unpack_from(">ii", record, at)
    assert flags & 0xFF == 16, "not a character vector"
    at += 8
    strings = []
    for _ in range(count):
        length = struct.unpack_from(">i", record, at + 4)[0]
        strings.append(record[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return strings


def read_austen(path: Path) -> Iterator[list[str]]:
    """A chapter a document. The file is a row of records (uint32 size, zlib stream): each novel's vector of lines."""
    data = path.read_bytes()
    while data:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        chapter: list[str] = []
        seen_heading = False  # what comes before the first chapter is the title page
        for block in paragraphs(lines):
            text = clean(" ".join(block))
            if re.match(r"chapter\s+([ivxlc]+|\d+)\b", text, re.IGNORECASE) and len(text) < 30:
                if chapter:
                    yield chapter
                chapter, seen_heading = [], True
            elif seen_heading and len(text) > 25 and not text.isupper() and "THE END" not in text:
                chapter.append(text)
        yield chapter


def read_devil(path: Path) -> Iterator[list[str]]:
    """An entry a document: the head word in its definition, then its verses, a line each."""
    text = gzip.decompress(path.read_bytes()).decode("latin-1")
    text = text[text.index("                              PREFACE") :]
    entry: list[str] = []
    for block in paragraphs(text.splitlines()[1:]):
        prose = not block[0].startswith("    ")
        if prose and re.match(r"[A-Z][A-Z' -]+[,.]", block[0]) and entry:
            yield entry
            entry = []
        if prose:
            entry.append(clean(" ".join(block)))
        else:
            entry += [line for line in map(clean, block) if len(line) > 12]
    yield entry


def read_jargon(path: Path) -> Iterator[list[str]]:
    """An entry a document: `Head word: text`, its paragraphs of prose only."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    head = ""
    entry: list[str] = []
    for block in paragraphs(lines[lines.index("(TM)") :]):
        if not block[0].startswith("    "):
            if entry:
                yield entry
            head, entry = clean(block[0]), []
            continue
        text = clean(" ".join(block))
        listing = block[0].startswith("     ") or re.search(r"[@<>|\\=\u2500-\u257f]|://|::", text)
        text = re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", text)
        text = re.sub(r"^(\[[^]]*\]\s*)+", "", text)
        text = re.sub(r"^\d+\.\s*(\[[^]]*\]\s*)*", "", text).lstrip(". ")
        if not listing and len(text) > 60:
            entry.append(f"{head}: {text}" if head else text)
            head = ""
    yield entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    readers = {"austen": read_austen, "kjv": read_kjv, "devil": read_devil, "jargon": read_jargon}
    for name in readers:
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE / "corpus.txt.xz")
    arguments = vars(parser.parse_args())
    documents = []
    for name, reader in readers.items():
        found = ["\n".join(entry) for entry in reader(arguments[name]) if entry]
        print(f"{name}: {len(found)} documents, {sum(map(len, found)):,} characters")
        documents += found
    text = "\n\f\n".join(documents) + "\n"
    arguments["out"].write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{arguments['out'].name}: {len(text.encode()):,} bytes, compressed {arguments['out'].stat().st_size:,}")


if __name__ == "__main__":
    main()
