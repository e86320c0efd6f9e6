"""Work items, candidates and the cost model that ranks them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from autotune.items.candidates import DUPLICATE, REJECTED, Candidate, candidates
from autotune.items.cost_model import Built, occupancy, predict
from autotune.items.work import Item, Target, all_items, calls_of, items, tunable
from tests.autotune.simulated import CEILINGS, ITEMS, OP, Config, Simulated, make_items
from tinysr_kernels.errors import InputError
from tinysr_kernels.launch.device import GPUS, Gpu
from tinysr_kernels.launch.plan import Launch, Plan
from tinysr_kernels.ops import Operator
from tinysr_kernels.ops.trace import Call

H200 = GPUS[90]
DEMO = Target(ckpt="demo")


def test_every_launch_of_the_network_is_in_one_item() -> None:
    """Each (operator, bucket) once, with the number of calls in the network."""
    calls = calls_of(DEMO, H200)
    found = items(calls)
    assert len({item.key for item in found}) == len(found)
    assert sum(item.calls for item in found) == sum(tunable(call) is not None for call in calls)
    for item in found:
        assert item.bucket == item.call.bucket()
        assert item.cost == item.call.cost()


def test_an_item_holds_its_largest_call() -> None:
    item = ITEMS[0]
    small, large = (Call(OP, (), (), make_items()[i].cost, operator=item.call) for i in (1, 0))
    merged = items([small, large, small])
    assert len(merged) == 1
    assert merged[0].call is large.operator
    assert merged[0].calls == 3


@dataclass(slots=True, eq=False)
class Several(Operator):
    """An operator of up to two tensors."""

    n: int
    t0: torch.Tensor | None
    t1: torch.Tensor | None


@pytest.mark.parametrize(
    ("dtypes", "bits"),
    [
        ((torch.float16, torch.float32), 16),
        ((torch.float32,), 32),
        ((torch.float8_e4m3fn, torch.float32), 8),
        ((torch.uint8, torch.bfloat16), 16),
        ((torch.uint8,), 16),
    ],
)
def test_bits_of_the_gemm_operands(dtypes: tuple[torch.dtype, ...], bits: int) -> None:
    tensors = [torch.empty(2, dtype=dtype, device="meta") for dtype in dtypes]
    assert Item(Several(3, *tensors, *[None] * (2 - len(tensors))), 1).bits == bits


def test_the_cost_model_counts_scratch_between_launches() -> None:
    """Split-K writes and reads partial sums; occupancy is that of the launch with the most traffic."""
    item = ITEMS[0]
    one = candidates(item, H200, item.call.heuristic(H200)).incumbent
    (main,) = one.plan.launches
    assert isinstance(main, Launch)
    parts = torch.empty(64, 4096, 1024, device="meta")
    split = Launch(main.kernel, main.grid, {**main.arguments, "scratch_parts": parts}, main.num_warps, main.num_stages)
    merge = Launch(main.kernel, (1 << 20,), {"scratch_parts": parts, "out": one.plan.result}, 1, 1)
    both = Candidate(one.config, Plan(one.plan.result, (split, merge)))
    least = 2 * parts.nbytes / CEILINGS.memory
    assert predict(item, one, H200, CEILINGS) < least < predict(item, both, H200, CEILINGS) < 2 * least


def test_calls_of_several_targets_add_up() -> None:
    one, two = all_items([DEMO], H200), all_items([DEMO, DEMO], H200)
    assert [2 * item.calls for item in one] == [item.calls for item in two]
    batch = all_items([Target(ckpt="demo", batch=4)], H200)
    assert {item.key for item in batch} != {item.key for item in one}


def test_launches_of_a_quantized_network() -> None:
    """GEMM operands have 8 bits; a GPU or family without fp8 is an error."""
    wanted = Target("tinysr-dit", quantize="fp8")
    assert wanted.name == "tinysr-dit separable, 1 x 128x128, float16, fp8"
    assert 8 in {item.bits for item in all_items([wanted], H200)}
    assert 8 not in {item.bits for item in all_items([replace(wanted, quantize=None)], H200)}
    with pytest.raises(InputError, match="needs sm_89, found NVIDIA A100"):
        all_items([wanted], GPUS[80])
    with pytest.raises(InputError, match="this checkpoint is tinysr-unet"):
        all_items([replace(DEMO, quantize="fp8")], H200)


def test_families_have_names() -> None:
    assert Target("tinysr-dit").name == "tinysr-dit separable, 1 x 128x128, float16"
    assert Target(ckpt="demo", batch=2, dtype="float32").name == "demo, 2 x 128x128, float32"


def test_candidates_are_distinct_and_the_incumbent_comes_first() -> None:
    item = ITEMS[0]
    incumbent = Config("tile", 64, 16, 4, 2)
    found = candidates(item, H200, incumbent)
    assert found.incumbent.config == incumbent
    configs = [c.config for c in found.all]
    assert len(set(configs)) == len(configs)
    assert set(configs) == set(item.call.space(H200))
    # The heuristic's choice and the incumbent are also in the search space.
    assert found.removed == {DUPLICATE: 2}
    assert sum(c.library for c in found.all) == 1


def test_rejected_configurations_are_removed() -> None:
    x = torch.empty(64, 20, dtype=torch.float16, device="meta")
    narrow = Item(Simulated(x), 1)
    found = candidates(narrow, H200, Config("tile", 16, 16, 2, 1))
    assert found.removed[REJECTED] > 10
    assert all(c.config.depth <= 20 for c in found.all)


def test_real_operators_have_candidates() -> None:
    for item in all_items([DEMO], H200)[:12]:
        incumbent = item.call.heuristic(H200)
        found = candidates(item, H200, incumbent)
        assert len(found.all) > 1
        times = [predict(item, c, H200, CEILINGS) for c in found.all]
        assert all(CEILINGS.floor(item.cost, item.bits) < t < 1 for t in times)


def launch(config: Config, rows: int = 4096) -> Launch:
    made = Simulated(torch.empty(rows, 1024, dtype=torch.float16, device="meta")).plan(config).launches[0]
    assert isinstance(made, Launch)
    return made


def test_occupancy() -> None:
    """Limited by warps, registers or shared memory; never less than one program."""
    small = launch(Config("tile", 16, 16, 4, 1))
    assert occupancy(small, H200, (32, 0)) == 16
    assert occupancy(small, H200, (128, 0)) == 4
    assert occupancy(small, H200, (32, 100 * 1024)) == 2
    assert occupancy(small, H200, (255, 227 * 1024)) == 1
    assert occupancy(small, GPUS[120], (32, 0)) == 12
    assert occupancy(small, Gpu("NVIDIA GH100", (10, 3), 100), (32, 0)) == 16


def test_the_cost_model_prefers_higher_occupancy() -> None:
    """Fewer registers and less shared memory are never slower; the number of programs matters."""
    item = ITEMS[0]
    found = {c.config: c for c in candidates(item, H200, item.call.heuristic(H200)).all}
    one = found[Config("tile", 64, 64, 2, 1)]
    lean, fat = Built(((32, 8192),)), Built(((255, 200 * 1024),))
    assert predict(item, one, H200, CEILINGS, lean) <= predict(item, one, H200, CEILINGS, fat)
    few, many = (found[Config("tile", block, 64, 4, 2)] for block in (128, 16))
    assert predict(item, few, H200, CEILINGS) != predict(item, many, H200, CEILINGS)
