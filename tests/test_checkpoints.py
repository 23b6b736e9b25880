"Checkpoints as their authors publish them: the right tensors, or one sentence."

import argparse
import json
import re
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from slotnb.backbones import ViTBackbone
from slotnb.core import SlotnbError

TINY = 'timm:vit_tiny_patch16_224'
NET = timm.create_model('vit_tiny_patch16_224', num_classes=0)
BASE = {k: torch.full_like(v, 0.5) + i for i, (k, v) in enumerate(NET.state_dict().items())}
OTHER = {k: v * 0 for k, v in BASE.items()}
HEAD = torch.zeros(8, 8)


def under(prefix, state):
    return {f'{prefix}{k}': v for k, v in state.items()}


MOCO = under('module.momentum_encoder.', OTHER) | under('module.base_encoder.', BASE)
MAE = {f'decoder_{k}': torch.zeros(4) for k in ('embed.weight', 'pos_embed', 'blocks.0.norm1.weight')}
FILES = {
    'timm with an average': dict(state_dict=OTHER, state_dict_ema=BASE, epoch=3, args=argparse.Namespace()),
    'MoCo v3': dict(state_dict=MOCO | {'module.base_encoder.head.0.weight': HEAD, 'module.predictor.0.weight': HEAD}),
    'MSN': dict(
        encoder=under('module.', OTHER),
        target_encoder=under('module.', BASE) | {'module.fc.fc1.weight': HEAD},
        prototypes=HEAD,
        opt={},
    ),
    'MAE with its decoder': dict(model=BASE | MAE | dict(mask_token=torch.zeros(1, 1, 8))),
    'a metric as a NumPy scalar': dict(model=BASE, best_acc=np.float64(0.8), epoch=np.int64(3)),
}


def loaded(path, name=TINY):
    return ViTBackbone(name, str(path), device='cpu').net.state_dict()


def same(found, want):
    return found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)


@pytest.mark.parametrize('kind', FILES)
def test_checkpoints_of_training(tmp_path, kind):
    torch.save(FILES[kind], tmp_path / 'a.pth.tar')
    assert same(loaded(tmp_path / 'a.pth.tar'), BASE)


def test_safetensors_under_another_suffix(tmp_path):
    save_file(BASE, tmp_path / 'a.bin')
    assert same(loaded(tmp_path / 'a.bin'), BASE)


def test_sharded_safetensors(tmp_path):
    keys = sorted(BASE)
    parts = {f'model-0000{i}-of-00002.safetensors': keys[i - 1 :: 2] for i in (1, 2)}
    for name, some in parts.items():
        save_file({k: BASE[k] for k in some}, tmp_path / name)
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps(dict(weight_map={k: n for n, some in parts.items() for k in some})))
    for path in (tmp_path, index):
        assert same(loaded(path), BASE)
    before = ViTBackbone(TINY, str(tmp_path)).weights.digest
    save_file(
        {k: OTHER[k] for k in parts['model-00002-of-00002.safetensors']}, tmp_path / 'model-00002-of-00002.safetensors'
    )
    assert ViTBackbone(TINY, str(tmp_path)).weights.digest != before
    (tmp_path / 'model-00002-of-00002.safetensors').unlink()
    with pytest.raises(SlotnbError, match='model-00002-of-00002.safetensors is missing; download it too'):
        loaded(tmp_path)
    index.write_text(json.dumps(dict(weight_map=dict(a='../../x.safetensors'))))
    with pytest.raises(SlotnbError, match="no 'weight_map' of files beside them"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    'name, content, words',
    [
        ('a.safetensors', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'a pointer of Git LFS'),
        ('a.pth', b'<!DOCTYPE html><html></html>', 'are a web page'),
        ('a.npz', b'PK\3\4', 'cannot be read'),
    ],
)
def test_what_is_no_weights_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlotnbError, match=words) as e:
        loaded(tmp_path / name)
    assert '\n' not in str(e.value) and name in str(e.value)


def test_siglip_of_hugging_face(tmp_path):
    "The vision half of a SiglipModel, and of a SiglipVisionModel."
    name = 'vit_base_patch16_siglip_224'
    net = timm.create_model(name, num_classes=0)
    want = {k: torch.full_like(v, i % 97 + 0.5) for i, (k, v) in enumerate(net.state_dict().items())}
    rules = [
        ('patch_embed.proj', 'embeddings.patch_embedding'),
        ('blocks.', 'encoder.layers.'),
        ('.norm1', '.layer_norm1'),
        ('.norm2', '.layer_norm2'),
        ('attn.proj', 'self_attn.out_proj'),
    ]
    made = {}
    for k, v in want.items():
        pool = re.fullmatch(r'attn_pool\.(latent|proj|norm|mlp)(.*)', k)
        if pool:
            new = dict(latent='head.probe', proj='head.attention.out_proj', norm='head.layernorm', mlp='head.mlp')
            made[new[pool[1]] + pool[2]] = v
        elif k.startswith('attn_pool.q.'):
            both = torch.cat([v, want[k.replace('.q.', '.kv.')]])
            made[f'head.attention.in_proj_{k.rpartition(".")[2]}'] = both
        elif '.qkv.' in k:
            for p, part in zip('qkv', v.chunk(3)):
                new = k.replace('blocks.', 'encoder.layers.').replace('attn.qkv', f'self_attn.{p}_proj')
                made[new] = part.contiguous()
        elif k == 'pos_embed':
            made['embeddings.position_embedding.weight'] = v[0].contiguous()
        elif not k.startswith('attn_pool'):
            for a, b in rules:
                k = k.replace(a, b)
            made['post_layernorm' + k[4:] if k.startswith('norm.') else k] = v
    save_file(
        under('vision_model.', made) | {'text_model.x': HEAD.clone(), 'logit_scale': HEAD[0].clone()},
        tmp_path / 'a.safetensors',
    )
    assert same(loaded(tmp_path / 'a.safetensors', f'timm:{name}'), want)
