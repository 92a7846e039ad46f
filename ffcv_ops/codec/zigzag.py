"""The order of a JPEG's coefficients."""

import numpy as np

ZIGZAG = np.array(sorted(np.ndindex(8, 8), key=lambda at: (sum(at), at[1 - sum(at) % 2])))
"""Row and column of each coefficient, int64 (64, 2)."""
