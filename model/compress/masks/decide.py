"""From learned probabilities to the mask: the most probable transfer per pair, then blocks by their marginals.

A mask is a tuple of one bool per block, True where the block is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Mask = tuple[bool, ...]


def check_mask(mask: Sequence[bool], layers: int, keep: int | None = None) -> Mask:
    """The mask as a tuple of bools; ValueError unless it has `layers` entries, zeros or ones, `keep` of them ones."""
    if len(mask) != layers:
        raise ValueError(f"the mask has {len(mask)} entries, the network {layers} blocks")
    if any(entry not in (0, 1) for entry in mask):
        raise ValueError(f"a mask is made of zeros and ones, not {list(mask)}")
    kept = sum(bool(entry) for entry in mask)
    if keep is not None and kept != keep:
        raise ValueError(f"the mask keeps {kept} blocks, not {keep}")
    return tuple(bool(entry) for entry in mask)


def check_groups(layers: int, group: int, keep: int, reach: int = 0) -> int:
    """The number of groups; ValueError where the blocks do not divide, or a count cannot be had.

    `keep` of every `group` blocks are kept before transfers; a transfer moves up to `reach` blocks.
    """
    if layers < 1 or group < 1:
        raise ValueError(f"{layers} blocks in groups of {group}: both must be at least 1")
    if layers % group:
        raise ValueError(f"{layers} blocks do not divide into groups of {group}")
    if not 1 <= keep <= group:
        raise ValueError(f"of a group of {group} blocks 1 to {group} can be kept, not {keep}")
    if not 0 <= reach <= min(keep, group - keep):
        most = min(keep, group - keep)
        raise ValueError(
            f"a group of {group} that keeps {keep} can give and take 0 to {most} blocks, not {reach} (reach)"
        )
    return layers // group


def keep_per_group(layers: int, keep: int, group: int) -> int:
    """How many blocks each group keeps so that `keep` of `layers` are left; ValueError if that is not an integer."""
    groups = check_groups(layers, group, group)
    if not 1 <= keep <= layers or keep % groups:
        raise ValueError(f"{groups} groups of {group} can keep {groups}, {2 * groups}, ... {layers} blocks, not {keep}")
    return keep // groups


def transferred(q: Sequence[Sequence[float]], keep: int, size: int) -> list[int]:
    """Blocks left in each group by the most probable feasible transfer of every pair, pair after pair.

    q [K-1,2r+1]: probabilities, or logits, of the left group gaining -r..r blocks. Among equals the smaller transfer.
    """
    counts = [keep] * (len(q) + 1)
    for j, score in enumerate(q):
        reach = len(score) // 2
        possible = [c for c in range(-reach, reach + 1) if 0 <= counts[j] + c <= size and 0 <= keep - c <= size]
        change = max(possible, key=lambda c: (score[c + reach], -abs(c)))
        counts[j] += change
        counts[j + 1] -= change
    return counts


def by_marginals(pi: Sequence[Sequence[float]], counts: Sequence[int]) -> Mask:
    """The counts[j] blocks with the highest pi of every group; pi [K,B] -> mask of K*B. Ties: the first."""
    mask: list[bool] = []
    for values, count in zip(pi, counts, strict=True):
        kept = sorted(range(len(values)), key=lambda i: -values[i])[:count]
        mask += [i in kept for i in range(len(values))]
    return tuple(mask)


def reachable(mask: Sequence[bool], group: int, keep: int, reach: int) -> bool:
    """Whether transfers of at most `reach` blocks between neighbors lead to the mask's split between groups."""
    groups = check_groups(len(mask), group, keep, reach)
    counts = [sum(mask[j * group : (j + 1) * group]) for j in range(groups)]
    carried = 0
    for count in counts:
        carried += count - keep
        if abs(carried) > reach:
            return False
    return carried == 0


def number_reachable(layers: int, group: int, keep: int, reach: int) -> int:
    """How many masks of `layers` blocks the transfers reach; reach 0 counts those of fixed groups."""
    groups = check_groups(layers, group, keep, reach)
    ways = {0: 1}  # carried over the boundary so far -> masks of the groups before it
    for _ in range(groups):
        after: dict[int, int] = {}
        for carried, number in ways.items():
            for count in range(group + 1):
                now = carried + count - keep
                if abs(now) <= reach:
                    after[now] = after.get(now, 0) + number * math.comb(group, count)
        ways = after
    return ways[0]
