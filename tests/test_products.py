"A linear layer's three products, whoever makes them."

import pytest, torch
from slotnb import products
from slotnb.core import SlotnbError
from slotnb.products import linear, outer_obstacle, weight_gradient

SIZES = [
    (1, 16, 8),
    (300, 48, 72),
    (257, 1040, 520),
    (5, 7, 3),
    (600, 32, 1024),
]  # rows, in, out; some are no whole tiles


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch):
    monkeypatch.setattr(products, '_LARGE', 0)


def gap(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('runs', [None, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_are_the_products_they_say(size, runs, dtype):
    torch.manual_seed(0)
    m, i, o = size
    first = () if runs is None else (runs,)
    rows, weight, bias, grad = (torch.randn(*first, *s, dtype=dtype) for s in ((m, i), (o, i), (o,), (m, o)))
    wide = [t.double() for t in (rows, weight, bias, grad)]
    plain = wide[0] @ wide[1].mT
    assert gap(linear(rows, weight), plain) < 1e-6
    assert gap(linear(rows, weight, bias), plain + wide[2].unsqueeze(-2)) < 1e-6
    assert gap(linear(rows, weight, bias, relu=True), (plain + wide[2].unsqueeze(-2)).relu()) < 1e-6
    assert gap(linear(grad, weight.mT), wide[3] @ wide[1]) < 1e-6
    want = wide[3].mT @ wide[0]
    assert gap(weight_gradient(grad, rows), want) < 1e-6
    total = torch.ones(*first, o, i, dtype=dtype)
    assert weight_gradient(grad, rows, total) is total and gap(total, want + 1) < 1e-6


def test_rows_that_do_not_lie_together():
    torch.manual_seed(0)
    grad, rows = torch.randn(64, 300).T, torch.randn(300, 96)[:, ::2]
    assert gap(weight_gradient(grad, rows), grad.double().T @ rows.double()) < 1e-6
    assert gap(linear(rows, torch.randn(64, 48) * 0 + 1), rows.double() @ torch.ones(48, 64).double()) < 1e-6


def test_low_precision_adds_up_in_full():
    torch.manual_seed(0)
    grad, rows = torch.randn(300, 64).bfloat16(), torch.randn(300, 48).bfloat16()
    total = torch.zeros(64, 48)
    weight_gradient(grad, rows, total)
    assert total.dtype == torch.float32 and gap(total, grad.double().T @ rows.double()) < 1e-2


@pytest.mark.skipif(bool(outer_obstacle()), reason=outer_obstacle() or 'compiled')
@pytest.mark.parametrize('threads', [2, 3, 5])
def test_threads_change_no_digit(threads):
    torch.manual_seed(0)
    grad, rows, before = torch.randn(513, 72), torch.randn(513, 48), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = weight_gradient(grad, rows)
        torch.set_num_threads(threads)
        assert torch.equal(weight_gradient(grad, rows), one)
    finally:
        torch.set_num_threads(before)


def test_a_stack_is_each_layer_alone():
    torch.manual_seed(0)
    grad, rows = torch.randn(3, 300, 64), torch.randn(3, 300, 48)
    if outer_obstacle():
        pytest.skip(outer_obstacle())
    together = weight_gradient(grad, rows)
    assert all(torch.equal(together[r], weight_gradient(grad[r], rows[r])) for r in range(3))


def test_a_total_of_another_shape_is_refused():
    with pytest.raises(SlotnbError, match='total'):
        weight_gradient(torch.randn(9, 8), torch.randn(9, 16), torch.zeros(16, 8))


def test_left_out_where_it_cannot_be_had(monkeypatch):
    "Without the kernel the same numbers come from torch."
    grad, rows = torch.randn(300, 64), torch.randn(300, 48)
    monkeypatch.setattr(products, 'outer_obstacle', lambda: 'left out')
    monkeypatch.setattr(products, '_add_outer', lambda *a: pytest.fail('the kernel was called'))
    assert torch.equal(weight_gradient(grad, rows), grad.T @ rows)
