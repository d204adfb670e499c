"""launch/train.py with a working folder per rank, as on separate machines: run_in_own_folder.py TOP [arguments].

Rank N works in TOP/N, so that relative paths in the configuration are its own.
"""

import os
import sys

from launch import train

os.chdir(os.path.join(sys.argv[1], os.environ["RANK"]))
sys.exit(train.main(sys.argv[2:]))
