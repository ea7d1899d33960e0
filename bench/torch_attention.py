"""Seconds of PyTorch's attention on problems of bench/attention.ts: JSON on stdin, JSON on stdout.

Each problem is {dtype, heads, length, dim, mask?: {segment, order}, backward}. The answer for each is a list of
[name, seconds]: the backends of scaled_dot_product_attention that take it (two products and a softmax where PyTorch has
none to choose), and FlexAttention for masks on a GPU.
Two products a pair forward, five backward; a mask is a dense tensor for the former and a rule for the latter.
"""

import json
import sys

import torch
from torch.nn import functional as F

try:
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:  # before PyTorch 2.3: two products and a softmax are all there is
    SDPBackend = None

from torch_timing import device, dtype_of, request, seconds_of


def visible(mask):
    segment = torch.tensor(mask["segment"], device=device)
    order = torch.tensor(mask["order"], device=device)
    return segment, order, (segment[:, None] == segment[None]) & (order[:, None] >= order[None])


def timed(attend, q, k, v, backward):
    if not backward:
        with torch.no_grad():
            return seconds_of(lambda: attend(q, k, v))
    out = attend(q, k, v)
    grad = torch.randn_like(out)
    return seconds_of(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))


def kernels(mask):
    """Name and function of what computes attention."""
    if SDPBackend is None:

        def unfused(q, k, v):
            logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            if mask is not None:
                logits = logits.masked_fill(~mask, float("-inf"))
            return torch.softmax(logits, -1) @ v

        return [("unfused", unfused)]

    def fused(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return attend

    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return [(f"SDPA {name.lower()}", fused(getattr(SDPBackend, name))) for name in names]


def measure(problem):
    shape = (1, problem["heads"], problem["length"], problem["dim"])
    q, k, v = (
        torch.randn(shape, device=device, dtype=dtype_of(problem), requires_grad=problem["backward"]) for _ in range(3)
    )
    found, mask = [], None
    if problem.get("mask"):
        segment, order, mask = visible(problem["mask"])
    for name, attend in kernels(mask):
        if name in ("SDPA math", "unfused") and problem["length"] > 8192:
            continue  # its matrix of weights does not fit
        try:
            found.append([name, timed(attend, q, k, v, problem["backward"])])
        except RuntimeError:
            continue  # this backend does not take the problem
    if mask is not None and device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length = problem["length"]
        blocks = create_block_mask(
            lambda b, h, i, j: (segment[i] == segment[j]) & (order[i] >= order[j]),
            *(None, None, length, length),
            device=device,
        )
        flex = torch.compile(flex_attention)
        found.append(
            ["FlexAttention", timed(lambda q, k, v: flex(q, k, v, block_mask=blocks), q, k, v, problem["backward"])]
        )
    return found


json.dump([measure(problem) for problem in request["problems"]], sys.stdout)
