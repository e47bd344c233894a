"""The five models against table 2 of the paper, their shapes and their seeds."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import ipmn_core
from ipmn_core.models import DEPTHWISE, MODELS, ShuffleUnit, build, complexity

TABLE2 = pd.read_csv(Path(ipmn_core.__file__).parent / "paper" / "table2.csv").drop_duplicates("model")


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, w) for v, w in zip(a.parameters(), b.parameters(), strict=True))


def test_the_models_are_those_of_table_2_in_its_order():
    assert list(MODELS) == list(TABLE2.model)


@pytest.mark.parametrize("row", list(TABLE2.itertuples()), ids=lambda row: row.model)
def test_macs_and_parameters_equal_the_printed_digits_of_table_2(row, capsys):
    macs, params = complexity(row.model)
    assert f"{macs:.2f} {params:.2f}" == f"{row.macs_g:.2f} {row.params_m:.2f}"
    assert capsys.readouterr().out == ""


def test_parameters_are_counted_on_the_model_that_is_trained():
    model = build("mobilenetv2", 2)
    assert (
        complexity("mobilenetv2", n_classes=2, size=32)[1] == sum(p.numel() for p in model.parameters()) / 1e6
    )


def cubes() -> torch.Tensor:
    return torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))  # (N, 1, D, H, W)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_32_cube_gives_one_logit_a_class(name, n_classes):
    with torch.inference_mode():
        assert build(name, n_classes).eval()(cubes()).shape == (2, n_classes)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_two_32_cubes_gives_every_weight_a_finite_gradient(name):
    model = build(name, 3).train()
    model(cubes()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_alone_decides_the_weights(name):
    torch.manual_seed(1)
    first = build(name, 2, seed=0)
    torch.manual_seed(2)
    assert same_weights(first, build(name, 2, seed=0))
    assert not same_weights(first, build(name, 2, seed=1))


def test_building_and_counting_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    build("densenet121", 3, seed=5)
    complexity("densenet121")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("use", [lambda: build("vgg16", 2), lambda: complexity("vgg16")])
def test_an_unknown_name_lists_the_known_ones(use):
    with pytest.raises(
        ValueError, match=r"'vgg16'.*resnet34, shufflenetv2, mobilenetv2, efficientnetb0, densenet121"
    ):
        use()


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("resnet34", (1, 1, 1)),
        ("shufflenetv2", (1, 2, 2)),
        ("mobilenetv2", (1, 2, 2)),
        ("efficientnetb0", (2, 2, 2)),
        ("densenet121", (2, 2, 2)),
    ],
)
def test_the_first_convolution_takes_one_channel_with_the_paper_s_stride(name, stride):
    first = next(layer for layer in build(name, 2).modules() if isinstance(layer, nn.Conv3d))
    assert (first.in_channels, first.stride) == (1, stride)


@pytest.mark.parametrize("name", MODELS)
def test_the_networks_called_depthwise_have_convolutions_of_one_channel_each(name):
    layers = [layer for layer in build(name, 2).modules() if isinstance(layer, nn.Conv3d)]
    assert any(layer.groups == layer.in_channels > 1 for layer in layers) == (name in DEPTHWISE)


@pytest.mark.parametrize("name", ["shufflenetv2", "mobilenetv2"])
def test_dropout_of_a_fifth_stands_before_the_classifier(name):
    *_, dropout, linear = build(name, 2).modules()
    assert isinstance(linear, nn.Linear)
    assert isinstance(dropout, nn.Dropout)
    assert dropout.p == 0.2


def test_a_shuffle_unit_of_stride_one_interleaves_the_untouched_half_with_the_convolved_one():
    unit = ShuffleUnit(8, 8, stride=1).eval()
    x = torch.randn(2, 8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    out = unit(x)
    torch.testing.assert_close(out[:, 0::2], x[:, :4], rtol=0, atol=0)
    torch.testing.assert_close(out[:, 1::2], unit.main(x[:, 4:]), rtol=0, atol=0)
