"What a notebook shows is what trains: subclass slot attention or a decoder, replace the loss, and training follows."

import json
import textwrap
from dataclasses import replace
from functools import partial
import pandas as pd
import pytest
import torch
from conftest import DATA, ROOT
from slotnb import losses
from slotnb.core import SlotnbError, generator
from slotnb.decoder import AttentionDecoder
from slotnb.evaluate import evaluate, load_run
from slotnb.losses import SlotLoss, slot_cosine
from slotnb.model import build
from slotnb.parts import part_text
from slotnb.runs.config import PRESETS, TrainConfig, preset
from slotnb.runs.inputs import fit_normalizer, prepare
from slotnb.slot_attention import SlotAttention, SlotOutput
from slotnb.train import fit, make_optimizer, make_step, train_epoch, train_step

SMALL = PRESETS['version_0_1'] | dict(
    data_dir=str(DATA), num_epochs=1, warmup_epochs=0, slot_dim=16, hidden_dim=16, num_slots=4, device='cpu'
)
PARTS = '''
import torch
from torch import nn
from slotnb.backbones import IMAGENET
from slotnb.decoder import AttentionDecoder, DecoderOutput
from slotnb.losses import feature_mse
from slotnb.slot_attention import SlotAttention, SlotInit


class TwiceAttention(SlotAttention):
    def forward(self, inputs, slots):
        return super().forward(2 * inputs, super().forward(inputs, slots).slots)


class GeluDecoder(AttentionDecoder):
    def __init__(self, slot_dim, feat_dim, hidden_dim, mask_temperature, depth=1):
        super().__init__(slot_dim, feat_dim, hidden_dim, mask_temperature)
        self.mlp[1] = nn.GELU()
        self.depth = depth


class Fixed(nn.Module):
    def __init__(self, num_slots, slot_dim, scale=1.0):
        super().__init__()
        self.start = nn.Parameter(scale * torch.randn(num_slots, slot_dim))

    def draw(self, batch, generator=None):
        return torch.zeros(batch, *self.start.shape)

    def forward(self, noise, inputs, feats):
        return self.start.expand_as(noise)


class Halved(nn.Module):
    def forward(self, feats):
        return feats / 2


class EntropyLoss:
    def __init__(self, weight=0.1):
        self.weight = weight

    def __call__(self, out):
        mse, entropy = feature_mse(out.recon, out.target), torch.special.entr(out.masks).sum(1).mean()
        return dict(loss=mse + self.weight * entropy, mse=mse, entropy=entropy)
'''


def first_losses(config, data, changed=None, steps=3):
    "Losses of the first steps as `fit` takes them, and the model."
    feats = fit_normalizer(config, data)(data.train[:])
    model = build(config, *feats.shape[:0:-1])
    if changed:
        changed(model)
    opt = make_optimizer(config, model.parameters())
    step, _ = make_step(config, model, opt)
    found = []
    train_epoch(
        lambda x, noise: found.append(step(x, noise)) or found[-1], model, opt, feats[: steps * 2], config, epoch=0
    )
    return [f['loss'].item() for f in found]


@pytest.fixture(scope='module')
def data():
    return prepare(TrainConfig(**SMALL), show_progress=False)


class HardAttention(SlotAttention):
    "Another equation: one iteration without the GRU."

    def forward(self, inputs, slots):
        x = self.norm_inputs(inputs)
        logits = self.to_q(slots) @ self.to_k(x).transpose(1, 2)
        attn = logits.softmax(1)
        slots = slots + (attn / attn.sum(-1, keepdim=True)) @ self.to_v(x)
        return SlotOutput(slots, attn, logits)


class GeluDecoder(AttentionDecoder):
    "Another equation: GELU for ReLU."

    def forward(self, slots, logits):
        hidden = torch.nn.functional.gelu(self.mlp[0](slots))
        masks = (logits / self.mask_temperature).softmax(1)
        recon = masks.transpose(1, 2) @ (self.mlp[2](hidden) + self.skip(slots))
        return AttentionDecoder.forward(self, slots, logits)._replace(recon=recon)


@pytest.mark.parametrize(
    'part, cls', [('slot_attention', HardAttention), ('decoder', GeluDecoder)], ids=['slot_attention', 'decoder']
)
def test_training_follows_a_subclass(data, part, cls):
    "The losses of the first steps are those of a loop written here around the other equation."
    config = TrainConfig(**SMALL)

    def change(model):
        getattr(model, part).__class__ = cls

    got, unchanged = first_losses(config, data, change), first_losses(config, data)
    feats = fit_normalizer(config, data)(data.train[:])[:6]
    model = build(config, *feats.shape[:0:-1])
    change(model)
    opt, want = torch.optim.Adam(model.parameters(), config.lr), []
    order = torch.randperm(6, generator=generator(0, 'order', 0)).split(2)
    noise = generator(0, 'slots', 0)
    for i, batch in enumerate(order):
        opt.param_groups[0]['lr'] = 0.0004 * 0.5 * (1 + torch.tensor(torch.pi * i / 3).cos().item())
        target = feats[batch]
        inputs = model.project(target)
        slots, _, logits = model.slot_attention(inputs, model.init(model.init.draw(2, noise), inputs))
        loss = (model.decoder(slots, logits).recon - target).square().mean() + 0.1 * slot_cosine(slots)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        want.append(loss.item())
    assert got == pytest.approx(want, rel=1e-5)
    assert abs(got[0] - unchanged[0]) > 1e-4 * abs(unchanged[0])


def test_training_follows_the_loss(data, monkeypatch):
    "An edit of `losses.feature_mse` changes what trains."
    before = first_losses(TrainConfig(**SMALL), data)
    monkeypatch.setattr(losses, 'feature_mse', lambda recon, target: (recon - target).abs().mean())
    after = first_losses(TrainConfig(**SMALL), data)
    assert all(abs(a - b) > 1e-3 for a, b in zip(before, after))


def test_a_loss_may_be_one_scalar():
    model = build(TrainConfig(**SMALL), 12, 9)
    opt = torch.optim.Adam(model.parameters())
    terms = train_step(model, lambda out: out.slots.square().mean(), opt, torch.randn(2, 9, 12), torch.randn(2, 4, 16))
    assert set(terms) == {'loss', 'grad_norm'}


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    (tmp_path / 'own_parts.py').write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


OWN = dict(
    slot_attention='own_parts:TwiceAttention',
    decoder='own_parts:GeluDecoder(depth=2)',
    slot_init='own_parts:Fixed(scale=0.5)',
    normalizer='own_parts:Halved',
    loss='own_parts:EntropyLoss(weight=0.2)',
    optimizer='torch.optim:SGD(momentum=0.9)',
)


def test_a_run_of_own_parts_is_a_run_like_any_other(own_parts, few_scenes, monkeypatch):
    "Trained, interrupted and resumed, evaluated, read; its parts and their arguments are in config.json."
    config = TrainConfig(**SMALL | dict(num_epochs=4, data_dir=str(few_scenes)) | OWN, save_dir='whole')
    whole = fit(config, show_progress=False)
    assert {k: json.loads((whole / 'config.json').read_text())['config'][k] for k in OWN} == OWN
    rows = pd.read_csv(whole / 'metrics.csv')
    assert {'entropy', 'mse', 'loss', 'grad_norm'} <= set(rows) and len(rows) == 4
    assert rows.loss.to_list() == pytest.approx((rows.mse + 0.2 * rows.entropy).to_list(), rel=1e-5)
    result = evaluate(whole, show_progress=False)
    assert result['engine'] == 'torch, fp32' and result['test_fvu_instance'] != result['test_fvu_instance']  # NaN

    from slotnb.runs.folder import RunState

    cut, end = replace(config, save_dir='cut'), RunState.end_epoch

    def stop(self, *found):
        end(self, *found)
        self.save()
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(RunState, 'end_epoch', stop)
        fit(cut, show_progress=False)
    fit(cut, show_progress=False)
    assert (cut.run_dir / 'metrics.csv').read_bytes() == (whole / 'metrics.csv').read_bytes()
    run = load_run(whole)
    assert type(run.model.decoder).__name__ == 'GeluDecoder' and run.model.decoder.depth == 2


def test_somebody_elses_run_needs_consent(own_parts, few_scenes, monkeypatch):
    config = TrainConfig(**SMALL | dict(data_dir=str(few_scenes)) | OWN, save_dir='run')
    folder = fit(config, show_progress=False)
    path = folder / 'config.json'
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | dict(signature='0' * 64)))
    with pytest.raises(SlotnbError, match="module 'own_parts'.*--allow_custom_code"):
        load_run(folder)
    assert load_run(folder, trust=True).epoch == 0
    path.write_text(json.dumps(about))
    assert load_run(folder).epoch == 0


def test_parts_from_python(own_parts):
    import own_parts as own

    config = preset(
        'version_0_1',
        decoder=partial(own.GeluDecoder, depth=3),
        loss=own.EntropyLoss(weight=0.5),
        optimizer=torch.optim.SGD,
    )
    assert config.decoder == 'own_parts:GeluDecoder(depth=3)' and config.loss == 'own_parts:EntropyLoss(weight=0.5)'
    assert config.optimizer == 'torch.optim.sgd:SGD'
    assert part_text(SlotLoss(0.3)) == 'slotnb.losses:SlotLoss(diversity_weight=0.3)'
    with pytest.raises(SlotnbError, match='cannot be recorded'):
        part_text(AttentionDecoder(4, 4))


@pytest.mark.parametrize(
    'setting, spec, why',
    [
        ('decoder', 'own_parts:Missing', "no class 'Missing'"),
        ('decoder', 'missing_module:Decoder', "no module 'missing_module'"),
        ('decoder', 'own_parts:GeluDecoder(dept=2)', "has no argument 'dept'"),
        ('loss', 'own_parts:EntropyLoss(0.2)', 'must read module:Class'),
        ('optimizer', 'own_parts:__import__("os")', 'must read module:Class'),
    ],
)
def test_a_wrong_part_is_refused_in_one_sentence(own_parts, few_scenes, setting, spec, why):
    with pytest.raises(SlotnbError, match=why) as e:
        fit(TrainConfig(**SMALL | dict(data_dir=str(few_scenes)) | {setting: spec}), show_progress=False)
    assert '\n' not in str(e.value)
    assert not (own_parts / 'checkpoints').exists()


def test_the_default_step_is_shown_in_the_training_notebook():
    "The cell of `train_step` fits on a screen, and nothing on the default path imports `slotnb.fast`."
    cells = json.loads((ROOT / 'nbs/13_train.ipynb').read_text())['cells']
    (cell,) = [c for c in cells if any('def train_step(' in line for line in c['source'])]
    assert len(cell['source']) <= 40
    assert textwrap.dedent('out = model(feats, noise)') in ''.join(cell['source'])
