"""Calibrates, measures and exports quantized language models: ``python train.py fit --config w4a4.yaml``.

``python train.py --help`` lists the commands, ``python train.py fit --help`` every setting.
"""

from omniquant_pl.cli.program import main

if __name__ == "__main__":
    main()
