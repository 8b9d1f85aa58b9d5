"""``python -m kt_sft`` is the ``kt-sft`` command."""

from kt_sft.cli import main

if __name__ == "__main__":
    main()
