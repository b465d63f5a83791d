"""Online search of a size by the sign of the derivative of its time cost.

Han, Wang, Leung, "Adaptive Gradient Sparsification for Efficient Federated Learning: An Online
Learning Approach", ICDCS 2020, arXiv 2001.04756, and the authors' code
(github.com/PengchaoHan/Adaptive_Gradient_Sparsification_FL), where the size k is the number of
gradient elements sent.  The formulas, the update of the interval and the constants are those of
that code; the text of the paper was not at hand, so no equation is cited by its number.

    k_{m+1} = P_K(k_m - δ_m · s_m)        s_m in {-1, 0, 1}, the sign of dτ/dk at k_m
    δ_m = B / √(2 (m - m₀))               B = width of the interval K, m₀ = when K last changed
    k'_m = k_m - δ_m / 2                  a smaller size, tried to estimate s_m
    s_m = sign((τ(k_m) - τ(k'_m)) / (k_m - k'_m))
    τ(k_m) = T(k_m),  τ(k'_m) = T(k'_m) · (L₀ - L) / (L₀ - L')

T is the seconds of a round; L₀ the loss before it, L and L' after it at sizes k_m and k'_m: τ is
the time that each size needs for the same decrease of the loss.

OURS: sizes are densities in (0, 1] instead of counts, so they need no stochastic rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

WINDOW = 20  # moves after which K is looked at
WIDENING = 1.5  # α: the new K reaches so far beyond the sizes visited since
PATIENCE = 11  # estimates that may fail in a row before k grows
PROBE_FLOOR = 0.1  # k' is at least this share of the lower end of K


@dataclass(frozen=True)
class SizeSearch:
    """What the search remembers; numbers only, so that a state can hold it as a mapping."""

    lowest: float  # K never reaches beyond these
    highest: float
    low: float  # K
    high: float
    since: int = 0  # m₀, the decision at which K last changed
    lasted: int = 0  # decisions for which the K before held
    moves: int = 0  # since K was last looked at, and the sizes that they visited
    smallest: float = 1.0
    largest: float = 0.0
    waited: int = 0  # estimates that failed in a row


def search_within(lowest: float, highest: float) -> SizeSearch:
    """A search that starts with K = [lowest, highest].  Raises ValueError unless 0 < l <= h <= 1.

    >>> search_within(0.1, 1.0).high
    1.0
    """
    if not 0 < lowest <= highest <= 1:
        raise ValueError(f"sizes must satisfy 0 < lowest <= highest <= 1, got {lowest}, {highest}")
    return SizeSearch(lowest, highest, lowest, highest)


def step_size(search: SizeSearch, decision: int) -> float:
    """δ_m of decision m, m > m₀.

    >>> step_size(search_within(0.1, 1.0), 2)
    0.45
    """
    if decision <= search.since:
        raise ValueError(f"decision must be after {search.since}, got {decision}")
    return (search.high - search.low) / sqrt(2 * (decision - search.since))


def probe_size(search: SizeSearch, size: float, decision: int) -> float:
    """k'_m = k_m - δ_m / 2, at least a tenth of the smallest size of K.

    >>> round(probe_size(search_within(0.1, 1.0), 0.5, 2), 6)
    0.275
    """
    return max(size - step_size(search, decision) / 2, PROBE_FLOOR * search.low)


def derivative_sign(
    *, start_loss: float, end_loss: float, probe_loss: float, seconds: float, probe_seconds: float
) -> int | None:
    """s_m, with L₀, L, L' and T(k), T(k') of a probe k' < k; None unless both losses are < L₀.

    1: the smaller size takes less time for the same decrease; -1: more; 0: as much.

    >>> derivative_sign(start_loss=2.0, end_loss=1.0, probe_loss=1.5, seconds=10, probe_seconds=6)
    -1
    """
    decrease, probe_decrease = start_loss - end_loss, start_loss - probe_loss
    if not (decrease > 0 and probe_decrease > 0):
        return None
    probe_cost = probe_seconds * decrease / probe_decrease  # τ(k')
    return (seconds > probe_cost) - (seconds < probe_cost)


def next_size(
    search: SizeSearch, size: float, decision: int, sign: int | None
) -> tuple[SizeSearch, float]:
    """(search, k_{m+1}) after the m-th decision, m = 1, 2, ...; sign None: no estimate.

    Without an estimate k stays; after PATIENCE of those in a row it grows by δ_m.

    >>> next_size(search_within(0.1, 1.0), 1.0, 2, 1)[1]
    0.55
    """
    if sign is None and search.waited < PATIENCE:
        return replace(search, waited=search.waited + 1), size
    moved = size - step_size(search, decision) * (-1 if sign is None else sign)
    moved = min(max(moved, search.low), search.high)  # P_K
    search = replace(
        search,
        waited=0,
        moves=search.moves + 1,
        smallest=min(search.smallest, moved),
        largest=max(search.largest, moved),
    )
    return (search if search.moves < WINDOW else _refitted(search, decision)), moved


def _refitted(search: SizeSearch, decision: int) -> SizeSearch:
    """K around the sizes visited, if that lowers the bound on the regret; the count starts anew.

    K' = [smallest / α, α · largest], taken if B + B' <= √2 B and the present K has held as long as
    the one before.
    """
    low = max(search.smallest / WIDENING, search.lowest)
    high = min(search.largest * WIDENING, search.highest)
    width, new_width = search.high - search.low, high - low
    held = decision - search.since
    search = replace(search, moves=0, smallest=1.0, largest=0.0)
    if new_width > 0 and held >= search.lasted and width + new_width <= sqrt(2) * width:
        return replace(search, low=low, high=high, since=decision, lasted=held)
    return search
