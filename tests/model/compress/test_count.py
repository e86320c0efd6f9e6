"""The counts at the real shapes, on tensors without data, against diffusers' networks and the paper's shares."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest
import torch

from model.compress import count
from model.compress.__main__ import main
from model.compress.conditions import parse_mask
from model.compress.count import Table
from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.sd3_transformer import SD3Config, SD3Transformer
from model.reference.tiny_vae import TinyVAE
from tests import ROOT
from tinysr_kernels.families import TinySRConfig

GUIDE = ROOT / "docs" / "compression.md"


@pytest.fixture(scope="module")
def tables() -> tuple[Table, Table]:
    return count.real_tables()


def test_the_papers_shares(tables: tuple[Table, Table]) -> None:
    """arXiv 2508.17434: 2112 M parameters become about 340 M, 83.9 % less (separable decoder); MACs fall by 84 %."""
    teacher, student = (count.total(table) for table in tables)
    assert round(teacher.parameters / 1e6) == 2112
    assert round(student.parameters / 1e6) == 341
    assert count.gone(teacher.macs, student.macs) == "83.8 %"
    slim = count.total(count.real_tables(separable_decoder=True)[1])
    assert round(slim.parameters / 1e6) == 340
    assert count.gone(teacher.parameters, slim.parameters) == "83.9 %"


def test_the_parameters_are_diffusers_own(tables: tuple[Table, Table]) -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        transformer = diffusers.SD3Transformer2DModel(**asdict(SD3Config()))
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=count.SD3_VAE,
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    own = sum(size.parameters for name, size in tables[0].items() if not name.startswith("VAE"))
    assert own == sum(p.numel() for p in transformer.parameters())
    assert tables[0]["VAE encoder"].parameters == sum(p.numel() for p in vae.encoder.parameters())
    assert tables[0]["VAE decoder"].parameters == sum(p.numel() for p in vae.decoder.parameters())


def test_components_add_up_to_one_forward_pass() -> None:
    """The parts into which the transformer is split hold all of its multiplications, and none twice."""
    config = SD3Config(
        sample_size=16,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
    )
    latent = torch.empty(1, 4, 8, 8)
    vae = KLVAE(kl_vae_shapes((8, 16), 4, 1), kl_config(4))
    table = count.teacher_table(config, vae, latent, tokens=5)
    with torch.device("meta"):
        transformer = SD3Transformer(config)
        inputs = torch.empty(1, 4, 8, 8), torch.empty(1, 5, 12), torch.empty(1, 20)
    forward = count.macs(lambda: transformer(*inputs))
    parts = [size.macs for name, size in table.items() if not name.startswith("VAE")]
    assert sum(parts) == forward
    # The image's stream: 12 D^2 per token and block, attention's two products, both patch layers.
    dim, tokens = config.dim, 16
    block = 12 * dim**2 * tokens + 2 * tokens**2 * dim
    assert table["transformer, image stream"].macs == 3 * block + 2 * tokens * dim * 2 * 2 * 4


def test_a_separable_convolution_counts_as_two() -> None:
    config = TinySRConfig(encoder_blocks=(1,), decoder_blocks=(1,))
    vae = TinyVAE.regular(width=8, latent_channels=4, config=config, separable_encoder=True)
    pixels = 16 * 16
    found = count.macs(lambda: vae.encode(torch.randn(1, 3, 16, 16)))
    assert found == pixels * ((9 * 3 + 3 * 8) + 3 * (9 * 8 + 8 * 8) + (9 * 8 + 8 * 4))


def test_the_command_prints_what_the_guide_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count"]) == 0
    assert capsys.readouterr().out.strip() in GUIDE.read_text(encoding="utf-8")


def test_the_guides_mask_is_one_that_init_takes() -> None:
    found = re.findall(r"--mask ([01]+)", GUIDE.read_text(encoding="utf-8"))
    assert [sum(parse_mask(mask, 24, 12)) for mask in found] == [12]
