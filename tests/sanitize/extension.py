"""pytest plugin: test the extension that KT_SFT_EXTENSION names instead of the installed one (``make sanitize``)."""

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location("kt_sft._C", os.environ["KT_SFT_EXTENSION"])
assert _spec is not None and _spec.loader is not None
sys.modules["kt_sft._C"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["kt_sft._C"])


def pytest_report_header() -> str:
    return f"extension: {os.environ['KT_SFT_EXTENSION']}"
