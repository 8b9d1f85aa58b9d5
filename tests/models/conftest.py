"""The tests of this folder run on the installed transformers and, unchanged, on others laid over it:

pip install --target .overlays/4.57.6 --no-deps transformers==4.57.6 "huggingface_hub==0.36.*" "tokenizers==0.22.*"
pip install --target .overlays/5.23.0 --no-deps transformers==5.23.0 "tokenizers>=0.23.1,<0.24"
PYTHONPATH=.overlays/4.57.6:$PWD python -m pytest tests/models tests/nn
PYTHONPATH=.overlays/5.23.0:$PWD python -m pytest tests/models tests/nn
"""
