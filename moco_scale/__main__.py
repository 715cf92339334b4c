"""`python -m moco_scale`, for torchrun: the same command line as `moco-scale`."""

import sys

from moco_scale.cli import main

sys.exit(main())
