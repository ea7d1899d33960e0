"""What the scripts that measure PyTorch share: the request on stdin and how long something takes."""

import json
import sys
import time

import torch

request = json.load(sys.stdin)
device = torch.device(request["device"])
torch.set_num_threads(request["threads"])
torch.manual_seed(0)


def synchronize():
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run):
    for _ in range(2):
        run()
    synchronize()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < request["seconds"]:
        run()
        count += 1
        if count % 8 == 0 or device.type == "cpu":
            synchronize()
    synchronize()
    return (time.perf_counter() - begin) / count


def dtype_of(problem):
    return torch.bfloat16 if problem["dtype"] == "bf16" else torch.float32
