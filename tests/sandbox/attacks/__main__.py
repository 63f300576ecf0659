"""`python -I FOLDER` leaves out what lies beside the folder, and so this very package."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
runpy.run_module("attacks.run", run_name="__main__")
