"""`python -m kernels.prove`."""

import sys

from kernels.prove.command import main

if __name__ == "__main__":
    sys.exit(main())
