"""Codes for weights: how far they are off, and that layers compute with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model import quantised
from step1x_edit.model.quantised import CODES, Code, QuantLinear, code

ROWS, COLUMNS = 48, 160  # not a multiple of the 64 columns that share a scale


def matrix(seed: int = 0) -> Tensor:
    """Rows of very different sizes, one of them without anything."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(ROWS, COLUMNS, generator=generator)
    sizes = torch.logspace(-4, 2, ROWS).unsqueeze(1)
    sizes[7] = 0
    return drawn * sizes


def linear(weight: Tensor, with_bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=with_bias).requires_grad_(False)
    layer.weight.copy_(weight)
    return layer


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def error_allowed(weight: Tensor, kind: Code) -> Tensor:
    """How far each number may be from the one that was coded."""
    largest = weight.abs().amax(1, keepdim=True)
    match kind:
        case "fp8":  # half of the last of three digits; near zero half of the smallest number
            return torch.maximum(weight.abs() * 2**-4, largest * 2**-17)
        case "int8":  # half a step, and the scale is rounded up
            return (largest / 127 / 2 * 1.01).expand_as(weight)
        case "nf4":  # half of the widest gap, and the scale is rounded
            blocks = F.pad(weight, (0, -COLUMNS % 64)).view(ROWS, -1, 64)
            widest = blocks.abs().amax(-1, keepdim=True) * ((1 - 0.6961928) / 2 + 0.004)
            return widest.expand_as(blocks).flatten(1)[:, :COLUMNS]


@pytest.mark.parametrize("kind", CODES)
def test_no_weight_is_further_off_than_its_code_allows(kind: Code) -> None:
    weight = matrix()

    found = QuantLinear.of(linear(weight), kind).weight(torch.float32)

    assert found.shape == weight.shape
    assert ((found - weight).abs() <= error_allowed(weight, kind) + 1e-30).all()
    assert (found[7] == 0).all()


@pytest.mark.parametrize(("kind", "low", "high"), [("fp8", 2, 3), ("int8", 0.5, 1), ("nf4", 8, 10)])
def test_the_error_of_weights_is_as_published(kind: Code, low: float, high: float) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))

    percent = 100 * relative(QuantLinear.of(linear(weight), kind).weight(torch.float32), weight)

    assert low < percent < high


@pytest.mark.parametrize(("kind", "bits"), [("fp8", 8), ("int8", 8), ("nf4", 4)])
def test_codes_take_as_many_bits_as_promised(kind: Code, bits: float) -> None:
    layer = QuantLinear.of(linear(torch.ones(512, 1024)), kind)

    scales = 512 * (16 * 2 if kind == "nf4" else 4)
    assert layer.codes.nbytes == 512 * 1024 * bits / 8
    assert layer.scale.nbytes == scales


@pytest.mark.parametrize("kind", CODES)
def test_a_matrix_in_pieces_has_the_same_codes(kind: Code) -> None:
    weight = matrix()

    whole = code(weight, kind)
    pieces = [code(part, kind) for part in weight.split(5)]

    for found, expected in zip(zip(*pieces, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(found).view(torch.uint8), expected.view(torch.uint8))


def test_a_4_bit_code_is_the_nearest_value_also_beside_the_middle_of_two() -> None:
    values = torch.tensor(quantised.NF4_VALUES)
    edges = (values[1:] + values[:-1]) / 2
    above, below = (torch.nextafter(edges, edges + side) for side in (1, -1))
    # The scale of a block, its largest number, may be rounded down: then shares exceed 1.
    for largest in (1.0, 1.00390625, -1.00390625):
        drawn = torch.empty(64, 64).uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
        drawn[0, :45] = torch.cat([edges, above, below])
        drawn[:, 63] = largest

        found, scale = code(drawn, "nf4")

        shares = drawn / scale.float()
        expected = torch.bucketize(shares, edges)  # the number of edges below a share
        assert torch.equal(found >> 4, expected[:, ::2].to(torch.uint8))
        assert torch.equal(found & 15, expected[:, 1::2].to(torch.uint8))


def test_weights_that_were_8_bit_floats_before_stay_exact() -> None:
    weight = matrix().to(torch.float8_e4m3fn).float()

    assert torch.equal(QuantLinear.of(linear(weight), "fp8").weight(torch.bfloat16).float(), weight)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_layer_computes_with_the_weights_that_its_codes_stand_for(
    kind: Code, dtype: torch.dtype, with_bias: bool
) -> None:
    exact = linear(matrix(), with_bias).to(dtype)
    layer = QuantLinear.of(exact, kind)
    x = torch.randn(2, 3, COLUMNS).to(dtype)

    found = layer(x)

    assert torch.equal(found, F.linear(x, layer.weight(dtype), exact.bias))
    assert found.shape == (2, 3, ROWS)
    assert found.dtype == dtype
    assert 0 < relative(found, exact(x)) < 0.15


@pytest.mark.parametrize("kind", CODES)
def test_a_compiled_layer_is_the_same_layer(kind: Code) -> None:
    layer = QuantLinear.of(linear(matrix()), kind)
    x = torch.randn(5, COLUMNS)

    compiled = torch.compile(layer, backend="eager", fullgraph=True)

    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))


Multiply = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


# What a GPU does with the codes; torch has both products for the CPU as well.
@pytest.mark.parametrize(
    ("kind", "multiply", "allowed"),
    [("fp8", quantised.multiply_float8, 0.05), ("int8", quantised.multiply_int8, 0.02)],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_of_codes_is_near_the_product_of_numbers(
    kind: Code,
    multiply: Multiply,
    allowed: float,
    with_bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantised, "OUTPUTS_AT_ONCE", 32)  # two pieces
    generator = torch.Generator().manual_seed(2)
    exact = linear(torch.randn(ROWS, COLUMNS, generator=generator), with_bias).bfloat16()
    x = torch.randn(20, COLUMNS, generator=generator).bfloat16()
    x[3], x[4] = 0, 1000 * x[4]
    layer = QuantLinear.of(exact, kind)

    found = multiply(x, layer.codes, layer.scale, exact.bias)

    assert found.shape == (20, ROWS)
    assert found.dtype == torch.bfloat16
    for row in (0, 4):
        assert relative(found[row], exact(x)[row]) < allowed
    nothing = exact.bias if with_bias else torch.zeros(ROWS)
    torch.testing.assert_close(found[3], nothing.bfloat16())


# What a CPU does with the codes.
needs_products = pytest.mark.skipif(
    not quantised._has_exact_products(), reason="this processor has neither VNNI nor AMX"
)


def rounding(weight: Tensor, kind: Code, with_bias: bool = True) -> QuantLinear:
    """A layer that may round its input."""
    layer = QuantLinear.of(linear(weight, with_bias), kind)
    layer.may_round_input = True
    return layer


@needs_products
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_cpu_multiplies_codes_and_rounds_only_what_rows_do_not_share(
    kind: Code, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "CPU_OUTPUTS_AT_ONCE", 32)  # two pieces
    generator = torch.Generator().manual_seed(3)
    layer = rounding(matrix(), kind, with_bias)
    x = torch.randn(2, 20, COLUMNS, generator=generator)
    x[..., 5] += 300  # large in all rows
    x[0, 3] += 40  # one row is moved
    codes, scale = layer.as_int8()

    found = layer(x)

    expected = F.linear(x, codes * scale, layer.bias)
    changes = expected - expected.mean(1, keepdim=True)
    assert found.shape == (2, 20, ROWS)
    assert 0 < (found - expected).norm() / changes.norm() < 0.02
    assert torch.equal(layer(x), found)
    x = x.bfloat16()
    assert relative(layer(x), layer(x.float())) < 0.005


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_large_numbers_costs_the_others_no_digits(dtype: torch.dtype) -> None:
    layer = rounding(matrix(), "int8")
    x = torch.randn(20, COLUMNS, generator=torch.Generator().manual_seed(3)).to(dtype)
    with_large = x.clone()
    with_large[3] *= 1000
    codes, scale = layer.as_int8()
    expected = F.linear(x.float(), codes * scale, layer.bias)
    others = torch.arange(20) != 3

    found = layer(with_large)[others]

    assert relative(found, expected[others]) < 0.02


@needs_products
def test_a_picture_does_not_change_with_the_others_in_its_batch() -> None:
    layer = rounding(matrix(), "int8")
    x = torch.randn(3, 20, COLUMNS)

    assert torch.equal(layer(x), torch.cat([layer(each) for each in x.split(1)]))


@needs_products
def test_the_largest_numbers_do_not_overflow() -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(6144)
    layer = rounding(signs.expand(16, -1), "int8", with_bias=False)
    x = torch.stack([signs, -signs])

    torch.testing.assert_close(layer(x), F.linear(x, layer.weight(torch.float32)))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_cpu_without_such_products_widens(kind: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "_has_exact_products", lambda: False)
    layer = rounding(matrix(), kind)
    x = torch.randn(20, COLUMNS)

    assert torch.equal(layer(x), F.linear(x, layer.weight(torch.float32), layer.bias))


def test_4_bit_codes_as_8_bit_ones_are_hardly_further_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "CPU_ROWS_AT_ONCE", 20)  # three pieces
    layer = QuantLinear.of(linear(matrix()), "nf4")
    weight = layer.weight(torch.float32)

    codes, scale = layer.as_int8()

    assert ((codes * scale - weight).abs() <= scale / 2 * 1.001).all()
    assert (codes[7] == 0).all()
