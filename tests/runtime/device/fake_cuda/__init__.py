"""A GPU that is not there, as strict as one: torch.cuda and tensors of cuda:0 and cuda:1 over memory of the CPU.

Results are computed at once, so that they can be compared; what the order of the work on a GPU would not guarantee is
a fault. The machine notes the faults and raises `Fault`, which no handler of errors in the package catches.

- streams.py: streams, events, and the vector clocks that say what has surely happened before what.
- memory.py: who wrote and read a tensor's memory last; the caching allocator; pinned and pageable host memory.
- graphs.py: capture, which records and computes nothing, and replay, which overwrites other graphs of the pool.
- tensors.py: tensors that lie on the GPU, and what every operation on them is checked for.
- machine.py: the GPUs as a whole, in place of torch.cuda.
"""

from tests.runtime.device.fake_cuda.machine import Machine, captured, fake_cuda
from tests.runtime.device.fake_cuda.streams import Fault

__all__ = ["Fault", "Machine", "captured", "fake_cuda"]
