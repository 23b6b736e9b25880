"Slot attention and decoders of later papers against their equations, written as loops or with PyTorch's own layers."

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from slotnb.evaluate import evaluate, load_run
from slotnb.model import DECODERS, SLOT_ATTENTIONS, SlotAutoencoder
from slotnb.runs.config import TrainConfig, preset
from slotnb.slot_attention import SlotAttention
from slotnb.train import fit
from slotnb.variants.attention import BilevelSlotAttention, ImplicitSlotAttention
from slotnb.variants.attention import MultiHeadSlotAttention, WeightedSumSlotAttention
from slotnb.variants.decoders import CrossBlock, SlotMixerDecoder, TopKDecoder, TransformerDecoder


def tokens(b=2, n=13, k=4, d=12, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(b, n, d, generator=gen), torch.randn(b, k, d, generator=gen)


def test_heads_share_one_softmax():
    "Singh et al. 2022: for each patch one softmax over all pairs of slot and head."
    x, slots = tokens()
    module = MultiHeadSlotAttention(12, heads=3, temperature=0.7)
    updates, logits = module.attend(slots, x)
    q, k, v = module.to_q(slots), module.to_k(x), module.to_v(x)
    for i in range(2):
        scores = torch.zeros(3, 4, 13)
        for h in range(3):
            own = slice(4 * h, 4 * h + 4)
            scores[h] = q[i][:, own] @ k[i][:, own].T / 4**0.5 / 0.7
        attn = (scores - scores.flatten(0, 1).logsumexp(0)).exp()
        torch.testing.assert_close(logits[i].softmax(0), attn.sum(0), rtol=1e-4, atol=1e-6)
        for h in range(3):
            own = slice(4 * h, 4 * h + 4)
            for s in range(4):
                mean = sum(attn[h, s, n] * v[i, n, own] for n in range(13)) / attn[h, s].sum()
                torch.testing.assert_close(updates[i, s, own], mean, rtol=1e-4, atol=1e-5)


def test_weighted_sum_is_that_of_the_paper():
    "Krimmel et al. 2024: u_k = sum_n gamma_nk v_n / C, here with C = patches / slots."
    x, slots = tokens()
    module = WeightedSumSlotAttention(12, temperature=0.7)
    updates, logits = module.attend(slots, x)
    q, k, v = module.to_q(slots), module.to_k(x), module.to_v(x)
    for i in range(2):
        gamma = torch.stack([(k[i, n] @ q[i].T / 12**0.5 / 0.7).softmax(0) for n in range(13)])
        torch.testing.assert_close(logits[i].softmax(0), gamma.T, rtol=1e-4, atol=1e-6)
        for s in range(4):
            want = sum(gamma[n, s] * v[i, n] for n in range(13)) / (13 / 4)
            torch.testing.assert_close(updates[i, s], want, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_last_step():
    "The gradient of the weights is that of one step at detached slots; bi-level passes it on to the queries unchanged."
    x, slots = tokens()
    plain = SlotAttention(12, num_iters=3)
    names = [n for n, _ in plain.named_parameters()]
    with torch.no_grad():
        before = SlotAttention(12, num_iters=2)
        before.load_state_dict(plain.state_dict())
        reached = before(x, slots).slots
    free = reached.clone().requires_grad_()
    one = plain.step(free, plain.norm_inputs(x))[0].square().sum()
    want = torch.autograd.grad(one, [free, *plain.parameters()])
    for cls in (ImplicitSlotAttention, BilevelSlotAttention):
        module, queries = cls(12, num_iters=3), slots.clone().requires_grad_()
        module.load_state_dict(plain.state_dict())
        loss = module(x, queries).slots.square().sum()
        got = torch.autograd.grad(loss, [queries, *module.parameters()], allow_unused=True)
        for name, a, b in zip(names, got[1:], want[1:]):
            torch.testing.assert_close(a, b, msg=name)
        if cls is BilevelSlotAttention:
            torch.testing.assert_close(got[0], want[0])
        else:
            assert got[0] is None


def test_top_k_decodes_each_patch_alone():
    _, slots = tokens()
    logits = torch.randn(2, 4, 13)
    decoder = TopKDecoder(12, 7, 13, 16, mask_temperature=0.5, top_k=2)
    recon, masks = decoder(slots, logits)
    for i in range(2):
        for n in range(13):
            best = logits[i, :, n].topk(2).indices
            h = (decoder.first(slots[i, best] + decoder.pos[n])).relu()
            for layer in decoder.hidden:
                h = layer(h).relu()
            weight = (decoder.to_alpha(h)[:, 0] / 0.5).softmax(0)
            torch.testing.assert_close(recon[i, n], weight @ decoder.to_feats(h), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(masks[i, best, n], weight, rtol=1e-4, atol=1e-6)
            assert masks[i, :, n].count_nonzero() == 2


def test_block_is_pytorchs_decoder_layer():
    x, slots = tokens(d=16)
    block = CrossBlock(16, 4, causal=True)
    layer = nn.TransformerDecoderLayer(16, 4, 64, 0.0, 'gelu', batch_first=True, norm_first=True)
    with torch.no_grad():
        for norm in block.norms:
            norm.weight.normal_(1, 0.1)
    for mine, its in (('own', 'self_attn'), ('cross', 'multihead_attn'), ('mlp.0', 'linear1'), ('mlp.2', 'linear2')):
        layer.get_submodule(its).load_state_dict(block.get_submodule(mine).state_dict())
    for i, norm in enumerate(block.norms):
        getattr(layer, f'norm{i + 1}').load_state_dict(norm.state_dict())
    got, attn = block(x, slots)
    want = layer(x, slots, tgt_mask=nn.Transformer.generate_square_subsequent_mask(13), tgt_is_causal=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attn.sum(-1), torch.ones(2, 13))


def test_slot_mixer_decodes_the_mixture():
    "Sajjadi et al. 2022: w = softmax(Q K'), s = w slots, one MLP."
    _, slots = tokens(d=16)
    decoder = SlotMixerDecoder(16, 7, 13, 32, mask_temperature=0.5)
    recon, masks = decoder(slots)
    normed, x = decoder.norm(slots), decoder.pos.expand(2, -1, -1)
    for block in decoder.blocks:
        x = block(x, normed)[0]
    for i in range(2):
        for n in range(13):
            w = (normed[i] @ decoder.to_k.weight.T @ decoder.to_q(x[i, n]) / 4 / 0.5).softmax(0)
            torch.testing.assert_close(masks[i, :, n], w, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(recon[i, n], decoder.mlp(w @ normed[i] + decoder.pos[n]), rtol=1e-4, atol=1e-5)


def test_transformer_begins_without_a_patch_and_sees_no_later_one():
    _, slots = tokens(d=16)
    decoder, target = TransformerDecoder(16, 7, 13), torch.randn(2, 13, 7).requires_grad_()
    recon = decoder(slots, None, target).recon
    for n in (0, 5, 12):
        (grad,) = torch.autograd.grad(recon[:, n].sum(), target, retain_graph=True)
        reached = grad.abs().sum((0, 2)) > 0
        assert reached.tolist() == [i < n for i in range(13)]


@pytest.mark.parametrize('setting', ['slot_attention', 'decoder'])
def test_every_name_makes_a_model_that_learns(setting):
    for name in dict(slot_attention=SLOT_ATTENTIONS, decoder=DECODERS)[setting]:
        torch.manual_seed(0)
        init = 'learned' if name == 'bilevel' else 'random'
        model = SlotAutoencoder(8, 16, 4, 16, hidden_dim=32, slot_init=init, **{setting: name})
        x, opt, losses = torch.randn(4, 16, 8), torch.optim.Adam(model.parameters(), 3e-3), []
        for _ in range(30):
            out = model(x)
            losses.append(F.mse_loss(out.recon, x))
            opt.zero_grad()
            losses[-1].backward()
            opt.step()
        assert losses[-1] < losses[0], name
        for masks in (out.attn, out.masks):
            torch.testing.assert_close(masks.sum(1), torch.ones(4, 16), msg=name)


def test_variants_train_and_are_evaluated_by_name(tmp_path, few_scenes):
    settings = dict(data_dir=str(few_scenes), weights='random', resolution='112', num_epochs=1, device='cpu')
    names = dict(slot_attention='multihead', decoder='transformer', hidden_dim=32)
    config = preset('version_0_1', **settings, **names, save_dir=str(tmp_path))
    assert isinstance(config, TrainConfig)
    run_dir = fit(config, show_progress=False)
    assert 0 <= evaluate(run_dir, show_progress=False)['mbo_masks'] <= 1
    assert isinstance(load_run(run_dir).model.decoder, TransformerDecoder)
