"""`python -m kernels.bench`."""

import sys

from kernels.bench.suite import main
from kernels.shared.pipes import end_with_reader

if __name__ == "__main__":
    end_with_reader()
    sys.exit(main())
