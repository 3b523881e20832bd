import sys

from dvt.cli import main

sys.exit(main())
