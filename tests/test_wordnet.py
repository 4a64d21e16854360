"""The shipped subset is what its README says, and the script builds it from WordNet's own file."""

import gzip
import hashlib
import importlib.util
import os
import re
import zlib
from collections import Counter
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest

from pomona.datasets import WORDNET_NOUNS, class_names, load_dataset, split_of

SHIPPED = files("pomona.wordnet")
README = SHIPPED.joinpath("README.md").read_text(encoding="utf-8")
RECORDED = {name: digest for digest, name in re.findall(r"^sha256 ([0-9a-f]{64})  (\S+)", README, re.MULTILINE)}

# two header lines, then lines of data.noun with their words and pointers shortened
EXCERPT = """\
  1 This software and database is being provided to you, the LICENSEE, by  
  2 Princeton University under the following license.  By obtaining, using  
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived to have its own distinct existence  
02086723 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 02085998 n 0000 | a member of the genus Canis \
that has been domesticated; occurs in many breeds; "the dog barked all night"  
11556857 20 n 02 yew 0 true_yew 1 001 @ 11554175 n 0000 | yews  
11556858 20 n 01 Taxus 0 001 @ 11554175 n 0000 | yews  
07756325 13 n 01 fig 0 001 @ 07705931 n 0000 | fleshy sweet pear-shaped fruit; "a fig"; "two figs"  
12401335 20 n 01 fig_tree 0 001 @ 12400720 n 0000 | fleshy sweet pear-shaped fruit  
"""  # noqa: W291


def load_script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "build_wordnet_subset.py"
    spec = importlib.util.spec_from_file_location("build_wordnet_subset", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def recorded_source() -> Path | None:
    """Return a ``data.noun`` of the version that the subset was built from, if this machine has one."""
    for folder in (os.environ.get("POMONA_WORDNET_DIR"), "/usr/share/wordnet"):
        path = Path(folder, "data.noun") if folder else None
        if path and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == RECORDED["data.noun"]:
            return path
    return None


def test_the_shipped_bytes_have_the_recorded_hashes() -> None:
    packed = SHIPPED.joinpath("nouns.csv.gz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() == RECORDED["nouns.csv.gz"]
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == RECORDED["nouns.csv"]


def test_the_shipped_counts_are_the_recorded_ones() -> None:
    table = {
        name: tuple(map(int, numbers.split(" | ")))
        for name, numbers in re.findall(r"^\| (\w+) \| ((?:\d+ \| ){3}\d+) \|$", README, re.MULTILINE)
    }
    everything = load_dataset(WORDNET_NOUNS, split=None)
    splits = [Counter(load_dataset(WORDNET_NOUNS, split=split).labels) for split in ("train", "validation", "test")]
    measured = {
        name: (*(split[name] for split in splits), everything.labels.count(name)) for name in class_names(everything)
    }
    assert len(measured) == 24
    assert table.pop("total") == tuple(map(sum, zip(*measured.values(), strict=True)))
    assert table == measured


def test_no_text_comes_twice_and_every_split_is_the_one_of_its_text() -> None:
    everything = load_dataset(WORDNET_NOUNS, split=None)
    assert len(set(everything.texts)) == len(everything) == 9542
    assert list(everything.texts) == sorted(everything.texts)
    rows = gzip.decompress(SHIPPED.joinpath("nouns.csv.gz").read_bytes()).decode().splitlines()[1:]
    assert [row.rsplit(",", 1)[1] for row in rows] == [split_of(text) for text in everything.texts]


def test_the_splits_are_disjoint_and_complete() -> None:
    train, validation, test = (
        set(load_dataset(WORDNET_NOUNS, split=split).texts) for split in ("train", "validation", "test")
    )
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert train | validation | test == set(load_dataset(WORDNET_NOUNS, split=None).texts)


def test_the_licence_notice_ships_beside_the_data() -> None:
    notice = SHIPPED.joinpath("LICENSE-WORDNET").read_text(encoding="utf-8")
    assert "WordNet 3.1 Copyright 2011 by Princeton University.  All rights reserved." in notice
    assert "Permission to use, copy, modify and distribute this software and" in notice


def test_the_parser_reads_wordnets_lines() -> None:
    assert script.parse(EXCERPT.splitlines()) == {
        "a member of the genus Canis that has been domesticated; occurs in many breeds": {"animal"},
        "yews": {"plant"},
        "fleshy sweet pear-shaped fruit": {"food", "plant"},
    }


def test_a_gloss_of_two_classes_is_in_neither() -> None:
    rows = script.select(script.parse(EXCERPT.splitlines()))
    assert [(text, label) for text, label, _ in rows] == [
        ("a member of the genus Canis that has been domesticated; occurs in many breeds", "animal"),
        ("yews", "plant"),
    ]


def test_the_choice_of_glosses_ignores_the_order_of_the_file() -> None:
    glosses = {f"gloss {number}": {"plant"} for number in range(50)}
    chosen = script.select(glosses, per_class=10)
    assert chosen == script.select(dict(reversed(glosses.items())), per_class=10)
    assert {text for text, _, _ in chosen} != {text for text, _, _ in script.select(glosses)[:10]}


def test_the_licence_is_read_from_the_head_of_the_file() -> None:
    assert script.licence(EXCERPT.splitlines()) == (
        "This software and database is being provided to you, the LICENSEE, by\n"
        "Princeton University under the following license.  By obtaining, using\n"
    )


@pytest.mark.parametrize("line", ["no bar", "1 2 3 | a gloss", "00001740 29 v 01 breathe 0 | draw air"])
def test_a_line_of_another_form_is_refused_with_its_number(line: str) -> None:
    with pytest.raises(ValueError, match="line 2 is not a noun of WordNet"):
        script.parse(["  1 header", line])


def test_packing_leaves_no_time_and_no_name() -> None:
    packed = script.pack(b"text,label,split\n")
    assert packed == script.pack(b"text,label,split\n")
    assert packed[3:8] == bytes(5)  # RFC 1952: no flags, so no name; modification time 0
    assert gzip.decompress(packed) == b"text,label,split\n"


@pytest.mark.skipif(recorded_source() is None, reason="set POMONA_WORDNET_DIR to the folder of WordNet 3.1")
def test_the_script_rebuilds_the_shipped_subset() -> None:
    source = recorded_source()
    assert source is not None
    lines = source.read_text(encoding="utf-8").splitlines()
    content = script.to_csv(script.select(script.parse(lines)))
    shipped = SHIPPED.joinpath("nouns.csv.gz").read_bytes()
    assert content == gzip.decompress(shipped)
    assert script.licence(lines) == SHIPPED.joinpath("LICENSE-WORDNET").read_text(encoding="utf-8")
    if "zlib-ng" not in zlib.ZLIB_RUNTIME_VERSION:
        assert script.pack(content) == shipped
