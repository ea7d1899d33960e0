"""Seconds of PyTorch's convolution, group norm and AdamW on problems of bench/against-torch.ts: JSON on stdin, JSON on stdout.

The answer for each problem is a list of [name, seconds], one for every way that takes it:
{op: "conv3d", dtype, channels, frames, height, width}: 3x3x3, two frames of zeros in front, in both memory formats;
{op: "group_norm", dtype, images, pixels, channels}: 32 groups, then SiLU, in both memory formats;
{op: "adamw", count}: one step on f32, fused where PyTorch has that.
"""

import json
import sys

import torch
from torch.nn import functional as F

from torch_timing import device, dtype_of, request, seconds_of


def formats(make, plain, last):
    for name, memory in (("", plain), (", channels last", last)):
        yield name, make().contiguous(memory_format=memory)


def conv3d(p):
    shape = (1, p["channels"], p["frames"], p["height"], p["width"])
    weight = torch.randn((p["channels"], p["channels"], 3, 3, 3), device=device, dtype=dtype_of(p))
    bias = torch.randn(p["channels"], device=device, dtype=dtype_of(p))
    make = lambda: torch.randn(shape, device=device, dtype=dtype_of(p))
    for name, x in formats(make, torch.contiguous_format, torch.channels_last_3d):
        yield f"conv3d{name}", lambda: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), weight, bias)


def group_norm(p):
    shape = (p["images"], p["channels"], p["pixels"], 1)
    weight, bias = (torch.randn(p["channels"], device=device, dtype=dtype_of(p)) for _ in range(2))
    make = lambda: torch.randn(shape, device=device, dtype=dtype_of(p))
    for name, x in formats(make, torch.contiguous_format, torch.channels_last):
        yield f"group_norm and silu{name}", lambda: F.silu(F.group_norm(x, 32, weight, bias))


def adamw(p):
    for name, options in (("fused", {"fused": True}), ("foreach", {"foreach": True})):
        parameter = torch.nn.Parameter(torch.randn(p["count"], device=device))
        parameter.grad = torch.randn_like(parameter)
        try:
            optimizer = torch.optim.AdamW([parameter], lr=1e-6, betas=(0.9, 0.95), weight_decay=1e-4, **options)
            yield f"AdamW {name}", optimizer.step
        except (TypeError, RuntimeError):
            continue  # this version or device has no such form


def measure(problem):
    found = []
    for name, run in {"conv3d": conv3d, "group_norm": group_norm, "adamw": adamw}[problem["op"]](problem):
        try:
            with torch.no_grad():
                found.append([name, seconds_of(run)])
        except RuntimeError:
            continue
    return found


json.dump([measure(problem) for problem in request["problems"]], sys.stdout)
