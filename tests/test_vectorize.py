"Many runs at once: the same numbers as alone, the same files, and nobody is disturbed by who leaves."

import signal, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path
import pandas as pd, pytest, torch
from conftest import DATA, ROOT
from slotnb import sweep as sweep_module
from slotnb import train
from slotnb.fast import many_models as vectorize_module
from slotnb.core import SlotnbError, write_json
from slotnb.sweep import SweepConfig, sweep
from slotnb.features import LazyFeatures
from slotnb.runs.inputs import RunData
from slotnb.runs.folder import RunState
from slotnb.runs.config import TrainConfig
from slotnb.train import fit
from slotnb.evaluate import load_run
from slotnb.fast.many_models import _start, fit_many, vectorize
from slotnb.runs.folder import epochs_done, why_failed

BASE = TrainConfig(data_dir=str(DATA), num_epochs=3, warmup_epochs=1, slot_dim=32, hidden_dim=32, device='cpu')
CANCELLED = 'slot_attention.norm_slots.bias'  # the softmax over slots cancels it: its gradient is rounding, and Adam makes steps of that


@pytest.fixture
def few_features(monkeypatch):
    "Small random features, so that it is quick."

    def prepared(config, show_progress):
        feats = torch.randn(15, 16, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 24)
        scale = config.feature_std / feats.std().item() if config.feature_std else 1.0
        part = lambda a, b: LazyFeatures(feats[a:b] * scale)
        return RunData(part(0, 12), part(12, 15), None, part(0, 15), dict(dim=24, grid=[4, 4]), scale, {})

    for module in (train, vectorize_module):
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
    assert one.epoch == two.epoch and all(
        one.model.get_parameter(k).allclose(p, rel, 1e-8) for k, p in two.model.named_parameters() if k != CANCELLED
    )
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
    learnt=dict(target='learnt_instance'),
    learnt_too=dict(target='learnt_instance', weight_init='torch', slot_std=0.5, seed=1),
    wide_pos=dict(decoder='mlp', pos_std=1.0),
)


def test_equals_each_alone(tmp_path, double):
    "Two at most in a stack, so that runs also wait, and enter a stack whose other run has begun."
    together, alone = plan(tmp_path / 'together', VARY), plan(tmp_path / 'alone', VARY)
    assert fit_many(list(together.values()), False, most=2) == {}
    for name in VARY:
        fit(alone[name], False)
        assert_same(together[name], alone[name])


def interrupted(config, epochs, train, monkeypatch):
    "Train, and end after so many epochs of this run, its state saved."
    end = RunState.end_epoch

    def stop(self, *found):
        said = end(self, *found)
        if self.folder == config.run_dir and self.epoch == epochs:
            raise KeyboardInterrupt
        return said

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(RunState, 'end_epoch', stop)
        train()


def test_begun_alone_and_continued_together_and_the_other_way_round(tmp_path, double, monkeypatch):
    vary = dict(a=dict(num_epochs=5), b=dict(num_epochs=5, seed=1), c=dict(num_epochs=3, seed=2))
    whole, first, second = (plan(tmp_path / name, vary) for name in ('whole', 'alone_first', 'together_first'))
    for c in whole.values():
        fit(c, False)
    interrupted(first['b'], 3, lambda: fit(first['b'], False, 0.0), monkeypatch)
    assert fit_many(list(first.values()), False) == {}
    interrupted(second['b'], 2, lambda: fit_many(list(second.values()), False, 0.0), monkeypatch)
    for c in second.values():
        fit(c, False)
    for name in vary:
        assert_same(first[name], whole[name])
        assert_same(second[name], whole[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_on_a_gpu_as_alone_and_as_on_the_cpu(tmp_path, few_features, monkeypatch, precision):
    "A stack, each alone, alone and interrupted; graphs are recorded in the first epoch."
    vary = {name: v | dict(train_precision=precision) for name, v in VARY.items()}
    stacked, alone, cpu = (plan(tmp_path / name, vary) for name in ('stacked', 'alone', 'cpu'))
    on_gpu = lambda c: replace(c, device='cuda')
    assert fit_many(list(map(on_gpu, stacked.values())), False) == {}
    for name in vary:
        fit(on_gpu(alone[name]), False)
        fit(cpu[name], False)
        for a, b in ((stacked, alone), (alone, cpu)):
            pd.testing.assert_frame_equal(
                metrics(a[name])[['mse', 'val_mse', 'lr']],
                metrics(b[name])[['mse', 'val_mse', 'lr']],
                rtol=dict(fp32=1e-3, bf16=0.05)[precision],
            )
    cut = on_gpu(plan(tmp_path / 'cut', dict(cut=vary['longer']))['cut'])
    interrupted(cut, 3, lambda: fit(cut, False, 0.0), monkeypatch)
    fit(cut, False)
    pd.testing.assert_frame_equal(metrics(cut), metrics(alone['longer']), rtol=1e-4 if precision == 'fp32' else 0.05)


def test_one_that_diverges_disturbs_nobody(tmp_path, few_scenes):
    "Bit for bit: whether the third of a stack diverges in its first epoch or is finished after it."
    vary = dict(a=dict(data_dir=str(few_scenes)), b=dict(seed=1, normalizer='token', data_dir=str(few_scenes)))
    bad, good = (
        plan(tmp_path / 'bad', vary | dict(c=dict(lr=1e30, warmup_epochs=0, data_dir=str(few_scenes)))),
        plan(tmp_path / 'good', vary | dict(c=dict(num_epochs=1, data_dir=str(few_scenes)))),
    )
    failed = fit_many(list(bad.values()), False)
    assert fit_many(list(good.values()), False) == {}
    for name in vary:
        assert (bad[name].run_dir / 'metrics.csv').read_bytes() == (good[name].run_dir / 'metrics.csv').read_bytes()
    assert list(failed) == [str(bad['c'].run_dir)] and failed == why_failed(list(bad.values()))
    alone = replace(bad['c'], save_dir=str(tmp_path / 'alone'))
    with pytest.raises(SlotnbError) as e:
        fit(alone, False)
    assert failed[str(bad['c'].run_dir)] == str(e.value).replace(str(alone.run_dir), str(bad['c'].run_dir))
    assert str(e.value).split(': ')[1] in (bad['c'].run_dir / 'train.log').read_text()


def test_what_cannot_be_read_is_named_and_the_others_go_on(tmp_path):
    good, bad = plan(tmp_path, dict(good=dict(num_epochs=1), bad=dict(data_dir='nowhere'))).values()
    failed = fit_many([bad, good], False)
    assert list(failed) == [str(bad.run_dir)] and "'nowhere' does not exist" in failed[str(bad.run_dir)]
    assert len(metrics(good)) == 1


CODE = 'import sys; from slotnb.train import TrainConfig; from slotnb.vectorize import vectorize; vectorize([TrainConfig(**c) for c in eval(sys.argv[1])], 2, False, .05)'


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_killed_at_any_moment(tmp_path, few_scenes, monkeypatch):
    "SIGKILL, then Ctrl-C: no process stays behind, and the runs go on from what was saved."
    vary = {str(seed): dict(num_epochs=40, seed=seed, data_dir=str(few_scenes)) for seed in range(4)}
    whole, killed = (list(plan(tmp_path / name, vary).values()) for name in ('whole', 'killed'))
    assert fit_many(whole, False) == {}
    done, gone = lambda: min(map(epochs_done, killed)), lambda pids: not any(map(alive, pids))
    process = subprocess.Popen(
        [sys.executable, '-c', CODE, repr([asdict(c) for c in killed])], stderr=subprocess.DEVNULL
    )
    while done() < 4 and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, 'the runs were over before they could be killed'
    workers = [int(p) for p in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while not gone(workers) and time.monotonic() < end:
        time.sleep(0.02)
    assert len(workers) == 2 and gone(workers) and done() < 40

    workers, before = [], done()

    def start(*args):
        workers.append(_start(*args))
        return workers[-1]

    def counted(config):  # what the bar asks for is where Ctrl-C comes
        if done() > before + 4:
            raise KeyboardInterrupt
        return epochs_done(config)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(vectorize_module, '_start', start)
        m.setattr(vectorize_module, 'epochs_done', counted)
        vectorize(killed, 2, False, 0.05)
    assert len(workers) == 2 and all(p.returncode == -signal.SIGTERM for p in workers) and done() < 40
    assert fit_many(killed, False) == {}
    for a, b in zip(whole, killed):
        pd.testing.assert_frame_equal(
            metrics(a)[['epoch', 'loss', 'val_mse', 'lr']], metrics(b)[['epoch', 'loss', 'val_mse', 'lr']], rtol=1e-2
        )


def test_a_process_that_dies_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONWARNINGS', 'ignore')
    a, b = plan(tmp_path, dict(a=dict(), b=dict(seed=1))).values()
    monkeypatch.setattr(
        'slotnb.vectorize._start',
        lambda *args: subprocess.Popen([sys.executable, '-c', 'raise SystemExit(3)'], stdin=subprocess.PIPE),
    )
    failed = vectorize([a, b], 2, False)
    assert list(failed) == [str(a.run_dir), str(b.run_dir)] and 'exit code 3' in failed[str(a.run_dir)]


def test_sweep_vectorized(tmp_path, few_scenes, monkeypatch):
    "The notebooks find the runs trained; what failed together is reported and not tried alone."
    out = tmp_path / 'runs'
    out.mkdir()
    (out / 'floors.csv').write_text('method,seed\n')
    config = SweepConfig(
        str(out),
        ('dinov2_vits14',),
        ('none', 'instance'),
        (0,),
        (),
        2,
        (f'data_dir={few_scenes}', 'slot_dim=32', 'hidden_dim=32', 'warmup_epochs=1'),
        str(ROOT / 'reports/backbone_run.ipynb'),
        vectorize=True,
    )

    def with_a_failure(plan, workers, show_progress):
        assert vectorize(plan, workers, show_progress) == {}
        write_json(plan[1].run_dir / 'failed.json', dict(why='bad luck'))
        return why_failed(plan)

    monkeypatch.setattr(sweep_module, 'vectorize', with_a_failure)
    good, bad = (out / f'{n}-seed0/dinov2_vits14' for n in ('none', 'instance'))
    assert sweep(config, False) == {str(bad): 'bad luck'}
    assert {'run.ipynb', 'result.json', 'features.json'} <= {p.name for p in good.iterdir()} and not (
        bad / 'run.ipynb'
    ).exists()
    assert 'resumed after epoch 2' in (good / 'train.log').read_text() and len(pd.read_csv(good / 'metrics.csv')) == 2
