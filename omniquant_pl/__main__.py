"""``python -m omniquant_pl fit --config w4a4.yaml``, as train.py."""

from omniquant_pl.cli.program import main

if __name__ == "__main__":
    main()
