"""Plumbing: knows nothing of the method. Imported before torch, it lets idle threads sleep early.

OpenMP's threads spin at the end of each parallel loop, by default for 300,000 rounds. Beside a job
on the same cores they spin for a core that the other one holds, and a training step takes several
times as long. A short spin costs 3 to 7 % alone (`python tests/benchmark.py busy`).
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1250")  # read once, when torch loads libgomp
