"""`python -m kernels.bench`."""

import sys

from kernels.shared.pipes import end_with_reader, need_triton

if __name__ == "__main__":
    end_with_reader()
    need_triton()
    from kernels.bench.suite import main

    sys.exit(main())
