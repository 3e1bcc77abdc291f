"""Several processes that train one model, by PyTorch's own engine: nothing outside this folder knows of `torch.distributed`."""
