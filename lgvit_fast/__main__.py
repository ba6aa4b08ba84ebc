"""`python -m lgvit_fast` is `lgvit-fast`."""

import sys

if __name__ == "__main__":
    try:
        from lgvit_fast.cli import main
    except KeyboardInterrupt:
        print("lgvit-fast: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(main())
