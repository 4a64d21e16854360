"""Tiny base models and a data set that they can learn, made here: no hub, no download.

What takes long to import is imported by the fixtures that need it.
"""

import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from hypothesis import settings

from pomona.datasets import Dataset, Task, load_dataset

if TYPE_CHECKING:
    from pomona.client.trainer import Profile

torch.set_num_threads(1)  # the machine's other cores are for the processes under test
settings.register_profile("shared", deadline=None)  # wall time would measure what runs beside a test
settings.load_profile("shared")

KEYWORDS = {
    "animal": ("cat", "dog", "horse", "sheep", "wolf", "otter", "eagle", "salmon"),
    "food": ("bread", "cheese", "soup", "apple", "honey", "rice", "pepper", "butter"),
    "tool": ("hammer", "saw", "drill", "wrench", "chisel", "pliers", "rake", "shovel"),
    "weather": ("rain", "snow", "storm", "fog", "hail", "frost", "breeze", "thunder"),
}
FILLERS = ("the", "a", "old", "new", "small", "near", "some", "very", "and", "with", "this", "that")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
REAL_PROCESSES = "tests/integration/"
ROWS_PER_CLASS = {"train": 24, "validation": 12}

MakeProfile = Callable[..., "Profile"]


def pytest_xdist_auto_num_workers() -> int | None:
    """Return one worker more than there are cores: those that wait for real processes leave theirs to the others."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else (psutil.cpu_count() or 1) + 1


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:  # noqa: ANN401 - xdist has no types
    """Give each worker whole files, and tests of real processes one by one to the first half of the workers.

    They take longest, so they come first. Half of their time is waiting, and so two of them beside each other and one
    worker for the other tests keep two cores busy. When the other tests are done, all workers take them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Processes(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            if not nodeid.startswith(REAL_PROCESSES):
                return nodeid.split("::", 1)[0]
            return f"{REAL_PROCESSES}demo" if "_the_demo_" in nodeid else nodeid  # one is for all who look

        def _assign_work_unit(self, node: Any) -> None:  # noqa: ANN401
            others = [scope for scope in self.workqueue if not scope.startswith(REAL_PROCESSES)]
            if others and node not in self.nodes[: (len(self.nodes) + 1) // 2]:
                self.workqueue.move_to_end(others[0], last=False)
            super()._assign_work_unit(node)

        def _reschedule(self, node: Any) -> None:  # noqa: ANN401
            if not self.workqueue or self._pending_of(self.assigned_work[node]) < 2:  # it runs one when it has the next
                super()._reschedule(node)

    config.option.loadscopereorder = False
    return Processes(config, log)


def _words() -> list[str]:
    return [*SPECIALS, *FILLERS, *(word for words in KEYWORDS.values() for word in words)]


def _save_tokenizer(folder: Path, *, frame: bool) -> int:
    """Write a tokenizer that knows whole words, and return the size of its vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    vocabulary = {word: i for i, word in enumerate(_words())}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if frame:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session", autouse=True)
def _migrated_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fill an empty SQLite database from one that the migrations have made, which takes them ten times as long.

    Those that upgrade step by step, or another process's registry, are not concerned, nor is PostgreSQL.
    """
    import sqlalchemy as sa

    from pomona.storage import schema
    from pomona.storage.engine import create_engine, sqlite_url

    path, migrate = tmp_path_factory.mktemp("template") / "registry.db", schema._upgrade

    def upgrade(engine: sa.Engine) -> None:
        if engine.dialect.name != "sqlite" or sa.inspect(engine).get_table_names():
            migrate(engine)
            return
        if not path.exists():
            made = create_engine(sqlite_url(path, read_only=False), read_only=False)
            migrate(made)
            made.dispose()
        with closing(sqlite3.connect(path)) as source, closing(engine.raw_connection()) as target:
            connection = target.driver_connection
            assert isinstance(connection, sqlite3.Connection)
            source.backup(connection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "_upgrade", upgrade)
        yield


@pytest.fixture
def flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the identity that Flower gives its apps, without which they can write no message."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder of random weights, in which the keywords of a class have like embeddings, as if pretrained."""
    return write_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


def write_tiny_bert(folder: Path) -> Path:
    """Write that encoder into a folder and return the folder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=_save_tokenizer(folder, frame=True),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = BertModel(config)
        embeddings = model.embeddings.word_embeddings.weight.data
        embeddings.mul_(0.3)
        model.embeddings.position_embeddings.weight.data.mul_(0.1)
        for i, words in enumerate(KEYWORDS.values()):
            embeddings[[_words().index(word) for word in words], i] += 3.0
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of random weights, with fewer key heads than query heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=_save_tokenizer(folder, frame=False),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(12)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file of four classes that one keyword decides; ``split`` says which rows are held out."""
    return write_toy_data(tmp_path_factory.mktemp("data") / "toy.csv")


def write_toy_data(path: Path) -> Path:
    """Write those rows into a file and return its path."""
    chooser = random.Random(5)
    rows = []
    for split, count in ROWS_PER_CLASS.items():
        for i in range(count):
            for label, words in KEYWORDS.items():
                fillers = chooser.sample(FILLERS, chooser.randint(1, 7))
                text = [*fillers, words[i % len(words)], chooser.choice(words)]
                chooser.shuffle(text)
                rows.append(f"{' '.join(text)},{label},{split}")
    chooser.shuffle(rows)
    path.write_text("\n".join(["text,label,split", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_profile(tiny_bert: Path, toy_data: Path) -> MakeProfile:
    """Return a maker of clients: number ``i`` of ``count`` trains on every ``count``-th row."""

    from pomona.client.trainer import Profile

    def make(number: int = 0, *, count: int = 1, name: str = "", rank: int = 4, model: Path | None = None) -> Profile:
        def load_data(task: str) -> Dataset:
            kind: Task = "causal-lm" if task == "causal-lm" else "classification"
            train = load_dataset(toy_data, split="train", task=kind)
            return train.subset(range(number, len(train), count))

        return Profile(
            name=name or f"client-{number}", rank=rank, load_data=load_data, model_folder=str(model or tiny_bert)
        )

    return make


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server; one is started unless POMONA_TEST_POSTGRES_URL names one."""
    if named := os.environ.get("POMONA_TEST_POSTGRES_URL"):
        yield named
        return
    from tests.postgresql import own_server

    try:
        with own_server() as server:
            yield server.url
    except FileNotFoundError as error:
        if os.environ.get("POMONA_TEST_POSTGRES") == "required":
            raise
        pytest.skip(f"NOT TESTED ON POSTGRESQL: {error}")
