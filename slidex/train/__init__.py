"""Settings, the training loop, checkpoints, evaluation and prediction.

Kept empty on purpose: ``slidex --help`` reads `slidex.train.config` and must not import torch.
"""
