"""`python -m lgvit_fast` is `lgvit-fast`."""

import sys

from lgvit_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
