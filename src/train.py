"""Training script for ``accelerate launch`` and ``torchrun``: LLaMA-Factory's run_exp, nothing else."""

from llamafactory.train.tuner import run_exp


def main() -> None:
    run_exp()


if __name__ == "__main__":
    main()
