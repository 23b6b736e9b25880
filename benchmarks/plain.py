"""The other side of the benchmarks: slot attention and its decoders as the papers write them, eager PyTorch in single
precision, Adam as it comes.

Nothing of slotnb is used. The parameters have slotnb's names, so that both sides start from the same numbers and
must arrive at the same ones. Locatello et al., Object-Centric Learning with Slot Attention, NeurIPS 2020; Seitzer
et al., Bridging the Gap to Real-World Object-Centric Learning, ICLR 2023."""

import torch
from torch import nn


class SlotInit(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.zeros(1, 1, d))

    def forward(self, noise):
        return self.mean + self.log_std.exp() * noise


class SlotAttention(nn.Module):
    "Algorithm 1."

    def __init__(self, d, iters=3, hidden=256, eps=1e-8):
        super().__init__()
        self.iters, self.eps = iters, eps
        self.norm_inputs, self.norm_slots, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(d, d, bias=False),
            nn.Linear(d, d, bias=False),
            nn.Linear(d, d, bias=False),
        )
        self.gru, self.mlp = nn.GRUCell(d, d), nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, d))

    def forward(self, inputs, slots):  # (b n d), (b k d)
        b, k, d = slots.shape
        inputs = self.norm_inputs(inputs)
        key, value = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.iters):
            slots_prev = slots
            logits = key @ self.to_q(self.norm_slots(slots)).transpose(1, 2) / d**0.5  # (b n k)
            attn = logits.softmax(-1) + self.eps
            updates = (attn / attn.sum(1, keepdim=True)).transpose(1, 2) @ value
            slots = self.gru(updates.reshape(b * k, d), slots_prev.reshape(b * k, d)).reshape(b, k, d)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, logits


class MLPDecoder(nn.Module):
    "The MLP broadcast decoder: every layer on every pair of slot and patch."

    def __init__(self, d, feat_dim, patches, hidden, temperature):
        super().__init__()
        self.temperature, self.pos = temperature, nn.Parameter(torch.zeros(patches, d))
        self.first, self.hidden = (
            nn.Linear(d, hidden),
            nn.ModuleList([nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)]),
        )
        self.to_feats, self.to_alpha = nn.Linear(hidden, feat_dim), nn.Linear(hidden, 1)

    def forward(self, slots, logits):
        x = self.first(slots[:, :, None] + self.pos).relu()  # (b k n h)
        for layer in self.hidden:
            x = layer(x).relu()
        masks = (self.to_alpha(x) / self.temperature).softmax(1)
        return (masks * self.to_feats(x)).sum(1), masks[..., 0]


class AttentionDecoder(nn.Module):
    "slotnb's own default, written down plainly: masks are slot attention's, a slot is one feature."

    def __init__(self, d, feat_dim, patches, hidden, temperature):
        super().__init__()
        self.temperature = temperature
        self.mlp, self.skip = (
            nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, feat_dim)),
            nn.Linear(d, feat_dim, bias=False),
        )

    def forward(self, slots, logits):
        masks = (logits / self.temperature).softmax(-1)  # (b n k)
        return masks @ (self.mlp(slots) + self.skip(slots)), masks.transpose(1, 2)


class Plain(nn.Module):
    def __init__(self, feat_dim, patches, slot_dim, decoder, hidden, temperature):
        super().__init__()
        self.project = nn.Sequential(
            nn.LayerNorm(feat_dim, elementwise_affine=False),
            nn.Linear(feat_dim, 384),
            nn.ReLU(),
            nn.Linear(384, slot_dim),
        )
        self.init, self.slot_attention = SlotInit(slot_dim), SlotAttention(slot_dim)
        self.decoder = dict(mlp=MLPDecoder, attention=AttentionDecoder)[decoder](
            slot_dim, feat_dim, patches, hidden, temperature
        )

    def forward(self, feats, noise):
        slots, logits = self.slot_attention(self.project(feats), self.init(noise))
        recon, masks = self.decoder(slots, logits)
        return recon, slots, logits.softmax(-1).transpose(1, 2), masks


class PlainStep:
    "One step of training: the MSE, the slot diversity term, clipping, Adam."

    def __init__(self, model, diversity_weight, clip_norm):
        self.model, self.opt, self.diversity_weight, self.clip_norm = (
            model,
            torch.optim.Adam(model.parameters()),
            diversity_weight,
            clip_norm,
        )

    def __call__(self, feats, noise, lr):
        for group in self.opt.param_groups:
            group['lr'] = lr
        recon, slots, _, _ = self.model(feats, noise)
        mse = ((recon - feats) ** 2).mean()
        unit, k = nn.functional.normalize(slots, dim=-1), slots.shape[1]
        cosine = ((unit @ unit.transpose(1, 2)).sum((1, 2)) - k).mean() / (k * (k - 1))
        loss = mse + self.diversity_weight * cosine
        self.opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.opt.step()
        return torch.stack([loss, mse, cosine, norm]).detach()
