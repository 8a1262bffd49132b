"""Numbers that attention to caches shares: of decoded blocks, and of a prompt's chunks.

Kernels weigh by powers of 2, of scores times `LOG2E`, and subtract a whole number: the greatest
score of the keys that they look at together, rounded. Another share of the keys then scales a
weight by a power of 2, which changes nothing when the weight is rounded to bfloat16, so that a
result hardly depends on how keys are divided.
"""

import math

LOG2E = math.log2(math.e)
MASKED = -1e30
"""Score of a masked key: finite, so that a row without any key is 0 and not NaN."""
