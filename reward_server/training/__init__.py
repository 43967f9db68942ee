"""Training of reward models: data, losses, the loop, LoRA, ensembles."""
