"""Running networks on images: what is captured and shared, and overflow handling; memory: test_out_of_memory.py."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.nets.test_networks import compiled, tinysr_parts, unet_parts
from tests.runtime.device.recorder import Recorder
from tinysr_kernels.errors import NonFiniteOutput
from tinysr_kernels.families import FAMILIES, TinySRConfig
from tinysr_kernels.nets import LatentNetwork, Network
from tinysr_kernels.runtime import runner
from tinysr_kernels.runtime.color_fix import fix_colors
from tinysr_kernels.runtime.device.engine import EagerEngine, Engine
from tinysr_kernels.runtime.device.graphs import Graphs
from tinysr_kernels.runtime.runner import Runner
from tinysr_kernels.runtime.tiles.limits import Limits

CPU = torch.device("cpu")


def unet(dtype: torch.dtype, overflow: float = 0.0) -> Network:
    """A small network; `overflow` is the value of one of its inner biases."""
    unet, decoder, config = unet_parts("separable")
    tensors = {f"unet.{k}": v for k, v in unet.state_dict().items()}
    tensors |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    if overflow:
        tensors["decoder.mid_block.resnets.0.conv2.pointwise.bias"] = torch.full((20,), overflow, dtype=torch.float64)
    return compiled("tinysr-unet", config, tensors, dtype)


def tinysr(dtype: torch.dtype) -> tuple[Network, TinySRConfig]:
    transformer, vae, config = tinysr_parts(separable_decoder=False)
    return compiled("tinysr-dit", config, transformer.normalized_state() | vae.state_dict(), dtype), config


def running(
    networks: Network | Callable[[torch.dtype], Network],
    engine: Engine | None = None,
    limits: Limits | None = None,
    graphs: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Runner:
    of = networks if not isinstance(networks, torch.nn.Module) else lambda _: networks
    family = FAMILIES["tinysr-dit" if isinstance(of(dtype), LatentNetwork) else "tinysr-unet"]
    return Runner(
        of,
        lambda sr, lr, dtype: fix_colors(sr, lr, "adain", family.adain, 4, dtype),
        Graphs(engine or EagerEngine(CPU), 0 if engine is None else graphs),
        limits or Limits(),
        dtype=dtype,
        backend="reference",
        upscale=4,
    )


def photo(height: int, width: int, batch: int = 1, seed: int = 0) -> Tensor:
    """uint8 [N,3,H,W] as it comes from an array [N,H,W,3]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (batch, height, width, 3), generator=generator, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


# Graphs


def test_an_image_is_one_graph_from_uint8_to_uint8(small: Network) -> None:
    plain, engine = running(small), Recorder()
    model = running(small, engine)
    for seed in range(4):
        lr = photo(8, 12, seed=seed)
        sr = model(lr)
        assert sr.dtype == torch.uint8
        assert torch.equal(sr, plain(lr))
    assert engine.events == ["launch", "warm-up", "capture", "replay", "replay", "replay"]
    (graph,) = engine.graphs
    assert [(t.dtype, tuple(t.shape)) for t in (*graph.inputs, *graph.outputs)] == [
        (torch.uint8, (1, 3, 8, 12)),
        (torch.uint8, (1, 3, 32, 48)),
        (torch.bool, (1,)),
    ]


def test_graphs_are_shared_by_strides_but_not_by_dtypes(small: Network) -> None:
    engine = Recorder()
    model = running(small, engine)
    lr = photo(8, 12)
    expected = model(lr, now=True)
    for image in (lr.contiguous(), lr.flip(3).flip(3), torch.cat([lr, lr], 3)[..., :12]):
        assert torch.equal(model(image), expected)
    assert engine.count("capture") == 1
    floats = model(lr / 255, now=True)
    assert engine.count("capture") == 2
    assert torch.equal(floats.mul(255).round().to(torch.uint8), expected)
    assert model(lr.double() / 255).dtype == torch.float64


def test_images_of_any_size_replay_the_graphs_of_a_few_tiles(small: Network) -> None:
    engine, plain = Recorder(), running(small, limits=Limits(tile=16))
    model = running(small, engine, Limits(tile=16, tile_batch=4))
    for i, (height, width) in enumerate([(40, 31), (23, 60), (44, 44), (17, 90), (33, 35), (50, 18)]):
        lr = photo(height, width, seed=i)
        torch.testing.assert_close(model(lr).float(), plain(lr).float(), rtol=0, atol=1)  # batched convolutions
    shapes = {tuple(graph.inputs[0].shape) for graph in engine.graphs}
    assert {shape[1:] for shape in shapes} == {(3, 16, 16)}
    assert {shape[0] for shape in shapes} <= {1, 2, 4}
    assert engine.count("replay") > 4 * engine.count("capture")
    assert engine.count("drop") == 0


def test_windows_and_tiles_of_a_latent_network_are_steps(latent: Network) -> None:
    engine = Recorder()
    model = running(latent, engine, Limits(window_batch=4, vae_core=8))
    plain = running(latent, limits=Limits(window_batch=4, vae_core=8))
    for i, (height, width) in enumerate([(70, 61), (64, 80), (90, 62), (66, 70)]):
        lr = photo(height, width, seed=i)
        assert torch.equal(model(lr), plain(lr))
    names = {tuple(graph.inputs[0].shape[1:]) for graph in engine.graphs}
    assert names == {(3, 224, 224), (4, 8, 8), (4, 28, 28)}
    # an image in one piece is a single step that includes its windows
    engine.events.clear()
    for _ in range(2):
        model(photo(16, 40), now=True)
    assert engine.count("replay") == 2


def test_a_large_image_in_host_memory_is_copied_by_tiles(small: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    lr = photo(40, 40)
    whole = running(small, Recorder(), Limits(tile=16))(lr)
    monkeypatch.setattr(runner, "DEVICE_PIXELS", 1000)
    engine = Recorder()
    assert torch.equal(running(small, engine, Limits(tile=16))(lr), whole)
    assert engine.most_copying == 0


def test_a_batch_runs_in_parts_with_the_same_results(small: Network) -> None:
    lr = photo(8, 12, batch=5)
    parts = running(small, limits=Limits(batch_pixels=8 * 12 * 2))
    found, out = parts(lr), torch.empty((5, 3, 32, 48), dtype=torch.uint8)
    assert parts(lr, out) is out
    assert torch.equal(out, found)
    # Here batches run through a library's convolutions, which may choose their algorithm by the batch.
    for i in range(5):
        torch.testing.assert_close(found[i : i + 1].float(), running(small)(lr[i : i + 1]).float(), rtol=0, atol=1)
    # One by one, as `Limits.of` has it without kernels, the bits are the same.
    found = running(small, limits=Limits(batch_pixels=1))(lr)
    assert torch.equal(found, torch.cat([running(small)(lr[i : i + 1]) for i in range(5)]))


def test_eight_threads_and_many_shapes(small: Network) -> None:
    """One model, mixed sizes, fewer graphs than sizes: every result is bit-identical, and graphs are bounded."""
    plain, engine = running(small), Recorder()
    model = running(small, engine, graphs=3)
    sizes = [(4 + 4 * (i % 3), 8 + 4 * (i % 2)) for i in range(6)]
    expected = [plain(photo(*size, seed=i)) for i, size in enumerate(sizes)]
    wrong: list[int] = []

    def work(start: int) -> None:
        indices = [i % 6 for i in range(start, start + 12)]
        wrong.extend(i for i in indices if not torch.equal(model(photo(*sizes[i], seed=i)), expected[i]))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(engine.graphs) == len(model.graphs) <= 3


# Overflow


def half_or_wider(overflow: float) -> Callable[[torch.dtype], Network]:
    networks: dict[torch.dtype, Network] = {}

    def of(dtype: torch.dtype) -> Network:
        if dtype not in networks:
            networks[dtype] = unet(dtype, overflow)
        return networks[dtype]

    return of


@pytest.mark.parametrize("graphs", [False, True])
def test_overflow_is_recomputed_in_the_next_wider_dtype(graphs: bool, caplog) -> None:
    """A network whose activations overflow float16 is rerun in bfloat16, not in float32."""
    networks = half_or_wider(1e6)
    engine = Recorder() if graphs else None
    model = running(networks, engine, dtype=torch.float16)
    for i in range(3):
        lr = photo(8, 8, seed=i)
        assert torch.equal(model(lr), running(networks, dtype=torch.bfloat16)(lr))
    assert model.retries == 3
    assert "torch.float16 overflowed; the affected parts were recomputed in torch.bfloat16" in caplog.text
    if engine is not None:
        assert engine.count("capture") == 1  # the flag is part of the graph


def test_overflow_in_all_dtypes_is_an_error() -> None:
    networks = half_or_wider(1e39)
    model = running(networks, dtype=torch.bfloat16)
    with pytest.raises(NonFiniteOutput, match="not finite"):
        model(photo(8, 8))
    with pytest.raises(NonFiniteOutput, match="not finite"):
        running(networks)(photo(8, 8))
    assert model.retries == 0


def spiked(dtype: torch.dtype, seen: list[tuple[torch.dtype, int]]) -> Network:
    """A network that outputs infinity in float16 for a tile whose first pixel is white."""
    network = unet(dtype)
    forward = network.forward

    def spike(x: Tensor) -> Tensor:
        y = forward(x)
        seen.append((dtype, len(x)))
        white = (x[:, :, 0, 0] == (255 if x.dtype == torch.uint8 else 1)).all(1)
        return torch.where(white[:, None, None, None], float("inf"), y) if dtype == torch.float16 else y

    network.forward = spike  # type: ignore[method-assign]
    return network


def test_only_the_overflowed_image_of_a_batch_is_recomputed() -> None:
    seen: list[tuple[torch.dtype, int]] = []
    networks = {d: spiked(d, seen) for d in (torch.float16, torch.bfloat16, torch.float32)}
    lr = photo(8, 8, batch=3)
    lr[:, :, 0, 0] = 0
    clean = running(networks.__getitem__, dtype=torch.float16)(lr)
    lr[1, :, 0, 0] = 255
    seen.clear()
    model = running(networks.__getitem__, dtype=torch.float16)
    found = model(lr)
    assert seen == [(torch.float16, 3), (torch.bfloat16, 1)]
    assert model.retries == 1
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[2], clean[2])
    assert torch.equal(found[1:2], running(networks.__getitem__, dtype=torch.bfloat16)(lr[1:2]))


def test_only_the_overflowed_tiles_are_recomputed() -> None:
    seen: list[tuple[torch.dtype, int]] = []
    networks = {d: spiked(d, seen) for d in (torch.float16, torch.bfloat16, torch.float32)}
    lr = photo(16, 44)
    lr[:, :, 0, 0] = 255  # of the first tile alone
    running(networks.__getitem__, limits=Limits(tile=16), dtype=torch.float16)(lr)
    first, again = [torch.float16] * 4, [torch.float16, torch.bfloat16] + [torch.float16] * 3
    assert [dtype for dtype, _ in seen] == first + again
