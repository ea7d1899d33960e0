"""Seconds of one training step of the flux-form network, for bench/train-step.ts: JSON on stdin, a number on stdout.

bf16 autocast over f32 parameters, attention as two products with a dense mask and a softmax between them, AdamW. Each
sequence attends by itself; all other layers see the tokens of all sequences at once, as in the packed network.
"""

import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

request = json.load(sys.stdin)
network, sequences = request["network"], request["sequences"]
torch.set_num_threads(request["threads"])
torch.manual_seed(0)
HEADS, DIM = network["num_attention_heads"], network["attention_head_dim"]
WIDTH = HEADS * DIM


def modulation(count):
    return nn.Linear(WIDTH, count * WIDTH)


def modulate(x, shift, scale):
    return F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift


def heads(x):
    return x.view(-1, HEADS, DIM)


class Rms(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotate(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def attend(q, k, v, places):
    """q, k, v [tokens, heads, dim], text before latents; every sequence by itself."""
    out = torch.empty_like(v)
    for index, mask in places:
        a, b, c = (t[index].transpose(0, 1) for t in (q, k, v))
        weights = torch.softmax((a @ b.transpose(1, 2)) * DIM**-0.5 + mask, -1)
        out = out.index_copy(0, index, (weights.to(c.dtype) @ c).transpose(0, 1).to(out.dtype))
    return out.reshape(-1, WIDTH)


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.mod = modulation(6)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = Rms(), Rms()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def qkv(self, x, chunks):
        y = modulate(x, chunks[0], chunks[1])
        return self.norm_q(heads(self.q(y))), self.norm_k(heads(self.k(y))), heads(self.v(y))

    def finish(self, x, o, chunks):
        x = x + chunks[2] * self.out(o)
        y = modulate(x, chunks[3], chunks[4])
        return x + chunks[5] * self.down(F.gelu(self.up(y), approximate="tanh"))


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.latent = Stream(), Stream()

    def forward(self, c, x, e, rows, places, cos, sin):
        parts = [s.mod(e)[r].chunk(6, -1) for s, r in ((self.text, rows[0]), (self.latent, rows[1]))]
        both = zip(self.text.qkv(c, parts[0]), self.latent.qkv(x, parts[1]))
        q, k, v = (torch.cat(pair) for pair in both)
        o = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, places)
        return self.text.finish(c, o[: len(c)], parts[0]), self.latent.finish(x, o[len(c) :], parts[1])


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.mod = modulation(3)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_q, self.norm_k = Rms(), Rms()
        self.up, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(5 * WIDTH, WIDTH)

    def forward(self, z, e, rows, places, cos, sin):
        shift, scale, gate = self.mod(e)[rows].chunk(3, -1)
        y = modulate(z, shift, scale)
        q, k = (rotate(norm(heads(layer(y))), cos, sin) for norm, layer in ((self.norm_q, self.q), (self.norm_k, self.k)))
        o = attend(q, k, heads(self.v(y)), places)
        return z + gate * self.out(torch.cat((o, F.gelu(self.up(y), approximate="tanh")), -1))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.pooled = nn.Sequential(nn.Linear(network["pooled_projection_dim"], WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.text, self.latent = nn.Linear(network["joint_attention_dim"], WIDTH), nn.Linear(64, WIDTH)
        self.doubles = nn.ModuleList(Double() for _ in range(network["num_layers"]))
        self.singles = nn.ModuleList(Single() for _ in range(network["num_single_layers"]))
        self.mod, self.out = modulation(2), nn.Linear(WIDTH, 64)

    def forward(self, time_features, pooled, text, latent, rows, places, cos, sin):
        e = F.silu(self.time(time_features) + self.pooled(pooled))
        c, x = self.text(text), self.latent(latent)
        for block in self.doubles:
            c, x = block(c, x, e, rows, places, cos, sin)
        z, joint = torch.cat((c, x)), torch.cat(rows)
        for block in self.singles:
            z = block(z, e, joint, places, cos, sin)
        scale, shift = self.mod(e)[rows[1]].chunk(2, -1)
        return self.out(modulate(z[len(c) :], shift, scale))


def layout():
    """Rows of conditioning, and for each sequence its tokens with a dense mask."""
    text_total = sum(s["text"] for s in sequences)
    text_rows, latent_rows, places, text_at, latent_at = [], [], [], 0, text_total
    for r, s in enumerate(sequences):
        tokens = sum(s["frames"])
        index = torch.cat((torch.arange(text_at, text_at + s["text"]), torch.arange(latent_at, latent_at + tokens)))
        times = torch.tensor([t for t, n in enumerate(s["frames"]) for _ in range(n)])
        order = torch.cat((torch.zeros(s["text"], dtype=torch.long), times))
        mask = torch.zeros(len(order), len(order)).masked_fill(order[:, None] < order[None, :], float("-inf"))
        places.append((index, mask))
        text_rows += [r] * s["text"]
        latent_rows += [r] * tokens
        text_at, latent_at = text_at + s["text"], latent_at + tokens
    return (torch.tensor(text_rows), torch.tensor(latent_rows)), places


model = Network()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4)
rows, places = layout()
total = len(rows[0]) + len(rows[1])
angles = torch.rand(total, 1, DIM // 2)
inputs = (
    torch.randn(len(sequences), 256),
    torch.randn(len(sequences), network["pooled_projection_dim"]),
    torch.randn(len(rows[0]), network["joint_attention_dim"]),
    torch.randn(len(rows[1]), 64),
)
target = torch.randn(len(rows[1]), 64)


def step():
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        answer = model(*inputs, rows, places, angles.cos(), angles.sin())
    loss = F.mse_loss(answer.float(), target)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


step()
print(statistics.median(step() for _ in range(request["steps"])))
