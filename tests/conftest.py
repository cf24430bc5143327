import torch

# Tiny networks gain nothing from threads, and lose much when another process wants the same cores.
torch.set_num_threads(1)
