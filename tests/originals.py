"""Reference implementations from the papers' equations: functions over a dict of weights with the original names.

They use nothing from timm, open_clip or slotnb, which are compared with them."""

import math
import torch
import torch.nn.functional as F


def norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'], eps)


def linear(w, name, x):
    return F.linear(x, w[f'{name}.weight'], w.get(f'{name}.bias'))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def attend(q, k, v, heads):
    "softmax(q k' / sqrt(d)) v for each head (Vaswani et al. 2017, eq. 1), heads side by side."
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    a = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    return (a @ v).transpose(1, 2).flatten(2)


def patchify(w, name, x):
    "A patch's pixels times a matrix; (b n d) row by row."
    weight = w[f'{name}.weight']
    p = weight.shape[-1]
    cut = x.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return F.linear(cut, weight.flatten(1), w.get(f'{name}.bias'))


def meta_position(pos, h, w, offset, antialias):
    "`interpolate_pos_encoding` of DINO and DINOv2 (offset 0.1), and of DINOv2 with registers (offset 0, antialias)."
    side = math.isqrt(pos.shape[1] - 1)
    if h == w == side:
        return pos
    square = pos[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if offset:
        size = dict(scale_factor=(float(h + offset) / side, float(w + offset) / side))
    else:
        size = dict(size=(h, w))
    square = F.interpolate(square, mode='bicubic', antialias=antialias, **size)
    assert square.shape[-2:] == (h, w)
    return torch.cat((pos[:, :1], square.permute(0, 2, 3, 1).reshape(1, h * w, -1)), 1)


def resized_position(pos, h, w, antialias):
    "With antialias the rule of open_clip and timm (`resample_abs_pos_embed`), without it Hugging Face's."
    return meta_position(pos, h, w, 0.0, antialias)


def dino(w, x, heads, layer, normed, facet='token', offset=0.1, antialias=False):
    """DINO and DINOv2 (LayerScale, registers) with Meta's names: patch tokens after block `layer`.

    Caron et al. 2021; Oquab et al. 2023; Darcet et al. 2023: registers come in after the position embedding."""
    p = w['patch_embed.proj.weight'].shape[-1]
    grid = x.shape[2] // p, x.shape[3] // p
    t = patchify(w, 'patch_embed.proj', x)
    t = torch.cat((w['cls_token'].expand(len(x), -1, -1), t), 1) + meta_position(
        w['pos_embed'], *grid, offset, antialias
    )
    extra = 1
    if 'register_tokens' in w:
        t, extra = (
            torch.cat((t[:, :1], w['register_tokens'].expand(len(x), -1, -1), t[:, 1:]), 1),
            1 + w['register_tokens'].shape[1],
        )
    for i in range(layer + 1):
        b = f'blocks.{i}'
        scale1, scale2 = w.get(f'{b}.ls1.gamma', 1.0), w.get(f'{b}.ls2.gamma', 1.0)
        q, k, v = linear(w, f'{b}.attn.qkv', norm(w, f'{b}.norm1', t, 1e-6)).chunk(3, -1)
        if i == layer and facet != 'token':
            return dict(query=q, key=k, value=v)[facet][:, extra:]
        t = t + scale1 * linear(w, f'{b}.attn.proj', attend(q, k, v, heads))
        n = norm(w, f'{b}.norm2', t, 1e-6)
        if f'{b}.mlp.w12.weight' in w:  # SwiGLU (Shazeer 2020), DINOv2 ViT-g
            gate, up = linear(w, f'{b}.mlp.w12', n).chunk(2, -1)
            t = t + scale2 * linear(w, f'{b}.mlp.w3', F.silu(gate) * up)
        else:
            t = t + scale2 * linear(w, f'{b}.mlp.fc2', F.gelu(linear(w, f'{b}.mlp.fc1', n)))
    return (norm(w, 'norm', t, 1e-6) if normed else t)[:, extra:]


def hf_vit(w, x, heads, layer, normed, facet='token', offset=0.1, antialias=False, eps=1e-6):
    "ViT, Dinov2 and Dinov2WithRegisters of Hugging Face; the position embedding as in the authors' code."
    p = w['embeddings.patch_embeddings.projection.weight'].shape[-1]
    grid = x.shape[2] // p, x.shape[3] // p
    t = torch.cat(
        (w['embeddings.cls_token'].expand(len(x), -1, -1), patchify(w, 'embeddings.patch_embeddings.projection', x)), 1
    )
    t = t + meta_position(w['embeddings.position_embeddings'], *grid, offset, antialias)
    registers = w.get('embeddings.register_tokens', x.new_zeros(1, 0, t.shape[-1]))
    t, extra = torch.cat((t[:, :1], registers.expand(len(x), -1, -1), t[:, 1:]), 1), 1 + registers.shape[1]
    for i in range(layer + 1):
        b = f'encoder.layer.{i}'
        v2 = f'{b}.norm1.weight' in w
        n = norm(w, f'{b}.norm1' if v2 else f'{b}.layernorm_before', t, eps)
        qkv = {k: linear(w, f'{b}.attention.attention.{k}', n) for k in ('query', 'key', 'value')}
        if i == layer and facet != 'token':
            return qkv[facet][:, extra:]
        t = t + w.get(f'{b}.layer_scale1.lambda1', 1.0) * linear(
            w, f'{b}.attention.output.dense', attend(*qkv.values(), heads)
        )
        n = norm(w, f'{b}.norm2' if v2 else f'{b}.layernorm_after', t, eps)
        up, down = (f'{b}.mlp.fc1', f'{b}.mlp.fc2') if v2 else (f'{b}.intermediate.dense', f'{b}.output.dense')
        t = t + w.get(f'{b}.layer_scale2.lambda1', 1.0) * linear(w, down, F.gelu(linear(w, up, n)))
    return (norm(w, 'layernorm', t, eps) if normed else t)[:, extra:]


def clip(w, x, heads, layer, normed, facet='token', act=quick_gelu):
    "CLIP's image encoder with OpenAI's names (Radford et al. 2021); position embedding resized as in open_clip."
    p = w['visual.conv1.weight'].shape[-1]
    grid = x.shape[2] // p, x.shape[3] // p
    t = torch.cat((w['visual.class_embedding'].expand(len(x), 1, -1), patchify(w, 'visual.conv1', x)), 1)
    t = norm(w, 'visual.ln_pre', t + resized_position(w['visual.positional_embedding'][None], *grid, True), 1e-5)
    for i in range(layer + 1):
        b = f'visual.transformer.resblocks.{i}'
        q, k, v = F.linear(
            norm(w, f'{b}.ln_1', t, 1e-5), w[f'{b}.attn.in_proj_weight'], w[f'{b}.attn.in_proj_bias']
        ).chunk(3, -1)
        if i == layer and facet != 'token':
            return dict(query=q, key=k, value=v)[facet][:, 1:]
        t = t + linear(w, f'{b}.attn.out_proj', attend(q, k, v, heads))
        t = t + linear(w, f'{b}.mlp.c_proj', act(linear(w, f'{b}.mlp.c_fc', norm(w, f'{b}.ln_2', t, 1e-5))))
    return (norm(w, 'visual.ln_post', t, 1e-5) if normed else t)[:, 1:]


def hf_clip(w, x, heads, layer, normed, facet='token', act=quick_gelu):
    "CLIP's image encoder with Hugging Face's names, including `pre_layrnorm`."
    p = w['vision_model.embeddings.patch_embedding.weight'].shape[-1]
    grid = x.shape[2] // p, x.shape[3] // p
    t = torch.cat(
        (
            w['vision_model.embeddings.class_embedding'].expand(len(x), 1, -1),
            patchify(w, 'vision_model.embeddings.patch_embedding', x),
        ),
        1,
    )
    t = t + resized_position(w['vision_model.embeddings.position_embedding.weight'][None], *grid, True)
    t = norm(w, 'vision_model.pre_layrnorm', t, 1e-5)
    for i in range(layer + 1):
        b = f'vision_model.encoder.layers.{i}'
        n = norm(w, f'{b}.layer_norm1', t, 1e-5)
        q, k, v = (linear(w, f'{b}.self_attn.{a}_proj', n) for a in 'qkv')
        if i == layer and facet != 'token':
            return dict(query=q, key=k, value=v)[facet][:, 1:]
        t = t + linear(w, f'{b}.self_attn.out_proj', attend(q, k, v, heads))
        t = t + linear(w, f'{b}.mlp.fc2', act(linear(w, f'{b}.mlp.fc1', norm(w, f'{b}.layer_norm2', t, 1e-5))))
    return (norm(w, 'vision_model.post_layernorm', t, 1e-5) if normed else t)[:, 1:]


def siglip(w, x, heads, layer, normed, facet='token'):
    "SigLIP's image encoder with timm's names: no class token, no norm before the blocks (Zhai et al. 2023)."
    p = w['patch_embed.proj.weight'].shape[-1]
    h, v, side = x.shape[2] // p, x.shape[3] // p, math.isqrt(w['pos_embed'].shape[1])
    pos = w['pos_embed'].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    pos = F.interpolate(pos, (h, v), mode='bicubic', antialias=True) if (h, v) != (side, side) else pos
    t = patchify(w, 'patch_embed.proj', x) + pos.flatten(2).transpose(1, 2)
    for i in range(layer + 1):
        b = f'blocks.{i}'
        q, k, v = linear(w, f'{b}.attn.qkv', norm(w, f'{b}.norm1', t, 1e-6)).chunk(3, -1)
        if i == layer and facet != 'token':
            return dict(query=q, key=k, value=v)[facet]
        t = t + linear(w, f'{b}.attn.proj', attend(q, k, v, heads))
        t = t + linear(w, f'{b}.mlp.fc2', F.gelu(linear(w, f'{b}.mlp.fc1', norm(w, f'{b}.norm2', t, 1e-6))))
    return norm(w, 'norm', t, 1e-6) if normed else t


def rotary(t, grid, heads, extra, base=100.0):
    "DINOv3's rotary embedding (Siméoni et al. 2025): patch centers in [-1, 1], angles 2 pi x / base^(2i/d)."
    d = t.shape[-1] // heads
    ys, xs = (2 * (torch.arange(n) + 0.5) / n - 1 for n in grid)
    coords = torch.stack(torch.meshgrid(ys, xs, indexing='ij'), -1).flatten(0, 1)
    periods = base ** (2 * torch.arange(d // 4) / (d // 2))
    angles = (2 * math.pi * coords[:, :, None] / periods).flatten(1).tile(2)
    per_head = t.unflatten(-1, (heads, d))[:, extra:]
    a, b = per_head.chunk(2, -1)
    turned = per_head * angles.cos()[:, None] + torch.cat((-b, a), -1) * angles.sin()[:, None]
    return torch.cat((t[:, :extra], turned.flatten(2)), 1)


def dinov3(w, x, heads, layer, normed, facet='token'):
    "DINOv3 with Meta's names: registers are called storage tokens, positions are rotary embeddings only."
    p = w['patch_embed.proj.weight'].shape[-1]
    grid = x.shape[2] // p, x.shape[3] // p
    t = torch.cat(
        (
            w['cls_token'].expand(len(x), -1, -1),
            w['storage_tokens'].expand(len(x), -1, -1),
            patchify(w, 'patch_embed.proj', x),
        ),
        1,
    )
    extra = 1 + w['storage_tokens'].shape[1]
    for i in range(layer + 1):
        b = f'blocks.{i}'
        q, k, v = linear(w, f'{b}.attn.qkv', norm(w, f'{b}.norm1', t, 1e-5)).chunk(3, -1)
        if i == layer and facet != 'token':
            return dict(query=q, key=k, value=v)[facet][:, extra:]
        q, k = (rotary(u, grid, heads, extra) for u in (q, k))
        t = t + w[f'{b}.ls1.gamma'] * linear(w, f'{b}.attn.proj', attend(q, k, v, heads))
        t = t + w[f'{b}.ls2.gamma'] * linear(
            w, f'{b}.mlp.fc2', F.gelu(linear(w, f'{b}.mlp.fc1', norm(w, f'{b}.norm2', t, 1e-5)))
        )
    return (norm(w, 'norm', t, 1e-5) if normed else t)[:, extra:]


# -- random weights that reveal errors: no zero biases or trivial norms, position embeddings as large as the patches


class Draw:
    def __init__(self, seed=0):
        self.g = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, std=1.0, mean=0.0):
        return mean + std * torch.randn(*shape, generator=self.g)

    def linear(self, name, out, into, bias=True):
        return {f'{name}.weight': self(out, into, std=1.3 / math.sqrt(into))} | (
            {f'{name}.bias': self(out, std=0.3)} if bias else {}
        )

    def norm(self, name, d):
        return {f'{name}.weight': self(d, std=0.3, mean=1.0), f'{name}.bias': self(d, std=0.3)}

    def patches(self, name, d, p, bias=True):
        return {f'{name}.weight': self(d, 3, p, p, std=1 / math.sqrt(3 * p * p))} | (
            {f'{name}.bias': self(d, std=0.3)} if bias else {}
        )


def meta_weights(dim=32, depth=3, patch=4, side=7, scale=False, registers=0, swiglu=0, seed=0):
    "DINO's names; with `scale` DINOv2's."
    r = Draw(seed)
    w = (
        dict(cls_token=r(1, 1, dim), pos_embed=r(1, 1 + side * side, dim))
        | r.patches('patch_embed.proj', dim, patch)
        | r.norm('norm', dim)
    )
    if scale:
        w['mask_token'] = r(1, dim)
    if registers:
        w['register_tokens'] = r(1, registers, dim)
    for i in range(depth):
        b = f'blocks.{i}'
        w |= (
            r.norm(f'{b}.norm1', dim)
            | r.norm(f'{b}.norm2', dim)
            | r.linear(f'{b}.attn.qkv', 3 * dim, dim)
            | r.linear(f'{b}.attn.proj', dim, dim)
        )
        if swiglu:
            w |= r.linear(f'{b}.mlp.w12', 2 * swiglu, dim) | r.linear(f'{b}.mlp.w3', dim, swiglu)
        else:
            w |= r.linear(f'{b}.mlp.fc1', 4 * dim, dim) | r.linear(f'{b}.mlp.fc2', dim, 4 * dim)
        if scale:
            w |= {f'{b}.ls{j}.gamma': r(dim, std=0.3, mean=0.7) for j in (1, 2)}
    return w


def hf_weights(dim=32, depth=3, patch=4, side=7, scale=False, registers=0, seed=0):
    "Hugging Face's ViT; with `scale` its Dinov2, and its Dinov2WithRegisters."
    r, e = Draw(seed), 'embeddings'
    w = {f'{e}.cls_token': r(1, 1, dim), f'{e}.position_embeddings': r(1, 1 + side * side, dim)} | r.norm(
        'layernorm', dim
    )
    w |= r.patches(f'{e}.patch_embeddings.projection', dim, patch)
    w |= {f'{e}.mask_token': r(1, dim)} if scale else r.linear('pooler.dense', dim, dim)
    if registers:
        w[f'{e}.register_tokens'] = r(1, registers, dim)
    for i in range(depth):
        b = f'encoder.layer.{i}'
        for k in ('query', 'key', 'value'):
            w |= r.linear(f'{b}.attention.attention.{k}', dim, dim)
        w |= r.linear(f'{b}.attention.output.dense', dim, dim)
        names = (
            ('norm1', 'norm2', 'mlp.fc1', 'mlp.fc2')
            if scale
            else ('layernorm_before', 'layernorm_after', 'intermediate.dense', 'output.dense')
        )
        w |= (
            r.norm(f'{b}.{names[0]}', dim)
            | r.norm(f'{b}.{names[1]}', dim)
            | r.linear(f'{b}.{names[2]}', 4 * dim, dim)
            | r.linear(f'{b}.{names[3]}', dim, 4 * dim)
        )
        if scale:
            w |= {f'{b}.layer_scale{j}.lambda1': r(dim, std=0.3, mean=0.7) for j in (1, 2)}
    return w


def clip_weights(dim=32, depth=3, patch=4, side=7, seed=0):
    "OpenAI's state dict: the image encoder and a few tensors of the text encoder."
    r, v = Draw(seed), 'visual'
    w = {f'{v}.class_embedding': r(dim), f'{v}.positional_embedding': r(1 + side * side, dim), f'{v}.proj': r(dim, 16)}
    w |= r.patches(f'{v}.conv1', dim, patch, bias=False) | r.norm(f'{v}.ln_pre', dim) | r.norm(f'{v}.ln_post', dim)
    for i in range(depth):
        b = f'{v}.transformer.resblocks.{i}'
        w |= {
            f'{b}.attn.in_proj_weight': r(3 * dim, dim, std=1.3 / math.sqrt(dim)),
            f'{b}.attn.in_proj_bias': r(3 * dim, std=0.3),
        }
        w |= r.linear(f'{b}.attn.out_proj', dim, dim) | r.norm(f'{b}.ln_1', dim) | r.norm(f'{b}.ln_2', dim)
        w |= r.linear(f'{b}.mlp.c_fc', 4 * dim, dim) | r.linear(f'{b}.mlp.c_proj', dim, 4 * dim)
    text = dict(
        positional_embedding=r(77, 16),
        text_projection=r(16, 16),
        logit_scale=r(1)[0],
        input_resolution=torch.tensor(28),
        vocab_size=torch.tensor(9),
    )
    return (
        w
        | text
        | r.norm('ln_final', 16)
        | {'transformer.resblocks.0.attn.in_proj_weight': r(48, 16), 'token_embedding.weight': r(9, 16)}
    )


def hf_clip_weights(dim=32, depth=3, patch=4, side=7, seed=0):
    "Hugging Face's CLIPModel: the image encoder, its projection and a few tensors of the text encoder."
    r, v = Draw(seed), 'vision_model'
    w = {
        f'{v}.embeddings.class_embedding': r(dim),
        f'{v}.embeddings.position_embedding.weight': r(1 + side * side, dim),
        f'{v}.embeddings.position_ids': torch.arange(1 + side * side)[None],
    }
    w |= (
        r.patches(f'{v}.embeddings.patch_embedding', dim, patch, bias=False)
        | r.norm(f'{v}.pre_layrnorm', dim)
        | r.norm(f'{v}.post_layernorm', dim)
    )
    for i in range(depth):
        b = f'{v}.encoder.layers.{i}'
        for k in ('q', 'k', 'v', 'out'):
            w |= r.linear(f'{b}.self_attn.{k}_proj', dim, dim)
        w |= (
            r.norm(f'{b}.layer_norm1', dim)
            | r.norm(f'{b}.layer_norm2', dim)
            | r.linear(f'{b}.mlp.fc1', 4 * dim, dim)
            | r.linear(f'{b}.mlp.fc2', dim, 4 * dim)
        )
    return (
        w
        | r.linear('visual_projection', 16, dim, bias=False)
        | {'text_model.embeddings.token_embedding.weight': r(9, 16), 'logit_scale': r(1)[0]}
    )


def siglip_weights(dim=32, depth=3, patch=4, side=7, seed=0):
    "SigLIP with timm's names, including its attention pooling, which does not affect patch tokens."
    w = {k: v for k, v in meta_weights(dim, depth, patch, side, seed=seed).items() if k != 'cls_token'}
    r = Draw(seed + 1)
    w['pos_embed'] = w['pos_embed'][:, 1:]
    pool = (
        r.linear('attn_pool.q', dim, dim)
        | r.linear('attn_pool.kv', 2 * dim, dim)
        | r.linear('attn_pool.proj', dim, dim)
        | r.norm('attn_pool.norm', dim)
    )
    return (
        w
        | pool
        | r.linear('attn_pool.mlp.fc1', 4 * dim, dim)
        | r.linear('attn_pool.mlp.fc2', dim, 4 * dim)
        | {'attn_pool.latent': r(1, 1, dim)}
    )


def dinov3_weights(dim=32, depth=3, patch=4, seed=0):
    "DINOv3 with Meta's names; its keys have no bias."
    w = {k: v for k, v in meta_weights(dim, depth, patch, scale=True, seed=seed).items() if k != 'pos_embed'}
    for i in range(depth):
        w[f'blocks.{i}.attn.qkv.bias'][dim : 2 * dim] = 0
    return w | dict(storage_tokens=Draw(seed + 1)(1, 4, dim)) | {'rope_embed.periods': torch.zeros(dim // 8)}


def replaced(w, *rules):
    out = {}
    for k, v in w.items():
        for a, b in rules:
            k = k.replace(a, b)
        out[k] = v
    return out


def in_memory(w):
    "Names in the `state_dict()` of transformers 5, which saves the same tensors with the names above."
    vit = 'encoder.layer.0.layernorm_before.weight' in w
    rules = [(f'attention.attention.{a}', f'attention.{a[0]}_proj') for a in ('query', 'key', 'value')] + [
        ('attention.output.dense', 'attention.o_proj')
    ]
    return replaced(
        w,
        *rules,
        *(
            [('encoder.layer.', 'layers.'), ('intermediate.dense', 'mlp.fc1'), ('output.dense', 'mlp.fc2')]
            if vit
            else []
        ),
    )


def hf_dinov3(w):
    "DINOv3 renamed from Meta's to Hugging Face's names."
    out = {}
    for k, v in w.items():
        if k.startswith('rope'):
            continue
        if '.attn.qkv.' in k:
            for a, part in zip('qkv', v.chunk(3)):
                if not (a == 'k' and k.endswith('bias')):
                    out[k.replace('attn.qkv', f'attention.{a}_proj')] = part
        else:
            out[k] = v[None] if k == 'mask_token' else v
    return replaced(
        out,
        ('blocks.', 'layer.'),
        ('attn.proj', 'attention.o_proj'),
        ('ls1.gamma', 'layer_scale1.lambda1'),
        ('ls2.gamma', 'layer_scale2.lambda1'),
        ('mlp.fc1', 'mlp.up_proj'),
        ('mlp.fc2', 'mlp.down_proj'),
        ('cls_token', 'embeddings.cls_token'),
        ('mask_token', 'embeddings.mask_token'),
        ('storage_tokens', 'embeddings.register_tokens'),
        ('patch_embed.proj', 'embeddings.patch_embeddings'),
    )
