"""WordNet's verbs by lexicographer file, for a stream that is longer than its nouns are.

Read from ``data.verb``, which Debian's package ``wordnet-base`` installs (WordNet 3.0). The format is in
https://wordnet.princeton.edu/documentation/wndb5wn, the numbers of files in lexnames5wn.
"""

from pathlib import Path

from pomona.datasets import split_of

WORDNET = Path("/usr/share/wordnet")
CLASSES = {
    "29": "body",
    "30": "change",
    "31": "cognition",
    "32": "communication",
    "33": "competition",
    "34": "consumption",
    "35": "contact",
    "36": "creation",
    "37": "emotion",
    "38": "motion",
    "39": "perception",
    "40": "possession",
    "41": "social",
    "42": "stative",
    "43": "weather",
}


def verbs_by_split(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Return texts and labels (``verb.change`` and so on) of each split; a gloss of two classes is in none.

    Splits are those of the shipped nouns, by the hash of the text.
    """
    found: dict[str, set[str]] = {}
    for text, label in _glosses(_read(folder / "data.verb")):
        found.setdefault(text, set()).add(label)
    parts: dict[str, tuple[list[str], list[str]]] = {split: ([], []) for split in ("train", "validation", "test")}
    for text, labels in sorted(found.items()):
        if len(labels) == 1:
            texts, named = parts[split_of(text)]
            texts.append(text)
            named.extend(labels)
    return parts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SystemExit(
            f"{path} is missing; on Debian: apt-get install wordnet-base, elsewhere name the folder of WordNet's data "
            "files with --wordnet"
        ) from error


def _glosses(content: str) -> list[tuple[str, str]]:
    found = []
    for line in content.splitlines():
        head, bar, gloss = line.partition(" | ")
        if bar and not line.startswith("  ") and (text := " ".join(gloss.split('; "')[0].split())):
            found.append((text, f"verb.{CLASSES[head.split()[1]]}"))
    return found
