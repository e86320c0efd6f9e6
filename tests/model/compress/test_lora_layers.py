"""Low-rank layers of training: injection, merging, and their weights under the release's keys."""

import pytest
import torch
from torch import nn

from model.compress.training.lora_layers import (
    LoRALinear,
    adapted,
    inject,
    load_lora,
    lora_parameters,
    lora_state,
    merge,
)
from model.reference.lora import merge_lora


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6)))


def shaken() -> nn.Sequential:
    """An adapted network whose change is not zero."""
    net = network()
    inject(net, 3)
    for parameter in lora_parameters(net):
        nn.init.normal_(parameter)
    return net


def test_injection_changes_nothing_and_trains_the_low_rank_part_alone() -> None:
    net, x = network(), torch.randn(5, 4)
    before = net(x)
    weights = dict(net.named_parameters())
    assert inject(net, 3) == ["0", "2.0"]
    assert torch.equal(net(x), before)
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trained == ["0.lora_A.weight", "0.lora_B.weight", "2.0.lora_A.weight", "2.0.lora_B.weight"]
    assert [p.shape for p in lora_parameters(net)] == [(3, 4), (6, 3), (3, 6), (6, 3)]
    assert all(net.get_parameter(name) is weight for name, weight in weights.items())


def test_merging_computes_the_same_in_plain_layers() -> None:
    net, x = shaken(), torch.randn(5, 4)
    before, keys = net.double()(x.double()), network().state_dict().keys()
    assert merge(net) == ["0", "2.0"]
    torch.testing.assert_close(net(x.double()), before)
    assert net.state_dict().keys() == keys
    assert not adapted(net)
    assert all(p.requires_grad for p in net.parameters() if p.ndim == 2)


def test_merging_adds_in_float32_and_rounds_once() -> None:
    net = nn.Sequential(nn.Linear(64, 64).bfloat16())
    inject(net, 8)
    layer = net[0]
    assert isinstance(layer, LoRALinear)
    assert layer.lora_A.weight.dtype == torch.bfloat16
    nn.init.normal_(layer.lora_B.weight)
    a, b, w = (t.detach().float() for t in (layer.lora_A.weight, layer.lora_B.weight, layer.weight))
    merge(net)
    assert torch.equal(net[0].weight, (w + b @ a).bfloat16())


def test_the_project_merges_the_same_checkpoint() -> None:
    net = shaken()
    base = {name: t for name, t in net.state_dict().items() if "lora_" not in name}
    merged = merge_lora(base, lora_state(net, "transformer."))
    merge(net)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(merged[name], tensor)


def test_weights_go_out_and_in() -> None:
    net, other = shaken(), network()
    inject(other, 3)
    state = lora_state(net, "transformer.")
    assert min(state) == "transformer.0.lora_A.weight"
    assert not any(t.requires_grad for t in state.values())
    load_lora(other, state, "transformer.")
    x = torch.randn(5, 4)
    assert torch.equal(other(x), net(x))


def test_where_chooses_layers() -> None:
    net = network()
    assert inject(net, 2, where=r"^2\.") == ["2.0"]
    assert isinstance(net[0], nn.Linear)
    assert not isinstance(net[0], LoRALinear)
    assert not net[0].weight.requires_grad


def test_what_does_not_fit() -> None:
    net = shaken()
    with pytest.raises(ValueError, match="already"):
        inject(net)
    with pytest.raises(ValueError, match="at least 1"):
        inject(network(), 0)
    with pytest.raises(ValueError, match="matches 'attn'"):
        inject(network(), where="attn")
    state = lora_state(net)
    with pytest.raises(ValueError, match=r"missing \['0\.lora_A\.weight'\]"):
        load_lora(net, {k: v for k, v in state.items() if k != "0.lora_A.weight"})
    with pytest.raises(ValueError, match="shape"):
        load_lora(net, {**state, "0.lora_A.weight": torch.zeros(5, 4)})
    with pytest.raises(ValueError, match=r"unexpected \['9"):
        load_lora(net, {**state, "9.lora_A.weight": torch.zeros(3, 4)})
