"""The evaluation script of sunrgbd/evaluate_onevision.py at its second documented path; same flags, same results."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import run_script  # first: loads .env before transformers reads it

# isort: split
from evaluation.onevisionv3.sunrgbd.evaluate_onevision import main, parse_args

if __name__ == "__main__":
    run_script(main, parse_args)
