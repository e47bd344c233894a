"""The five models against table 2 of the paper, their shapes and their seeds."""

import pytest
import torch
from torch import nn

from ipmn_core.metrics import tables
from ipmn_core.models import CHANNELS_LAST, DEPTHWISE, MODELS, build, complexity
from ipmn_core.models.shufflenet import ShuffleUnit

TABLE2 = tables.paper(2).drop_duplicates("model")
PAPERS = list(TABLE2["model"])
STRIDES = {"resnet34": (1, 1, 1), "shufflenetv2": (1, 2, 2), "mobilenetv2": (1, 2, 2)}  # else (2, 2, 2)


def same_weights(a, b):
    return all(torch.equal(v, w) for v, w in zip(a.parameters(), b.parameters(), strict=True))


def convolutions(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv3d)]


def test_the_models_are_those_of_table_2_in_its_order():
    assert list(MODELS)[:5] == PAPERS and set(PAPERS) >= CHANNELS_LAST | DEPTHWISE


@pytest.mark.parametrize("row", list(TABLE2.itertuples()), ids=lambda row: row.model)
def test_macs_and_parameters_equal_the_printed_digits_of_table_2(row, capsys):
    macs, params = complexity(row.model)
    assert f"{macs:.2f} {params:.2f}" == f"{row.macs_g:.2f} {row.params_m:.2f}"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", PAPERS)
def test_a_model_is_the_paper_s_and_its_weights_are_the_seed_s(name):
    torch.manual_seed(1)
    model = build(name, 2, seed=0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same_weights(model, build(name, 2, seed=0))
    assert not same_weights(model, build(name, 2, seed=1))
    complexity(name, size=32)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state is unchanged
    logits = model(torch.rand(2, 1, 32, 32, 32))
    logits.square().sum().backward()
    assert logits.shape == (2, 2) and all(p.grad.isfinite().all() for p in model.parameters())
    first = convolutions(model)[0]
    assert (first.in_channels, first.stride) == (1, STRIDES.get(name, (2, 2, 2)))
    depthwise = any(layer.groups == layer.in_channels > 1 for layer in convolutions(model))
    assert depthwise == (name in DEPTHWISE)
    if name in ("shufflenetv2", "mobilenetv2"):  # dropout of a fifth precedes the classifier
        *_, dropout, linear = model.modules()
        assert isinstance(linear, nn.Linear) and isinstance(dropout, nn.Dropout) and dropout.p == 0.2


def test_a_shuffle_unit_of_stride_one_interleaves_the_unchanged_half_with_the_convolved_one():
    unit = ShuffleUnit(8, 8, stride=1).eval()
    x = torch.randn(2, 8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    out = unit(x)
    torch.testing.assert_close(out[:, 0::2], x[:, :4], rtol=0, atol=0)
    torch.testing.assert_close(out[:, 1::2], unit.main(x[:, 4:]), rtol=0, atol=0)
