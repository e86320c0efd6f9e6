"""The tests; ROOT is the checkout.

They run on the CPU, also on a machine with a GPU, unless TRITON_INTERPRET=0 asks for it: then those of the kernels and
of the CUDA engine run there. What a test starts inherits that.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

# Before anything imports torch: `compile` takes a GPU where there is one and no device is named.
if os.environ.get("TRITON_INTERPRET", "1") != "0":
    os.environ.update(dict.fromkeys(GPU_VARIABLES, "-1"))
