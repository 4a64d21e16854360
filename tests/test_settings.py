"""A run file that is wrong says where, what came and what to do, before anything is started."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pomona.aggregation_settings import AggregationSettings, SelfPruningSettings
from pomona.errors import ConfigError
from pomona.run_file import load_settings, parse_settings
from pomona.settings import RunSettings, TrainingSettings
from pomona.strategies import BY_NAME as FACTS
from pomona.strategies import EQUAL_RANK

FULL = """
name = "news.en_1-b"
task = "causal-lm"
rounds = 7
seed = 11

[model]
base = "~/models/tiny"
sha256 = "{sha}"
target_modules = ["q_proj", "v_proj"]
max_length = 128

[data]
source = "news.csv"
labels = ["a", "b"]
evaluation_examples = 10
evaluation_split = "all"
partition = "column"
partition_column = "site"

[cohort]
fraction = 0.25
min_clients = 8
min_replies = 2
join_timeout_s = 5
round_deadline_s = 30.5

[training]
local_epochs = 2
max_steps = 100
batch_size = 4
learning_rate = 1e-3
head_learning_rate = 5e-3
weight_decay = 0.01
alpha_per_rank = 1
rslora = true

[aggregation]
strategy = "flora-bounded"
max_rank = 8
energy = 0.99
max_update_norm = 10
max_examples = 500

[simulation]
ranks = [2, 8]
cpus_per_client = 0.5
gpus_per_client = 0
""".replace("{sha}", "0123456789abcdef" * 4)


def test_a_name_is_all_that_a_run_needs() -> None:
    """A default that its own check refuses would make every short run file wrong."""
    run = parse_settings('name = "demo"', source="run.toml")
    assert run == RunSettings(name="demo")
    assert (run.task, run.rounds, run.seed) == ("classification", 3, 0)
    assert run.model.base == "all-minilm-l6-v2"
    assert run.cohort.fraction is None
    assert run.cohort.size is None
    assert max(run.simulation.ranks) <= run.aggregation.max_rank


def test_every_setting_can_be_given() -> None:
    run = parse_settings(FULL, source="run.toml")
    assert run.name == "news.en_1-b"
    assert run.model.target_modules == ("q_proj", "v_proj")
    assert run.cohort.round_deadline_s == 30.5
    assert run.training.rslora is True
    assert run.aggregation.energy == 0.99
    assert run.simulation.ranks == (2, 8)
    assert RunSettings.model_validate_json(run.model_dump_json()) == run, "it travels as JSON to the coordinator"


def test_settings_are_frozen() -> None:
    """Settings that change during a run would no longer be those that the registry recorded."""
    run = parse_settings(FULL, source="run.toml")
    for section, name in ((run, "rounds"), (run.training, "batch_size"), (run.cohort, "size"), (run.model, "base")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)
    assert hash(run) == hash(parse_settings(FULL, source="again"))


WRONG: dict[str, tuple[str, tuple[str, ...]]] = {
    "no name": ("rounds = 3", ("name: Field required",)),
    "unknown key": ('name = "a"\nround = 3', ("round: unknown; did you mean 'rounds'?",)),
    "unknown section": ('name = "a"\n[trainning]\nbatch_size = 3', ("trainning: unknown; did you mean 'training'?",)),
    "a truth for a number": ('name = "a"\n[aggregation]\nmax_rank = true', ("max_rank", "valid integer, got True")),
    "digits in quotes": ('name = "a"\n[aggregation]\nmax_rank = "16"', ("max_rank", "valid integer, got '16'")),
    "text for a truth": ('name = "a"\n[aggregation]\nwarm_start = "yes"', ("warm_start", "valid boolean, got 'yes'")),
    "a rank of its own in the run file": (
        'name = "a"\n[aggregation]\nrank = "auto"',
        ("aggregation.rank: expected a whole number", "pomona join --rank auto"),
    ),
    "a schedule that ends after the run": (
        'name = "a"\nrounds = 2\n[aggregation]\nrank_schedule = [[1, 4], [3, 8]]',
        ("round 3 of a run of 2 rounds", "raise rounds"),
    ),
    "a schedule above the largest rank": (
        'name = "a"\n[aggregation]\nmax_rank = 16\nrank_schedule = [[1, 32]]',
        ("rank_schedule has rank 32, above aggregation.max_rank=16",),
    ),
    "trusted data that score, by another path": (
        'name = "a"\n[data]\nsource = "x.csv"\n[defence]\nkind = "fltrust"\ntrusted_data = "./x.csv"',
        ("defence.trusted_data should be other data",),
    ),
    "unknown key in a section": (
        'name = "a"\n[training]\nlr = 3',
        ("training.lr: unknown; known are local_epochs, max_steps",),
    ),
    "a key in the wrong section": (
        'name = "a"\n[training]\nmax_rank = 3',
        ("training.max_rank: unknown; it belongs in [aggregation]",),
    ),
    "fraction and size": (
        'name = "a"\n[cohort]\nfraction = 0.5\nsize = 3',
        ("cohort: give cohort.fraction or cohort.size, not both", "fraction=0.5 size=3"),
    ),
    "more replies than are asked": (
        'name = "a"\n[cohort]\nmin_replies = 4\nsize = 3',
        ("cohort.min_replies=4 can never be reached by cohort.size=3", "lower min_replies or raise size"),
    ),
    "fraction 0": ('name = "a"\n[cohort]\nfraction = 0.0', ("cohort.fraction", "greater than 0, got 0.0")),
    "fraction above 1": ('name = "a"\n[cohort]\nfraction = 1.5', ("less than or equal to 1, got 1.5",)),
    "size 0": ('name = "a"\n[cohort]\nsize = 0', ("cohort.size", "greater than 0, got 0")),
    "no clients": ('name = "a"\n[cohort]\nmin_clients = 0', ("cohort.min_clients", "got 0")),
    "no time": ('name = "a"\n[cohort]\nround_deadline_s = 0', ("cohort.round_deadline_s", "got 0")),
    "time without end": ('name = "a"\n[cohort]\nround_deadline_s = inf', ("round_deadline_s", "finite number")),
    "rank 0": ('name = "a"\n[simulation]\nranks = [4, 0]', ("simulation.ranks.1", "greater than 0, got 0")),
    "negative rank": ('name = "a"\n[simulation]\nranks = [-4]', ("simulation.ranks.0", "got -4")),
    "rank as a fraction": ('name = "a"\n[simulation]\nranks = [4.5]', ("simulation.ranks.0", "got 4.5")),
    "no ranks": ('name = "a"\n[simulation]\nranks = []', ("simulation.ranks", "at least 1 item")),
    "a server learning rate for a strategy that keeps its factors": (
        'name = "a"\n[aggregation]\nstrategy = "ffa"\nrank = 4\nserver_optimizer.learning_rate = 0.5',
        ("aggregation.server_optimizer is for ffa-nested, flora-bounded, got strategy='ffa'",),
    ),
    "a schedule and pruning": (
        'name = "a"\n[aggregation]\nstrategy = "hetlora"\nrank_schedule = [[2, 4]]\nself_pruning = {}',
        ("rank_schedule and aggregation.self_pruning contradict",),
    ),
    "trusted data that score the run": (
        'name = "a"\n[data]\nsource = "x.csv"\n[defence]\nkind = "fltrust"\ntrusted_data = "x.csv"',
        ("should be other data than those that score the run", "'x.csv'"),
    ),
    "max_rank 0": ('name = "a"\n[aggregation]\nmax_rank = 0', ("aggregation.max_rank", "got 0")),
    "energy 0": ('name = "a"\n[aggregation]\nenergy = 0.0', ("aggregation.energy", "got 0.0")),
    "unknown strategy": ('name = "a"\n[aggregation]\nstrategy = "fedavg"', ("'flora-bounded'", "got 'fedavg'")),
    "equal ranks without a rank": (
        'name = "a"\n[aggregation]\nstrategy = "fedit"',
        ("aggregation.rank goes with the strategies of equal ranks (fedex, fedit, ffa, rolora)", "rank=None"),
    ),
    "a rank for unequal ranks": (
        'name = "a"\n[aggregation]\nrank = 8',
        ("aggregation.rank goes with the strategies of equal ranks", "got strategy='flora-bounded' and rank=8"),
    ),
    "an equal rank above max_rank": (
        'name = "a"\n[aggregation]\nstrategy = "ffa"\nrank = 65',
        ("aggregation.rank=65 is above aggregation.max_rank=64",),
    ),
    "a schedule that goes back": (
        'name = "a"\n[aggregation]\nrank_schedule = [[3, 4], [1, 8]]',
        ("the rounds of aggregation.rank_schedule should ascend, got [3, 1]",),
    ),
    "a schedule for an equal rank": (
        'name = "a"\n[aggregation]\nstrategy = "ffa"\nrank = 4\nrank_schedule = [[1, 4]]',
        ("aggregation.rank and aggregation.rank_schedule contradict each other",),
    ),
    "rank 0 in a schedule": (
        'name = "a"\n[aggregation]\nrank_schedule = [[1, 0]]',
        ("aggregation.rank_schedule.0.1", "got 0"),
    ),
    "attackers without a defence": (
        'name = "a"\n[defence]\nattackers = 2',
        ("defence.attackers goes with multi-krum and trimmed-mean", "got kind='none' and attackers=2"),
    ),
    "a defence that assumes no attackers": (
        'name = "a"\n[defence]\nkind = "trimmed-mean"',
        ("got kind='trimmed-mean' and attackers=0",),
    ),
    "too few updates for Krum": (
        'name = "a"\n[defence]\nkind = "multi-krum"\nattackers = 2',
        ("multi-krum needs 7 updates to withstand 2 attackers; raise cohort.min_replies, now 1",),
    ),
    "too few updates to trim": (
        'name = "a"\n[defence]\nkind = "trimmed-mean"\nattackers = 2\n[cohort]\nmin_replies = 4',
        ("a mean trimmed by 2 needs 5 updates; raise cohort.min_replies, now 4",),
    ),
    "a defence of a strategy that replaces": (
        'name = "a"\n[defence]\nkind = "geometric-median"\n[aggregation]\nstrategy = "flexlora"',
        ("a defence needs a strategy that adds changes (ffa-nested, flora-bounded), got strategy='flexlora'",),
    ),
    "a warm start elsewhere": (
        'name = "a"\n[aggregation]\nstrategy = "flora"\nwarm_start = true',
        ("aggregation.warm_start is for flora-bounded, got strategy='flora'",),
    ),
    "partitioned weights elsewhere": (
        'name = "a"\n[aggregation]\nrank_partitioned = true',
        ("aggregation.rank_partitioned is for flexlora, hetlora, got strategy='flora-bounded'",),
    ),
    "self-pruning elsewhere": (
        'name = "a"\n[aggregation.self_pruning]\npenalty = 0.1',
        ("aggregation.self_pruning is for hetlora, got strategy='flora-bounded'",),
    ),
    "a tail that is nothing": (
        'name = "a"\n[aggregation]\nstrategy = "hetlora"\n[aggregation.self_pruning]\ndecay = 1.0',
        ("aggregation.self_pruning.decay", "less than 1, got 1.0"),
    ),
    "a tail that is everything": (
        'name = "a"\n[aggregation]\nstrategy = "hetlora"\n[aggregation.self_pruning]\ndecay = 0',
        ("aggregation.self_pruning.decay", "greater than 0, got 0"),
    ),
    "a reward for tails": (
        'name = "a"\n[aggregation]\nstrategy = "hetlora"\n[aggregation.self_pruning]\npenalty = -1',
        ("aggregation.self_pruning.penalty", "got -1"),
    ),
    "alpha 0": ('name = "a"\n[training]\nalpha = 0', ("training.alpha", "greater than 0, got 0")),
    "a layer of rank 0": (
        'name = "a"\n[training.rank_pattern]\nquery = 0',
        ("training.rank_pattern.0.1", "greater than 0, got 0"),
    ),
    "a layer of a huge rank": (
        'name = "a"\n[training.rank_pattern]\nquery = 17',
        ("training.rank_pattern.0.1", "less than or equal to 16, got 17"),
    ),
    "a dotted name without quotes": (
        'name = "a"\n[training.rank_pattern]\noutput.dense = 2',
        ("training.rank_pattern", "needs quotes in TOML, as in 'output.dense'"),
    ),
    "alpha twice": (
        'name = "a"\n[training]\nalpha = 8.0\nalpha_per_rank = 3.0',
        ("training.alpha or training.alpha_per_rank, not both; got 8.0 and 3.0",),
    ),
    "momentum of nothing": (
        'name = "a"\n[aggregation.server_optimizer]\nmomentum = 0.5',
        ("momentum would change nothing with kind='fedavg'",),
    ),
    "FedAdam's memory for FedAvgM": (
        'name = "a"\n[aggregation.server_optimizer]\nkind = "fedavgm"\nbeta_2 = 0.5\ntau = 0.1',
        ("beta_2, tau would change nothing with kind='fedavgm'",),
    ),
    "a bound that bounds nothing": (
        'name = "a"\n[defence]\nkind = "geometric-median"\nnorm_factor = 2.0',
        ("norm_factor goes with norm-bounding", "got kind='geometric-median'"),
    ),
    "energy where nothing is cut": (
        'name = "a"\n[aggregation]\nstrategy = "fedit"\nrank = 8\nenergy = 0.9',
        ("aggregation.energy is for ffa-nested, flexlora, flora-bounded, got strategy='fedit'",),
    ),
    "a pattern beyond the largest rank": (
        'name = "a"\n[aggregation]\nstrategy = "fedit"\nrank = 16\n[training.rank_pattern]\nquery = 8',
        ("rank of 'query' 128, above aggregation.max_rank=64",),
    ),
    "a server optimiser elsewhere": (
        'name = "a"\n[aggregation]\nstrategy = "flexlora"\n[aggregation.server_optimizer]\nkind = "fedavgm"',
        ("aggregation.server_optimizer is for ffa-nested, flora-bounded, got strategy='flexlora'",),
    ),
    "momentum 1": (
        'name = "a"\n[aggregation.server_optimizer]\nkind = "fedavgm"\nmomentum = 1.0',
        ("aggregation.server_optimizer.momentum", "less than 1, got 1.0"),
    ),
    "NaN": ('name = "a"\n[training]\nlearning_rate = nan', ("training.learning_rate", "finite number", "got nan")),
    "infinity": ('name = "a"\n[training]\nweight_decay = inf', ("training.weight_decay", "finite number", "got inf")),
    "a negative rate": ('name = "a"\n[training]\nlearning_rate = -0.1', ("training.learning_rate", "got -0.1")),
    "batch size 0": ('name = "a"\n[training]\nbatch_size = 0', ("training.batch_size", "got 0")),
    "text for a number": ('name = "a"\nrounds = "three"', ("rounds", "integer", "got 'three'")),
    "a fraction of a round": ('name = "a"\nrounds = 2.5', ("rounds", "got 2.5")),
    "rounds 0": ('name = "a"\nrounds = 0', ("rounds", "greater than 0, got 0")),
    "negative seed": ('name = "a"\nseed = -1', ("seed", "got -1")),
    "a number for a section": ('name = "a"\ntraining = 3', ("training", "got 3")),
    "a list for a section": ('name = "a"\n[[training]]\nbatch_size = 3', ("training",)),
    "unknown task": ('name = "a"\ntask = "vision"', ("task", "'classification' or 'causal-lm'", "got 'vision'")),
    "no hash": ('name = "a"\n[model]\nsha256 = "abc"', ("model.sha256", "got 'abc'")),
    "short texts": ('name = "a"\n[model]\nmax_length = 3', ("model.max_length", "got 3")),
    "column without partition": (
        'name = "a"\n[data]\npartition_column = "site"',
        ("go together", "partition='dirichlet' and partition_column='site'"),
    ),
    "partition without column": ('name = "a"\n[data]\npartition = "column"', ("go together", "partition_column=''")),
    "concentration 0": ('name = "a"\n[data]\ndirichlet_alpha = 0', ("data.dirichlet_alpha", "got 0")),
    "empty name": ('name = ""', ("name: String should match pattern", "got ''")),
    "a path as name": ('name = "a/b"', ("name: String should match pattern", "got 'a/b'")),
    "a name with an alias": ('name = "a@b"', ("name: String should match pattern",)),
    "a hidden name": ('name = ".a"', ("name: String should match pattern",)),
    "a name with a line break": ('name = "a\\n"', ("name: String should match pattern",)),
    "a long name": (f'name = "{"a" * 101}"', ("name: String should match pattern",)),
    "a number as name": ("name = 3", ("name: Input should be a valid string, got 3",)),
    "not TOML": ("name = demo", ("run.toml is not TOML", "line 1, column 8")),
    "JSON": ('{"name": "a"}', ("is not TOML",)),
    "a key twice": ('name = "a"\nname = "b"', ("is not TOML", "overwrite")),
    "nothing": ("", ("name: Field required",)),
    "two things": ('name = "a"\nrounds = 0\nseed = -1', ("rounds: ", "; seed: ")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_run_file_is_refused_with_what_is_wrong(wrong: str) -> None:
    """A run would start with other settings than were meant, or fail an hour later."""
    text, parts = WRONG[wrong]
    with pytest.raises(ConfigError) as refused:
        parse_settings(text, source="run.toml")
    assert str(refused.value).startswith("run.toml")
    for part in parts:
        assert part in str(refused.value)
    assert "pydantic" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("strategy", sorted(FACTS))
def test_only_hetlora_prunes_itself(strategy: str) -> None:
    limits = {"strategy": strategy, "self_pruning": {}} | ({"rank": 4} if strategy in EQUAL_RANK else {})
    if strategy == "hetlora":
        assert AggregationSettings.model_validate(limits).self_pruning == SelfPruningSettings()
        return
    with pytest.raises(ValidationError, match="self_pruning is for hetlora"):
        AggregationSettings.model_validate(limits)


@pytest.mark.parametrize(
    ("changes", "alphas", "scales"),
    [
        ({"alpha_per_rank": 2.0}, (2.0, 8.0), (2.0, 2.0)),
        ({"alpha_per_rank": 2.0, "rslora": True}, (2.0, 8.0), (2.0, 4.0)),
        ({"alpha": 8.0}, (8.0, 8.0), (8.0, 2.0)),
        ({"alpha": 8.0, "rslora": True}, (8.0, 8.0), (8.0, 4.0)),
    ],
)
def test_alpha_is_fixed_or_goes_with_the_rank(
    changes: dict[str, object], alphas: tuple[float, float], scales: tuple[float, float]
) -> None:
    training = TrainingSettings.model_validate(changes)
    assert (training.alpha_of(1), training.alpha_of(4)) == alphas
    assert (training.scale_of(1), training.scale_of(4)) == scales


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "demo"\n# grün\n', encoding="utf-8")
    assert load_settings(path).name == "demo"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the run file .*absent\.toml: .*No such file"):
        load_settings(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot read the run file"):
        load_settings(tmp_path)
    latin = tmp_path / "latin.toml"
    latin.write_bytes('name = "grün"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.toml: .*utf-8"):
        load_settings(latin)
    broken = tmp_path / "broken.toml"
    broken.write_text("name = [")
    with pytest.raises(ConfigError, match=r"broken\.toml is not TOML"):
        load_settings(broken)


@given(st.text(max_size=200))
@settings(deadline=None, max_examples=150)
def test_any_other_text_is_refused_and_not_crashed_on(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^run\.toml"):
        parse_settings(text, source="run.toml")


def test_settings_that_were_written_down_are_read_back() -> None:
    """Every value is then given, also those that would be refused beside others."""
    run = RunSettings.model_validate(
        {"name": "demo", "training": {"alpha": 8.0}, "defence": {"kind": "geometric-median"}}
    )
    assert RunSettings.model_validate_json(run.model_dump_json()) == run


# Tasks one after another

TASKS = '[continual]\ntasks = [["a", "b"], ["c"]]\n'


def test_a_run_file_may_have_tasks() -> None:
    settings = parse_settings(
        'name = "x"\n[continual]\nclasses_per_task = 2\n[continual.mos.training]\nepochs = 2\n', source="run.toml"
    )
    assert settings.continual is not None
    assert settings.continual.mos.training.epochs == 2
    assert RunSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("[continual]\n", "give continual.tasks or continual.classes_per_task, and not both"),
        (f"{TASKS}classes_per_task = 2\n", "and not both"),
        ('[continual]\ntasks = [["a"], ["b", "a"]]\n', "class 'a' is twice in continual.tasks"),
        ("[continual]\ntasks = [[]]\n", "continual.tasks.0"),
        (f"{TASKS}[continual.mos]\nseed = 3\n", "continual.mos.seed: leave it out"),
        (f'{TASKS}[continual.mos]\nhead = "aligned"\nofficial_compat = true\n', "official_compat overwrites"),
        (f'task = "causal-lm"\n{TASKS}', "learns classes, got task='causal-lm'"),
        (f"rounds = 4\n{TASKS}", "rounds_per_task for each task; leave rounds out, got 4"),
        (f'{TASKS}[data]\nlabels = ["a"]\n', "as continual.tasks or as data.labels, not both"),
        (f'{TASKS}[model]\ntarget_modules = ["query"]\n', "leave model.target_modules out"),
        (f"{TASKS}[training]\nbatch_size = 3\n", r"leave \[training\] out"),
        (f'{TASKS}[aggregation]\nstrategy = "ffa-nested"\n', "only max_update_norm and max_examples count"),
        (f'{TASKS}[defence]\nkind = "geometric-median"\n', "without a defence; got defence.kind='geometric-median'"),
    ],
)
def test_what_does_not_go_with_tasks_is_refused(rest: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_settings(f'name = "x"\n{rest}', source="run.toml")


def test_a_run_file_may_have_tasks_and_privacy() -> None:
    """How often clients are asked is known from it: a task of one class is not trained."""
    privacy = """
[privacy]
unit = "client"
population = "phones"
population_size = 10000
epsilon = 4.0
delta = 1e-5
sample_rate = 0.02
sums_clip = 3.0
"""
    parsed = parse_settings(f'name = "x"\n{privacy}\n{TASKS}rounds_per_task = 5\n', source="run.toml")
    assert parsed.exchanges == 5 + 1 + 1
    assert parse_settings('name = "x"\nrounds = 4\n', source="run.toml").exchanges == 4


# Classes to forget

FORGET = '[forget]\nclasses = ["a"]\n'


def test_a_run_file_may_forget() -> None:
    settings = parse_settings(f'name = "x"\n{FORGET}[forget.settings]\nsteps = 9\n', source="run.toml")
    assert settings.forget is not None
    assert (settings.forget.classes, settings.forget.settings.steps) == (("a",), 9)
    assert RunSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("[forget]\nclasses = []\n", "forget.classes"),
        ('[forget]\nclasses = ["a", "a"]\n', "'a' is twice in forget.classes"),
        (f"{FORGET}[forget.settings]\npush = 0.1\n", "GS-LoRA[+][+], which needs prototypes of all examples"),
        (f"{FORGET}[forget.settings]\npull = 0.1\n", "set both to 0"),
        (f"{FORGET}{TASKS}", r"\[forget\] and \[continual\] do not go together"),
        (
            f'{FORGET}[privacy]\nunit = "example"\npopulation = "p"\nepsilon = 8.0\ndelta = 1e-5\n',
            "nothing noises them yet",
        ),
        (f'task = "causal-lm"\n{FORGET}', "takes classes out, got task='causal-lm'"),
        (f"rounds = 4\n{FORGET}", r"leave \[training\] and rounds out"),
        (f"{FORGET}[training]\nbatch_size = 3\n", r"leave \[training\] and rounds out"),
        (f"{FORGET}[model]\nmax_length = 16\n", "only base and sha256 count"),
        (f'{FORGET}[data]\nlabels = ["a"]\n', r"leave \[data\] out"),
        (f"{FORGET}[cohort]\nsize = 3\n", "leave cohort.fraction and cohort.size out"),
        (f'{FORGET}[aggregation]\nstrategy = "ffa-nested"\n', "only max_update_norm and max_examples count"),
        (f'{FORGET}[defence]\nkind = "geometric-median"\n', "without a defence"),
    ],
)
def test_what_does_not_go_with_forgetting_is_refused(rest: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_settings(f'name = "x"\n{rest}', source="run.toml")
