"Many runs as one program: the same numbers as alone, the same files, and no run disturbs another."

from dataclasses import replace
import pandas as pd
import pytest
import torch
from conftest import DATA
from slotnb import train
from slotnb.core import SlotnbError
from slotnb.evaluate import load_run
from slotnb.fast import many_models
from slotnb.fast.many_models import train_many
from slotnb.features import LazyFeatures
from slotnb.runs.config import preset
from slotnb.runs.folder import RunState, why_failed
from slotnb.runs.inputs import RunData
from slotnb.train import fit

BASE = preset(
    'version_0_1', data_dir=str(DATA), num_epochs=3, warmup_epochs=1, slot_dim=32, hidden_dim=32, device='cpu'
)
# the softmax over slots cancels this bias: its gradient is rounding, which Adam turns into steps
CANCELLED = 'slot_attention.norm_slots.bias'


@pytest.fixture
def few_features(monkeypatch):
    "Small random features, so that it is quick."

    def prepared(config, show_progress):
        feats = torch.randn(15, 16, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 24)
        scale = config.feature_std / feats.std().item() if config.feature_std else 1.0

        def part(a, b):
            return LazyFeatures(feats[a:b] * scale)

        return RunData(part(0, 12), part(12, 15), None, part(0, 15), dict(dim=24, grid=[4, 4]), scale, {})

    for module in (train, many_models):
        monkeypatch.setattr(module, 'prepare', prepared)


@pytest.fixture
def double(few_features):
    "In double precision a wrong equation shows, and rounding does not."
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plan(folder, vary):
    return {name: replace(BASE, save_dir=str(folder / name), **kw) for name, kw in vary.items()}


def metrics(config):
    return pd.read_csv(config.run_dir / 'metrics.csv')


def assert_same(a, b, rel=1e-7):
    pd.testing.assert_frame_equal(metrics(a), metrics(b), rtol=rel, atol=1e-12)
    one, two = load_run(a.run_dir), load_run(b.run_dir)
    assert one.epoch == two.epoch
    for k, p in two.model.named_parameters():
        assert k == CANCELLED or one.model.get_parameter(k).allclose(p, rel, 1e-8), k
    assert {p.name for p in a.run_dir.iterdir()} == {p.name for p in b.run_dir.iterdir()}


VARY = dict(
    plain=dict(),
    seed=dict(seed=3, clip_norm=0.1),
    sharp=dict(mask_temperature=0.3, normalizer='dataset', warmup_epochs=0),
    scaled=dict(normalizer='none', feature_std=0.5),
    longer=dict(num_epochs=5, lr=0.002, diversity_weight=0.0),
    learned=dict(slot_init='learned'),
    learned_too=dict(slot_init='learned', seed=1),
    mlp=dict(decoder='mlp', seed=1),
    mlp_too=dict(decoder='mlp', mask_temperature=1.0),
    more_slots=dict(num_slots=5),
    last_is_small=dict(batch_size=5),
    small_too=dict(batch_size=5, seed=1),
    kmeans=dict(slot_init='kmeans'),
    kmeans_too=dict(slot_init='kmeans', seed=1),
    bare=dict(projection='bare', attn_temperature=0.2),
    bare_too=dict(projection='bare', attn_temperature=0.2, seed=1),
    target=dict(target='learned_instance'),
    target_too=dict(target='learned_instance', weight_init='torch', slot_std=0.5, seed=1),
    wide_pos=dict(decoder='mlp', pos_std=1.0),
)


def test_equals_each_alone(tmp_path, double):
    "Two at most in a stack, so that runs also wait, and enter a stack whose other run has begun."
    together, alone = plan(tmp_path / 'together', VARY), plan(tmp_path / 'alone', VARY)
    assert train_many(list(together.values()), False, most=2) == {}
    for name in VARY:
        fit(alone[name], False)
        assert_same(together[name], alone[name])


def interrupted(config, epochs, run, monkeypatch):
    "Train, and end after so many epochs of this run, its state saved."
    end = RunState.end_epoch

    def stop(self, *found):
        shown = end(self, *found)
        if self.folder == config.run_dir and self.epoch == epochs:
            raise KeyboardInterrupt
        return shown

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(RunState, 'end_epoch', stop)
        run()


def test_begun_alone_and_resumed_together_and_the_other_way_round(tmp_path, double, monkeypatch):
    vary = dict(a=dict(num_epochs=5), b=dict(num_epochs=5, seed=1), c=dict(num_epochs=3, seed=2))
    whole, first, second = (plan(tmp_path / name, vary) for name in ('whole', 'alone_first', 'together_first'))
    for c in whole.values():
        fit(c, False)
    interrupted(first['b'], 3, lambda: fit(first['b'], False, 0.0), monkeypatch)
    assert train_many(list(first.values()), False) == {}
    interrupted(second['b'], 2, lambda: train_many(list(second.values()), False, 0.0), monkeypatch)
    for c in second.values():
        fit(c, False)
    for name in vary:
        assert_same(first[name], whole[name])
        assert_same(second[name], whole[name])


def test_one_that_diverges_disturbs_nobody(tmp_path, few_scenes):
    "Bit for bit: whether the third of a stack diverges in its first epoch or is finished after it."
    data = dict(data_dir=str(few_scenes))
    vary = dict(a=data, b=dict(seed=1, normalizer='token') | data)
    bad = plan(tmp_path / 'bad', vary | dict(c=dict(lr=1e30, warmup_epochs=0) | data))
    good = plan(tmp_path / 'good', vary | dict(c=dict(num_epochs=1) | data))
    failed = train_many(list(bad.values()), False)
    assert train_many(list(good.values()), False) == {}
    for name in vary:
        assert (bad[name].run_dir / 'metrics.csv').read_bytes() == (good[name].run_dir / 'metrics.csv').read_bytes()
    folder = str(bad['c'].run_dir)
    assert failed == {folder: why_failed(bad['c'])}
    alone = replace(bad['c'], save_dir=str(tmp_path / 'alone'))
    with pytest.raises(SlotnbError) as e:
        fit(alone, False)
    assert failed[folder] == str(e.value).replace(str(alone.run_dir), folder)
    assert str(e.value).split(': ')[1] in (bad['c'].run_dir / 'train.log').read_text()


def test_what_cannot_be_read_is_named_and_the_others_train(tmp_path):
    good, bad = plan(tmp_path, dict(good=dict(num_epochs=1), bad=dict(data_dir='nowhere'))).values()
    failed = train_many([bad, good], False)
    assert list(failed) == [str(bad.run_dir)] and "'nowhere' does not exist" in failed[str(bad.run_dir)]
    assert len(metrics(good)) == 1


def test_own_parts_are_refused(tmp_path, few_features):
    (own,) = plan(
        tmp_path, dict(own=dict(decoder='slotnb.decoder:AttentionDecoder', loss='test_fast:OtherLoss'))
    ).values()
    failed = train_many([own], False)
    assert 'loss is OtherLoss' in failed[str(own.run_dir)] and '--engine torch' in failed[str(own.run_dir)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_on_a_gpu_as_alone_and_as_on_the_cpu(tmp_path, few_features, monkeypatch, precision):
    "A stack, each alone, alone and interrupted; graphs are recorded in the first epoch."
    vary = {name: v | dict(train_precision=precision) for name, v in VARY.items()}
    stacked, alone, cpu = (plan(tmp_path / name, vary) for name in ('stacked', 'alone', 'cpu'))

    def on_gpu(c):
        return replace(c, device='cuda', engine='fast')

    assert train_many(list(map(on_gpu, stacked.values())), False) == {}
    columns = ['mse', 'val_mse', 'lr']
    for name in vary:
        fit(on_gpu(alone[name]), False)
        fit(cpu[name], False)
        for a, b in ((stacked, alone), (alone, cpu)):
            pd.testing.assert_frame_equal(
                metrics(a[name])[columns], metrics(b[name])[columns], rtol=dict(fp32=1e-3, bf16=0.05)[precision]
            )
    cut = on_gpu(plan(tmp_path / 'cut', dict(cut=vary['longer']))['cut'])
    interrupted(cut, 3, lambda: fit(cut, False, 0.0), monkeypatch)
    fit(cut, False)
    rtol = 1e-4 if precision == 'fp32' else 0.05
    pd.testing.assert_frame_equal(metrics(cut), metrics(alone['longer']), rtol=rtol)
