"""Stacking without the stack: updates are folded in as they arrive, in memory that does not grow with their number.

The weighted sum of one layer is held as terms ``c_i b_i a_i^T``, at most ``guard_rank + block_rank`` of them. When
they are full they are merged: the terms kept by the last merge are singular triplets ``U S V^T``, the new ones
``B C A`` are projected out of them, what is left gets a thin QR, and the first ``g = guard_rank`` terms stay::

    B = U P + Q R        core = [S 0; 0 0] + [P; R] C [P'; R']^T = X T Y^T
    A^T = V P' + Q' R'   U, S, V  <-  [U Q] X_g, T_g, [V Q'] Y_g

What a merge drops is the least for that merge (Eckart and Young 1936), not for the sum: updates that are weak one by
one and strong together can fall below the guard rank before they add up. A merge costs about
``4 d b^2 + 6 d g b + 2 d g (g + b)`` flops for either side of length ``d`` and ``20 (g + b)^3`` for the core, whatever
came before. A tree of merges takes more of them, more memory, and loses slightly more. ``Q`` of a block without full
rank may lean on ``U``, and later merges would count twice what both hold. So it is orthogonalised again while they
overlap by more than the root of the rounding unit, which is enough (Simon 1984).

References: Brand, Fast low-rank modifications of the thin singular value decomposition, Linear Algebra Appl. 2006;
Simon, The Lanczos algorithm with partial reorthogonalization, Math. Comput. 1984.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pomona.adapters import LoraFactors
from pomona.aggregation.flora import truncation_rank

_PROBES = 16
_DENSE_NOISE = 1e-12  # of the largest singular value, about the size of a layer in rounding units of float64
_ROUNDS = 3  # of orthogonalising again; degenerate blocks need one, unit vectors two

_Triplets = tuple[Tensor, Tensor, Tensor]
_RankOf = Callable[[Tensor], int]


class StackAccumulator:
    """The weighted sum of the updates of one layer, fed one by one.

    Up to a stacked rank of ``guard_rank + block_rank`` the sum is exact up to rounding, and beyond it while what has
    come sums to a rank of at most ``guard_rank``; then it has the loss that is reported. A layer whose dense sum has
    no more entries than the terms is summed densely in float64, without loss. The order of updates moves the result
    by rounding only where nothing was dropped, otherwise by up to the bounds of both orders: feed them sorted.

    Args:
        out: Rows of the layer.
        in_: Columns of the layer.
        guard_rank: Rank kept by a merge, at least 1; above the ``max_rank`` of the result, by a quarter or more.
        block_rank: Rank that is gathered between merges, ``guard_rank`` by default.
        start: The global adapter, to which the sum is added at the end. It is only referred to.
        dtype: In which terms are held and decomposed, float32 or float64; cores are float64. Float32 takes half the
            time, and rounds by 6e-7 of the norm at first, 3e-6 after 250 merges.

    Attributes:
        nbytes: Size of the tensors held besides ``start``, however many updates came; a merge takes about as much more.
        total_weight: Sum of the weights of all updates so far, of those that change nothing too.

    Raises:
        ValueError: A size or rank is below 1, the dtype is another one, or ``start`` is for another layer.

    Example:
        >>> total = StackAccumulator(3, 2, guard_rank=4)
        >>> for examples in (1, 3):
        ...     total.add(LoraFactors(a=torch.ones(1, 2), b=examples * torch.ones(3, 1)), examples)
        >>> mean, retained = total.result(max_rank=4, energy=1.0, mean=True)
        >>> mean.rank, round(float(mean.delta()[0, 0]), 6), retained
        (1, 2.5, 1.0)
    """

    def __init__(
        self,
        out: int,
        in_: int,
        *,
        guard_rank: int,
        block_rank: int | None = None,
        start: LoraFactors | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        block_rank = guard_rank if block_rank is None else block_rank
        if min(out, in_, guard_rank, block_rank) < 1:
            raise ValueError(f"expected at least 1, got {out=}, in={in_}, {guard_rank=}, {block_rank=}")
        if dtype not in {torch.float32, torch.float64}:
            raise ValueError(f"expected float32 or float64, got {dtype}")
        self._shape, self._dtype, self._result_dtype, self._start = (out, in_), dtype, dtype, start
        if start is not None:
            self._check_shape(start)
            self._result_dtype = torch.promote_types(dtype, torch.promote_types(start.a.dtype, start.b.dtype))
        dense = (guard_rank + block_rank) * (out + in_) >= out * in_
        self._sum = _Dense(out, in_) if dense else _Terms(out, in_, guard_rank, block_rank, dtype)
        self.nbytes, self.total_weight = self._sum.nbytes, 0.0

    @property
    def error_bound(self) -> float:
        """What merges have cost at most, as ``||sum - held|| / ||sum||`` in the Frobenius norm, without rounding.

        The norms of what they dropped add up at worst: with ``e`` their sum, this is ``e / (||held|| - e)``, and
        infinity, which says nothing, where ``e`` reaches ``||held||``. Unrelated losses add up to far less.
        """
        if self._sum.dropped == 0.0:
            return 0.0
        room = self._sum.norm() - self._sum.dropped
        return self._sum.dropped / room if room > 0.0 else math.inf

    @property
    def estimated_error(self) -> float:
        """What merges have cost, estimated: the error that :attr:`error_bound` bounds, with rounding.

        The images of 16 Gaussian vectors under the exact sum are kept, and compared with those under what is held. It
        is off by some per cent where many directions were lost, by a quarter where it was one.
        """
        return self._sum.estimated_error()

    @torch.no_grad()
    def add(self, factors: LoraFactors, weight: float) -> None:
        """Add ``weight * scale * b @ a``; the tensors are copied, not kept.

        Args:
            factors: One client's update, of any rank, finite, no wider than the accumulator's dtype.
            weight: Finite. Counts of examples will do, see ``mean`` in :meth:`result`.

        Raises:
            ValueError: The update is for another layer, wider, or not finite, and was left out; or the sum overflows.
        """
        self._check_shape(factors)
        coefficient = weight * factors.scale
        if not math.isfinite(coefficient):
            raise ValueError(f"expected a finite weight and scale, got {weight} and {factors.scale}")
        wider = torch.promote_types(torch.promote_types(factors.a.dtype, factors.b.dtype), self._dtype)
        if wider != self._dtype:
            raise ValueError(f"expected factors no wider than {self._dtype}, got {wider}")
        size = math.prod(float(tensor.abs().sum(dtype=torch.float64)) for tensor in (factors.a, factors.b))
        if not math.isfinite(size):
            raise ValueError("expected finite factors with a finite product, got NaN or an infinity")
        self.total_weight += weight
        if coefficient * size:
            self._sum.add(factors.b, factors.a, coefficient)

    @torch.no_grad()
    def held(self) -> LoraFactors:
        """Return the sum as it is held, without ``start``: copies of factors in the accumulator's dtype, scale 1.

        Their rank is at most ``guard_rank + block_rank``, or that of a full matrix where the sum is dense. Nothing is
        decomposed, so this is for those who decompose what they add to it anyway.
        """
        return self._sum.held()

    @torch.no_grad()
    def result(self, max_rank: int, energy: float, *, mean: bool = False) -> tuple[LoraFactors, float]:
        """Return ``start`` plus the sum, truncated; the accumulator may be fed further.

        Args:
            max_rank: Rank of the result, at most; at least 1.
            energy: Share to keep, as in :func:`pomona.aggregation.flora.truncation_rank`.
            mean: Whether to divide the sum by :attr:`total_weight` first.

        Returns:
            The new global adapter, in the form of :func:`pomona.aggregation.flora.recompress`, as wide as ``start``
            if that is wider; and the share of energy that this truncation kept of what merges had left. Where the sum
            is zero, ``start`` itself and 1.0, or a zero of rank one where there is no start.

        Raises:
            ValueError: A limit is out of range, the sum overflows, or the weights to divide it by sum to zero.
        """

        def rank_of(singular_values: Tensor) -> int:
            return truncation_rank(singular_values, max_rank=max_rank, energy=energy)

        rank_of(torch.ones(1))  # refuses its limits even where there is nothing to truncate
        if self._sum.is_zero():
            b, a = (torch.zeros(1, length, dtype=self._dtype) for length in self._shape)
            return self._start or LoraFactors(a=a, b=b.T), 1.0
        if mean and self.total_weight == 0.0:
            raise ValueError("expected weights that do not sum to zero, for a mean")
        share = 1.0 / self.total_weight if mean else 1.0
        left, singular_values, right = self._sum.decompose(self._start, share, rank_of)
        sign = left.gather(1, left.abs().argmax(dim=1, keepdim=True)).sign()
        root = sign * singular_values[: len(left), None].sqrt()
        dtype = self._result_dtype
        factors = LoraFactors(a=(root * right).to(dtype), b=(root * left).to(dtype).T.contiguous())
        energies = (singular_values / singular_values[0].clamp_min(1e-300)).square()  # squares may overflow
        return factors, 1.0 - float(energies[len(left) :].sum() / energies.sum().clamp_min(1e-300))

    def _check_shape(self, factors: LoraFactors) -> None:
        shape = (factors.b.shape[0], factors.a.shape[1])
        if shape != self._shape:
            raise ValueError(f"expected factors of a layer (out, in) = {self._shape}, got {shape}")


class _Dense:
    """The sum itself, ``(out, in)`` in float64."""

    def __init__(self, out: int, in_: int) -> None:
        self._sum = torch.zeros(out, in_, dtype=torch.float64)
        self.nbytes, self.dropped = self._sum.nbytes, 0.0

    def add(self, b: Tensor, a: Tensor, coefficient: float) -> None:
        self._sum.addmm_(b.double(), a.double(), alpha=coefficient)

    def is_zero(self) -> bool:
        return not bool(self._sum.any())

    def held(self) -> LoraFactors:
        out, in_ = self._sum.shape
        one = torch.eye(min(out, in_), dtype=self._sum.dtype)
        return LoraFactors(a=self._sum.clone(), b=one) if out <= in_ else LoraFactors(a=one, b=self._sum.clone())

    def norm(self) -> float:
        return float(self._sum.norm())

    def estimated_error(self) -> float:
        return 0.0

    def decompose(self, start: LoraFactors | None, share: float, rank_of: _RankOf) -> _Triplets:
        total = share * self._sum
        if start is not None:
            total.addmm_(start.b.double(), start.a.double(), alpha=start.scale)
        return _truncated_svd(total, rank_of, noise=_DENSE_NOISE)


class _Terms:
    """At most ``guard_rank + block_rank`` terms ``c_i b_i a_i^T``; the first ``kept`` are singular triplets."""

    def __init__(self, out: int, in_: int, guard_rank: int, block_rank: int, dtype: torch.dtype) -> None:
        capacity = guard_rank + block_rank
        self._guard_rank, self._kept, self._filled, self.dropped = guard_rank, 0, 0, 0.0
        self._b = torch.empty(capacity, out, dtype=dtype)  # rows: LAPACK's columns
        self._a = torch.empty(capacity, in_, dtype=dtype)
        self._c = torch.empty(capacity, dtype=torch.float64)
        self._probes = torch.randn(in_, _PROBES, generator=torch.Generator().manual_seed(0), dtype=dtype)
        self._images = torch.zeros(out, _PROBES, dtype=torch.float64)  # of the probes, under all that was merged
        self.nbytes = sum(tensor.nbytes for tensor in (self._b, self._a, self._c, self._probes, self._images))

    def add(self, b: Tensor, a: Tensor, coefficient: float) -> None:
        done, rank = 0, a.shape[0]
        while done < rank:
            if self._filled == len(self._c):
                self._merge()
            count = min(len(self._c) - self._filled, rank - done)
            here, there = slice(self._filled, self._filled + count), slice(done, done + count)
            self._b[here], self._a[here], self._c[here] = b[:, there].T, a[there], coefficient
            self._filled, done = here.stop, there.stop

    def is_zero(self) -> bool:
        return not self._filled

    def held(self) -> LoraFactors:
        if self.is_zero():
            b, a = torch.zeros_like(self._b[:1]), torch.zeros_like(self._a[:1])
            return LoraFactors(a=a, b=b.T)
        b, a, c = self._b[: self._filled], self._a[: self._filled], self._c[: self._filled]
        return LoraFactors(a=c[:, None].to(a.dtype) * a, b=b.T.contiguous())

    def norm(self) -> float:
        b, a, c = (tensor[: self._filled].double() for tensor in (self._b, self._a, self._c))
        return math.sqrt(max(0.0, float(c @ ((b @ b.T) * (a @ a.T)) @ c)))

    def estimated_error(self) -> float:
        lost = self._images - self._images_under(slice(0, self._kept))
        norm = float((self._images + self._images_under(slice(self._kept, self._filled))).norm())
        return float(lost.norm()) / norm if norm else 0.0

    def decompose(self, start: LoraFactors | None, share: float, rank_of: _RankOf) -> _Triplets:
        b, a, c = self._b[: self._filled], self._a[: self._filled], share * self._c[: self._filled]
        if start is not None:
            b, a = torch.cat([b, start.b.T]), torch.cat([a, start.a])
            c = torch.cat([c, torch.full((start.rank,), start.scale, dtype=torch.float64)])
        if len(c) > min(b.shape[1], a.shape[1]):
            return _truncated_svd((c * b.T.double()) @ a.double(), rank_of, noise=_DENSE_NOISE)
        return _decompose(b, a, c, kept=self._kept, rank_of=rank_of)

    def _images_under(self, part: slice) -> Tensor:
        images = (self._a[part] @ self._probes) * self._c[part, None]
        return (self._b[part].T @ images.to(self._b.dtype)).double()

    def _merge(self) -> None:
        images = self._images_under(slice(self._kept, self._filled))
        left, singular_values, right = self.decompose(None, 1.0, lambda _: self._guard_rank)
        rank = len(left)
        self._b[:rank], self._a[:rank], self._c[:rank] = left, right, singular_values[:rank]
        self._kept = self._filled = rank
        self._images += images
        self.dropped += float(singular_values[rank:].norm())


def _decompose(b: Tensor, a: Tensor, c: Tensor, *, kept: int, rank_of: _RankOf) -> _Triplets:
    """Return ``(rank, out)``, all singular values, ``(rank, in)``; the first ``kept`` terms are singular triplets."""
    left, left_rest = _extend(b[:kept], b[kept:])
    right, right_rest = _extend(a[:kept], a[kept:])
    core = (left.double() * c[kept:]) @ right.double().T
    core.diagonal()[:kept] += c[:kept]
    x, singular_values, y = _truncated_svd(core, rank_of, noise=4 * torch.finfo(b.dtype).eps)
    return _rotate(x, b[:kept], left_rest), singular_values, _rotate(y, a[:kept], right_rest)


def _truncated_svd(matrix: Tensor, rank_of: _RankOf, *, noise: float) -> _Triplets:
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("expected a sum within the range of its dtype, got an overflow")
    left, singular_values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = max(1, min(rank_of(singular_values), int((singular_values > noise * singular_values[0]).sum())))
    return left[:, :rank].T, singular_values, right[:rank]


def _extend(basis: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients ``(k + n, n)`` of the ``(n, d)`` rows, and ``(n, d)`` that extend the basis for them."""
    on_basis = basis @ rows.T
    q, r = torch.linalg.qr(torch.addmm(rows, on_basis.T, basis, alpha=-1).T)
    for _ in range(_ROUNDS):
        overlap = basis @ q
        if float(overlap.norm()) <= math.sqrt(torch.finfo(rows.dtype).eps):
            break
        on_basis += overlap @ r
        q, again = torch.linalg.qr(torch.addmm(q.T, overlap.T, basis, alpha=-1).T)
        r = again @ r
    return torch.cat([on_basis, r]), q.T


def _rotate(rotation: Tensor, basis: Tensor, rest: Tensor) -> Tensor:
    rotation, k = rotation.to(basis.dtype), len(basis)
    return torch.addmm(rotation[:, k:] @ rest, rotation[:, :k], basis)
