#!/usr/bin/env bash
# GroupNorm of torch 2.13.0 on a CPU is far less exact for a large channels-last picture than for the same numbers in
# contiguous memory. With a mean of 100 and a deviation of 1 its result is about five times too small.
#
# Guess: the memory format changes the speed, and results in float32 agree to about 1e-6. Observed: contiguous memory is
# exact to 1e-5, but the channels-last result is off by 0.001 for a mean of 0, and by more than 1 for a mean of 100 on
# one thread. The error grows with the picture and the mean, and falls with the number of threads. That fits sums of
# x and x² of all pixels in float32, one pixel after the other; it is the same with AVX-512, AVX2 and without both.
# Exits with 1 if a newer version behaves differently.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6

"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import group_norm

torch.manual_seed(0)
noise = torch.randn(1, 8, 1024, 1024)


def errors(mean, threads):
    """Print and return the largest errors of both formats; exact values have a deviation of 1."""
    torch.set_num_threads(threads)
    contiguous = noise + mean
    channels_last = contiguous.contiguous(memory_format=torch.channels_last)
    assert torch.equal(contiguous, channels_last)
    exact = group_norm(contiguous.double(), 4)
    results = group_norm(contiguous, 4), group_norm(channels_last, 4)
    first, second = (float((result - exact).abs().max()) for result in results)
    print(
        f"mean {mean:3}, {threads} threads: contiguous off by {first:.0e}, channels-last "
        f"by {second:.0e}; its deviation is {float(results[1].std()):.3f}"
    )
    return first, second


print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
around_0, around_100, in_parallel = errors(0, 1), errors(100, 1), errors(100, 4)
exact_enough = max(around_0[0], around_100[0], in_parallel[0]) < 1e-4
far_off = around_0[1] > 3e-4 and around_100[1] > 1 and in_parallel[1] > 0.01
raise SystemExit(not (exact_enough and far_off))
PYTHON
