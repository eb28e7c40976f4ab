"""How each data set that comes with the package is made from published packages."""

import sys
from pathlib import Path

# The folder of the checkout, whose benchmarks and builder of the corpus of `mini` fetch packages.
sys.path.append(str(Path(__file__).resolve().parents[2]))
