"""Triton decides at import whether kernels are interpreted, so the tests in interpreted/ run in a process of their own."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
