"""The tests of this folder run on the installed transformers and, unchanged, on others laid over it.

`make test` does so. By hand:

    overlay=.cache/overlays/transformers-4.57.6
    pip install --target $overlay --no-deps transformers==4.57.6 "huggingface_hub==0.36.*" "tokenizers==0.22.*"
    PYTHONPATH=$overlay python -m pytest tests/models

    overlay=.cache/overlays/transformers-5.23.0
    pip install --target $overlay --no-deps transformers==5.23.0 "tokenizers>=0.23.1,<0.24"
    PYTHONPATH=$overlay python -m pytest tests/models
"""
