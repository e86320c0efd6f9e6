"""Where the fused network would not do what the module does, the module computes itself and says why."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinysr_kernels
from tests.runtime.autoencoder.modules import autoencoder, image_for, is_fused, latent_for, plain_only, relative

Log = pytest.LogCaptureFixture


def pair() -> tuple[Any, Any, Tensor]:
    """The same module plain and accelerated, and a latent."""
    return autoencoder(), tinysr_kernels.accelerate(autoencoder()), latent_for(autoencoder())


def same(plain: Any, fused: Any, latent: Tensor) -> bool:
    """Whether both decode to the same bits."""
    return torch.equal(fused.decode(latent).sample, plain.decode(latent).sample)


def test_gradients_are_the_modules(caplog: Log) -> None:
    plain, fused, latent = pair()
    found = []
    with plain_only(caplog, "torch.no_grad"):
        for module in (plain, fused):
            module.requires_grad_(True)
            x = latent.clone().requires_grad_(True)
            loss = module.decode(x).sample.square().mean()
            found.append(torch.autograd.grad(loss, [x, *module.decoder.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not is_fused(fused.decoder)
    with torch.no_grad():
        fused.decode(latent)
    assert is_fused(fused.decoder)


def test_gradients_of_the_input_alone(caplog: Log) -> None:
    _, fused, _ = pair()
    image = image_for(fused).requires_grad_(True)
    with plain_only(caplog, "gradients"):
        fused.encode(image).latent_dist.mean.sum().backward()
    assert image.grad is not None
    assert bool(image.grad.abs().sum() > 0)


def test_training_mode(caplog: Log) -> None:
    plain, fused, latent = pair()
    plain.train()
    fused.train()
    with plain_only(caplog, "eval()"):
        assert same(plain, fused, latent)


def hook(module: Any) -> Any:
    return module.decoder.mid_block.attentions[0].register_forward_hook(lambda _m, _i, o: o * 2)


def pre_hook(module: Any) -> Any:
    return module.decoder.conv_in.register_forward_pre_hook(lambda _m, i: (i[0] + 1,))


class Replaced:
    """As libraries that offload weights do: an instance's own forward."""

    def __init__(self, module: Any) -> None:
        self.conv = module.decoder.conv_out
        plain = self.conv.forward
        self.conv.forward = lambda x: plain(x) + 1

    def remove(self) -> None:
        del self.conv.forward


@pytest.mark.parametrize("add", [hook, pre_hook, Replaced])
def test_hooks_inside_work_and_go(add: Any, caplog: Log) -> None:
    plain, fused, latent = pair()
    before = fused.decode(latent).sample
    with plain_only(caplog, "decoder."):
        handles = [add(plain), add(fused)]
        assert same(plain, fused, latent)
    assert relative(plain.decode(latent).sample, before) > 0.01
    for handle in handles:
        handle.remove()
    assert torch.equal(fused.decode(latent).sample, before)


def test_hooks_around_a_half_work() -> None:
    _, fused, latent = pair()
    before = fused.decode(latent).sample
    fused.decoder.register_forward_hook(lambda _m, _i, o: o + 1)
    assert torch.equal(fused.decode(latent).sample, before + 1)
    assert is_fused(fused.decoder)


def test_hooks_of_diffusers_around_a_half_work() -> None:
    """Offloading in groups and casting by layer wrap `forward` so."""
    hooks = pytest.importorskip("diffusers.hooks")
    _, fused, latent = pair()
    before = fused.decode(latent).sample
    registry = hooks.HookRegistry.check_if_exists_or_initialize(fused.decoder)
    registry.register_hook(hooks.ModelHook(), "test")
    assert torch.equal(fused.decode(latent).sample, before)
    with pytest.raises(tinysr_kernels.InputError, match="remove them first"):
        tinysr_kernels.restore(fused)
    registry.remove_hook("test", recurse=False)
    tinysr_kernels.restore(fused)
    assert "forward" not in fused.decoder.__dict__ or fused.decoder.forward.__func__


def test_layerwise_casting(caplog: Log) -> None:
    """Weights stored in float8, each cast by a hook around its layer."""
    plain, fused, latent = pair()
    for module in (plain, fused):
        module.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with plain_only(caplog, "has been replaced"):
        assert same(plain, fused, latent)


def test_global_hooks(caplog: Log) -> None:
    plain, fused, latent = pair()
    handle = nn.modules.module.register_module_forward_hook(lambda _m, _i, _o: None)
    try:
        with plain_only(caplog, "hooks for all modules"):
            assert same(plain, fused, latent)
    finally:
        handle.remove()


def test_fused_projections(caplog: Log) -> None:
    plain, fused, latent = pair()
    plain.fuse_qkv_projections()
    fused.fuse_qkv_projections()
    with plain_only(caplog, "to_qkv"):
        assert same(plain, fused, latent)


class Doubling:
    """An attention processor of the user's own."""

    def __call__(self, attn: Any, x: Tensor, **_: Any) -> Tensor:
        return 2 * x


def test_processors(caplog: Log) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    plain, fused, latent = pair()
    fused.set_attn_processor(AttnProcessor())
    assert relative(fused.decode(latent).sample, plain.decode(latent).sample) < 1e-5
    assert is_fused(fused.decoder)
    for module in (plain, fused):
        module.set_attn_processor(Doubling())
    with plain_only(caplog, "Doubling"):
        assert same(plain, fused, latent)


def adapt(module: Any) -> None:
    """As a LoRA is injected: the layer inside another one, with its update."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base
            self.up = nn.Conv2d(16, 3, 1).requires_grad_(False)
            nn.init.constant_(self.up.weight, 0.3)
            nn.init.zeros_(self.up.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.up(x)

    module.decoder.conv_out = Adapter(module.decoder.conv_out)


def test_adapters_injected_fused_and_taken_away(caplog: Log) -> None:
    """Merged through `.data` and unloaded without a call in between: the module looks as before, its weights do not."""
    plain, fused, latent = pair()
    before = fused.decode(latent).sample
    for module in (plain, fused):
        adapt(module)
    with plain_only(caplog, "Adapter"):
        assert same(plain, fused, latent)
    for module in (plain, fused):
        adapter = module.decoder.conv_out
        adapter.base_layer.weight.data[:, :, 1, 1] += adapter.up.weight.data[:, :, 0, 0]
        module.decoder.conv_out = adapter.base_layer
    after = fused.decode(latent).sample
    assert relative(after, before) > 0.01
    assert relative(after, plain.decode(latent).sample) < 1e-5


def test_parametrized_weights(caplog: Log) -> None:
    plain, fused, latent = pair()
    for module in (plain, fused):
        nn.utils.parametrizations.weight_norm(module.decoder.conv_in)
        module.requires_grad_(False)
    with plain_only(caplog, "Parametrized"):
        assert same(plain, fused, latent)


def test_weights_of_two_dtypes(caplog: Log) -> None:
    plain, fused, latent = pair()
    for module in (plain, fused):
        module.decoder.conv_in.double()
        module.decoder.conv_in.register_forward_hook(lambda _m, _i, o: o.float())
    fused.decoder.conv_in._forward_hooks.clear()
    with plain_only(caplog, "one floating dtype"), pytest.raises(RuntimeError):
        fused.decode(latent)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_call_and_vmap() -> None:
    plain, fused, latent = pair()
    doubled = {name: 2 * p for name, p in plain.decoder.named_parameters()}
    found, expected = (torch.func.functional_call(m.decoder, doubled, (latent,)) for m in (fused, plain))
    assert relative(found, expected) < 1e-5
    mapped = torch.vmap(lambda z: fused.encoder(z[None])[0])(image_for(plain))
    assert relative(mapped, plain.encoder(image_for(plain))) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_sees_the_plain_module() -> None:
    plain, fused, latent = pair()
    traced = torch.jit.trace(fused.decoder, latent, check_trace=False)
    assert "tinysr" not in str(traced.inlined_graph)
    assert relative(traced(latent), plain.decoder(latent)) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("what", ["decode", "decoder", "in place"])
def test_pytorchs_compiler_sees_the_plain_module(what: str) -> None:
    plain, fused, latent = pair()
    torch._dynamo.reset()
    if what == "decode":
        fused.decode = torch.compile(fused.decode, backend="eager", fullgraph=True)
    elif what == "decoder":
        fused.decoder = torch.compile(fused.decoder, backend="eager", fullgraph=True)
    else:
        fused.decoder.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        assert same(plain, fused, latent)


def test_wrong_inputs_meet_the_modules_own_errors() -> None:
    plain, fused, latent = pair()
    latents = [latent[:, :3], latent[0, 0], latent.double(), latent[:0], latent.int(), latent.to("meta")]
    wrong = [("decode", one) for one in latents] + [("encode", latent), ("decoder", latent[:, :3])]
    for method, one in wrong:
        said = []
        for module in (plain, fused):
            with pytest.raises(Exception) as error:  # noqa: PT011  whatever diffusers raises
                getattr(module, method)(one)
            said.append((error.type, str(error.value)))
        assert said[0] == said[1]


def test_threads() -> None:
    """Several threads fold once and get the same."""
    _, fused, latent = pair()
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(fused.decode(latent).sample)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, found[0]) for one in found)
