"The MLP broadcast decoder on the processor's matrix units: the same loss and gradients, whatever the shapes and threads; and the way without them."

import pytest, torch
from slotnb import step, tiles
from slotnb.core import SlotnbError
from slotnb.decoder import MLPDecoder
from slotnb.losses import feature_mse
from slotnb.step import blocked_mse

here = tiles.tiles_obstacle(32, 32)
needs_tiles = pytest.mark.skipif(bool(here), reason=here)


def gradients(loss, decoder, slots):
    slots.grad = None
    decoder.zero_grad()
    loss.backward()
    return [slots.grad.double().clone(), *(p.grad.double().clone() for p in decoder.parameters())]


def off(got, want):
    return [((g - w).norm() / w.norm().clamp(min=1e-30)).item() for g, w in zip(got, want) if w.numel() > 1]


def sides(slots, patches, hidden, feats, images=2, rows=1024, scale=1.0, temperature=0.5):
    torch.manual_seed(0)
    decoder = MLPDecoder(48, feats, patches, hidden, mask_temperature=temperature)
    s, t = torch.randn(images, slots, 48, requires_grad=True), torch.randn(images, patches, feats) * scale
    got = gradients(mse := blocked_mse(decoder, s, t, 'bf16', rows), decoder, s)
    exact, s2 = decoder.double(), s.detach().double().requires_grad_()
    want = gradients(true := feature_mse(exact(s2).recon, t.double()), exact, s2)
    return mse.item(), true.item(), got, want


@needs_tiles
@pytest.mark.parametrize(
    'shape',
    [
        dict(slots=7, patches=256, hidden=128, feats=96),
        dict(slots=3, patches=50, hidden=64, feats=32),
        dict(slots=2, patches=1, hidden=32, feats=32, images=1),
        dict(slots=24, patches=196, hidden=96, feats=768, rows=300),
        dict(slots=11, patches=256, hidden=64, feats=64, images=5, rows=10**6),
        dict(slots=5, patches=33, hidden=320, feats=64),
        dict(slots=4, patches=64, hidden=64, feats=64, scale=30.0),
        dict(slots=4, patches=64, hidden=64, feats=64, temperature=0.05),
    ],
    ids=str,
)
def test_gradients_of_double_precision(shape):
    mse, true, got, want = sides(**shape)
    assert abs(mse / true - 1) < 3e-3 and max(off(got, want)) < 0.1, (mse, true, off(got, want))


@needs_tiles
def test_the_tiles_are_taken_and_nearer_than_torchs_bf16(monkeypatch):
    shape, calls, own = dict(slots=7, patches=256, hidden=256, feats=384), [], tiles.tiled_mse
    monkeypatch.setattr(step, 'tiled_mse', lambda *a: calls.append(1) or own(*a))
    *_, got, want = sides(**shape)
    assert calls
    monkeypatch.setattr(step, 'tiles_obstacle', lambda *a: 'no')
    *_, other, _ = sides(**shape)
    assert len(calls) == 1 and sum(off(got, want)) < sum(off(other, want))


@needs_tiles
def test_blocks_and_threads_change_nothing_but_the_last_digits():
    shape, before = dict(slots=7, patches=256, hidden=64, feats=64, images=3), torch.get_num_threads()
    try:
        found = []
        for threads, rows in ((1, 1024), (1, 300), (2, 1024), (2, 1024)):
            torch.set_num_threads(threads)
            found.append(sides(rows=rows, **shape))
    finally:
        torch.set_num_threads(before)
    for mse, _, got, _ in found[1:]:
        assert abs(mse / found[0][0] - 1) < 1e-5 and max(off(got, found[0][2])) < 1e-4
    assert found[2][0] == found[3][0] and all(
        a.equal(b) for a, b in zip(found[2][2], found[3][2])
    )  # the same threads, the same digits


@needs_tiles
def test_a_patch_that_is_not_there_weighs_nothing():
    "33 patches are filled up to 64: what fills has no part in any sum."
    torch.manual_seed(0)
    args = [
        torch.randn(1, 2, 32),
        torch.randn(33, 32),
        torch.randn(32),
        torch.zeros(()),
        torch.randn(1, 33, 32),
        0.5,
        [torch.randn(32, 32), torch.full((32,), 1e3), torch.randn(32, 32), torch.randn(32)],
    ]
    whole, grads = tiles.tiled_mse(*args)
    parts = [
        tiles.tiled_mse(args[0], args[1][a:b].contiguous(), *args[2:4], args[4][:, a:b].contiguous(), *args[5:])
        for a, b in ((0, 32), (32, 33))
    ]
    assert abs((32 * parts[0][0] + parts[1][0]).item() / 33 / whole.item() - 1) < 1e-5
    assert (
        off([grads[-1]], [(32 * parts[0][1][-1] + parts[1][1][-1]) / 33])[0] < 2e-2
    )  # each part rounds its error at its own scale
    with pytest.raises(SlotnbError, match='target has shape'):
        tiles.tiled_mse(*args[:4], args[4][:, :9], *args[5:])


def test_other_widths_are_named():
    assert tiles.tiles_obstacle(40, 384) and tiles.tiles_obstacle(64, 100)
    if not here:
        assert 'multiples of 32' in tiles.tiles_obstacle(40, 384)


def test_without_matrix_units_blocks_do_it(monkeypatch):
    monkeypatch.setattr(tiles, '_library', lambda: 'this processor has no matrix units (AMX)')
    mse, true, got, want = sides(slots=3, patches=50, hidden=64, feats=32)
    assert abs(mse / true - 1) < 1e-2 and max(off(got, want)) < 0.2
