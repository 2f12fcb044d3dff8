"""`python -m kernels.prove`."""

import sys

from kernels.prove.command import main
from kernels.shared.pipes import end_with_reader

if __name__ == "__main__":
    end_with_reader()
    sys.exit(main())
