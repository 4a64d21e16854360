"""Time and memory of aggregating one layer's LoRA updates, beside what it must be compared with.

One 4096 x 4096 layer, float32 updates of the ranks of FLoRA's paper (64,32,16,16,8,8,4,4,4,4, repeated) or of rank 16
throughout, cut back to rank 64. The clients agree in 32 directions and have noise of their own. Compared:

* ``flora-bounded``: what a coordinator runs, the whole aggregation of a first round, updates read one by one;
* ``streaming``: the fold alone with its own SVD (guard rank 80, blocks of 80), in float32 and in float64;
* ``one-shot``: all updates stacked, then recompressed (float64);
* ``dense-svd``: the dense sum and its SVD, which is FlexLoRA's way (Bai et al. 2024, arXiv:2402.11505);
* ``hlora``: NVIDIA FLARE's HLoRA aggregator (examples/advanced/medgemma, after arXiv:2503.00813), written anew from its
  description: square roots of the weights on both factors, QR of both stacks, SVD of the core, all of S in A, the bank
  cut to each client's rank; here with the LoRA scales, which it leaves out;
* ``peft-cat``, ``peft-svd``: PEFT's ``add_weighted_adapter`` on a model of one layer; ``cat`` compresses nothing.

Each piece runs in a process of its own, which generates the clients one by one, outside the clock. Memory is the peak
resident set. Time is CPU time with one thread, which others on the machine disturb least, wall time with more; each
process also times ``streaming`` with ten clients before and after, and ratios are taken through that. Errors are
estimated from the images of Gaussian vectors under the true sum. Correctness is checked first and again on every
piece; nothing is reported when a check is red. Finished pieces are written down at once, so an interrupted run goes
on where it stopped. Run as ``python benchmarks/aggregation.py``.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pomona import __version__
from pomona.adapters import LoraFactors
from pomona.aggregation.flora import recompress, stack
from pomona.aggregation.strategies import flora_bounded
from pomona.aggregation.strategies.contract import Contribution, Rules
from pomona.aggregation.streaming import StackAccumulator

RESULTS = Path(__file__).parent / "results" / "aggregation.json"
RANKS = {"ragged": (64, 32, 16, 16, 8, 8, 4, 4, 4, 4), "rank16": (16,)}
MAX_RANK, GUARD_RANK, BLOCK_RANK = 64, 80, 80
SHARED, NOISE = 32, 0.3
LAYERS = 64
WORSE_THAN_BEST = 0.05  # what truncation between merges may add to the error of the best approximation, relatively
SKIPPED = {
    "dense-svd, above 10 clients": "the SVD takes as long for any number of clients; the sum is timed with 10",
    "one-shot, hlora, above 100 clients": "the stacked rank passes 4096: QR and SVD of a square matrix, minutes",
    "peft-cat, above 100 clients": "holds every client as an adapter of the model, then all of them once more",
    "peft-svd, above 10 clients": "holds a dense 4096 x 4096 matrix per client, twice: 0.13 GB each",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One measurement."""

    method: str
    mix: str
    clients: int
    size: int = 4096
    threads: int = 1

    @property
    def ranks(self) -> list[int]:
        """One rank per client."""
        return [RANKS[self.mix][i % len(RANKS[self.mix])] for i in range(self.clients)]


def pieces(*, quick: bool) -> list[Piece]:
    """Return all that is measured."""
    if quick:
        found = [Piece(method=each, mix="ragged", clients=10, size=768) for each in METHODS if each != "side-by-side"]
        return [*found, *(Piece(method="streaming", mix="rank16", clients=n, size=768) for n in (10, 100))]
    found = [Piece(method="flora-bounded", mix=mix, clients=n) for mix in RANKS for n in (10, 100, 1000)]
    found += [Piece(method="streaming", mix=mix, clients=n) for mix in RANKS for n in (10, 30, 100, 300, 1000)]
    found += [Piece(method="streaming-f64", mix="rank16", clients=n) for n in (10, 100, 1000)]
    for mix, counts in (("ragged", (10, 30, 100)), ("rank16", (10, 100))):
        found += [Piece(method=each, mix=mix, clients=n) for n in counts for each in ("one-shot", "hlora")]
    found += [Piece(method="peft-cat", mix="ragged", clients=n) for n in (10, 30, 100)]
    found += [Piece(method=each, mix="ragged", clients=10, size=2048) for each in ("streaming", "dense-svd")]
    found += [Piece(method=each, mix="ragged", clients=10) for each in ("dense-svd", "peft-svd")]
    found += [Piece(method="streaming", mix="rank16", clients=n, threads=2) for n in (10, 100, 1000)]
    others = (("side-by-side", 100), ("one-shot", 10), ("hlora", 10), ("hlora", 100))
    return [*found, *(Piece(method=each, mix="rank16", clients=n, threads=2) for each, n in others)]


class Clients:
    """Updates that agree in some directions, made one at a time, and always the same."""

    def __init__(self, ranks: Sequence[int], size: int) -> None:
        self.ranks, self.size = ranks, size
        generator = torch.Generator().manual_seed(-1)
        decay = 0.85 ** (torch.arange(SHARED) / 2)
        self._left = torch.randn(size, SHARED, generator=generator) * decay / math.sqrt(size)
        self._right = torch.randn(SHARED, size, generator=generator) * decay[:, None] / math.sqrt(size)

    def __iter__(self) -> Iterator[tuple[LoraFactors, float]]:
        """Yield each update with its number of examples."""
        for i, rank in enumerate(self.ranks):
            generator = torch.Generator().manual_seed(i)
            mixing = torch.randn(SHARED, rank, generator=generator)
            noise = NOISE * math.sqrt(SHARED / self.size)
            b = (self._left @ mixing).add_(torch.randn(self.size, rank, generator=generator), alpha=noise)
            a = (mixing.T @ self._right).add_(torch.randn(rank, self.size, generator=generator), alpha=noise)
            yield LoraFactors(a=a, b=b, scale=16 / rank), 100.0 + 50 * (i % 7)

    def images(self, probes: Tensor) -> Tensor:
        """Return those of the probes, ``(size, n)``, under the weighted mean."""
        total, images = 0.0, torch.zeros(self.size, probes.shape[1], dtype=torch.float64)
        for update, weight in self:
            images.addmm_(update.b.double(), update.a.double() @ probes, alpha=weight * update.scale)
            total += weight
        return images / total


@dataclass(slots=True)
class Outcome:
    """A result, the seconds on the clock, and facts for the record."""

    factors: LoraFactors
    seconds: float
    facts: dict[str, float] = field(default_factory=dict)


Clock = Callable[[], float]


def accumulator(size: int, dtype: torch.dtype = torch.float32) -> StackAccumulator:
    """Return an empty one, exact up to the total rank of ten clients."""
    return StackAccumulator(size, size, guard_rank=GUARD_RANK, block_rank=BLOCK_RANK, dtype=dtype)


def streaming(
    clients: Clients, clock: Clock, *, dtype: torch.dtype = torch.float32, max_rank: int = MAX_RANK
) -> Outcome:
    """Fold in one by one."""
    total = accumulator(clients.size, dtype=dtype)
    seconds = 0.0
    for update, weight in clients:
        began = clock()
        total.add(update, weight)
        seconds += clock() - began
    began = clock()
    factors, retained = total.result(max_rank, 1.0, mean=True)
    seconds += clock() - began
    facts = {"held_mb": total.nbytes / 1e6, "retained_energy": retained}
    facts |= {"error_bound": total.error_bound, "estimated_error": total.estimated_error}
    return Outcome(factors, seconds, facts)


def shipped(clients: Clients, clock: Clock) -> Outcome:
    """Aggregate as a coordinator does; making the clients is not counted."""
    making = 0.0

    def contributions() -> Iterator[Contribution]:
        nonlocal making
        made, total = iter(clients), sum(100.0 + 50 * (i % 7) for i in range(len(clients.ranks)))
        for _ in clients.ranks:
            began = clock()
            update, weight = next(made)
            making += clock() - began
            yield Contribution(layers={"layer": update}, weight=weight / total)
            del update

    rules = Rules(shapes={"layer": (clients.size, clients.size)}, max_rank=MAX_RANK)
    began = clock()
    layers, kept = flora_bounded.aggregate({}, contributions(), round_number=1, rules=rules)
    return Outcome(layers["layer"], clock() - began - making, {"retained_energy": kept["layer"]})


def side_by_side(clients: Clients, clock: Clock) -> Outcome:
    """Fold two layers at once, each with one BLAS thread; the time is that of both, halved."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    updates = list(clients)

    def one_layer(_: int) -> LoraFactors:
        total = accumulator(clients.size)
        for update, weight in updates:
            total.add(update, weight)
        return total.result(MAX_RANK, 1.0, mean=True)[0]

    with ThreadPoolExecutor(threads) as pool:
        began = clock()
        factors, *_ = pool.map(one_layer, range(threads))
        seconds = (clock() - began) / threads
    torch.set_num_threads(threads)
    return Outcome(factors, seconds)


def held(clients: Clients) -> tuple[list[LoraFactors], list[float]]:
    """Return all updates, and weights that sum to one."""
    updates, counts = zip(*clients, strict=True)
    return list(updates), [count / sum(counts) for count in counts]


def one_shot(clients: Clients, clock: Clock) -> Outcome:
    """Stack all, recompress once."""
    updates, weights = held(clients)
    began = clock()
    factors, _ = recompress(stack(updates, weights=weights), rank=MAX_RANK)
    return Outcome(factors, clock() - began)


def dense_svd(clients: Clients, clock: Clock) -> Outcome:
    """Sum densely and decompose the sum (FlexLoRA)."""
    dense, total, summing = torch.zeros(clients.size, clients.size), 0.0, 0.0
    for update, weight in clients:
        began = clock()
        dense.addmm_(update.b, update.a, alpha=weight * update.scale)
        summing += clock() - began
        total += weight
    began = clock()
    left, singular_values, right = torch.linalg.svd(dense / total, full_matrices=False)
    factors = LoraFactors(a=right[:MAX_RANK].clone(), b=left[:, :MAX_RANK] * singular_values[:MAX_RANK])
    return Outcome(factors, summing + clock() - began, {"summing_s": summing})


def hlora(clients: Clients, clock: Clock) -> Outcome:
    """Aggregate as NVIDIA FLARE's HLoRA example does."""
    updates, weights = held(clients)
    began = clock()
    roots = [math.sqrt(weight * update.scale) for update, weight in zip(updates, weights, strict=True)]
    q_b, r_b = torch.linalg.qr(torch.cat([root * u.b for root, u in zip(roots, updates, strict=True)], dim=1))
    q_a, r_a = torch.linalg.qr(torch.cat([root * u.a for root, u in zip(roots, updates, strict=True)]).T)
    left, singular_values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    bank = LoraFactors(
        a=torch.diag(singular_values[:MAX_RANK]) @ (right[:MAX_RANK] @ q_a.T), b=q_b @ left[:, :MAX_RANK]
    )
    own = [(bank.a[:rank].contiguous(), bank.b[:, :rank].contiguous()) for rank in clients.ranks]
    seconds = clock() - began
    return Outcome(bank, seconds, {"sent_mb": sum(a.nbytes + b.nbytes for a, b in own) / 1e6})


def peft(clients: Clients, clock: Clock, kind: str) -> Outcome:
    """Add adapters with PEFT."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    base = torch.nn.ModuleDict({"layer": torch.nn.Linear(clients.size, clients.size, bias=False)})
    names = [f"client{i}" for i in range(len(clients.ranks))]
    configs = [LoraConfig(r=rank, lora_alpha=16, target_modules=["layer"]) for rank in clients.ranks]
    model: Any = get_peft_model(base, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    layer, counts = model.base_model.model["layer"], []
    for name, (update, count) in zip(names, clients, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = update.a, update.b
        counts.append(count)
    weights = [count / sum(counts) for count in counts]
    began = clock()
    model.base_model.add_weighted_adapter(names, weights, "sum", combination_type=kind, svd_rank=MAX_RANK)
    seconds = clock() - began
    return Outcome(LoraFactors(a=layer.lora_A["sum"].weight.data, b=layer.lora_B["sum"].weight.data), seconds)


METHODS: dict[str, Callable[[Clients, Clock], Outcome]] = {
    "flora-bounded": shipped,
    "streaming": streaming,
    "streaming-f64": partial(streaming, dtype=torch.float64),
    "side-by-side": side_by_side,
    "one-shot": one_shot,
    "hlora": hlora,
    "dense-svd": dense_svd,
    "peft-cat": partial(peft, kind="cat"),
    "peft-svd": partial(peft, kind="svd"),
}


# one process per piece


def measure(piece: Piece) -> dict[str, Any]:
    """Run one piece in this process, fresh so that its peak memory is its own."""
    torch.set_num_threads(piece.threads)
    if piece.method.startswith("peft"):
        import peft  # noqa: F401, PLC0415
    clock = time.process_time if piece.threads == 1 else time.perf_counter
    clients, work = Clients(piece.ranks, piece.size), METHODS[piece.method]
    probes = torch.randn(piece.size, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    images = clients.images(probes)
    one_shot(Clients([4, 4], 64), clock)  # loads BLAS and LAPACK
    before = _peak_mb()
    outcome = work(clients, clock)
    peak = _peak_mb()
    found = outcome.factors.b.double() @ (outcome.factors.a.double() @ probes)
    ten = Clients(Piece(method="", mix=piece.mix, clients=10).ranks, piece.size)
    reference = [streaming(ten, clock).seconds for _ in range(5)]
    seconds = [outcome.seconds]
    while sum(seconds) < 1.0 and len(seconds) < 5:
        seconds.append(work(clients, clock).seconds)
    reference += [streaming(ten, clock).seconds for _ in range(5)]
    return {
        **asdict(piece),
        "seconds": statistics.median(seconds),
        "ms_per_client": 1e3 * statistics.median(seconds) / piece.clients,
        "reference_ms_per_client": 1e3 * statistics.median(reference) / 10,
        "peak_mb": peak,
        "peak_above_start_mb": peak - before,
        "rank": outcome.factors.rank,
        "error": float((found - images).norm() / images.norm()),
        **outcome.facts,
        "floor": floor(piece.size, clock) if piece.method == "streaming" else {},
    }


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage on Linux starts from the peak of the process that started this one
        return float(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def floor(d: int, clock: Clock) -> dict[str, float]:
    """Return what a client of rank 16 must take in a long run of merges, in milliseconds, at rates measured here.

    ``qr``: the flops of the QRs of what arrives, at the rate of GEMM; ``gemm``: all flops of a merge at that rate;
    ``kernels``: QRs at LAPACK's own rate, products at GEMM's, the core's SVD as it takes.
    """
    g, b, clients = GUARD_RANK, BLOCK_RANK, BLOCK_RANK / 16
    qr = 2 * (4 * d * b**2 - 4 / 3 * b**3)  # Householder QR and its thin Q, both sides
    products = 2 * (6 * d * g * b + 2 * d * g * (g + b))  # projected, compared, rotated
    square, core = torch.randn(1024, 1024), torch.randn(g + b, g + b, dtype=torch.float64)
    half = square[:512, :512].double()
    gemm, gemm_f64 = 2 * 1024**3 / _best(lambda: square @ square, clock), 2 * 512**3 / _best(lambda: half @ half, clock)
    tall = torch.randn(b, d).T
    qr_s = 2 * _best(lambda: torch.linalg.qr(tall), clock)
    svd_s = _best(lambda: torch.linalg.svd(core), clock)
    return {
        "gemm_gflops": gemm / 1e9,
        "qr_gflops": qr / qr_s / 1e9,
        "core_svd_ms": 1e3 * svd_s,
        "qr_ms_per_client": 1e3 * qr / gemm / clients,
        "gemm_ms_per_client": 1e3 * ((qr + products) / gemm + 20 * (g + b) ** 3 / gemm_f64) / clients,
        "kernels_ms_per_client": 1e3 * (qr_s + products / gemm + svd_s) / clients,
    }


def _best(work: Callable[[], object], clock: Clock) -> float:
    found = []
    for _ in range(7):
        began = clock()
        work()
        found.append(clock() - began)
    return min(found)


# correctness


def check() -> dict[str, Any]:
    """Compare every method with the dense float64 sum and its best approximation; refuse to go on when one is off."""
    size = 576
    few, many = Clients(RANKS["ragged"], size), Clients(RANKS["ragged"] * 20, size)
    dense, best = _dense(few)
    found: dict[str, Any] = {"size": size, "best_of_rank_64": best}
    for name, work in METHODS.items():
        found[name] = _error(work(few, time.perf_counter).factors, dense)
        _refuse(abs(found[name] - (0.0 if name == "peft-cat" else best)) > 1e-5, f"{name}: {found[name]}, best {best}")
    dense, best = _dense(many)
    truncated = streaming(many, time.perf_counter)
    found |= {"best_with_200_clients": best, "streaming_with_200_clients": _error(truncated.factors, dense)}
    _refuse(found["streaming_with_200_clients"] > (1 + WORSE_THAN_BEST) * best, f"200 clients: {found}")
    kept = streaming(many, time.perf_counter, max_rank=GUARD_RANK + BLOCK_RANK)
    found |= {"true_error": _error(kept.factors, dense), **kept.facts}
    _refuse(not found["true_error"] <= found["error_bound"], f"the bound does not bound: {found}")
    _refuse(not 0.8 < found["estimated_error"] / found["true_error"] < 1.25, f"the estimate is off: {found}")
    return found


def _dense(clients: Clients) -> tuple[Tensor, float]:
    updates, weights = held(clients)
    dense = torch.zeros(clients.size, clients.size, dtype=torch.float64)
    for update, weight in zip(updates, weights, strict=True):
        dense.addmm_(update.b.double(), update.a.double(), alpha=weight * update.scale)
    s = torch.linalg.svdvals(dense)
    return dense, float(s[MAX_RANK:].norm() / s.norm())


def _error(factors: LoraFactors, dense: Tensor) -> float:
    return float((factors.b.double() @ factors.a.double() - dense).norm() / dense.norm())


def check_runs(runs: Sequence[dict[str, Any]]) -> None:
    """Refuse to report where methods that should agree do not."""
    for run in runs:
        same = [other for other in runs if all(other[key] == run[key] for key in ("mix", "clients", "size", "rank"))]
        best = min(other["error"] for other in same)
        slack = 1e-4 if run["clients"] == 10 else WORSE_THAN_BEST
        _refuse(run["error"] > best * (1 + slack) + 1e-6, f"{run['method']} with {run['clients']} clients: {run}")


def _refuse(red: bool, why: str) -> None:
    if red:
        raise SystemExit(f"aggregation is wrong, so its speed is not reported: {why}")


# running and reporting


def main() -> None:
    """Run what is missing, then print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where results go and are taken up again")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="a small layer and few clients, to see that it runs")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(measure(Piece(**options.job)) if options.job else check()))
        return
    out = options.out or (Path(tempfile.gettempdir()) / RESULTS.name if options.quick else RESULTS)
    chosen = [each for each in pieces(quick=options.quick) if each.method in options.only]
    document = run_missing([each for each in chosen if each.threads in options.threads], out)
    check_runs(document["runs"])
    document["summary"] = summarise(document["runs"])
    _write(document, out)
    report(document, out)


def run_missing(chosen: Sequence[Piece], out: Path) -> dict[str, Any]:
    """Run every piece that the result file does not have, after the checks."""
    machine = {"pomona": __version__, "torch": torch.__version__, "python": platform.python_version()}
    document: dict[str, Any] = {"machine": machine | {"cores": os.cpu_count()}, "skipped": SKIPPED, "runs": []}
    if out.exists():
        document = json.loads(out.read_text())
    document["checks"] = in_a_process({}, threads=1)
    done = [{key: run[key] for key in asdict(chosen[0])} for run in document["runs"]]
    for piece in chosen:
        if asdict(piece) in done:
            continue
        load = os.getloadavg()[0]
        run = {**in_a_process(asdict(piece), piece.threads), "load": load}
        document["runs"].append(run)
        _write(document, out)
        Console().print(f"{asdict(piece)}: {run['ms_per_client']:.2f} ms per client, load {load:.1f}")
    return document


def in_a_process(job: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run a piece, or the checks where there is none, in a fresh interpreter and return its answer."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _write(document: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


def cost(run: dict[str, Any]) -> float:
    """Return the time per client in units of streaming with ten clients, timed by the same process."""
    return float(run["ms_per_client"] / run["reference_ms_per_client"])


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the ratios that matter, as far as their pieces have run."""
    known = {(run["method"], run["mix"], run["clients"], run["size"], run["threads"]): run for run in runs}
    found: dict[str, float] = {}
    for (method, mix, clients, size, threads), run in known.items():
        where = f"{clients} clients, {mix}, size {size}, {threads} threads"
        own = known.get(("streaming", mix, clients, size, threads))
        few = known.get((method, mix, 10, size, threads))
        if own and run is not own:
            found[f"time, {method} / streaming, {where}"] = cost(run) / cost(own)
            memory = run["peak_above_start_mb"] / own["peak_above_start_mb"]
            found[f"peak above start, {method} / streaming, {where}"] = memory
        shipped_too = known.get(("flora-bounded", mix, clients, size, threads))
        if shipped_too and method in {"dense-svd", "peft-svd", "peft-cat", "hlora"}:
            found[f"time, {method} / flora-bounded, {where}"] = cost(run) / cost(shipped_too)
        if few and clients == 1000 and method.startswith(("streaming", "flora-bounded")):
            found[f"time per client, {method}, {where} / 10 clients"] = run["ms_per_client"] / (
                run["reference_ms_per_client"] if method == "streaming" else few["ms_per_client"]
            )
            for name in ("peak", "peak_above_start"):
                found[f"{name}, {method}, {where} / 10 clients"] = run[f"{name}_mb"] / few[f"{name}_mb"]
            for name in ("qr", "gemm", "kernels") if run["floor"] else ():
                least = run["floor"][f"{name}_ms_per_client"]
                found[f"time / floor by {name}, {where}"] = run["ms_per_client"] / least
        peer = known.get(("hlora", mix, 10, size, threads))
        if peer and clients == 1000 and method == "streaming":
            found[f"time per client, {method}, {where} / hlora, 10 clients"] = cost(run) / cost(peer)
        if (method, clients) in {("flora-bounded", 1000), ("streaming", 1000), ("dense-svd", 10)} and size == 4096:
            found[f"projected minutes for {LAYERS} layers, {method}, {where}"] = run["seconds"] * LAYERS / 60
    return found


def report(document: dict[str, Any], out: Path) -> None:
    """Print the tables and draw time and memory over the number of clients."""
    names = ("method", "mix", "clients", "size", "threads", "rank")
    table = Table(*names, "ms/client", "/ reference", "peak MB", "above start", "error")
    for run in sorted(document["runs"], key=lambda run: (run["size"], run["threads"], run["mix"], run["clients"])):
        figures = (run["ms_per_client"], cost(run), run["peak_mb"], run["peak_above_start_mb"])
        cells = [str(run[name]) for name in names] + [f"{figure:.2f}" for figure in figures]
        table.add_row(*cells, f"{run['error']:.2e}")
    ratios, skipped = Table("ratio", "value"), Table("not run", "why")
    for name, value in document["summary"].items():
        ratios.add_row(name, f"{value:.3g}")
    for name, why in document["skipped"].items():
        skipped.add_row(name, why)
    for each in (table, ratios, skipped):
        Console(width=140).print(each)
    _draw(document["runs"], out)


def _draw(runs: Sequence[dict[str, Any]], out: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2))
    size = max(run["size"] for run in runs)
    for color, method in enumerate(METHODS):
        mine = sorted(
            (run["clients"], run["ms_per_client"], run["peak_above_start_mb"])
            for run in runs
            if (run["method"], run["mix"], run["size"], run["threads"]) == (method, "ragged", size, 1)
        )
        for axes, column in zip(panels, (1, 2), strict=True):
            values = ([row[0] for row in mine], [row[column] for row in mine])
            axes.plot(*values, label=method if mine else None, marker="o", markersize=4, color=f"C{color}")
    for axes, label in zip(panels, ("ms per client, 1 thread", "peak memory above start, MB"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="clients", ylabel=label)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"One {size} x {size} layer, ranks 4-64, cut back to rank {MAX_RANK}")
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
