"""Stand-in for CPU-only set-ups: importable, but every use is an error."""

__version__ = "2.11.0"


def __getattr__(name: str):
    raise AttributeError(f"torchaudio.{name} is not available: this CPU-only set-up has a stand-in without audio")
