"Statistics and runs of parts are those of the whole, and the memory of a step grows linearly."

import sys
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DATA, ROOT
from slotnb import train as train_module
from slotnb.runs import inputs as inputs_module
from slotnb.core import batches
from slotnb.diagnostics import feature_stats
from slotnb.normalizer import Moments, Normalizer
from slotnb.features import LazyFeatures
from slotnb.runs.config import preset
from slotnb.evaluate import evaluate
from slotnb.model import outputs, predict
from slotnb.model import build
from slotnb.train import fit, make_optimizer, make_step

sys.path.insert(0, str(ROOT / 'benchmarks'))
from measure import peak_bytes


def features(s=50, n=64, d=48, mean=0.0):
    return torch.randn(s, n, d, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        0.5, 4, d
    ) + mean * torch.linspace(-1, 1, d)


@pytest.mark.parametrize('mean', [0.0, 1.0, 1e4])
def test_moments_of_parts_are_those_of_the_whole(mean):
    feats = features(mean=mean)
    flat = feats.flatten(0, 1).double()
    for size in (1, 7, 50):
        seen = Moments(48, cross=True)
        for x in batches(feats, size):
            seen.add(x)
        assert seen.count == len(flat)
        torch.testing.assert_close(seen.mean, flat.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen.std, flat.std(0), rtol=1e-11, atol=0)
        torch.testing.assert_close(seen.variance, torch.cov(flat.T), rtol=1e-9, atol=1e-9)
        assert seen.total_std == pytest.approx(flat.std().item(), rel=1e-12)


@pytest.mark.parametrize('mean', [0.0, 100.0])
def test_feature_stats_against_plain_ones(mean, monkeypatch):
    "In double precision, as they are defined; parts of three samples."
    from slotnb import diagnostics

    feats = features(s=10, mean=mean)
    x, n = feats.double(), 64
    monkeypatch.setattr(diagnostics, 'batches', lambda f: batches(f, 3))
    cosine = torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
    variance = torch.linalg.eigvalsh(torch.cov(x.flatten(0, 1).T)).flip(0)
    channel, sample = x.flatten(0, 1).std(0), x.flatten(1).std(1)
    plain = dict(
        std=x.std(),
        mean=x.mean(),
        channel_std_min=channel.min(),
        channel_std_median=channel.median(),
        channel_std_max=channel.max(),
        sample_std_min=sample.min(),
        sample_std_max=sample.max(),
        patch_cosine=(cosine.sum((1, 2)) - n).mean() / (n * (n - 1)),
        components_90=1 + (variance.cumsum(0) / variance.sum() < 0.9).sum(),
    )
    assert feature_stats(feats) == pytest.approx({k: v.item() for k, v in plain.items()}, rel=2e-6, abs=1e-6)


def test_normalizer_takes_what_is_not_in_memory():
    feats = features(mean=10.0)
    norm = Normalizer('dataset', 48).fit(LazyFeatures(feats, lambda x: 2 * x, torch.arange(10, 50)))
    flat = 2 * feats[10:].flatten(0, 1).double()
    torch.testing.assert_close(norm.mean, flat.mean(0).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.std, flat.std(0).float(), rtol=2e-7, atol=0)


def test_batches_are_indexed_like_a_tensor():
    feats, index = features(), torch.tensor([4, 2, 49, 4])
    view, whole = LazyFeatures(feats, Normalizer('instance'), index), Normalizer('instance')(feats[index])
    assert len(view) == 4 and view.shape == whole.shape
    for i in (0, -1, slice(1, None), [3, 0], torch.tensor([1, 1]), torch.tensor([True, False, False, True])):
        torch.testing.assert_close(view[i], whole[i], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(view.load(), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(list(view)), whole, rtol=1e-6, atol=1e-6)
    with pytest.raises(IndexError):
        view[4]


def test_predict_does_not_depend_on_the_parts():
    model, feats = build(preset('version_0_1', slot_dim=16, hidden_dim=16), 48, 64), features(9)
    for a, b in zip(predict(model, feats, 0, 9), predict(model, LazyFeatures(feats), 0, 2)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [len(x) for x in (out.recon for out in outputs(model, feats, 0, 4))] == [4, 4, 1]


@pytest.mark.parametrize('normalizer, feature_std', [('instance', 0.0), ('dataset', 1.5)])
def test_streamed_run_equals_one_in_memory(tmp_path, monkeypatch, normalizer, feature_std):
    "Metrics of both kinds of epochs, and every number of the evaluation."
    results, rows = [], []
    for room in (10**9, 0):
        monkeypatch.setattr(inputs_module, '_IN_MEMORY', room)
        kinds = []
        within = train_module.load_if_fits
        monkeypatch.setattr(train_module, 'load_if_fits', lambda *a: kinds.append(within(*a)) or kinds[0])
        run_dir = fit(
            preset(
                'version_0_1',
                data_dir=str(DATA),
                save_dir=str(tmp_path / str(room)),
                num_epochs=2,
                slot_dim=64,
                hidden_dim=64,
                device='cpu',
                normalizer=normalizer,
                feature_std=feature_std,
            ),
            False,
        )
        monkeypatch.setattr(train_module, 'load_if_fits', within)
        assert {type(x) for x in kinds[0]} == {torch.Tensor if room else LazyFeatures}
        rows.append(pd.read_csv(run_dir / 'metrics.csv'))
        results.append(
            {
                k: v
                for k, v in evaluate(run_dir, False, batch_size=32 if room else 5).items()
                if k not in ('seconds_per_epoch', 'collapse', 'engine')
            }
        )
    pd.testing.assert_frame_equal(*rows, rtol=1e-5)
    trained = [
        {k: v for k, v in r.items() if not k.endswith(('_attn', '_masks', '_refined', '_rubber', '_metal'))}
        for r in results
    ]
    assert trained[0] == pytest.approx(trained[1], rel=1e-5) and results[0] == pytest.approx(
        results[1], abs=2e-3
    )  # a pixel on the border may change sides


def test_skipped_samples_are_said_once(tmp_path, few_scenes, capsys):
    config = preset(
        'version_0_1',
        data_dir=str(few_scenes),
        save_dir=str(tmp_path / 'run'),
        num_epochs=1,
        skip_broken=True,
        slot_dim=16,
        hidden_dim=16,
        device='cpu',
    )
    next((few_scenes / 'test').rglob('rgba_00000.png')).write_bytes(b'')
    run_dir = fit(config, False)
    assert capsys.readouterr().out.count('1 broken samples left out') == 1
    evaluate(run_dir, False)
    assert capsys.readouterr().out.count('1 broken samples left out') == 1


@pytest.mark.parametrize('decoder', ['attention', 'mlp'])
@pytest.mark.parametrize('what, sizes', [('tokens', (1024, 2048, 4096)), ('slots', (8, 16, 32))])
def test_memory_of_a_step_grows_linearly(decoder, what, sizes):
    "No tokens x tokens and no slots x slots. Memory is counted, so it is the same every time."

    def peak(n):
        tokens, slots = (n, 11) if what == 'tokens' else (256, n)
        config = preset('version_0_1', device='cpu', decoder=decoder, hidden_dim=32, num_slots=slots)
        model = build(config, 48, tokens)
        step, _ = make_step(config, model, make_optimizer(config, model.parameters()))
        feats, noise = torch.randn(2, tokens, 48), model.init.draw(2)
        step(feats, noise)
        return peak_bytes(lambda: step(feats, noise))

    peaks = [peak(n) for n in sizes]
    exponent = np.log(peaks[2] / peaks[1]) / np.log(2)
    assert exponent < 1.05, peaks
    assert decoder == 'attention' or exponent > 0.8, peaks
    assert peak(sizes[0]) == peaks[0]
