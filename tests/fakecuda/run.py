"""Run a program on the stand-in for a GPU: ``python run.py SCRIPT|-m MODULE WORDS``, with the library preloaded."""

import runpy
import sys

import fakecuda

fakecuda.patch()
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
